"""Calibration of caches. Of BAC: how alike the outputs of a model's parts are at any two steps of uncached runs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState
from torch import Tensor, nn

from zoo.caching.bac import BACConfig
from zoo.caching.blocks import Unit, model_units, unused_units
from zoo.caching.core import cached, require_one_denoiser
from zoo.caching.hooks import ContextStates
from zoo.caching.registry import place, require_evaluation
from zoo.caching.runs import RunTracker
from zoo.caching.schedules import (
    BACSchedule,
    Kind,
    Metric,
    block_error,
    bubbling_union,
    choose_steps,
    similarity,
    top_errors,
)
from zoo.caching.step_calibration import calibrate_steps, other_form
from zoo.caching.step_forecast import StepForecastConfig
from zoo.caching.streams import UnitOutput

__all__ = ["Calibration", "calibrate", "calibrate_cache"]

Planned = TypeVar("Planned", BACConfig, StepForecastConfig)

_RECORD_HOOK = "zoo_bac_record"
_DIGITS = 6  # of the likenesses in a saved schedule


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How alike the outputs of each unit are at any two steps, from one or more uncached runs.

    Args:
        model: Class of the denoiser.
        num_steps: Calls of the denoiser in a run, for each context.
        scheduler: Class of the scheduler, None if unknown.
        timesteps: Of the scheduler, empty if unknown.
        metric: What `matrices` holds.
        kinds: What each unit is, in the order in which the units run.
        matrices: (steps, steps) for each unit, averaged over runs, samples and contexts.
        errors: Mean absolute change of each unit's output between any two steps.
        sizes: Mean absolute value of each unit's output.
        trajectories: Samples times contexts that were averaged.
    """

    model: str
    num_steps: int
    scheduler: str | None
    timesteps: tuple[float, ...]
    metric: Metric
    kinds: dict[str, Kind]
    matrices: dict[str, Tensor]
    errors: dict[str, float]
    sizes: dict[str, float]
    trajectories: int

    def plan(self, config: BACConfig, guidance: float | None = None) -> BACSchedule:
        """Choose the steps of all units.

        Args:
            config: `updates`, `union`, `objective`, `shared`, `error`, `always_update_last` and `on_mismatch` count.
            guidance: Scale of classifier-free guidance, to be noted.
        """
        config.check()
        steps = self.num_steps
        updates = min(steps, max(2, round(0.1 * steps))) if config.updates is None else min(config.updates, steps)
        if updates == 1 < steps:
            warnings.warn("updates=1: everything after the first step is a repetition of it.", stacklevel=2)
        matrices = {unit: matrix.tolist() for unit, matrix in self.matrices.items()}
        chosen = choose_steps(matrices, updates, metric=self.metric, objective=config.objective, shared=config.shared)
        errors = self.errors
        if config.error == "relative":
            errors = {unit: error / self.sizes[unit] if error else 0.0 for unit, error in errors.items()}
        union = top_errors(errors, 0 if config.shared else config.union)
        units = bubbling_union(chosen, self.kinds, union)
        if config.always_update_last:
            units = {unit: tuple(sorted({*own, steps - 1})) for unit, own in units.items()}
        return BACSchedule(
            model=self.model,
            num_steps=steps,
            units=units,
            kinds=self.kinds,
            errors=errors,
            scheduler=self.scheduler,
            timesteps=self.timesteps,
            guidance=guidance,
            updates=updates,
            union=union,
            objective=config.objective,
            shared=config.shared,
            metric=self.metric,
            matrices={
                unit: tuple(tuple(round(value, _DIGITS) for value in row) for row in rows)
                for unit, rows in matrices.items()
                if config.on_mismatch == "resample"
            },
        )


