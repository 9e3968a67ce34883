"""Settings as plain data, which any reader of a checkpoint takes without running code from it, and back."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["arguments_of", "as_config", "differences", "plain", "require_own_places"]

ConfigT = TypeVar("ConfigT")


def plain(value: Any) -> Any:
    """Turn data classes, enumerations, paths and NumPy's numbers, at any depth, into what `weights_only=True` reads."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = [plain(entry) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"  # what it was; it cannot be kept


def arguments_of(model: Any) -> dict[str, Any]:
    """Return what a model of diffusers was built with, from its `config`."""
    return plain({key: value for key, value in model.config.items() if not key.startswith("_")})


def as_config(kind: type[ConfigT], value: Any) -> ConfigT:
    """Return `value` as the data class `kind`, which a checkpoint keeps as a mapping of its fields."""
    return kind(**value) if isinstance(value, Mapping) else value


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return what differs between two settings as plain data: dotted name -> (old, new)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*old, *new]):
            if key in old and key in new:  # what only one of two versions knows says nothing
                found |= differences(old[key], new[key], f"{name}.{key}" if name else str(key))
        return found
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        same = len(old) == len(new) and not any(differences(one, two) for one, two in zip(old, new, strict=True))
        return {} if same else {name: (old, new)}
    return {} if old == new else {name: (old, new)}


def require_own_places(model_args: Mapping[str, Any] | None, **said: Any) -> None:
    """Refuse arguments of the model that a task says itself.

    Args:
        model_args: The user's.
        **said: What the task says.

    Raises:
        ValueError: An argument is said twice; the message has both values.
    """
    for key, value in (model_args or {}).items():
        if key in said:
            raise ValueError(f"model_args: leave out {key}={value}, it is {said[key]} here.")
