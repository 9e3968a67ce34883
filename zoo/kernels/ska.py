"""Small kernel aggregation, a depthwise convolution whose kernels differ from pixel to pixel, as an operator.

LSNet: See Large, Focus Small (CVPR 2025), section 3.3, https://arxiv.org/abs/2503.23135.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.dispatch import check_shapes, runs_kernel

__all__ = ["ska", "ska_backward", "ska_formula"]


def ska(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve every pixel with kernels of its own; channel c takes kernel c mod G, zeros outside of the map.

    out[b, c, p] = sum over k of weight[b, c mod G, k, p] * x[b, c, p + o_k]. Under autocast nothing is cast: the types
    of the inputs are promoted. For the backward pass only the inputs are kept; that of the kernel cannot be
    differentiated again.

    Args:
        x: (B, C, H, W), in any memory format, which the output keeps.
        weight: (B, G, K, H, W): K = side * side taps (odd side), row by row, for each of G sets; G divides C. It is
            fastest where the same dimension as in `x` is contiguous.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: The shapes do not fit, G does not divide C, or K is not the square of an odd number.
    """
    if not torch.jit.is_scripting():
        _check(x, weight)
        if runs_kernel("ska", x, weight):
            return _ska(x, weight)
        recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if recorded and not torch.compiler.is_compiling():
            return _Ska.apply(x, weight)
    return ska_formula(x, weight)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 4 or weight.ndim != 5:
        raise ValueError(
            f"x and weight must be (B, C, H, W) and (B, G, K, H, W), got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    if x.shape[1] % weight.shape[1] != 0:
        raise ValueError(f"weight must have sets that divide the channels, got {weight.shape[1]} for {x.shape[1]}.")
    side = math.isqrt(weight.shape[2])
    if side * side != weight.shape[2] or side % 2 == 0:
        raise ValueError(f"weight must have the taps of a square kernel of odd side, got {weight.shape[2]}.")


def ska_formula(x: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
    """Compute `ska` as shifted multiply-adds on views, which compilers make one kernel of.

    Neighbourhoods are not copied; TorchScript takes the function too.

    Args:
        x: (B, C, H, W).
        weight: (B, G, K, H, W).
        start: (B, C, H, W), overwritten with its sum with the result, and returned; None starts from zero.
    """
    height, width = x.shape[2], x.shape[3]
    side, sets = int(math.sqrt(weight.shape[2]) + 0.5), weight.shape[1]
    pad = side // 2
    padded = F.pad(x, (pad, pad, pad, pad)).unflatten(1, (-1, sets))  # (B, C / G, G, H + 2 pad, W + 2 pad)
    if start is None:
        out, first = padded[:, :, :, :height, :width] * weight[:, None, :, 0], 1
    else:
        out, first = start.unflatten(1, (-1, sets)), 0
    for tap in range(first, side * side):
        row, column = tap // side, tap % side
        shifted = padded[:, :, :, row : row + height, column : column + width]
        out.addcmul_(shifted, weight[:, None, :, tap])
    if start is not None:  # of one image `flatten` makes strides that PyTorch does not know as channels-last
        return start
    return out.flatten(1, 2)


def ska_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `ska` for x and weight; they can be differentiated again."""
    side, sets = math.isqrt(weight.shape[2]), weight.shape[1]
    height, width, pad = *x.shape[2:], side // 2
    padded = F.pad(x, (pad, pad, pad, pad))
    wide = torch.zeros_like(padded, dtype=torch.promote_types(x.dtype, torch.float32))
    shifts, slopes, grad_sets = (map_.unflatten(1, (-1, sets)) for map_ in (padded, wide, grad))
    grad_taps = []
    for tap in range(side * side):
        row, column = tap // side, tap % side
        at = (..., slice(row, row + height), slice(column, column + width))
        slopes[at].addcmul_(grad_sets, weight[:, None, :, tap])
        grad_taps.append((shifts[at] * grad_sets).sum(1))
    inner = wide[:, :, pad : pad + height, pad : pad + width]
    return inner.to(x.dtype), torch.stack(grad_taps, 2).to(weight.dtype)


class _Ska(torch.autograd.Function):
    """The formula with a backward pass that keeps `x` and `weight` only; it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return ska_formula(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return ska_backward(grad, *ctx.saved_tensors)


@torch.library.custom_op("zoo::ska", mutates_args=())
def _ska(x: Tensor, weight: Tensor) -> Tensor:
    check_shapes(weight=(weight, (x.shape[0], *weight.shape[1:3], *x.shape[2:])))
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    if runs_kernel("ska", x, weight):
        from zoo.kernels import triton_ska

        return triton_ska.forward(x, weight, out)
    return out.copy_(ska_formula(x, weight))


@_ska.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))


@torch.library.custom_op("zoo::ska_backward", mutates_args=())
def _ska_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    if runs_kernel("ska", grad, x, weight):
        from zoo.kernels import triton_ska

        return triton_ska.backward(grad, x, weight, grad_x, grad_weight)
    of_x, of_weight = ska_backward(grad, x, weight)
    return grad_x.copy_(of_x), grad_weight.copy_(of_weight)


@_ska_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _ska_backward(grad, *ctx.saved_tensors)


_ska.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula([torch.ops.zoo.ska, torch.ops.zoo.ska_backward])
def _flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return 0: torch's counter knows products and convolutions, and SKA is shifted multiply-adds."""
    return 0