def calibrate(
    pipe_or_model: DiffusionPipeline | nn.Module, config: BACConfig, run: Callable[[], object]
) -> Calibration:
    """Run a model uncached, and compare the outputs of its units at all steps.

    Memory: `steps * units * max_features` numbers of 4 bytes for each context, on the CPU.

    Args:
        pipe_or_model: A pipeline or a denoiser without a cache.
        config: `metric`, `max_features` and `seed` count.
        run: Makes one or more whole runs, with the steps, scheduler and guidance of later use. Each sample of each run
            counts alike.

    Raises:
        ValueError: `run` did not call the denoiser, or its runs have different numbers of steps.
    """
    config.check()
    require_one_denoiser(pipe_or_model)
    record = _Record(config)
    with cached(pipe_or_model, record):
        run()
        record.finish()
    return record.result()


class _Record:
    """A cache that skips nothing, and looks at the outputs of all units; its configuration and state in one."""

    def __init__(self, config: BACConfig) -> None:
        self.config = config
        self.shared = _Sums()

    def finish(self) -> None:
        """Take the last run for complete."""
        self.shared.finish(self.config.metric)

    def result(self) -> Calibration:
        """Return the averages."""
        sums = self.shared
        if not sums.steps:
            raise ValueError(sums.unused if sums.called else "The run of the calibration did not call the denoiser.")
        if len(sums.steps) > 1:
            raise ValueError(f"The runs of a calibration need the same number of steps, got {sorted(sums.steps)}.")
        return Calibration(
            model=sums.model,
            num_steps=sums.steps.pop(),
            scheduler=sums.scheduler,
            timesteps=sums.timesteps,
            metric=self.config.metric,
            kinds={unit: kind for unit, kind in sums.kinds.items() if unit in sums.matrices},
            matrices={unit: total / sums.count for unit, total in sums.matrices.items()},
            errors={unit: total / sums.count for unit, total in sums.errors.items()},
            sizes={unit: total / sums.count for unit, total in sums.sizes.items()},
            trajectories=sums.count,
        )


@dataclass
class _Sums:
    """Features of the current run, and sums over those before."""

    model: str = ""
    kinds: dict[str, Kind] = field(default_factory=dict)
    scheduler: str | None = None
    timesteps: tuple[float, ...] = ()
    features: dict[str, dict[str, dict[int, list[Tensor]]]] = field(default_factory=dict)  # context, unit, step: calls
    matrices: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    count: int = 0
    unused: str = ""  # what to say where no unit is called
    called: bool = False

    def finish(self, metric: Metric) -> None:
        """Add the run to the sums; contexts that were active in a part of it only are left out."""
        features, self.features = self.features, {}
        lengths = {context: len(next(iter(units.values()))) for context, units in features.items()}
        if not lengths:
            return
        longest = max(lengths.values())
        self.steps.add(longest)
        if len(self.steps) > 1:
            return
        for context, units in features.items():
            if lengths[context] < longest:
                continue
            for unit in self.kinds:
                if unit not in units:
                    continue
                outputs = [torch.cat(calls, dim=1) for _, calls in sorted(units[unit].items())]
                if len({output.shape for output in outputs}) > 1:
                    raise ValueError(other_form("BACConfig", self.model))
                stacked = torch.stack(outputs, dim=1)
                for sample in stacked:  # (steps, features)
                    self.matrices[unit] = self.matrices.get(unit, torch.zeros(())) + similarity(sample, metric)
                    self.errors[unit] = self.errors.get(unit, 0.0) + block_error(sample)
                    self.sizes[unit] = self.sizes.get(unit, 0.0) + float(sample.abs().mean())
            self.count += len(stacked)


