"""Run a restorer on a map of any size: whole, streamed or in tiles within a budget, self-ensemble, retries."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.engines import engine_of
from zoo.pictures.plans import Plan, Planner, Span, StreamPlan, TilePlan, out_channels, parse_bytes, plan_tiles, spans
from zoo.streaming.line import single_threads

__all__ = ["parse_bytes", "plan_tiles", "restore_tensor"]

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)


def restore_tensor(
    model: nn.Module,
    x: Tensor,
    *,
    budget: int | float | str | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    exact: bool = False,
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
    the whole map. Where exact tiles would more than double the work, tiles are blended over an eighth of their side
    instead, unless `exact` insists. What runs out of memory is tried again with half of it; what is not finite in half
    precision is computed again in float32.

    Args:
        model: Restorer with `scale` and `in_chans`, and if it has them `multiple_of`, `receptive_field`,
            `bytes_per_pixel` (working memory in bytes per input pixel, float32), `stream` and `stream_bytes`. It runs
            where its weights are and in their precision. A one-channel network restores each channel of `x` apart, a
            three-channel one gets gray maps three times.
        x: (B, C, H, W), floating point in [0, 1], uint8 or uint16; any device.
        budget: Memory that the process may hold in all (CPU), or on the device: bytes, or like "4GB"; None is no limit.
        tile: Side of the tiles with their overlap, in input pixels, instead of a choice by `budget`.
        overlap: Beyond each tile's own part, input pixels; None takes the receptive field, or 32 where it is unknown,
            or less where that more than doubles the work.
        exact: Insist on the whole map's result, whatever it costs.
        self_ensemble: Average over the eight flips and turns.
        levels: 255 or 65535 return whole numbers up to that (uint8, int32), which holds less memory; None floats.
        progress: Called with (parts done, parts in all).
        inform: Told in words how the map is run, before it is: "whole", "streamed, exact", "6 tiles, exact" or "6
            tiles, blended", with what exact tiles cost or would cost where they are dear; without it, that is logged.

    Returns:
        (B, C, scale * H, scale * W) on the CPU: float32 not clamped, or whole numbers clamped to `levels`; of a network
        that takes as many channels as `x` has and returns fewer (two views in, one picture out), with these.

    Raises:
        ValueError: `x` has another rank or no pixels, the tile is too small for its overlap, the budget is too small
            for any tile, or `exact` is asked of tiles that cannot be exact.
        RuntimeError: The network's output is not finite in float32.
        torch.OutOfMemoryError: Even the smallest tile does not fit.
        OSError: The temporary files of a stream do not fit the disk.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"A map is (B, C, H, W) and not empty, got {tuple(x.shape)}.")
    options: dict[str, Any] = dict(tile=tile, overlap=overlap, exact=exact, levels=levels, self_ensemble=self_ensemble)
    planner = Planner(model, x, **options)
    plan = planner.first(budget)
    tell = inform or (lambda words: _log.warning("%s.", words) if plan.is_notable else None)
    was_training = model.training
    model.eval()
    try:
        while True:
            try:
                tell(plan.words)
                if isinstance(plan, StreamPlan):
                    if plan.by_rows:
                        return _run_rows(model, x, plan, levels, progress)
                    return _run_stream(model, x, plan, self_ensemble, levels, progress)
                return _run_plan(model, x, plan, self_ensemble, levels, progress)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                smaller = planner.halved(plan)
                if smaller is None:
                    raise
                _log.warning("Out of memory with %s; trying %s.", _brief(plan), _brief(smaller))
                plan = smaller
            if next(model.parameters()).device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        model.train(was_training)


def _brief(plan: Plan) -> str:
    if isinstance(plan, TilePlan):
        return f"{plan.count} tiles"
    return "a stream" if plan.memory is None else f"a stream of {plan.memory / 1e6:.0f} MB"


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
    self_ensemble: bool,
    levels: int | None,
    progress: Progress | None,
) -> Tensor:
    """Restore tile by tile into one output."""
    scale = int(getattr(model, "scale", 1))
    shape = (x.shape[0], out_channels(model, x), scale * x.shape[2], scale * x.shape[3])
    blend = not plan.exact and plan.overlap > 0
    out = torch.zeros(shape) if blend else torch.empty(shape, dtype=_result_type(levels))
    engine = engine_of(model)
    rows, columns = (list(spans(edges, plan.overlap, blend, engine is not None)) for edges in (plan.rows, plan.columns))
    places = list(itertools.product(rows, columns))
    run = partial(_tile_at, model, x, self_ensemble)
    blocks = _blocks(model) if engine is None else []  # an engine tells of none
    parts = max(1, len(blocks)) * (8 if self_ensemble and blocks else 1)  # of a tile
    total = parts * plan.count
    if engine is not None and plan.count > 1:
        restored = _side_by_side(run, places)
    else:
        restored = _in_order(run, places, blocks, parts, progress)
    for done, ((row, column), tile) in enumerate(zip(places, restored, strict=True), 1):
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
        if progress is not None:
            progress(parts * done, total)
    return _round(out, levels) if blend else out


def _tile_at(model: nn.Module, x: Tensor, self_ensemble: bool, place: tuple[Span, Span]) -> Tensor:
    with torch.no_grad():  # a thread has its own setting
        return _run_tile(model, _cut(x, *place), self_ensemble).cpu()


def _in_order(
    run: Callable[[tuple[Span, Span]], Tensor],
    places: list[tuple[Span, Span]],
    blocks: list[nn.Module],
    parts: int,
    progress: Progress | None,
) -> Iterator[Tensor]:
    """Yield tiles in their order, one after the other; `progress` is told of blocks within each."""
    for index, place in enumerate(places):
        with _told(blocks, parts * index, parts, parts * len(places), progress):
            tile = run(place)
        yield tile


def _side_by_side(run: Callable[[tuple[Span, Span]], Tensor], places: list[tuple[Span, Span]]) -> Iterator[Tensor]:
    """Yield tiles in their order, as many at a time as there are threads, each on one thread.

    That keeps all cores busy where a network's own threads wait for each other at every layer.
    """
    workers = torch.get_num_threads()
    with single_threads():
        pool = ThreadPoolExecutor(workers)
        try:
            waiting: deque[Future[Tensor]] = deque()
            for place in places:
                waiting.append(pool.submit(run, place))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network, which share its time about evenly: the innermost members of its lists."""
    lists = [part for part in model.modules() if isinstance(part, (nn.Sequential, nn.ModuleList))]
    members = dict.fromkeys(member for part in lists for member in part)
    return [
        member
        for member in members
        if next(member.parameters(), None) is not None
        and not any(isinstance(part, (nn.Sequential, nn.ModuleList)) for part in member.modules())
    ]


