"""The operators of this package in plain PyTorch: what they compute where no kernel runs, and what kernels must equal.

Each function ending in `_backward` returns the gradients of the function before it, for operators whose backward pass
is an operator too.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.dft import separable, separable_kept

__all__ = [
    "ACTIVATIONS",
    "check_activation",
    "dwconv_gate",
    "dwconv_gate_backward",
    "dwconv_gate_by_parts",
    "filter_frequencies",
    "frequency_filter",
    "frequency_filter_backward",
    "gate_modulate",
    "gate_modulate_backward",
    "modulate",
    "modulate_backward",
    "narrow_ffn",
    "narrow_ffn_backward",
    "repa_ffn",
    "repa_ffn_backward",
    "routed_experts",
    "routed_experts_backward",
    "ska",
    "ska_backward",
]

_PART_BYTES = 2**20  # of the channels that are convolved and gated together

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


def check_activation(name: str) -> None:
    """Raise a ValueError that names the nearest unless there is such an activation."""
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, 1, 0)[0]
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}. Did you mean {near}?")


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


def ska(x: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
    """Compute `zoo.kernels.ska` as shifted multiply-adds on views, which compilers make one kernel of.

    Neighbourhoods are not copied; TorchScript takes the function too.

    Args:
        x: (B, C, H, W).
        weight: (B, G, K, H, W).
        start: (B, C, H, W), overwritten with its sum with the result; None starts from zero.
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


