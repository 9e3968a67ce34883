"""Filters that act on the spectrum of a map: real discrete Fourier transforms, and the adaptive filter of AFFNet."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

__all__ = ["AdaptiveFrequencyFilter", "dense_dft", "separable_dft"]

_DENSE_PIXELS = 8 * 8  # up to here one matrix product is faster than an FFT (CPU: 0.02 against 0.05 ms for 144 maps)


def _column_weights(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return how often each column kx of half a spectrum counts: twice, unless it is its own mirror image."""
    column = torch.arange(width // 2 + 1, device=device)
    return ((column > 0) & (2 * column != width)).to(dtype) + 1


def dense_dft(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the orthonormal 2-D DFT of real maps as one matrix, and its inverse.

    Frequencies are (ky, kx), kx up to width // 2, with real and imaginary part side by side. The inverse is the real
    part of the sum over all frequencies, for spectra that need not be Hermitian.

    Args:
        height: Pixels H.
        width: Pixels W.
        dtype: Type of the matrices.
        device: Device of the matrices.

    Returns:
        (H * W, 2 * H * K) and (H * W, 2 * H * K), K = W // 2 + 1: to frequencies from the left, to pixels transposed.
    """
    columns, pixels = width // 2 + 1, height * width
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    turns = (torch.outer(y, y) * width)[:, None, :, None] + (torch.outer(x, x[:columns]) * height)[None, :, None, :]
    angle = (turns % pixels).to(dtype) * (2 * math.pi / pixels)  # whole numbers up to here
    forth = torch.stack((angle.cos(), -angle.sin()), -1) / math.sqrt(pixels)  # (H, W, ky, kx, 2)
    back = forth * _column_weights(width, dtype, device)[:, None]
    return forth.reshape(pixels, 2 * height * columns), back.reshape(pixels, 2 * height * columns)


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
    row_back = (row * _column_weights(width, dtype, device)).reshape(width, 2 * columns).t()
    angle = (torch.outer(y, y) % rows).to(dtype) * (2 * math.pi / rows.to(dtype))
    cos, sin = angle.cos() / rows.to(dtype).sqrt(), angle.sin() / rows.to(dtype).sqrt()
    column = torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)))  # (2, ky, h, 2)
    column = column.reshape(2 * height, 2 * height)
    return row.reshape(width, 2 * columns), column, column.t(), row_back


@lru_cache(maxsize=64)
def _dense_kept(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # an inference tensor could not be used in training
        return dense_dft(height, width, dtype, device)


@lru_cache(maxsize=64)
def _separable_kept(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        return separable_dft(height, width, dtype, device)


@torch.compiler.assume_constant_result  # of one tensor; it does not know tuples
def _constant(index: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _separable_kept(height, width, dtype, device)[index]


def _separable(
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
    return _separable_kept(height, width, dtype, device)


@register_notrace_module  # its branches depend on sizes and devices, which torch.fx cannot follow
class AdaptiveFrequencyFilter(nn.Module):
    """Multiply a map's spectrum by a mask that a network computes from it, frequency by frequency, and add the map.

    A complex-valued network of two layers, in groups of channels, with SiLU on real and imaginary parts; a circular
    convolution as large as the map, in effect. Runs in float32 also under autocast and with low-precision weights.
    Source: AFFNet (arXiv:2307.14008), section 3.2.

    The same numbers are computed in three ways. On a CPU one matrix product transforms small maps, an FFT larger ones,
    and the mask network is a complex product; without gradients images take turns, so that their spectra stay in the
    cache. Elsewhere, and where a graph is recorded, everything is real products: no complex numbers, which exporters
    lack, and no inverse FFT of spectra that are not Hermitian, which libraries may define as they like. The residual
    is 1 in the mask.

    Args:
        dim: Channels C, a multiple of `groups`.
        groups: Groups of the mask network.
        sparsity_threshold: Real and imaginary parts of the mask are brought nearer to zero by this much (soft shrink).
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.

    Raises:
        ValueError: `groups` does not divide `dim`, or the threshold is negative.
    """

    def __init__(
        self, dim: int, groups: int = 8, sparsity_threshold: float = 0.0, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"dim must be a multiple of {groups}, the groups of the mask network, got {dim}.")
        if sparsity_threshold < 0:
            raise ValueError(f"sparsity_threshold must be at least 0, got {sparsity_threshold}.")
        size = dim // groups
        self.dim, self.groups, self.sparsity_threshold = dim, groups, float(sparsity_threshold)
        self.w1 = nn.Parameter(
            0.02 * torch.randn(2, groups, size, size, device=device, dtype=dtype)
        )  # (re/im, g, i, o)
        self.b1 = nn.Parameter(0.02 * torch.randn(2, groups, size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(0.02 * torch.randn(2, groups, size, size, device=device, dtype=dtype))
        self.b2 = nn.Parameter(0.02 * torch.randn(2, groups, size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        z = x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x
        if torch.jit.is_scripting():
            z = self._products(z)
        elif z.device.type != "meta" and torch.is_autocast_enabled(z.device.type):
            with torch.autocast(z.device.type, enabled=False):
                z = self._filter(z)
        else:
            z = self._filter(z)
        return z.to(x.dtype)

    @torch.jit.unused
    def _filter(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
            return self._products(x)
        network = self._complex_network(x.dtype)
        if x.shape[2] * x.shape[3] <= _DENSE_PIXELS:
            return self._dense(x, network)
        if len(x) == 1 or torch.is_grad_enabled():
            return self._fourier(x, network)
        return torch.cat([self._fourier(image, network) for image in x.split(1)])

    def _complex_network(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weights (g, out, in) and biases (g, out, 1) of both layers as complex numbers."""
        w1, b1, w2, b2 = (value.to(dtype) for value in (self.w1, self.b1, self.w2, self.b2))
        real = b2[0] if self.sparsity_threshold else b2[0] + 1  # 1 in the mask is the residual
        return (
            torch.complex(w1[0], w1[1]).mT,
            torch.complex(b1[0], b1[1])[..., None],
            torch.complex(w2[0], w2[1]).mT,
            torch.complex(real, b2[1])[..., None],
        )

    def _dense(self, x: Tensor, network: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Filter a small map by one matrix product each way; channels of the output are last in memory."""
        batch, dim, height, width = x.shape
        forth, back = (matrix.expand(batch, -1, -1) for matrix in _dense_kept(height, width, x.dtype, x.device))
        spectrum = torch.bmm(x.flatten(2), forth)  # (B, C, 2 * F)
        filtered = self._complex_mask(torch.view_as_complex(spectrum.view(batch, dim, -1, 2)), network)
        filtered = torch.view_as_real(filtered).view(spectrum.shape)
        return torch.bmm(back, filtered.mT).view(batch, height, width, dim).permute(0, 3, 1, 2)

    def _fourier(self, x: Tensor, network: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Filter by FFT; channels of the output are last in memory if those of the input are."""
        batch, dim, height, width = x.shape
        last = not x.is_contiguous()
        planes = x[0].flatten(1).contiguous().view(x.shape) if batch == 1 else x.contiguous()  # 2-D transposes are fast
        filtered = self._complex_mask(torch.fft.rfft2(planes, norm="ortho"), network)
        planes = torch.fft.irfft2(filtered, s=(height, width), norm="ortho")
        if not last:
            return planes
        if batch > 1:
            return planes.contiguous(memory_format=torch.channels_last)
        return planes.view(dim, -1).t().contiguous().view(1, height, width, dim).permute(0, 3, 1, 2)

    def _complex_mask(self, spectrum: Tensor, network: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Return the filtered spectrum, of the same shape, complex."""
        w1, b1, w2, b2 = (value.repeat(len(spectrum), 1, 1) if len(spectrum) > 1 else value for value in network)
        x = spectrum.reshape(len(spectrum) * self.groups, self.dim // self.groups, -1)  # (B * g, C / g, F)
        hidden = torch.view_as_complex(F.silu(torch.view_as_real(torch.baddbmm(b1, w1, x))))
        mask = torch.baddbmm(b2, w2, hidden)
        if not self.sparsity_threshold:
            return (mask * x).view(spectrum.shape)
        mask = torch.view_as_complex(F.softshrink(torch.view_as_real(mask), self.sparsity_threshold))
        return torch.addcmul(x, mask, x).view(spectrum.shape)

    def _products(self, x: Tensor) -> Tensor:
        """Filter by real matrix products only."""
        batch, dim, height, width = x.shape
        if torch.jit.is_scripting():
            row, column, column_back, row_back = separable_dft(height, width, x.dtype, x.device)
        else:
            row, column, column_back, row_back = _separable(height, width, x.dtype, x.device)
        columns = width // 2 + 1
        rows = torch.matmul(x, row).view(batch, dim, 2 * height, columns)
        spectrum = torch.matmul(column, rows).view(batch, self.groups, 2 * dim // self.groups, height * columns)
        hidden = F.silu(torch.matmul(self._joined(self.w1, x.dtype), spectrum) + self._stacked(self.b1, x.dtype))
        mask = torch.matmul(self._joined(self.w2, x.dtype), hidden) + self._stacked(self.b2, x.dtype)
        if self.sparsity_threshold > 0:
            mask = F.softshrink(mask, self.sparsity_threshold)
        mask = mask.view(batch, dim, 2, height, columns)
        spectrum = spectrum.view(batch, dim, 2, height, columns)
        mask_re, mask_im, re, im = mask[:, :, 0] + 1, mask[:, :, 1], spectrum[:, :, 0], spectrum[:, :, 1]
        filtered = torch.stack((mask_re * re - mask_im * im, mask_re * im + mask_im * re), 2)
        rows = torch.matmul(column_back, filtered.view(batch, dim, 2 * height, columns))
        return torch.matmul(rows.view(batch, dim, height, 2 * columns), row_back)

    def _joined(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return complex weights as real ones, (g, 2 * out, 2 * in), real and imaginary parts side by side."""
        weight = weight.to(dtype).transpose(2, 3)
        re, im = weight[0], weight[1]  # (g, out, in)
        joined = torch.stack((torch.stack((re, -im), -1), torch.stack((im, re), -1)), 2)
        return joined.reshape(self.groups, 2 * re.shape[1], -1)

    def _stacked(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """Return complex biases as real ones, (g, 2 * out, 1)."""
        return torch.stack((bias[0], bias[1]), -1).to(dtype).reshape(self.groups, -1, 1)
