"""How things are timed: settings, threads, rounds in turns, what the machine is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.bench.latency import Latency, summarize, time_in_turns
from zoo.bench.report import Check, Ratio, now
from zoo.engines.call import torch_threads
from zoo.processor import processor_name
from zoo.text import counted
from zoo.version import __version__

__all__ = [
    "DTYPES",
    "BenchError",
    "Settings",
    "busy",
    "compare",
    "environment",
    "now",
    "require_close",
    "speedup",
    "torch_threads",
]

DTypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative to the largest output

_IDLE = 0.5  # load of a machine that does nothing else, and of a program that has just started

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is."""


class BenchError(RuntimeError):
    """What was to be timed does not compute the same."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    Args:
        batch: Inputs of one call.
        dtype: Type of weights and inputs.
        threads: CPU threads of torch.
        rounds: Timed rounds; in each, everything runs once.
        warmup: Untimed rounds before.
        device: "cpu", "cuda", "cuda:1", ...
        count: Images in all that quality is measured on, where a benchmark makes images; None is one call's.
        tune: Find and store the best tiles of the kernels first, where a benchmark has kernels.
        model_args: Arguments of every model that is built by name, as (name, value).

    Raises:
        ValueError: A count is too small, the type is unknown, or there is no such device.
    """

    batch: int = 4
    dtype: DTypeName = "float32"
    threads: int = 2
    rounds: int = 15
    warmup: int = 2
    device: str = "cpu"
    count: int | None = None
    tune: bool = False
    model_args: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("threads", 1), ("rounds", 1), ("warmup", 0), ("count", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"{self.device!r} is no device; try cpu or cuda.") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"There is no device {self.device!r}: {torch.cuda.device_count()} CUDA devices are here.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type, as torch's."""
        return DTYPES[self.dtype]

    def conditions(self, **more: Any) -> dict[str, Any]:
        """Return the settings for people, with what a benchmark adds."""
        own = {"batch": self.batch, "dtype": self.dtype, "threads": self.threads, "rounds": self.rounds}
        said = {"model args": " ".join(f"{name}={value}" for name, value in self.model_args)} if self.model_args else {}
        return {**own, "warm-up rounds": self.warmup, **said, **more}


def compare(
    calls: Mapping[str, Callable[[], object]],
    settings: Settings,
    *,
    reference: str,
    progress: Progress | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, tuple[Latency, Ratio | None]]:
    """Time calls in turns.

    Args:
        calls: Name -> function without arguments.
        settings: Rounds, warm-up and device; the caller sets the threads.
        reference: Name of the call that the others are compared with.
        progress: Told after each call.
        clock: As for `time_in_turns`.

    Returns:
        Name -> time, and how many times as fast as the reference (None for the reference).
    """
    done, total = [0], (settings.warmup + settings.rounds) * len(calls)

    def told(call: Callable[[], object]) -> Callable[[], object]:
        def call_and_tell() -> object:
            result = call()
            if progress is not None:
                done[0] += 1
                progress("timing in turns", done[0], total)
            return result

        return call_and_tell

    times = time_in_turns(
        {name: told(call) for name, call in calls.items()},
        warmup=settings.warmup,
        runs=settings.rounds,
        device=settings.device,
        clock=clock,
    )
    return {
        name: (
            summarize(values, settings.device),
            None if name == reference else speedup(times[reference], values),
        )
        for name, values in times.items()
    }


def speedup(reference: list[float], times: list[float]) -> Ratio:
    """Return how many times as fast `times` are as `reference`, each round compared with itself."""
    summary = summarize([slow / fast for slow, fast in zip(reference, times, strict=True)])
    return Ratio(median=summary.median, p20=summary.p20, p80=summary.p80)


def require_close(what: str, ours: Tensor, theirs: Tensor, tolerance: float | None = None) -> Check:
    """Compare two outputs.

    Args:
        what: What is compared, for people.
        ours: One output.
        theirs: The other, of the same shape.
        tolerance: Largest difference over the largest output; None goes by the type: 1e-4 in float32.

    Raises:
        BenchError: They differ by more; nothing is timed then.
    """
    if tolerance is None:
        tolerance = _TOLERANCE[ours.dtype]
    if ours.shape != theirs.shape:
        raise BenchError(f"{what}: the shapes are {tuple(ours.shape)} and {tuple(theirs.shape)}.")
    scale = theirs.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    value = float((ours.double() - theirs.double()).abs().max() / scale)
    if not value <= tolerance:
        raise BenchError(f"{what}: outputs differ by {value:.1e} (relative), allowed is {tolerance:.0e}; not timed.")
    return Check(what=what, value=value, tolerance=tolerance)


def cast(module: nn.Module, settings: Settings) -> nn.Module:
    """Bring a module to the settings' device and type."""
    return module.to(device=settings.device, dtype=settings.torch_dtype)


def busy(threads: int) -> str:
    """Say in one line that the machine has fewer free cores than threads are to run; nothing where it has.

    Args:
        threads: CPU threads of what is to be timed. Ask before it runs: its own load counts too.
    """
    cores = os.cpu_count() or 1
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    if threads > own:
        return f"{threads} threads share {counted(own, 'core')}: they wait for each other."
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads + load <= cores + _IDLE:
        return ""
    return (
        f"The machine was busy: a load of {load:.1f} on {counted(cores, 'core')} before "
        f"{counted(threads, 'thread')} ran, so that times may be too long."
    )


def environment(device: str = "cpu") -> dict[str, str]:
    """Return what the machine and the software are."""
    kind = torch.device(device).type
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else f"{kind} ({processor_name()})",
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("timm", "diffusers") if _installed(name)},
        "zoo": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
