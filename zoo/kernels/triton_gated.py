"""Triton kernels of `zoo.kernels.dwconv_gate`: both halves are convolved in registers and leave as their product.

A program takes pixels times channels; the nine shifted loads hit caches. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.dispatch import exceeds_int32
from zoo.kernels.launch import choose

__all__ = ["backward", "forward"]


@triton.jit
def _gate_kernel(
    x_ptr,
    weight_ptr,
    grad_ptr,
    out_ptr,
    x_sample,
    x_channel,
    x_row,
    x_column,
    grad_sample,
    grad_channel,
    grad_row,
    grad_column,
    out_sample,
    out_channel,
    out_row,
    out_column,
    pixels,
    hidden,
    height,
    width,
    differentiate: tl.constexpr,
    block_pixels: tl.constexpr,
    block_channels: tl.constexpr,
    wide: tl.constexpr,
):
    """Write gelu(a) * b of the convolved halves a and b; differentiated: the gradients of a and b."""
    program = tl.program_id(0)
    if wide:
        program = program.to(tl.int64)
    channel_blocks = tl.cdiv(hidden, block_channels)
    pixel = ((program // channel_blocks) * block_pixels + tl.arange(0, block_pixels))[:, None]
    channel = ((program % channel_blocks) * block_channels + tl.arange(0, block_channels))[None, :]
    column, rest = pixel % width, pixel // width
    row, sample = rest % height, rest // height
    exists = (pixel < pixels) & (channel < hidden)
    x_base = x_ptr + sample * x_sample + channel * x_channel
    weight_base = weight_ptr + channel * 9
    a = tl.zeros([block_pixels, block_channels], dtype=tl.float32)
    b = tl.zeros([block_pixels, block_channels], dtype=tl.float32)
    for tap in tl.static_range(9):
        y, z = row + tap // 3 - 1, column + tap % 3 - 1
        valid = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        source = x_base + y * x_row + z * x_column
        weight_a = tl.load(weight_base + tap, mask=channel < hidden, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_base + hidden * 9 + tap, mask=channel < hidden, other=0.0).to(tl.float32)
        a += weight_a * tl.load(source, mask=valid, other=0.0).to(tl.float32)
        b += weight_b * tl.load(source + hidden * x_channel, mask=valid, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    target = out_ptr + sample * out_sample + channel * out_channel + row * out_row + column * out_column
    if differentiate:
        source = grad_ptr + sample * grad_sample + channel * grad_channel + row * grad_row + column * grad_column
        grad = tl.load(source, mask=exists, other=0.0).to(tl.float32)
        slope = share + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
        tl.store(target, (grad * b * slope).to(out_ptr.dtype.element_ty), mask=exists)
        tl.store(target + hidden * out_channel, (grad * a * share).to(out_ptr.dtype.element_ty), mask=exists)
    else:
        tl.store(target, (a * share * b).to(out_ptr.dtype.element_ty), mask=exists)


def forward(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Launch the forward kernel.

    Args:
        x: Both halves (B, 2 H, height, width).
        weight: (2 H, 1, 3, 3).
        out: (B, H, height, width), overwritten.
    """
    return _launch(x, weight, out, out, differentiate=False)


def backward(grad: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Launch the kernel for the gradients of the convolved halves, which are computed again.

    Args:
        grad: Gradient of the output (B, H, height, width).
        x: Both halves (B, 2 H, height, width).
        weight: (2 H, 1, 3, 3).
        out: (B, 2 H, height, width), overwritten.
    """
    return _launch(x, weight, grad, out, differentiate=True)


def _launch(x: Tensor, weight: Tensor, grad: Tensor, out: Tensor, *, differentiate: bool) -> Tensor:
    batch, channels, height, width = x.shape
    hidden, pixels = channels // 2, batch * height * width
    if out.numel() > 0:
        last = x.stride(1) == 1  # channels are neighbours in memory
        tiles = choose(
            f"dwconv_gate{' channels last' if last else ''}{' backward' if differentiate else ''}",
            x,
            outputs=hidden,
            inner=9,
            rows=pixels,
            default={"tile": 1024, "block_channels": 64, "num_warps": 4},
        )
        block_channels = min(triton.next_power_of_2(hidden), tiles["block_channels"]) if last else 1
        block_pixels = tiles["tile"] // block_channels
        with torch.cuda.device_of(x):
            _gate_kernel[(triton.cdiv(pixels, block_pixels) * triton.cdiv(hidden, block_channels),)](
                *(x, weight.contiguous(), grad, out, *x.stride(), *grad.stride(), *out.stride()),
                *(pixels, hidden, height, width),
                differentiate=differentiate,
                block_pixels=block_pixels,
                block_channels=block_channels,
                wide=exceeds_int32(x, grad, out),
                num_warps=tiles["num_warps"],
            )
    return out
