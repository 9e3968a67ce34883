"""Real discrete Fourier transforms of maps as matrix products along each side."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["column_weights", "separable", "separable_dft", "separable_kept"]


def column_weights(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return how often each column kx of half a spectrum counts: twice, unless it is its own mirror image."""
    column = torch.arange(width // 2 + 1, device=device)
    return ((column > 0) & (2 * column != width)).to(dtype) + 1


def separable_dft(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the orthonormal 2-D DFT of real maps as a matrix along each side, and the two of its inverse.

    With a map X (H, W), `column @ (X @ row as (2 * H, K))` is its spectrum: real part, imaginary part, each (H, K) with
    K = W // 2 + 1. Of a spectrum Y so laid out, `(column_back @ Y as (H, 2 * K)) @ row_back` is the real part of the
    sum over all frequencies; it need not be Hermitian.

    Args:
        height: Pixels H.
        width: Pixels W.
        dtype: Type of the matrices.
        device: Device of the matrices.

    Returns:
        row (W, 2 * K), column (2 * H, 2 * H), column_back (2 * H, 2 * H), row_back (2 * K, W).
    """
    columns = width // 2 + 1
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, pixels = torch.ones_like(y).sum(), torch.ones_like(x).sum()  # H and W, as tensors: sizes may be symbols
    angle = (torch.outer(x, x[:columns]) % pixels).to(dtype) * (2 * math.pi / pixels.to(dtype))
    row = torch.stack((angle.cos(), -angle.sin()), 1) / pixels.to(dtype).sqrt()  # (W, 2, K)
    row_back = (row * column_weights(width, dtype, device)).reshape(width, 2 * columns).t()
    angle = (torch.outer(y, y) % rows).to(dtype) * (2 * math.pi / rows.to(dtype))
    cos, sin = angle.cos() / rows.to(dtype).sqrt(), angle.sin() / rows.to(dtype).sqrt()
    column = torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)))  # (2, ky, h, 2)
    column = column.reshape(2 * height, 2 * height)
    return row.reshape(width, 2 * columns), column, column.t(), row_back


@lru_cache(maxsize=64)
def separable_kept(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `separable_dft` does, kept from call to call."""
    with torch.inference_mode(False):
        return separable_dft(height, width, dtype, device)


@torch.compiler.assume_constant_result  # of one tensor; it does not know tuples
def _constant(index: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return separable_kept(height, width, dtype, device)[index]


def separable(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return kept matrices; in compiled graphs as constants, in exported ones as the steps that make them.

    A compiled graph serves one size of the map, because sizes that are symbols take minutes to compile here. An
    exported program may be meant for any size.
    """
    if torch.compiler.is_exporting():
        return separable_dft(height, width, dtype, device)
    if torch.compiler.is_compiling():
        height, width = len(range(height)), len(range(width))  # `range` makes symbols numbers
        return (
            _constant(0, height, width, dtype, device),
            _constant(1, height, width, dtype, device),
            _constant(2, height, width, dtype, device),
            _constant(3, height, width, dtype, device),
        )
    return separable_kept(height, width, dtype, device)
