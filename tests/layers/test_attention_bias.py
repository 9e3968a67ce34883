"""The spread bias follows its table, however that is changed, and never keeps a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zoo.layers.attention_bias import BiasedAttention, resize_attention_biases


def _layer() -> BiasedAttention:
    torch.manual_seed(0)
    layer = BiasedAttention(2, 3).eval()
    with torch.no_grad():
        layer.attention_biases.normal_()
        layer.attention_bias()  # now one is kept
    return layer


def _expected(table: Tensor, side: int = 3) -> Tensor:
    """Spread a table pair by pair, in words of the paper: by |dy| and |dx|."""
    out = torch.empty(table.shape[0], side**2, side**2, dtype=table.dtype)
    for p in range(side**2):
        for q in range(side**2):
            dy, dx = abs(p // side - q // side), abs(p % side - q % side)
            out[:, p, q] = table[:, dy * side + dx]
    return out


def _replace(layer: BiasedAttention) -> None:
    layer.attention_biases = nn.Parameter(torch.randn(2, 9))


def _there_and_back(layer: BiasedAttention) -> None:
    layer.bfloat16().float()  # rounds the table


CHANGES: dict[str, Callable[[BiasedAttention], object]] = {
    "nothing": lambda layer: None,
    "load_state_dict": lambda layer: layer.load_state_dict({"attention_biases": torch.randn(2, 9)}),
    "in place": lambda layer: layer.attention_biases.mul_(2),
    "through .data": lambda layer: layer.attention_biases.data.add_(1),
    "new .data": lambda layer: setattr(layer.attention_biases, "data", torch.randn(2, 9)),
    "new parameter": _replace,
    "other type": lambda layer: layer.double(),
    "there and back": _there_and_back,
}


@pytest.mark.parametrize("change", list(CHANGES))
@torch.no_grad()
def test_never_stale(change: str) -> None:
    layer = _layer()
    CHANGES[change](layer)
    assert torch.equal(layer.attention_bias(), _expected(layer.attention_biases))


@torch.no_grad()
def test_copies_are_apart() -> None:
    layer = _layer()
    other = copy.deepcopy(layer)
    other.attention_biases.zero_()
    assert other.attention_bias().count_nonzero() == 0
    assert torch.equal(layer.attention_bias(), _expected(layer.attention_biases))


def test_kept_without_gradients_only() -> None:
    layer = _layer()
    with torch.no_grad():
        assert layer.attention_bias() is layer.attention_bias()
    for _ in range(2):  # a kept graph would be gone the second time
        layer.attention_biases.grad = None
        layer.attention_bias().square().sum().backward()
        assert layer.attention_biases.grad is not None


def test_double_backward() -> None:
    layer = _layer().double()
    (first,) = torch.autograd.grad(layer.attention_bias().pow(3).sum(), layer.attention_biases, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), layer.attention_biases)
    assert torch.isfinite(second).all()


def test_inference_mode_leaves_nothing_behind() -> None:
    layer = BiasedAttention(2, 3).eval()
    with torch.inference_mode():
        layer.attention_bias()
    with torch.no_grad():
        assert not layer.attention_bias().is_inference()
    layer.attention_bias().sum().backward()


def test_resize() -> None:
    constant = torch.arange(2.0)[:, None].expand(2, 49)
    assert torch.allclose(resize_attention_biases(constant, 4), torch.arange(2.0)[:, None].expand(2, 16))
    table = torch.randn(2, 49)
    assert resize_attention_biases(table, 7) is table
    assert resize_attention_biases(table.half(), 3).dtype == torch.float16
