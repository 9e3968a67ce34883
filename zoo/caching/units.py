"""Reuse or forecast the outputs of single units, attention and feed-forward modules, at steps that leave them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState
from torch import Tensor, nn

from zoo.caching.blocks import PlacedBlock, SummedBlock, Unit, summed_blocks, unused_units
from zoo.caching.hooks import ContextStates, outside_graphs
from zoo.caching.runs import RunTracker
from zoo.caching.streams import UnitOutput, version
from zoo.caching.taylor import TaylorFactors

__all__ = ["Turn", "UnitCache", "place_units"]

_HOOK = "zoo_unit_cache"


class Turn(NamedTuple):
    """What is done at a step.

    Args:
        computed: Units to compute.
        kept: Units whose output, if computed, is of use later.
    """

    computed: frozenset[str]
    kept: frozenset[str]


class _Stored(BaseState):
    """What is stored for one context.

    `outputs` are by unit and by how often the unit was called before in the same step, `totals` by the first and the
    last block of a sum and by the same number.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.updates = 0
        self.calls: dict[str, int] = {}
        self.outputs: dict[tuple[str, int], list[TaylorFactors | None]] = {}
        self.versions: dict[tuple[str, int], list[tuple[Tensor, int | None]]] = {}
        self.totals: dict[tuple[int, int, int], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory held, bytes."""
        stored = (factors for parts in self.outputs.values() for factors in parts if factors is not None)
        return sum(factors.nbytes for factors in stored) + sum(total.nbytes for total in self.totals.values())

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Let go of everything."""
        self.outputs.clear()
        self.versions.clear()
        self.totals.clear()


class UnitCache:
    """Stored outputs of the units of a model; its hooks share one.

    Where blocks add the outputs of their units to their input and do nothing else, a run of blocks that leaves out all
    its units is one addition of the sum of their outputs. This differs from adding them one by one by rounding:
    relative 1e-6 in float32.

    Args:
        run: Tells the step.
        turn: Says what is done at a step.
        units: Their names.
        blocks: Those that add the outputs of their units, in running order.
        max_order: Of the forecast; 0 repeats the last output.
        dtype: Type in which forecasts are stored and summed; None is the model's.
        unused: What to say where the model calls none of the units.
    """

    def __init__(
        self,
        run: RunTracker,
        turn: Callable[[int], Turn],
        units: Sequence[str],
        blocks: Sequence[SummedBlock] = (),
        max_order: int = 0,
        dtype: torch.dtype | None = None,
        unused: str = "",
    ) -> None:
        self.run = run
        self._unused = unused
        self.states = ContextStates(_Stored)
        self._turn_of = turn
        self._every = frozenset(units)
        self._blocks = blocks
        self._max_order = max_order
        self._dtype = dtype
        self._ends_by_computed: dict[frozenset[str], tuple[int, ...]] = {}
        self._units: dict[tuple[int, int], tuple[str, ...]] = {}  # of the blocks from the first to before the second
        # of the current call of the model
        self._state = _Stored()
        self._turn = Turn(frozenset(), frozenset())
        self._ends: tuple[int, ...] = tuple(range(len(blocks)))
        self._added = 0  # blocks before this one have been added already
        self.call = 0  # of the current unit, in this step
        self._computed = False
        self._copied: set[str] = set()  # units whose output the model changes in place

    @property
    def nbytes(self) -> int:
        """Memory held for all contexts, bytes."""
        return sum(state.nbytes for state in self.states.stored())

    def begin(self) -> None:
        """Prepare for a call of the model.

        Raises:
            ValueError: The model has called none of the units in the call before, the first of its run.
        """
        if len(self.run.log.calls) == 2 and not self.run.log.units:
            raise ValueError(self._unused)
        if self._computed:
            self._note_memory()
            self._computed = False
        state, step = self.states.get_state(), self.run.step
        if state.step != step:
            self._turn = self._find_turn(state, step)
            state.step = step
            state.calls.clear()
        self._state = state
        self._added = 0
        if self._blocks:
            computed = self._turn.computed
            if computed not in self._ends_by_computed:
                self._ends_by_computed[computed] = self._find_ends(computed)
            self._ends = self._ends_by_computed[computed]

    def _find_turn(self, state: _Stored, step: int) -> Turn:
        """Return what is done in the first call of a step."""
        turn = self._turn_of(step)
        missed = range(step if state.step is None else state.step + 1, step)
        if self.run.began > 0 and state.updates <= self._max_order:
            # a branch that starts late gets as many full steps as its forecast needs
            state.updates += 1
            return Turn(self._every, self._every)
        if missed:  # it makes up for what fell into the steps that it was not called at
            computed = turn.computed.union(*(self._turn_of(other).computed for other in missed))
            turn = Turn(computed, turn.kept | (computed - turn.computed))
        return turn

    def _find_ends(self, computed: frozenset[str]) -> tuple[int, ...]:
        """Return for each block where the run of blocks ends that leave out all their units: itself if it does not."""
        ends = list(range(len(self._blocks)))
        for index in reversed(ends):
            block = self._blocks[index]
            if computed.isdisjoint(block.units):
                joins = not block.is_last and ends[index + 1] > index + 1
                ends[index] = ends[index + 1] if joins else index + 1
        return tuple(ends)

    def reset(self) -> None:
        """Forget all contexts."""
        self._note_memory()
        self.states.reset()

    def _note_memory(self) -> None:
        self.run.log.bytes_held = max(self.run.log.bytes_held, self.nbytes)

    def reuse(self, unit: str) -> list[Tensor | None] | None:
        """Return the parts of the output to use in place of a computation, or None to compute."""
        state, step = self._state, self.run.step
        call = self.call = state.calls.get(unit, 0)
        state.calls[unit] = call + 1
        # a context that starts late has nothing stored, and computes although it is not its turn
        parts = None if unit in self._turn.computed or not self._intact(unit) else state.outputs.get((unit, call))
        self.run.log.note(self.run.branch, (unit,), step, skipped=parts is not None)
        if parts is None:
            self._computed = True
            state.totals.clear()
            return None
        forecast = [None if factors is None else factors.predict(step) for factors in parts]
        return [None if part is None else part.clone() for part in forecast] if unit in self._copied else forecast

    def _intact(self, unit: str) -> bool:
        """Return whether what is stored of a unit is as it was; if not, it is dropped, and copied from now on."""
        key = unit, self.call
        if all(version(tensor) == was for tensor, was in self._state.versions.get(key, ())):
            return True
        self._copied.add(unit)
        self._state.outputs.pop(key, None)
        self._state.versions.pop(key, None)
        return False

    def reuse_blocks(self, index: int) -> tuple[Tensor, ...] | None:
        """Return what to add in place of a block and those after it that are left out as a whole, or None to compute.

        Args:
            index: Of the block. Nothing is left to add where an earlier block's sum was for this one too.
        """
        if index < self._added:
            if index + 1 == self._added:
                self._added = 0
            return ()
        end = self._ends[index]
        if end == index:
            return None
        units = self._units.get((index, end))
        if units is None:
            units = tuple(unit for block in self._blocks[index:end] for unit in block.units)
            self._units[index, end] = units
        call = self._state.calls.get(units[0], 0)
        total = self._total((index, end, call), units)
        if total is None:
            return None
        self._state.calls.update(dict.fromkeys(units, call + 1))
        self.run.log.note(self.run.branch, units, self.run.step, skipped=True)
        self._added = end if end > index + 1 else 0
        return (total,)

    def _total(self, key: tuple[int, int, int], units: Sequence[str]) -> Tensor | None:
        """Return the sum of the outputs of units, None if one of them has nothing stored."""
        state, step = self._state, self.run.step
        if key in state.totals:
            return state.totals[key]
        stored = [factors for unit in units for factors in state.outputs.get((unit, key[2]), [None])]
        outputs = [factors.predict(step) for factors in stored if factors is not None]
        if len(outputs) < len(stored):
            return None
        total = torch.stack(outputs).sum(0)
        if not self._max_order:  # the same at the next step
            state.totals[key] = total
        return total

    def wants(self, unit: str) -> bool:
        """Return whether to store an output that was computed; if not, what was stored before is dropped."""
        if unit in self._turn.kept:
            return True
        self._state.outputs.pop((unit, self.call), None)
        self._state.versions.pop((unit, self.call), None)
        return False

    def keep(self, unit: str, parts: Sequence[Tensor | None]) -> None:
        """Store the parts of an output that was computed; a unit is not called within itself.

        Without parts, nothing is stored, and the unit is computed again at the next step.
        """
        outputs, key = self._state.outputs, (unit, self.call)
        self._intact(unit)
        if not any(part is not None for part in parts):
            outputs.pop(key, None)
            self._state.versions.pop(key, None)
            return
        if unit in self._copied or any(part is not None and part.is_inference() for part in parts):
            self._copied.add(unit)
            parts = [None if part is None else part.clone() for part in parts]
        stored = outputs.get(key)
        if stored is None or len(stored) != len(parts):
            stored = [None if part is None else TaylorFactors(self._max_order, self._dtype) for part in parts]
            outputs[key] = stored
        for factors, part in zip(stored, parts, strict=True):
            if factors is not None and part is not None:
                factors.update(part, self.run.step)
        self._state.versions[key] = [(part, version(part)) for part in parts if part is not None]


class _BlockHook(ModelHook):
    """Add a stored sum in place of a block and those after it, if all their units are left out."""

    def __init__(self, cache: UnitCache, block: PlacedBlock, index: int) -> None:
        super().__init__()
        self.cache = cache
        self._block = block
        self._index = index

    @outside_graphs
    def _reuse(self) -> tuple[Tensor, ...] | None:
        return self.cache.reuse_blocks(self._index)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        change = self._reuse()
        if change is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._block.changed(change, args, kwargs) if change else self._block.passed(args, kwargs)


class _UnitHook(ModelHook):
    """Ask the cache before the unit is computed, and tell it afterwards."""

    def __init__(self, cache: UnitCache, unit: Unit) -> None:
        super().__init__()
        self.cache = cache
        self._path = unit.path
        self._output = UnitOutput(unit.block)

    @outside_graphs
    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Return whether the unit is left out; then what it returns, and else what its inputs are."""
        parts = self.cache.reuse(self._path)
        if parts is None:
            return False, self._output.before(args, kwargs)
        return True, self._output.assembled(parts, self.cache.call, args, kwargs)

    @outside_graphs
    def _after(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
        if self.cache.wants(self._path):
            self.cache.keep(self._path, self._output.parts(output, self.cache.call, args, kwargs, before))

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_left_out, found = self._before(args, kwargs)
        if is_left_out:
            return found
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._after(output, args, kwargs, found)
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


def place_units(
    model: nn.Module,
    units: Sequence[Unit],
    run: RunTracker,
    turn: Callable[[int], Turn],
    max_order: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """Register the hooks of units.

    Args:
        model: The denoiser.
        units: Its units to reuse, in running order.
        run: As for `UnitCache`, like the rest.
        turn: Says what is done at a step.
        max_order: Of the forecast.
        dtype: Of forecasts.
    """
    blocks = summed_blocks(model, units)
    cache = UnitCache(run, turn, [unit.path for unit in units], blocks, max_order, dtype, unused_units(model, units))
    run.on_call = cache.begin
    for unit in units:
        hook = (_FirstUnitHook if unit is units[0] else _UnitHook)(cache, unit)
        HookRegistry.check_if_exists_or_initialize(unit.module).register_hook(hook, _HOOK)
    for index, block in enumerate(blocks):
        registry = HookRegistry.check_if_exists_or_initialize(block.placed.module)
        registry.register_hook(_BlockHook(cache, block.placed, index), _HOOK)
