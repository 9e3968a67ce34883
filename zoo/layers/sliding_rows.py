"""Maps that pass through a network by strips of rows: a convolution keeps the rows it needs again, none is redone."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RowQueue", "SlidingRows", "depthwise_rows", "linear_rows", "merged_kernel"]


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


def merged_kernel(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of a convolution with the statistics of the BatchNorm behind it, if there is one."""
    weight, bias = conv.weight, cast(Tensor, conv.bias)
    if not isinstance(norm, nn.BatchNorm2d):
        return weight, bias
    scale = norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
    return weight * scale[:, None, None, None], (bias - cast(Tensor, norm.running_mean)) * scale + norm.bias
