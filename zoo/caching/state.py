"""State of a cache by cache context, with a default for models whose pipeline names no context."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.hooks.hooks import CacheContext, StateManager

__all__ = ["DEFAULT_CONTEXT", "ContextStates"]

DEFAULT_CONTEXT = CacheContext(name="default")


class ContextStates(StateManager):
    """diffusers' `StateManager`, but a call outside any `cache_context` is in a context of its own.

    Without it, diffusers' block caches stop with an error on DiT, PixArt, SD3 and all other models whose pipelines
    enter no context.
    """

    @classmethod
    def adopt(cls, manager: StateManager) -> ContextStates:
        """Return a manager of the same kind of state, without states yet."""
        return cls(manager._state_cls, manager._init_args, manager._init_kwargs)

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

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget the states of all contexts; stay in the current one, as a run may begin inside it."""
        for state in self._state_cache.values():
            state.reset(*args, **kwargs)
        self._state_cache.clear()
