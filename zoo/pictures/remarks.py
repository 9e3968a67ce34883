"""What reading a picture says beside its result, and sets of Pillow's; pictures are read in several threads at a time.

Filters of warnings and Pillow's bounds belong to the whole process: two threads that each save and restore them would
leave those of one behind for ever.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

from PIL import Image, PngImagePlugin

__all__ = [
    "pillow_bound",
    "pillow_reads_long_texts",
    "pillow_silenced",
    "pillow_unbounded",
    "remark",
    "without_remarks",
]

_LONGEST_TEXT = 64 * 2**20  # bytes of text or a profile in a PNG; Pillow's own bound of 1 MB refuses real files

_silent = ContextVar("silent", default=False)
_lock = threading.Lock()
_bounds: list[int | None] = []  # Pillow's on pixels, while it is lifted


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


def _shared(context: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Make a context one of all threads: the first that comes enters it, the last that goes leaves it."""
    readers, stack = 0, ExitStack()

    @contextmanager
    @functools.wraps(context)
    def shared() -> Iterator[None]:
        nonlocal readers
        with _lock:
            if not readers:
                stack.enter_context(context())
            readers += 1
        try:
            yield
        finally:
            with _lock:
                readers -= 1
                if not readers:
                    stack.close()

    return shared


@_shared
@contextmanager
def pillow_silenced() -> Iterator[None]:
    """Hide Pillow's warnings of sizes and damage, for which ours name the file, as long as any thread is reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


@_shared
@contextmanager
def pillow_reads_long_texts() -> Iterator[None]:
    """Have Pillow read texts and profiles of real PNG files, as long as any thread is reading."""
    kept = PngImagePlugin.MAX_TEXT_CHUNK
    PngImagePlugin.MAX_TEXT_CHUNK = max(kept, _LONGEST_TEXT)
    try:
        yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK = kept


@_shared
@contextmanager
def pillow_unbounded() -> Iterator[None]:
    """Have Pillow open pictures of any size, as long as any thread is reading one with a bound of its own."""
    _bounds.append(Image.MAX_IMAGE_PIXELS)
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = _bounds.pop()


def pillow_bound() -> int | None:
    """Return Pillow's MAX_IMAGE_PIXELS, whether or not a thread has lifted it."""
    with _lock:
        return _bounds[0] if _bounds else Image.MAX_IMAGE_PIXELS
