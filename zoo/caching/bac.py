"""BAC: each attention and feed-forward module is computed at steps of its own, found once from a calibration run.

Block-wise Adaptive Caching for Accelerating Diffusion Policy (ICLR 2026), https://arxiv.org/abs/2506.13456. Authors'
code: https://github.com/ky-ji/BAC (MIT).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from os import PathLike
from typing import Literal

from torch import nn

from zoo.caching.blocks import model_units
from zoo.caching.fitting import find_fit, wrong_steps
from zoo.caching.registry import is_count, place, require, require_evaluation
from zoo.caching.runs import RunTracker
from zoo.caching.schedules import BACSchedule, Metric, schedule_of, uniform_steps
from zoo.caching.units import Turn, place_units

__all__ = ["BACConfig", "uniform_schedule"]


@dataclass(kw_only=True)
class BACConfig:
    """Compute each attention and feed-forward module at steps of its own, and reuse its output at the others.

    The steps come from a calibration: `config = zoo.calibrate_cache(pipe, BACConfig(updates=10), run)` returns the
    configuration with a schedule, for `zoo.enable_cache(pipe, config)` and for `config.schedule.save(folder)`.

    Args:
        updates: Steps at which a module is computed, the first one among them; None takes a tenth, at least 2.
        union: So many modules, those that drift most, are also computed whenever a feed-forward after them is.
        metric: What makes two outputs alike: "cosine", "l1" or "mse".
        objective: "anchor", the likeness of reused and true outputs at all steps; or "adjacent", the formula printed in
            the paper, which computes where the output differs most from the step before.
        shared: Choose the same steps for all modules, by the mean of what `metric` says of them, rather than steps of
            its own for each. Nothing is then updated on stale inputs, so `union` is without effect; and steps that
            leave out everything are cheaper, where blocks only add up what their modules return. The paper's "unified"
            schedule, which looks at the first attention alone.
        always_update_last: Compute everything at the last step too, as the authors' code does; one more update.
        error: What makes a module drift most for `union`: "absolute", the mean change of its output, as published; or
            "relative", that over the mean size of its output.
        max_features: Elements of a module's output that the calibration looks at, chosen at random.
        seed: Of that choice.
        on_mismatch: What a run of other steps or timesteps than those of the calibration gets: "error"; or "resample",
            a schedule chosen anew from what the calibration found at the nearest timesteps, with a warning. The
            schedule is then saved with what that needs, `steps² * modules` numbers.
        schedule: The schedule, or its file; None before the calibration. With one, only `on_mismatch` has an effect.
    """

    updates: int | None = None
    union: int = 3
    metric: Metric = "cosine"
    objective: Literal["anchor", "adjacent"] = "anchor"
    shared: bool = False
    always_update_last: bool = True
    error: Literal["absolute", "relative"] = "absolute"
    max_features: int = 65536
    seed: int = 0
    on_mismatch: Literal["error", "resample"] = "error"
    schedule: BACSchedule | str | PathLike[str] | None = None

    def check(self) -> None:
        """Raise ValueError where a value is out of range."""
        updates = self.updates
        require(updates is None or is_count(updates, 1), self, "updates", "None or a whole number from 1")
        require(is_count(self.union, 0), self, "union", "a whole number from 0")
        require(self.metric in ("cosine", "l1", "mse"), self, "metric", "'cosine', 'l1' or 'mse'")
        require(self.objective in ("anchor", "adjacent"), self, "objective", "'anchor' or 'adjacent'")
        require(self.error in ("absolute", "relative"), self, "error", "'absolute' or 'relative'")
        require(is_count(self.max_features, 1), self, "max_features", "a whole number from 1")
        require(self.on_mismatch in ("error", "resample"), self, "on_mismatch", "'error' or 'resample'")


def uniform_schedule(model: nn.Module, num_steps: int, updates: int) -> BACSchedule:
    """Return the same evenly spaced steps for all units: the baseline that needs no calibration.

    Args:
        model: The denoiser.
        num_steps: Calls of the denoiser in a run.
        updates: Steps at which everything is computed.
    """
    units = model_units(model, "BACConfig")
    return BACSchedule(
        model=type(model).__name__,
        num_steps=num_steps,
        units=dict.fromkeys([unit.path for unit in units], uniform_steps(num_steps, updates)),
        kinds={unit.path: unit.kind for unit in units},
        errors={},
        updates=min(updates, num_steps),
        objective="uniform",
    )


class _Plan:
    """The schedule as the hooks ask for it, checked against each run.

    Args:
        schedule: Which steps compute which unit.
        run: Tells the step.
        resamples: Serve runs of other steps too.
    """

    def __init__(self, schedule: BACSchedule, run: RunTracker, resamples: bool) -> None:
        self._schedule = schedule
        self._run = run
        self._resamples = resamples
        self._resampled: dict[tuple[float, ...], BACSchedule] = {}  # by timesteps
        self._offset = 0
        self._checked: object = None
        self._said: set[str] = set()
        self._taken: BACSchedule | None = None
        self._turns: list[Turn] = []
        self._take(schedule)

    def _take(self, schedule: BACSchedule) -> None:
        if schedule is self._taken:
            return
        self._taken = schedule
        steps = {unit: frozenset(own) for unit, own in schedule.units.items()}
        self._turns = [
            Turn(
                computed=frozenset(unit for unit, own in steps.items() if step in own),
                kept=frozenset(unit for unit, own in steps.items() if step + 1 not in own),
            )
            for step in range(schedule.num_steps)
        ]

    def __call__(self, step: int) -> Turn:
        """Return what is done at a step."""
        if self._checked is not self._run.log:
            self._check_run()
            self._checked = self._run.log
        at = step + self._offset
        if at >= len(self._turns):
            raise ValueError(wrong_steps("BAC", self._schedule, f"{at + 1} or more"))
        return self._turns[at]

    def _check_run(self) -> None:
        fit = find_fit("BAC", self._schedule, self._run)
        self._offset = fit.offset
        if fit.other_scheduler is not None:
            self._warn(fit.other_scheduler)
        if fit.wrong is None:
            self._take(self._schedule)
        elif self._resamples and self._run.num_steps is not None:
            self._resample(self._run.num_steps, fit.timesteps[fit.offset :], fit.wrong)
        else:
            raise ValueError(fit.wrong)

    def _resample(self, num_steps: int, timesteps: list[float], wrong: str) -> None:
        key = tuple(timesteps) or (float(num_steps),)
        if key not in self._resampled:
            self._resampled[key] = self._schedule.resampled(num_steps, timesteps)
        self._offset = 0
        self._take(self._resampled[key])
        self._warn(f"{wrong.partition(': calibrate')[0]}: its steps were chosen anew. A calibration does better.")

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=2)


def _place(path: str) -> tuple[str, str]:
    """Return the list and the number of the block that a unit is in: "blocks", "3" of "blocks.3.attn"."""
    found = re.match(r"(.+?)\.(\d+)(?:\.|$)", path)
    return (found[1], found[2]) if found else (path, "")


@place.register
def _bac(config: BACConfig, model: nn.Module, run: RunTracker) -> None:
    config.check()
    require_evaluation(config, model)
    schedule = schedule_of(config, BACSchedule)
    units = model_units(model, "BACConfig")
    # a unit that the run of the calibration did not call has no steps, and is always computed; a block of a list that
    # it went through has some, or the schedule is for a model of another depth
    paths = {unit.path for unit in units}
    lists = {_place(path)[0] for path in schedule.units}
    blocks = {_place(path) for path in paths if _place(path)[0] in lists}
    fits = set(schedule.units) <= paths and blocks == set(map(_place, schedule.units))
    if schedule.model != type(model).__name__ or not fits:
        raise ValueError(
            f"The BAC schedule is for a {schedule.model} with {len(schedule.units)} units, this is a "
            f"{type(model).__name__} with {len(units)}."
        )
    units = [unit for unit in units if unit.path in schedule.units]
    place_units(model, units, run, _Plan(schedule, run, config.on_mismatch == "resample"))
