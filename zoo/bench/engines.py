"""Every backbone family and CFSR on every engine against eager PyTorch: speed, loss, and the goals of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zoo.bench.grid import PRECISIONS, Grid, compare_grid, refusal
from zoo.bench.report import Benchmark, Entry, Goal, save_with_legend
from zoo.bench.timing import Progress, Settings
from zoo.data.labelled_images import has_parquet
from zoo.engines import installed
from zoo.figures import new_figure
from zoo.text import counted

__all__ = ["engines", "plot_families"]

_FAMILIES = ("efficientvit_msra_m0", "emov2_1m", "lsnet_t", "repavit_small", "ffnet_1", "affnet_et")
_MEANT = _FAMILIES[:5]  # of the geometric mean
_TRAINED = ("emov2_1m.cifar10", "affnet_et.cifar10", "repavit_tiny.cifar10")
_WANTED = {1: 2.5, 16: 1.5}  # batch -> geometric mean of the best engine, times as fast as eager
_LARGE = ("repavit_base", "vit_base_patch16_224")
_WANTED_LARGE, _WANTED_EQUAL = 2.0, 1.6  # in int8 or bf16 against the rival's fp32; in equal precision
_WANTED_RESTORER = 1.4
_OWN = ("eager", "auto")  # no engine of its own


def engines(
    settings: Settings,
    progress: Progress | None = None,
    *,
    families: Sequence[str] = _FAMILIES,
    restorer: str | None = "cfsr_x2.bsds",
    large: tuple[str, str] | None = _LARGE,
    trained: Sequence[str] = _TRAINED,
    size: int | None = None,
    engines: Sequence[str] = (),
    precisions: Sequence[str] = (),
    batches: Sequence[int] = tuple(_WANTED),
    threads: Sequence[int] = (1, 2),
    data: str | None = None,
    samples: int = 256,
) -> list[Benchmark]:
    """Time each family on each engine; wanted: the best 2.5 times as fast as eager at batch 1, 1.5 times at batch 16.

    Args:
        settings: Rounds.
        progress: Told after each step.
        families: Backbones, each in turns with itself on all engines.
        restorer: Measured at batch 1; None for none.
        large: A backbone and its rival, measured at the first batch only; None for none.
        trained: Classifiers whose accuracy is measured where there are data.
        size: Height and width of all inputs in pixels; None is each model's own (the restorer: 256).
        engines: None for all that are installed, and auto.
        precisions: None for all that some engine runs here.
        batches: Inputs of one call.
        threads: CPU threads.
        data: Labelled images for the trained classifiers, and pictures that int8 on engines is calibrated with.
        samples: Images of these at most.
    """
    chosen = tuple(engines) or (*installed(), "auto")
    every = tuple(precisions) or tuple(
        each for each in PRECISIONS if each != "fp16" and any(not refusal(engine, each) for engine in chosen)
    )
    grid = Grid(engines=chosen, precisions=every, batches=tuple(batches), threads=tuple(threads))
    pictures = data if "int8" in every and size is None else None  # that int8 on engines is calibrated with
    found = [compare_grid([name], grid, settings, size=size, data=pictures, progress=progress) for name in families]
    if restorer is not None:
        alone = replace(grid, batches=(1,))
        files = None if pictures is None or has_parquet(pictures) else pictures
        found.append(compare_grid([restorer], alone, settings, size=size, data=files, progress=progress))
    results = [_at(found, batch, pool, families) for batch in grid.batches for pool in grid.threads]
    if large is not None:
        named = tuple(engine for engine in grid.engines if engine != "auto") or grid.engines
        one = replace(grid, batches=grid.batches[:1], engines=named)
        compared = compare_grid(list(large), one, settings, size=size, data=pictures, progress=progress)
        goals = [
            goal
            for pool in one.threads
            for goal in _large_goals(
                _entries([compared], one.batches[0], pool), f"batch {one.batches[0]}, {counted(pool, 'thread')}"
            )
        ]
        results.append(replace(compared, name="engines_large", goals=tuple(goals)))
    if data is not None:
        one = replace(grid, batches=grid.batches[-1:], threads=grid.threads[:1])
        judged = compare_grid(trained, one, settings, data=data, samples=samples, progress=progress)
        results.append(replace(judged, name="engines_trained"))
    said = " ".join(
        ["zoo bench engines"]
        + [f"--{option} {','.join(map(str, values))}" for option, values in (
            ("engine", grid.engines), ("precision", grid.precisions), ("batch", grid.batches), ("threads", grid.threads)
        )]
        + [f"--rounds {settings.rounds}", *(["--data DIR", f"--samples {samples}"] if data is not None else [])]
    )  # fmt: skip
    without = [word for word, what in (("restorer", restorer), ("large", large)) if what is None]
    said = f"Measured by `{said}`{', in Python with ' if without else ''}" + " and ".join(f"{x}=None" for x in without)
    return [replace(result, notes=(*result.notes, f"{said}.")) for result in results]


def _entries(found: Sequence[Benchmark], batch: int, threads: int) -> list[Entry]:
    """Return the lines of one batch and number of threads."""
    return [
        replace(entry, name=", ".join(str(entry.settings[key]) for key in ("model", "engine", "precision")))
        for benchmark in found
        for entry in benchmark.entries
        if (entry.settings["batch"], entry.settings["threads"]) == (batch, threads)
    ]


def _at(found: Sequence[Benchmark], batch: int, threads: int, families: Sequence[str]) -> Benchmark:
    """Return one table of all families, with its goals."""
    entries = _entries(found, batch, threads)
    first = found[0]
    inputs, precisions = (dict.fromkeys(entry.settings[key] for entry in entries) for key in ("input", "precision"))
    # one busy moment is enough to know of, and what auto takes stands in a column
    said = [note for result in found for note in result.notes if ": auto takes " not in note]
    notes = {note[:20] if note.startswith("The machine was busy") else note: note for note in said}
    return replace(
        first,
        name=f"engines_batch{batch}_threads{threads}",
        title=f"Every family on every engine, batch {batch}, {counted(threads, 'thread')}",
        conditions={
            **first.conditions,
            "batch": batch,
            "threads": threads,
            "precision": " and ".join(map(str, precisions)),
            "input": " and ".join(map(str, inputs)),
        },
        date=found[-1].date,
        reference="eager, fp32",
        entries=tuple(entries),
        checks=tuple(check for benchmark in found for check in benchmark.checks),
        goals=tuple(_goals(entries, batch, families)),
        notes=tuple(notes.values()),
    )


def _named(entries: Sequence[Entry], model: str) -> list[Entry]:
    return [entry for entry in entries if str(entry.settings["model"]).removesuffix(" (merged)") == model]


def _best(entries: Sequence[Entry]) -> float:
    """Return how many times as fast as eager float32 the best engine is in float32, at least 1: eager stays."""
    return max(
        [1.0]
        + [
            entry.speedup.median
            for entry in entries
            if entry.speedup and entry.settings["precision"] == "fp32" and entry.settings["engine"] not in _OWN
        ]
    )


def _goals(entries: Sequence[Entry], batch: int, families: Sequence[str]) -> list[Goal]:
    meant = [name for name in families if name in _MEANT]
    goals = []
    if meant:
        best = [_best(_named(entries, name)) for name in meant]
        mean = math.prod(best) ** (1 / len(best))
        goals.append(
            Goal(
                what=f"geometric mean of the best engine over {', '.join(meant)}, times as fast as eager",
                value=mean,
                wanted=_WANTED.get(batch, 1.0),
            )
        )
    automatic = {
        str(entry.settings["model"]): 1.0 if entry.settings.get("taken") == "eager" else entry.speedup.median
        for entry in entries
        if entry.settings["engine"] == "auto" and entry.speedup
    }
    if automatic:
        slowest = min(automatic, key=lambda name: automatic[name])
        goals.append(
            Goal(what=f"slowest with auto, {slowest}, times as fast as eager", value=automatic[slowest], wanted=1.0)
        )
    restorers = [entry for entry in entries if str(entry.settings["model"]).startswith("cfsr")]
    if restorers:
        goals.append(
            Goal(
                what="CFSR on its best engine, times as fast as eager", value=_best(restorers), wanted=_WANTED_RESTORER
            )
        )
    return goals


def _large_goals(entries: Sequence[Entry], where: str) -> list[Goal]:
    """Compare a large backbone with its rival on each engine, by the medians of the same rounds."""
    names = list(dict.fromkeys(str(entry.settings["model"]) for entry in entries))
    times = {
        (
            str(entry.settings["model"]),
            str(entry.settings["engine"]),
            str(entry.settings["precision"]),
        ): entry.time.median
        for entry in entries
        if entry.time
    }
    equal = {
        (engine, precision): rival / times[names[0], engine, precision]
        for (name, engine, precision), rival in times.items()
        if name == names[-1] and engine != "auto" and (names[0], engine, precision) in times
    }
    small = {
        (engine, precision): times[names[-1], engine, "fp32"] / own
        for (name, engine, precision), own in times.items()
        if name == names[0] and precision in ("bf16", "int8") and (names[-1], engine, "fp32") in times
    }
    goals = []
    for ratios, what, wanted in (
        (small, "the rival's fp32 on the same engine", _WANTED_LARGE),
        (equal, "the rival in equal precision on the same engine", _WANTED_EQUAL),
    ):
        if ratios:
            best = max(ratios, key=lambda pair: ratios[pair])
            said = f"{names[0]} on {best[0]} in {best[1]} against {what}, {where}, times as fast"
            goals.append(Goal(what=said, value=ratios[best], wanted=wanted))
    return goals


def plot_families(benchmarks: Sequence[Benchmark], path: str | Path) -> Path:
    """Draw how many times as fast as eager every engine is, one panel a batch and number of threads; PNG or SVG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No entry was compared.
    """
    panels = [each for each in benchmarks if each.name.startswith("engines_batch") and each.entries]
    if not panels:
        raise ValueError("There is nothing to plot: no family was compared with eager.")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(6.4 * columns, 3.6 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    pairs = list(
        dict.fromkeys(
            (entry.settings["engine"], entry.settings["precision"])
            for panel in panels
            for entry in panel.entries
            if (entry.settings["engine"], entry.settings["precision"]) != ("eager", "fp32")
        )
    )
    width = 0.84 / max(1, len(pairs))
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_visible(False)
            continue
        models = list(dict.fromkeys(str(entry.settings["model"]) for entry in panel.entries))
        for place, pair in enumerate(pairs):
            found = {
                str(entry.settings["model"]): entry.speedup.median
                for entry in panel.entries
                if entry.speedup and (entry.settings["engine"], entry.settings["precision"]) == pair
            }
            at = [models.index(model) + (place - (len(pairs) - 1) / 2) * width for model in found]
            axes.bar(at, list(found.values()), width, color=f"C{place % 10}", label=", ".join(map(str, pair)))
        axes.axhline(1, color="0.2", linewidth=1)
        short = [model.removesuffix(" (merged)").partition(".")[0] for model in models]
        axes.set_xticks(range(len(models)), short, fontsize=8, rotation=25, ha="right")
        axes.set_title(panel.title.partition(", ")[2], fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(labelleft=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("times as fast as eager, fp32", fontsize=9)
    figure.suptitle(f"Engines against eager PyTorch, {panels[0].environment['device']}", fontsize=10)
    return save_with_legend(figure, path, loc="outside lower center", ncols=4, fontsize=8)
