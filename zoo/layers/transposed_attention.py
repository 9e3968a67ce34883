"""Transposed (channel) attention: every channel attends to every other one, with similarities summed over all pixels.

Queries and keys are normalised along the pixels, which needs only their norms: the sums here, over a whole map or over
its strips one after the other, are all that the attention matrix depends on. Restormer (Zamir et al., CVPR 2022), DAT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.kernels.dispatch import no_autocast
from zoo.layers.own import is_own

__all__ = ["Gram", "TransposedAttention", "channel_attention", "fold_projection", "gram"]

_EPS = 1e-12  # least norm, as in `F.normalize`


@dataclass(frozen=True)
class Gram:
    """Sums over pixels from which `channel_attention` is made; add those of all strips of a map.

    Args:
        products: Of queries with keys, (..., heads, c, c), float32 or wider.
        queries: Of squared queries, (..., heads, c, 1).
        keys: Of squared keys, (..., heads, 1, c).
    """

    products: Tensor
    queries: Tensor
    keys: Tensor

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.products + other.products, self.queries + other.queries, self.keys + other.keys)


def gram(q: Tensor, k: Tensor) -> Gram:
    """Return the sums of queries and keys over their pixels, in float32 at least.

    Args:
        q: Queries (..., heads, c, pixels), of any strides.
        k: Keys, likewise.
    """
    if q.dtype in (torch.bfloat16, torch.float16):
        q, k = q.float(), k.float()
    with no_autocast(q):
        products = q @ k.mT
    return Gram(products, q.square().sum(-1).unsqueeze(-1), k.square().sum(-1).unsqueeze(-2))


def channel_attention(sums: Gram, temperature: Tensor) -> Tensor:
    """Return the attention matrices softmax(normalize(q) normalize(k)^T * temperature).

    The norms divide the product, so that no normalised copy of queries and keys is ever made.

    Args:
        sums: From `gram`.
        temperature: Factor of the similarities, (heads, 1, 1).

    Returns:
        (..., heads, c, c), rows sum to 1, in the type of the sums.
    """
    least = _EPS**2
    scale = sums.queries.clamp_min(least).rsqrt() * temperature.to(sums.products.dtype)
    return (sums.products * scale * sums.keys.clamp_min(least).rsqrt()).softmax(-1)


def fold_projection(attention: Tensor, weight: Tensor) -> Tensor:
    """Return the matrix W blockdiag(A): values are mixed and projected in one product of C x C with C x pixels.

    Args:
        attention: (..., heads, c, c), from `channel_attention`.
        weight: Of the linear layer behind the attention, (out, heads * c).

    Returns:
        (..., out, heads * c), in the type of `weight`.
    """
    heads, c = attention.shape[-3], attention.shape[-1]
    by_head = weight.unflatten(-1, (heads, c)).transpose(-3, -2)  # (heads, out, c)
    return (by_head.to(attention.dtype) @ attention).transpose(-3, -2).flatten(-2).to(weight.dtype)


class TransposedAttention(nn.Module):
    """Multi-Dconv head transposed attention (MDTA): channels attend to channels, by similarities over the whole map.

    With the attribute `merged` the projection is folded into the attention matrices, which are small.

    Args:
        dim: Channels C.
        num_heads: Heads of C / num_heads channels.

    Shape:
        (B, H, W, C) -> the same.
    """

    def __init__(
        self, dim: int, num_heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim, self.num_heads, self.merged = dim, num_heads, False
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False, **dd)
        self.project_out = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv_dwconv(self.qkv(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, 3C)
        q, k, v = qkv.chunk(3, -1)
        by_head = (part.unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1) for part in (q, k))
        sums = gram(*by_head)
        if self.merged and is_own(self.project_out, nn.Linear) and self.project_out.bias is None:
            out = v @ self.matrix(sums).mT
        else:
            attention = channel_attention(sums, self.temperature).to(v.dtype)
            mixed = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) @ attention.mT  # (B, heads, HW, c)
            out = self.project_out(mixed.transpose(1, 2).flatten(2))
        return out.unflatten(1, x.shape[1:3])

    def matrix(self, sums: Gram) -> Tensor:
        """Return attention and projection as one matrix, (..., C, C)."""
        return fold_projection(channel_attention(sums, self.temperature), self.project_out.weight)
