"""State of a cache by cache context, with a default for models whose pipeline names no context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.hooks.hooks import CacheContext, StateManager
from torch import Tensor

__all__ = ["DEFAULT_CONTEXT", "ContextStates"]

DEFAULT_CONTEXT = CacheContext(name="default")


class ContextStates(StateManager):
    """diffusers' `StateManager`, but a call outside any `cache_context` is in a context of its own.

    Without it, diffusers' block caches stop with an error on DiT, PixArt, SD3 and all other models whose pipelines
    enter no context.
    """

    unit = ""  # of diffusers' caches: what these states are of

    @classmethod
    def adopt(cls, manager: StateManager, unit: str) -> ContextStates:
        """Return a manager of the same kind of state, without states yet.

        Args:
            manager: Of one of diffusers' caches.
            unit: What its states are of, for summaries.
        """
        ours = cls(manager._state_cls, manager._init_args, manager._init_kwargs)
        ours.unit = unit
        return ours

    @property
    def context(self) -> CacheContext:
        """The context of the current call."""
        return self._context if self._context is not None else DEFAULT_CONTEXT

    def set_context(self, context: CacheContext | str | None) -> None:
        """Enter a context; None leaves it."""
        self._context = CacheContext(context) if isinstance(context, str) else context

    def stored(self) -> Iterable[Any]:
        """Return the states of all contexts."""
        return self._state_cache.values()

    def left_out(self, context: str) -> bool | None:
        """Return whether diffusers' cache left its unit out in the last call; None where its state does not tell.

        Args:
            context: Name of the context of the call.
        """
        state = self._state_cache.get(context)
        if hasattr(state, "should_compute"):
            return not state.should_compute
        if hasattr(state, "last_update_step"):
            return bool(state.last_update_step != state.current_step)
        return None

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in the states of diffusers' caches, bytes."""
        return sum(_bytes(vars(state)) for state in self.stored())

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget the states of all contexts; stay in the current one, as a run may begin inside it."""
        for state in self._state_cache.values():
            state.reset(*args, **kwargs)
        self._state_cache.clear()


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
