"""Triton kernels of `zoo.kernels.ska`: a program takes some kernels of pixels to all channels that share them.

So every weight is read once, instead of once a channel. Maps may have any strides: what counts as neighbours, pixels
or sets, follows the memory format of `x`. Sums are in float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.dispatch import exceeds_int32
from zoo.kernels.launch import choose

__all__ = ["backward", "forward"]


@triton.jit
def _places(total, sets, height, width, block: tl.constexpr, by_channel: tl.constexpr, wide: tl.constexpr):
    """Return sample, set, row and column of a block of places, and which of them exist."""
    program = tl.program_id(0)
    if wide:
        program = program.to(tl.int64)
    place = program * block + tl.arange(0, block)
    if by_channel:  # sets are neighbours in memory
        group, rest = place % sets, place // sets
        column, rest = rest % width, rest // width
        row, sample = rest % height, rest // height
    else:
        column, rest = place % width, place // width
        row, rest = rest % height, rest // height
        group, sample = rest % sets, rest // sets
    return sample, group, row, column, place < total


@triton.jit
def _aggregate_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_sample,
    x_channel,
    x_row,
    x_column,
    weight_sample,
    weight_set,
    weight_tap,
    weight_row,
    weight_column,
    out_sample,
    out_channel,
    out_row,
    out_column,
    total,
    sets,
    height,
    width,
    repeats,
    side: tl.constexpr,
    transposed: tl.constexpr,
    block: tl.constexpr,
    block_repeats: tl.constexpr,
    by_channel: tl.constexpr,
    wide: tl.constexpr,
):
    """Sum x at each tap times the weight of this pixel; transposed: times the weight of the pixel it is read at."""
    sample, group, row, column, exists = _places(total, sets, height, width, block, by_channel, wide)
    repeat = tl.arange(0, block_repeats)[:, None]
    channel = repeat * sets + group[None, :]
    x_base = x_ptr + (sample * x_sample)[None, :] + channel * x_channel
    weight_base = weight_ptr + sample * weight_sample + group * weight_set
    out = tl.zeros([block_repeats, block], dtype=tl.float32)
    for tap in tl.static_range(side * side):
        down = tap // side - side // 2
        right = tap % side - side // 2
        if transposed:
            down, right = -down, -right
        y, z = row + down, column + right
        inside = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        if transposed:
            source = weight_base + y * weight_row + z * weight_column
        else:
            source = weight_base + row * weight_row + column * weight_column
        weight = tl.load(source + tap * weight_tap, mask=inside, other=0.0).to(tl.float32)
        valid = inside[None, :] & (repeat < repeats)
        x = tl.load(x_base + (y * x_row + z * x_column)[None, :], mask=valid, other=0.0).to(tl.float32)
        out += weight[None, :] * x
    target = out_ptr + (sample * out_sample + row * out_row + column * out_column)[None, :] + channel * out_channel
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=exists[None, :] & (repeat < repeats))


@triton.jit
def _weight_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    grad_sample,
    grad_channel,
    grad_row,
    grad_column,
    x_sample,
    x_channel,
    x_row,
    x_column,
    out_sample,
    out_set,
    out_tap,
    out_row,
    out_column,
    total,
    sets,
    height,
    width,
    repeats,
    side: tl.constexpr,
    block: tl.constexpr,
    block_repeats: tl.constexpr,
    by_channel: tl.constexpr,
    wide: tl.constexpr,
):
    """Sum the gradient times x at each tap over the channels that share a kernel."""
    sample, group, row, column, exists = _places(total, sets, height, width, block, by_channel, wide)
    repeat = tl.arange(0, block_repeats)[:, None]
    channel = repeat * sets + group[None, :]
    present = exists[None, :] & (repeat < repeats)
    source = grad_ptr + (sample * grad_sample + row * grad_row + column * grad_column)[None, :] + channel * grad_channel
    grad = tl.load(source, mask=present, other=0.0).to(tl.float32)
    x_base = x_ptr + (sample * x_sample)[None, :] + channel * x_channel
    target = out_ptr + sample * out_sample + group * out_set + row * out_row + column * out_column
    for tap in tl.static_range(side * side):
        y, z = row + tap // side - side // 2, column + tap % side - side // 2
        valid = present & ((y >= 0) & (y < height) & (z >= 0) & (z < width))[None, :]
        x = tl.load(x_base + (y * x_row + z * x_column)[None, :], mask=valid, other=0.0).to(tl.float32)
        tl.store(target + tap * out_tap, tl.sum(grad * x, axis=0).to(out_ptr.dtype.element_ty), mask=exists)


def forward(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Launch the forward kernel.

    Args:
        x: (B, C, H, W).
        weight: (B, G, K, H, W).
        out: (B, C, H, W), overwritten.
    """
    return _aggregate(x, weight, out, transposed=False)


def backward(grad: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the two backward kernels; neither adds atomically.

    Args:
        grad: Gradient of the output (B, C, H, W).
        x: (B, C, H, W).
        weight: (B, G, K, H, W).
        grad_x: (B, C, H, W), overwritten.
        grad_weight: (B, G, K, H, W), overwritten.
    """
    _aggregate(grad, weight, grad_x, transposed=True)
    sets, taps = weight.shape[1:3]
    if grad.numel() > 0:
        grid, shape = _launch(x, weight, grad, grad_weight)
        with torch.cuda.device_of(x):
            _weight_kernel[grid](
                *(grad, x, grad_weight, *grad.stride(), *x.stride(), *grad_weight.stride()),
                *(grad.numel() // grad.shape[1] * sets, sets, *grad.shape[2:], grad.shape[1] // sets),
                side=math.isqrt(taps),
                **shape,
            )
    return grad_x, grad_weight


def _aggregate(x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool) -> Tensor:
    sets, taps = weight.shape[1:3]
    if out.numel() > 0:
        grid, shape = _launch(x, weight, out)
        with torch.cuda.device_of(x):
            _aggregate_kernel[grid](
                *(x, weight, out, *x.stride(), *weight.stride(), *out.stride()),
                *(x.numel() // x.shape[1] * sets, sets, *x.shape[2:], x.shape[1] // sets),
                side=math.isqrt(taps),
                transposed=transposed,
                **shape,
            )
    return out


def _launch(x: Tensor, weight: Tensor, *others: Tensor) -> tuple[tuple[int], dict[str, int | bool]]:
    """Return grid and constants of a launch over all places, pixels times sets."""
    batch, channels, height, width = x.shape
    sets = weight.shape[1]
    repeats = triton.next_power_of_2(channels // sets)
    last = x.stride(1) == 1  # channels are neighbours in memory
    tiles = choose(
        "ska channels last" if last else "ska",
        x,
        outputs=channels,
        inner=weight.shape[2],
        rows=batch * height * width,
        default={"tile": 1024, "num_warps": 4},  # a tile is channels of a set times places
    )
    block = max(tiles["tile"] // repeats, 16)
    shape: dict[str, int | bool] = {
        "block": block,
        "block_repeats": repeats,
        "by_channel": last,
        "wide": exceeds_int32(x, weight, *others),
        "num_warps": tiles["num_warps"],
    }
    return (triton.cdiv(batch * sets * height * width, block),), shape
