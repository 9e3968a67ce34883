"""FFNet: the authors' outputs, the paper's sizes, every way to load and to change a model."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from parity import protocol
from registered import randomize
from torch import Tensor, nn

import zoo
from zoo.backbones.ffnet import _VARIANTS, FFNet, checkpoint_filter_fn, detect
from zoo.bench.plain_backbones import PLAIN
from zoo.weights import load_strict, save_checkpoint

RECORD = Path(__file__).parents[1] / "parity" / "ffnet" / "ffnet_1_256"
TINY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), num_classes=5)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def authors_state(record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the authors' state dict, filled by the protocol; counters hold nonsense."""
    state = {key: torch.from_numpy(value) for key, value in protocol.fill_state_dict(record["state_dict"]).items()}
    for key, (shape, _) in record["state_dict"].items():
        state.setdefault(key, torch.full(shape, 7, dtype=torch.int64))
    return state


def tiny(**kwargs: Any) -> nn.Module:
    return randomize(timm.create_model("ffnet_1", **{**TINY, **kwargs})).eval()


def sampled(values: Tensor, place: dict[str, Any]) -> Tensor:
    return values[tuple(slice(None, None, step) for step in place["step"])]


@torch.no_grad()
def test_parity_with_the_authors() -> None:
    """All recorded outputs in float64 within 1e-10, before and after merging; the authors' own keys load."""
    record, outputs = protocol.load(RECORD)
    model = timm.create_model("ffnet_1")
    assert count(model) == record["num_params"]
    load_strict(model, authors_state(record), checkpoint_filter_fn)
    model.double().eval()
    x = torch.from_numpy(protocol.make_input(**record["input"])).double()
    for merged in (False, True):
        if merged:
            report = zoo.reparameterize(model, measure=False)
            assert report.params_after == record["num_params_fused"] - 2 * 640  # the authors keep the last norm
        final, stages = model.forward_intermediates(x)
        found = {f"stage{index}": stage for index, stage in enumerate(stages, 1)}
        found |= {"stem": model.stem(x), "stage4_fused": stages[3]}
        found["logits"] = found["logits_fused"] = model.forward_head(final)
        if not merged:
            found |= {"norm": final, "pooled": model.forward_head(final, pre_logits=True)}
        checked = set()
        for key, values in outputs.items():
            place = record["sampled"].get(key)
            name = key if place is None else place["of"]
            if name in found:
                ours = found[name] if place is None else sampled(found[name], place)
                assert protocol.rel_error(ours.numpy(), values) < 1e-10, key
                checked.add(key)
        assert set(outputs) - checked == ({"norm_sampled", "pooled"} if merged else set())


