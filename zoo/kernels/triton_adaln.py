"""Triton kernels of `zoo.kernels.adaln`: a row of channels stays in registers, so every tensor is read once.

Statistics and sums are in float32. The backward pass computes the statistics again, since it reads the row anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import choose, rows_of

__all__ = ["backward", "forward"]


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    total_ptr,
    out_ptr,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    scale_batch,
    shift_batch,
    rows,
    tokens,
    channels,
    eps,
    gated: tl.constexpr,
    tile_rows: tl.constexpr,
    width: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows))[:, None]
    column = tl.arange(0, width)[None, :]
    valid = (row < rows) & (column < channels)
    sample, token = row // tokens, row % tokens
    x = tl.load(x_ptr + sample * x_batch + token * x_token + column, mask=valid, other=0.0).to(tl.float32)
    place = row * channels + column
    if gated:
        y = tl.load(y_ptr + sample * y_batch + token * y_token + column, mask=valid, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + sample * gate_batch + column, mask=valid, other=0.0).to(tl.float32)
        total = (x + gate * y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=valid)
        x = total.to(tl.float32)  # what the backward pass will see
    mean = tl.sum(x, axis=1, keep_dims=True) / channels
    centred = tl.where(valid, x - mean, 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / channels + eps)
    scale = tl.load(scale_ptr + sample * scale_batch + column, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_batch + column, mask=valid, other=0.0).to(tl.float32)
    out = centred * inverse_std * (1.0 + scale) + shift
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _backward_kernel(
    grad_total_ptr,
    grad_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    grad_x_ptr,
    grad_y_ptr,
    sums_ptr,
    grad_total_batch,
    grad_total_token,
    grad_batch,
    grad_token,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    scale_batch,
    parts,
    tokens,
    channels,
    eps,
    gated: tl.constexpr,
    part_tokens: tl.constexpr,
    width: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample, part = program // parts, program % parts
    column = tl.arange(0, width)
    inside = column < channels
    gain = 1.0 + tl.load(scale_ptr + sample * scale_batch + column, mask=inside, other=0.0).to(tl.float32)
    if gated:
        gate = tl.load(gate_ptr + sample * gate_batch + column, mask=inside, other=0.0).to(tl.float32)
    sum_scale = tl.zeros([width], dtype=tl.float32)
    sum_shift = tl.zeros([width], dtype=tl.float32)
    sum_gate = tl.zeros([width], dtype=tl.float32)
    for step in range(part_tokens):
        token = part * part_tokens + step
        valid = column < tl.where(token < tokens, channels, 0)
        grad = tl.load(grad_ptr + sample * grad_batch + token * grad_token + column, mask=valid, other=0.0)
        grad = grad.to(tl.float32)
        x = tl.load(x_ptr + sample * x_batch + token * x_token + column, mask=valid, other=0.0).to(tl.float32)
        centred = tl.where(valid, x - tl.sum(x, axis=0) / channels, 0.0)
        inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=0) / channels + eps)
        normed = centred * inverse_std
        inner = grad * gain
        along = tl.sum(inner * normed, axis=0) / channels
        grad_x = inverse_std * (inner - tl.sum(inner, axis=0) / channels - normed * along)
        sum_scale += grad * normed
        sum_shift += grad
        place = (sample * tokens + token) * channels + column
        if gated:
            source = grad_total_ptr + sample * grad_total_batch + token * grad_total_token + column
            grad_x += tl.load(source, mask=valid, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + sample * y_batch + token * y_token + column, mask=valid, other=0.0).to(tl.float32)
            sum_gate += tl.where(valid, grad_x * y, 0.0)
            tl.store(grad_y_ptr + place, (grad_x * gate).to(grad_y_ptr.dtype.element_ty), mask=valid)
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=valid)
    plane = tl.num_programs(0).to(tl.int64) * channels
    sums = sums_ptr + program * channels + column
    tl.store(sums, sum_scale, mask=inside)
    tl.store(sums + plane, sum_shift, mask=inside)
    if gated:
        tl.store(sums + 2 * plane, sum_gate, mask=inside)


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, branch: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        x: (B, N, C).
        scale: (B, C).
        shift: (B, C).
        eps: Added to the variance.
        branch: y (B, N, C) and gate (B, C) of `gate_modulate`; None for `modulate`, which adds nothing.

    Returns:
        The sum, or `x` itself where there is nothing to add, and the modulated tokens; (B, N, C), contiguous.
    """
    samples, tokens, channels = x.shape
    x, scale, shift, y, gate = (rows_of(tensor) for tensor in (x, scale, shift, *(branch or (x, scale))))
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), scale.dtype)
    out = x.new_empty(samples, tokens, channels, dtype=dtype)
    total = x if branch is None else torch.empty_like(out)
    if out.numel() == 0:
        return total, out
    width = triton.next_power_of_2(channels)
    tiles = choose(
        "modulate" if branch is None else "modulate gated",
        x,
        outputs=channels,
        inner=channels,
        rows=samples * tokens,
        default={"tile": 2048, "num_warps": _warps(max(2048, width))},  # shorter rows are taken several at a time
    )
    tile_rows = max(tiles["tile"] // width, 1)
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(samples * tokens, tile_rows),)](
            *(x, y, gate, scale, shift, total, out),
            *(*x.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0), shift.stride(0)),
            *(samples * tokens, tokens, channels, eps),
            gated=branch is not None,
            tile_rows=tile_rows,
            width=width,
            num_warps=tiles["num_warps"],
        )
    return total, out


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, branch: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Launch the backward kernel and add up what its programs have summed, in a fixed order.

    Args:
        grad: Gradient of the modulated tokens (B, N, C).
        x: What was normalised (B, N, C).
        scale: (B, C).
        eps: Added to the variance.
        branch: Gradient of the sum (B, N, C), y (B, N, C) and gate (B, C) of `gate_modulate`; None for `modulate`.

    Returns:
        The gradients for x, scale and shift; for `gate_modulate` also those for gate and y.
    """
    samples, tokens, channels = x.shape
    gated = branch is not None
    grad, x, scale, grad_total, y, gate = (rows_of(part) for part in (grad, x, scale, *(branch or (grad, x, scale))))
    grad_x = x.new_empty(samples, tokens, channels)
    grad_y = y.new_empty(samples, tokens, channels) if gated else grad_x
    width = triton.next_power_of_2(channels)
    tiles = choose(
        "modulate_backward gated" if gated else "modulate_backward",
        x,
        outputs=channels,
        inner=channels,
        rows=samples * tokens,
        default={"part_tokens": 16, "num_warps": _warps(width)},  # tokens that a program sums up before it writes
    )
    parts = triton.cdiv(tokens, tiles["part_tokens"])
    sums = x.new_empty(3 if gated else 2, samples, parts, channels, dtype=torch.float32)
    if grad_x.numel() > 0:
        with torch.cuda.device_of(x):
            _backward_kernel[(samples * parts,)](
                *(grad_total, grad, x, y, gate, scale, grad_x, grad_y, sums),
                *(*grad_total.stride()[:2], *grad.stride()[:2], *x.stride()[:2], *y.stride()[:2]),
                *(gate.stride(0), scale.stride(0), parts, tokens, channels, eps),
                gated=gated,
                part_tokens=tiles["part_tokens"],
                width=width,
                num_warps=tiles["num_warps"],
            )
    of_conditions = (part.sum(1).to(scale.dtype) for part in sums)
    return (grad_x, *of_conditions, grad_y) if gated else (grad_x, *of_conditions)


def _warps(numbers: int) -> int:
    return min(max(numbers // 256, 1), 16)
