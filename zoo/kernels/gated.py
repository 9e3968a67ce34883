"""Depthwise convolution of two halves that gate each other, the middle of Restormer's GDFN, as an operator.

Restormer (CVPR 2022), section 3.2, https://arxiv.org/abs/2111.09881.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import reference
from zoo.kernels.dispatch import autocast, check_shapes, runs_kernel

__all__ = ["dwconv_gate"]


def dwconv_gate(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each channel with a 3x3 kernel, zeros outside, and return gelu(first half) * second half.

    Under autocast the inputs are cast, as for any convolution. The backward pass computes the convolution again; the
    gradients of its inputs come from PyTorch's own depthwise convolution.

    Args:
        x: (B, 2 H, height, width); fastest in channels-last memory format, which the output keeps.
        weight: (2 H, 1, 3, 3), of the type of `x`.

    Returns:
        (B, H, height, width).

    Raises:
        ValueError: The shapes or types do not fit.
    """
    if x.ndim != 4 or x.shape[1] % 2 != 0:
        raise ValueError(f"x must be (B, 2 H, height, width), got {tuple(x.shape)}.")
    check_shapes(weight=(weight, (x.shape[1], 1, 3, 3)))
    x, weight = autocast(x, weight)
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} like x, got {weight.dtype}.")
    if runs_kernel("dwconv_gate", x, weight):
        return _dwconv_gate(x, weight)
    return reference.dwconv_gate(x, weight)


def _empty(x: Tensor, channels: int) -> Tensor:
    """Return a map of another number of channels in the memory format of `x`."""
    neighbours = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=neighbours)


@torch.library.custom_op("zoo::dwconv_gate", mutates_args=())
def _dwconv_gate(x: Tensor, weight: Tensor) -> Tensor:
    out = _empty(x, x.shape[1] // 2)
    if runs_kernel("dwconv_gate", x, weight):
        from zoo.kernels import triton_gated

        return triton_gated.forward(x, weight, out)
    return out.copy_(reference.dwconv_gate(x, weight))


@_dwconv_gate.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _empty(x, x.shape[1] // 2)


@torch.library.custom_op("zoo::dwconv_gate_backward", mutates_args=())
def _dwconv_gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    out = _empty(x, x.shape[1])
    if runs_kernel("dwconv_gate", grad, x, weight):
        from zoo.kernels import triton_gated

        return triton_gated.backward(grad, x, weight, out)
    return out.copy_(reference.dwconv_gate_backward(grad, x, weight))


@_dwconv_gate_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _empty(x, x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    convolved = _dwconv_gate_backward(grad, x, weight)
    ones, mask = [1, 1], [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        convolved, x, weight, None, ones, ones, ones, False, [0, 0], x.shape[1], mask
    )
    return grad_x, grad_weight


_dwconv_gate.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.zoo.dwconv_gate)
def _flops(x: Any, weight: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of the convolution."""
    return 2 * 9 * x[0] * x[1] * x[2] * x[3]


@register_flop_formula(torch.ops.zoo.dwconv_gate_backward)
def _backward_flops(grad: Any, x: Any, weight: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of the convolution, which is computed again."""
    return 2 * 9 * x[0] * x[1] * x[2] * x[3]
