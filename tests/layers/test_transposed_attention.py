"""Channel attention from sums over pixels: the textbook's result, in parts, in low precision, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.layers.transposed_attention import channel_attention, fold_projection, gram


def textbook(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return (q @ k.mT * temperature).softmax(-1)


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 35, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v, torch.rand(4, 1, 1, generator=generator).to(dtype) + 1


def test_attention_is_the_textbooks() -> None:
    q, k, v, temperature = example()
    q[0, 1, 2] = 0  # a channel without any signal has no direction, and must not divide by zero
    attention = channel_attention(gram(q, k), temperature)
    assert (attention - textbook(q, k, temperature)).abs().max() < 1e-14
    weight = torch.randn(10, 24, dtype=torch.float64)
    found = fold_projection(attention, weight) @ v.flatten(1, 2)
    assert (found - weight @ (attention @ v).flatten(1, 2)).abs().max() < 1e-13


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    q, k, _, _ = example()
    whole, (first, second) = gram(q, k), (gram(q[..., part], k[..., part]) for part in (slice(11), slice(11, None)))
    for name in ("products", "queries", "keys"):
        assert (getattr(whole, name) - getattr(first + second, name)).abs().max() < 1e-13


def test_gradients() -> None:
    q, k, _, temperature = (part.clone().requires_grad_() for part in example())
    with torch.no_grad():
        q[..., 0, :] = 0
    seed = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    ours = torch.autograd.grad((channel_attention(gram(q, k), temperature) * seed).sum(), (q, k, temperature))
    theirs = torch.autograd.grad((textbook(q, k, temperature) * seed).sum(), (q, k, temperature))
    for found, expected in zip(ours[1:], theirs[1:], strict=True):
        assert (found - expected).abs().max() < 1e-13
    assert torch.isfinite(ours[0]).all()
    assert (ours[0] - theirs[0])[..., 1:, :].abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32(dtype: torch.dtype) -> None:
    """65 504 is the largest number of float16: squares of a few hundred pixels are beyond."""
    q, k, _, temperature = example(dtype)
    sums = gram(200 * q, 200 * k)
    assert sums.products.dtype == sums.keys.dtype == torch.float32
    attention = channel_attention(sums, temperature)
    assert (attention - textbook(q.float(), k.float(), temperature.float())).abs().max() < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert gram(q.float(), k.float()).products.dtype == torch.float32
