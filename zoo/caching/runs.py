"""Notice where one sampling run ends and the next begins, also when the last was aborted."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from zoo.caching.state import ContextStates

__all__ = ["RunTracker"]

_TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t")


class RunTracker:
    """Watch the calls of a denoiser and call `on_new_run` before the first one of each run.

    In a pipeline, a run begins where its scheduler has got new timesteps. A denoiser alone has begun a new run where
    its timestep turns back, or comes to the first one again, within a cache context. A change of shape, type or device
    of the images is always a new run, since nothing stored fits them.

    It is a forward pre-hook of PyTorch, not one of diffusers: accelerate's offloading exchanges the forward of whole
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
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._inputs: dict[str, tuple[Any, ...]] = {}
        self._timestep: float | Tensor = 0.0
        self.states: list[ContextStates] = []
        self.on_new_run: Callable[[], None] = lambda: None

    def attach(self, model: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Begin to watch."""
        return model.register_forward_pre_hook(self._before, with_kwargs=True)

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

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._timestep = self._read_timestep(args, kwargs)
        context = self.states[0].context.name if self.states else "default"
        images = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        inputs = () if images is None else (images.shape, images.dtype, images.device)
        scheduler: Any = getattr(self._pipeline() if self._pipeline else None, "scheduler", None)
        scheduled = hasattr(scheduler, "timesteps")
        if scheduled:
            new_run = scheduler.timesteps is not self._timesteps
            self._timesteps = scheduler.timesteps
        else:
            new_run = self._turned_back(context)
        if new_run or self._inputs.get(context, inputs) != inputs:
            self.forget()
            self.on_new_run()
        self._inputs[context] = inputs
        if not scheduled:
            self._last[context] = self.current_timestep()
            self._first.setdefault(context, self._last[context])

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
