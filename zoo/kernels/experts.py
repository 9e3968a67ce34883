"""The chosen experts of a mixture as an operator.

Tokens are indexed, not copied, an idea of ScatterMoE, https://arxiv.org/abs/2403.08245; the experts are those of
Dense2MoE (ICCV 2025), https://arxiv.org/abs/2510.09094.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import reference
from zoo.kernels.dispatch import autocast, check_shapes, runs_kernel

__all__ = ["routed_experts"]


def routed_experts(
    x: Tensor,
    gates: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    *,
    activation: str = "gelu",
    gated: bool = False,
) -> Tensor:
    """Sum the weighted outputs down[e] @ act(up[e] @ x + up_bias[e]) of each token's chosen experts e.

    Under autocast the inputs are cast, as for any matrix product. The backward pass is the reference path, which
    computes every expert for every token.

    Args:
        x: Tokens (T, D).
        gates: Weights of the chosen experts (T, k).
        index: Chosen experts (T, k), int64. Numbers from n on mean experts that add nothing here.
        up: (n, W, D); gated layers (n, 2 W, D), values before gates.
        up_bias: (n, W) or (n, 2 W), or None.
        down: (n, O, W).
        activation: "gelu", "gelu_tanh", "quick_gelu", "silu", "relu" or "sigmoid".
        gated: Hidden channels are values times activated gates.

    Returns:
        (T, O).

    Raises:
        ValueError: The activation is unknown, or shapes or types do not fit.
    """
    reference.check_activation(activation)
    if x.ndim != 2 or index.ndim != 2 or gates.ndim != 2 or down.ndim != 3:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, gates, index, down))
        raise ValueError(f"x, gates, index, down must be (T, D), (T, k), (T, k) and (n, O, W), got {shapes}.")
    experts, _, hidden = down.shape
    shape = (experts, (2 if gated else 1) * hidden, x.shape[1])
    check_shapes(up=(up, shape))
    if up_bias is not None:
        check_shapes(up_bias=(up_bias, shape[:2]))
    x, gates, up, down = autocast(x, gates, up, down)
    if up_bias is not None:
        (up_bias,) = autocast(up_bias)
    present = {"gates": gates, "up": up, "down": down} | ({} if up_bias is None else {"up_bias": up_bias})
    for name, tensor in present.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, got {tensor.dtype}.")
    if runs_kernel("routed_experts", x, *present.values()):
        return _routed_experts(x, gates, index, up, up_bias, down, activation, gated)
    return reference.routed_experts(x, gates, index, up, up_bias, down, activation, gated)


@torch.library.custom_op("zoo::routed_experts", mutates_args=())
def _routed_experts(
    x: Tensor,
    gates: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    chosen = (x.shape[0], index.shape[1])
    check_shapes(gates=(gates, chosen), index=(index, chosen))
    if runs_kernel("routed_experts", x, gates, up, down):
        from zoo.kernels import triton_experts

        return triton_experts.forward(x, gates, index, up, up_bias, down, activation, gated)
    return reference.routed_experts(x, gates, index, up, up_bias, down, activation, gated)


@_routed_experts.register_fake
def _(
    x: Tensor,
    gates: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.gated = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gates, index, up, up_bias, down = ctx.saved_tensors
    grad_x, grad_gates, grad_up, grad_bias, grad_down = reference.routed_experts_backward(
        grad, x, gates, index, up, up_bias, down, ctx.activation, ctx.gated
    )
    return grad_x, grad_gates, None, grad_up, grad_bias, grad_down, None, None


_routed_experts.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.zoo.routed_experts)
def _flops(
    x: Any, gates: Any, index: Any, up: Any, up_bias: Any, down: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Return the FLOPs of the products of all pairs, as if no pair chose an expert without weights."""
    return 2 * index[0] * index[1] * (up[1] * up[2] + down[1] * down[2])
