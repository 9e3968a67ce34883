"""What every backbone does: train, classify each image on its own, give features, change heads and channels."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from registered import BACKBONES, TINY, build, images, relative, smallest
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

FAMILIES = list(BACKBONES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_forward(family: str, batch: int) -> None:
    with torch.no_grad():
        logits = build(family)(images(family, batch))
    assert logits.shape == (batch, 10)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_reaches_every_parameter(family: str) -> None:
    model = build(family).train()
    model(images(family)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient: it is not used"
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_images_of_a_batch_are_independent(family: str) -> None:
    model, batch = build(family), images(family, 3)
    together = model(batch)
    for index in range(3):
        assert relative(together[index : index + 1], model(batch[index : index + 1])) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads(family: str) -> None:
    """Classes can be changed at construction and later; without them the model returns its features."""
    model, batch = build(family), images(family)
    features = model.forward_features(batch)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.forward_head(features), model(batch))
    assert pre_logits.ndim == 2
    assert pre_logits.shape[-1] == model.head_hidden_size
    assert model.get_classifier().out_features == 10

    model.reset_classifier(42)
    assert model(batch).shape == (2, 42)
    assert model.num_classes == 42
    model.reset_classifier(0)
    assert relative(model(batch), pre_logits) < 1e-6
    model.reset_classifier(0, "")
    assert model(batch).shape[1:] == features.shape[1:]
    assert build(family, num_classes=0)(batch).shape == pre_logits.shape
    assert build(family, num_classes=0, global_pool="")(batch).shape == features.shape
    assert model.num_features == features.shape[1 if features.ndim == 4 and not _channels_last(model) else -1]


def _channels_last(model: nn.Module) -> bool:
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_input_channels(family: str) -> None:
    assert build(family, in_chans=1)(images(family, channels=1)).shape == (2, 10)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_only(family: str) -> None:
    """Shapes are those that `feature_info` states, for all stages and for chosen ones."""
    batch = images(family)
    model = build(family, features_only=True)
    info = model.feature_info
    features = model(batch)
    assert len(features) == len(info.channels())
    for feature, channels, reduction in zip(features, info.channels(), info.reduction(), strict=True):
        assert feature.shape == (2, channels, batch.shape[-2] // reduction, batch.shape[-1] // reduction)
        assert torch.isfinite(feature).all()
    last = build(family, features_only=True, out_indices=(-1,))
    assert torch.equal(last(batch)[0], features[-1])
    assert not hasattr(last, "head") or sum(p.numel() for p in last.parameters()) <= sum(
        p.numel() for p in build(family).parameters()
    )
    with pytest.raises(AssertionError):  # timm's own answer to a stage that does not exist
        build(family, features_only=True, out_indices=(99,))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_intermediates(family: str) -> None:
    """The final output is that of `forward_features`; intermediates are maps, on request with the final norm."""
    model, batch = build(family), images(family)
    final, stages = model.forward_intermediates(batch)
    assert torch.equal(final, model.forward_features(batch))
    assert torch.equal(model.forward_head(final), model(batch))
    assert len(stages) == len(model.feature_info)
    for stage, info in zip(stages, model.feature_info, strict=True):
        assert stage.shape[1] == info["num_chs"]
        assert stage.shape[-2:] == (batch.shape[-2] // info["reduction"], batch.shape[-1] // info["reduction"])
    for index in (1, [0, len(stages) - 1]):  # the last one; the first and the last
        only = model.forward_intermediates(batch, indices=index, intermediates_only=True)
        expected = stages[-1:] if index == 1 else [stages[0], stages[-1]]
        assert all(torch.equal(found, want) for found, want in zip(only, expected, strict=True))
    normed = model.forward_intermediates(batch, indices=1, norm=True, intermediates_only=True)
    assert normed[0].shape == stages[-1].shape
    assert torch.isfinite(normed[0]).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layouts_of_intermediates(family: str) -> None:
    """The layouts that a family knows hold the same numbers as its maps; an unknown one is refused."""
    model, batch = build(family), images(family)
    maps = model.forward_intermediates(batch, indices=1, intermediates_only=True, output_fmt="NCHW")[0]
    expected = {"NHWC": maps.permute(0, 2, 3, 1), "NLC": maps.flatten(2).transpose(1, 2)}
    for layout, values in expected.items():
        try:
            found = model.forward_intermediates(batch, indices=1, intermediates_only=True, output_fmt=layout)[0]
        except AssertionError as refusal:  # timm's own way to say that a family does not have this layout
            assert "NCHW" in str(refusal)  # noqa: PT017
        else:
            assert torch.equal(found, values)
    with pytest.raises(AssertionError):
        model.forward_intermediates(batch, output_fmt="HWC")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    """Outputs and gradients in training mode are equal to 1e-5 with and without it."""
    batch = images(family)

    def gradients(checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = build(family).train()
        model.set_grad_checkpointing(checkpointing)
        out = model(batch)
        out.square().mean().backward()
        return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, saving = gradients(False), gradients(True)
    assert relative(saving[0], plain[0]) < 1e-5
    largest = max(float(gradient.abs().max()) for gradient in plain[1].values())
    for name, gradient in plain[1].items():
        assert float((saving[1][name] - gradient).abs().max()) < 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_recomputes(family: str) -> None:
    """The switch is no empty promise: it saves fewer tensors for the backward pass."""

    def saved(checkpointing: bool) -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        model = build(family).train()
        model.set_grad_checkpointing(checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images(family))
        return count

    assert saved(True) < saved(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_groups(family: str) -> None:
    """`group_matcher` puts every parameter into one group; `no_weight_decay` names parameters, if any."""
    model = build(family)
    names = {name for name, _ in model.named_parameters()}
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert {name for group in groups.values() for name in group} == names
        assert len(groups) > 2
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    assert not undecayed or undecayed & names, "no_weight_decay names nothing that is there"
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    classifier = [layers[name] for name in names if name.endswith((f"{model.pretrained_cfg['classifier']}.weight",))]
    assert classifier == [max(layers.values())], "the classifier must be in the last group"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16(family: str) -> None:
    """Within 2e-2 of float32, in bf16 weights and under autocast."""
    model, batch = build(family), images(family)
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch)
    low = build(family).bfloat16()(batch.bfloat16())
    assert low.dtype == torch.bfloat16
    for found in (mixed, low):
        assert torch.isfinite(found).all()
        assert relative(found, expected) < 2e-2  # bf16 has 8 bits: one rounding is 0.4 %, and layers add up


class _Types(TorchDispatchMode):
    """Record the types of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.seen.add(value.dtype)
        return out


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_float64_appears(family: str) -> None:
    model = build(family)
    with _Types() as types:
        model(images(family))
    assert torch.float64 not in types.seen
    assert torch.float32 in types.seen


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_repeatable(family: str) -> None:
    """One seed, one output, also with dropout; other seeds, other outputs."""
    model = build(family, drop_rate=0.2, drop_path_rate=0.5).train()
    batch = images(family, 4)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(batch).detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_channels_are_refused(family: str) -> None:
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=r"channel|1|3"):
        build(family)(images(family, channels=1))


@pytest.mark.parametrize("family", [family for family in FAMILIES if "img_size" in TINY.get(family).kwargs])
def test_wrong_image_size_is_refused(family: str) -> None:
    """One line that says what was given and what fits."""
    side = images(family).shape[-1]
    with pytest.raises((AssertionError, ValueError), match=str(side)):
        build(family)(images(family, size=(side + 1, side + 1)))


def test_smallest_is_the_smallest() -> None:
    assert smallest("repavit") == "repavit_tiny"
    assert timm.is_model(smallest("cfsr" if "cfsr" in BACKBONES else FAMILIES[0]))
