"""Filters that act on the spectrum of a map: the adaptive filter of AFFNet."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.kernels.dft import column_weights, separable, separable_dft
from zoo.kernels.dispatch import no_autocast, runs_kernel
from zoo.kernels.frequency import filter_frequencies, frequency_filter
from zoo.layers.tracing import require_leaf

__all__ = ["AdaptiveFrequencyFilter", "dense_dft"]

_DENSE_PIXELS = 8 * 8  # up to here one matrix product is faster than an FFT (CPU: 0.02 against 0.05 ms for 144 maps)


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
    back = forth * column_weights(width, dtype, device)[:, None]
    return forth.reshape(pixels, 2 * height * columns), back.reshape(pixels, 2 * height * columns)


@lru_cache(maxsize=64)
def _dense_kept(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # an inference tensor could not be used in training
        return dense_dft(height, width, dtype, device)


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

    kernel_operators = ("frequency_filter",)

    def __init__(
        self,
        dim: int,
        groups: int = 8,
        sparsity_threshold: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        if not torch.jit.is_scripting():
            return self._run(x)
        z = x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x
        return self._products(z).to(x.dtype)

    @torch.jit.unused
    def _run(self, x: Tensor) -> Tensor:
        require_leaf(self, x)
        if runs_kernel("frequency_filter", x, self.w1):
            return frequency_filter(x, self.w1, self.b1, self.w2, self.b2, self.sparsity_threshold)
        z = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        with no_autocast(z):
            return self._filter(z).to(x.dtype)

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
        height, width = x.shape[2:]
        if torch.jit.is_scripting():
            row, column, _, row_back = separable_dft(height, width, x.dtype, x.device)
        else:
            row, column, _, row_back = separable(height, width, x.dtype, x.device)
        w1, b1, w2, b2 = (value.to(x.dtype) for value in (self.w1, self.b1, self.w2, self.b2))
        return filter_frequencies(x, w1, b1, w2, b2, row, column, row_back, self.sparsity_threshold)