COUNTS = {  # parameters and, in millions, merged as the authors count: with the last norm and the layer scales
    "ffnet_1": (13775656, 13.6602),
    "ffnet_2": (27208408, 26.9084),
    "ffnet_3": (48817896, 48.3306),
    "ffnet_4": (79868968, 79.2004),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    trained, millions = COUNTS[name]
    model = timm.create_model(name, device="meta").eval()
    assert count(model) == trained
    scales = sum(value.numel() for key, value in model.named_parameters() if "layer_scale" in key)
    zoo.reparameterize(model, measure=False)
    assert round((count(model) + scales + 2 * model.num_features) / 1e6, 4) == millions
    assert count(timm.create_model(name, device="meta", merged=True)) == count(model)


@pytest.mark.parametrize(("batch", "size"), [(1, (64, 64)), (3, (45, 70))])
@pytest.mark.parametrize("kwargs", [{}, dict(layer_scale=0.5, channel_kernels=(7, 7, 7, 7))], ids=["1", "3"])
@torch.no_grad()
def test_fast_forms_equal_plain_ones(batch: int, size: tuple[int, int], kwargs: dict[str, Any]) -> None:
    """Merged or not, with every hot block in its plain form: the same outputs in float64."""
    model, x = tiny(**kwargs).double(), torch.randn(batch, 3, *size, dtype=torch.double)
    expected = model(x)
    for merge in (False, True):
        if merge:
            report = zoo.reparameterize(model)
            assert report.difference is not None
            assert report.difference < 1e-12
            assert not [key for key in model.state_dict() if "bn" in key or "scale" in key or key.startswith("norm")]
        rival = copy.deepcopy(model)
        for module in rival.modules():
            if type(module) in PLAIN["ffnet"]:
                module.forward = MethodType(PLAIN["ffnet"][type(module)], module)
        assert torch.allclose(model(x), expected, rtol=1e-9, atol=1e-9)
        assert torch.allclose(rival(x), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_large_batches_in_parts() -> None:
    """Maps of more than 16 MiB are made for a few images at a time, with the same outputs."""
    model = tiny(depths=(1, 1, 1, 1))
    zoo.reparameterize(model, measure=False)
    seen: list[int] = []
    model.stages[0].blocks.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    x = torch.randn(10, 3, 640, 640)  # 24 * 160 * 160 hidden numbers an image, 2.3 MiB
    found = model(x)
    assert seen == [6, 4]
    assert (found[7:8] - model(x[7:8])).abs().max() < 1e-5 * found.abs().max()


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
@torch.no_grad()
def test_last_norm_folds_where_pooling_allows_it(pool: str) -> None:
    model, x = tiny(global_pool=pool), torch.randn(2, 3, 64, 64)
    expected = model(x)
    zoo.reparameterize(model, measure=False)
    assert isinstance(model.norm, nn.Identity) == (pool == "avg")
    assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    features = tiny(num_classes=0)
    expected = features(x)
    zoo.reparameterize(features, measure=False)
    assert isinstance(features.norm, nn.BatchNorm2d)
    assert (features(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_authors_files_are_recognised(tmp_path: Path) -> None:
    record, _ = protocol.load(RECORD)
    state = authors_state(record)
    assert detect(state) == ("ffnet_1", dict(in_chans=3, num_classes=1000, merged=False))
    save_checkpoint(state, tmp_path / "authors.safetensors")
    model = zoo.create_model(str(tmp_path / "authors.safetensors"))
    assert isinstance(model, FFNet)
    assert torch.equal(
        model.stages[2].blocks[0].channel_mixer.fc1.weight, state["stages.2.1.channel_mixer.main.fc1.weight"]
    )
    assert detect({key: value for key, value in state.items() if not key.startswith("stages.2.3")}) is None


def _theirs(key: str) -> str:
    """Return the authors' key of ours, by the rules of their module tree as the spec states it."""
    parts = key.split(".")
    if parts[0] == "stem":
        return ".".join(["patch_embed", parts[1], *("c" if part == "conv" else part for part in parts[2:])])
    if parts[0] == "head":
        return f"head.{parts[2]}"
    if parts[0] == "norm":
        return key
    stage, rest = int(parts[1]), parts[2:]
    if rest[0] == "downsample":
        inner = _branch(rest[2:]) if rest[1] == "0" else ["conv", "c" if rest[2] == "conv" else "bn", *rest[3:]]
        return ".".join(["stages", str(stage), "0", "proj", rest[1], *inner])
    block = [f"stages.{stage}.{int(rest[1]) + (stage > 0)}"]
    if rest[2].startswith("layer_scale"):
        mixer = "token_mixer.0" if rest[2].endswith("1") else "channel_mixer"
        return ".".join([*block, mixer, "layer_scale"])
    mixer = "token_mixer.0" if rest[2] == "token_mixer" else rest[2]
    name, inner = rest[3], rest[4:]
    if inner[0] == "branches":
        inner = _branch(inner)
    elif inner[0] == "conv":
        inner = ["c", *inner[1:]]
    return ".".join([*block, mixer, "main", name, *inner])


def _branch(parts: list[str]) -> list[str]:
    """Return the authors' key of a RepConv's branch: conv is the 7x7 one, conv1 the 3x3 one."""
    return ["conv" if parts[1] == "0" else "conv1", "c" if parts[2] == "conv" else parts[2], *parts[3:]]


@pytest.mark.parametrize("name", COUNTS)
def test_round_trip_of_keys(name: str) -> None:
    """Authors' keys of every variant, layer scales and 7x7 channel mixers included, become ours and nothing else."""
    model = timm.create_model(name, device="meta")
    own = model.state_dict()
    theirs = {_theirs(key): value for key, value in own.items()}
    assert len(theirs) == len(own)
    converted = checkpoint_filter_fn(theirs, model)
    assert list(converted) == list(own)
    assert all(converted[key] is value for key, value in own.items() if key in converted and value is converted[key])
    assert detect(theirs) == (name, dict(in_chans=3, num_classes=1000, merged=False))
    if name == "ffnet_1":
        assert theirs.keys() == protocol.load(RECORD)[0]["state_dict"].keys()


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("merged", [False, True])
def test_our_files_are_recognised(name: str, merged: bool) -> None:
    arguments = dict(num_classes=7, in_chans=1, merged=merged)
    assert detect(timm.create_model(name, device="meta", **arguments).state_dict()) == (name, arguments)


def test_weights_of_another_form_are_refused() -> None:
    trained, merged = tiny(), tiny(merged=True)
    with pytest.raises(ValueError, match="merged=True"):
        load_strict(trained, merged.state_dict(), checkpoint_filter_fn)
    with pytest.raises(ValueError, match="merged=False"):
        load_strict(merged, trained.state_dict(), checkpoint_filter_fn)


def test_published_files() -> None:
    """The paper's sizes are tags; FFNet-4 was published at 384 pixels only."""
    urls = {
        full: cfg.url.rpartition("/")[2]
        for name in _VARIANTS
        for full, cfg in timm.models.get_arch_pretrained_cfgs(name).items()
        if cfg.url
    }
    assert urls == {
        "ffnet_1.in1k": "ffnet_1.pth.tar",
        "ffnet_1.dist_in1k": "ffnet_1_distillation.pth.tar",
        "ffnet_2.in1k": "ffnet_2.pth.tar",
        "ffnet_2.dist_in1k": "ffnet_2_distillation.pth.tar",
        "ffnet_3.in1k": "ffnet_3.pth.tar",
        "ffnet_3.dist_in1k": "ffnet_3_distillation.pth.tar",
        "ffnet_3.in1k_384": "ffnet_3_384.pth.tar",
        "ffnet_4.in1k_384": "ffnet_4_384.pth.tar",
    }
    cfg = timm.create_model("ffnet_3.in1k_384", device="meta").pretrained_cfg
    assert (cfg["input_size"], cfg["pool_size"], cfg["crop_pct"]) == ((3, 384, 384), (12, 12), 0.95)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depths=(1, 1)), "one entry a stage"),
        (dict(dims=(80, 160, 320, 600)), "must double from stage to stage"),
        (dict(token_kernels=(3, 4, 7, 7)), "must be odd"),
        (dict(global_pool="mean"), "global_pool must be one of"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("ffnet_1", device="meta", **kwargs)


def test_drop_path_rates() -> None:
    """Linear in depth from 0, the same for both branches of a block."""
    model = timm.create_model("ffnet_1", device="meta", drop_path_rate=0.13)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for number in (1, 2):
        rates = [getattr(getattr(block, f"drop_path{number}"), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx(torch.linspace(0, 0.13, 14).tolist())


def test_layer_scales_start_small_and_are_not_decayed() -> None:
    model = timm.create_model("ffnet_3", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))
    scales = {key: value for key, value in model.named_parameters() if "layer_scale" in key}
    assert scales.keys() == model.no_weight_decay()
    assert len(scales) == 8
    assert all((value == 1e-6).all() for value in scales.values())
