"""Reuse or forecast the outputs of single units, attention and feed-forward modules, at steps that leave them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState
from torch import Tensor, nn

from zoo.caching.blocks import Unit
from zoo.caching.runs import RunTracker
from zoo.caching.state import ContextStates
from zoo.caching.taylor import TaylorFactors

__all__ = ["UnitCache", "place_units"]

_HOOK = "zoo_unit_cache"


class _Stored(BaseState):
    """What is stored for one context, by unit and by how often the unit was called before in the same step."""

    def __init__(self) -> None:
        self.step = -1
        self.calls: dict[str, int] = {}
        self.outputs: dict[tuple[str, int], list[TaylorFactors | None]] = {}

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Let go of everything."""
        self.outputs.clear()


class UnitCache:
    """Stored outputs of the units of a model; its hooks share one.

    Args:
        run: Tells the step.
        computes: Whether a unit is computed at the current step.
        max_order: Of the forecast; 0 repeats the last output.
        dtype: Type in which forecasts are stored and summed; None is the model's.
        reuses: Whether a unit's output of the current step is of use at the next one; None where all outputs are.
    """

    def __init__(
        self,
        run: RunTracker,
        computes: Callable[[str], bool],
        max_order: int = 0,
        dtype: torch.dtype | None = None,
        reuses: Callable[[str], bool] | None = None,
    ) -> None:
        self.run = run
        self.states = ContextStates(_Stored)
        self._computes = computes
        self._max_order = max_order
        self._dtype = dtype
        self._reuses = reuses
        self._call = 0

    @property
    def nbytes(self) -> int:
        """Memory held for all contexts, bytes."""
        return sum(
            factors.nbytes
            for state in self.states.stored()
            for parts in state.outputs.values()
            for factors in parts
            if factors is not None
        )

    def reset(self) -> None:
        """Forget all contexts."""
        self.run.log.bytes_held = max(self.run.log.bytes_held, self.nbytes)
        self.states.reset()

    def reuse(self, unit: str) -> list[Tensor | None] | None:
        """Return the parts of the output to use in place of a computation, or None to compute."""
        state, step = self.states.get_state(), self.run.step
        if state.step != step:
            state.step = step
            state.calls.clear()
        call = self._call = state.calls.get(unit, 0)
        state.calls[unit] = call + 1
        # a context that starts late has nothing stored, and computes although it is not its turn
        parts = None if self._computes(unit) else state.outputs.get((unit, call))
        self.run.log.note(self.states.context.name, unit, step, skipped=parts is not None)
        if parts is None:
            return None
        return [None if factors is None else factors.predict(step) for factors in parts]

    def wants(self, unit: str) -> bool:
        """Return whether to store an output that was computed; if not, what was stored before is dropped."""
        if self._reuses is None or self._reuses(unit):
            return True
        self.states.get_state().outputs.pop((unit, self._call), None)
        return False

    def keep(self, unit: str, parts: Sequence[Tensor | None]) -> None:
        """Store the parts of an output that was computed; a unit is not called within itself."""
        state = self.states.get_state()
        key = unit, self._call
        stored = state.outputs.get(key)
        if stored is None or len(stored) != len(parts):
            stored = [None if part is None else TaylorFactors(self._max_order, self._dtype) for part in parts]
            state.outputs[key] = stored
        for factors, part in zip(stored, parts, strict=True):
            if factors is not None and part is not None:
                factors.update(part, self.run.step)


class _UnitHook(ModelHook):
    """Ask the cache before the unit is computed, and tell it afterwards."""

    def __init__(self, cache: UnitCache, unit: Unit) -> None:
        super().__init__()
        self.cache = cache
        self._unit = unit
        self._is_tuple = False

    @torch.compiler.disable
    def _reuse(self) -> list[Tensor | None] | None:
        return self.cache.reuse(self._unit.path)

    @torch.compiler.disable
    def _keep(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.cache.wants(self._unit.path):
            return
        if self._unit.block is not None:
            output = self._unit.block.change(output, args, kwargs)
        self._is_tuple = isinstance(output, tuple | list)
        self.cache.keep(self._unit.path, output if self._is_tuple else [output])

    @torch.compiler.disable
    def _assemble(self, parts: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._unit.block is not None:
            return self._unit.block.changed(parts, args, kwargs)
        return tuple(parts) if self._is_tuple else parts[0]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parts = self._reuse()
        if parts is not None:
            return self._assemble(parts, args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._keep(output, args, kwargs)
        return output


class _FirstUnitHook(_UnitHook):
    """The hook through which contexts and resets reach the cache: one is enough."""

    _is_stateful = True

    def __init__(self, cache: UnitCache, unit: Unit) -> None:
        super().__init__(cache, unit)
        self._states = cache.states  # diffusers looks for it here to say which context is entered

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.cache.reset()
        self.cache.run.forget()
        return module


def place_units(units: Sequence[Unit], cache: UnitCache) -> None:
    """Register the hooks of units, given in running order."""
    for unit in units:
        hook = (_FirstUnitHook if unit is units[0] else _UnitHook)(cache, unit)
        HookRegistry.check_if_exists_or_initialize(unit.module).register_hook(hook, _HOOK)
