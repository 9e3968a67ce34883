"""DAT on one image strip by strip: windows a few at a time, attention between channels by sums over strips.

Maps are (height, width, channels), strips of them (rows, width, channels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.conv_norm import merged_kernel
from zoo.layers.dual_aggregation import ChannelAttention, DualAggregationBlock, SpatialAttention
from zoo.layers.rectangular_window import WindowAttention
from zoo.layers.transposed_attention import Gram, channel_attention, fold_projection, gram
from zoo.streaming.maps import FeatureMap, Workspace
from zoo.streaming.strips import RowQueue, SlidingRows, depthwise_rows, linear_rows, strips

__all__ = ["FEWEST_PIXELS", "TILE_PIXELS", "StripRun", "Strips", "WindowSpan", "window_spans"]

FEWEST_PIXELS = 1024  # of a strip
TILE_PIXELS = 8192  # of convolutions, whose overlap is computed twice

Read = Callable[[int, int], Tensor]
"""Returns rows [first, end) of a map, (end - first, W, C)."""
Write = Callable[[int, Tensor], None]
"""Takes the first row and (n, W, C)."""


@dataclass(frozen=True)
class WindowSpan:
    """Neighbouring windows along one axis that are computed alike, in pixels of the rolled map.

    Args:
        count: Windows.
        pieces: (first pixel in the span, first pixel in the map, length) of every run of pixels that are in the map;
            the rest of the span is padding.
        queries: Pixels of a window from the first to the last one that is in the map; the whole window if there are
            several windows.
        last: This is the last window of a shifted map, where the map's two ends meet.
    """

    count: int
    pieces: tuple[tuple[int, int, int], ...]
    queries: slice
    last: bool


@lru_cache(maxsize=1024)
def window_spans(length: int, padded: int, window: int, shift: int, most: int) -> tuple[WindowSpan, ...]:
    """Cut one axis of a map, rolled by -shift, into spans of windows; windows of padding alone are left out.

    Args:
        length: Of the map, pixels.
        padded: Its length with padding, a multiple of `window`.
        window: Of a window.
        shift: Of the windows.
        most: Windows of a span.
    """
    spans: list[WindowSpan] = []
    row = 0
    while row < padded // window:
        start = row * window + shift  # in the map, before its end wraps round
        count = min(most, (length - start) // window)
        if count > 0:
            spans.append(WindowSpan(count, ((0, start, count * window),), slice(0, window), False))
            row += count
            continue
        inside = [(at, (start + at) % padded) for at in range(window) if (start + at) % padded < length]
        if inside:
            pieces: list[tuple[int, int, int]] = []
            for at, pixel in inside:
                if pieces and (at, pixel) == (pieces[-1][0] + pieces[-1][2], pieces[-1][1] + pieces[-1][2]):
                    pieces[-1] = (*pieces[-1][:2], pieces[-1][2] + 1)
                else:
                    pieces.append((at, pixel, 1))
            last = shift > 0 and row == padded // window - 1
            spans.append(WindowSpan(1, tuple(pieces), slice(inside[0][0], inside[-1][0] + 1), last))
        row += 1
    return tuple(spans)


@dataclass(frozen=True)
class Strips:
    """How one map is computed piece by piece.

    Args:
        height: Of the map, pixels.
        width: Of the map, pixels.
        pixels: About how many are computed at a time.
        new: Makes an empty map of as many channels, and the height and width of this one.
    """

    height: int
    width: int
    pixels: int
    new: Callable[[int], FeatureMap]

    @property
    def rows(self) -> int:
        """Rows of a strip."""
        return max(2, self.pixels // self.width)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (first, end) of each strip."""
        return strips(self.height, self.rows)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _interact(branch: nn.Sequential, at: int, x: Tensor) -> Tensor:
    """Run convolution `at`, BatchNorm, GELU and convolution of 1x1 of an interaction on channels-last vectors."""
    weight, bias = merged_kernel(cast(nn.Conv2d, branch[at]), branch[at + 1])
    last = cast(nn.Conv2d, branch[at + 3])
    return F.linear(F.gelu(F.linear(x, weight.flatten(1), bias)), last.weight.flatten(1), last.bias)


def _channel_gate(attn: SpatialAttention | ChannelAttention, mean: Tensor) -> Tensor:
    """Return the gate of channels from their means (C)."""
    return torch.sigmoid(_interact(attn.channel_interaction, 1, mean))


def _pixel_gate(attn: SpatialAttention | ChannelAttention, x: Tensor) -> Tensor:
    """Return the gate of pixels, (n, W, C) -> (n, W, 1)."""
    return torch.sigmoid(_interact(attn.spatial_interaction, 0, x))