def dwconv_gate(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `zoo.kernels.dwconv_gate`; on a CPU by parts where the pixels of a channel are neighbours in memory."""
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


def repa_ffn(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute `zoo.kernels.repa_ffn`; the activated branch is added to the linear one inside of the product."""
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


def narrow_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """Compute `zoo.kernels.narrow_ffn`."""
    out = F.linear(ACTIVATIONS[activation](F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return out if residual is None else residual + out


def narrow_ffn_backward(
    grad: Tensor, x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `narrow_ffn` for x and the weights, in their order."""
    before = F.linear(x, fc1_weight, fc1_bias)
    grad_before = (grad @ fc2_weight) * _SLOPES[activation](before)
    grad_fc2 = grad.t() @ ACTIVATIONS[activation](before)
    return grad_before @ fc1_weight, grad_before.t() @ x, grad_before.sum(0), grad_fc2, grad.sum(0)


def frequency_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float) -> Tensor:
    """Compute `zoo.kernels.frequency_filter`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    row, column, _, row_back = separable(x.shape[2], x.shape[3], wide, x.device)
    w1, b1, w2, b2 = (value.to(wide) for value in (w1, b1, w2, b2))
    return filter_frequencies(x.to(wide), w1, b1, w2, b2, row, column, row_back, threshold).to(x.dtype)


def filter_frequencies(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    row: Tensor,
    column: Tensor,
    row_back: Tensor,
    threshold: float,
) -> Tensor:
    """Compute `frequency_filter` by real matrix products; all tensors have one type, the matrices are of `dft`."""
    batch, dim, height, width = x.shape
    groups, columns = w1.shape[1], width // 2 + 1
    rows = torch.matmul(x, row).view(batch, dim, 2 * height, columns)
    spectrum = torch.matmul(column, rows).view(batch, groups, 2 * dim // groups, height * columns)
    hidden = F.silu(torch.matmul(_joined(w1), spectrum) + _stacked(b1))
    mask = torch.matmul(_joined(w2), hidden) + _stacked(b2)
    if threshold > 0:
        mask = F.softshrink(mask, threshold)
    mask = mask.view(batch, dim, 2, height, columns)
    spectrum = spectrum.view(batch, dim, 2, height, columns)
    mask_re, mask_im, re, im = mask[:, :, 0] + 1, mask[:, :, 1], spectrum[:, :, 0], spectrum[:, :, 1]
    filtered = torch.stack((mask_re * re - mask_im * im, mask_re * im + mask_im * re), 2)
    rows = torch.matmul(column.t(), filtered.view(batch, dim, 2 * height, columns))
    return torch.matmul(rows.view(batch, dim, height, 2 * columns), row_back)


def frequency_filter_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `frequency_filter` for x, w1, b1, w2 and b2; the spectrum is computed again."""
    wide = torch.promote_types(x.dtype, torch.float32)
    (batch, dim, height, width), groups = x.shape, w1.shape[1]
    columns, size = width // 2 + 1, dim // groups
    row, column, _, row_back = separable_kept(height, width, wide, x.device)
    first, second = _joined(w1.to(wide)), _joined(w2.to(wide))

    def spectrum_of(map_: Tensor, matrix: Tensor) -> Tensor:
        rows = torch.matmul(map_.to(wide), matrix).view(batch, dim, 2 * height, columns)
        return torch.matmul(column, rows).view(batch, groups, 2 * size, height * columns)

    spectrum = spectrum_of(x, row)
    before = torch.matmul(first, spectrum) + _stacked(b1.to(wide))
    hidden = F.silu(before)
    mask = torch.matmul(second, hidden) + _stacked(b2.to(wide))
    if threshold > 0:
        mask = F.softshrink(mask, threshold)
    halves = (batch, groups, size, 2, height * columns)
    mask_re, mask_im = (mask.view(halves)[:, :, :, 0] + 1, mask.view(halves)[:, :, :, 1])
    re, im = spectrum.view(halves).unbind(3)
    out_re, out_im = spectrum_of(grad, row_back.t()).view(halves).unbind(3)
    grad_mask = torch.stack((re * out_re + im * out_im, re * out_im - im * out_re), 3).view(spectrum.shape)
    if threshold > 0:
        grad_mask = grad_mask * (mask != 0)
    grad_before = torch.ops.aten.silu_backward(torch.matmul(second.mT, grad_mask), before)
    direct = torch.stack((mask_re * out_re + mask_im * out_im, mask_re * out_im - mask_im * out_re), 3)
    grad_spectrum = direct.view(spectrum.shape) + torch.matmul(first.mT, grad_before)
    rows = torch.matmul(column.t(), grad_spectrum.view(batch, dim, 2 * height, columns))
    grad_x = torch.matmul(rows.view(batch, dim, height, 2 * columns), row.t())
    return (
        grad_x.to(x.dtype),
        _parted(torch.matmul(grad_before, spectrum.mT).sum(0)).to(w1.dtype),
        grad_before.sum((0, 3)).view(groups, size, 2).permute(2, 0, 1).to(b1.dtype),
        _parted(torch.matmul(grad_mask, hidden.mT).sum(0)).to(w2.dtype),
        grad_mask.sum((0, 3)).view(groups, size, 2).permute(2, 0, 1).to(b2.dtype),
    )


def _joined(weight: Tensor) -> Tensor:
    """Return complex weights (2, g, in, out) as real ones, (g, 2 * out, 2 * in), real and imaginary side by side."""
    weight = weight.transpose(2, 3)
    re, im = weight[0], weight[1]  # (g, out, in)
    joined = torch.stack((torch.stack((re, -im), -1), torch.stack((im, re), -1)), 2)
    return joined.reshape(re.shape[0], 2 * re.shape[1], -1)


def _parted(joined: Tensor) -> Tensor:
    """Return the gradient of what `_joined` was given, of the gradient of what it returned."""
    parts = joined.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # (g, out, 2, in, 2)
    re, im = parts[:, :, 0, :, 0] + parts[:, :, 1, :, 1], parts[:, :, 1, :, 0] - parts[:, :, 0, :, 1]
    return torch.stack((re, im)).transpose(2, 3)


def _stacked(bias: Tensor) -> Tensor:
    """Return complex biases (2, g, out) as real ones, (g, 2 * out, 1)."""
    return torch.stack((bias[0], bias[1]), -1).reshape(bias.shape[1], -1, 1)
