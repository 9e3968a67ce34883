"""The hooks of caches: state by branch, where they are, how they go away, and how they stay out of compiled graphs."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

__all__ = [
    "DEFAULT_CONTEXT",
    "ContextStates",
    "PlacedHook",
    "PrivateStates",
    "outside_graphs",
    "placed_hooks",
    "refresh_contexts",
    "refuse_copy",
    "remove_hooks",
    "share_contexts",
    "tell_contexts",
]

DEFAULT_CONTEXT = CacheContext(name="default")

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function out of compiled graphs, as `torch.compiler.disable` does, at next to no cost without compilation.

    The latter's own wrapper costs as much as what a hook does in a step, 6 us, also where nothing is compiled.
    """
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    # the compiler counts what it has made of a piece of code, and gives up with a warning: each has its own
    own: Any = call
    own.__code__ = own.__code__.replace(co_name=f"{function.__name__}_outside_graphs")
    return call


def refuse_copy(*_: Any) -> Any:
    """Raise RuntimeError: the hooks of a copied model would run the weights of the original in silence."""
    raise RuntimeError("A model with a cache cannot be copied or pickled: call zoo.disable_cache first.")


class ContextStates(StateManager):
    """diffusers' `StateManager`, with one state a branch of guidance, also where no `cache_context` names it.

    Without it, diffusers' block caches stop with an error on DiT, PixArt, SD3 and all other models whose pipelines
    enter no context.
    """

    unit = ""  # of diffusers' caches: what these states are of
    __reduce__ = refuse_copy

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._entered = threading.local()
        self.branch: str | None = None  # of the current call, see zoo.caching.runs
        super().__init__(*args, **kwargs)

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
    def _context(self) -> CacheContext:
        # threads that enter contexts of their own must not disturb the call of another
        return getattr(self._entered, "context", None) or DEFAULT_CONTEXT

    @_context.setter
    def _context(self, context: CacheContext | None) -> None:
        self._entered.context = context

    @property
    def context(self) -> CacheContext:
        """The context of the current call."""
        return self._context

    def set_context(self, context: CacheContext | str | None) -> None:
        """Enter a context; None leaves it."""
        self._context = CacheContext(context) if isinstance(context, str) else context

    def get_state(self) -> Any:
        """Return the state of the current branch, made where there is none."""
        branch = self.branch if self.branch is not None else self.context.name
        state = self._state_cache.get(branch)
        if state is None:
            state = self._state_cache[branch] = self._state_cls(*self._init_args, **self._init_kwargs)
        return state

    def stored(self) -> Iterable[Any]:
        """Return the states of all branches."""
        return self._state_cache.values()

    def drop(self, branch: str) -> None:
        """Forget the state of a branch."""
        state = self._state_cache.pop(branch, None)
        if state is not None:
            state.reset()

    def left_out(self, branch: str) -> bool | None:
        """Return whether diffusers' cache left its unit out in the last call; None where its state does not tell.

        Args:
            branch: Of the call.
        """
        state = self._state_cache.get(branch)
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
        """Forget the states of all branches; stay in the current context, as a run may begin inside it."""
        for state in self._state_cache.values():
            state.reset(*args, **kwargs)
        self._state_cache.clear()


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


class PrivateStates:
    """The states that hooks of Pyramid Attention Broadcast and FasterCache hold, exchanged as branches take turns.

    diffusers keeps one a hook, whatever the context: what attention gave for one branch would be taken for another.

    Args:
        hooks: Those of a cache; others than these two are passed over.
    """

    def __init__(self, hooks: Sequence[PlacedHook]) -> None:
        own = [placed.hook for placed in hooks if placed.hook._is_stateful and hasattr(placed.hook, "state")]
        self._hooks: list[Any] = own
        self._branch: str | None = None
        self._stored: dict[str, list[Any]] = {}

    def enter(self, branch: str) -> None:
        """Give the hooks the states of a branch."""
        if branch == self._branch or not self._hooks:
            return
        if self._branch is None:  # the first branch of a run has what is in place
            self._branch = branch
            return
        self._stored[self._branch] = [hook.state for hook in self._hooks]
        states = self._stored.pop(branch, None) or [type(hook.state)() for hook in self._hooks]
        for hook, state in zip(self._hooks, states, strict=True):
            hook.state = state
        self._branch = branch

    def drop(self, branch: str) -> None:
        """Forget the states of a branch."""
        self._stored.pop(branch, None)
        if branch == self._branch:
            for hook in self._hooks:
                hook.state.reset()

    def reset(self) -> None:
        """Forget the states of all branches; those in place are reset by diffusers."""
        self._stored.clear()
        self._branch = None


