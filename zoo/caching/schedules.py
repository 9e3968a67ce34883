"""Which steps compute which unit: the schedules of Block-wise Adaptive Caching, and where they are kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from zoo.files import whole

__all__ = [
    "BACSchedule",
    "Kind",
    "Metric",
    "StoredSchedule",
    "adjacent_steps",
    "anchor_steps",
    "block_error",
    "bubbling_union",
    "choose_steps",
    "keyed_name",
    "schedule_of",
    "similarity",
    "top_errors",
    "uniform_steps",
]

Kind = Literal["attention", "feed_forward"]
Metric = Literal["cosine", "l1", "mse"]

_VERSION = 1


def anchor_steps(
    matrix: Sequence[Sequence[float]], updates: int, direction: Literal["max", "min"] = "max"
) -> tuple[int, ...]:
    """Choose the update steps whose features stand best for the steps between them.

    The adaptive caching scheduler of BAC (https://arxiv.org/abs/2506.13456, section 3.2) as its published code computes
    it: the best sum over all steps of the likeness to the last update. Dynamic programme, O(updates * steps²). Of equal
    schedules the one with the earliest last update is taken, then the earliest one before that, and so on.

    Args:
        matrix: Likeness or distance of the features of step t, column, to those of step a, row; steps x steps.
        updates: Steps to compute, step 0 among them; more than there are steps means all.
        direction: "max" for likeness, "min" for distance.

    Raises:
        ValueError: There is no step, or no update.
    """
    steps = len(matrix)
    updates = _check_counts(steps, updates)
    sign = 1.0 if direction == "max" else -1.0
    # gain[a][e]: sum of the steps from a up to, not including, e, when a is the last update
    gain = []
    for start, row in enumerate(matrix):
        sums, total = [0.0] * (steps + 1), 0.0
        for step in range(start, steps):
            total += sign * row[step]
            sums[step + 1] = total
        gain.append(sums)
    best = [-math.inf, *gain[0][1:]]  # one update; by the end of its segment
    starts: list[list[int]] = []
    for count in range(2, updates + 1):
        values, froms = [-math.inf] * (steps + 1), [0] * (steps + 1)
        for end in range(count, steps + 1):
            for start in range(count - 1, end):
                value = best[start] + gain[start][end]
                if value > values[end]:
                    values[end], froms[end] = value, start
        best = values
        starts.append(froms)
    chosen, end = [], steps
    for froms in reversed(starts):
        end = froms[end]
        chosen.append(end)
    return (0, *reversed(chosen))


def adjacent_steps(likeness: Sequence[float | None], updates: int) -> tuple[int, ...]:
    """Choose the update steps by the formula printed in the paper: where a feature differs most from the one before.

    It does not see how long a stored feature has been reused; `anchor_steps` does.

    Args:
        likeness: Of each step's feature to the one of the step before; the first entry is not used.
        updates: Steps to compute, step 0 among them; more than there are steps means all.

    Raises:
        ValueError: There is no step, or no update.
    """
    steps = len(likeness)
    updates = _check_counts(steps, updates)
    values = {step: value for step, value in enumerate(likeness) if step and value is not None}
    return tuple(sorted([0, *sorted(values, key=lambda step: (values[step], step))[: updates - 1]]))


def uniform_steps(steps: int, updates: int) -> tuple[int, ...]:
    """Spread update steps evenly: the baseline that needs no calibration.

    Raises:
        ValueError: There is no step, or no update.
    """
    updates = _check_counts(steps, updates)
    return tuple(index * steps // updates for index in range(updates))


def choose_steps(
    matrices: Mapping[str, Sequence[Sequence[float]]],
    updates: int,
    *,
    metric: Metric,
    objective: str,
    shared: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Choose the update steps of each unit.

    Args:
        matrices: Likeness or distance of the features of any two steps, by unit; steps x steps.
        updates: Steps to compute, a unit.
        metric: What the matrices hold.
        objective: "anchor", see `anchor_steps`, or "adjacent", see `adjacent_steps`.
        shared: The same steps for all units, by the mean of the matrices.
    """
    if shared:
        mean = torch.tensor([matrices[unit] for unit in matrices], dtype=torch.float64).mean(0).tolist()
        (steps,) = choose_steps({"all": mean}, updates, metric=metric, objective=objective).values()
        return dict.fromkeys(matrices, steps)
    sign = 1 if metric == "cosine" else -1
    chosen = {}
    for unit, rows in matrices.items():
        if objective == "anchor":
            chosen[unit] = anchor_steps(rows, updates, "max" if metric == "cosine" else "min")
        else:
            chosen[unit] = adjacent_steps([sign * rows[max(0, k - 1)][k] for k in range(len(rows))], updates)
    return chosen


def _check_counts(steps: int, updates: int) -> int:
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step, got {steps}.")
    if updates < 1:
        raise ValueError(f"updates must be at least 1, since the first step is computed, got {updates}.")
    return min(updates, steps)


def similarity(features: Tensor, metric: Metric = "cosine") -> Tensor:
    """Compare a unit's features at all steps with each other.

    Args:
        features: (steps, elements) of one sample.
        metric: "cosine", larger is more alike; "l1" (mean absolute difference) or "mse", smaller is more alike.

    Returns:
        (steps, steps). Cosine of two features that are both zero is 1, of one that is zero 0.
    """
    features = features.float()
    if metric == "l1":
        return torch.cdist(features, features, p=1) / features.shape[1]
    if metric == "mse":
        squares = features.square().sum(1)
        return (squares[:, None] + squares - 2 * features @ features.T).clamp_min(0) / features.shape[1]
    norms = features.norm(dim=1)
    zero = norms == 0
    unit = features / norms.masked_fill(zero, 1)[:, None]
    result = unit @ unit.T
    result[zero[:, None] & zero] = 1
    return result.fill_diagonal_(1)


def block_error(features: Tensor) -> float:
    """Return the mean absolute difference of a unit's features over all pairs of steps (BAC, section 3.3).

    Differs from the paper: a mean over elements, so that units of different sizes can be ranked together.

    Args:
        features: (steps, elements); 0 is returned for a single step.
    """
    if len(features) < 2:
        return 0.0
    return float(torch.pdist(features, p=1).mean() / features.shape[1])


def top_errors(errors: Mapping[str, float], count: int) -> tuple[str, ...]:
    """Return the units with the largest errors; of equal ones those that come first."""
    return tuple(sorted(errors, key=lambda unit: -errors[unit])[:count])


def bubbling_union(
    schedules: Mapping[str, Sequence[int]], kinds: Mapping[str, Kind], selected: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Let some units also be computed whenever a feed-forward after them is (BAC, section 3.3).

    A feed-forward that is updated on a stale input makes errors worse; so the units that drift most are fresh then.

    Args:
        schedules: Update steps by unit, in the order in which the units run.
        kinds: What each unit is.
        selected: The units that drift most, for example from `top_errors`.
    """
    units = list(schedules)
    result = {}
    for index, unit in enumerate(units):
        steps = set(schedules[unit])
        if unit in selected:
            for later in units[index + 1 :]:
                if kinds[later] == "feed_forward":
                    steps.update(schedules[later])
        result[unit] = tuple(sorted(steps))
    return result


def keyed_name(kind: str, model: str, scheduler: str | None, num_steps: int, guidance: float | None) -> str:
    """Return the name of a file that holds for a model, a scheduler, a number of steps and a guidance scale."""
    scale = "any" if guidance is None else f"{guidance:g}"
    return re.sub(r"[^\w.-]", "-", f"{kind}_{model}_{scheduler or 'any'}_{num_steps}_{scale}") + ".json"


class StoredSchedule:
    """A schedule that is kept as plain data, in JSON; for frozen dataclasses."""

    _kind: ClassVar[str]
    """How the names of its files begin."""
    _called: ClassVar[str]
    """What a file of it is, for messages."""

    model: str
    num_steps: int
    scheduler: str | None
    guidance: float | None

    @property
    def filename(self) -> str:
        """Name of its file in a model's folder: it says model, scheduler, steps and guidance."""
        return keyed_name(self._kind, self.model, self.scheduler, self.num_steps, self.guidance)

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all.

        Args:
            path: A file, or a folder, for example that of the model, to be named as `filename` says.

        Returns:
            The file.
        """
        path = Path(path)
        file = path / self.filename if path.is_dir() else path
        with whole(file) as temporary:
            temporary.write_text(json.dumps(self.to_values()) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ValueError: It is no schedule.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no {cls._called}: {error}") from error
        return cls.from_values(values, str(path))

    def to_values(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        values: Any = self
        return {"version": _VERSION, **asdict(values)}

    @classmethod
    def from_values(cls, values: dict[str, Any], name: str) -> Self:
        """Return what `to_values` took apart.

        Args:
            values: Plain data.
            name: Where it is from, for messages.

        Raises:
            ValueError: It is no schedule.
        """
        try:
            values = dict(values)
            if values.pop("version") != _VERSION:
                raise ValueError("of another version")
            schedule = cls(**cls._decoded(values))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{name} is no {cls._called}: {error}") from error
        schedule.check(name)
        return schedule

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return values of JSON as those of the dataclass."""
        raise NotImplementedError

    def check(self, name: str = "The schedule") -> None:
        """Raise ValueError where the schedule contradicts itself."""
        raise NotImplementedError


_Schedule = TypeVar("_Schedule", bound=StoredSchedule)


def schedule_of(config: Any, kind: type[_Schedule]) -> _Schedule:
    """Return the checked schedule of a configuration, read where it is a file.

    Raises:
        ValueError: There is none, or it contradicts itself.
    """
    name = type(config).__name__
    if config.schedule is None:
        raise ValueError(
            f"{name} has no schedule: calibrate first, config = zoo.calibrate_cache(pipe, {name}(), run=lambda: "
            "pipe(...)), or give it the file of one."
        )
    schedule = config.schedule if isinstance(config.schedule, kind) else kind.load(config.schedule)
    schedule.check()
    return schedule


@dataclass(frozen=True, kw_only=True)
class BACSchedule(StoredSchedule):
    """Which steps compute which unit of a model.

    Args:
        model: Class of the denoiser.
        num_steps: Calls of the denoiser in a run, for each context.
        units: Steps at which each unit is computed, by name, in the order in which the units run.
        kinds: What each unit is.
        errors: Mean absolute change of each unit's output between any two steps; empty without calibration.
        scheduler: Class of the scheduler, None if unknown.
        timesteps: Of the scheduler, empty if unknown.
        guidance: Scale of classifier-free guidance in the calibration, None if not said.
        updates: Steps asked for, a unit, before the union.
        union: Units that were enlarged by the union.
        objective: How the steps were chosen.
        shared: For all units together.
        metric: What `matrices` holds.
        matrices: Likeness of each unit's features at any two steps, where runs of other steps are to be served too.
    """

    _kind, _called = "bac", "BAC schedule"

    model: str
    num_steps: int
    units: dict[str, tuple[int, ...]]
    kinds: dict[str, Kind]
    errors: dict[str, float]
    scheduler: str | None = None
    timesteps: tuple[float, ...] = ()
    guidance: float | None = None
    updates: int
    union: tuple[str, ...] = ()
    objective: str = "anchor"
    shared: bool = False
    metric: Metric = "cosine"
    matrices: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict, repr=False)

    @property
    def mean_updates(self) -> float:
        """Computed steps of a unit, on average."""
        return sum(len(steps) for steps in self.units.values()) / len(self.units)

    def __str__(self) -> str:
        return (
            f"BAC schedule of {self.model} for {self.num_steps} steps: {len(self.units)} units, "
            f"{self.mean_updates:.1f} of {self.num_steps} steps computed on average"
        )

    def resampled(self, num_steps: int, timesteps: Sequence[float] = ()) -> BACSchedule:
        """Choose the steps anew for runs of other steps: each of them counts as the nearest one of the calibration.

        Args:
            num_steps: Calls of the denoiser in such a run.
            timesteps: Of its scheduler; empty if unknown, then the steps are taken for evenly spaced.

        Raises:
            ValueError: The schedule was saved without matrices.
        """
        updates = max(1, round(self.updates * num_steps / self.num_steps))
        if self.objective == "uniform":
            chosen = dict.fromkeys(self.units, uniform_steps(num_steps, updates))
        elif not self.matrices:
            raise ValueError(
                "The BAC schedule holds no matrices to choose other steps from: calibrate anew with "
                "zoo.calibrate_cache and BACConfig(on_mismatch='resample')."
            )
        else:
            if timesteps and len(self.timesteps) == self.num_steps:
                recorded = self.timesteps
                near = [min(range(self.num_steps), key=lambda k: abs(recorded[k] - time)) for time in timesteps]
            else:
                near = [round(step * (self.num_steps - 1) / max(1, num_steps - 1)) for step in range(num_steps)]
            matrices = {unit: [[rows[a][b] for b in near] for a in near] for unit, rows in self.matrices.items()}
            chosen = choose_steps(matrices, updates, metric=self.metric, objective=self.objective, shared=self.shared)
        units = bubbling_union(chosen, self.kinds, self.union)
        if all(steps[-1] == self.num_steps - 1 for steps in self.units.values()):
            units = {unit: tuple(sorted({*steps, num_steps - 1})) for unit, steps in units.items()}
        return replace(self, num_steps=num_steps, timesteps=tuple(timesteps), units=units, updates=updates, matrices={})

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        num_steps: int | None = None,
        scheduler: str | None = None,
        guidance: float | None = None,
    ) -> BACSchedule:
        """Read what `save` wrote.

        Args:
            path: The file, or a folder with one or more schedules.
            num_steps: In a folder: only those of so many steps.
            scheduler: In a folder: only those of a scheduler of this class.
            guidance: In a folder: only those of this guidance scale.

        Raises:
            FileNotFoundError: There is no such file, or none in the folder that fits.
            ValueError: It is no schedule, or several in the folder fit.
        """
        path, read = Path(path), super().load
        if not path.is_dir():
            return read(path)
        wanted = {"num_steps": num_steps, "scheduler": scheduler, "guidance": guidance}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        found = {file.name: read(file) for file in sorted(path.glob("bac_*.json"))}
        fitting = [each for each in found.values() if all(getattr(each, key) == wanted[key] for key in wanted)]
        if len(fitting) != 1:
            said = ", ".join(f"{key}={value}" for key, value in wanted.items()) or "no condition"
            there = ", ".join(found) or "none"
            kind = ValueError if fitting else FileNotFoundError
            raise kind(f"{len(fitting)} BAC schedules in {path} fit ({said}); there are: {there}.")
        return fitting[0]

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        tuples = {name: tuple(values[name]) for name in ("timesteps", "union")}
        units = {unit: tuple(steps) for unit, steps in values["units"].items()}
        matrices = {unit: tuple(tuple(row) for row in rows) for unit, rows in values.get("matrices", {}).items()}
        return {**values, **tuples, "units": units, "matrices": matrices}

    def check(self, name: str = "The schedule") -> None:
        """Raise ValueError where the schedule contradicts itself."""
        if not self.units or set(self.units) != set(self.kinds):
            raise ValueError(f"{name} has no units, or no kind for one of them.")
        for unit, steps in self.units.items():
            if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)) or steps[-1] >= self.num_steps:
                raise ValueError(f"{name}: steps of {unit} must rise from 0 and stay below {self.num_steps}.")
