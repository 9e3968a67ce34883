"""The adaptive frequency filter of AFFNet as an operator: Fourier transforms as matrix products around a mask network.

Adaptive Frequency Filters As Efficient Global Token Mixers (ICCV 2023), section 3.2, https://arxiv.org/abs/2307.14008.
An experiment: no GPU was at hand to measure the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.dft import separable, separable_kept
from zoo.kernels.dispatch import check_shapes, no_autocast, runs_kernel
from zoo.kernels.launch import precision

__all__ = ["filter_frequencies", "frequency_filter", "frequency_filter_backward", "frequency_filter_formula"]

_SIDE = 64  # pixels
_SHARED_BYTES = 220 * 1024  # of the 227 KiB of a multiprocessor of H100


def frequency_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, sparsity_threshold: float) -> Tensor:
    """Multiply a map's spectrum by 1 + a mask that a complex-valued network computes from it, and transform back.

    The network has two layers in groups of channels, with SiLU on real and imaginary parts, and sees one frequency at
    a time. All is computed in float32 (float64 of such maps), also under autocast; the kernel multiplies in TF32 for
    maps of 16 bits and where `torch.set_float32_matmul_precision` allows it, else as three products of TF32. It takes
    maps of up to 64 x 64 pixels with 16 channels in a group, 32 x 32 with 32, 16 x 16 with 64; with three products, of
    32 x 32 with 16 and 16 x 16 with 32. PyTorch takes larger ones. The backward pass is the reference path, products
    of PyTorch.

    Args:
        x: (B, C, H, W), in any memory format, which the output keeps.
        w1: First layer (2, g, C / g, C / g): real and imaginary part, group, input, output.
        b1: (2, g, C / g).
        w2: Second layer, as `w1`.
        b2: As `b1`.
        sparsity_threshold: Real and imaginary parts of the mask are brought nearer to zero by this much.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: The shapes do not fit, the map has no pixels, or the threshold is negative.
    """
    if x.ndim != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must be (B, C, H, W) with at least one pixel, got {tuple(x.shape)}.")
    if w1.ndim != 4 or w1.shape[1] * w1.shape[2] != x.shape[1]:
        raise ValueError(f"w1 must be (2, g, C / g, C / g) with C = {x.shape[1]}, got {tuple(w1.shape)}.")
    if sparsity_threshold < 0:
        raise ValueError(f"sparsity_threshold must be at least 0, got {sparsity_threshold}.")
    groups, size = w1.shape[1:3]
    matrix, vector = (2, groups, size, size), (2, groups, size)
    check_shapes(w1=(w1, matrix), b1=(b1, vector), w2=(w2, matrix), b2=(b2, vector))
    if runs_kernel("frequency_filter", x, w1, b1, w2, b2) and _fits(x, w1):
        return _frequency_filter(x, w1, b1, w2, b2, sparsity_threshold)
    return _formula(x, w1, b1, w2, b2, sparsity_threshold)


def _fits(x: Tensor, w1: Tensor) -> bool:
    """Return whether the kernel takes maps of this size: what its products read must fit the shared memory."""
    height, width = x.shape[2:]
    if height > _SIDE or width > _SIDE:
        return False
    channels, rows = (max(1 << (size - 1).bit_length(), 8) for size in (w1.shape[2], height))
    matrices = 4 * (2 * (2 * channels) ** 2 + 2 * (2 * rows) ** 2)  # both layers, both directions
    needed = matrices + 64 * channels * rows  # and eight columns of a spectrum; three products take it in two parts
    return needed * (2 if precision(x) == "ieee" else 1) <= _SHARED_BYTES


def _formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float) -> Tensor:
    with no_autocast(x):
        return frequency_filter_formula(x, w1, b1, w2, b2, threshold)


def frequency_filter_formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float) -> Tensor:
    """Compute `frequency_filter`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    row, column, _, row_back = separable(x.shape[2], x.shape[3], wide, x.device)
    w1, b1, w2, b2 = (value.to(wide) for value in (w1, b1, w2, b2))
    return filter_frequencies(x.to(wide), w1, b1, w2, b2, row, column, row_back, threshold).to(x.dtype)


