"""Merging is exact with random statistics, complete, idempotent, and leaves a model that saves and loads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from registered import FAMILIES, build, images, relative
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

import zoo

MERGING = [name for name in FAMILIES if any(hasattr(module, "reparameterize") for module in build(name).modules())]


def test_what_merges() -> None:
    assert {"repavit", "repaswin", "repamlpmixer", "repapoolformer", "cfsr"} <= set(MERGING)


@pytest.mark.parametrize("family", MERGING)
@torch.no_grad()
def test_merging_is_exact(family: str) -> None:
    """Outputs within 1e-5 (float32) and 1e-12 (float64), fewer parameters, and a second call does nothing."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model, batch = build(family).to(dtype), images(family).to(dtype)
        expected = model(batch)
        report = zoo.reparameterize(model)
        assert relative(model(batch), expected) < tolerance
        assert report.layers
        assert report.params_after == sum(p.numel() for p in model.parameters()) < report.params_before
        merged = {key: value.clone() for key, value in model.state_dict().items()}
        again = zoo.reparameterize(model)
        assert not again.layers
        assert again.params_after == report.params_after
        assert merged.keys() == model.state_dict().keys()
        assert all(torch.equal(value, merged[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", MERGING)
@torch.no_grad()
def test_merging_inside_a_larger_module(family: str) -> None:
    model, batch = build(family), images(family)
    expected = model(batch)
    outer = nn.Sequential(nn.Identity(), nn.ModuleDict({"net": model})["net"]).eval()
    assert zoo.reparameterize(outer).layers
    assert relative(outer(batch), expected) < 1e-5


@pytest.mark.parametrize("family", MERGING)
def test_training_mode_is_refused(family: str) -> None:
    model = build(family).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="eval"):
        zoo.reparameterize(model)
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("family", MERGING)
@torch.no_grad()
def test_merged_weights_reload(family: str) -> None:
    """A merged copy with other numbers takes the merged state dict and then gives the same outputs."""
    model, batch = build(family), images(family)
    other = copy.deepcopy(model)
    zoo.reparameterize(model)
    zoo.reparameterize(other)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))


class _Layouts(TorchDispatchMode):
    """Notes in which memory format convolutions of more than a pixel and a channel find their maps."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.memory_format] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and (x := args[0]).shape[1] > 1 < x.shape[2] * x.shape[3]:
            self.found.add(suggest_memory_format(x))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", MERGING)
@torch.no_grad()
def test_one_image_keeps_the_layout_of_several(family: str) -> None:
    """A stride of a batch of one that is not what PyTorch expects turns all later maps back to channels-first."""
    model, batch = build(family), images(family)
    zoo.reparameterize(model, measure=False)
    formats = []
    for x in (batch[:1], torch.cat((batch, batch))):
        model(x)  # what it derives from weights, once
        with _Layouts() as layouts:
            model(x)
        formats.append(layouts.found)
    assert formats[0] == formats[1]
