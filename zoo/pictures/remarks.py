"""What reading a picture says beside its result; pictures are read in several threads at a time.

Filters of warnings belong to the whole process: two threads that each save and restore them would leave those of one
behind for ever.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from PIL import Image

__all__ = ["pillow_silenced", "remark", "without_remarks"]

_silent = ContextVar("silent", default=False)
_lock = threading.Lock()
_readers = 0
_filters: warnings.catch_warnings[None] | None = None


def remark(text: str, stacklevel: int) -> None:
    """Warn of what a picture loses, unless this thread wants to hear nothing."""
    if not _silent.get():
        warnings.warn(text, stacklevel=stacklevel + 1)


@contextmanager
def without_remarks() -> Iterator[None]:
    """Make no remarks in this thread."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


@contextmanager
def pillow_silenced() -> Iterator[None]:
    """Hide Pillow's warnings of sizes and damage, for which ours name the file, as long as any thread is reading."""
    global _filters, _readers
    with _lock:
        if not _readers:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers and _filters is not None:
                _filters.__exit__(None, None, None)
