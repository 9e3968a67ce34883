"""Depthwise convolution of two halves that gate each other, the middle of Restormer's GDFN, as an operator.

Restormer (CVPR 2022), section 3.2, https://arxiv.org/abs/2111.09881.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.dispatch import autocast, check_shapes, runs_kernel

__all__ = ["dwconv_gate", "dwconv_gate_backward", "dwconv_gate_by_parts", "dwconv_gate_formula"]


_PART_BYTES = 2**20  # of the channels that are convolved and gated together


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
    return dwconv_gate_formula(x, weight)


def _empty(x: Tensor, channels: int) -> Tensor:
    """Return a map of another number of channels in the memory format of `x`."""
    neighbours = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=neighbours)


def dwconv_gate_formula(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `dwconv_gate`; on a CPU by parts where the pixels of a channel are neighbours in memory."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if x.device.type == "cpu" and x.is_contiguous() and not recorded:
        return dwconv_gate_by_parts(x, weight, (1, 1))
    a, b = F.conv2d(x, weight, padding=1, groups=x.shape[1]).chunk(2, 1)
    return F.gelu(a) * b


def dwconv_gate_by_parts(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """Convolve and gate a few channels at a time, so that they stay in the cache; without gradients.

    Args:
        x: (B, 2 H, height, width), contiguous.
        weight: (2 H, 1, 3, 3).
        padding: Rows and columns of zeros on each side.
    """
    batch, hidden = x.shape[0], x.shape[1] // 2
    out = x.new_empty(batch, hidden, x.shape[2] + 2 * padding[0] - 2, x.shape[3] + 2 * padding[1] - 2)
    numbers = _PART_BYTES // x.element_size()
    channels = max(numbers // max(batch * out.shape[2] * out.shape[3], 1) // 16, 1) * 16
    for first in range(0, hidden, channels):
        last = min(first + channels, hidden)
        a, b = slice(first, last), slice(hidden + first, hidden + last)
        gate = F.gelu(F.conv2d(x[:, a], weight[a], padding=padding, groups=last - first))
        torch.mul(gate, F.conv2d(x[:, b], weight[b], padding=padding, groups=last - first), out=out[:, first:last])
    return out


def dwconv_gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of `dwconv_gate` for the convolved halves, (B, 2 H, height, width)."""
    a, b = F.conv2d(x, weight, padding=1, groups=x.shape[1]).chunk(2, 1)
    return torch.cat([torch.ops.aten.gelu_backward(grad * b, a), grad * F.gelu(a)], 1)


@torch.library.custom_op("zoo::dwconv_gate", mutates_args=())
def _dwconv_gate(x: Tensor, weight: Tensor) -> Tensor:
    out = _empty(x, x.shape[1] // 2)
    if runs_kernel("dwconv_gate", x, weight):
        from zoo.kernels import triton_gated

        return triton_gated.forward(x, weight, out)
    return out.copy_(dwconv_gate_formula(x, weight))


@_dwconv_gate.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _empty(x, x.shape[1] // 2)


@torch.library.custom_op("zoo::dwconv_gate_backward", mutates_args=())
def _dwconv_gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    out = _empty(x, x.shape[1])
    if runs_kernel("dwconv_gate", grad, x, weight):
        from zoo.kernels import triton_gated

        return triton_gated.backward(grad, x, weight, out)
    return out.copy_(dwconv_gate_backward(grad, x, weight))


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
