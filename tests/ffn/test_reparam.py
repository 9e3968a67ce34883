"""`zoo.reparameterize` on any module: what it finds, what it reports, what it refuses."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import reparameterize_model
from torch import Tensor, nn

import zoo
from zoo.ffn.reparam import ReparamReport, reparameterize
from zoo.layers.conv_norm import ConvNorm, NormLinear
from zoo.layers.ffn import RePaFFN


class Net(nn.Module):
    """Two mergeable layers, one that cannot be merged, one plain."""

    def __init__(self) -> None:
        super().__init__()
        self.a = RePaFFN(8, 32, 8)
        self.b = RePaFFN(8, 32, 32)
        self.c = RePaFFN(8, 32, 8, feature_norm="LayerNorm")
        self.d = nn.Linear(8, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_report() -> None:
    net, x = Net().eval(), torch.randn(2, 5, 8)
    expected = net(x)
    report = reparameterize(net)
    assert (net(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    first, second = report.layers
    assert (first.name, second.name) == ("a", "b")
    assert first.folded == ("3 BatchNorms", "24 idle channels", "residual")
    assert second.folded == ("2 BatchNorms",)  # nothing is idle: a C x C matrix would only cost
    assert first.params_before == 8 * 32 * 2 + 32 + 8 + 2 * (8 + 32)
    assert first.params_after == 8 * 8 + 8 + 2 * 8 * 8 + 8
    assert first.macs_before == 196 * 2 * 8 * 32
    assert first.macs_after == 196 * 3 * 8 * 8
    assert second.macs_before == second.macs_after
    assert first.input_shape == (1, 196, 8)
    assert report.macs_before == first.macs_before + second.macs_before
    assert report.unchanged == ("c",)
    assert report.params_after == sum(parameter.numel() for parameter in net.parameters()) < report.params_before
    assert report.difference is not None
    assert 0 < report.difference < 1e-5


def test_report_is_a_table() -> None:
    text = str(reparameterize(Net().eval()))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "folded", "parameters", "MACs", "on", "input", "difference"]
    assert "24 idle channels" in lines[2]
    assert "1x196x8" in lines[2]
    assert lines[-2].startswith("whole model")
    assert lines[-1] == "unchanged: c"
    assert len({line.index("1x196x8") for line in lines[2:4]}) == 1  # columns line up


def test_long_report_is_grouped_by_what_was_folded() -> None:
    net = nn.Sequential(*(ConvNorm(4, 4, 3) for _ in range(40)), NormLinear(4, 2)).eval()
    report = reparameterize(net)
    lines = str(report).splitlines()
    assert len(report.layers) == 41
    assert len(lines) == 5
    assert lines[2].startswith("0 and 40 more")
    assert "41 layers" in lines[-1]


def test_twice_is_once() -> None:
    net = Net().eval()
    reparameterize(net)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    again = reparameterize(net)
    assert again.layers == ()
    assert again.unchanged == ("a", "b", "c")
    assert again.params_before == again.params_after
    assert str(again).startswith("Nothing to re-parameterise: 3 layers unchanged")
    assert again.macs_before is again.difference is None
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_sample_gives_real_inputs() -> None:
    report = reparameterize(Net().eval(), sample=torch.randn(3, 7, 8))
    assert report.layers[0].input_shape == (3, 7, 8)
    assert report.layers[0].macs_before == 21 * 2 * 8 * 32


def test_without_measuring() -> None:
    report = reparameterize(Net().eval(), measure=False)
    assert report.layers[0].macs_before is None
    assert report.layers[0].difference is None
    assert "whole model" in str(report)


def test_training_mode_is_refused_before_anything_changes() -> None:
    net = Net().eval()
    net.b.train()
    keys = set(net.state_dict())
    with pytest.raises(RuntimeError, match=r"Net is in training mode.*model\.eval\(\)"):
        reparameterize(net)
    assert set(net.state_dict()) == keys


@pytest.mark.parametrize("net", [Net(), ConvNorm(3, 4, 3)], ids=["ffn", "convolution"])
def test_the_random_state_is_left_alone(net: nn.Module) -> None:
    net.eval()
    before = torch.get_rng_state()
    reparameterize(net)
    assert torch.equal(torch.get_rng_state(), before)


def test_module_that_is_the_layer() -> None:
    report = reparameterize(RePaFFN(8, 32, 8).eval())
    assert report.layers[0].name == ""
    assert "(model)" in str(report)


def test_nothing_to_do() -> None:
    report = reparameterize(nn.Linear(3, 3).eval())
    assert report == ReparamReport(params_before=12, params_after=12)


def test_on_the_meta_device() -> None:
    """Counts need no numbers."""
    net = timm.create_model("repavit_tiny", device="meta", idle_ratio=0.75).eval()
    report = reparameterize(net)
    assert (report.params_before, report.params_after) == (5736040, 3494248)
    assert report.macs_after == 12 * 196 * 3 * 192**2
    assert report.difference is None


def test_timms_own_blocks_take_part() -> None:
    """RepVGG's `reparameterize()` returns nothing and has no example input: a sample measures it."""
    net, x = timm.create_model("repvgg_a0", num_classes=4).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        report = reparameterize(net, sample=x)
        assert (net(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(report.layers) == 22
    assert "conv_1x1.bn" in report.layers[0].folded
    assert report.difference is not None
    assert report.macs_after < report.macs_before


def test_modules_around_layers_come_after_them() -> None:
    """A model with a `reparameterize()` of its own is called too, once its layers are done."""
    calls = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def reparameterize(self) -> tuple[str, ...]:
            calls.append(self.net.a.form)
            return ()

    report = reparameterize(Outer().eval())
    assert calls == ["merged"]
    assert [layer.name for layer in report.layers] == ["net.a", "net.b"]
    assert report.unchanged == ("net.c",)


def test_timms_function_works_too() -> None:
    net, x = Net().eval(), torch.randn(2, 5, 8)
    merged = reparameterize_model(net)
    assert merged.a.form == "merged"
    assert net.a.form == "training"  # timm copies
    assert (merged(x) - net(x)).abs().max() < 1e-5 * net(x).abs().max()


def test_inside_a_lightning_module() -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = timm.create_model("repavit_tiny", features_only=True, out_indices=(0, 1))

    task = Task()
    with pytest.raises(RuntimeError, match="Task is in training mode"):
        zoo.reparameterize(task)
    report = zoo.reparameterize(task.eval())
    assert [layer.name for layer in report.layers] == ["model.model.blocks.0.mlp", "model.model.blocks.1.mlp"]
