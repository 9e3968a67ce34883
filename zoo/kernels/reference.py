"""The operators of this package in plain PyTorch: what they compute where no kernel runs, and what kernels must equal.

Each function ending in `_backward` returns the gradients of the function before it, for operators whose backward pass
is an operator too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "dwconv_gate",
    "dwconv_gate_backward",
    "gate_modulate",
    "gate_modulate_backward",
    "modulate",
    "modulate_backward",
    "repa_ffn",
    "repa_ffn_backward",
    "routed_experts",
    "routed_experts_backward",
    "ska",
    "ska_backward",
]

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


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Compute `zoo.kernels.modulate`."""
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


def gate_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `zoo.kernels.gate_modulate`."""
    total = x + gate[:, None] * y
    return total, modulate(total, scale, shift, eps)


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


def ska(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `zoo.kernels.ska` as shifted multiply-adds, which compilers make one kernel of."""
    side, sets = math.isqrt(weight.shape[2]), weight.shape[1]
    shifts = _shifts(x, side, sets)
    out = next(shifts) * weight[:, None, :, 0]
    for tap, shifted in enumerate(shifts, start=1):
        out = torch.addcmul(out, shifted, weight[:, None, :, tap])
    return out.flatten(1, 2)


def ska_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `ska` for x and weight."""
    side, sets = math.isqrt(weight.shape[2]), weight.shape[1]
    height, width, pad = *x.shape[2:], side // 2
    grad_sets = grad.unflatten(1, (-1, sets))
    padded = F.pad(torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)), (pad, pad, pad, pad))
    grad_x = padded.unflatten(1, (-1, sets))
    grad_taps = []
    for tap, shifted in enumerate(_shifts(x, side, sets)):
        row, column = tap // side, tap % side
        grad_x[:, :, :, row : row + height, column : column + width] += grad_sets * weight[:, None, :, tap]
        grad_taps.append((grad_sets * shifted).sum(1))
    inner = padded[:, :, pad : pad + height, pad : pad + width]
    return inner.to(x.dtype), torch.stack(grad_taps, 2).to(weight.dtype)


def _shifts(x: Tensor, side: int, sets: int) -> Iterator[Tensor]:
    """Yield x at every tap of a kernel, (B, C / G, G, H, W)."""
    height, width, pad = *x.shape[2:], side // 2
    padded = F.pad(x, (pad, pad, pad, pad)).unflatten(1, (-1, sets))
    for row in range(side):
        for column in range(side):
            yield padded[:, :, :, row : row + height, column : column + width]


def dwconv_gate(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `zoo.kernels.dwconv_gate`."""
    a, b = F.conv2d(x, weight, padding=1, groups=x.shape[1]).chunk(2, 1)
    return F.gelu(a) * b


def dwconv_gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of `dwconv_gate` for the convolved halves, (B, 2 H, height, width)."""
    a, b = F.conv2d(x, weight, padding=1, groups=x.shape[1]).chunk(2, 1)
    return torch.cat([torch.ops.aten.gelu_backward(grad * b, a), grad * F.gelu(a)], 1)


def repa_ffn(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute `zoo.kernels.repa_ffn`."""
    return torch.addmm(F.linear(x, weight, bias), F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight.t())


def repa_ffn_backward(
    grad: Tensor, x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `repa_ffn` for its six inputs, in their order."""
    before = F.linear(x, fc1_weight, fc1_bias)
    grad_before = torch.ops.aten.gelu_backward(grad @ fc2_weight, before)
    grad_x = torch.addmm(grad @ weight, grad_before, fc1_weight)
    grad_fc1, grad_fc2 = grad_before.t() @ x, grad.t() @ F.gelu(before)
    return grad_x, grad_fc1, grad_before.sum(0), grad_fc2, grad.t() @ x, grad.sum(0)


def routed_experts(
    x: Tensor,
    gates: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """Compute `zoo.kernels.routed_experts`, every expert for every token: no shape depends on the data."""
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
