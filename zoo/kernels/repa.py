"""The merged RePa feed-forward layer, a linear branch plus a narrow activated one, as an operator.

RePaViT (ICML 2025), https://arxiv.org/abs/2505.21847.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.dispatch import autocast, runs_kernel

__all__ = ["repa_ffn", "repa_ffn_backward", "repa_ffn_formula"]

_WEIGHTS = ("fc1_weight", "fc1_bias", "fc2_weight", "weight", "bias")


def repa_ffn(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute x @ weight^T + bias + gelu(x @ fc1_weight^T + fc1_bias) @ fc2_weight^T.

    Under autocast the inputs are cast, as for any matrix product. Merged layers are for inference: the backward pass
    is the reference path, products of PyTorch.

    Args:
        x: Rows (M, C).
        fc1_weight: Into the K activated channels, (K, C).
        fc1_bias: (K,).
        fc2_weight: Out of them, (O, K).
        weight: Linear branch with the residual, (O, C).
        bias: (O,).

    Returns:
        (M, O).

    Raises:
        ValueError: The shapes or types do not fit.
    """
    if not torch.jit.is_scripting():
        return _dispatch(x, fc1_weight, fc1_bias, fc2_weight, weight, bias)
    return repa_ffn_formula(x, fc1_weight, fc1_bias, fc2_weight, weight, bias)


def _dispatch(x: Tensor, *weights: Tensor) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"x must be rows (M, C), got {tuple(x.shape)}.")
    inputs, active, outputs = x.shape[1], weights[0].shape[0], weights[3].shape[0]
    shapes = (active, inputs), (active,), (outputs, active), (outputs, inputs), (outputs,)
    tensors = autocast(x, *weights)
    dtype = tensors[0].dtype
    for name, tensor, shape in zip(_WEIGHTS, tensors[1:], shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}.")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} like x, got {tensor.dtype}.")
    return (_repa_ffn if runs_kernel("repa_ffn", *tensors) else repa_ffn_formula)(*tensors)


def repa_ffn_formula(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute `repa_ffn`; the activated branch is added to the linear one inside of the product."""
    out, hidden, last = F.linear(x, weight, bias), F.linear(x, fc1_weight, fc1_bias), fc2_weight.t()
    if torch.is_grad_enabled() or hidden.dtype != last.dtype:  # autocast casts for addmm, but not into `out`
        return torch.addmm(out, F.gelu(hidden), last)
    return torch.addmm(out, torch.ops.aten.gelu_(hidden), last, out=out)  # not addmm_: counters know addmm


def repa_ffn_backward(
    grad: Tensor, x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `repa_ffn` for its six inputs, in their order."""
    before = F.linear(x, fc1_weight, fc1_bias)
    grad_before = torch.ops.aten.gelu_backward(grad @ fc2_weight, before)
    grad_x = torch.addmm(grad @ weight, grad_before, fc1_weight)
    grad_fc1, grad_fc2 = grad_before.t() @ x, grad.t() @ F.gelu(before)
    return grad_x, grad_fc1, grad_before.sum(0), grad_fc2, grad.t() @ x, grad.sum(0)


@torch.library.custom_op("zoo::repa_ffn", mutates_args=())
def _repa_ffn(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    if runs_kernel("repa_ffn", x, fc1_weight, fc1_bias, fc2_weight, weight, bias):
        from zoo.kernels import triton_repa

        return triton_repa.forward(x, fc1_weight, fc1_bias, fc2_weight, weight, bias)
    return repa_ffn_formula(x, fc1_weight, fc1_bias, fc2_weight, weight, bias)


@_repa_ffn.register_fake
def _(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return repa_ffn_backward(grad, *ctx.saved_tensors)


_repa_ffn.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.zoo.repa_ffn)
def _flops(
    x: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, *shapes: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Return the FLOPs of the three matrix products."""
    (rows, inputs), (outputs, active) = x, fc2_weight
    return 2 * rows * (inputs * active + active * outputs + inputs * outputs)
