"""What a user should know of a run that goes on all the same."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["Notice", "in_one_line", "notice"]


class Notice(UserWarning):
    """A remark on data, labels or a resumed run; the command line prints it in one line."""


def in_one_line(usual: Callable[..., Any]) -> Callable[..., None]:
    """Return a `warnings.showwarning` that prints notices as lines without their place in code; `usual` the rest."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            print(f"note: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    return show


def notice(text: str) -> None:
    """Say something once for all processes."""
    try:
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn
    except ModuleNotFoundError:  # then there is one process
        warnings.warn(text, Notice, stacklevel=3)
    else:
        rank_zero_warn(text, stacklevel=5, category=Notice)
