"""Time calls in turns and summarise the times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Latency", "compare_latency", "latency", "processor_clock", "summarize", "time_in_turns"]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one call, in milliseconds.

    Args:
        median: Median of the runs.
        p20: A fifth of the runs were faster.
        p80: A fifth of the runs were slower.
        runs: Number of timed runs.
        device: "cpu", "cuda", ...
        threads: CPU threads of torch.
    """

    median: float
    p20: float
    p80: float
    runs: int
    device: str
    threads: int

    def __str__(self) -> str:
        return f"{self.median:.1f} ms ({self.p20:.1f} to {self.p80:.1f}, {self.runs} runs, {self.device})"


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 2,
    runs: int = 15,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a busy moment of the machine falls on all of them alike.

    Args:
        calls: Name -> function without arguments.
        warmup: Untimed rounds.
        runs: Timed rounds.
        device: Where the work runs; it is waited for before the clock is read.
        clock: Gives seconds; None is the wall clock.

    Returns:
        Name -> milliseconds in each round.

    Raises:
        ValueError: `runs` is less than 1.
    """
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}.")
    device = torch.device(device)
    now = clock or time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + runs):
        for name, call in calls.items():
            _wait_for(device)
            start = now()
            call()
            _wait_for(device)
            if turn >= warmup:
                times[name].append(1e3 * (now() - start))
    return times


def processor_clock(device: str | torch.device) -> Callable[[], float]:
    """Return a clock, seconds, that other programs on the same cores do not disturb.

    On the CPU with one thread it is the time of this process; with more threads, whose times would add up, and on other
    devices it is the wall clock.
    """
    alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


@torch.inference_mode()
def compare_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 2,
    runs: int = 15,
    device: str | torch.device = "cpu",
) -> dict[str, Latency]:
    """Time several calls in turns, without gradients, and summarise each; arguments as for `time_in_turns`."""
    times = time_in_turns(calls, warmup=warmup, runs=runs, device=device)
    return {name: summarize(values, device) for name, values in times.items()}


def latency(
    call: Callable[[], object], *, warmup: int = 2, runs: int = 15, device: str | torch.device = "cpu"
) -> Latency:
    """Time one call; see `compare_latency`."""
    return compare_latency({"": call}, warmup=warmup, runs=runs, device=device)[""]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(values: list[float], device: str | torch.device = "cpu") -> Latency:
    """Return median and fifths of times in milliseconds, measured on `device`."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return Latency(
        median=statistics.median(values),
        p20=fifths[0],
        p80=fifths[3],
        runs=len(values),
        device=torch.device(device).type,
        threads=torch.get_num_threads(),
    )
