"""FFNetSR on images that pass by strips of rows through all blocks one after the other.

Each convolution keeps the two rows that it needs again, so that memory depends on the width and not on the height.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, cast

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from zoo.layers.conv_norm import merged_kernel
from zoo.streaming.strips import RowQueue, SlidingRows, depthwise_rows, linear_rows

__all__ = ["stream"]


class Block(Protocol):
    """A block of FFNetSR."""

    token_mixer: nn.Sequential
    channel_mixer: nn.Sequential


class Network(Protocol):
    """What the strips need of FFNetSR."""

    scale: int
    in_chans: int
    proj: nn.Conv2d
    body: nn.Sequential
    conv_bef_up: nn.Conv2d
    shuffle: nn.PixelShuffle


def _parts(mixer: nn.Sequential) -> tuple[nn.Module | None, list[tuple[Tensor, Tensor]]]:
    """Return a mixer's LayerNorm, if it has one, and kernel and bias of its convolutions; in evaluation mode."""
    layers = list(mixer)
    first = layers[0] if isinstance(layers[0], LayerNorm2d) else None
    convs = []
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d):
            convs.append(merged_kernel(layer, following))
    return first, convs


class _BlockRows:
    """One block of a network that an image passes through by strips of rows.

    Args:
        block: The block.
        height: Of the image.
    """

    def __init__(self, block: Block, height: int) -> None:
        self.token_norm, (self.proj, self.keys, self.values) = _parts(block.token_mixer)
        self.channel_norm, (self.depthwise, self.expand, self.reduce) = _parts(block.channel_mixer)
        self.slides = [SlidingRows(height) for _ in range(3)]
        self.queues = [RowQueue() for _ in range(2)]

    def push(self, x: Tensor | None) -> Tensor | None:
        """Take the next rows (n, W, C); return the next ones that are complete, three rows late, or None."""
        if x is None:
            return None
        self.queues[0].push(x)
        rows = self.slides[0].push(linear_rows(_norm(self.token_norm, x), *self.proj))
        if rows is None:
            return None
        rows = self.slides[1].push(F.gelu(depthwise_rows(rows, *self.keys)))
        if rows is None:
            return None
        rows = depthwise_rows(rows, *self.values)
        rows = rows.add_(self.queues[0].pop(rows.shape[0]))
        self.queues[1].push(rows)
        normed = self.slides[2].push(_norm(self.channel_norm, rows))
        if normed is None:
            return None
        hidden = F.gelu(linear_rows(depthwise_rows(normed, *self.depthwise), *self.expand))
        out = linear_rows(hidden, *self.reduce)
        return out.add_(self.queues[1].pop(out.shape[0]))


def _norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    layer = cast(nn.LayerNorm, norm)
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def stream(model: Network, x: Tensor, pixels: int, progress: Callable[[int, int], None] | None) -> Tensor:
    """Return the upscaled images.

    Args:
        model: In evaluation mode.
        x: (B, in_chans, H, W).
        pixels: About how many to compute at a time.
        progress: Called with (strips done, strips in all).
    """
    batch, _, height, width = x.shape
    out = x.new_empty(batch, model.in_chans, model.scale * height, model.scale * width)
    rows = max(1, pixels // width)
    count = batch * math.ceil(height / rows)
    for number, (image, result) in enumerate(zip(x, out, strict=True)):
        blocks = [_BlockRows(cast(Block, block), height) for block in model.body]
        first_rows, last_rows, images, done = SlidingRows(height), SlidingRows(height), RowQueue(), 0
        for index, first in enumerate(range(0, height, rows)):
            strip = image[:, first : first + rows].permute(1, 2, 0).to(model.proj.weight)
            images.push(strip)
            features = _convolve(model.proj, first_rows.push(strip))
            for block in blocks:
                features = block.push(features)
            if features is not None:
                features = _convolve(model.conv_bef_up, last_rows.push(features))
            if features is not None:
                end = done + features.shape[0]
                enlarged = images.pop(features.shape[0]).repeat_interleave(model.scale**2, dim=2)
                upscaled = model.shuffle((features + enlarged).permute(2, 0, 1))
                result[:, model.scale * done : model.scale * end] = upscaled.to(out.device, out.dtype)
                done = end
            if progress is not None:
                progress(number * (count // batch) + index + 1, count)
    return out


def _convolve(conv: nn.Conv2d, rows: Tensor | None) -> Tensor | None:
    """Convolve (n + 2, W, C) to (n, W, C'): zeros on the left and right only."""
    if rows is None:
        return None
    return F.conv2d(rows.permute(2, 0, 1)[None], conv.weight, conv.bias, padding=(0, 1))[0].permute(1, 2, 0)
