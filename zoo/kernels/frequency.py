"""The adaptive frequency filter of AFFNet as an operator: Fourier transforms as matrix products around a mask network.

Adaptive Frequency Filters As Efficient Global Token Mixers (ICCV 2023), section 3.2, https://arxiv.org/abs/2307.14008.
An experiment: no GPU was at hand to measure the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import reference
from zoo.kernels.dispatch import check_shapes, no_autocast, runs_kernel
from zoo.kernels.launch import precision

__all__ = ["frequency_filter"]

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
        return reference.frequency_filter(x, w1, b1, w2, b2, threshold)


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
        grads = reference.frequency_filter_backward(grad, x, w1, b1, w2, b2, threshold)
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
