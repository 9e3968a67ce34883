"""Choosing the size by a budget, and recovery from the dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import batches, build, vit
from torch import nn

from zoo.ffn import compressing, product_key
from zoo.ffn.compressing import METHODS, batch_macs, compress, config_for_budget, recover
from zoo.ffn.prune import PruneConfig
from zoo.ffn.technique import model_output
from zoo.profiling import count_params


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_macs_is_met_by_the_whole_model(method: str) -> None:
    model = vit(embed_dim=32, depth=4)
    data = batches("timm", 1)
    config, share = config_for_budget(model, METHODS[method], "macs<=0.8", data[0])
    assert share <= 0.8
    report = compress(model, config, data)
    assert report.technique.replace("_", "-") == method


def test_a_budget_of_time_is_met_and_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller model was made where no layer may change, so that no budget of time could be had."""
    model = vit(embed_dim=64, depth=4, img_size=32).train()
    before = copy.deepcopy(model.state_dict())
    clock = [0]

    def run(module: nn.Module, batch: Any) -> torch.Tensor:
        clock[0] += count_params(module)  # a machine whose time is that of the work alone
        return model_output(module, batch)

    monkeypatch.setattr(compressing, "model_output", run)
    monkeypatch.setattr(compressing.time, "process_time", lambda: clock[0])
    config, share = config_for_budget(model, PruneConfig(), "latency<=0.9", torch.randn(2, 3, 32, 32))
    assert 0.8 < share <= 0.9
    assert isinstance(config, PruneConfig)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class _Reading(nn.Module):
    """Runs a product on values that it looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x) if bool(torch.isfinite(x).all()) else x


def test_the_work_of_fused_layers_is_counted_and_statistics_stay() -> None:
    """PyTorch runs such a layer as one operator, which counted as nothing: a budget was divided by zero."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval())
    x = torch.randn(3, 4, 16)
    assert batch_macs(model, x) == 4 * (4 * 16 * 16 + 2 * 16 * 64) + 2 * 4 * 4 * 16
    assert model.training
    assert int(model[0].num_batches_tracked) == 0
    reading = nn.Sequential(model[1], _Reading())
    assert batch_macs(reading, x) == batch_macs(model[1], x) + 4 * 16 * 8
    _, share = config_for_budget(model.eval(), PruneConfig(), "macs<=0.8", x)
    assert 0.5 < share <= 0.8


@pytest.mark.parametrize("budget", ["macs<=1.2", "macs=0.5", "flops<=0.5", "macs<=0"])
def test_a_budget_is_a_share(budget: str) -> None:
    with pytest.raises(ValueError, match="budget must look like"):
        config_for_budget(vit(), PruneConfig(), budget, batches("timm", 1)[0])


def test_what_cannot_be_met_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"cannot be met by feed-forward layers alone: the nearest that can is macs<=0\."
    ):
        config_for_budget(vit(), PruneConfig(), "macs<=0.05", batches("timm", 1)[0])


def test_what_stands_in_the_way_of_every_budget_is_said() -> None:
    model, data = vit(), batches("timm", 1)
    compress(model, "prune", data)
    with pytest.raises(ValueError, match=r"has been through zoo\.ffn\.prune already"):
        config_for_budget(model, PruneConfig(), "macs<=0.8", data[0])
    model = vit()
    product_key.apply(model, product_key.ProductKeyConfig(keys=6, top_k=4))
    with pytest.raises(ValueError, match="no dense feed-forward layer left after product_key: start from the one"):
        config_for_budget(model, PruneConfig(), "macs<=0.8", data[0])


def test_unknown_method_has_a_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean prune"):
        compress(vit(), "prun", batches("timm", 1))


@pytest.mark.parametrize("kind", ["timm", "dit"])
@pytest.mark.parametrize("method", ["prune", "low-rank", "repa"])
def test_recovery_comes_nearer_to_the_dense_model(kind: str, method: str) -> None:
    torch.manual_seed(0)
    model = build(kind)
    dense = copy.deepcopy(model)
    data = batches(kind, 2, size=8)
    compress(model, method, data)
    losses = recover(model, dense, data, epochs=20, lr=5e-4)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert not model.training


def test_recovery_takes_so_many_steps() -> None:
    """`steps` counts batches, over as many passes as they take."""
    model, data = vit(depth=1), batches("timm", count=3)
    assert len(recover(model, vit(depth=1), data, steps=2)) == 2
    assert len(recover(model, vit(depth=1), data, steps=4)) == 4
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        recover(model, vit(depth=1), data, steps=0)
