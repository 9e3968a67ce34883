"""What a user should know of a run that goes on all the same."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["Notice", "in_one_line", "notice"]


class Notice(UserWarning):
    """A remark on data, labels, a resumed run or the machine; the command line prints it in one line."""


def in_one_line(usual: Callable[..., Any], *, quiet: bool = False) -> Callable[..., None]:
    """Return a `warnings.showwarning` that prints each notice once, as a line without its place in code.

    Args:
        usual: Prints the rest.
        quiet: Print no notices.
    """
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            if str(message) not in said and not quiet:
                print(f"note: {message}", file=sys.stderr)
            said.add(str(message))
        else:
            usual(message, category, *where, **more)

    return show


def notice(text: str) -> None:
    """Say something once for all processes."""
    if "lightning.pytorch" not in sys.modules:  # then there is one process
        warnings.warn(text, Notice, stacklevel=3)
        return
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

    rank_zero_warn(text, stacklevel=5, category=Notice)
