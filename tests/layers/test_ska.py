"""Small kernel aggregation: shifted multiply-adds against unfolded neighbourhoods, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.bench.plain_backbones import plain_ls_conv, plain_ska
from zoo.kernels import ska
from zoo.kernels.ska import ska_formula
from zoo.layers.ska import LSConv

SHAPES = [  # batch, channels, sets, side of the kernels, height, width
    (1, 8, 1, 3, 5, 7),
    (3, 12, 4, 3, 4, 4),
    (2, 6, 6, 5, 7, 3),
    (2, 16, 2, 3, 1, 1),
    (1, 3, 3, 1, 2, 5),
]


def inputs(shape: tuple[int, ...], layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    batch, chans, sets, side, height, width = shape
    x = torch.randn(batch, chans, height, width, dtype=torch.double).contiguous(memory_format=layout)
    return x.requires_grad_(), torch.randn(batch, sets, side**2, height, width, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_form(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Values and both gradients, in both memory formats; the format is kept."""
    x, weight = inputs(shape, layout)
    found, expected = ska(x, weight), plain_ska(x, weight)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=layout)
    seed = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight), seed), torch.autograd.grad(expected, (x, weight), seed), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    started = ska_formula(x.detach(), weight.detach(), torch.ones_like(x.detach()))
    assert started.stride() == x.stride()  # of a single image too, where most layouts are not told by `is_contiguous`
    assert torch.allclose(started, expected + 1, rtol=1e-12, atol=1e-12)


def test_channels_share_kernels_by_remainder() -> None:
    """Channel c takes set c mod G; the taps run row by row; outside of the map is zero."""
    x, weight = torch.zeros(1, 4, 3, 3), torch.zeros(1, 2, 9, 3, 3)
    x[0, :, 0, 1] = torch.arange(1.0, 5.0)
    weight[0, 1, 1, 1, 1] = 10.0  # set 1, the tap above, at the central pixel
    found = ska(x, weight)
    assert found[0, :, 1, 1].tolist() == [0.0, 20.0, 0.0, 40.0]
    assert found.abs().sum() == 60.0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms() -> None:
    """Second derivatives and vmap work."""
    x, weight = inputs((1, 4, 2, 3, 3, 2))
    assert torch.autograd.gradcheck(ska, (x, weight))
    assert torch.autograd.gradgradcheck(ska, (x, weight))
    many = torch.vmap(ska)(torch.stack((x, x + 1)), torch.stack((weight, weight)))
    assert torch.allclose(many[1], ska(x + 1, weight))


def test_training_keeps_input_and_kernels_only() -> None:
    """The backward pass needs no neighbourhoods: what is saved is as large as the arguments."""
    x, weight = inputs((2, 16, 2, 3, 6, 6))
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ska(x, weight)
    assert saved == x.numel() + weight.numel()


def test_bad_arguments() -> None:
    x, weight = inputs((1, 6, 4, 3, 3, 3))
    with pytest.raises(ValueError, match="got 4 for 6"):
        ska(x, weight)
    with pytest.raises(ValueError, match="square kernel of odd side, got 8"):
        ska(x, weight[:, :2, :8])


def ls_conv(dim: int) -> LSConv:
    """Return a layer with random statistics, in evaluation mode."""
    layer = LSConv(dim).double().eval()
    for module in layer.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return layer


@pytest.mark.parametrize(("dim", "batch", "size"), [(16, 1, (5, 7)), (24, 3, (4, 4)), (8, 2, (1, 3))])
def test_ls_conv_merges(dim: int, batch: int, size: tuple[int, int]) -> None:
    """Training form, merged form with and without gradients, and the plain form of both agree."""
    layer, x = ls_conv(dim), torch.randn(batch, dim, *size, dtype=torch.double)
    expected = layer(x)
    assert torch.allclose(plain_ls_conv(layer, x), expected, rtol=1e-11, atol=1e-11)
    params = sum(parameter.numel() for parameter in layer.parameters())
    assert layer.reparameterize() == ("norms", "kernel order")
    assert layer.reparameterize() == ()
    assert sum(parameter.numel() for parameter in layer.parameters()) < params
    assert torch.allclose(layer(x), expected, rtol=1e-11, atol=1e-11)
    assert torch.allclose(plain_ls_conv(layer, x), expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert torch.allclose(layer(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-11, atol=1e-11)


def test_ls_conv_refuses_training_mode() -> None:
    with pytest.raises(RuntimeError, match="eval"):
        LSConv(8).reparameterize()
