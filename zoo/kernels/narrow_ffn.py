"""A whole feed-forward layer of up to 256 channels as an operator whose hidden channels never leave the registers.

For models of CIFAR size: PixelDiT's CIFAR-10 weights, and vit_tiny with 192 channels. Wider layers are limited by
registers and caches, so PyTorch computes them. An experiment: no GPU was at hand to measure the kernel, and published
attempts at this fusion gained much up to 64 channels, something at 128 and nothing at 256 (tiny-cuda-nn, issue 38).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import reference
from zoo.kernels.dispatch import autocast, check_shapes, runs_kernel

__all__ = ["narrow_ffn"]

_WIDTH = 256  # channels of inputs and outputs that a program keeps


def narrow_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """Compute [residual +] act(x @ fc1_weight^T + fc1_bias) @ fc2_weight^T + fc2_bias.

    Under autocast the inputs are cast, as for any matrix product. The kernel is for inference: the backward pass is
    the reference path, products of PyTorch.

    Args:
        x: Rows (M, C); the kernel takes up to 256 channels.
        fc1_weight: (K, C).
        fc1_bias: (K,).
        fc2_weight: (O, K); the kernel takes up to 256 outputs.
        fc2_bias: (O,).
        residual: Added to the output, (M, O), or None.
        activation: "gelu" (of the error function), "gelu_tanh", "quick_gelu", "silu", "relu" or "sigmoid".

    Returns:
        (M, O).

    Raises:
        ValueError: The activation is unknown, or shapes or types do not fit.
    """
    reference.check_activation(activation)
    if x.ndim != 2:
        raise ValueError(f"x must be rows (M, C), got {tuple(x.shape)}.")
    (rows, inputs), hidden, outputs = x.shape, fc1_weight.shape[0], fc2_weight.shape[0]
    check_shapes(
        fc1_weight=(fc1_weight, (hidden, inputs)),
        fc1_bias=(fc1_bias, (hidden,)),
        fc2_weight=(fc2_weight, (outputs, hidden)),
        fc2_bias=(fc2_bias, (outputs,)),
    )
    if residual is not None:
        check_shapes(residual=(residual, (rows, outputs)))
        (residual,) = autocast(residual)
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = autocast(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    present = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    present |= {} if residual is None else {"residual": residual}
    for name, tensor in present.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, got {tensor.dtype}.")
    if runs_kernel("narrow_ffn", x, *present.values()) and inputs <= _WIDTH and outputs <= _WIDTH:
        return _narrow_ffn(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation)
    return reference.narrow_ffn(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation)


@torch.library.custom_op("zoo::narrow_ffn", mutates_args=())
def _narrow_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    inputs, outputs = x.shape[1], fc2_weight.shape[0]
    if runs_kernel("narrow_ffn", x, fc1_weight, fc2_weight) and inputs <= _WIDTH and outputs <= _WIDTH:
        from zoo.kernels import triton_narrow_ffn

        return triton_narrow_ffn.forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation)
    return reference.narrow_ffn(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation).contiguous()


@_narrow_ffn.register_fake
def _(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], fc2_weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.activation = inputs[6]
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, fc1_weight, fc1_bias, fc2_weight = ctx.saved_tensors
    grads = reference.narrow_ffn_backward(grad, x, fc1_weight, fc1_bias, fc2_weight, ctx.activation)
    return (*grads, grad if ctx.needs_input_grad[5] else None, None)


_narrow_ffn.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.zoo.narrow_ffn)
def _flops(
    x: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, *shapes: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Return the FLOPs of the two matrix products."""
    (rows, inputs), (outputs, hidden) = x, fc2_weight
    return 2 * rows * hidden * (inputs + outputs)
