"""Restormer on one image strip by strip: each block updates its map in place, and holds little beside it.

The model says which way an image takes (`Restormer.route`); here is what each step of it does with a map that is read
and written by strips, (channels, rows, width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.gated import dwconv_gate_by_parts
from zoo.layers.gated_ffn import GatedFFN
from zoo.layers.pixel_norm import PixelNorm
from zoo.layers.transposed_attention import Gram, TransposedAttention, gram
from zoo.streaming.maps import FeatureMap, Workspace
from zoo.streaming.strips import RowWindow, add_product, depthwise_strip, linear_strip, strips

__all__ = [
    "MULTIPLE",
    "MapSizes",
    "StripRun",
    "aligned",
    "normed_strip",
    "padding_mode",
    "strip_rows",
    "update_block",
]

MULTIPLE = 8  # of height and width inside the network

Tell = Callable[[int], object]
"""Told how many rows of a map are done."""


class Block(Protocol):
    """A Transformer block of Restormer."""

    norm1: PixelNorm
    attn: TransposedAttention
    norm2: PixelNorm
    ffn: GatedFFN


def aligned(side: int) -> int:
    """Return a side of the image inside the network."""
    return -(-side // MULTIPLE) * MULTIPLE


def padding_mode(side: int, pad: int) -> str:
    """Mirroring needs more pixels than it makes."""
    return "reflect" if pad < side else "replicate"


def strip_rows(width: int, channels: int, itemsize: int, strip_bytes: int) -> int:
    """Return how many rows of a map make a strip."""
    return max(strip_bytes // (width * channels * itemsize), 1)


class MapSizes:
    """The way of an image through the network without numbers: notes the map, (height, width, channels), of each level.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        dim: Channels of the first level.
    """

    def __init__(self, height: int, width: int, dim: int) -> None:
        self.first = aligned(height), aligned(width), dim
        self.levels: list[tuple[list[Block], tuple[int, int, int]]] = []

    def embed(self, conv: nn.Conv2d) -> tuple[int, int, int]:
        return self.first

    def level(self, blocks: nn.Sequential, x: tuple[int, int, int]) -> tuple[int, int, int]:
        self.levels.append((cast(list[Block], list(blocks)), x))
        return x

    def down(self, conv: nn.Conv2d, x: tuple[int, int, int]) -> tuple[int, int, int]:
        return x[0] // 2, x[1] // 2, 2 * x[2]

    def up(
        self, conv: nn.Conv2d, x: tuple[int, int, int], skip: tuple[int, int, int], reduce: nn.Linear | None
    ) -> tuple[int, int, int]:
        return 2 * x[0], 2 * x[1], x[2] if reduce is None else x[2] // 2

    def finish(self, conv: nn.Conv2d, x: tuple[int, int, int], skip: nn.Linear | None) -> None:
        pass

    def cost(self, size: tuple[int, int, int]) -> int:
        """Return the work on one row of a map, where one of the first level's costs 1."""
        return size[1] * size[2] ** 2 // (self.first[1] * self.first[2] ** 2)

    @property
    def work(self) -> int:
        """How much `StripRun` tells in all: every block reads its map twice."""
        return sum(2 * len(blocks) * size[0] * self.cost(size) for blocks, size in self.levels)

    def strip_numbers(self, itemsize: int, strip_bytes: int) -> int:
        """Return how many numbers the work on one strip holds beside the maps, at the level that takes most.

        Args:
            itemsize: Bytes of a number.
            strip_bytes: As in `StripRun`.
        """
        most = 0
        for blocks, (_, width, _) in self.levels:
            for block in blocks:
                dim, hidden = block.attn.dim, block.ffn.hidden_dim
                rows = strip_rows(width, 2 * hidden, itemsize, strip_bytes)
                most = max(most, width * ((rows + 2) * (2 * hidden + 5 * dim) + rows * (2 * hidden + 2 * dim)))
        return most


