"""Notice where one sampling run ends and the next begins, also when the last was aborted, and count its steps."""

from __future__ import annotations

import inspect
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import CacheContext
from torch import Tensor, nn

from zoo.caching.compiling import outside_graphs
from zoo.caching.runlog import Call, RunLog
from zoo.caching.state import DEFAULT_CONTEXT, ContextStates

__all__ = ["RunTracker"]

_TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t")
_LIKENESS = 0.005  # of the training timesteps: a timestep may be rounded to bfloat16


class RunTracker:
    """Watch the calls of a denoiser, call `on_new_run` before the first one of each run, and count steps.

    `on_call` is called before each one, when its step and context are known.

    In a pipeline, a run begins where its scheduler has got new timesteps. A denoiser alone has begun a new run where
    its timestep turns back, or comes to the first one again, within a cache context. A change of shape, type or device
    of the images is always a new run, since nothing stored fits them.

    A step is what `CacheContext.step_index` says; without it, a new step begins where a context comes up again. So
    a context that starts or ends within the run counts with the others.

    It is a pair of forward hooks of PyTorch, not of diffusers: accelerate's offloading exchanges the forward of whole
    models and drops hooks of the latter kind from it.

    Args:
        model: The denoiser.
        pipeline: The pipeline that calls it, if there is one.
    """

    def __init__(self, model: nn.Module, pipeline: DiffusionPipeline | None = None) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._argument = next((name for name in _TIMESTEP_ARGUMENTS if name in names), None)
        self._position = names.index(self._argument) if self._argument else None
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._timesteps: Tensor | None = None
        self._scheduled = False
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._inputs: dict[str, tuple[Any, ...]] = {}
        self._timestep: float | Tensor = 0.0
        self._seen: set[str] = set()
        self._begun = 0.0
        self._first_index: int | None = None
        self.step = -1
        self.start = 0
        self.num_steps: int | None = None
        self.context_name = DEFAULT_CONTEXT.name
        self.log = RunLog()
        self.states: list[ContextStates] = []
        self.observed: list[ContextStates] = []
        self.tuned_steps: int | None = None
        self.on_new_run: Callable[[], None] = lambda: None
        self.on_call: Callable[[], None] = lambda: None

    def attach(self, model: nn.Module) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
        """Begin to watch."""
        return (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        )

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, or None."""
        return getattr(self._pipeline() if self._pipeline else None, "scheduler", None)

    @property
    def timesteps(self) -> Tensor | None:
        """All timesteps of the scheduler in this run, or None where it does not drive the run."""
        return self._timesteps if self._scheduled else None

    @property
    def is_last(self) -> bool:
        """Whether this is known to be the last step of the run."""
        return self.num_steps is not None and self.step >= self.num_steps - 1

    def current_timestep(self) -> float:
        """Return the timestep of the current call, of the first sample."""
        if isinstance(self._timestep, Tensor):
            self._timestep = float(self._timestep.flatten()[0])
        return self._timestep

    def forget(self) -> None:
        """Take the next call for the first one of a run."""
        self._first.clear()
        self._last.clear()
        self._inputs.clear()
        self._seen.clear()
        self._scheduled = False
        self._first_index = None
        self.step = -1

    @outside_graphs
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._timestep = self._read_timestep(args, kwargs)
        context = self.states[0].context if self.states else DEFAULT_CONTEXT
        name = self.context_name = context.name
        inputs = _describe(args, kwargs)
        timesteps = getattr(self.scheduler, "timesteps", None)
        fresh = timesteps is not None and timesteps is not self._timesteps
        over = self._scheduled and self.num_steps is not None and name in self._seen and self.is_last
        if fresh or over or (not self._scheduled and self._turned_back(name)) or self._changed(name, inputs):
            self.forget()
            self.on_new_run()
        if fresh:
            self._timesteps, self._scheduled = timesteps, True
        self._inputs[name] = inputs
        if not self._scheduled:
            self._last[name] = self.current_timestep()
            self._first.setdefault(name, self._last[name])
        self._count(context)
        self.log.calls.append(Call(name, self.step))
        self.on_call()
        self._begun = time.perf_counter()

    @outside_graphs
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs = self._inputs.get(self.context_name)
        if inputs and inputs[-1].type == "cpu" and self.log.calls:
            self.log.calls[-1].seconds = time.perf_counter() - self._begun
        if self.observed:
            self._observe()

    def _observe(self) -> None:
        """Note what diffusers' caches did in this call."""
        for states in self.observed:
            skipped = states.left_out(self.context_name)
            if skipped is not None:
                self.log.note(self.context_name, (states.unit,), self.step, skipped=skipped)
        if self.is_last:  # afterwards pipelines have everything dropped
            self.log.bytes_held = max(self.log.bytes_held, sum(states.nbytes for states in self.observed))

    def _changed(self, context: str, inputs: tuple[Any, ...]) -> bool:
        return self._inputs.get(context, inputs) != inputs

    def _count(self, context: CacheContext) -> None:
        """Find the step of this call, and at the first one how many are to come."""
        if self.step < 0:
            self.start = self._find_start() if self._scheduled else 0
            self.num_steps = None
            if self._scheduled and self._timesteps is not None:
                self.num_steps = len(self._timesteps) - self.start
            self.log = RunLog()
            if self.tuned_steps is not None and self.num_steps not in (None, self.tuned_steps):
                warnings.warn(
                    f"The cache was tuned for {self.tuned_steps} steps, this run has {self.num_steps}: "
                    f"`zoo tune-cache` finds a setting for them.",
                    stacklevel=2,
                )
                self.tuned_steps = None  # said once
        index = context.step_index
        if index is not None:
            if self._first_index is None:
                self._first_index = index
            self.step = index - self._first_index
            if context.num_inference_steps is not None:
                self.num_steps = context.num_inference_steps - self._first_index
        elif self.step < 0 or context.name in self._seen:
            self.step += 1
            self._seen.clear()
        self._seen.add(context.name)
        self.log.num_steps = self.num_steps

    def _find_start(self) -> int:
        """Return the position among the scheduler's timesteps that the run starts at: image-to-image, inside them."""
        if begin := getattr(self.scheduler, "begin_index", None):
            return int(begin)
        timesteps: list[float] = [] if self._timesteps is None else torch.as_tensor(self._timesteps).tolist()
        value = self.current_timestep()
        if len(timesteps) < 2 or value <= 1:  # a share of the schedule rather than a timestep, if not its end
            return 0
        tolerance = _LIKENESS * float(getattr(self.scheduler.config, "num_train_timesteps", 1000))
        distances = [abs(timestep - value) for timestep in timesteps]
        closest = min(distances)
        return 0 if distances[0] <= closest + tolerance or closest > tolerance else distances.index(closest)

    def _read_timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | Tensor:
        value = 0.0
        if self._argument in kwargs:
            value = kwargs[self._argument]
        elif self._position is not None and self._position < len(args):
            value = args[self._position]
        return value if isinstance(value, Tensor) else float(value or 0.0)

    def _turned_back(self, context: str) -> bool:
        """Return whether the timestep is the first one again, or went against the direction of the run."""
        if self._argument is None or context not in self._first:
            return False
        first, last, now = self._first[context], self._last[context], self.current_timestep()
        return now == first or (now - last) * (last - first) < 0


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return shape, type and device of the images, the first tensor or list of tensors among the arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        if isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
            return tuple(each.shape for each in value), value[0].dtype, value[0].device
    return ()
