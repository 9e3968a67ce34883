"""Step forecasts: compute the whole denoiser at a few steps, and forecast its output at the others.

Between the computed steps, the output is a weighted sum of the last two that were computed: a multistep method whose
steps and weights come from a calibration run. Weights by regression are those of Bespoke Non-Stationary Solvers (Shaul
et al., ICML 2024, https://arxiv.org/abs/2403.01329), reuse of whole outputs in linear combination those of AB-Cache
(https://arxiv.org/abs/2504.10540), and the choice of steps by a dynamic programme is that of BAC
(https://arxiv.org/abs/2506.13456); the combination is ours.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState
from torch import Tensor, nn

from zoo.caching.fitting import find_fit, wrong_steps
from zoo.caching.hooks import ContextStates, outside_graphs
from zoo.caching.registry import is_count, place, require, require_evaluation
from zoo.caching.runs import RunTracker
from zoo.caching.schedules import schedule_of
from zoo.caching.step_schedules import StepSchedule
from zoo.caching.streams import Path, rebuilt, tensors

__all__ = ["StepForecastConfig", "WholeHook"]

_HOOK = "zoo_step_forecast"
_UNIT = "denoiser"


@dataclass(kw_only=True)
class StepForecastConfig:
    """Compute the denoiser at a few steps, and forecast its output at the others at next to no cost.

    Steps and weights come from a calibration, which runs twice from the same noise: `config =
    zoo.calibrate_cache(pipe, StepForecastConfig(updates=16), run)` returns the configuration with a schedule, for
    `zoo.enable_cache(pipe, config)`. On a model as small as pixeldit.cifar10 as on a large one, `steps / updates` is
    how many times as fast it gets.

    Args:
        updates: Steps at which the denoiser is computed, the first one among them; None takes a third, at least 2.
        max_features: Elements of an output that the calibration looks at, chosen at random.
        seed: Of that choice.
        schedule: The schedule, or its file; None before the calibration. With one, nothing else has an effect.
    """

    updates: int | None = None
    max_features: int = 65536
    seed: int = 0
    schedule: StepSchedule | str | PathLike[str] | None = None

    def check(self) -> None:
        """Raise ValueError where a value is out of range."""
        updates = self.updates
        require(updates is None or is_count(updates, 1), self, "updates", "None or a whole number from 1")
        require(is_count(self.max_features, 1), self, "max_features", "a whole number from 1")


class _Stored(BaseState):
    """The outputs of the last two computed steps of a branch, and the last output as it was returned."""

    def __init__(self) -> None:
        self.outputs: dict[int, dict[Path, Tensor]] = {}
        self.returned: Any = None

    @property
    def nbytes(self) -> int:
        """Memory held, bytes."""
        return sum(tensor.nbytes for parts in self.outputs.values() for tensor in parts.values())

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Let go of everything."""
        self.outputs.clear()
        self.returned = None


class WholeHook(ModelHook):
    """A hook on the whole denoiser, through which contexts and resets reach its cache."""

    _is_stateful = True
    works_alone = True  # it needs no hook on the parts of the model

    def __init__(self, run: RunTracker) -> None:
        super().__init__()
        self.run = run
        self._states = ContextStates(_Stored)  # diffusers looks for it here to say which context is entered

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._states.reset()
        self.run.forget()
        return module


class _ForecastHook(WholeHook):
    """Return a forecast in place of the denoiser's output where the schedule says so and there is enough to do it."""

    def __init__(self, schedule: StepSchedule, run: RunTracker) -> None:
        super().__init__(run)
        self.cache = self
        self._schedule = schedule
        self._steps = frozenset(schedule.steps)
        self._checked: object = None
        self._offset = 0
        self._warned = False

    @property
    def nbytes(self) -> int:
        """Memory held for all branches, bytes."""
        return sum(state.nbytes for state in self._states.stored())

    def _find_step(self) -> int:
        """Return the step of the schedule that the run is at."""
        if self._checked is not self.run.log:
            fit = find_fit("step forecast", self._schedule, self.run)
            if fit.wrong is not None:
                raise ValueError(fit.wrong)
            if fit.other_scheduler is not None and not self._warned:
                self._warned = True
                warnings.warn(fit.other_scheduler, stacklevel=2)
            self._checked, self._offset = self.run.log, fit.offset
        step = self.run.step + self._offset
        if step >= self._schedule.num_steps:
            raise ValueError(wrong_steps("step forecast", self._schedule, f"{step + 1} or more"))
        return step

    @outside_graphs
    @torch.no_grad()
    def _forecast(self) -> Any:
        """Return the forecast, None where the denoiser is to be computed."""
        step, state = self._find_step(), self._states.get_state()
        weights = self._schedule.forecasts.get(step, {})
        # a branch that starts late is computed until it has what its forecasts need
        is_forecast = bool(weights) and all(used in state.outputs for used in weights)
        self.run.log.note(self.run.branch, (_UNIT,), self.run.step, skipped=is_forecast)
        if not is_forecast:
            return None
        return rebuilt(
            state.returned,
            {path: _weighted_sum(state.outputs, weights, path) for path in state.outputs[next(iter(weights))]},
        )

    @outside_graphs
    @torch.no_grad()
    def _keep(self, output: Any) -> None:
        """Store an output that forecasts may need; copies, as pipelines may go on in place."""
        step, state = self._find_step(), self._states.get_state()
        if step not in self._steps or not self._schedule.forecasts:
            return
        parts = {path: tensor.detach().clone() for path, tensor in tensors(output) if tensor.is_floating_point()}
        kept = {
            other: stored for other, stored in state.outputs.items() if other < step and stored.keys() == parts.keys()
        }
        state.outputs = {**dict(sorted(kept.items())[-1:]), step: parts}
        state.returned = rebuilt(output, dict(parts))
        self.run.log.bytes_held = max(self.run.log.bytes_held, self.nbytes)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forecast = self._forecast()
        if forecast is not None:
            return forecast
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._keep(output)
        return output


def _weighted_sum(outputs: dict[int, dict[Path, Tensor]], weights: Any, path: Path) -> Tensor:
    """Return the weighted sum of a part of stored outputs, summed in float32 at least."""
    total: Any = 0.0
    for step, weight in weights.items():
        part = outputs[step][path]
        total = total + weight * part.to(torch.promote_types(part.dtype, torch.float32))
    return total.to(part.dtype)


@place.register
def _step_forecast(config: StepForecastConfig, model: nn.Module, run: RunTracker) -> None:
    config.check()
    require_evaluation(config, model)
    schedule = schedule_of(config, StepSchedule)
    if schedule.model != type(model).__name__:
        raise ValueError(f"The step forecast schedule is for a {schedule.model}, this is a {type(model).__name__}.")
    HookRegistry.check_if_exists_or_initialize(model).register_hook(_ForecastHook(schedule, run), _HOOK)