def _attend_in_windows(attn: SpatialAttention, read: Read, strips: Strips, emit: Write) -> None:
    """Compute spatial attention.

    Args:
        attn: The layer.
        read: Returns rows [first, end) of the input, (end - first, W, C).
        strips: The cut.
        emit: Takes the first row and (n, W, C) of the result, from top to bottom.
    """
    half, size = attn.dim // 2, (strips.height, strips.width)
    padded = (size[0] + -size[0] % attn.multiple_of, size[1] + -size[1] % attn.multiple_of)
    weight, bias = attn.qkv.weight.view(3, 2, half, -1), attn.qkv.bias.view(3, 2, half)
    kernel, offset = merged_kernel(cast(nn.Conv2d, attn.dwconv[0]), attn.dwconv[1])
    attended, convolved, means = [], [], []
    for index, windows in enumerate(cast(list[WindowAttention], list(attn.attns))):
        a, c = strips.new(half), strips.new(half)
        projection = weight[:, index].flatten(0, 1), bias[:, index].flatten()
        _attend_in_spans(windows, read, a.write, c.write, size, padded, projection, strips.pixels)
        part = slice(index * half, (index + 1) * half)
        means.append(_convolve_rows(c, strips, kernel[part], offset[part]))
        attended.append(a)
        convolved.append(c)
    gate = _channel_gate(attn, torch.cat(means))
    for first, end in strips:
        mixed = torch.cat([part.read(first, end) for part in attended], -1)
        pixels = _pixel_gate(attn, mixed)
        gated = torch.cat([part.read(first, end) for part in convolved], -1).mul_(pixels)
        mixed = gated.addcmul_(mixed, gate)
        emit(first, linear_rows(mixed, attn.proj.weight, attn.proj.bias))
    for done in (*attended, *convolved):
        done.release()


