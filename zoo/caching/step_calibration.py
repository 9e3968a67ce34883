"""Calibration of step forecasts: the denoiser's outputs at all steps, and what an error at a step does to the result.

The run is made twice from the same noise. In the second one the output of the second step is that of the first, and
how this error grows from step to step is how much one at any step matters at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from zoo.caching.core import cached, require_one_denoiser
from zoo.caching.registry import place, require_evaluation
from zoo.caching.runs import RunTracker
from zoo.caching.step_forecast import StepForecastConfig, WholeHook
from zoo.caching.step_schedules import StepSchedule, plan_steps
from zoo.caching.streams import rebuilt, tensors

__all__ = ["StepCalibration", "calibrate_steps", "other_form"]

_HOOK = "zoo_step_record"


@dataclass(frozen=True, kw_only=True)
class StepCalibration:
    """What step forecasts are planned from.

    Args:
        model: Class of the denoiser.
        num_steps: Calls of the denoiser in a run, for each branch.
        scheduler: Class of the scheduler, None if unknown.
        timesteps: Of the scheduler, empty if unknown.
        products: (steps, steps), mean products of the outputs of any two steps, over runs and branches.
        effects: (steps,), how much an error of each output changes the result.
    """

    model: str
    num_steps: int
    scheduler: str | None
    timesteps: tuple[float, ...]
    products: Tensor
    effects: Tensor

    def plan(self, config: StepForecastConfig, guidance: float | None = None) -> StepSchedule:
        """Choose steps and weights.

        Args:
            config: `updates` counts.
            guidance: Scale of classifier-free guidance, to be noted.
        """
        config.check()
        updates = max(2, round(self.num_steps / 3)) if config.updates is None else config.updates
        steps, forecasts = plan_steps(self.products, self.effects, updates)
        return StepSchedule(
            model=self.model,
            num_steps=self.num_steps,
            steps=steps,
            forecasts=forecasts,
            scheduler=self.scheduler,
            timesteps=self.timesteps,
            guidance=guidance,
        )


@dataclass
class _Run:
    """What was seen in a run.

    Args:
        samples: Noisy images by step, a choice of their elements.
        beside: Outputs by step, of the first branch, at the same elements.
        outputs: By branch and step.
        first: Output of the first step by branch, whole.
        forms: Shapes of the noisy images.
    """

    samples: dict[int, Tensor] = field(default_factory=dict)
    beside: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    forms: set[tuple[torch.Size, ...]] = field(default_factory=set)

    @property
    def num_steps(self) -> int:
        """Steps of the branch that has most."""
        return max(map(len, self.outputs.values()), default=0)

    def whole_outputs(self) -> list[Tensor]:
        """Return (steps, elements) of each branch that was active at all steps."""
        whole = [steps for steps in self.outputs.values() if len(steps) == self.num_steps]
        return [torch.stack([output for _, output in sorted(steps.items())]) for steps in whole]


class _StepRecord:
    """A cache that skips nothing, and looks at inputs and outputs of the denoiser; configuration and state in one."""

    def __init__(self, config: StepForecastConfig) -> None:
        self.config = config
        self.repeats = False  # the output of the second step is that of the first
        self.model = ""
        self.scheduler: str | None = None
        self.timesteps: tuple[float, ...] = ()
        self.runs: list[_Run] = []

    def __copy__(self) -> _StepRecord:
        return self  # what is placed is what is read afterwards

    def choose(self, parts: list[Tensor]) -> Tensor:
        """Return a fixed choice of elements."""
        flat = torch.cat([part.flatten() for part in parts])
        if len(flat) > self.config.max_features:
            generator = torch.Generator().manual_seed(self.config.seed)
            chosen = torch.randperm(len(flat), generator=generator)[: self.config.max_features]
            flat = flat[chosen.to(flat.device)]
        return flat.double().cpu()


class _RecordHook(WholeHook):
    """Look at inputs and outputs."""

    def __init__(self, record: _StepRecord, run: RunTracker) -> None:
        super().__init__(run)
        self._record = record
        self._log: object = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self.fn_ref.original_forward(*args, **kwargs)
        return self._look(output)

    @torch.compiler.disable
    @torch.no_grad()
    def _look(self, output: Any) -> Any:
        run, record = self.run, self._record
        if self._log is not run.log:
            self._log = run.log
            record.runs.append(_Run())
            if run.own_timesteps:
                record.scheduler = type(run.scheduler).__name__
                record.timesteps = tuple(run.own_timesteps)
        seen = record.runs[-1]
        parts = [tensor for _, tensor in tensors(output) if tensor.is_floating_point()]
        seen.forms.add(tuple(tensor.shape for tensor in run.sample))
        if run.step not in seen.samples:
            # an output and its noisy images are compared where they are alike, as far as they are
            seen.samples[run.step] = record.choose(_common(run.sample, parts))
            seen.beside[run.step] = record.choose(_common(parts, run.sample))
        seen.outputs.setdefault(run.branch, {})[run.step] = record.choose(parts)
        if run.step == 0:
            seen.first[run.branch] = rebuilt(output, {path: tensor.clone() for path, tensor in tensors(output)})
        if record.repeats and run.step == 1 and run.branch in seen.first:
            return seen.first[run.branch]
        return output


def _common(tensors_of: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that others have too: the first channels or tokens where one has more of them."""
    pairs = zip(tensors_of, others, strict=False)
    return [
        one[tuple(slice(0, min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))]
        for one, other in pairs
        if one.ndim == other.ndim
    ] or tensors_of


