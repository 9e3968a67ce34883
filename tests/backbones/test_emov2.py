"""EMOv2: the authors' outputs, the paper's sizes, fast attention against the plain one, every way to load weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from parity import protocol
from registered import randomize, relative
from torch import Tensor, nn

import zoo
from zoo.backbones.emov2 import (
    EMOv2,
    InvertedBlock,
    checkpoint_filter_fn,
    detect,
)
from zoo.bench.plain_backbones import PLAIN, plain_hybrid_attention
from zoo.layers.window import HybridAttention
from zoo.weights import CheckpointError, load_strict, read_checkpoint

RECORDS = Path(__file__).parents[1] / "parity" / "emov2"
SMALL = dict(depths=(1, 2, 2, 2), dims=(8, 12, 16, 24), dim_heads=(4, 4, 8, 8), num_classes=5)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small(**kwargs: Any) -> nn.Module:
    """Return a small model with random statistics and scales, in evaluation mode."""
    return randomize(timm.create_model("emov2_1m", **{**SMALL, **kwargs})).eval()


def authors_state(record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the authors' state dict, filled by the protocol."""
    state = {key: torch.from_numpy(value) for key, value in protocol.fill_state_dict(record["state_dict"]).items()}
    for key, (shape, _) in record["state_dict"].items():
        state.setdefault(key, torch.zeros(shape, dtype=torch.int64))  # BatchNorm's counters
    return state


@pytest.mark.parametrize("name", ["emov2_1m", "emov2_5m"])
@torch.no_grad()
def test_parity_with_the_authors(name: str) -> None:
    """Maps of all stages, norm, pooled features and logits in float64 within 1e-10 of the authors' code; also fused."""
    record, outputs = protocol.load(RECORDS / f"{name}_224")
    model = timm.create_model(name)
    assert count(model) == record["num_params"]
    load_strict(model, authors_state(record), checkpoint_filter_fn)
    model.double().eval()
    x = torch.from_numpy(protocol.make_input(**record["input"])).double()
    for fused in (False, True):
        if fused:
            zoo.reparameterize(model, measure=False)
        final, maps = model.forward_intermediates(x)
        found = {f"stage{i}": value for i, value in enumerate(maps)} | {"norm": final}
        for key, place in record["sampled"].items():
            full = found[place["of"]]
            assert list(full.shape) == place["full_shape"]
            assert abs(float(full.norm()) / place["full_norm"] - 1) < 1e-10
            index = tuple(slice(None, None, step) for step in place["step"])
            assert protocol.rel_error(full[index].numpy(), outputs[key]) < 1e-10, key
        assert protocol.rel_error(model.forward_head(final, pre_logits=True).numpy(), outputs["pooled"]) < 1e-10
        assert protocol.rel_error(model.forward_head(final).numpy(), outputs["logits"]) < 1e-10


