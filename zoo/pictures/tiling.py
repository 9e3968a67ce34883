"""Run a restorer on a map of any size: whole, streamed or in tiles within a budget, self-ensemble, retries."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StreamPlan", "TilePlan", "parse_bytes", "plan_tiles", "restore_tensor"]

Progress = Callable[[int, int], None]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_DEFAULT_BYTES_PER_PIXEL = 16_384  # of a restorer that does not say: generous for 64-channel networks
_DEFAULT_OVERLAP = 32  # of a restorer whose receptive field is unknown or the whole image, input pixels
_RUNTIME_BYTES = 96 * 10**6  # what the maths libraries take on their first use

_log = logging.getLogger(__name__)


def parse_bytes(size: int | float | str) -> int:
    """Return a number of bytes from 4e9, "4GB" (decimal), "512MiB" (binary) or "300 MB".

    Raises:
        ValueError: It is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(?:E(\d+))?\s*((?:[KMGT]I?)?)B?\s*", str(size).upper())
    value = float(f"{match[1]}e{match[2] or 0}") * _UNITS[match[3]] if match else 0.0
    if not value >= 1:
        raise ValueError(f'A memory size is a number of bytes, or like "4GB" or "512MiB", got {size!r}.')
    return int(value)


@dataclass(frozen=True)
class TilePlan:
    """How a map is cut.

    Args:
        rows: Edges of the tiles' own parts from top to bottom, first 0, last the height; input pixels.
        columns: Edges from left to right.
        overlap: What a tile sees beyond its own part, on each side where there is a neighbour; input pixels.
        pixels: Input pixels of the largest tile, overlap included.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    overlap: int
    pixels: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return (len(self.rows) - 1) * (len(self.columns) - 1)


@dataclass(frozen=True)
class StreamPlan:
    """How a map is streamed through a restorer that has `stream`.

    Args:
        memory: Most bytes that the stream may hold beside the map and the result.
    """

    memory: int


def plan_tiles(height: int, width: int, overlap: int, max_pixels: int, multiple_of: int = 1) -> TilePlan | None:
    """Cut a map so that no tile has more than `max_pixels`, and the least is computed twice.

    Args:
        height: Of the map, a multiple of `multiple_of`; input pixels.
        width: Of the map, likewise.
        overlap: Beyond each tile's own part, on each side; a multiple of `multiple_of`.
        max_pixels: Bound for a tile with its overlap.
        multiple_of: Edges are multiples of this.

    Returns:
        The plan, or None where even the smallest tiles are too large: their own parts are as long as the overlap, since
        shorter ones would compute every pixel more than nine times.
    """
    best: tuple[int, int, int, int] | None = None
    for rows in range(1, _most_parts(height, overlap, multiple_of) + 1):
        tall = _tile_length(height, rows, overlap, multiple_of)
        columns = _fewest_parts(width, overlap, max_pixels // tall, multiple_of)
        if columns is None:
            continue
        pixels = tall * _tile_length(width, columns, overlap, multiple_of)
        if best is None or rows * columns * pixels < best[0]:
            best = (rows * columns * pixels, rows, columns, pixels)
        if columns == 1:
            break  # more rows only add overlap
    if best is None:
        return None
    _, rows, columns, pixels = best
    return TilePlan(_edges(height, rows, multiple_of), _edges(width, columns, multiple_of), overlap, pixels)


def _edges(length: int, parts: int, multiple_of: int) -> tuple[int, ...]:
    units = math.ceil(length / multiple_of)
    return tuple(min(units * part // parts * multiple_of, length) for part in range(parts + 1))


def _tile_length(length: int, parts: int, overlap: int, multiple_of: int) -> int:
    """Length of the longest of `parts` tiles with its overlap."""
    if parts == 1:
        return length
    own = math.ceil(math.ceil(length / multiple_of) / parts) * multiple_of
    return min(own + (2 if parts > 2 else 1) * overlap, length)


def _most_parts(length: int, overlap: int, multiple_of: int) -> int:
    """Number of parts that are each at least as long as the overlap."""
    return max(1, length // max(overlap, multiple_of))


def _fewest_parts(length: int, overlap: int, longest: int, multiple_of: int) -> int | None:
    """Fewest parts whose tiles are at most `longest`, or None."""
    most = _most_parts(length, overlap, multiple_of)
    own = (longest - 2 * overlap) // multiple_of  # of tiles with two neighbours, in multiples
    candidates = [1, 2, *([math.ceil(math.ceil(length / multiple_of) / own)] if own > 0 else [])]
    for parts in candidates:
        if parts <= most and _tile_length(length, parts, overlap, multiple_of) <= longest:
            return parts
    return None


def restore_tensor(
    model: nn.Module,
    x: Tensor,
    *,
    budget: int | float | str | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    self_ensemble: bool = False,
    levels: int | None = None,
    progress: Progress | None = None,
    inform: Callable[[str], object] | None = None,
) -> Tensor:
    """Restore a map of any size: whole where that fits the budget, else streamed, else in tiles.

    A restorer with a method `stream` gives the whole map's result from strips within the budget, where the budget is
    enough for it and no tiles are asked for. Where the overlap covers the receptive field of the network
    (`model.receptive_field`, in input pixels), tiles are cut without blending and the result equals that of the whole
    map up to rounding; otherwise tiles are blended across their overlap, and the result differs a little from that of
    the whole map. What runs out of memory is tried again with half of it; what is not finite in half precision is
    computed again in float32.

    Args:
        model: Restorer with `scale` and `in_chans`, and if it has them `multiple_of`, `receptive_field`,
            `bytes_per_pixel` (working memory in bytes per input pixel, float32), `stream` and `stream_bytes`. It runs
            where its weights are and in their precision. A one-channel network restores each channel of `x` apart, a
            three-channel one gets gray maps three times.
        x: (B, C, H, W), floating point in [0, 1], uint8 or uint16; any device.
        budget: Memory that the process may hold in all (CPU), or on the device: bytes, or like "4GB"; None is no limit.
        tile: Side of the tiles with their overlap, in input pixels, instead of a choice by `budget`.
        overlap: Beyond each tile's own part, input pixels; None takes the receptive field, or 32 where it is unknown.
        self_ensemble: Average over the eight flips and turns.
        levels: 255 or 65535 return whole numbers up to that (uint8, int32), which holds less memory; None floats.
        progress: Called with (parts done, parts in all).
        inform: Told in words how the map is run: "whole", "streamed, exact", "6 tiles, exact" or "6 tiles, blended".

    Returns:
        (B, C, scale * H, scale * W) on the CPU: float32 not clamped, or whole numbers clamped to `levels`; of a network
        that takes as many channels as `x` has and returns fewer (two views in, one picture out), with these.

    Raises:
        ValueError: `x` has another rank or no pixels, the tile is too small for its overlap, or the budget is too small
            for any tile.
        RuntimeError: The network's output is not finite in float32.
        torch.OutOfMemoryError: Even the smallest tile does not fit.
        OSError: The temporary files of a stream do not fit the disk.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"A map is (B, C, H, W) and not empty, got {tuple(x.shape)}.")
    scale, multiple_of = int(getattr(model, "scale", 1)), int(getattr(model, "multiple_of", 1))
    reach = getattr(model, "receptive_field", None)
    height, width = (math.ceil(side / multiple_of) * multiple_of for side in x.shape[-2:])
    if overlap is None:
        overlap = _DEFAULT_OVERLAP if reach is None else reach
    if overlap < 0:
        raise ValueError(f"overlap must be at least 0, got {overlap}.")
    overlap = math.ceil(overlap / multiple_of) * multiple_of
    exact = reach is not None and overlap >= reach
    device = next(model.parameters()).device
    plan = _first_plan(
        model, x, height, width, overlap, tile, budget, multiple_of, device, exact, levels, self_ensemble
    )
    was_training = model.training
    model.eval()
    try:
        while True:
            try:
                if isinstance(plan, StreamPlan):
                    if inform is not None:
                        inform("streamed, exact")
                    return _run_stream(model, x, plan, self_ensemble, levels, progress)
                if inform is not None:
                    tiles = f"{plan.count} tiles, {'exact' if exact else 'blended'}"
                    inform("whole" if plan.count == 1 else tiles)
                return _run_plan(model, x, plan, scale, exact, self_ensemble, levels, progress)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                smaller = _halved(plan, model, height, width, overlap, multiple_of)
                if smaller is None:
                    raise
                _log.warning("Out of memory with %s; trying %s.", _words(plan), _words(smaller))
                plan = smaller
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        model.train(was_training)


