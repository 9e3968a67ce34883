"""Attention within rectangular, optionally shifted windows of a map, with a position bias that is a small network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.dispatch import no_autocast
from zoo.layers.conv_norm import require_eval
from zoo.layers.kept import Kept

__all__ = [
    "DynamicPositionBias",
    "WindowAttention",
    "WindowSpan",
    "plain_mask",
    "plain_window_attention",
    "window_spans",
]

_FAR = -100.0  # what Swin and its heirs add to the score of two tokens that are no neighbours; not minus infinity


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


class DynamicPositionBias(nn.Module):
    """Attention bias of every pair of tokens of a window, a network of their offset (CrossFormer, used by DAT).

    Of width 1 it is dead: a LayerNorm over one feature returns its own bias whatever comes in, so that every pair of
    tokens gets the same bias, which the softmax cancels. The parameters then only serve to hold an author's weights.

    Args:
        dim: Width of the network's layers.
        num_heads: Heads h.
        window: Height H and width W of the window, tokens.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    table: Tensor | None

    def __init__(
        self, dim: int, num_heads: int, window: tuple[int, int], *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.window, self.num_heads, self.dead = window, num_heads, dim == 1
        self.pos_proj: nn.Module = nn.Linear(2, dim, **dd)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, out, **dd))
            for out in (dim, dim, num_heads)
        )
        self.register_buffer("table", None)
        self._kept = Kept()

    def offset_table(self) -> Tensor:
        """Return the bias of every offset of a query from a key, (h, 2 H - 1, 2 W - 1), from (1 - H, 1 - W) on."""
        if self.table is not None:
            return self.table
        weight = cast(nn.Linear, self.pos_proj).weight
        with no_autocast(weight):
            return self._network(weight)

    def _network(self, like: Tensor) -> Tensor:
        y, x = (torch.arange(1 - side, side, device=like.device, dtype=like.dtype) for side in self.window)
        offsets = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
        for stage in (self.pos_proj, self.pos1, self.pos2, self.pos3):
            offsets = stage(offsets)
        return offsets.permute(2, 0, 1)

    def forward(self) -> Tensor | None:
        """Return the bias (h, H * W, H * W) of queries (first) and keys, or None where it is dead.

        In evaluation on a CPU it is kept as long as the parameters are the same.
        """
        if self.dead:
            return None
        source = self.table if self.table is not None else torch.cat([p.flatten() for p in self.parameters()])
        return self._kept(source, lambda _: self._spread(self.offset_table()))

    def _spread(self, table: Tensor) -> Tensor:
        """Write the bias of each offset to the pairs that have it: each query sees a cut of the reversed table."""
        height, width = self.window
        cuts = table.flip(1, 2).unfold(1, height, 1).unfold(2, width, 1)  # (h, H - 1 - y, W - 1 - x, H, W)
        return cuts.flip(1, 2).reshape(-1, height * width, height * width)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Replace the network by the table of its values, or by nothing where it is dead, in place.

        Raises:
            RuntimeError: The module is in training mode.
        """
        if isinstance(self.pos_proj, nn.Identity):
            return ()
        require_eval(self)
        if not self.dead:
            self.register_buffer("table", self.offset_table().contiguous())
        for name in ("pos_proj", "pos1", "pos2", "pos3"):
            setattr(self, name, nn.Identity())
        return ("dead position bias",) if self.dead else ("position bias",)


class WindowAttention(nn.Module):
    """Attention within windows of a map, padded with zeros on the right and at the bottom where they do not fit.

    Padding takes part: its tokens are keys of score 0 plus bias, with values of 0. Windows of a shifted map that hold
    both ends of the map keep them apart by a mask. There are four kinds of masks (none, last column, last row, corner),
    and one is made for each kind instead of one for each window.

    Args:
        dim: Channels C of queries, keys and values.
        num_heads: Heads h.
        window: Height and width of a window, tokens.
        shift: The map is rolled by half a window, up and to the left.
        bias_dim: Width of the network of the position bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    window: Tensor  # persistent: nothing else in a state dict tells the shape of the windows

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        *,
        shift: bool,
        bias_dim: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.size, self.shift = window, (window[0] // 2, window[1] // 2) if shift else (0, 0)
        self.scale = self.head_dim**-0.5
        self.register_buffer("window", torch.tensor(window, device=device))
        self.pos = DynamicPositionBias(bias_dim, num_heads, window, device=device, dtype=dtype)

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend within all windows at once.

        Args:
            qkv: (B, H, W, 3, C), H and W multiples of the window's sides.

        Returns:
            (B, H, W, C).
        """
        batch, height, width = qkv.shape[:3]
        tall, wide = self.size
        rolled = any(self.shift)
        if rolled:
            qkv = torch.roll(qkv, (-self.shift[0], -self.shift[1]), (1, 2))
        rows, columns = height // tall, width // wide
        shape = (3, batch, rows, columns, self.num_heads, tall * wide, self.head_dim)
        qkv = qkv.unflatten(-1, (self.num_heads, self.head_dim))
        qkv = qkv.unflatten(2, (columns, wide)).unflatten(1, (rows, tall))
        q, k, v = _copy(qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)).view(shape)
        if self.pos.dead and self.training and torch.is_grad_enabled():
            # a gradient of zeros: distributed training and optimizers complain of parameters without one
            q = q + 0 * torch.cat([p.flatten() for p in self.pos.parameters()]).sum().to(q.dtype)
        bias = self.pos()
        if not rolled:
            out = self._attend(q, k, v, bias)
        elif torch.compiler.is_compiling() or torch.jit.is_tracing():  # whether a kind is empty depends on the size
            out = self._attend(q, k, v, _add(bias, self._every_mask(rows, columns, q)))
        else:
            kinds = [
                [
                    self._attend(q[:, r, c], k[:, r, c], v[:, r, c], self._add_mask(bias, i == 1, j == 1, q))
                    for j, c in enumerate((slice(0, columns - 1), slice(columns - 1, columns)))
                ]
                for i, r in enumerate((slice(0, rows - 1), slice(rows - 1, rows)))
            ]
            out = torch.cat([torch.cat(row, 2) for row in kinds], 1)
        out = out.view(batch, rows, columns, self.num_heads, tall, wide, self.head_dim)
        out = _copy(out.permute(0, 1, 4, 2, 5, 3, 6)).view(batch, height, width, self.dim)
        return torch.roll(out, self.shift, (1, 2)) if rolled else out

    def by_spans(
        self,
        read: Callable[[int, int], Tensor],
        write: Callable[[int, Tensor], None],
        write_values: Callable[[int, Tensor], None],
        size: tuple[int, int],
        padded: tuple[int, int],
        weight: Tensor,
        bias: Tensor,
        pixels: int,
    ) -> None:
        """Attend within a few windows at a time, over the whole map; for inference.

        The projection happens inside, to heads that are padded to whole vectors of the processor: with 10 channels a
        head, attention on a CPU with AVX-512 is 1.6 times as fast at 16.

        Args:
            read: Returns rows [first, end) of the projection's input, (end - first, W, C').
            write: Takes the first row and (n, W, C) of the result, each row of the map once.
            write_values: Takes the values likewise.
            size: Height and width of the map.
            padded: Height and width with padding.
            weight: Of the projection, (3 * C, C').
            bias: Of the projection, (3 * C).
            pixels: About how many to compute at a time.
        """
        (tall, wide), (height, width), heads = self.size, size, self.num_heads
        spare = -self.head_dim % (16 if self.head_dim < 16 else 8)
        head = self.head_dim + spare
        weight = F.pad(weight.unflatten(0, (-1, self.head_dim)), (0, 0, 0, spare)).flatten(0, 1)
        bias = F.pad(bias.unflatten(0, (-1, self.head_dim)), (0, spare)).flatten()
        columns = window_spans(width, padded[1], wide, self.shift[1], max(1, pixels // (tall * wide)))
        row_windows = max(1, pixels // (tall * padded[1]))
        score_bias, kinds = self.pos(), {}
        for row in window_spans(height, padded[0], tall, self.shift[0], row_windows):
            strips = [(at, read(first, first + count)) for at, first, count in row.pieces]
            attended = [strip.new_empty(2, strip.shape[0], width, self.dim) for _, strip in strips]
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
                    kinds[row.last, column.last] = self._add_mask(score_bias, row.last, column.last, q)
                mask = kinds[row.last, column.last]
                q = q[..., row.queries, column.queries, :]
                if mask is not None:
                    mask = mask.unflatten(1, (tall, wide))[:, row.queries, column.queries].flatten(1, 2)[None]
                out = F.scaled_dot_product_attention(
                    q.reshape(-1, heads, q.shape[3] * q.shape[4], head),
                    k.view(-1, heads, tall * wide, head),
                    v.view(-1, heads, tall * wide, head),
                    attn_mask=mask,
                    scale=self.scale,
                )
                out = out[..., : self.head_dim].unflatten(2, q.shape[3:5]).unflatten(0, (row.count, column.count))
                out = out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).flatten(0, 1)  # (height, width, C)
                projected = iter(cells)
                for (at, strip), (target, values) in zip(strips, attended, strict=True):
                    for across, first, count in column.pieces:
                        top, left = at - row.queries.start, across - column.queries.start
                        target[:, first : first + count] = out[top : top + strip.shape[0], left : left + count]
                        value = next(projected)[2].unflatten(-1, (3, heads, head))[..., 2, :, : self.head_dim]
                        values[:, first : first + count].unflatten(-1, (heads, -1)).copy_(value)
            for (_, first, _), (target, values) in zip(row.pieces, attended, strict=True):
                write(first, target)
                write_values(first, values)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows (B, rows, columns, h, tokens, head)."""
        shape = q.shape
        windows = (part.reshape(-1, *shape[3:]) for part in (q, k, v))
        if q.is_cuda and self.head_dim % 8:  # the fused kernels want whole vectors
            windows = (F.pad(part, (0, -self.head_dim % 8)) for part in windows)
        if mask is not None and mask.ndim == 5:  # one for each window: (rows, columns, h or 1, tokens, tokens)
            mask = mask.expand(shape[0], *mask.shape).reshape(-1, *mask.shape[2:])
        elif mask is not None:
            mask = mask[None]  # of rank 4, or a CPU does not take the fused kernel
        q, k, v = windows
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out[..., : self.head_dim].reshape(shape)

    def _regions(self, axis: int, like: Tensor) -> Tensor:
        """Tell for each pixel of a last window whether it is from the map's beginning."""
        return torch.arange(self.size[axis], device=like.device) >= self.size[axis] - self.shift[axis]

    def _add_mask(self, bias: Tensor | None, last_row: bool, last_column: bool, like: Tensor) -> Tensor | None:
        """Return the bias with the mask of one kind of window, (h or 1, tokens, tokens), or None for neither."""
        if not (last_row or last_column):
            return None if bias is None else bias.to(like.dtype)
        rows = self._regions(0, like) & last_row
        columns = self._regions(1, like) & last_column
        region = (2 * rows[:, None] + columns[None, :].to(torch.int64)).flatten()
        mask = torch.where(region[:, None] == region, 0.0, _FAR).to(like.dtype)
        return mask[None] if bias is None else bias.to(like.dtype) + mask

    def _every_mask(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return the mask of every window, (rows, columns, 1, tokens, tokens)."""
        regions = []
        for axis, windows in enumerate((rows, columns)):
            last = torch.arange(windows, device=like.device) == windows - 1
            regions.append(last[:, None] & self._regions(axis, like))
        region = 2 * regions[0][:, None, :, None] + regions[1][None, :, None, :].to(torch.int64)
        region = region.flatten(2)  # (rows, columns, tokens)
        far = region[..., :, None] != region[..., None, :]
        return torch.where(far, _FAR, 0.0).to(like.dtype)[:, :, None]


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer to a cut of a map; as a matrix it gets the kernel that adds the bias on the way."""
    return F.linear(x.reshape(-1, x.shape[2]), weight, bias).view(*x.shape[:2], -1)


def _copy(x: Tensor) -> Tensor:
    """Return a copy that is contiguous; a program for any size must not ask whether one is needed."""
    return x.clone(memory_format=torch.contiguous_format)


def _add(bias: Tensor | None, mask: Tensor) -> Tensor:
    return mask if bias is None else bias.to(mask.dtype) + mask


def _plain_windows(x: Tensor, size: tuple[int, int], heads: int) -> Tensor:
    """Cut (B, H, W, C) into windows by way of channels first: (windows, h, tokens, C / h)."""
    batch, height, width, dim = x.shape
    x = x.permute(0, 3, 1, 2).reshape(batch, dim, height // size[0], size[0], width // size[1], size[1])
    x = x.permute(0, 2, 4, 3, 5, 1).contiguous().reshape(-1, size[0] * size[1], dim)
    return x.reshape(-1, size[0] * size[1], heads, dim // heads).permute(0, 2, 1, 3).contiguous()


def plain_mask(height: int, width: int, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Build the mask of every window of a shifted map on the CPU, (windows, tokens, tokens), as Swin's heirs do.

    Args:
        height: Of the map with padding.
        width: Likewise.
        size: Of a window.
        shift: Of the windows.
    """
    regions = torch.zeros(1, height, width, 1)
    number = 0
    for rows in (slice(0, -size[0]), slice(-size[0], -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -size[1]), slice(-size[1], -shift[1]), slice(-shift[1], None)):
            regions[:, rows, columns] = number
            number += 1
    tokens = _plain_windows(regions, size, 1).flatten(1)
    difference = tokens[:, None, :] - tokens[:, :, None]
    return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)


def plain_window_attention(attn: WindowAttention, qkv: Tensor, mask: Tensor | None) -> Tensor:
    """Attend within windows as DAT's authors do: scores, bias and mask in full; oracle of tests, rival in benchmarks.

    Args:
        attn: Its weights are used.
        qkv: (3, B, H, W, C), rolled already.
        mask: From `plain_mask`, for shifted windows.

    Returns:
        (B, H, W, C), not rolled back.
    """
    batch, height, width, dim = qkv.shape[1:]
    (tall, wide), heads = attn.size, attn.num_heads
    q, k, v = (_plain_windows(part, attn.size, heads) for part in qkv)
    scores = (q * attn.scale) @ k.transpose(-2, -1)
    if not (attn.pos.dead and isinstance(attn.pos.pos_proj, nn.Identity)):
        table = attn.pos.offset_table().flatten(1).t()
        y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij"))
        offsets = (y[:, None] - y + tall - 1) * (2 * wide - 1) + x[:, None] - x + wide - 1
        bias = table[offsets.flatten().to(table.device)].view(tall * wide, tall * wide, -1)
        scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
    if mask is not None:
        windows = mask.shape[0]
        scores = scores.view(batch, windows, heads, tall * wide, -1) + mask.to(scores)[None, :, None]
        scores = scores.view(-1, heads, tall * wide, tall * wide)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, tall * wide, dim)
    out = out.view(batch, height // tall, width // wide, tall, wide, dim)
    return out.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, dim)