COUNTS = {  # (parameters, fused)
    "emov2_1m": (1460844, 1454748),
    "emov2_2m": (2384312, 2375592),
    "emov2_5m": (5126440, 5112328),
    "emov2_20m": (20195208, 20163112),
    "emov2_50m": (49815560, 49750056),
    "emov2_emo1_1m": (1454316, 1448220),
    "emov2_emo1_2m": (2374840, 2366120),
    "emov2_emo1_5m": (5110312, 5096200),
    "emov2_emo1_20m": (20170632, 20138536),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    model = timm.create_model(name, device="meta").eval()
    before = count(model)
    zoo.reparameterize(model, measure=False)
    assert (before, count(model)) == COUNTS[name]


@pytest.mark.parametrize("partition", ["both", "close", "remote"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("size", "window"), [((14, 14), 7), ((7, 7), 7), ((8, 12), 4), ((5, 13), 4), ((3, 2), 7), ((9, 5), 0)], ids=str
)
def test_attention_equals_the_plain_form(partition: Any, batch: int, size: tuple[int, int], window: int) -> None:
    """Outputs and all gradients, on maps that the window divides, that it does not, and that it covers."""
    layer = HybridAttention(16, 40, 4, window, partition, dtype=torch.float64)
    x = torch.randn(batch, 16, *size, dtype=torch.float64, requires_grad=True)
    weights = (x, layer.qkv.weight, layer.qkv.bias)
    fast, plain = layer(x), plain_hybrid_attention(layer, x)
    assert fast.shape == (batch, 40, *size)
    assert relative(fast.detach(), plain.detach()) < 1e-12
    target = torch.randn_like(fast)
    for found, expected in zip(
        torch.autograd.grad((fast * target).sum(), weights),
        torch.autograd.grad((plain * target).sum(), weights),
        strict=True,
    ):
        assert relative(found, expected) < 1e-12


def test_padded_tokens_take_part() -> None:
    """As in the authors' code, where nothing masks them: their query and key are the bias, their value GELU(bias)."""
    layer = HybridAttention(8, 16, 4, 4, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    whole = layer(torch.nn.functional.pad(x, (0, 1, 0, 1)))[:, :, :3, :3]
    assert relative(layer(x), whole) < 1e-12
    layer.window_size = 0
    assert relative(layer(x), whole) > 1e-3


def test_kernels_that_fuse_give_the_same() -> None:
    """Other devices take `scaled_dot_product_attention`; checked here on the meta device for its shapes."""
    layer = HybridAttention(16, 40, 4, 4, device="meta")
    assert layer(torch.empty(2, 16, 6, 9, device="meta")).shape == (2, 40, 6, 9)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_blocks_equal_the_plain_form(fused: bool) -> None:
    model, x = small(window_size=3).double(), torch.randn(2, 3, 80, 112, dtype=torch.float64)
    expected = model(x)
    if fused:
        zoo.reparameterize(model, measure=False)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if type(module) in PLAIN["emov2"]:
            module.forward = PLAIN["emov2"][type(module)].__get__(module)
    assert relative(plain(x), expected) < 1e-11
    assert relative(model(x), expected) < 1e-11


@torch.no_grad()
def test_fusing_holds_where_maps_are_padded() -> None:
    """The LayerNorm before attention keeps its bias: padding comes behind it."""
    model, x = small().double(), torch.randn(1, 3, 97, 61, dtype=torch.float64)
    expected = model(x)
    report = zoo.reparameterize(model)
    assert relative(model(x), expected) < 1e-12
    said = {layer.name: layer.folded for layer in report.layers}
    assert said["stem.conv1"] == ("norm",)
    assert said["stages.0.0"] == ("norm", "layer scale")
    assert said["stages.2.0"] == ("affine part of the norm", "layer scale")
    assert said["stages.2.1"] == ("layer scale",)
    assert said["stages.2.1.expand"] == ("query scale",)
    assert all(layer.difference is None or layer.difference < 1e-12 for layer in report.layers)


@torch.no_grad()
def test_merged_form_takes_merged_weights() -> None:
    model, merged, x = small(), small(merged=True), torch.randn(1, 3, 64, 64)
    zoo.reparameterize(model, measure=False)
    load_strict(merged, model.state_dict(), checkpoint_filter_fn)
    assert torch.equal(merged(x), model(x))
    with pytest.raises(ValueError, match="merged=True"):
        load_strict(small(), model.state_dict(), checkpoint_filter_fn)


def test_windows() -> None:
    """One for all stages or one for each; weights fit all of them, because they hold no positions."""
    plain, given = small(), small(window_size=(7, 7, 4, 2))
    sizes = [m.window_size for m in given.modules() if isinstance(m, HybridAttention)]
    assert sizes == [4, 2]
    given.load_state_dict(plain.state_dict())
    large = timm.create_model("emov2_5m.dist_in1k_512", device="meta")
    assert {m.window_size for m in large.modules() if isinstance(m, HybridAttention)} == {8}
    assert timm.create_model("emov2_5m", device="meta", window_size=10).stages[3][1].expand.window_size == 10


def test_layer_scale_and_drop_path() -> None:
    model = timm.create_model("emov2_1m", device="cpu", drop_path_rate=0.3, layer_scale_init=0.5)
    blocks = [module for module in model.modules() if isinstance(module, InvertedBlock)]
    expected = torch.linspace(0, 0.3, 15).tolist()
    for block, rate in zip(blocks, expected, strict=True):
        assert float(block.ls.gamma[0]) == 0.5
        assert getattr(block.drop_path, "drop_prob", 0.0) == pytest.approx(rate if block.skip else 0.0)
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if name.endswith("gamma")}


@pytest.mark.parametrize("name", ["emov2_1m", "emov2_5m"])
def test_authors_files_are_recognised(name: str) -> None:
    record, _ = protocol.load(RECORDS / f"{name}_224")
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in record["state_dict"].items()}
    assert detect(state) == (name, dict(in_chans=3, num_classes=1000, merged=False))
    model = timm.create_model(name, device="meta")
    converted = checkpoint_filter_fn(state, model)
    own = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == own


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_our_files_are_recognised(name: str, merged: bool) -> None:
    arguments = dict(in_chans=1, num_classes=7, merged=merged)
    assert detect(timm.create_model(name, device="meta", **arguments).state_dict()) == (name, arguments)


def test_other_files_are_not() -> None:
    assert detect(timm.create_model("repavit_tiny", device="meta").state_dict()) is None
    assert detect(small().state_dict()) is None


def test_incomplete_files_are_refused() -> None:
    record, _ = protocol.load(RECORDS / "emov2_1m_224")
    state = authors_state(record)
    del state["stage3.1.eops.0.v.conv.weight"]
    with pytest.raises(CheckpointError, match=r"stages\.2\.1\.expand\.qkv\.weight"):
        load_strict(timm.create_model("emov2_1m"), state, checkpoint_filter_fn)
    with pytest.raises(CheckpointError, match="wrong shape"):
        load_strict(timm.create_model("emov2_2m"), authors_state(record), checkpoint_filter_fn)


def test_averaged_weights_of_a_trainer_file(tmp_path: Path) -> None:
    """The authors' trainer stores raw weights as "net" and their average as "net_E", which comes first."""
    net, average = {"head.bias": torch.zeros(2)}, {"head.bias": torch.ones(2)}
    torch.save({"net": net, "net_E": average, "epoch": 3}, tmp_path / "both.pth")
    torch.save({"net": net}, tmp_path / "raw.pth")
    assert float(read_checkpoint(tmp_path / "both.pth")["head.bias"][0]) == 1
    assert float(read_checkpoint(tmp_path / "raw.pth")["head.bias"][0]) == 0


def test_default_cfgs_name_the_authors_files() -> None:
    url = timm.create_model("emov2_5m.dist_in1k_512", device="meta").pretrained_cfg["url"]
    assert url == "https://github.com/zhangzjn/EMOv2/raw/main/resources/Cls/EMOv2_5M_512_KD.pth"
    with pytest.raises(CheckpointError, match="published no ImageNet weights"):
        timm.create_model("emov2_20m", pretrained=True, device="meta")


@torch.no_grad()
def test_pruned_to_the_stages_asked_for() -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True, stop_early=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 32, 32), (12, 8, 8)]
    assert model.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
    assert len(model.stages) == 2
    for found, expected in zip(model.forward_intermediates(x, [0, 2], intermediates_only=True), maps, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_features_as_detectors_take_them() -> None:
    model = timm.create_model("emov2_1m", features_only=True, out_indices=(1, 2, 3, 4), window_size=10).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [tuple(feature.shape[1:]) for feature in model(torch.randn(1, 3, 72, 104))]
    assert shapes == [(32, 18, 26), (48, 9, 13), (80, 5, 7), (180, 3, 4)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(window_size=(7, 7)), "window_size must have one entry for each of the 4 stages"),
        (dict(window_size=-1), "window_size must be a number of tokens, or 0"),
        (dict(partition="hybrid"), "'close' or 'remote', got 'hybrid'"),
        (dict(global_pool="token"), "global_pool must be"),
        (dict(kernel_sizes=(4, 5, 5, 5)), "kernel_sizes must be odd"),
        (dict(dims=(32, 48)), "dims must have one entry"),
        (dict(dim_heads=(16, 16, 24, 20)), "dim_head 24 for 80 channels"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("emov2_1m", device="meta", **kwargs)


def test_bad_pooling_later() -> None:
    model = small()
    assert isinstance(model, EMOv2)
    with pytest.raises(ValueError, match="got 'token'"):
        model.reset_classifier(3, "token")
