"""What a benchmark found, and its forms: JSON, Markdown, plot."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.bench.latency import Latency
from zoo.figures import new_figure

__all__ = [
    "MOST_NAMED",
    "SAME",
    "Benchmark",
    "Check",
    "Column",
    "Entry",
    "Goal",
    "Ratio",
    "can_plot",
    "columns",
    "dumps",
    "front",
    "markdown",
    "plot",
    "plot_ratios",
    "save_with_legend",
    "thin",
    "to_json",
]

SCHEMA = 1
"""Version of the JSON form."""

MOST_NAMED = 30
"""Points of a plot that are all named; of more, only those that no other beats."""


def now() -> str:
    """Return day and time, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast as the reference, over the rounds; each round gives one ratio.

    Args:
        median: Median of the rounds.
        p20: A fifth of the rounds gave less.
        p80: A fifth of the rounds gave more.
    """

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:
        if self == SAME:
            return "1"
        return f"{self.median:.2f}x ({self.p20:.2f} to {self.p80:.2f})"


SAME = Ratio(median=1.0, p20=1.0, p80=1.0)
"""Of a reference, where a table has several."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A comparison of outputs that had to hold before anything was timed.

    Args:
        what: What was compared.
        value: Largest absolute difference over the largest absolute output.
        tolerance: Most that is allowed.
    """

    what: str
    value: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A number to reach.

    Args:
        what: What is measured.
        value: What it is.
        wanted: What it should be.
        at_most: Smaller is better.
    """

    what: str
    value: float
    wanted: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """True if the measured value is as good as the wanted one."""
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        verdict = "reached" if self.reached else "NOT reached"
        return f"{self.what}: {self.value:.2f}, wanted {bound} {self.wanted:g}: {verdict}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line: a model, a formulation, or a setting of a cache.

    Args:
        name: What ran.
        time: Of one call.
        speedup: How many times as fast as the benchmark's reference; None for the reference itself.
        params: Parameters.
        macs: Multiply-accumulates of one call.
        peak_bytes: By how much memory grew during the call at most.
        values: Other measured numbers, by heading with unit: {"PSNR (dB)": 31.2}. Infinite is "no difference at all".
        series: Entries of one series are settings of one method; the plot joins them by a line.
        settings: What of several was chosen, by heading: {"engine": "openvino", "batch": 16}; columns of the table.
    """

    name: str
    time: Latency | None = None
    speedup: Ratio | None = None
    params: int | None = None
    macs: int | None = None
    peak_bytes: int | None = None
    values: dict[str, float] = field(default_factory=dict)
    series: str = ""
    settings: dict[str, str | int] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, timed: tuple[Latency, Ratio | None], **more: Any) -> Entry:
        """Return the line of what was timed, with other fields."""
        return cls(name=name, time=timed[0], speedup=timed[1], **more)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The result of one benchmark.

    Args:
        name: Short name, also of its files.
        title: What was compared, in words.
        conditions: Batch, data type, threads, rounds, ...
        environment: Processor, versions, ...
        date: Day and time, UTC, ISO 8601.
        reference: Name of the entry that the others' speed is compared with, or what the references have in common.
        entries: The lines, ours first.
        checks: Comparisons of outputs that held.
        goals: Numbers to reach.
        notes: What a reader has to know besides.
    """

    name: str
    title: str
    conditions: dict[str, Any]
    environment: dict[str, str]
    date: str = field(default_factory=now)
    reference: str | None
    entries: tuple[Entry, ...]
    checks: tuple[Check, ...] = ()
    goals: tuple[Goal, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: its heading and the text of an entry."""

    heading: str
    text: Callable[[Entry], str]


def columns(benchmark: Benchmark) -> list[Column]:
    """Return the columns of a benchmark's table: those for which some entry has a value."""
    entries = benchmark.entries
    reference = benchmark.reference
    headings = dict.fromkeys(key for entry in entries for key in entry.settings)
    varied = [key for key in headings if key == "model" or len({entry.settings.get(key) for entry in entries}) > 1]
    out = [_setting(heading) for heading in varied]
    out = out or [Column(heading="", text=lambda entry: entry.name)]
    if any(entry.time for entry in entries):
        out.append(Column(heading="median (ms)", text=lambda entry: _time(entry.time)))
        out.append(Column(heading="20 to 80 % (ms)", text=lambda entry: _spread(entry.time)))
    if any(entry.speedup for entry in entries):
        heading = f"times as fast as {reference}"
        out.append(
            Column(heading=heading, text=lambda entry: "1" if entry.name == reference else str(entry.speedup or "-"))
        )
    for heading, attribute, unit in (
        ("params (M)", "params", 1e6),
        ("GMACs", "macs", 1e9),
        ("peak memory (MiB)", "peak_bytes", 2**20),
    ):
        if any(getattr(entry, attribute) is not None for entry in entries):
            out.append(Column(heading=heading, text=_counted(attribute, unit)))
    for heading in _headings(benchmark):
        out.append(Column(heading=heading, text=_valued(heading)))
    return out


def _setting(heading: str) -> Column:
    return Column(heading=heading, text=lambda entry: str(entry.settings.get(heading, "-")))


def _headings(benchmark: Benchmark) -> list[str]:
    """Return the headings of all values, those of the entry with most of them first."""
    fullest = sorted(benchmark.entries, key=lambda entry: -len(entry.values))
    return list(dict.fromkeys(key for entry in fullest for key in entry.values))


def _time(time: Latency | None) -> str:
    return "-" if time is None else f"{time.median:.2f}" if time.median < 100 else f"{time.median:.0f}"


def _spread(time: Latency | None) -> str:
    if time is None:
        return "-"
    digits = 2 if time.median < 100 else 0
    return f"{time.p20:.{digits}f} to {time.p80:.{digits}f}"


def _counted(attribute: str, unit: float) -> Callable[[Entry], str]:
    def text(entry: Entry) -> str:
        value = getattr(entry, attribute)
        return "-" if value is None else f"{value / unit:.4g}"

    return text


def _valued(heading: str) -> Callable[[Entry], str]:
    def text(entry: Entry) -> str:
        value = entry.values.get(heading)
        return "-" if value is None or math.isnan(value) else "equal" if math.isinf(value) else f"{value:.4g}"

    return text


def to_json(benchmarks: Iterable[Benchmark]) -> dict[str, Any]:
    """Return plain data: `schema`, `benchmarks`; infinite values become None."""
    return {"schema": SCHEMA, "benchmarks": [_plain(benchmark) for benchmark in benchmarks]}


def _plain(benchmark: Benchmark) -> dict[str, Any]:
    data = dataclasses.asdict(benchmark)
    for plain, goal in zip(data["goals"], benchmark.goals, strict=True):
        plain["reached"] = goal.reached
    for entry in data["entries"]:
        entry["values"] = {key: value if math.isfinite(value) else None for key, value in entry["values"].items()}
    return data


def dumps(benchmarks: Iterable[Benchmark]) -> str:
    """Return the JSON form as text."""
    return json.dumps(to_json(benchmarks), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(benchmark: Benchmark) -> str:
    """Return a section for a Markdown page: conditions, table, goals, notes."""
    shown = columns(benchmark)
    lines = [f"## {benchmark.title}", "", facts(benchmark.conditions), "", facts(benchmark.environment), ""]
    lines.append("| " + " | ".join(column.heading for column in shown) + " |")
    lines.append("| --- |" + " ---: |" * (len(shown) - 1))
    for entry in benchmark.entries:
        lines.append("| " + " | ".join(column.text(entry).replace("|", "\\|") for column in shown) + " |")
    lines.append("")
    lines += [f"- {text}" for text in remarks(benchmark)]
    blank = all(entry.values and all(map(math.isnan, entry.values.values())) for entry in benchmark.entries)
    lines += ["", f"{'Written' if blank else 'Measured'} {benchmark.date} by `zoo bench`."]
    return "\n".join(lines) + "\n"


def facts(values: dict[str, Any]) -> str:
    """Return "batch 4, dtype float32, ..."."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def remarks(benchmark: Benchmark) -> list[str]:
    """Return goals, checks and notes as sentences."""
    checks = [
        f"Checked first: {check.what}, largest relative difference {check.value:.1e} (allowed {check.tolerance:.0e})."
        for check in benchmark.checks
    ]
    return [f"{goal}." for goal in benchmark.goals] + checks + list(benchmark.notes)


def plot(benchmark: Benchmark, path: str | Path) -> Path:
    """Draw quality, or work, against time, and write a PNG or SVG by the suffix of `path`.

    The quality is the first of `values` that at least two entries have; without one, it is the MACs. Entries of one
    series are joined. Where the quality is an accuracy, or there are many entries, those that no other beats in both
    are joined too; of many entries only these are named.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Fewer than two entries have both numbers, or the suffix is no picture format.
    """
    label, points = _points(benchmark)
    figure = new_figure(7.6, 5.0)
    axes = figure.add_subplot()
    crowded = len(points) > MOST_NAMED
    best = front([(x, y) for _, x, y in points])
    names: list[tuple[int, Any]] = []
    all_merged = len(points) > 3 and all(entry.name.endswith(" (merged)") for entry, _, _ in points)
    for index, series in enumerate(dict.fromkeys(entry.series for entry, _, _ in points)):
        own = [
            (x, y, _short_name(entry.name.removesuffix(" (merged)" if all_merged else ""), series))
            for entry, x, y in points
            if entry.series == series
        ]
        style: dict[str, Any] = dict(color=f"C{index % 10}", marker="os^Dv"[index // 10 % 5], label=series or None)
        if crowded:
            style |= dict(markersize=4, linewidth=0.8)
        axes.plot(
            [x for x, _, _ in own],
            [y for _, y, _ in own],
            linestyle="-" if series else "",
            **style,
        )
        for x, y, name in own:
            if crowded and (x, y) not in best:
                continue
            names.append((len(own), axes.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)))
    if crowded or "top-1" in label or "accuracy" in label:
        axes.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0, label="not beaten in both")
    threads = f"{benchmark.conditions.get('threads', '?')} threads"
    axes.set_xlabel(f"time of one call, median (ms) — {benchmark.environment['device']}, {threads}", fontsize=9)
    axes.set_ylabel(label)
    axes.set_title(benchmark.title, fontsize=10)
    times = [x for _, x, _ in points]
    if max(times) > 20 * min(times):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.margins(x=0.15, y=0.12)
    axes.grid(alpha=0.3)
    count = len(axes.get_legend_handles_labels()[0])
    if count > 6:
        figure.set_size_inches(10.2, 5.4)
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    elif count:
        axes.legend(fontsize=8)
    thin([name for _, name in sorted(names, key=lambda each: each[0])], figure)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def thin(names: Sequence[Any], figure: Any) -> None:
    """Remove names of points that would cover an earlier one."""
    figure.canvas.draw()
    kept: list[Any] = []
    for name in names:
        box = name.get_window_extent()
        if any(box.overlaps(other) for other in kept):
            name.remove()
        else:
            kept.append(box)


def plot_ratios(benchmarks: Iterable[Benchmark], path: str | Path) -> Path:
    """Draw how many times as fast the entries are as their rivals, one bar each, and write a PNG or SVG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No entry was compared, or the suffix is no picture format.
    """
    panels = [(each, [entry for entry in each.entries if entry.speedup is not None]) for each in benchmarks]
    panels = [(each, entries) for each, entries in panels if entries]
    if not panels:
        raise ValueError("There is nothing to plot: no entry was compared with a rival.")
    lines = [len(entries) for _, entries in panels]
    figure = new_figure(8.6, 1.2 * len(panels) + 0.28 * sum(lines))
    for axes, (each, entries) in zip(
        figure.subplots(len(panels), squeeze=False, height_ratios=lines)[:, 0], panels, strict=True
    ):
        for line, entry in enumerate(entries):
            ratio = entry.speedup
            assert ratio is not None
            spread = [[max(ratio.median - ratio.p20, 0)], [max(ratio.p80 - ratio.median, 0)]]
            axes.barh(line, ratio.median, xerr=spread, color="C0" if ratio.median >= 1 else "C1", ecolor="0.3")
        axes.set_yticks(range(len(entries)), [entry.name for entry in entries], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="0.2", linewidth=1)
        axes.set_xlabel(f"times as fast as {each.reference} — {each.environment['device']}", fontsize=8)
        axes.set_title(each.title, fontsize=10)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def save_with_legend(figure: Any, path: str | Path, **legend: Any) -> Path:
    """Write a figure whose panels have one legend together, each label once; PNG or SVG by the suffix.

    Args:
        figure: From `new_figure`.
        path: Where to.
        **legend: Arguments of `figure.legend`: loc, ncols, fontsize.
    """
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), frameon=False, **legend)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def _short_name(name: str, series: str) -> str:
    """Return an entry's name without that of its series, which the legend tells."""
    for separator in (", ", "_"):
        name = name.removeprefix(f"{series}{separator}")
    return name


def can_plot(benchmark: Benchmark) -> bool:
    """Return whether `plot` finds two entries with both numbers."""
    try:
        _points(benchmark)
    except ValueError:
        return False
    return True


def _points(benchmark: Benchmark) -> tuple[str, list[tuple[Entry, float, float]]]:
    """Return the label of the second axis and (entry, time, quality) of all that have both."""
    timed = [(entry, entry.time.median) for entry in benchmark.entries if entry.time is not None]
    for heading in _headings(benchmark):
        found = [(entry, x, entry.values[heading]) for entry, x in timed if heading in entry.values]
        found = [point for point in found if math.isfinite(point[2])]
        if len(found) > 1:
            return heading, found
    found = [(entry, x, entry.macs / 1e9) for entry, x in timed if entry.macs is not None]
    if len(found) > 1:
        return "GMACs of one call", found
    found = [(entry, x, entry.params / 1e6) for entry, x in timed if entry.params is not None]
    if len(found) > 1:
        return "parameters (M)", found
    raise ValueError(f"There is nothing to plot: {benchmark.title} has no two entries with a time and another number.")


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (time, quality) that no faster point equals in quality, fastest first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best
