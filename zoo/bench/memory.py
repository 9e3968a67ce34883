"""Peak memory, measured in processes of their own: memory that was claimed and freed before would hide some."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from zoo.pictures.plans import held_bytes

__all__ = ["in_fresh_process", "map_large_blocks", "peak_memory", "resident_peak"]

ArgsT = ParamSpec("ArgsT")
ResultT = TypeVar("ResultT")
_PROC = Path("/proc/self")
_M_MMAP_THRESHOLD = -3  # of mallopt, see malloc.h


def in_fresh_process(function: Callable[ArgsT, ResultT], *args: ArgsT.args, **kwargs: ArgsT.kwargs) -> ResultT:
    """Run a function of a module in a new Python process and return what it returns."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def map_large_blocks() -> None:
    """Let glibc map every block of 64 KiB or more by itself from now on, in this process.

    Then the resident size is that of the live blocks. Else a call fills holes that calls before it left, or does not,
    by chance: of one network 21 or 51 MiB were read. Not for processes whose time is measured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**16)


@torch.inference_mode()
def resident_peak(call: Callable[[], Any]) -> tuple[int, int]:
    """Return the memory that is this process's own, in bytes: before a function runs, and the most while it runs.

    Pages of program files do not count: how many are resident depends on what else ran on the machine. Linux keeps the
    highest size itself, so that no short peak is missed. Where it cannot be set back, the size is sampled, see
    `peak_memory`.

    Raises:
        OSError: The platform does not tell the resident size.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: hand back what is freed, or the call would reuse it
    if trim is not None:
        trim(0)
    before = held_bytes(torch.device("cpu"))
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


@torch.inference_mode()
def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Return by how many bytes memory grew at most while a function ran.

    On a CUDA device this is torch's own count. On the CPU it is the resident size of the process, sampled every
    2 ms: memory that the process had already claimed and freed before is not seen, so measure in a fresh process.

    Args:
        call: Function without arguments.
        device: Where its memory is.

    Raises:
        OSError: The platform does not tell the resident size (it is read from /proc).
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _resident_peak() as peak:
        call()
    return peak[0]


@contextmanager
def _resident_peak() -> Iterator[list[int]]:
    """Yield a list whose entry is the growth of the resident size, in bytes, once the block is left."""
    if not _PROC.is_dir():
        raise OSError("The resident size is read from /proc, which this platform does not have.")
    cpu = torch.device("cpu")
    before = held_bytes(cpu)
    highest, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            highest[0] = max(highest[0], held_bytes(cpu))

    result = [0]
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield result
    finally:
        highest[0] = max(highest[0], held_bytes(cpu))
        stop.set()
        watcher.join()
        result[0] = highest[0] - before