@contextmanager
def _told(blocks: list[nn.Module], done: int, parts: int, total: int, progress: Progress | None) -> Iterator[None]:
    """Tell `progress` of each block that a tile has passed; the last part is the tile's own."""
    if progress is None or parts == 1:
        yield
        return
    passed = 0

    def tell(*_: object) -> None:
        nonlocal passed
        passed += 1
        if passed < parts:  # a tile that is computed again says nothing new
            progress(done + passed, total)

    handles = [block.register_forward_hook(tell) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _run_rows(model: nn.Module, x: Tensor, plan: StreamPlan, levels: int | None, progress: Progress | None) -> Tensor:
    """Restore strip by strip into the result, whose rows are rounded as they come."""
    scale, given = int(getattr(model, "scale", 1)), x.shape[1]
    wanted = int(getattr(model, "in_chans", given))
    out = torch.empty(x.shape[0], given, scale * x.shape[2], scale * x.shape[3], dtype=_result_type(levels))

    def write(image: int, first: int, rows: Tensor) -> None:
        if not bool(torch.isfinite(rows).all()):
            raise RuntimeError(_not_finite(model))
        rows = rows.cpu() if wanted == given else rows.cpu().mean(0, keepdim=True)  # a gray map went in three times
        out[image, :, first : first + rows.shape[1]] = _round(rows, levels)

    stream: Any = model.stream
    stream(x.expand(-1, wanted, -1, -1), memory=plan.memory, progress=progress, write=write)
    return out


def _cut(x: Tensor, row: Span, column: Span) -> Tensor:
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
    raise RuntimeError(_not_finite(model))


def _not_finite(model: nn.Module) -> str:
    return f"The output of {type(model).__name__} is not finite: its weights or its input are broken."


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


def _run_channels(model: nn.Module, x: Tensor, call: Call) -> Tensor:
    """Run the network on a map whose number of channels may not be the network's."""
    wanted, given = int(getattr(model, "in_chans", x.shape[1])), x.shape[1]
    if wanted == given:
        return call(x)
    if wanted == 1:
        return call(x.flatten(0, 1).unsqueeze(1)).unflatten(0, (x.shape[0], given)).squeeze(2)
    if given == 1 and wanted in (3, 4):
        return _run_channels(model, x.expand(-1, 3, -1, -1), call).mean(1, keepdim=True)
    if given == 3 and wanted == 4:  # colour and opacity: the picture is opaque here
        return call(torch.cat([x, torch.ones_like(x[:, :1])], 1))[:, :3]
    raise ValueError(f"{type(model).__name__} restores {wanted} channels, the map has {given}.")
