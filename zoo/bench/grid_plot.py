"""The picture of `zoo.bench.grid`: quality against the time of one image, a panel for each batch and threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.bench.report import MOST_NAMED, Benchmark, Entry, front, save_with_legend, thin
from zoo.figures import new_figure
from zoo.text import counted

__all__ = ["plot_grid"]

_MARKERS = "o^sD"


def plot_grid(benchmark: Benchmark, path: str | Path) -> Path:
    """Draw quality against the time of one image, and write a PNG or SVG by the suffix of `path`.

    The quality is a top-1 accuracy where models differ in it, else the work of one image. Colours are engines, markers
    precisions; the points of one model are joined and named once, at the fastest. What no other beats in both is joined
    too; of many models only these are named. One model alone has no quality to compare: its images a second stand
    against the time of one call.

    Args:
        benchmark: Of `compare_grid`.
        path: Where to.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The suffix is no picture format.
    """
    entries = [entry for entry in benchmark.entries if entry.time is not None]
    label, quality = _quality(entries)
    panels: dict[Any, list[Entry]] = {}
    for entry in entries:
        key = (entry.settings["batch"], entry.settings["threads"]) if quality else ()
        panels.setdefault(key, []).append(entry)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(7.6, 5.6 * columns), 4.2 * rows + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    styles = _styles(entries)
    for axes, key in zip(grid.flat, panels, strict=False):
        points = [(entry, *_point(entry, quality)) for entry in panels[key]]
        names = _draw(axes, points, styles, one_model=quality is None)
        axes.set_xlabel("time of one image (ms)" if quality else "time of one call (ms)", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        if key:
            axes.set_title(f"batch {key[0]}, {counted(key[1], 'thread')}", fontsize=9)
        thin(names, figure)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{benchmark.title} — {benchmark.environment['device']}", fontsize=10)
    return save_with_legend(figure, path, loc="outside lower center", ncols=4, fontsize=8)


def _quality(entries: Sequence[Entry]) -> tuple[str, dict[int, float] | None]:
    """Return the label of the second axis, and the quality by the identity of an entry; None where all are alike."""
    headings = dict.fromkeys(key for entry in entries for key in entry.values if key.startswith("top-1"))
    for heading in sorted(headings, key=lambda text: not text.startswith("top-1 of")):  # measured before published
        found = {id(entry): entry.values[heading] for entry in entries if heading in entry.values}
        if len(set(found.values())) > 1 and len(found) == len(entries):
            return heading, found
    work = {id(entry): entry.macs / int(entry.settings["batch"]) / 1e9 for entry in entries if entry.macs is not None}
    if len(set(work.values())) > 1 and len(work) == len(entries):
        return "GMACs of one image", work
    return "images/s", None


def _point(entry: Entry, quality: dict[int, float] | None) -> tuple[float, float]:
    assert entry.time is not None
    batch = int(entry.settings["batch"])
    if quality is None:
        return entry.time.median, 1e3 * batch / entry.time.median
    return entry.time.median / batch, quality[id(entry)]


def _styles(entries: Sequence[Entry]) -> dict[tuple[Any, Any], dict[str, Any]]:
    engines = list(dict.fromkeys(entry.settings["engine"] for entry in entries))
    precisions = list(dict.fromkeys(entry.settings["precision"] for entry in entries))
    return {
        (engine, precision): dict(
            color=f"C{engines.index(engine)}",
            marker=_MARKERS[precisions.index(precision) % len(_MARKERS)],
            label=f"{engine}, {precision}" if len(precisions) > 1 else str(engine),
        )
        for engine in engines
        for precision in precisions
    }


def _decimals() -> Any:
    """Return a formatter of minor ticks that writes 0.6 where matplotlib's own writes 6e-01."""
    from matplotlib.ticker import LogFormatter

    class Decimals(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return Decimals(labelOnlyBase=False, minor_thresholds=(1.5, 0.4))


def _draw(
    axes: Any, points: Sequence[tuple[Entry, float, float]], styles: dict[tuple[Any, Any], Any], *, one_model: bool
) -> list[Any]:
    """Draw one panel and return the names of its points, the most important first."""
    best = front([(x, y) for _, x, y in points])
    crowded = len(points) > MOST_NAMED
    for entry, x, y in points:
        style = styles[entry.settings["engine"], entry.settings["precision"]]
        axes.plot([x], [y], linestyle="", markersize=4 if crowded else 6, **style)
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color="0.55", linewidth=1, zorder=0, label="not beaten in both")
    times = [x for _, x, _ in points]
    span = max(2.0, max(times) / min(times))
    axes.set_xscale("log")
    axes.set_xlim(min(times) / span**0.42, max(times) * span**0.08)  # names stand to the left of their points
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(_decimals())
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    named: list[tuple[bool, Any]] = []
    groups: dict[str, list[tuple[Entry, float, float]]] = {}
    for point in points:
        entry = point[0]
        batch, threads = entry.settings["batch"], entry.settings["threads"]
        text = f"{batch} at once, {counted(int(threads), 'thread')}" if one_model else str(entry.settings["model"])
        groups.setdefault(text.removesuffix(" (merged)"), []).append(point)
    for text, own in groups.items():
        own = sorted(own, key=lambda point: point[1])
        if not one_model:
            axes.plot([x for _, x, _ in own], [y for _, _, y in own], color="0.8", linewidth=0.8, zorder=-1)
        _, x, y = own[0]
        ahead = (x, y) in best
        if crowded and len(groups) > MOST_NAMED and not ahead:
            continue
        label = axes.annotate(text, (x, y), xytext=(-5, 3), textcoords="offset points", fontsize=8, ha="right")
        named.append((not ahead, label))
    return [name for _, name in sorted(named, key=lambda each: each[0])]
