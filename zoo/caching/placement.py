"""diffusers' hooks as a list: what is placed below a model, and how to take it away again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from zoo.caching.state import ContextStates

__all__ = ["PlacedHook", "placed_hooks", "refresh_contexts", "remove_hooks", "share_contexts"]


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
