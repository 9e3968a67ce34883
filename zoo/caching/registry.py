"""Which caches there are: each method registers its configuration here, with a function that places its hooks."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

from torch import nn

from zoo.caching.runs import RunTracker

__all__ = ["is_count", "is_threshold", "place", "require", "require_evaluation"]


@singledispatch
def place(config: Any, model: nn.Module, run: RunTracker) -> None:
    """Check that a cache fits a model, then register its hooks; each method registers its configuration here.

    What a function raises is passed on, after the hooks that it has placed are removed. A function that places no hook
    below the model need not notice: the caller does.

    Args:
        config: Configuration of a cache; a copy that may be changed.
        model: The denoiser, not compiled as a whole.
        run: Tells when a run begins and which timestep it is at.

    Raises:
        ValueError: The configuration is wrong, or cannot work on this model.
        TypeError: It is no configuration of a cache.
    """
    known = ", ".join(sorted(cls.__name__ for cls in place.registry if cls is not object and cls.__name__[0] != "_"))
    raise TypeError(f'{config!r} is no cache configuration; known are {known}, and "auto".')


def require(condition: bool, config: Any, name: str, allowed: str) -> None:
    """Raise ValueError that says what is allowed unless the condition holds."""
    if not condition:
        raise ValueError(f"{type(config).__name__}: {name} must be {allowed}, got {getattr(config, name)!r}.")


def is_threshold(value: Any) -> bool:
    """Return whether it is a finite number from 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def is_count(value: Any, least: int) -> bool:
    """Return whether it is a whole number from `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require_evaluation(config: Any, model: nn.Module) -> None:
    """Raise ValueError where the model trains: with dropout, an output of an earlier step is no output of this one."""
    if model.training:
        raise ValueError(f"{type(config).__name__} is for sampling: call {type(model).__name__}.eval() first.")
