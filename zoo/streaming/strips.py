"""Maps that pass through a network by strips of rows: a convolution keeps the rows it needs again, none is redone.

A `RowWindow` is filled in place, channels first: (channels, rows, width), on which convolutions and matrix products
of a CPU are fastest. `SlidingRows` and `RowQueue` take rows that were computed elsewhere, channels last: (rows, width,
channels), as attention within windows has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "RowQueue",
    "RowWindow",
    "SlidingRows",
    "add_product",
    "depthwise_rows",
    "depthwise_strip",
    "linear_rows",
    "linear_strip",
    "strips",
]


def strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of strips of at most `rows` rows that cover `height` rows."""
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


class RowWindow:
    """Rows of a map on their way through a 3x3 convolution with zero padding, strip by strip.

    The last two rows of a strip stay for the next one, so that nothing is computed twice. For each strip: fill `open`,
    convolve `seen` with padding (0, 1), then `advance`. The result is one row behind the input.

    Args:
        channels: Of the map.
        height: Rows of the map.
        rows: Rows of a strip, for most strips.
        width: Pixels of a row.
        device: Of the rows.
        dtype: Of the rows.
    """

    def __init__(
        self, channels: int, height: int, rows: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._buffer = torch.empty(channels, min(rows, height) + 2, width, device=device, dtype=dtype)
        self._buffer[:, 0] = 0  # padding above the first row
        self._kept, self._end, self._missing = 1, 1, height

    def open(self, rows: int) -> Tensor:
        """Return the place of the next rows, (channels, rows, width), to be filled."""
        self._missing -= rows
        is_last = self._missing == 0
        self._end = self._kept + rows + is_last
        if self._end > self._buffer.shape[1]:
            kept = self._buffer[:, : self._kept].clone()
            channels, _, width = self._buffer.shape
            self._buffer = kept[:, :0]  # frees the old one before the larger one is claimed
            self._buffer = kept.new_empty(channels, self._end, width)
            self._buffer[:, : self._kept] = kept
        if is_last:
            self._buffer[:, self._end - 1] = 0  # padding below the last row
        return self._buffer[:, self._kept : self._kept + rows]

    @property
    def fresh(self) -> int:
        """Rows that the convolution gives now; 0 after a first strip of one row."""
        return self._end - 2

    @property
    def seen(self) -> Tensor:
        """Rows that the convolution sees, (channels, fresh + 2, width)."""
        return self._buffer[:, : self._end]

    def advance(self) -> None:
        """Keep the last two rows for the next strip."""
        last = self._buffer[:, self._end - 2 : self._end]
        self._buffer[:, :2] = last.clone() if self._end < 4 else last
        self._kept = 2


def linear_strip(weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor) -> None:
    """Write W x + b of (C, pixels) to the rows `out`, (O, rows, width)."""
    if bias is None:
        torch.mm(weight, x, out=out.flatten(1))
    else:
        torch.addmm(bias[:, None], weight, x, out=out.flatten(1))


def depthwise_strip(seen: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (C, rows + 2, width) -> (C, rows, width)."""
    return F.conv2d(seen.unsqueeze(0), kernel, padding=(0, 1), groups=seen.shape[0])[0]


def add_product(x: Tensor, matrix: Tensor, other: Tensor) -> Tensor:
    """Return x + M y of strips (C, rows, width)."""
    return torch.addmm(x.flatten(1), matrix, other.flatten(1)).view(x.shape)


class SlidingRows:
    """Hand out a map that arrives in strips of rows with the row above and the row below; one row late.

    Args:
        height: Rows of the map.
    """

    def __init__(self, height: int) -> None:
        self.height, self.seen = height, 0
        self._tail: Tensor | None = None

    def push(self, rows: Tensor) -> Tensor | None:
        """Take the next rows (n, W, C).

        Returns:
            (m + 2, W, C): the next m rows whose neighbours are known and one row on each side, zeros beyond the map;
            None if there are none yet.
        """
        edge = rows.new_zeros(1, *rows.shape[1:])
        self.seen += rows.shape[0]
        parts = [edge if self._tail is None else self._tail, rows]
        out = torch.cat([*parts, edge] if self.seen == self.height else parts)
        if out.shape[0] < 3:
            self._tail = out
            return None
        self._tail = out[-2:].clone()  # a view would hold the strip
        return out


class RowQueue:
    """Keep rows until those that were computed from them arrive."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def push(self, rows: Tensor) -> None:
        """Take the next rows (n, W, C)."""
        self._parts.append(rows)

    def pop(self, count: int) -> Tensor:
        """Return the first `count` rows that are kept, (count, W, C)."""
        taken = []
        while count:
            part = self._parts.pop(0)
            taken.append(part[:count])
            if part.shape[0] > count:
                self._parts.insert(0, part[count:].clone())  # a view would hold the strip
            count -= taken[-1].shape[0]
        return taken[0] if len(taken) == 1 else torch.cat(taken)


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer, or a 1x1 convolution, to (n, W, C); as a matrix it gets the kernel that adds the bias."""
    return F.linear(x.reshape(-1, x.shape[-1]), weight.flatten(1), bias).view(*x.shape[:-1], -1)


def depthwise_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (n + 2, W, C) to (n, W, C) with a 3x3 kernel for each channel: zeros on the left and right only."""
    out = F.conv2d(x.permute(2, 0, 1)[None], weight, bias, padding=(0, 1), groups=x.shape[2])
    return out[0].permute(1, 2, 0)