class _RecordHook(ModelHook):
    """Look at the output of a unit."""

    def __init__(self, unit: Unit, record: _Record, run: RunTracker, states: ContextStates) -> None:
        super().__init__()
        self._path = unit.path
        self._output = UnitOutput(unit.block, copies=True)
        self._record = record
        self._run = run
        self._states = states
        self._chosen: dict[tuple[int, int], Tensor] = {}  # by call and size

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = self._output.before(args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._look(output, args, kwargs, before)
        return output

    @torch.compiler.disable
    @torch.no_grad()
    def _look(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
        context = self._record.shared.features.setdefault(self._run.branch, {})
        seen = len(context.get(self._path, {}).get(self._run.step, ()))
        parts = [part for part in self._output.parts(output, seen, args, kwargs, before) if part is not None]
        if not parts:
            return
        if len({len(part) for part in parts}) > 1:
            parts = [part.flatten().unsqueeze(0) for part in parts]  # one sequence of tokens, without samples
        flat = torch.cat([part.flatten(1) for part in parts], dim=1)  # (B, elements)
        calls = context.setdefault(self._path, {}).setdefault(self._run.step, [])
        calls.append(flat.index_select(1, self._choose(seen, flat)).float().cpu())

    def _choose(self, call: int, flat: Tensor) -> Tensor:
        key = call, flat.shape[1]
        if key not in self._chosen:
            limit = max(1, self._record.config.max_features // len(flat))
            generator = torch.Generator().manual_seed(self._record.config.seed)
            chosen = torch.randperm(flat.shape[1], generator=generator)[:limit].sort().values
            self._chosen[key] = chosen.to(flat.device)
        return self._chosen[key]


class _FirstRecordHook(_RecordHook):
    """The hook through which contexts and ends of runs reach the record."""

    _is_stateful = True

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._run.step == 0:
            shared, timesteps = self._record.shared, self._run.own_timesteps
            if timesteps:
                shared.scheduler = type(self._run.scheduler).__name__
                shared.timesteps = tuple(timesteps)
        return super().new_forward(module, *args, **kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._record.finish()
        self._run.forget()
        return module


@place.register
def _record(config: _Record, model: nn.Module, run: RunTracker) -> None:
    shared = config.shared
    units, states = model_units(model, "BACConfig"), ContextStates(BaseState)
    require_evaluation(config.config, model)
    shared.model, shared.kinds = type(model).__name__, {unit.path: unit.kind for unit in units}
    shared.unused = unused_units(model, units)

    def note_call() -> None:
        shared.called = True

    run.on_call = note_call
    for unit in units:
        hook = (_FirstRecordHook if unit is units[0] else _RecordHook)(unit, config, run, states)
        HookRegistry.check_if_exists_or_initialize(unit.module).register_hook(hook, _RECORD_HOOK)


def calibrate_cache(
    pipe_or_model: DiffusionPipeline | nn.Module,
    config: Planned,
    run: Callable[[], object],
    *,
    guidance: float | None = None,
) -> Planned:
    """Find the steps at which each part of a model, or the whole of it, is to be computed.

    Args:
        pipe_or_model: A pipeline or a denoiser without a cache.
        config: What to look for: a `BACConfig` or a `StepForecastConfig`.
        run: Makes one or more whole uncached runs, for example `lambda: pipe("a cat", num_inference_steps=50)`, with
            the steps, scheduler and guidance of later use.
        guidance: Scale of classifier-free guidance in `run`, to be noted in the schedule and its file name.

    Returns:
        The configuration with the schedule, for `zoo.enable_cache`.

    Raises:
        ValueError: A cache is on; the model is unknown; `run` did not call the denoiser, or its runs differ in steps.

    Example:
        >>> config = zoo.calibrate_cache(pipe, zoo.BACConfig(updates=10), lambda: pipe(["cat"]))
        >>> zoo.enable_cache(pipe, config)
    """
    if isinstance(config, StepForecastConfig):
        steps = calibrate_steps(pipe_or_model, config, run)
        return dataclasses.replace(config, schedule=steps.plan(config, guidance))
    if not isinstance(config, BACConfig):
        raise TypeError(f"BACConfig and StepForecastConfig are calibrated, not {type(config).__name__}.")
    return dataclasses.replace(config, schedule=calibrate(pipe_or_model, config, run).plan(config, guidance))
