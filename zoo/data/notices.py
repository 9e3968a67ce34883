"""What a user should know of a run that goes on all the same."""

from __future__ import annotations

import warnings

__all__ = ["Notice", "notice"]


class Notice(UserWarning):
    """A remark on data, labels or a resumed run; the command line prints it in one line."""


def notice(text: str) -> None:
    """Say something once for all processes."""
    try:
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn
    except ModuleNotFoundError:  # then there is one process
        warnings.warn(text, Notice, stacklevel=3)
    else:
        rank_zero_warn(text, stacklevel=5, category=Notice)