class StripRun:
    """The way of one image through the network by strips, in maps that the blocks update in place.

    Args:
        image: (in_chans, H, W).
        restored: Receives the result, (out_chans, H, W).
        dim: Channels of the first level.
        workspace: Makes the maps.
        strip_bytes: Size of the widest map of a strip, as far as one row is not larger.
        keep_values: Store the values of an attention for its second pass over the map.
        tell: Told how much work is done, see `MapSizes.work`.
    """

    def __init__(
        self,
        image: Tensor,
        restored: Tensor,
        dim: int,
        workspace: Workspace,
        strip_bytes: int,
        *,
        keep_values: bool = False,
        tell: Tell = lambda units: None,
    ) -> None:
        self.image, self.restored, self.dim, self.workspace = image, restored, dim, workspace
        self.strip_bytes, self.keep_values, self.tell = strip_bytes, keep_values, tell
        self.sizes = MapSizes(image.shape[1], image.shape[2], dim)
        self._first: nn.Conv2d | None = None

    def embed(self, conv: nn.Conv2d) -> FeatureMap:
        """Return the first convolution's map, of the image continued to multiples of 8."""
        self._first = conv
        target = self._new(*self.sizes.first)
        self._fill(target, self._embedded())
        return target

    def level(self, blocks: nn.Sequential, x: FeatureMap) -> FeatureMap:
        """Run blocks in place."""
        values, cost = self._new(*x.shape) if self.keep_values else None, self.sizes.cost(x.shape)
        for block in cast(list[Block], list(blocks)):
            rows = self._rows(x.shape[1], 2 * block.ffn.hidden_dim)
            update_block(block, x, values, rows, lambda done: self.tell(done * cost))
        if values is not None:
            values.release()
        return x

    def _new(self, height: int, width: int, channels: int) -> FeatureMap:
        return self.workspace.new(height, width, channels, channels_first=True)

    def _rows(self, width: int, channels: int) -> int:
        return strip_rows(width, channels, self.workspace.dtype.itemsize, self.strip_bytes)

    def _fill(self, target: FeatureMap, parts: Iterator[Tensor]) -> None:
        done = 0
        for strip in parts:
            target.write(done, strip)
            done += strip.shape[1]

    def _strips(self, x: FeatureMap, rows: int) -> Iterator[Tensor]:
        return (x.read(first, end) for first, end in strips(x.shape[0], rows))

    def _convolved(
        self, conv: nn.Conv2d, parts: Iterator[Tensor], height: int, width: int, rows: int
    ) -> Iterator[Tensor]:
        """Yield strips of a 3x3 convolution, one row behind the given ones."""
        window = RowWindow(conv.in_channels, height, rows, width, self.workspace.device, self.workspace.dtype)
        for strip in parts:
            window.open(strip.shape[1]).copy_(strip)
            if window.fresh:
                yield F.conv2d(window.seen.unsqueeze(0), conv.weight, padding=(0, 1))[0]
            window.advance()

    def _embedded(self) -> Iterator[Tensor]:
        """Yield strips of the first convolution."""
        height, width = self.image.shape[1:]
        below, right = -height % MULTIPLE, -width % MULTIPLE
        last = range(height - 2, height - 2 - below, -1) if below < height else [height - 1] * below
        order = torch.tensor([*range(height), *last], device=self.image.device)
        rows = self._rows(width + right, 2 * self.dim)

        def parts() -> Iterator[Tensor]:
            for first, end in strips(height + below, rows):
                strip = self.image.index_select(1, order[first:end]) if end > height else self.image[:, first:end]
                strip = strip.to(self.workspace.device, self.workspace.dtype)
                yield F.pad(strip, (0, right), padding_mode(width, right)) if right else strip

        return self._convolved(cast(nn.Conv2d, self._first), parts(), height + below, width + right, rows)

    def down(self, conv: nn.Conv2d, x: FeatureMap) -> FeatureMap:
        """Return a new map of half the sides and twice the channels."""
        height, width, channels = x.shape
        target, rows = self._new(height // 2, width // 2, 2 * channels), self._rows(width, 2 * channels)

        def parts() -> Iterator[Tensor]:
            waiting: Tensor | None = None
            for strip in self._convolved(conv, self._strips(x, rows), height, width, rows):
                strip = strip if waiting is None else torch.cat([waiting, strip], 1)
                even = strip.shape[1] // 2 * 2
                if even:
                    yield F.pixel_unshuffle(strip[:, :even].unsqueeze(0), 2)[0]
                waiting = strip[:, even:]

        self._fill(target, parts())
        return target

    def up(self, conv: nn.Conv2d, x: FeatureMap, skip: FeatureMap, reduce: nn.Linear | None) -> FeatureMap:
        """Return a new map of twice the sides: half the channels, joined with the encoder's map; gives both back."""
        height, width, channels = x.shape
        target = self._new(2 * height, 2 * width, channels if reduce is None else channels // 2)
        rows, done = self._rows(width, 4 * channels), 0
        for strip in self._convolved(conv, self._strips(x, rows), height, width, rows):
            larger = F.pixel_shuffle(strip.unsqueeze(0), 2)[0]
            other = skip.read(done, done + larger.shape[1])
            if reduce is None:
                target.write(done, torch.cat([larger, other]))
            else:
                own, others = reduce.weight.chunk(2, 1)
                joined = torch.mm(own, larger.flatten(1)).addmm_(others, other.flatten(1))
                target.write(done, joined.view_as(larger))
            done += larger.shape[1]
        x.release()
        skip.release()
        return target

    def _add_embedded(self, x: FeatureMap, weight: Tensor) -> None:
        """Add the projected first convolution, made anew."""
        done = 0
        for strip in self._embedded():
            x.write(done, add_product(x.read(done, done + strip.shape[1]), weight, strip))
            done += strip.shape[1]

    def finish(self, conv: nn.Conv2d, x: FeatureMap, skip: nn.Linear | None) -> None:
        """Write the last convolution to the result: with the image on top, or after the projected first map."""
        if skip is not None:
            self._add_embedded(x, skip.weight)
        (height, width), done = self.restored.shape[1:], 0
        rows = self._rows(x.shape[1], 2 * x.shape[2])
        for strip in self._convolved(conv, self._strips(x, rows), x.shape[0], x.shape[1], rows):
            end = min(done + strip.shape[1], height)
            strip = strip[:, : max(end - done, 0), :width]
            if skip is None:
                strip = strip + self.image[:, done:end].to(strip)
            self.restored[:, done:end] = strip
            done += strip.shape[1]


def update_block(block: Block, x: FeatureMap, values: FeatureMap | None, rows: int, tell: Tell) -> None:
    """Run a block on a map in place, strip by strip; with room for the values they are computed once."""
    height, width, _ = x.shape
    matrix = _attention_matrix(block.attn, block.norm1, x, values, rows, tell)
    mixed = _mixed(block.attn, block.norm1, x, values, matrix, rows)
    done = 0
    for strip in _fed(block.ffn, block.norm2, mixed, height, width, rows):
        x.write(done, strip)  # its rows have been read: strips come late
        done += strip.shape[1]
        tell(strip.shape[1])


def normed_strip(norm: PixelNorm, x: Tensor) -> Tensor:
    """Normalise (C, rows, width) -> (C, rows * width)."""
    flat = x.flatten(1)
    wide = flat.float() if x.dtype in (torch.bfloat16, torch.float16) else flat
    out = wide - wide.mean(0)
    scale = out.square().mean(0).add_(norm.eps).rsqrt_()
    torch.mul(wide if norm.bias_free else out, scale, out=out)
    if norm.weight is not None:
        out.mul_(norm.weight[:, None])
    if norm.bias is not None:
        out.add_(norm.bias[:, None])
    return out.to(x.dtype)


def _attention_matrix(
    attn: TransposedAttention,
    norm: PixelNorm,
    x: FeatureMap,
    values: FeatureMap | None,
    rows: int,
    tell: Tell,
) -> Tensor:
    """Return the matrix (C, C) of a whole map that is read by strips; store its values where a map is given."""
    height, width, dim = x.shape
    parts = range(2 if values is None else 3)
    wanted = slice(len(parts) * dim)
    weight, bias = attn.qkv.weight[wanted], None if attn.qkv.bias is None else attn.qkv.bias[wanted]
    window = RowWindow(len(parts) * dim, height, rows, width, x.device, x.dtype)
    done, total = 0, None
    for first, end in strips(height, rows):
        linear_strip(weight, bias, normed_strip(norm, x.read(first, end)), window.open(end - first))
        if window.fresh:
            kinds = [slice(part * dim, (part + 1) * dim) for part in parts]
            q, k, *v = (depthwise_strip(window.seen[kind], attn.qkv_dwconv.weight[kind]) for kind in kinds)
            sums = gram(*(part.view(attn.num_heads, -1, window.fresh * width) for part in (q, k)))
            total = sums if total is None else total + sums
            if values is not None:
                values.write(done, v[0])
            done += window.fresh
        window.advance()
        tell(end - first)
    return attn.matrix(cast(Gram, total))


def _mixed(
    attn: TransposedAttention,
    norm: PixelNorm,
    x: FeatureMap,
    values: FeatureMap | None,
    matrix: Tensor,
    rows: int,
) -> Iterator[Tensor]:
    """Yield strips (C, n, width) of the map plus its attention; values that were not stored are computed again."""
    height, width, dim = x.shape
    if values is not None:
        for first, end in strips(height, rows):
            yield add_product(x.read(first, end), matrix, values.read(first, end))
        return
    wanted = slice(2 * dim, None)
    weight, bias = attn.qkv.weight[wanted], None if attn.qkv.bias is None else attn.qkv.bias[wanted]
    window = RowWindow(dim, height, rows, width, x.device, x.dtype)
    for first, end in strips(height, rows):
        strip = x.read(max(first - 1, 0), end)  # values come one row late
        linear_strip(weight, bias, normed_strip(norm, strip[:, first - end :]), window.open(end - first))
        if window.fresh:
            values_strip = depthwise_strip(window.seen, attn.qkv_dwconv.weight[wanted])
            yield add_product(strip[:, : window.fresh], matrix, values_strip)
        window.advance()


def _fed(
    ffn: GatedFFN, norm: PixelNorm, parts: Iterator[Tensor], height: int, width: int, rows: int
) -> Iterator[Tensor]:
    """Yield strips of a map plus what the network makes of it, one row behind the given strips (C, n, width)."""
    weight, dtype = ffn.project_in.weight, ffn.project_in.weight.dtype
    window = RowWindow(len(weight), height, rows, width, weight.device, dtype)
    waiting: Tensor | None = None
    for strip in parts:
        linear_strip(weight, ffn.project_in.bias, normed_strip(norm, strip), window.open(strip.shape[1]))
        strip = strip if waiting is None else torch.cat([waiting, strip], 1)
        if window.fresh:
            gated = dwconv_gate_by_parts(window.seen[None], ffn.dwconv.weight, (0, 1))[0]
            yield add_product(strip[:, : window.fresh], ffn.project_out.weight, gated)
        waiting = strip[:, window.fresh :].clone()
        window.advance()
