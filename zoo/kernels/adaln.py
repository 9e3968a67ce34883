"""Adaptive layer norm of diffusion transformers (adaLN), with the gated residual before it, as operators.

Scalable Diffusion Models with Transformers (ICCV 2023), section 3.2, https://arxiv.org/abs/2212.09748.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.dispatch import check_shapes, runs_kernel

__all__ = [
    "gate_modulate",
    "gate_modulate_backward",
    "gate_modulate_formula",
    "modulate",
    "modulate_backward",
    "modulate_formula",
]


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise tokens without weights, scale and shift them: LayerNorm(x) * (1 + scale) + shift.

    Under autocast nothing is cast: the types of the inputs are promoted as in the formula.

    Args:
        x: Tokens (B, N, C).
        scale: Offset of the scale from 1, (B, C).
        shift: (B, C), of the type of `scale`.
        eps: Added to the variance.

    Returns:
        (B, N, C).

    Raises:
        ValueError: The shapes or types do not fit.
    """
    _check(x, scale=scale, shift=shift)
    if runs_kernel("modulate", x, scale, shift):
        return _modulate(x, scale, shift, eps)
    return modulate_formula(x, scale, shift, eps)


def gate_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and prepare the next branch: x + gate * y, and `modulate` of it.

    Under autocast nothing is cast: the types of the inputs are promoted as in the formula.

    Args:
        x: Residual stream (B, N, C).
        y: Output of a branch (B, N, C).
        gate: (B, C), of the type of `scale`.
        scale: Offset of the scale from 1, (B, C).
        shift: (B, C), of the type of `scale`.
        eps: Added to the variance.

    Returns:
        The new residual stream and the input of the next branch, both (B, N, C).

    Raises:
        ValueError: The shapes or types do not fit.
    """
    _check(x, gate=gate, scale=scale, shift=shift)
    if y.ndim != 3 or y.shape[-1] != x.shape[-1]:
        raise ValueError(f"y must be (B, N, {x.shape[-1]}) like x, got {tuple(y.shape)}.")
    if runs_kernel("gate_modulate", x, y, gate, scale, shift):
        return _gate_modulate(x, y, gate, scale, shift, eps)
    return gate_modulate_formula(x, y, gate, scale, shift, eps)


def _check(x: Tensor, **conditions: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (B, N, C), got {tuple(x.shape)}.")
    for name, value in conditions.items():
        if value.ndim != 2 or value.shape[-1] != x.shape[-1]:
            raise ValueError(f"{name} must be (B, {x.shape[-1]}), got {tuple(value.shape)}.")
        if value.dtype != conditions["scale"].dtype:
            raise ValueError(f"{name} must be {conditions['scale'].dtype} like scale, got {value.dtype}.")


def modulate_formula(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Compute `modulate`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def modulate_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `modulate` for x, scale and shift."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_wide, x_wide, gain = grad.to(wide), x.to(wide), 1 + scale.to(wide)[:, None]
    centred = x_wide - x_wide.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed, inner = centred * inverse_std, grad_wide * gain
    along = (inner * normed).mean(-1, keepdim=True)
    grad_x = inverse_std * (inner - inner.mean(-1, keepdim=True) - normed * along)
    return grad_x.to(x.dtype), (grad_wide * normed).sum(1).to(scale.dtype), grad_wide.sum(1).to(scale.dtype)


def gate_modulate_formula(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `gate_modulate`."""
    total = x + gate[:, None] * y
    return total, modulate_formula(total, scale, shift, eps)


