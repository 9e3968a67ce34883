"""The chosen experts of a mixture as an operator.

Tokens are indexed, not copied, an idea of ScatterMoE, https://arxiv.org/abs/2403.08245; the experts are those of
Dense2MoE (ICCV 2025), https://arxiv.org/abs/2510.09094.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.dispatch import autocast, check_shapes, runs_kernel

__all__ = ["ACTIVATIONS", "check_activation", "routed_experts", "routed_experts_backward", "routed_experts_formula"]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}
"""Name -> activation of the hidden channels of an expert."""

_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: torch.ops.aten.gelu_backward(torch.ones_like(x), x),
    "gelu_tanh": lambda x: torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh"),
    "quick_gelu": lambda x: torch.sigmoid(1.702 * x) * (1 + 1.702 * x * torch.sigmoid(-1.702 * x)),
    "silu": lambda x: torch.ops.aten.silu_backward(torch.ones_like(x), x),
    "relu": lambda x: (x > 0).to(x.dtype),
    "sigmoid": lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
}
"""Name -> derivative of the activation."""


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
    check_activation(activation)
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
    return routed_experts_formula(x, gates, index, up, up_bias, down, activation, gated)


def check_activation(name: str) -> None:
    """Raise a ValueError that names the nearest unless there is such an activation."""
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, 1, 0)[0]
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}. Did you mean {near}?")


def routed_experts_formula(
    x: Tensor,
    gates: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """Compute `routed_experts`, every expert for every token: no shape depends on the data."""
    out = x.new_zeros(x.shape[0], down.shape[1])
    for number in range(len(up)):
        before = F.linear(x, up[number], None if up_bias is None else up_bias[number])
        weight = (gates * (index == number)).sum(1, keepdim=True)
        out = out + F.linear(_activate(before, activation, gated) * weight, down[number])
    return out


def routed_experts_backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of `routed_experts` for x, gates, up, up_bias and down."""
    grad_x, grad_gates = torch.zeros_like(x), torch.zeros_like(gates)
    grad_up, grad_bias, grad_down = [up[:0]], [] if up_bias is None else [up_bias[:0]], [down[:0]]
    for number in range(len(up)):
        chosen = index == number
        before = F.linear(x, up[number], None if up_bias is None else up_bias[number])
        hidden = _activate(before, activation, gated)
        from_output = grad @ down[number]
        grad_gates = grad_gates + chosen * (hidden * from_output).sum(1, keepdim=True)
        weight = (gates * chosen).sum(1, keepdim=True)
        grad_hidden = from_output * weight
        if gated:
            value, gate = before.chunk(2, -1)
            of_gate = grad_hidden * value * _SLOPES[activation](gate)
            grad_before = torch.cat([grad_hidden * ACTIVATIONS[activation](gate), of_gate], -1)
        else:
            grad_before = grad_hidden * _SLOPES[activation](before)
        grad_x = grad_x + grad_before @ up[number]
        grad_up.append((grad_before.t() @ x)[None])
        grad_down.append((grad.t() @ (hidden * weight))[None])
        if up_bias is not None:
            grad_bias.append(grad_before.sum(0, keepdim=True))
    return (
        *(grad_x, grad_gates, torch.cat(grad_up)),
        *(torch.cat(grad_bias) if grad_bias else None, torch.cat(grad_down)),
    )


def _activate(before: Tensor, activation: str, gated: bool) -> Tensor:
    if not gated:
        return ACTIVATIONS[activation](before)
    value, gate = before.chunk(2, -1)
    return value * ACTIVATIONS[activation](gate)


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
    return routed_experts_formula(x, gates, index, up, up_bias, down, activation, gated)


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
    grad_x, grad_gates, grad_up, grad_bias, grad_down = routed_experts_backward(
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
