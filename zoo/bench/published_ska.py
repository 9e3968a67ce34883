"""LSNet's aggregation as its authors' Triton kernel divides the work, a rival of `zoo.kernels.ska` on GPUs.

One lane an output element, found by divisions; a kernel side known at run time only; 1024 elements a program, never
tuned. So each weight is read once for every channel that shares it. Written anew from the published design,
https://github.com/jameslahm/lsnet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["published_ska"]

_BLOCK = 1024


@triton.jit
def _flat_kernel(x_ptr, weight_ptr, out_ptr, total, channels, sets, height, width, side, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    exists = place < total
    column = place % width
    row = place // width % height
    channel = place // (width * height) % channels
    sample = place // (width * height * channels)
    pixels = height * width
    out = tl.zeros([block], dtype=tl.float32)
    for down in range(side):
        for right in range(side):
            y, z = row + down - side // 2, column + right - side // 2
            inside = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            x = tl.load(x_ptr + (sample * channels + channel) * pixels + y * width + z, mask=inside, other=0.0)
            taps = ((sample * sets + channel % sets) * side + down) * side + right
            weight = tl.load(weight_ptr + taps * pixels + row * width + column, mask=inside, other=0.0)
            out += x.to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=exists)


def published_ska(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `zoo.kernels.ska`, of fewer than 2^31 elements.

    Args:
        x: (B, C, H, W), contiguous.
        weight: (B, G, K, H, W), contiguous.

    Returns:
        (B, C, H, W).
    """
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _flat_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            *(x, weight, out, x.numel(), x.shape[1], weight.shape[1], *x.shape[2:], math.isqrt(weight.shape[2])),
            block=_BLOCK,
        )
    return out