def filter_frequencies(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    row: Tensor,
    column: Tensor,
    row_back: Tensor,
    threshold: float,
) -> Tensor:
    """Compute `frequency_filter` by real matrix products; all tensors have one type, the matrices are of `dft`."""
    batch, dim, height, width = x.shape
    groups, columns = w1.shape[1], width // 2 + 1
    rows = torch.matmul(x, row).view(batch, dim, 2 * height, columns)
    spectrum = torch.matmul(column, rows).view(batch, groups, 2 * dim // groups, height * columns)
    hidden = F.silu(torch.matmul(_joined(w1), spectrum) + _stacked(b1))
    mask = torch.matmul(_joined(w2), hidden) + _stacked(b2)
    if threshold > 0:
        mask = F.softshrink(mask, threshold)
    mask = mask.view(batch, dim, 2, height, columns)
    spectrum = spectrum.view(batch, dim, 2, height, columns)
    mask_re, mask_im, re, im = mask[:, :, 0] + 1, mask[:, :, 1], spectrum[:, :, 0], spectrum[:, :, 1]
    filtered = torch.stack((mask_re * re - mask_im * im, mask_re * im + mask_im * re), 2)
    rows = torch.matmul(column.t(), filtered.view(batch, dim, 2 * height, columns))
    return torch.matmul(rows.view(batch, dim, height, 2 * columns), row_back)


def frequency_filter_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `frequency_filter` for x, w1, b1, w2 and b2; the spectrum is computed again."""
    wide = torch.promote_types(x.dtype, torch.float32)
    (batch, dim, height, width), groups = x.shape, w1.shape[1]
    columns, size = width // 2 + 1, dim // groups
    row, column, _, row_back = separable_kept(height, width, wide, x.device)
    first, second = _joined(w1.to(wide)), _joined(w2.to(wide))

    def spectrum_of(map_: Tensor, matrix: Tensor) -> Tensor:
        rows = torch.matmul(map_.to(wide), matrix).view(batch, dim, 2 * height, columns)
        return torch.matmul(column, rows).view(batch, groups, 2 * size, height * columns)

    spectrum = spectrum_of(x, row)
    before = torch.matmul(first, spectrum) + _stacked(b1.to(wide))
    hidden = F.silu(before)
    mask = torch.matmul(second, hidden) + _stacked(b2.to(wide))
    if threshold > 0:
        mask = F.softshrink(mask, threshold)
    halves = (batch, groups, size, 2, height * columns)
    mask_re, mask_im = (mask.view(halves)[:, :, :, 0] + 1, mask.view(halves)[:, :, :, 1])
    re, im = spectrum.view(halves).unbind(3)
    out_re, out_im = spectrum_of(grad, row_back.t()).view(halves).unbind(3)
    grad_mask = torch.stack((re * out_re + im * out_im, re * out_im - im * out_re), 3).view(spectrum.shape)
    if threshold > 0:
        grad_mask = grad_mask * (mask != 0)
    grad_before = torch.ops.aten.silu_backward(torch.matmul(second.mT, grad_mask), before)
    direct = torch.stack((mask_re * out_re + mask_im * out_im, mask_re * out_im - mask_im * out_re), 3)
    grad_spectrum = direct.view(spectrum.shape) + torch.matmul(first.mT, grad_before)
    rows = torch.matmul(column.t(), grad_spectrum.view(batch, dim, 2 * height, columns))
    grad_x = torch.matmul(rows.view(batch, dim, height, 2 * columns), row.t())
    return (
        grad_x.to(x.dtype),
        _parted(torch.matmul(grad_before, spectrum.mT).sum(0)).to(w1.dtype),
        grad_before.sum((0, 3)).view(groups, size, 2).permute(2, 0, 1).to(b1.dtype),
        _parted(torch.matmul(grad_mask, hidden.mT).sum(0)).to(w2.dtype),
        grad_mask.sum((0, 3)).view(groups, size, 2).permute(2, 0, 1).to(b2.dtype),
    )


def _joined(weight: Tensor) -> Tensor:
    """Return complex weights (2, g, in, out) as real ones, (g, 2 * out, 2 * in), real and imaginary side by side."""
    weight = weight.transpose(2, 3)
    re, im = weight[0], weight[1]  # (g, out, in)
    joined = torch.stack((torch.stack((re, -im), -1), torch.stack((im, re), -1)), 2)
    return joined.reshape(re.shape[0], 2 * re.shape[1], -1)


def _parted(joined: Tensor) -> Tensor:
    """Return the gradient of what `_joined` was given, of the gradient of what it returned."""
    parts = joined.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # (g, out, 2, in, 2)
    re, im = parts[:, :, 0, :, 0] + parts[:, :, 1, :, 1], parts[:, :, 1, :, 0] - parts[:, :, 0, :, 1]
    return torch.stack((re, im)).transpose(2, 3)


def _stacked(bias: Tensor) -> Tensor:
    """Return complex biases (2, g, out) as real ones, (g, 2 * out, 1)."""
    return torch.stack((bias[0], bias[1]), -1).reshape(bias.shape[1], -1, 1)


@torch.library.custom_op("zoo::frequency_filter", mutates_args=())
def _frequency_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float) -> Tensor:
    out = torch.empty_like(x)
    if runs_kernel("frequency_filter", x, w1, b1, w2, b2) and _fits(x, w1):
        from zoo.kernels import triton_frequency

        return triton_frequency.forward(x, w1, b1, w2, b2, threshold, out)
    return out.copy_(_formula(x, w1, b1, w2, b2, threshold))


@_frequency_filter.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("zoo::frequency_filter_backward", mutates_args=())
def _frequency_filter_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(x):
        grads = frequency_filter_backward(grad, x, w1, b1, w2, b2, threshold)
    outs = [torch.empty_like(tensor) for tensor in (x, w1, b1, w2, b2)]
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2 = (out.copy_(value) for out, value in zip(outs, grads, strict=True))
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2


@_frequency_filter_backward.register_fake
def _(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2 = (torch.empty_like(tensor) for tensor in (x, w1, b1, w2, b2))
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.threshold = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_frequency_filter_backward(grad, *ctx.saved_tensors, ctx.threshold), None)


_frequency_filter.register_autograd(_differentiate, setup_context=_save)


def _products(x: Any, w1: Any) -> tuple[int, int]:
    """Return the FLOPs of one Fourier transform and of one layer of the mask network."""
    (batch, dim, height, width), (_, groups, size, _) = x, w1
    columns = width // 2 + 1
    transform = 4 * batch * dim * height * columns * (width + 2 * height)
    return transform, 2 * batch * groups * (2 * size) ** 2 * height * columns


@register_flop_formula(torch.ops.zoo.frequency_filter)
def _flops(x: Any, w1: Any, *shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of the matrix products: two transforms, two layers."""
    transform, layer = _products(x, w1)
    return 2 * transform + 2 * layer


@register_flop_formula(torch.ops.zoo.frequency_filter_backward)
def _backward_flops(grad: Any, x: Any, w1: Any, *shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of three transforms, of both layers, and of two products for the gradients of each."""
    transform, layer = _products(x, w1)
    return 3 * transform + 6 * layer
