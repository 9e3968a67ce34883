"""Norms, branches and residuals fold into one convolution or linear layer without a change of the output."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registered import randomize, relative
from torch import nn

from zoo.layers.conv_norm import ConvNorm, NormLinear, RepConv, average_heads, fold_norm_into_linear


@pytest.mark.parametrize(
    ("layer", "left"),
    [
        (ConvNorm(6, 4, 3, 2), {"conv.weight", "conv.bias"}),
        (ConvNorm(6, 6, 5, groups=6, dilation=2), {"conv.weight", "conv.bias"}),
        (ConvNorm(6, 4, bias=True, eps=1e-3), {"conv.weight", "conv.bias"}),
        (NormLinear(6, 3), {"linear.weight", "linear.bias"}),
        (RepConv(6, 12, (7, 3), 2), {"conv.weight", "conv.bias"}),
        (RepConv(6, 6, (1, 3), identity=True), {"conv.weight", "conv.bias"}),
        (RepConv(6, 6, (3,), identity=True), {"conv.weight", "conv.bias"}),
    ],
    ids=["stride", "depthwise dilated", "biased", "linear", "two kernels", "identity", "residual"],
)
def test_folds_are_exact(layer: nn.Module, left: set[str]) -> None:
    layer = randomize(copy.deepcopy(layer)).double().eval()
    x = layer.example_input()
    expected = layer(x)
    assert layer.reparameterize()
    assert relative(layer(x), expected) < 1e-13
    assert layer.state_dict().keys() == left
    assert layer.reparameterize() == ()


@settings(max_examples=25, deadline=None)
@given(
    kernels=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3),
    stride=st.integers(1, 3),
    multiple=st.integers(1, 2),
    identity=st.booleans(),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
)
def test_branches_of_any_kind_fold(
    kernels: list[int], stride: int, multiple: int, identity: bool, height: int, width: int
) -> None:
    identity = identity and stride == 1 and multiple == 1
    layer = randomize(RepConv(3, 3 * multiple, kernels, stride, identity=identity)).double().eval()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = layer(x)
    layer.reparameterize()
    assert relative(layer(x), expected) < 1e-13
    assert layer.conv is not None
    assert layer.conv.kernel_size == (max(kernels),) * 2


@pytest.mark.parametrize("bias", [True, False])
def test_norm_before_a_pointwise_convolution(bias: bool) -> None:
    norm, conv = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1, bias=bias)
    block = randomize(nn.Sequential(norm, conv)).double().eval()
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    expected = block(x)
    fold_norm_into_linear(norm, conv)
    assert relative(conv(x), expected) < 1e-13


@pytest.mark.parametrize("filters", [2, 3])
@pytest.mark.parametrize("size", [(9, 12), (1, 5)])
@torch.no_grad()
def test_several_filters_a_channel(filters: int, size: tuple[int, int]) -> None:
    """One filter of each channel at a time gives what the convolution gives, in its order and layout."""
    layer = randomize(RepConv(4, 4 * filters, (5, 3), stride=2)).double().eval()
    layer.reparameterize()
    assert layer.conv is not None
    x = torch.randn(2, 4, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    found = layer(x)
    assert relative(found, layer.conv(x)) < 1e-14
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_mean_of_two_heads() -> None:
    head, other = (randomize(NormLinear(5, 3)).double().eval() for _ in range(2))
    other.linear.weight.data.mul_(-2)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = (head(x) + other(x)) / 2
    average_heads(head, other)
    assert relative(head(x), expected) < 1e-13


@pytest.mark.parametrize("layer", [ConvNorm(4, 4, 3), NormLinear(4, 4), RepConv(4, 4, (3, 1))])
def test_merged_layers_can_be_trained(layer: nn.Module) -> None:
    """A bias that comes from a norm takes gradients, unless the layer is frozen."""
    frozen = copy.deepcopy(layer).requires_grad_(False)
    for copied, wanted in ((copy.deepcopy(layer), True), (frozen, False)):
        copied.eval().reparameterize()
        assert {parameter.requires_grad for parameter in copied.parameters()} == {wanted}


@pytest.mark.parametrize("layer", [ConvNorm(4, 4, 3), NormLinear(4, 4), RepConv(4, 4, (3, 1))])
def test_training_mode_is_refused(layer: nn.Module) -> None:
    before = layer.state_dict().keys()
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        layer.train().reparameterize()
    assert layer.state_dict().keys() == before


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [((4, 4, (3, 2)), {}, "odd"), ((4, 8, (3,)), {"identity": True}, "equal channels")],
)
def test_wrong_arguments(arguments: tuple[int, int, tuple[int, ...]], options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepConv(*arguments, **options)
