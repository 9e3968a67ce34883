"""RePaViT in its four forms: the authors' outputs, the paper's sizes, every way to load and to change a model."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from parity import protocol
from timm.models import model_entrypoint
from torch import Tensor, nn

import zoo
from zoo.backbones.repavit import layer_idle_ratios
from zoo.hub import HubError
from zoo.layers.ffn import RePaFFN
from zoo.weights import CheckpointError, load_strict, save_checkpoint

RECORDS = Path(__file__).parents[1] / "parity" / "repavit"
VARIANTS = {
    "repavit_tiny": dict(idle_ratio=0.75),
    "repaswin_tiny": {},
    "repamlpmixer_s32": {},
    "repapoolformer_s12": {},
}
SMALL = {
    "repavit_tiny": dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3),
    "repaswin_tiny": dict(img_size=56, embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4)),
    "repamlpmixer_s32": dict(img_size=32, patch_size=8, embed_dim=24, num_blocks=3),
    "repapoolformer_s12": dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)),
}


def family(name: str) -> ModuleType:
    return sys.modules[model_entrypoint(name).__module__]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def authors_state(record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the authors' state dict, filled by the protocol; constant tables and counters hold nonsense."""
    state = {key: torch.from_numpy(value) for key, value in protocol.fill_state_dict(record["state_dict"]).items()}
    for key, (shape, dtype) in record["state_dict"].items():
        state.setdefault(key, torch.full(shape, 7, dtype=torch.int64 if dtype == "int64" else torch.float32))
    return state


