"""Maps that are worked on in strips of rows, channels first: what a network needs to run in little memory.

A strip of n rows is (channels, n, width), on which convolutions and matrix products of a CPU are fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RowMap", "RowWindow", "add_product", "depthwise_strip", "linear_strip", "strips"]


class RowMap(Protocol):
    """A map (height, width, channels) that is read and written by strips, in memory or elsewhere."""

    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype

    def read(self, first: int, end: int) -> Tensor:
        """Return the strip of rows [first, end)."""

    def write(self, first: int, rows: Tensor) -> None:
        """Write a strip as the rows from `first` on."""


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
