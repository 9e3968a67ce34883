"""Triton kernel of `zoo.kernels.frequency_filter`: maps are read and written once, spectra stay in registers.

A program takes an image and a group of channels. Blocks of columns of the spectrum come and go: transform along both
sides, mask, transform back, add to the result. Everything is a product of real matrices, in which real and imaginary
parts lie side by side; channels, height and width are filled up to powers of two by zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.dft import separable_kept
from zoo.kernels.dispatch import exceeds_int32
from zoo.kernels.launch import block, choose, precision

__all__ = ["forward"]

_ACCUMULATORS = 16384  # of a program: pixels times channels that it adds up; wider maps are written in parts


@triton.jit
def _layer(weight_ptr, bias_ptr, x, group, groups, size, channels: tl.constexpr, precision: tl.constexpr):
    """Return a complex layer of `x`, (2 * channels, frequencies), rows alternately real and imaginary."""
    row = tl.arange(0, 2 * channels)
    to, to_part = (row // 2)[:, None], (row % 2)[:, None]
    source, part = (row // 2)[None, :], (row % 2)[None, :]
    plane = groups * size
    place = (to_part ^ part) * plane * size + (group * size + source) * size + to
    weight = tl.load(weight_ptr + place, mask=(to < size) & (source < size), other=0.0).to(tl.float32)
    weight = tl.where((to_part == 0) & (part == 1), -weight, weight)
    bias = tl.load(bias_ptr + (row % 2) * plane + group * size + row // 2, mask=row // 2 < size, other=0.0)
    return tl.dot(weight, x, input_precision=precision) + bias.to(tl.float32)[:, None]


@triton.jit
def _filter_kernel(
    x_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    row_ptr,
    column_ptr,
    row_back_ptr,
    out_ptr,
    x_sample,
    x_channel,
    x_row,
    x_column,
    out_sample,
    out_channel,
    out_row,
    out_column,
    groups,
    size,
    height,
    width,
    threshold,
    channels: tl.constexpr,
    block_height: tl.constexpr,
    part_width: tl.constexpr,
    block_columns: tl.constexpr,
    shrink: tl.constexpr,
    wide: tl.constexpr,
    precision: tl.constexpr,
):
    program = tl.program_id(0)
    line = tl.arange(0, channels * block_height)
    pixel = tl.arange(0, 16)
    target = tl.program_id(1) * part_width + tl.arange(0, part_width)
    if wide:
        program, line = program.to(tl.int64), line.to(tl.int64)
        pixel, target = pixel.to(tl.int64), target.to(tl.int64)
    sample, group = program // groups, program % groups
    columns = width // 2 + 1
    frequencies: tl.constexpr = block_columns * block_height

    channel, y = (line // block_height)[:, None], (line % block_height)[:, None]
    line_exists = (channel < size) & (y < height)
    lines = x_ptr + sample * x_sample + (group * size + channel) * x_channel + y * x_row

    # The transform along the height: rows (part, frequency), columns (pixel, part).
    double = tl.arange(0, 2 * block_height)
    to_part, frequency = (double // block_height)[:, None], (double % block_height)[:, None]
    valid = (frequency < height) & (double // 2 < height)[None, :]
    place = (to_part * height + frequency) * 2 * height + double[None, :]
    column = tl.load(column_ptr + place, mask=valid, other=0.0)

    out = tl.zeros([channels * block_height, part_width], dtype=tl.float32)
    half = tl.arange(0, 2 * block_columns)
    half_part, half_column = half // block_columns, half % block_columns
    for start in range(0, columns, block_columns):
        at, exists = half_part * columns + start + half_column, start + half_column < columns
        z = tl.zeros([channels * block_height, 2 * block_columns], dtype=tl.float32)  # (channel, y), (part, column)
        for left in range(0, width, 16):  # shared memory does not hold the whole map
            read = line_exists & (left + pixel < width)[None, :]
            x = tl.load(lines + (left + pixel)[None, :] * x_column, mask=read, other=0.0).to(tl.float32)
            forth = tl.load(
                row_ptr + (left + pixel)[:, None] * 2 * columns + at[None, :],
                mask=(left + pixel < width)[:, None] & exists[None, :],
                other=0.0,
            )
            z = tl.dot(x, forth, z, input_precision=precision)
        z = tl.permute(tl.reshape(z, (channels, block_height, 2, block_columns)), (0, 3, 1, 2))
        z = tl.reshape(z, (channels * block_columns, 2 * block_height))  # (channel, column), (y, part)
        z = tl.dot(z, tl.trans(column), input_precision=precision)  # (channel, column), (part, frequency)
        z = tl.permute(tl.reshape(z, (channels, block_columns, 2, block_height)), (0, 2, 1, 3))
        spectrum = tl.reshape(z, (2 * channels, frequencies))
        hidden = _layer(w1_ptr, b1_ptr, spectrum, group, groups, size, channels, precision)
        hidden = hidden * tl.sigmoid(hidden)
        mask = _layer(w2_ptr, b2_ptr, hidden, group, groups, size, channels, precision)
        if shrink:
            mask = tl.where(mask > threshold, mask - threshold, tl.where(mask < -threshold, mask + threshold, 0.0))
        re, im = tl.split(tl.permute(tl.reshape(spectrum, (channels, 2, frequencies)), (0, 2, 1)))
        mask_re, mask_im = tl.split(tl.permute(tl.reshape(mask, (channels, 2, frequencies)), (0, 2, 1)))
        z = tl.join(mask_re * re - mask_im * im, mask_re * im + mask_im * re)
        z = tl.permute(tl.reshape(z, (channels, block_columns, block_height, 2)), (0, 1, 3, 2))
        z = tl.reshape(z, (channels * block_columns, 2 * block_height))  # (channel, column), (part, frequency)
        z = tl.dot(z, column, input_precision=precision)  # (channel, column), (y, part)
        z = tl.permute(tl.reshape(z, (channels, block_columns, block_height, 2)), (0, 2, 3, 1))
        z = tl.reshape(z, (channels * block_height, 2 * block_columns))  # (channel, y), (part, column)
        back = tl.load(
            row_back_ptr + at[:, None] * width + target[None, :],
            mask=exists[:, None] & (target < width)[None, :],
            other=0.0,
        )
        out = tl.dot(z, back, out, input_precision=precision)

    # The map itself is added here, not in the mask, where products would round it.
    stored = line_exists & (target < width)[None, :]
    out += tl.load(lines + target[None, :] * x_column, mask=stored, other=0.0).to(tl.float32)
    goals = out_ptr + sample * out_sample + (group * size + channel) * out_channel + y * out_row
    tl.store(goals + target[None, :] * out_column, out.to(out_ptr.dtype.element_ty), mask=stored)


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, threshold: float, out: Tensor) -> Tensor:
    """Launch the kernel.

    Args:
        x: (B, C, H, W), H and W at most 64.
        w1: (2, g, C / g, C / g).
        b1: (2, g, C / g).
        w2: (2, g, C / g, C / g).
        b2: (2, g, C / g).
        threshold: Of the soft shrink.
        out: (B, C, H, W), overwritten.
    """
    (batch, dim, height, width), (groups, size) = x.shape, w1.shape[1:3]
    if out.numel() == 0:
        return out
    row, column, _, row_back = separable_kept(height, width, torch.float32, x.device)
    w1, b1, w2, b2 = (value.contiguous() for value in (w1, b1, w2, b2))
    channels = max(triton.next_power_of_2(size), 8)
    block_height = max(triton.next_power_of_2(height), 8)
    part_width = min(block(width, 64), max(_ACCUMULATORS // (channels * block_height), 16))
    tiles = choose(
        f"frequency_filter {height}x{width}",
        x,
        outputs=dim,
        inner=size,
        rows=batch * height * width,
        default={"block_columns": 8, "num_warps": 8},
    )
    with torch.cuda.device_of(x):
        _filter_kernel[(batch * groups, triton.cdiv(width, part_width))](
            *(x, w1, b1, w2, b2, row, column, row_back.contiguous(), out, *x.stride(), *out.stride()),
            *(groups, size, height, width, threshold),
            channels=channels,
            block_height=block_height,
            part_width=part_width,
            block_columns=tiles["block_columns"],
            shrink=threshold > 0,
            wide=exceeds_int32(x, out),
            precision="tf32x3" if precision(x) == "ieee" else "tf32",
            num_warps=tiles["num_warps"],
            num_stages=1,  # what later steps would need is in caches, and shared memory is full
        )
    return out
