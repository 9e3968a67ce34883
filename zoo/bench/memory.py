"""Peak memory, measured in processes of their own: memory that was claimed and freed before would hide some."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from zoo.profiling import peak_memory

__all__ = ["in_fresh_process", "resident_peak"]

ArgsT = ParamSpec("ArgsT")
ResultT = TypeVar("ResultT")
_PROC = Path("/proc/self")


def in_fresh_process(function: Callable[ArgsT, ResultT], *args: ArgsT.args, **kwargs: ArgsT.kwargs) -> ResultT:
    """Run a function of a module in a new Python process and return what it returns."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


@torch.inference_mode()
def resident_peak(call: Callable[[], Any]) -> tuple[int, int]:
    """Return the memory that is this process's own, in bytes: before a function runs, and the most while it runs.

    Pages of program files do not count: how many are resident depends on what else ran on the machine. Linux keeps the
    highest size itself, so that no short peak is missed. Where it cannot be set back, the size is sampled, see
    `zoo.profiling.peak_memory`.

    Raises:
        OSError: The platform does not tell the resident size.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: hand back what is freed, or the call would reuse it
    if trim is not None:
        trim(0)
    before = _resident("RssAnon")
    try:
        (_PROC / "clear_refs").write_text("5", encoding="ascii")  # 5: set the highest size back to the present one
    except OSError:
        return before, before + peak_memory(call)
    call()
    return before, max(before, _resident("VmHWM") - _resident("RssFile"))


def _resident(field: str) -> int:
    """Return a size from /proc/self/status, in bytes."""
    for line in (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}.")