def small(name: str, **kwargs: Any) -> nn.Module:
    """Return a small model with random statistics, in evaluation mode."""
    model = timm.create_model(name, **{"num_classes": 5, **SMALL[name], **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, RePaFFN) and module.layer_scale is not None:
            nn.init.normal_(module.layer_scale)
    nn.init.normal_(model.get_classifier().weight)  # the Mixer's starts at zero
    return model


def stage_outputs(name: str, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return what the records hold: tokens of blocks (class token first), tokens or maps of stages, final features."""
    if name.startswith("repavit"):
        final, found = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
        found = [torch.cat((prefix, tokens), 1) for tokens, prefix in found]
    elif name.startswith("repamlpmixer"):
        final, found = model.forward_intermediates(x, output_fmt="NLC")
    else:
        final, found = model.forward_intermediates(x)
    if name.startswith("repaswin"):
        final, found = final.flatten(1, 2), [stage.flatten(2).transpose(1, 2) for stage in found]
    kind, first = ("block", 0) if len(found) > 4 else ("stage", 1)
    return {"features": final, **{f"{kind}{index}": value for index, value in enumerate(found, first)}}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_parity_with_the_authors(name: str) -> None:
    """Logits, stage outputs and merged logits in float64 within 1e-10 of the authors' code; their own keys load."""
    record, outputs = protocol.load(RECORDS / name)
    model = timm.create_model(name, **VARIANTS[name])
    assert count(model) == record["num_params"]
    load_strict(model, authors_state(record), family(name).checkpoint_filter_fn)
    model.double().eval()
    x = torch.from_numpy(protocol.make_input(**record["input"])).double()
    assert protocol.rel_error(model(x).numpy(), outputs["logits"]) < 1e-10
    found = stage_outputs(name, model, x)
    for key, place in record["sampled"].items():
        index = tuple(_slice(part) for part in place["index"].strip("[]").split(","))
        assert protocol.rel_error(found[place["of"]][index].numpy(), outputs[key]) < 1e-10, key
    report = zoo.reparameterize(model, measure=False)
    assert report.params_after == record["num_params_reparam"]
    merged = model(x).numpy()
    assert protocol.rel_error(merged, outputs["logits"]) < 1e-10
    if "logits_reparam" in outputs:
        assert protocol.rel_error(merged, outputs["logits_reparam"]) < 1e-10
    else:  # PoolFormer: the authors leave the layer scale out of the merged bias
        assert protocol.rel_error(outputs["logits_reparam_authors_bug"], outputs["logits"]) > 1e-2


def _slice(text: str) -> slice:
    return slice(*(int(part) if part.strip() else None for part in text.split(":")))


COUNTS = {  # (parameters, merged at idle ratio 0.75, merged at 0.5), from the paper and its code
    "repavit_tiny": (5736040, 3494248, 4381288),
    "repavit_small": (22087912, 13180648, 16724200),
    "repavit_base": (86642152, 51132904, 65297896),
    "repavit_large": (304524264, 178375656, 228731880),
    "repavit_huge": (632528360, 369851880, None),
    "repaswin_tiny": (28323682, 17483554, None),
    "repaswin_small": (49678450, 29931058, None),
    "repaswin_base": (87864480, 52810144, None),
    "repamlpmixer_s32": (19129984, 8590976, None),
    "repapoolformer_s12": (11941800, 5996968, None),
}
MILLIONS = {
    "repamlpmixer_s16": (18.56, 8.02),
    "repamlpmixer_b16": (59.94, 24.43),
    "repapoolformer_s24": (21.44, 9.55),
    "repapoolformer_s36": (30.94, 13.11),
    "repapoolformer_m36": (56.28, 23.74),
    "repapoolformer_m48": (73.61, 30.24),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    before, after, half = COUNTS[name]
    model = timm.create_model(name, device="meta", idle_ratio=0.75).eval()
    assert count(model) == before
    zoo.reparameterize(model, measure=False)
    assert count(model) == after
    assert count(timm.create_model(name, device="meta", idle_ratio=0.75, merged=True)) == after
    if half is not None:
        assert count(timm.create_model(name, device="meta", idle_ratio=0.5, merged=True)) == half


@pytest.mark.parametrize("name", MILLIONS)
def test_rounded_parameter_counts(name: str) -> None:
    for merged, expected in zip((False, True), MILLIONS[name], strict=True):
        assert round(count(timm.create_model(name, device="meta", merged=merged)) / 1e6, 2) == expected


def test_published_idle_ratios_are_the_defaults() -> None:
    for name, ratio in (("repavit_tiny", 0.5), ("repavit_small", 0.5), ("repavit_base", 0.75), ("repaswin_tiny", 0.75)):
        ffn = next(m for m in timm.create_model(name, device="meta").modules() if isinstance(m, RePaFFN))
        assert ffn.active_dim == ffn.hidden_dim * (1 - ratio), name


def test_linear_heuristic() -> None:
    ratios = layer_idle_ratios(0.75, 12, "linear")
    assert ratios[0] == Fraction(1, 2) + Fraction(1, 22)
    assert ratios[10] == 1  # a float gives 0.9999999999999999 here, and with it one active channel
    assert ratios[11] == 0
    assert layer_idle_ratios(0.25, 12, "linear")[0] == 0  # below zero in the formula
    assert layer_idle_ratios(0.5, 1, "linear") == (0,)
    model = timm.create_model("repavit_tiny", device="meta", idle_ratio=0.75, heuristic="linear")
    assert [block.mlp.active_dim for block in model.blocks][-2:] == [0, 768]
    assert count(model) == 5736040  # before merging the ratio moves channels from one branch to the other


@torch.no_grad()
def test_linear_heuristic_merges() -> None:
    model = small("repavit_tiny", depth=4, heuristic="linear", idle_ratio=0.5)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    report = zoo.reparameterize(model)
    assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert [block.mlp.form for block in model.blocks] == ["merged", "merged", "merged", "folded"]
    assert model.blocks[2].mlp.active_fc1 is None  # idle ratio 1: one matrix is left
    assert report.layers[-1].folded == ("2 BatchNorms",)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kwargs", [dict(channel_idle=False), dict(feature_norm="LayerNorm")], ids=str)
@torch.no_grad()
def test_other_kinds_of_layers(name: str, kwargs: dict[str, Any]) -> None:
    """All channels active: only norms are folded. LayerNorm: nothing is."""
    model, x = (
        small(name, **kwargs),
        torch.randn(2, 3, SMALL[name].get("img_size", 64), SMALL[name].get("img_size", 64)),
    )
    expected = model(x)
    report = zoo.reparameterize(model, measure=False)
    assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert bool(report.layers) == ("channel_idle" in kwargs)
    forms = {
        module.form for name, module in model.named_modules() if isinstance(module, RePaFFN) and "tokens" not in name
    }
    assert forms == ({"folded"} if "channel_idle" in kwargs else {"training"})


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_merged_weights_load_where_they_fit(name: str) -> None:
    model = small(name)
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    convert, x = family(name).checkpoint_filter_fn, torch.randn(2, 3, *[SMALL[name].get("img_size", 64)] * 2)
    expected = model(x)
    zoo.reparameterize(model, measure=False)
    inference = small(name, merged=True)
    assert inference.state_dict().keys() == model.state_dict().keys()
    load_strict(inference, model.state_dict(), convert)
    assert torch.equal(inference(x), model(x))
    load_strict(inference, trained, convert)  # trained weights are merged on the way in
    assert (inference(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="merged=True"):
        load_strict(small(name), model.state_dict(), convert)


def test_authors_merged_poolformer_warns() -> None:
    model = small("repapoolformer_s12", merged=True)
    state = {f"network.0.0.mlp.fc{i}.weight": torch.zeros(8, 8, 1, 1) for i in (1, 2, 3)}
    with pytest.warns(UserWarning, match="layer scale out of the bias"):
        family("repapoolformer_s12").checkpoint_filter_fn(state, model)


@pytest.mark.parametrize("name", VARIANTS)
def test_authors_files_are_recognised(name: str) -> None:
    """From keys and shapes alone; the idle ratio is not in them, so the published one is taken."""
    record, _ = protocol.load(RECORDS / name)
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in record["state_dict"].items()}
    found, kwargs = family(name).detect(state)
    assert found == name
    assert kwargs["num_classes"] == 1000
    assert "idle_ratio" not in kwargs
    assert not kwargs["merged"]
    model = timm.create_model(found, device="meta", **kwargs)
    converted = family(name).checkpoint_filter_fn(state, model)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    others = [other for other in VARIANTS if other != name]
    assert all(family(other).detect(state) is None for other in others)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("merged", [False, True])
def test_our_files_are_recognised(name: str, merged: bool) -> None:
    """Our keys hold the idle ratio, before and after merging."""
    arguments = dict(idle_ratio=0.6, num_classes=7, in_chans=1)
    model = timm.create_model(name, device="meta", merged=merged, **arguments)
    found, kwargs = family(name).detect(model.state_dict())
    assert found == name
    assert kwargs["merged"] == merged
    again = timm.create_model(found, device="meta", **kwargs)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_linear_heuristic_is_recognised() -> None:
    model = timm.create_model("repavit_tiny", device="meta", idle_ratio=0.6, heuristic="linear", merged=True)
    _, kwargs = family("repavit_tiny").detect(model.state_dict())
    assert (kwargs["idle_ratio"], kwargs["heuristic"]) == (0.6, "linear")


def test_average_pooling_moves_the_last_norm() -> None:
    source, target = small("repavit_tiny"), small("repavit_tiny", global_pool="avg")
    load_strict(target, source.state_dict(), family("repavit_tiny").checkpoint_filter_fn)
    assert torch.equal(target.fc_norm.weight, source.norm.weight)
    load_strict(source, target.state_dict(), family("repavit_tiny").checkpoint_filter_fn)


@pytest.mark.parametrize("name", ["repavit_tiny", "repaswin_tiny"])
@torch.no_grad()
def test_other_image_and_patch_size(name: str) -> None:
    """Weights of one size load into a model of another; `set_input_size` does the same in place."""
    source = small(name)
    convert = family(name).checkpoint_filter_fn
    side = 2 * SMALL[name]["img_size"]
    extra = dict(window_size=14) if name == "repaswin_tiny" else {}
    larger = small(name, img_size=side, **extra)
    load_strict(larger, source.state_dict(), convert)
    x = torch.randn(1, 3, side, side)
    expected = larger(x)
    source.set_input_size(img_size=side)
    assert (source(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    coarse = small(name, patch_size=2 * SMALL[name].get("patch_size", 4), img_size=side)
    load_strict(coarse, small(name).state_dict(), convert)
    assert torch.isfinite(coarse(x)).all()


@torch.no_grad()
def test_swin_takes_sizes_that_the_window_does_not_divide() -> None:
    model = small("repaswin_tiny", img_size=72)
    assert torch.isfinite(model(torch.randn(1, 3, 72, 72))).all()
    anything = small("repaswin_tiny", dynamic_img_size=True)
    assert torch.isfinite(anything(torch.randn(1, 3, 64, 88))).all()


@torch.no_grad()
def test_dynamic_image_size() -> None:
    fixed, dynamic = small("repavit_tiny"), small("repavit_tiny", dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(dynamic(x), fixed(x))
    assert dynamic(torch.randn(1, 3, 48, 64)).shape == (1, 5)
    padded = small("repavit_tiny", dynamic_img_size=True, dynamic_img_pad=True)
    assert padded(torch.randn(1, 3, 45, 61)).shape == (1, 5)


@pytest.mark.parametrize("name", SMALL)
def test_pruned_to_the_layers_asked_for(name: str) -> None:
    model = small(name)
    before = count(model)
    kept = model.prune_intermediate_layers([0, 1])
    assert kept == [0, 1]
    assert count(model) < before
    side = SMALL[name].get("img_size", 64)
    assert len(model.forward_intermediates(torch.randn(2, 3, side, side), indices=kept, intermediates_only=True)) == 2


@pytest.mark.parametrize("name", SMALL)
def test_drop_path_rates_follow_the_paper(name: str) -> None:
    """Linear in depth from 0, the same for both branches of a block; constant in the Mixer."""
    model = timm.create_model(name, device="meta", drop_path_rate=0.3)
    ffns = [module for module in model.modules() if isinstance(module, RePaFFN)]
    rates = [getattr(ffn.drop_path, "drop_prob", 0.0) for ffn in ffns]
    expected = [0.3] * len(ffns) if "mixer" in name else torch.linspace(0, 0.3, len(ffns)).tolist()
    assert rates == pytest.approx(expected)
    blocks = [module for module in model.modules() if hasattr(module, "drop_path1")]
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks] == (rates if blocks else [])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("repavit_tiny", dict(idle_ratio=1.5), "idle_ratio must lie in 0 ... 1, got 1.5"),
        ("repavit_tiny", dict(heuristic="cosine"), "'static' or 'linear', got 'cosine'"),
        ("repavit_tiny", dict(feature_norm="BN"), "'BatchNorm' or 'LayerNorm', got 'BN'"),
        ("repavit_tiny", dict(global_pool="cls"), "global_pool must be one of"),
        ("repavit_tiny", dict(num_heads=5), "5 heads for 192 channels"),
        ("repavit_tiny", dict(class_token=False), "class_token=True"),
        ("repaswin_tiny", dict(num_heads=(3, 6)), "one entry a stage"),
        ("repaswin_tiny", dict(feature_norm="BN"), "got 'BN'"),
        ("repamlpmixer_s32", dict(global_pool="max"), "'avg' or ''"),
        ("repamlpmixer_s32", dict(feature_norm="BN"), "got 'BN'"),
        ("repapoolformer_s12", dict(pool_size=4), "pool_size must be odd"),
        ("repapoolformer_s12", dict(dims=(8,)), "one entry a stage"),
        ("repapoolformer_s12", dict(feature_norm="BN"), "got 'BN'"),
    ],
)
def test_bad_arguments(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, device="meta", **kwargs)


def test_unpublished_weights_say_where_they_are() -> None:
    with pytest.raises(HubError, match=r"files of Ackesnal/RePaViT cannot be listed"):
        timm.create_model("repavit_large", pretrained=True, device="meta")


def test_cifar10_tag() -> None:
    """The tag's arguments build the network that was trained; the plain name stays the paper's."""
    model = timm.create_model("repavit_tiny.cifar10", device="meta")
    assert (model.num_classes, model.patch_embed.img_size, model.patch_embed.patch_size) == (10, (32, 32), (4, 4))
    assert model.pretrained_cfg["label_names"][3] == "cat"
    assert timm.create_model("repavit_tiny", device="meta").num_classes == 1000


def test_a_file_in_the_authors_naming_becomes_a_model(tmp_path: Path) -> None:
    record, _ = protocol.load(RECORDS / "repamlpmixer_s32")
    state = authors_state(record)
    save_checkpoint(state, tmp_path / "authors.safetensors")
    with pytest.raises(CheckpointError, match="do not tell idle_ratio"):
        zoo.create_model(str(tmp_path / "authors.safetensors"))
    facts = dict(input_size=(3, 224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model = zoo.create_model(str(tmp_path / "authors.safetensors"), idle_ratio=0.75, **facts)
    assert type(model).__name__ == "RePaMlpMixer"
    own = model.blocks[0].mlp_channels
    joined = torch.cat((own.active_fc1.weight, own.idle_fc1.weight))
    assert torch.equal(joined, state["blocks.0.mlp_channels.fc1.weight"])