def _convolve_rows(values: FeatureMap, strips: Strips, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve a map of values in place, and return the means of its channels."""
    total = weight.new_zeros(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))
    sliding, done = SlidingRows(strips.height), 0
    for first, end in strips:
        rows = sliding.push(values.read(first, end))
        if rows is None:
            continue
        c = F.gelu(depthwise_rows(rows, weight, bias))
        total += c.sum((0, 1), dtype=total.dtype)
        values.write(done, c)
        done += c.shape[0]
    return (total / (strips.height * strips.width)).to(weight.dtype)


def _attend_in_spans(
    attn: WindowAttention,
    read: Read,
    write: Write,
    write_values: Write,
    size: tuple[int, int],
    padded: tuple[int, int],
    projection: tuple[Tensor, Tensor],
    pixels: int,
) -> None:
    """Attend within a few windows at a time, over the whole map.

    The projection happens inside, to heads that are padded to whole vectors of the processor: with 10 channels a
    head, attention on a CPU with AVX-512 is 1.6 times as fast at 16.

    Args:
        attn: Attention of one shape of windows.
        read: The projection's input.
        write: Takes the result, each row of the map once.
        write_values: Takes the values likewise.
        size: Height and width of the map.
        padded: Height and width with padding.
        projection: Weight (3 * C, C') and bias (3 * C).
        pixels: About how many to compute at a time.
    """
    weight, bias = projection
    (tall, wide), (height, width), heads = attn.size, size, attn.num_heads
    spare = -attn.head_dim % (16 if attn.head_dim < 16 else 8)
    head = attn.head_dim + spare
    weight = F.pad(weight.unflatten(0, (-1, attn.head_dim)), (0, 0, 0, spare)).flatten(0, 1)
    bias = F.pad(bias.unflatten(0, (-1, attn.head_dim)), (0, spare)).flatten()
    columns = window_spans(width, padded[1], wide, attn.shift[1], max(1, pixels // (tall * wide)))
    row_windows = max(1, pixels // (tall * padded[1]))
    score_bias, kinds = attn.bias(), {}
    for row in window_spans(height, padded[0], tall, attn.shift[0], row_windows):
        strips = [(at, read(first, first + count)) for at, first, count in row.pieces]
        attended = [strip.new_empty(2, strip.shape[0], width, attn.dim) for _, strip in strips]
        for column in columns:
            cells = [
                (at, across, _project(strip[:, first : first + count], weight, bias))
                for at, strip in strips
                for across, first, count in column.pieces
            ]
            area = (row.count * tall, column.count * wide)
            qkv = cells[0][2]
            if qkv.shape[:2] != area:
                qkv = qkv.new_zeros(*area, qkv.shape[2])
                for at, across, cell in cells:
                    qkv[at : at + cell.shape[0], across : across + cell.shape[1]] = cell
            qkv = qkv.view(row.count, tall, column.count, wide, 3, heads, head).permute(4, 0, 2, 5, 1, 3, 6)
            q, k, v = qkv.contiguous()  # (rows, columns, h, tall, wide, head)
            if (row.last, column.last) not in kinds:
                kinds[row.last, column.last] = attn.masked_bias(score_bias, row.last, column.last, q)
            mask = kinds[row.last, column.last]
            q = q[..., row.queries, column.queries, :]
            if mask is not None:
                mask = mask.unflatten(1, (tall, wide))[:, row.queries, column.queries].flatten(1, 2)[None]
            out = F.scaled_dot_product_attention(
                q.reshape(-1, heads, q.shape[3] * q.shape[4], head),
                k.view(-1, heads, tall * wide, head),
                v.view(-1, heads, tall * wide, head),
                attn_mask=mask,
                scale=attn.scale,
            )
            out = out[..., : attn.head_dim].unflatten(2, q.shape[3:5]).unflatten(0, (row.count, column.count))
            out = out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).flatten(0, 1)  # (height, width, C)
            projected = iter(cells)
            for (at, strip), (target, values) in zip(strips, attended, strict=True):
                for across, first, count in column.pieces:
                    top, left = at - row.queries.start, across - column.queries.start
                    target[:, first : first + count] = out[top : top + strip.shape[0], left : left + count]
                    value = next(projected)[2].unflatten(-1, (3, heads, head))[..., 2, :, : attn.head_dim]
                    values[:, first : first + count].unflatten(-1, (heads, -1)).copy_(value)
        for (_, first, _), (target, values) in zip(row.pieces, attended, strict=True):
            write(first, target)
            write_values(first, values)


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer to a cut of a map; as a matrix it gets the kernel that adds the bias on the way."""
    return F.linear(x.reshape(-1, x.shape[2]), weight, bias).view(*x.shape[:2], -1)


def _attend_between_channels(layer: ChannelAttention, read: Read, strips: Strips, emit: Write) -> None:
    """Compute channel attention: one pass for the products, one for the result."""
    dim, heads, count = layer.dim, layer.num_heads, strips.height * strips.width
    exact = torch.promote_types(layer.proj.weight.dtype, torch.float32)
    sums: Gram | None = None
    total = layer.proj.weight.new_zeros(dim, dtype=exact)
    for first, end in strips:
        x = read(first, end).reshape(-1, dim)
        qk = F.linear(x, layer.qkv.weight[: 2 * dim], layer.qkv.bias[: 2 * dim]).view(-1, 2, heads, dim // heads)
        part = gram(*qk.permute(1, 2, 3, 0))
        sums = part if sums is None else sums + part
        total += x.sum(0, dtype=exact)
    attn = channel_attention(cast(Gram, sums), layer.temperature).to(layer.proj.weight.dtype)
    weight, bias = layer.qkv.weight[2 * dim :], layer.qkv.bias[2 * dim :]
    mean = F.linear((total / count).to(weight.dtype), weight, bias).view(heads, -1, 1)
    gated = layer.proj.weight * _channel_gate(layer, (attn @ mean).flatten())
    attended = fold_projection(attn, layer.proj.weight)
    kernel = merged_kernel(cast(nn.Conv2d, layer.dwconv[0]), layer.dwconv[1])
    sliding, done = SlidingRows(strips.height), 0
    for first, end in strips:
        v = sliding.push(linear_rows(read(first, end), weight, bias))
        if v is None:
            continue
        c = F.gelu(depthwise_rows(v, *kernel))
        out = linear_rows(v[1:-1], attended).mul_(_pixel_gate(layer, c))
        emit(done, out.add_(linear_rows(c, gated, layer.proj.bias)))
        done += c.shape[0]


def _run_block(block: DualAggregationBlock, source: FeatureMap, target: FeatureMap, strips: Strips) -> None:
    """Read a map and write the result of a block.

    Args:
        block: In evaluation mode.
        source: The input.
        target: Takes the result; may be `source`.
        strips: The cut.
    """
    ffn, gates, hidden_rows, residual = block.ffn, SlidingRows(strips.height), RowQueue(), RowQueue()
    conv, half, done = (ffn.sg.conv.weight, cast(Tensor, ffn.sg.conv.bias)), block.ffn.fc2.in_features, 0

    def feed(first: int, rows: Tensor) -> None:
        """Add the attention's residual to the next rows, run the other half on them, write what is complete."""
        nonlocal done
        x = rows.add_(source.read(first, first + rows.shape[0]))  # not yet overwritten: `done` is behind
        hidden = F.gelu(linear_rows(_norm(block.norm2, x), ffn.fc1.weight, ffn.fc1.bias))
        hidden_rows.push(hidden[..., :half])
        residual.push(x)
        gate = gates.push(_norm(ffn.sg.norm, hidden[..., half:]))
        if gate is None:
            return
        gate = depthwise_rows(gate, *conv)
        count = gate.shape[0]
        gated = gate.mul_(hidden_rows.pop(count))
        target.write(done, linear_rows(gated, ffn.fc2.weight, ffn.fc2.bias).add_(residual.pop(count)))
        done += count

    def read(first: int, end: int) -> Tensor:
        return _norm(block.norm1, source.read(first, end))

    attn = block.attn
    if isinstance(attn, SpatialAttention):
        _attend_in_windows(attn, read, strips, feed)
    else:
        _attend_between_channels(attn, read, strips, feed)


class Network(Protocol):
    """What the strips need of DAT."""

    mean: Tensor
    scale: int
    embed_dim: int
    conv_first: nn.Conv2d
    before_RG: nn.Sequential  # noqa: N815  the authors' name
    layers: nn.Sequential
    norm: nn.LayerNorm
    conv_after_body: nn.Module
    body_halo: int
    tail_halo: int

    def upscale(self, features: Tensor) -> Tensor: ...


class Group(Protocol):
    """A residual group of DAT."""

    blocks: nn.Sequential
    conv: nn.Module


class StripRun:
    """One image on its way through DAT.

    Args:
        model: In evaluation mode.
        image: (in_chans, H, W).
        out: Receives the result, (in_chans, scale * H, scale * W).
        space: Makes the maps.
        strips: The cut.
        step: Called after each block, and at the end.
    """

    def __init__(
        self, model: Network, image: Tensor, out: Tensor, space: Workspace, strips: Strips, step: Callable[[], None]
    ) -> None:
        self.model, self.image, self.out = model, image, out
        self.space, self.strips, self.step = space, strips, step

    def run(self) -> None:
        """Restore the image."""
        model, strips = self.model, self.strips
        height, width, dim = strips.height, strips.width, model.embed_dim
        residual, features = self.space.new(height, width, dim), self.space.new(height, width, dim)
        for first, end in strips:
            shallow = self._shallow(self.image, first, end, 1)[0].permute(1, 2, 0)
            residual.write(first, model.before_RG(shallow))
        for group in cast(list[Group], list(model.layers)):
            source = residual
            for block in cast(list[DualAggregationBlock], list(group.blocks)):
                _run_block(block, source, features, strips)
                source = features
                self.step()
            rows = max(strips.pixels, TILE_PIXELS) // width + 4
            for first in range(0, height, rows):
                convolved = self._convolve(group.conv, source, first, min(first + rows, height))
                residual.write(first, residual.read(first, first + convolved.shape[0]) + convolved)
        features.release()
        self._finish(residual)
        self.step()

    def _shallow(self, image: Tensor, first: int, end: int, halo: int) -> Tensor:
        """Return rows [first, end) of the first convolution, (1, C, n, W); `halo` rows beyond them are seen."""
        top, bottom = max(first - halo, 0), min(end + halo, image.shape[1])
        mean = self.model.mean
        part = image[None, :, top:bottom].to(mean.device, mean.dtype) - mean
        part = self.model.conv_first(part.contiguous(memory_format=torch.channels_last))
        return part[:, :, first - top : end - top]

    def _convolve(self, conv: nn.Module, source: FeatureMap, first: int, end: int) -> Tensor:
        """Return rows [first, end) of the convolution that ends a group, (n, W, C)."""
        top, bottom = max(first - self.model.body_halo, 0), min(end + self.model.body_halo, source.shape[0])
        part = conv(source.read(top, bottom).permute(2, 0, 1)[None])
        return part[0, :, first - top : end - top].permute(1, 2, 0)

    def _finish(self, features: FeatureMap) -> None:
        """Run what follows the body, in tiles that overlap: its convolutions are few but its maps are large."""
        model, height, width = self.model, self.strips.height, self.strips.width
        halo, scale, pixels = model.tail_halo, model.scale, max(self.strips.pixels, TILE_PIXELS)
        rows = max(pixels // width, 4 * halo)
        columns = max(pixels // rows, 4 * halo)
        for first in range(0, height, rows):
            top, bottom = max(first - halo, 0), min(first + rows + halo, height)
            strip = features.read(top, bottom)
            end = min(first + rows, height)
            for start in range(0, width, columns):
                left, right = max(start - halo, 0), min(start + columns + halo, width)
                stop = min(start + columns, width)
                deep = model.norm(strip[:, left:right]).permute(2, 0, 1)[None]
                shallow = self._shallow(self.image[..., left:right], top, bottom, 0)
                tile = model.upscale(model.conv_after_body(deep) + shallow)[0]
                kept = tile[
                    :, scale * (first - top) : scale * (end - top), scale * (start - left) : scale * (stop - left)
                ]
                self.out[:, scale * first : scale * end, scale * start : scale * stop] = kept.to(self.out)
