"""CFSR on maps that pass by strips of rows: each convolution waits for the next one, and nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.streaming.line import run_line

__all__ = ["BranchRows", "even_strips", "line_numbers", "run_branches", "stream"]


class Branch(Protocol):
    """A branch of a merged block: norm, what is computed of each pixel by itself, a convolution, and what follows."""

    halo: int

    def ahead(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return maps (B, n, W, C) of normed rows; the first is the one that is convolved."""
        ...

    @property
    def mix(self) -> Callable[..., Tensor]:
        """Takes the first map with `halo` more rows above and below, and the others; returns the branch's result."""
        ...


class Network(Protocol):
    """What the strips need of CFSR."""

    scale: int
    mean: Tensor
    conv_first: nn.Conv2d
    layers: nn.Sequential
    norm: nn.LayerNorm
    conv_after_body: nn.Conv2d
    upsample: nn.Conv2d
    shuffle: nn.PixelShuffle


def even_strips(height: int, rows: int) -> list[tuple[int, int]]:
    """Return (first, end) of strips of at least `rows` rows and less than twice as many; one where there are fewer."""
    count = max(1, height // rows)
    return [(height * strip // count, height * (strip + 1) // count) for strip in range(count)]


class BranchRows:
    """`x + branch(norm(x))` of a map that arrives in strips (B, n, W, C); each result comes with the next strip.

    Args:
        norm: Without weights.
        branch: Strips have at least its `halo` rows, unless there is one only.
    """

    def __init__(self, norm: nn.LayerNorm, branch: Branch) -> None:
        self.eps, self.branch = norm.eps, branch
        self._above: Tensor | None = None
        self._kept: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def __call__(self, x: Tensor | None) -> Tensor | None:
        """Take the next strip, or None after the last; return the result of the one before."""
        maps = None if x is None else self.branch.ahead(normed(x, self.eps))
        result = None
        if self._kept is not None:
            kept, (own, *others) = self._kept
            seen, self._above = with_neighbours(self._above, own, None if maps is None else maps[0], self.branch.halo)
            result = self.branch.mix(seen, *others).add_(kept)
        self._kept = None if x is None or maps is None else (x, maps)
        return result


def with_neighbours(above: Tensor | None, own: Tensor, below: Tensor | None, halo: int) -> tuple[Tensor, Tensor]:
    """Return a strip with rows of its neighbours, zeros beyond the map, and what it shows the next strip."""
    edge = own.new_zeros(len(own), halo, *own.shape[2:]) if above is None or below is None else own
    seen = torch.cat([edge if above is None else above, own, edge if below is None else below[:, :halo]], 1)
    return seen, own[:, -halo:].clone()  # a view would hold the strip


def normed(x: Tensor, eps: float) -> Tensor:
    """Return `layer_norm` without weights; its sums as products take half the time of the function on a CPU."""
    if x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu":
        return F.layer_norm(x, x.shape[-1:], None, None, eps)
    mean = x.new_full((x.shape[-1], 1), 1 / x.shape[-1])
    out = x - x @ mean
    return out.mul_((out.square() @ mean).add_(eps).rsqrt_())


def run_branches(x: Tensor, branches: Sequence[BranchRows], rows: int) -> Tensor:
    """Return what branches one after the other make of a map (B, H, W, C), by strips of at least `rows` rows."""
    out, done = torch.empty_like(x), 0
    strips: list[Tensor | None] = [x[:, first:end] for first, end in even_strips(x.shape[1], rows)]

    def write(rows: Tensor | None) -> None:
        nonlocal done
        if rows is not None:
            out[:, done : done + rows.shape[1]] = rows
            done += rows.shape[1]

    run_line([*branches, write], strips, 1)
    return out


class _ConvRows:
    """A 3x3 convolution with zero padding of channels-last strips; each result comes with the next strip."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        self._above: Tensor | None = None
        self._kept: Tensor | None = None

    def __call__(self, x: Tensor | None) -> Tensor | None:
        result = None
        if self._kept is not None:
            seen, self._above = with_neighbours(self._above, self._kept, x, 1)
            result = _convolved(self.conv, seen)
        self._kept = x
        return result


def _convolved(conv: nn.Conv2d, seen: Tensor) -> Tensor:
    """Convolve (B, n + 2, W, C) to (B, n, W, C'): zeros on the left and right only."""
    return F.conv2d(seen.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=(0, 1)).permute(0, 2, 3, 1)


def stream(
    model: Network,
    x: Tensor,
    rows: int,
    workers: int,
    write: Callable[[int, Tensor], object],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Upscale a map.

    Args:
        model: Merged, in evaluation mode.
        x: (in_chans, H, W), floating point in [0, 1] or whole numbers up to the largest of their type.
        rows: Of a strip, at least.
        workers: Threads.
        write: Told the first row of a strip and its result, (in_chans, scale * n, scale * W).
        progress: Called with (strips done, strips in all).
    """
    height = x.shape[1]
    strips = even_strips(height, rows)
    weight = model.conv_first.weight
    peak = 1.0 if x.is_floating_point() else float(torch.iinfo(x.dtype).max)
    following, done = iter(strips), 0

    def embedded(first: int, end: int) -> Tensor:
        """Return the first convolution of rows of the picture."""
        part = x[None, :, max(first - 1, 0) : end + 1].to(weight.device, weight.dtype)
        part = (part / peak - model.mean).permute(0, 2, 3, 1)
        return _convolved(model.conv_first, F.pad(part, (0, 0, 0, 0, int(first == 0), int(end == height))))

    def add_embedded(features: Tensor | None) -> Tensor | None:
        """Add the first convolution, made anew: to keep it would take as much memory as two blocks."""
        return None if features is None else features + embedded(*next(following))

    def finish(phases: Tensor | None) -> None:
        nonlocal done
        if phases is None:
            return
        first = strips[done][0]
        write(model.scale * first, (model.shuffle(phases.permute(0, 3, 1, 2)) + model.mean)[0])
        done += 1
        if progress is not None:
            progress(done, len(strips))

    def add_convolved(conv: nn.Module, x: Tensor | None) -> Tensor | None:
        return None if x is None else conv(x).add_(x)

    stages: list[Callable[[Any], Any]] = [lambda strip: None if strip is None else embedded(*strip)]
    for layer in model.layers:
        part: Any = layer
        for block in part.blocks:
            stages += block.rows()
        stages.append(partial(add_convolved, part.conv))
    body = _ConvRows(model.conv_after_body)
    stages += [lambda x: body(None if x is None else model.norm(x)), add_embedded, _ConvRows(model.upsample), finish]
    run_line(stages, strips, workers)


def line_numbers(blocks: int, dim: int, hidden: int, halo: int, rows: int, workers: int) -> int:
    """Return how many numbers a stream holds beside picture and result, for each pixel of a row.

    Args:
        blocks: In all.
        dim: Channels.
        hidden: Channels of the feed-forward networks.
        halo: Of the large convolutions, rows.
        rows: Of the largest strip.
        workers: Threads.
    """
    kept = rows * (4 * dim + hidden) + halo * dim + hidden  # of a block: its strips, both gates, the widened map
    computed = (rows + 2 * halo) * (4 * dim + 4 * hidden)  # by a thread
    return blocks * kept + workers * computed + 8 * rows * dim
