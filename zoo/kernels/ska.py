"""Small kernel aggregation, a depthwise convolution whose kernels differ from pixel to pixel, as an operator.

LSNet: See Large, Focus Small (CVPR 2025), section 3.3, https://arxiv.org/abs/2503.23135.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import reference
from zoo.kernels.dispatch import check_shapes, runs_kernel

__all__ = ["ska"]


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
    return reference.ska(x, weight)


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


class _Ska(torch.autograd.Function):
    """The formula with a backward pass that keeps `x` and `weight` only; it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return reference.ska(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return reference.ska_backward(grad, *ctx.saved_tensors)


@torch.library.custom_op("zoo::ska", mutates_args=())
def _ska(x: Tensor, weight: Tensor) -> Tensor:
    check_shapes(weight=(weight, (x.shape[0], *weight.shape[1:3], *x.shape[2:])))
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    if runs_kernel("ska", x, weight):
        from zoo.kernels import triton_ska

        return triton_ska.forward(x, weight, out)
    return out.copy_(reference.ska(x, weight))


@_ska.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))


@torch.library.custom_op("zoo::ska_backward", mutates_args=())
def _ska_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    if runs_kernel("ska", grad, x, weight):
        from zoo.kernels import triton_ska

        return triton_ska.backward(grad, x, weight, grad_x, grad_weight)
    of_x, of_weight = reference.ska_backward(grad, x, weight)
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