@place.register
def _record(config: _StepRecord, model: nn.Module, run: RunTracker) -> None:
    require_evaluation(config.config, model)
    config.model = type(model).__name__
    HookRegistry.check_if_exists_or_initialize(model).register_hook(_RecordHook(config, run), _HOOK)


def other_form(method: str, model: str) -> str:
    """Return what to say of runs in which the images change their form."""
    return (
        f"{method} cannot be calibrated: the images that {model} is given change their form within the run, so that "
        f"its steps cannot be compared. TaylorSeerConfig needs no calibration."
    )


def calibrate_steps(
    pipe_or_model: DiffusionPipeline | nn.Module, config: StepForecastConfig, run: Callable[[], object]
) -> StepCalibration:
    """Run a model twice, in the second run with an error at the second step.

    Memory: `steps * branches * max_features` numbers of 8 bytes, on the CPU.

    Args:
        pipe_or_model: A pipeline or a denoiser without a cache.
        config: `max_features` and `seed` count.
        run: Makes one or more whole runs, with the steps, scheduler and guidance of later use, each time from the same
            noise.

    Raises:
        ValueError: `run` did not call the denoiser, its runs have different numbers of steps, or it starts from other
            noise the second time.
    """
    config.check()
    require_one_denoiser(pipe_or_model)
    record = _StepRecord(config)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), cached(pipe_or_model, record):
        run()
    runs, record.runs = record.runs, []
    record.repeats = True
    with cached(pipe_or_model, record):
        run()
    if any(len(each.forms) > 1 for each in runs):
        raise ValueError(other_form("StepForecastConfig", record.model))
    counts = sorted({each.num_steps for each in runs})
    if not counts:
        raise ValueError("The run of the calibration did not call the denoiser.")
    if len(counts) > 1:
        raise ValueError(f"The runs of a calibration need the same number of steps, got {counts}.")
    # of several runs in one call, the later ones may go on from what the earlier ones have made (long videos)
    again = [
        pair for pair in zip(runs, record.runs, strict=False) if torch.equal(pair[0].samples[0], pair[1].samples[0])
    ]
    if len(runs) != len(record.runs) or not again or again[0][0] is not runs[0]:
        raise ValueError(
            "The calibration of step forecasts runs twice and needs the same noise each time: let `run` seed its "
            "generator anew, generator=torch.Generator().manual_seed(0)."
        )
    own = [outputs for one in runs for outputs in one.whole_outputs()]
    return StepCalibration(
        model=record.model,
        num_steps=counts[0],
        scheduler=record.scheduler,
        timesteps=record.timesteps,
        products=torch.stack([outputs @ outputs.T / outputs.shape[1] for outputs in own]).mean(0),
        effects=_effects([one for one, _ in again], [other for _, other in again]),
    )


def _effects(runs: list[_Run], repeated: list[_Run]) -> Tensor:
    """Return how much an error of each output changes the result: by its own step, then as it grows to the end."""
    steps = runs[0].num_steps
    samples = [torch.stack([run.samples[step] for step in range(steps)]) for run in runs]
    moved = [torch.stack([run.samples[step] for step in range(steps)]) for run in repeated]
    errors = torch.cat([(one - other) for one, other in zip(samples, moved, strict=True)], dim=1).norm(dim=1)
    growth = torch.ones(steps + 1, dtype=torch.float64)
    if steps > 3 and bool((errors[2:] > 0).all()) and bool(errors.isfinite().all()):
        growth[2:steps] = errors[-1] / errors[2:]
        growth[:2] = growth[2]
    outputs = [torch.stack([run.beside[step] for step in range(steps)]) for run in runs]
    own = torch.ones(steps, dtype=torch.float64)
    if samples[0].shape == outputs[0].shape:
        # the next noisy images are nearly a sum of these and the output, as the scheduler weighs them
        for step in range(steps - 1):
            given = torch.stack([torch.cat([run[step] for run in samples]), torch.cat([run[step] for run in outputs])])
            following = torch.cat([run[step + 1] for run in samples])
            products = given @ given.T
            products += 1e-12 * products.diagonal().mean() * torch.eye(2)
            own[step] = torch.linalg.solve(products, given @ following)[1]
        own[-1] = own[-2] if steps > 1 else 1
    return own * growth[1:]
