"""A picture of what a cache did in its last run: parts of the model over steps."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from zoo.caching.cg_taylor import CGTaylorConfig
from zoo.caching.core import cache_summary
from zoo.caching.summary import FIRST_BLOCK, DenoiserSummary, UnitSteps
from zoo.caching.taylorseer import TaylorSeerConfig, is_full_step
from zoo.figures import new_figure

__all__ = ["timeline"]

# of Okabe and Ito, whose colours all kinds of sight tell apart; also different in brightness
_COLORS = ("#ffffff", "#e3e3e3", "#0072b2", "#e69f00")
_NAMES = ("not called", "skipped", "computed", "forced")
_SKIPPED, _COMPUTED, _FORCED = 1, 2, 3
_ROW, _GATE = 0.17, 1.3  # heights, inches
_MOST_LABELS = 60


def timeline(pipe_or_model: DiffusionPipeline | nn.Module, path: str | PathLike[str]) -> Path:
    """Draw which part of a model was computed at which step of the last run.

    One row for each part, in the order in which they run, one column for each step; forced are steps at which the
    method computes without asking: warm-up, last step, limit of skips. Above, where there is a gate, are its errors and
    its threshold. Each cache context has a panel of its own.

    Args:
        pipe_or_model: With a cache of `zoo.enable_cache` that has been run.
        path: Picture to write; its suffix says how: .png, .svg, .pdf.

    Returns:
        The file.

    Raises:
        ValueError: There is no cache, it has not run yet, or it is one of diffusers' that do not tell.
        ImportError: matplotlib is not installed.

    Example:
        >>> zoo.enable_cache(pipe, zoo.CGTaylorConfig())
        >>> pipe("a cat")
        >>> zoo.caching.timeline(pipe, "timeline.png")
    """
    panels = []
    for one in cache_summary(pipe_or_model).denoisers:
        method = type(one.config).__name__
        if not one.calls:
            raise ValueError(f"{method} on {one.model} has not run yet: there is nothing to draw.")
        if not one.units:
            raise ValueError(f"{method} does not tell what it skips: there is nothing to draw.")
        panels += [(one, context) for context in one.calls if any(unit.context == context for unit in one.units)]
    heights: list[float] = []
    for one, context in panels:
        rows = sum(unit.context == context for unit in one.units)
        gate = any(error.context == context for error in one.errors)
        heights += [_GATE if gate else 0.0, max(0.7, _ROW * rows)]
    figure = new_figure(9.0, sum(heights) + 0.75 * len(panels) + 0.6)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=[max(height, 0.01) for height in heights])
    used: set[int] = set()
    for index, (one, context) in enumerate(panels):
        below = figure.add_subplot(grid[2 * index + 1])
        used |= _draw_units(below, one, context)
        top = below
        if heights[2 * index]:
            top = figure.add_subplot(grid[2 * index], sharex=below)
            _draw_gate(top, one, context)
        top.set_title(_title(one, context), fontsize=10, loc="left")
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(facecolor=_COLORS[kind], edgecolor="0.6", label=_NAMES[kind]) for kind in sorted(used)],
        loc="outside lower right",
        ncols=len(used),
        fontsize=8,
        frameon=False,
    )
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def _title(one: DenoiserSummary, context: str) -> str:
    own = [unit for unit in one.units if unit.context == context]
    asked = [unit for unit in own if unit.unit != FIRST_BLOCK] or own
    computed = sum(len(unit.computed) for unit in asked) / len(asked)
    what = "steps computed" if len(asked) == 1 else "steps computed on average"
    where = "" if len(one.calls) == 1 else f", context {context}"
    return f"{_method(one.config)} on {one.model}{where}: {computed:.3g} of {one.calls[context]} {what}"


def _method(config: Any) -> str:
    """Return the method with those of its settings that differ from the defaults."""
    name = type(config).__name__.removesuffix("Config").replace("CGTaylor", "CG-Taylor")
    said = [
        f"{field.name.replace('_', ' ')} {value}"
        for field in dataclasses.fields(config)
        if isinstance(value := getattr(config, field.name), int | float | str) and value != field.default
    ]
    return ", ".join([name, *said])


def _steps(one: DenoiserSummary, context: str) -> int:
    """Return the number of steps to show, those before a context started included."""
    own = [step for unit in one.units if unit.context == context for step in (*unit.computed, *unit.skipped)]
    return max(own) + 1


def _forced(one: DenoiserSummary, steps: int) -> set[int]:
    """Return the steps that the method computes whatever the features are."""
    config = one.config
    if isinstance(config, CGTaylorConfig):
        return set(range(steps)) - {error.step for error in one.errors}
    if isinstance(config, TaylorSeerConfig):
        return {
            step
            for step in range(steps)
            if is_full_step(step, interval=steps + 1, warmup_steps=config.warmup_steps, full_from=config.full_from)
        }
    return set()


def _draw_units(axes: Any, one: DenoiserSummary, context: str) -> set[int]:
    """Draw the rows, and return the kinds of cells among them."""
    from matplotlib.colors import ListedColormap

    units = [unit for unit in one.units if unit.context == context]
    steps = _steps(one, context)
    forced = _forced(one, steps)
    cells = [_row(unit, steps, forced) for unit in units]
    edges = dict(edgecolors="white", linewidth=0.8 if steps <= 120 else 0.0)
    axes.pcolormesh(
        [step - 0.5 for step in range(steps + 1)],
        [row - 0.5 for row in range(len(units) + 1)],
        cells,
        cmap=ListedColormap(_COLORS),
        vmin=0,
        vmax=len(_COLORS) - 1,
        **edges,
    )
    axes.invert_yaxis()
    names, lists = _labels(units)
    every = -(-len(names) // _MOST_LABELS)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7 if len(names) > 4 else 8)
    axes.set_ylabel(lists, fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(length=2, labelsize=8)
    axes.tick_params(axis="y", length=0, labelsize=7 if len(names) > 4 else 8)
    for side in axes.spines.values():
        side.set_visible(False)
    return {kind for row in cells for kind in row}


def _row(unit: UnitSteps, steps: int, forced: set[int]) -> list[int]:
    row = [0] * steps
    for step in unit.skipped:
        row[step] = _SKIPPED
    for step in unit.computed:  # a step with several calls may hold both
        row[step] = _FORCED if step in forced and unit.unit != FIRST_BLOCK else _COMPUTED
    return row


def _labels(units: list[UnitSteps]) -> tuple[list[str], str]:
    """Return the names of the rows, and the list of blocks if all are of one."""
    names = [unit.unit for unit in units]
    lists = {name.partition(".")[0] for name in names}
    if len(lists) > 1 or "." not in names[0]:
        return names, ""
    return [name.partition(".")[2] for name in names], lists.pop()


def _draw_gate(axes: Any, one: DenoiserSummary, context: str) -> None:
    """Draw the errors of the gate, and its threshold."""
    from matplotlib.ticker import LogLocator, NullFormatter

    errors = [error for error in one.errors if error.context == context]
    axes.plot([error.step for error in errors], [error.error for error in errors], color="0.45", linewidth=1, zorder=1)
    for skipped, color in ((True, "0.75"), (False, _COLORS[_COMPUTED])):
        own = [error for error in errors if error.skipped == skipped]
        axes.scatter([error.step for error in own], [error.error for error in own], s=14, color=color, zorder=2)
    threshold = getattr(one.config, "threshold", None)
    if threshold:
        axes.axhline(threshold, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(
            f"{threshold:g}",
            (1, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("gate error", fontsize=8)
    axes.tick_params(which="both", labelsize=7, labelbottom=False)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
