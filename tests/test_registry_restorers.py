"""What every restorer does: train, take any picture size, give the same in tiles, in low precision and in batches."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from registered import RESTORERS, build, images, relative
from test_registry_backbones import _Types
from timm.models import get_arch_pretrained_cfgs

import zoo
from zoo.cfg import RestorationCfg
from zoo.pictures.restore import restore_tensor

FAMILIES = list(RESTORERS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_forward(family: str, batch: int) -> None:
    model, x = build(family), images(family, batch)
    with torch.no_grad():
        restored = model(x)
    assert restored.shape == (batch, 3, model.scale * x.shape[2], model.scale * x.shape[3])
    assert torch.isfinite(restored).all()


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
def test_attributes_and_cfgs_agree(family: str) -> None:
    """What inference needs to know is an attribute of the model, and the same in every cfg."""
    model = build(family)
    for full, cfg in get_arch_pretrained_cfgs(model.pretrained_cfg["architecture"]).items():
        assert isinstance(cfg, RestorationCfg), full
        assert cfg.scale == model.scale, full
        assert cfg.multiple_of == model.multiple_of, full
    assert model.in_chans == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 2), (16, 16), (67, 33)])
def test_any_size(family: str, size: tuple[int, int]) -> None:
    """Pictures of 1x1 to 67x33 pixels come back in their mode, larger by the scale."""
    model = build(family)
    zoo.reparameterize(model, measure=False)
    pixels = (images(family, 1, size=size)[0] * 255).byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    restored = zoo.restore(picture, model=model)
    assert restored.mode == "RGB"
    assert restored.size == (model.scale * size[1], model.scale * size[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_equal_the_whole(family: str) -> None:
    """Inside the receptive field tiles change nothing; where it is unknown they are blended and come close."""
    model = build(family)
    x = images(family, 1, size=(53, 42))
    whole = restore_tensor(model, x)
    reach = getattr(model, "receptive_field", None)
    step = model.multiple_of
    tile = 2 * step * -(-(16 if reach is None else reach) // step) + 2 * step * -(-7 // step)
    counted: list[int] = []
    overlap = None if reach is not None else 16
    tiled = restore_tensor(
        model,
        x,
        tile=tile,
        overlap=overlap,
        exact=reach is not None,
        progress=lambda done, count: counted.append(count),
    )
    assert counted[0] > 1, "the picture was not cut"
    assert tiled.shape == whole.shape
    assert relative(tiled, whole) < (1e-5 if reach is not None else 0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_receptive_field_is_no_smaller_than_stated(family: str) -> None:
    """A pixel beyond the stated reach changes nothing, so that tiles may rely on it."""
    model = build(family)
    reach = getattr(model, "receptive_field", None)
    if reach is None:
        pytest.skip(f"{family} states none")
    x = images(family, 1, size=(3, 2 * reach + 8)).requires_grad_()
    centre = reach + 4
    model(x)[..., model.scale * centre].sum().backward()
    touched = x.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert centre - reach <= int(touched.min())
    assert int(touched.max()) <= centre + reach
    assert int(touched.max()) - int(touched.min()) >= reach, "the stated reach is far too large"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16(family: str) -> None:
    model, batch = build(family), images(family)
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch)
    low = build(family).bfloat16()(batch.bfloat16())
    for found in (mixed, low):
        assert torch.isfinite(found).all()
        assert relative(found, expected) < 2e-2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_float64_appears(family: str) -> None:
    model = build(family)
    with _Types() as types:
        model(images(family))
    assert torch.float64 not in types.seen
    assert torch.float32 in types.seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_other_channels(family: str) -> None:
    """A gray restorer is built by `in_chans=1`, and runs on gray and, channel by channel, on colour pictures."""
    model = build(family, in_chans=1)
    assert model(images(family, channels=1)).shape[1] == 1
    assert restore_tensor(model, images(family, 1)).shape[1] == 3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_runs_are_repeatable(family: str) -> None:
    model, batch = build(family), images(family)
    assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="num_classes must be 0"):
        build(family, num_classes=10)
