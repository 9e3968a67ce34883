"""How a public name goes: it warns with its replacement, and is an error once its last version is reached."""

from __future__ import annotations

import warnings

from zoo.version import __version__

__all__ = ["deprecate"]


def deprecate(name: str, removed_in: str, use: str, *, stacklevel: int = 3) -> None:
    """Warn that a name is going to be removed; call it first in what is to go.

    Args:
        name: What the caller used.
        removed_in: Version that does not have it any more, like "0.3.0".
        use: What to use in its place.
        stacklevel: Of the warning: 3 points at the caller of the function that calls this.

    Raises:
        RuntimeError: That version is reached: the name was to be removed.
    """
    if _numbers(__version__) >= _numbers(removed_in):
        raise RuntimeError(f"{name} was to be removed in {removed_in}, and this is {__version__}: use {use}.")
    warnings.warn(f"{name} is removed in {removed_in}: use {use}.", FutureWarning, stacklevel=stacklevel)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3])
