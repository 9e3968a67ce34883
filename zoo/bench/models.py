"""Compare models by name: classifiers, restorers or denoisers, merged unless told otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from zoo import catalog
from zoo.bench.grid import PRECISIONS, Grid, compare_grid
from zoo.bench.memory import in_fresh_process, peak_memory, resident_peak
from zoo.bench.report import Benchmark, Entry, Goal
from zoo.bench.subjects import Subject, subject
from zoo.bench.timing import Progress, Settings, busy, compare, environment, torch_threads
from zoo.profiling import count_params

__all__ = ["compare_models"]


def _title(names: Sequence[str], entries: Sequence[Entry]) -> str:
    if len(names) > 3:
        return (
            f"{len(names)} models{', merged where they can be' if any('(merged)' in e.name for e in entries) else ''}"
        )
    return " against ".join(entry.name for entry in entries[:2]) + (" and others" if entries[2:] else "")


def _peak(each: Subject, settings: Settings, size: int | None) -> int:
    """Return the bytes by which memory grows in one call."""
    if torch.device(settings.device).type == "cuda":
        return peak_memory(each, settings.device)
    return in_fresh_process(_peak_here, each.source, settings, size, each.merged)


def _peak_here(name: str, settings: Settings, size: int | None, merge: bool) -> int:
    with torch_threads(settings.threads):
        before, peak = resident_peak(subject(name, settings, size=size, merge=merge, check=False))
    return peak - before


def compare_models(
    names: Sequence[str],
    settings: Settings = Settings(),
    *,
    size: int | None = None,
    merge: bool = True,
    memory: bool = False,
    goal: float | None = None,
    name: str = "models",
    title: str | None = None,
    progress: Progress | None = None,
    engines: Sequence[str] = (),
    plotted: bool = False,
) -> Benchmark:
    """Time models in turns.

    With one name that can be merged, its merged form runs against its training form. Otherwise the first is compared
    with the second, the reference; further ones are compared with the reference too.

    Args:
        names: Registered names.
        settings: How to measure.
        size: Height and width of the inputs in pixels; None is each model's own (restorers: 256).
        merge: Re-parameterise what can be.
        memory: Measure the peak memory of one call too, on the CPU each in a process of its own.
        goal: How many times as fast as the second the first should be.
        name: Short name of the benchmark.
        title: What is compared, in words; None names the models.
        progress: Told after each step.
        engines: Run each model on each of these, see `compare_grid`.
        plotted: It is to be drawn: refuse what would be one point, before it is timed.

    Raises:
        ValueError: A name is unknown or repeated, or the models do different tasks.
        BenchError: Merging changes an output.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Give one or more different models, got {', '.join(names) or 'none'}.")
    if engines:
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == settings.dtype)
        grid = Grid(
            engines=tuple(engines), precisions=(precision,), batches=(settings.batch,), threads=(settings.threads,)
        )
        return compare_grid(
            names, grid, settings, size=size, merge=merge, memory=memory, name=name, title=title, progress=progress
        )
    shared = busy(settings.threads) if settings.device == "cpu" else ""
    with torch_threads(settings.threads):
        subjects = [subject(model, settings, size=size, merge=merge) for model in names]
        if len({each.task for each in subjects}) > 1:
            tasks = ", ".join(f"{each.source}: {each.task}" for each in subjects)
            raise ValueError(f"Models of different tasks cannot be compared: {tasks}.")
        if len(subjects) == 1 and subjects[0].checks:
            subjects.append(subject(names[0], settings, size=size, merge=False, label=f"{names[0]} (training form)"))
        if plotted and len(subjects) == 1:
            why = "has nothing to merge" if merge else "is in one form"
            raise ValueError(
                f"A plot needs two points, and {names[0]} {why}: give another model, or several --engine, --precision "
                "or --batch."
            )
        reference = subjects[1].name if len(subjects) > 1 else subjects[0].name
        with torch.inference_mode():
            timed = compare({each.name: each for each in subjects}, settings, reference=reference, progress=progress)
        peaks = [_peak(each, settings, size) if memory else None for each in subjects]
        by_family = 1 < len({each.family for each in subjects}) < len(subjects)
        entries = tuple(
            Entry.of(
                each.name,
                timed[each.name],
                params=count_params(each.model),
                macs=each.macs(),
                peak_bytes=peak,
                values=each.accuracy,
                series=each.family if by_family else "",
            )
            for each, peak in zip(subjects, peaks, strict=True)
        )
    first = entries[0].speedup
    goals: tuple[Goal, ...] = ()
    if goal is not None and first is not None:
        goals = (Goal(what=f"{entries[0].name} against {reference}, times as fast", value=first.median, wanted=goal),)
    shapes = {"x".join(map(str, each.inputs[0].shape[1:])) for each in subjects}
    plain = subjects[0].task not in catalog.PIPELINE_TASKS
    return Benchmark(
        name=name,
        title=title or _title(names, entries),
        conditions=settings.conditions(input=" and ".join(sorted(shapes))),
        environment=environment(settings.device),
        reference=reference if len(subjects) > 1 else None,
        entries=entries,
        checks=tuple(itertools.chain.from_iterable(each.checks for each in subjects)),
        goals=goals,
        notes=tuple(filter(None, ["Weights, random or trained, do not change the time." if plain else "", shared])),
    )