class PlacedHook(NamedTuple):
    """A hook and where it is."""

    path: str
    module: nn.Module
    name: str
    hook: ModelHook

    @property
    def registry(self) -> HookRegistry:
        """The registry of the module."""
        return self.module.__dict__["_diffusers_hook"]

    @property
    def in_place(self) -> bool:
        """Whether the hook is still registered."""
        registry = self.module.__dict__.get("_diffusers_hook")
        return registry is not None and registry.hooks.get(self.name) is self.hook


def placed_hooks(model: nn.Module) -> Iterator[PlacedHook]:
    """Yield all hooks of a model and its parts, on each module in the order in which they were registered."""
    for path, wrapped in model.named_modules():
        module = unwrap_module(wrapped)
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and not path.endswith("_orig_mod"):
            for name in registry._hook_order:
                yield PlacedHook(path, module, name, registry.hooks[name])


def share_contexts(hooks: Sequence[PlacedHook]) -> list[ContextStates]:
    """Replace the state managers of hooks by ours, shared as theirs were, and return them."""
    ours: dict[int, ContextStates] = {}
    theirs: list[tuple[PlacedHook, str, StateManager]] = []
    for placed in hooks:
        for attribute, value in vars(placed.hook).items():
            if isinstance(value, ContextStates):
                ours[id(value)] = value
            elif isinstance(value, StateManager):
                theirs.append((placed, attribute, value))
    counts = Counter(id(manager) for _, _, manager in theirs)
    for placed, attribute, manager in theirs:
        key = id(manager)
        if key not in ours:
            ours[key] = ContextStates.adopt(manager, placed.path if counts[key] == 1 else "blocks")
        setattr(placed.hook, attribute, ours[key])
    return list(ours.values())


def tell_contexts(hooks: Sequence[PlacedHook]) -> ContextStates:
    """Have diffusers say which context is entered, for hooks that hold no states by context, and return where."""
    states = ContextStates(BaseState)
    hook: Any = next((placed.hook for placed in hooks if placed.hook._is_stateful), None)
    if hook is not None:
        hook.zoo_states = states  # diffusers looks at all attributes
    return states


def refresh_contexts(model: nn.Module) -> None:
    """Make `cache_context` look for hooks anew, after some came or went."""
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()


def remove_hooks(model: nn.Module, hooks: Sequence[PlacedHook]) -> None:
    """Take hooks away, last placed first, and leave modules as they were before.

    Args:
        model: The whole model.
        hooks: Hooks below it; those that are gone already are passed over.

    Raises:
        RuntimeError: A hook that replaces the forward was registered over one of these: diffusers would cut it off.
    """
    present = [placed for placed in hooks if placed.in_place]
    own = {id(placed.hook) for placed in present}
    for placed in present:
        order = placed.registry._hook_order
        for name in order[order.index(placed.name) + 1 :]:
            later = placed.registry.hooks[name]
            if id(later) not in own and hasattr(later, "new_forward"):
                raise RuntimeError(f"Remove the hook {name!r} of {placed.path} first: it was placed over this cache.")
    for placed in reversed(present):
        placed.registry.remove_hook(placed.name, recurse=False)
    refresh_contexts(model)
    for module in {id(placed.module): placed.module for placed in hooks}.values():
        _tidy(module)


def _tidy(module: nn.Module) -> None:
    """Drop what an empty registry leaves on a module, so that it can be copied and pickled again."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None or registry.hooks:
        return
    del module._diffusers_hook
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