def gate_modulate_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `gate_modulate` for x, y, gate, scale and shift; that for x in the type of the sum."""
    wide = torch.promote_types(total.dtype, torch.float32)
    through_norm, grad_scale, grad_shift = modulate_backward(grad, total.to(wide), scale, eps)
    grad_x = grad_total.to(wide) + through_norm
    grad_gate = (grad_x * y.to(wide)).sum(1).to(gate.dtype)
    grad_y = (grad_x * gate.to(wide)[:, None]).to(y.dtype)
    return grad_x.to(total.dtype), grad_y, grad_gate, grad_scale, grad_shift


@torch.library.custom_op("zoo::modulate", mutates_args=())
def _modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    per_sample = x.shape[0], x.shape[-1]
    check_shapes(scale=(scale, per_sample), shift=(shift, per_sample))
    if runs_kernel("modulate", x, scale, shift):
        from zoo.kernels import triton_adaln

        return triton_adaln.forward(x, scale, shift, eps)[1]
    return modulate_formula(x, scale, shift, eps).contiguous()


@_modulate.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))


@torch.library.custom_op("zoo::modulate_backward", mutates_args=())
def _modulate_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if runs_kernel("modulate", grad, x, scale):
        from zoo.kernels import triton_adaln

        grad_x, grad_scale, grad_shift = triton_adaln.backward(grad, x, scale, eps)
        return grad_x, grad_scale, grad_shift
    grad_x, grad_scale, grad_shift = modulate_backward(grad, x, scale, eps)
    return grad_x.contiguous(), grad_scale, grad_shift


@_modulate_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save_modulate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _differentiate_modulate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_modulate_backward(grad, *ctx.saved_tensors, ctx.eps), None)


_modulate.register_autograd(_differentiate_modulate, setup_context=_save_modulate)


@torch.library.custom_op("zoo::gate_modulate", mutates_args=())
def _gate_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    per_sample = x.shape[0], x.shape[-1]
    check_shapes(y=(y, tuple(x.shape)), gate=(gate, per_sample), scale=(scale, per_sample), shift=(shift, per_sample))
    if runs_kernel("gate_modulate", x, y, gate, scale, shift):
        from zoo.kernels import triton_adaln

        return triton_adaln.forward(x, scale, shift, eps, (y, gate))
    total, out = gate_modulate_formula(x, y, gate, scale, shift, eps)
    return total.contiguous(), out.contiguous()


@_gate_modulate.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), gate.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("zoo::gate_modulate_backward", mutates_args=())
def _gate_modulate_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if runs_kernel("gate_modulate", grad_total, grad, total, y, gate, scale):
        from zoo.kernels import triton_adaln

        branch = grad_total, y, gate
        grad_x, grad_scale, grad_shift, grad_gate, grad_y = triton_adaln.backward(grad, total, scale, eps, branch)
        return grad_x, grad_y, grad_gate, grad_scale, grad_shift
    grads = gate_modulate_backward(grad_total, grad, total, y, gate, scale, eps)
    grad_x, grad_y, grad_gate, grad_scale, grad_shift = grads
    return grad_x.contiguous(), grad_y.contiguous(), grad_gate, grad_scale, grad_shift


@_gate_modulate_backward.register_fake
def _(
    grad_total: Tensor, grad: Tensor, total: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_gate, grad_scale, grad_shift = (scale.new_empty(scale.shape) for _ in range(3))
    return total.new_empty(total.shape), y.new_empty(y.shape), grad_gate, grad_scale, grad_shift


def _save_gate_modulate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, gate, scale, _, ctx.eps = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output[0], y, gate, scale)


def _differentiate_gate_modulate(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, *grads = _gate_modulate_backward(grad_total, grad, *ctx.saved_tensors, ctx.eps)
    return (grad_x.to(ctx.x_dtype), *grads, None)


_gate_modulate.register_autograd(_differentiate_gate_modulate, setup_context=_save_gate_modulate)


@register_flop_formula(
    [
        torch.ops.zoo.modulate,
        torch.ops.zoo.modulate_backward,
        torch.ops.zoo.gate_modulate,
        torch.ops.zoo.gate_modulate_backward,
    ]
)
def _flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return 0: as everywhere in torch's counter, only products and convolutions count."""
    return 0
