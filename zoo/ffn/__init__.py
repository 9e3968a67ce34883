"""Techniques that act on the feed-forward layers of any model, one a file."""

import importlib
import pkgutil
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a technique when it is first named: `zoo.ffn.prune` after `import zoo`."""
    if name not in _files():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_files()})


def _files() -> list[str]:
    return [file.name for file in pkgutil.iter_modules(__path__)]
