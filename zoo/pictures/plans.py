"""How a map of any size is run: whole, streamed, or in which tiles, and what exact tiles would cost."""

from __future__ import annotations

import math
import numbers
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.engines import ENGINES, engine_of
from zoo.engines.call import torch_threads

__all__ = ["Plan", "Planner", "Span", "StreamPlan", "TilePlan", "out_channels", "parse_bytes", "plan_tiles", "spans"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_DEFAULT_BYTES_PER_PIXEL = 16_384  # of a restorer that does not say: generous for 64-channel networks
_DEFAULT_OVERLAP = 32  # of a restorer whose receptive field is unknown or the whole image, input pixels
_RUNTIME_BYTES = 96 * 10**6  # what the maths libraries take on their first use
_DEAR = 2.0  # times the work of the whole map from which tiles are blended over less, unless exact ones are asked for
_BLENDED_PART = 8  # overlap of such tiles, as a part of their side: less than twice the work where they are many
_ENGINE_BYTES = 4  # times the memory of eager PyTorch that another runtime works in: 3.3 measured on CFSR
_ENGINE_SIDE = 64  # of the map on which it is built, input pixels
_STREAMED = 512 * 512  # pixels from which a stream of rows is taken before whole maps: as fast on each thread, and even
_LEAST_TILE = 64  # side of the smallest blended tiles that a budget chooses, input pixels


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
        reach: Overlap from which tiles give the whole map's result; None where none does.
        avoided: Times the work of the whole map that exact tiles would be, where these blended ones stand in for them.
        remark: What else is to be said of them.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    overlap: int
    pixels: int
    reach: int | None = None
    avoided: float | None = None
    remark: str = ""

    @property
    def count(self) -> int:
        """Number of tiles."""
        return (len(self.rows) - 1) * (len(self.columns) - 1)

    @property
    def exact(self) -> bool:
        """Whether the result is that of the whole map."""
        return self.count == 1 or (self.reach is not None and self.overlap >= self.reach)

    @property
    def work(self) -> float:
        """Pixels that are computed over those of the map."""
        seen = ([span.seen for span in spans(edges, self.overlap, False)] for edges in (self.rows, self.columns))
        lengths = [sum(last - first for first, last in axis) for axis in seen]
        return math.prod(lengths) / (self.rows[-1] * self.columns[-1])

    @property
    def is_notable(self) -> bool:
        """Whether the user should know before: exact tiles are dear, or blended ones stand in for them."""
        return self.avoided is not None or bool(self.remark) or (self.count > 1 and self.exact and self.work > _DEAR)

    @property
    def words(self) -> str:
        """How the map is run, in words."""
        if self.count == 1:
            return "whole"
        said = f"{self.count} tiles, {'exact' if self.exact else 'blended'}"
        if self.avoided is not None:
            said += f" over {self.overlap} pixels"
            if math.isfinite(self.avoided):
                said += f"; exact ones would be {self.avoided:.1f} times the work of the whole picture"
        elif self.exact and self.work > _DEAR:
            said += f", {self.work:.1f} times the work of the whole picture"
        return said + self.remark


@dataclass(frozen=True)
class StreamPlan:
    """How a map is streamed through a restorer that has `stream`.

    Args:
        memory: Most bytes that the stream may hold beside the map and the result; None is no limit.
        by_rows: It hands out its result by rows, so that no whole one in floating point is held.
    """

    memory: int | None
    by_rows: bool = False
    is_notable: ClassVar[bool] = False
    words: ClassVar[str] = "streamed, exact"


Plan = TilePlan | StreamPlan


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


@dataclass(frozen=True)
class Span:
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


def spans(edges: tuple[int, ...], overlap: int, blend: bool, alike: bool = False) -> Iterator[Span]:
    """Yield the tiles along one axis; alike: all see equally much, those at the ends more of their inner side."""
    if alike:
        found = list(spans(edges, overlap, blend))
        longest = max(span.seen[1] - span.seen[0] for span in found)
        starts = (min(span.seen[0], edges[-1] - longest) for span in found)
        yield from (replace(span, seen=(start, start + longest)) for span, start in zip(found, starts, strict=True))
        return
    last, sizes = len(edges) - 2, [stop - start for start, stop in pairwise(edges)]
    for index, (start, stop) in enumerate(pairwise(edges)):
        seen = (max(start - overlap, 0), min(stop + overlap, edges[-1]))
        # blended zones must not meet in the middle of a tile: half of the narrower neighbour at most
        before = min(overlap, sizes[index - 1] // 2, sizes[index] // 2) if blend and index > 0 else 0
        after = min(overlap, sizes[index] // 2, sizes[index + 1] // 2) if blend and index < last else 0
        yield Span(seen, (start - before, stop + after), (2 * before, 2 * after))


class Planner:
    """Choose how a restorer runs a map; arguments as in `zoo.pictures.tiling.restore_tensor`.

    Raises:
        ValueError: The tile or the overlap is no whole number, the overlap is negative, or it or the network is not
            exact where `exact` is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        exact: bool = False,
        levels: int | None = None,
        self_ensemble: bool = False,
    ) -> None:
        for option, value in (("tile", tile), ("overlap", overlap)):
            if value is not None and not isinstance(value, numbers.Integral):
                raise ValueError(f"{option} must be a whole number of pixels, got {value!r}.")
        self.model, self.x, self.tile, self.insist = model, x, tile, exact
        self.levels, self.passes = levels, 8 if self_ensemble else 1
        self.workers = torch.get_num_threads() if engine_of(model) is not None else 1  # tiles at once, a thread each
        self.step = int(getattr(model, "multiple_of", 1))
        self.tiling = str(getattr(model, "tiling", "supported"))
        self.name = str(getattr(model, "name", type(model).__name__))
        self.height, self.width = (self._up(side) for side in x.shape[-2:])
        reach = getattr(model, "receptive_field", None)
        self.reach = None if reach is None else self._up(reach)
        if overlap is not None and overlap < 0:
            raise ValueError(f"overlap must be at least 0, got {overlap}.")
        self.is_named = overlap is not None
        usual = _DEFAULT_OVERLAP * (2 if self.tiling == "discouraged" else 1)
        self.overlap = self._up(overlap if overlap is not None else usual if reach is None else reach)
        if exact and self.is_named and self.reach is not None and self.overlap < self.reach:
            raise ValueError(f"An overlap of {overlap} is not exact for {self.name}: give at least {self.reach}.")

    def first(self, budget: int | float | str | None) -> Plan:
        """Return the plan for a budget, or for the tiles that are asked for.

        Raises:
            ValueError: The tile is too small for its overlap, the budget for any tile, or tiles cannot be exact.
        """
        whole = TilePlan((0, self.height), (0, self.width), self.overlap, self.height * self.width, self.reach)
        if (self.tile or 0) >= max(self.height, self.width) or self.tiling == "internal":
            return whole  # "internal": the network cuts the map itself
        if self.tile is not None:
            self._require_exact_tiles(f"tiles of {self.tile} pixels")
            plan = self._choose(None)
            if plan is None:
                least = 2 * self.overlap + self.step if self.is_named or self.insist else self.step + 2 * self._up(1)
                beyond = f", more than twice the overlap {self.overlap}" if self.is_named or self.insist else ""
                raise ValueError(f"tile must be at least {least}{beyond}; got {self.tile}.")
            return plan
        by_rows = self._streams_rows()
        rather = by_rows and whole.pixels >= _STREAMED and self._device.type == "cpu"
        if budget is None:
            return StreamPlan(None, True) if rather else whole
        allowed = parse_bytes(budget)
        self._build_engine()
        if not rather and whole.pixels * self._pixel_bytes() <= allowed - self._held(blended=False):
            return whole
        if self._streams():
            memory = allowed - self._held(blended=False) - (0 if by_rows else self._stream_maps())
            if memory >= self._least_stream():
                return StreamPlan(memory, by_rows)
        self._require_exact_tiles(f"tiles within {_megabytes(allowed)}")
        plan = self._choose(allowed)
        if plan is None:
            held, pixels = self._held(blended=True), self._least_pixels()
            raise ValueError(
                f"A budget of {_megabytes(allowed)} is too small for {self.x.shape[-1]}x{self.x.shape[-2]} pixels and "
                f"{self.name}: {_megabytes(held)} are needed beside the network's work; allow at least "
                f"{_megabytes(held + pixels * self._pixel_bytes())}."
            )
        return plan

    def halved(self, plan: Plan) -> Plan | None:
        """Return a plan that takes about half the memory, or None."""
        if isinstance(plan, StreamPlan):
            least = self._least_stream()
            memory = 2 * least if plan.memory is None else plan.memory // 2
            return replace(plan, memory=memory) if memory >= least else None
        if self.insist and self.reach is None:
            return None
        return self._choose(None, plan.pixels // 2)

    def _choose(self, allowed: int | None, pixels: int | None = None) -> TilePlan | None:
        """Return exact tiles, or blended ones where those are dear and nobody insists: of a side, or within a bound."""
        plan = self._cut(self.overlap, allowed, pixels)
        if self.is_named or self.insist or (plan is not None and plan.work <= _DEAR):
            return plan
        side = self.tile if allowed is None and pixels is None else None
        if side is None:
            side = math.isqrt(self._pixels(allowed, blended=True) if pixels is None else pixels)
            if side < _LEAST_TILE:
                return plan
        less = min(self._up(max(1, side // _BLENDED_PART)), self.overlap)
        blended = self._cut(less, allowed, pixels) if less < self.overlap else None
        if blended is None:
            return plan
        return replace(blended, avoided=math.inf if plan is None or self.reach is None else plan.work)

    def _cut(self, overlap: int, allowed: int | None, pixels: int | None) -> TilePlan | None:
        if allowed is None and pixels is None:
            assert self.tile is not None  # for the type checker: there is no other bound
            own = (self.tile - 2 * overlap) // self.step * self.step
            if own < 1:
                return None
            rows, columns = (_edges(side, math.ceil(side / own), self.step) for side in (self.height, self.width))
            plan: TilePlan | None = TilePlan(rows, columns, overlap, self.tile**2)
        else:
            is_exact = self.reach is not None and overlap >= self.reach
            bound = self._pixels(allowed, blended=not is_exact) if pixels is None else pixels
            plan = plan_tiles(self.height, self.width, overlap, bound, self.step)
        if plan is None:
            return None
        remark = f"; tiles are discouraged for {self.name}" if self.tiling == "discouraged" and plan.count > 1 else ""
        return replace(plan, reach=self.reach, remark=remark)

    def _require_exact_tiles(self, what: str) -> None:
        if self.insist and self.reach is None:
            need = _megabytes(self._held(blended=False) + self.height * self.width * self._pixel_bytes())
            raise ValueError(
                f"{self.name} looks at the whole picture, so that {what} cannot be exact: leave out exact, or restore "
                f"{self.x.shape[-1]}x{self.x.shape[-2]} pixels whole, which takes {need}."
            )

    def _pixels(self, allowed: int | None, *, blended: bool) -> int:
        assert allowed is not None  # for the type checker: called where there is a budget
        return max(0, allowed - self._held(blended=blended)) // self._pixel_bytes()

    def _least_pixels(self) -> int:
        """Return the pixels of the smallest tile that a budget may choose."""
        parts = [(side, _most_parts(side, self.overlap, self.step)) for side in (self.height, self.width)]
        smallest = math.prod(_tile_length(side, most, self.overlap, self.step) for side, most in parts)
        if self.is_named or self.insist:
            return smallest
        return min(smallest, (_LEAST_TILE + 2 * self.step) ** 2)

    def _up(self, length: int) -> int:
        return math.ceil(length / self.step) * self.step

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _held(self, *, blended: bool) -> int:
        """Return the bytes in use, and those of the result and of the picture made of it."""
        held = held_bytes(self._device)
        if self._device.type == "cpu":  # sums of blended tiles are float32
            scale = int(getattr(self.model, "scale", 1))
            samples = self.x.shape[0] * out_channels(self.model, self.x) * self.height * self.width * scale**2
            depth = {None: 4, 255: 1}.get(self.levels, 4)
            blended = (blended or self.reach is None) and self.levels is not None
            held += samples * (2 * depth + (4 if blended else 0)) + _RUNTIME_BYTES
        return held

    def _pixel_bytes(self) -> int:
        """Return the network's working memory for each input pixel."""
        itemsize, channels = next(self.model.parameters()).element_size(), self.x.shape[1]
        stated = getattr(self.model, "bytes_per_pixel", _DEFAULT_BYTES_PER_PIXEL)
        if engine_of(self.model) is not None:
            stated *= _ENGINE_BYTES * self.workers
        apart = channels if int(getattr(self.model, "in_chans", channels)) == 1 else 1
        return int(stated * itemsize / 4) * self.x.shape[0] * apart

    def _build_engine(self) -> None:
        """Build an engine that takes any size before what is held is counted: its tools stay in memory, 150 MB."""
        call = engine_of(self.model)
        if call is None or not getattr(ENGINES.get(call.engine), "open_shapes", False) or self.reach is None:
            return
        side, channels = self._up(_ENGINE_SIDE), int(getattr(self.model, "in_chans", self.x.shape[1]))
        with torch.no_grad(), torch_threads(1):
            self.model(torch.rand(self.x.shape[0], channels, side, side))

    def _streams(self) -> bool:
        """Whether the network can be streamed: it has the method, and its layers are its own."""
        can = hasattr(self.model, "stream") and (engine_of(self.model) is None or self.reach is None)
        return can and getattr(self.model, "foreign_part", lambda: None)() is None

    def _streams_rows(self) -> bool:
        """Whether its stream hands out rows of the result, float32: of a picture of its channels or of a gray one."""
        fits = getattr(self.model, "in_chans", None) in (self.x.shape[1], self.x.shape[1] * 3)
        single = next(self.model.parameters()).dtype == torch.float32 and self.passes == 1
        return getattr(self.model, "streams_rows", False) and fits and single and self._streams()

    def _least_stream(self) -> int:
        least: Any = self.model.stream_bytes
        return int(least(self.height, self.width))

    def _stream_maps(self) -> int:
        """Return the bytes of the image and its result in float32, and of sums of them."""
        if self._device.type != "cpu":
            return 0
        maps = 4 * self.x.shape[0] * self.x.shape[1] * self.height * self.width
        scale = int(getattr(self.model, "scale", 1))
        return maps * (1 + (4 if self.passes > 1 else 2) * scale**2 + int(self.passes > 1))


def _megabytes(size: int) -> str:
    return f"{math.ceil(size / 1e6)} MB"


def held_bytes(device: torch.device) -> int:
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


def out_channels(model: nn.Module, x: Tensor) -> int:
    """Return the number of channels of the restored map: that of `x`, unless the network makes one picture of two."""
    given = x.shape[1]
    return int(getattr(model, "out_chans", given)) if getattr(model, "in_chans", None) == given else given