Plan = TilePlan | StreamPlan


def _halved(plan: Plan, model: nn.Module, height: int, width: int, overlap: int, multiple_of: int) -> Plan | None:
    """Return a plan that takes about half the memory, or None."""
    if isinstance(plan, StreamPlan):
        return StreamPlan(plan.memory // 2) if plan.memory // 2 >= _least_stream(model, height, width) else None
    return plan_tiles(height, width, overlap, plan.pixels // 2, multiple_of)


def _words(plan: Plan) -> str:
    return f"a stream of {_megabytes(plan.memory)}" if isinstance(plan, StreamPlan) else f"{plan.count} tiles"


def _least_stream(model: nn.Module, height: int, width: int) -> int:
    """Return the least memory for streaming, in bytes."""
    least: Any = model.stream_bytes
    return int(least(height, width))


def _first_plan(
    model: nn.Module,
    x: Tensor,
    height: int,
    width: int,
    overlap: int,
    tile: int | None,
    budget: int | float | str | None,
    multiple_of: int,
    device: torch.device,
    exact: bool,
    levels: int | None,
    self_ensemble: bool,
) -> Plan:
    """Choose by the side of tiles or by the budget."""
    if tile is not None:
        if tile >= max(height, width):
            return TilePlan((0, height), (0, width), overlap, height * width)
        own = (tile - 2 * overlap) // multiple_of * multiple_of
        if own < 1:
            raise ValueError(
                f"tile must be at least {2 * overlap + multiple_of}, more than twice the overlap {overlap}; got {tile}."
            )
        rows, columns = (_edges(side, math.ceil(side / own), multiple_of) for side in (height, width))
        return TilePlan(rows, columns, overlap, tile * tile)
    if budget is None:
        return TilePlan((0, height), (0, width), overlap, height * width)
    allowed = parse_bytes(budget)
    held = _held_bytes(device)
    if device.type == "cpu":  # the result, and once more in the picture made of it; sums of blended tiles are float32
        samples = x.shape[0] * _out_channels(model, x) * height * width * int(getattr(model, "scale", 1)) ** 2
        depth = {None: 4, 255: 1}.get(levels, 4)
        held += samples * (2 * depth + (0 if exact or levels is None else 4)) + _RUNTIME_BYTES
    itemsize = next(model.parameters()).element_size()
    per_pixel = int(getattr(model, "bytes_per_pixel", _DEFAULT_BYTES_PER_PIXEL) * itemsize / 4) * x.shape[0]
    if int(getattr(model, "in_chans", x.shape[1])) == 1:
        per_pixel *= x.shape[1]
    plan = plan_tiles(height, width, overlap, max(0, allowed - held) // per_pixel, multiple_of)
    if hasattr(model, "stream") and (plan is None or plan.count > 1):
        maps = 4 * x.shape[0] * x.shape[1] * height * width  # the image and its result in float32, and sums of them
        maps *= 1 + (4 if self_ensemble else 2) * int(getattr(model, "scale", 1)) ** 2 + int(self_ensemble)
        memory = allowed - held - (maps if device.type == "cpu" else 0)
        if memory >= _least_stream(model, height, width):
            return StreamPlan(memory)
    if plan is None:
        parts = [(side, _most_parts(side, overlap, multiple_of)) for side in (height, width)]
        smallest = [_tile_length(side, most, overlap, multiple_of) for side, most in parts]
        need = held + math.prod(smallest) * per_pixel
        raise ValueError(
            f"A budget of {_megabytes(allowed)} is too small for {x.shape[-1]}x{x.shape[-2]} pixels and "
            f"{type(model).__name__}: {_megabytes(held)} are needed beside the network's work; allow at least "
            f"{_megabytes(need)}."
        )
    return plan


def _megabytes(size: int) -> str:
    return f"{math.ceil(size / 1e6)} MB"


def _held_bytes(device: torch.device) -> int:
    """Memory in use: on the device, or of this process, without the pages of program files that it maps."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")  # how much of a library is resident varies by 200 MB
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _is_out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in said or "not enough memory" in said or "out of memory" in said
    )


@torch.no_grad()
def _run_plan(
    model: nn.Module,
    x: Tensor,
    plan: TilePlan,
    scale: int,
    exact: bool,
    self_ensemble: bool,
    levels: int | None,
    progress: Progress | None,
) -> Tensor:
    """Restore tile by tile into one output."""
    shape = (x.shape[0], _out_channels(model, x), scale * x.shape[2], scale * x.shape[3])
    blend = plan.count > 1 and not exact and plan.overlap > 0
    out = torch.zeros(shape) if blend else torch.empty(shape, dtype=_result_type(levels))
    rows, columns = (list(_spans(edges, plan.overlap, blend)) for edges in (plan.rows, plan.columns))
    done = 0
    for row in rows:
        for column in columns:
            tile = _run_tile(model, _cut(x, row, column), self_ensemble).cpu()
            top, left = scale * row.kept[0], scale * column.kept[0]
            bottom, right = min(scale * row.kept[1], shape[2]), min(scale * column.kept[1], shape[3])
            kept = tile[
                ...,
                top - scale * row.seen[0] : bottom - scale * row.seen[0],
                left - scale * column.seen[0] : right - scale * column.seen[0],
            ]
            if blend:
                weight = row.weight(scale)[: bottom - top, None] * column.weight(scale)[: right - left]
                out[..., top:bottom, left:right] += weight * kept
            else:
                out[..., top:bottom, left:right] = _round(kept, levels)
            done += 1
            if progress is not None:
                progress(done, plan.count)
    return _round(out, levels) if blend else out


@torch.no_grad()
def _run_stream(
    model: nn.Module,
    x: Tensor,
    plan: StreamPlan,
    self_ensemble: bool,
    levels: int | None,
    progress: Progress | None,
) -> Tensor:
    """Restore strip by strip; the map and the result stay where `x` is."""
    stream: Any = model.stream
    passes = 8 if self_ensemble else 1
    run = 0

    def tell(done: int, total: int) -> None:
        nonlocal run
        if progress is not None:
            progress(run * total + done, passes * total)
        run += done == total

    pixels = x if x.is_floating_point() else x.float() / torch.iinfo(x.dtype).max
    call = partial(stream, memory=plan.memory, progress=tell)
    return _round(_run_tile(model, pixels, self_ensemble, call).cpu(), levels)


@dataclass(frozen=True)
class _Span:
    """One tile along one axis, in input pixels: what it sees, what is kept of it, and where blending ends."""

    seen: tuple[int, int]
    kept: tuple[int, int]
    ramps: tuple[int, int]  # lengths of the blended zones at both ends

    def weight(self, scale: int) -> Tensor:
        """Weights of the kept output pixels; those of two neighbours add up to 1 in their common zone."""
        weight = torch.ones(scale * (self.kept[1] - self.kept[0]))
        for end, ramp in enumerate(scale * ramp for ramp in self.ramps):
            rise = (torch.arange(ramp) + 0.5) / ramp
            if ramp and end == 0:
                weight[:ramp] = rise
            elif ramp:
                weight[-ramp:] = rise.flip(0)
        return weight


def _spans(edges: tuple[int, ...], overlap: int, blend: bool) -> Iterator[_Span]:
    last, sizes = len(edges) - 2, [stop - start for start, stop in pairwise(edges)]
    for index, (start, stop) in enumerate(pairwise(edges)):
        seen = (max(start - overlap, 0), min(stop + overlap, edges[-1]))
        # blended zones must not meet in the middle of a tile: half of the narrower neighbour at most
        before = min(overlap, sizes[index - 1] // 2, sizes[index] // 2) if blend and index > 0 else 0
        after = min(overlap, sizes[index] // 2, sizes[index + 1] // 2) if blend and index < last else 0
        yield _Span(seen, (start - before, stop + after), (2 * before, 2 * after))


def _cut(x: Tensor, row: _Span, column: _Span) -> Tensor:
    """Cut what a tile sees as floating point, and mirror the image where a tile sees beyond its end."""
    part = x[..., row.seen[0] : row.seen[1], column.seen[0] : column.seen[1]]
    if not part.is_floating_point():
        part = part.float() / torch.iinfo(x.dtype).max
    missing = (row.seen[1] - row.seen[0] - part.shape[2], column.seen[1] - column.seen[0] - part.shape[3])
    if any(missing):
        rows, columns = (
            torch.tensor([_mirror(i, size) for i in range(size + extra)], device=x.device)
            for size, extra in zip(part.shape[-2:], missing, strict=True)
        )
        part = part.index_select(2, rows).index_select(3, columns)
    return part


def _mirror(index: int, size: int) -> int:
    """Reflect an index into [0, size) without repeating the border pixel; any distance, any size."""
    if size == 1:
        return 0
    index %= 2 * size - 2
    return index if index < size else 2 * size - 2 - index


def _result_type(levels: int | None) -> torch.dtype:
    return torch.float32 if levels is None else torch.uint8 if levels <= 255 else torch.int32


def _round(x: Tensor, levels: int | None) -> Tensor:
    if levels is None:
        return x
    return x.clamp(0, 1).mul_(levels).round_().to(_result_type(levels))


Call = Callable[[Tensor], Tensor]


def _run_tile(model: nn.Module, x: Tensor, self_ensemble: bool, call: Call | None = None) -> Tensor:
    """Restore one tile, (B, C, H, W) -> float32; again in float32 if the result is not finite.

    Args:
        model: The restorer.
        x: The tile.
        self_ensemble: Average over the eight flips and turns.
        call: Runs the network on a tile where it is; None runs the model on its device.
    """
    parameter = next(model.parameters())
    tile = x.to(parameter.device) if call is None else x
    result = _ensemble(model, tile.to(parameter.dtype), self_ensemble, call or model)
    if bool(torch.isfinite(result).all()):
        return result
    if parameter.dtype != torch.float32:
        _log.warning("The output in %s is not finite; computing this tile in float32.", parameter.dtype)
        with _as_float32(model):
            result = _ensemble(model, tile.float(), self_ensemble, call or model)
        if bool(torch.isfinite(result).all()):
            return result
    raise RuntimeError(f"The output of {type(model).__name__} is not finite: its weights or its input are broken.")


@contextmanager
def _as_float32(model: nn.Module) -> Iterator[None]:
    """Run a half-precision model in float32 for a while; its own tensors come back afterwards."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


def _ensemble(model: nn.Module, x: Tensor, self_ensemble: bool, call: Call) -> Tensor:
    """Run the network once, or average it over the eight symmetries of the square."""
    if not self_ensemble:
        return _run_channels(model, x, call).float()
    total: Tensor | None = None
    for turns in range(4):
        for flip in (False, True):
            turned = torch.rot90(x, turns, (2, 3))
            result = _run_channels(model, turned.flip(3) if flip else turned, call).float()
            result = torch.rot90(result.flip(3) if flip else result, -turns, (2, 3))
            total = result if total is None else total.add_(result)
    assert total is not None  # the loop runs
    return total.div_(8)


def _out_channels(model: nn.Module, x: Tensor) -> int:
    """Return the number of channels of the restored map: that of `x`, unless the network makes one picture of two."""
    given = x.shape[1]
    return int(getattr(model, "out_chans", given)) if getattr(model, "in_chans", None) == given else given


def _run_channels(model: nn.Module, x: Tensor, call: Call) -> Tensor:
    """Run the network on a map whose number of channels may not be the network's."""
    wanted, given = int(getattr(model, "in_chans", x.shape[1])), x.shape[1]
    if wanted == given:
        return call(x)
    if wanted == 1:
        return call(x.flatten(0, 1).unsqueeze(1)).unflatten(0, (x.shape[0], given)).squeeze(2)
    if given == 1 and wanted == 3:
        return call(x.expand(-1, wanted, -1, -1)).mean(1, keepdim=True)
    raise ValueError(f"{type(model).__name__} restores {wanted} channels, the map has {given}.")
