"""Weights survive a round trip bit for bit, and nothing that does not fit is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from registered import BACKBONES, FAMILIES, TINY, build, images, smallest
from timm.models import model_entrypoint
from torch import nn

import zoo
from zoo.weights import CheckpointError, load_strict, read_checkpoint, save_checkpoint


def filter_of(family: str) -> Any:
    return sys.modules[model_entrypoint(smallest(family)).__module__].checkpoint_filter_fn


def blank(family: str, **kwargs: Any) -> nn.Module:
    """Return a model of the same shape with other weights."""
    classes = {"num_classes": 10} if family in BACKBONES else {}
    return timm.create_model(smallest(family), **{**classes, **TINY[family].kwargs, **kwargs}).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_round_trip(family: str, tmp_path: Path) -> None:
    model, batch = build(family), images(family)
    save_checkpoint(model.state_dict(), tmp_path / "model.safetensors")
    other = blank(family)
    load_strict(other, read_checkpoint(tmp_path / "model.safetensors"), filter_of(family))
    assert torch.equal(other(batch), model(batch))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pretrained_path(family: str, tmp_path: Path) -> None:
    """`timm.create_model(pretrained=True)` and `zoo.create_model` load our file; the digest is compared."""
    model, batch = build(family), images(family)
    path = tmp_path / "model.safetensors"
    digest = save_checkpoint(model.state_dict(), path)
    classes = {"num_classes": 10} if family in BACKBONES else {}
    overlay = dict(file=str(path), sha256=digest, **classes)
    arguments = {**classes, **TINY[family].kwargs}
    loaded = timm.create_model(smallest(family), pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    assert torch.equal(loaded(batch), model(batch))
    wrong = {**overlay, "sha256": "0" * 64}
    with pytest.raises(CheckpointError, match="sha256"):
        timm.create_model(smallest(family), pretrained=True, pretrained_cfg_overlay=wrong, **arguments)


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_other_classes_and_channels(family: str, tmp_path: Path) -> None:
    """Another number of classes drops the classifier only, other channels adapt the first layer only."""
    model, path = build(family), tmp_path / "model.safetensors"
    save_checkpoint(model.state_dict(), path)
    changed = dict(pretrained_cfg_overlay=dict(file=str(path), num_classes=10), num_classes=3, in_chans=1)
    other = timm.create_model(smallest(family), pretrained=True, **changed, **TINY[family].kwargs).eval()
    own, first, head = model.state_dict(), model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    for key, value in other.state_dict().items():
        if not key.startswith((f"{first}.weight", f"{head}.")):
            assert torch.equal(value, own[key]), key
    assert torch.allclose(other.state_dict()[f"{first}.weight"], own[f"{first}.weight"].sum(1, keepdim=True))
    assert other(images(family, channels=1)).shape == (2, 3)


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_weights_without_a_classifier(family: str, tmp_path: Path) -> None:
    """num_classes=0 leaves the features, whatever norms stand in the head before its linear layer."""
    model, batch, path = build(family), images(family), tmp_path / "model.safetensors"
    save_checkpoint(model.state_dict(), path)
    overlay = dict(pretrained_cfg_overlay=dict(file=str(path), num_classes=10), num_classes=0)
    features = timm.create_model(smallest(family), pretrained=True, **overlay, **TINY[family].kwargs).eval()
    assert torch.equal(features.forward_features(batch), model.forward_features(batch))
    assert features(batch).ndim == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_filter_is_idempotent(family: str) -> None:
    """Our own keys pass unchanged, also twice, and the argument is left as it was."""
    model, convert = build(family), filter_of(family)
    own = model.state_dict()
    kept = dict(own)
    once = convert(own, model)
    assert own.keys() == kept.keys()
    assert once.keys() == own.keys()
    assert all(torch.equal(once[key], value) for key, value in own.items())
    twice = convert(once, model)
    assert twice.keys() == once.keys()
    assert all(torch.equal(twice[key], value) for key, value in once.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_do_not_fit_are_named(family: str) -> None:
    """One missing, one extra or one misshaped key stops the load, and nothing is loaded."""
    model = build(family)
    target = blank(family)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    keys = [key for key, value in model.state_dict().items() if value.ndim >= 1]
    for key in (keys[0], keys[len(keys) // 2], keys[-1]):
        state = dict(model.state_dict())
        missing = {name: value for name, value in state.items() if name != key}
        misshaped = {**state, key: torch.zeros(*(side + 1 for side in state[key].shape))}
        for wrong in (missing, misshaped):
            with pytest.raises((CheckpointError, ValueError, RuntimeError), match=key.replace(".", r"\.")):
                load_strict(target, wrong, filter_of(family))
    with pytest.raises(CheckpointError, match=r"unexpected: surplus\.weight"):
        load_strict(target, {**model.state_dict(), "surplus.weight": torch.zeros(1)}, filter_of(family))
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_family_are_refused(family: str, tmp_path: Path) -> None:
    names = list(FAMILIES)
    other = names[(names.index(family) + 1) % len(names)]
    with pytest.raises((CheckpointError, ValueError)):
        load_strict(blank(family), build(other).state_dict(), filter_of(family))


_UNTOLD: dict[str, dict[str, Any]] = {
    "affnet": {"output_stride": 32, "sparsity_threshold": 0.01},
    "emov2": {"window_size": 7},
    "repaswin": {"img_size": 224},
}


@pytest.mark.parametrize("name", [smallest(family) for family in FAMILIES])
@torch.no_grad()
def test_architecture_is_recognised(name: str, tmp_path: Path) -> None:
    """`zoo.create_model(FILE)` finds family, variant and what tensors tell of our own files, trained or merged.

    What tensors do not tell is asked for, not guessed.
    """
    family = next(family for family, names in FAMILIES.items() if name in names)
    if not hasattr(sys.modules[model_entrypoint(name).__module__], "detect"):
        pytest.skip(f"{family} recognises no files")
    model = timm.create_model(name, **({"num_classes": 10} if family in BACKBONES else {})).eval()
    batch = torch.rand(1, *model.pretrained_cfg["input_size"])[..., :16, :16] if family not in BACKBONES else None
    for form in ("trained", "merged"):
        if form == "merged":
            zoo.reparameterize(model, measure=False)
        path = tmp_path / f"{form}.safetensors"
        save_checkpoint(model.state_dict(), path)
        untold = dict(_UNTOLD.get(family, {}))
        if family in BACKBONES:
            untold |= {key: model.pretrained_cfg[key] for key in ("input_size", "mean", "std")}
            with pytest.raises(CheckpointError, match="do not tell") as caught:
                zoo.create_model(str(path))
            assert all(f"{key}=" in str(caught.value) for key in untold)
        found = zoo.create_model(str(path), **untold)
        assert type(found) is type(model)
        assert found.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())
        if batch is not None:
            assert torch.equal(found(batch), model(batch))


@pytest.mark.parametrize("family", ["cfsr", "dat", "affnet"])
def test_a_file_with_one_hole_is_refused(family: str) -> None:
    """Only a form in which all such keys are absent is a known form: a single one is never filled in."""
    model = build(family)
    convert, state = filter_of(family), model.state_dict()
    for key in list(state)[:: max(1, len(state) // 50)]:
        with_hole = {name: value for name, value in state.items() if name != key}
        with pytest.raises((CheckpointError, ValueError)):
            load_strict(model, with_hole, convert)
