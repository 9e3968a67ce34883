"""Whether restoration in tiles stays within its memory budget; each budget in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch

from zoo.bench.memory import in_fresh_process, resident_peak
from zoo.bench.report import Benchmark, Check, Entry, Goal
from zoo.bench.timing import Progress, Settings, environment, require_close, torch_threads
from zoo.ffn.reparam import reparameterize
from zoo.pictures.read import open_picture
from zoo.pictures.restore import load_restorer, restore_picture
from zoo.pictures.tiling import parse_bytes, restore_tensor

__all__ = ["tiling"]

_WANTED = 1.2  # peak of the process over the budget
_MIB = 2**20


def tiling(
    settings: Settings,
    progress: Progress | None = None,
    *,
    model: str = "cfsr_x2",
    size: int = 2048,
    budgets: Sequence[str] = ("1.5GB", "2GB", "4GB"),
) -> list[Benchmark]:
    """Restore one large picture under several budgets; wanted: the process never holds more than the budget + 20 %.

    Raises:
        BenchError: Tiles do not give the same as the whole picture.
        ValueError: The settings ask for something that this benchmark cannot vary.
    """
    if settings.device != "cpu" or settings.batch != 1:
        raise ValueError("The tiling benchmark restores one picture on the CPU: leave --device and --batch alone.")
    check = _same_as_whole(model)
    entries, goals = [], []
    for done, budget in enumerate(budgets, 1):
        found = in_fresh_process(_restore, model, size, budget, settings.threads, settings.dtype)
        before, peak, allowed = found["before"], found["peak"], found["allowed"]
        share = peak / allowed
        entries.append(
            Entry(
                name=f"budget {budget}",
                values={
                    "budget (MiB)": allowed / _MIB,
                    "before the call (MiB)": before / _MIB,
                    "peak of the process (MiB)": peak / _MIB,
                    "peak / budget": share,
                    "tiles": found["tiles"],
                    "time (s)": found["seconds"],
                },
            )
        )
        goals.append(Goal(what=f"peak over the budget of {budget}", value=share, wanted=_WANTED, at_most=True))
        if progress is not None:
            progress("restoring under budgets", done, len(budgets))
    return [
        Benchmark(
            name="tiling",
            title=f"Memory of restoring {size}x{size} pixels with {model} in tiles",
            conditions={"dtype": settings.dtype, "threads": settings.threads, "input": f"{size}x{size} RGB, 8 bits"},
            environment=environment(),
            reference=None,
            entries=tuple(entries),
            checks=(check,),
            goals=tuple(goals),
            notes=(
                "A budget is what the whole process may hold: Python, torch, picture, result, and the network's work; "
                "pages of program files do not count, which the system shares and drops as it likes.",
                "Random weights: they change neither time nor memory.",
            ),
        )
    ]


def _same_as_whole(name: str) -> Check:
    """Compare a small picture restored in tiles and whole."""
    torch.manual_seed(0)
    model: Any = load_restorer(model=timm.create_model(name).eval().requires_grad_(False))
    for key, value in model.named_parameters():
        if key.endswith("gamma"):  # layer scales that start near zero would hide the blocks
            value.fill_(1.0)
    side = 2 * model.receptive_field + 8
    x = torch.rand(1, 3, side + 8, 16)
    return require_close(
        "a picture in tiles and whole", restore_tensor(model, x, tile=side, exact=True), restore_tensor(model, x), 1e-5
    )


def _restore(name: str, size: int, budget: str, threads: int, dtype: str) -> dict[str, float]:
    """Restore a picture in this process and return its resident size before and at most, in bytes, and the time."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    torch.manual_seed(0)
    seen = {"tiles": 1}

    def hear(words: str) -> None:
        count, tiles, _ = words.partition(" tiles")
        seen["tiles"] = int(count) if tiles else 1

    with torch_threads(threads):
        model: Any = load_restorer(model=timm.create_model(name).eval().requires_grad_(False), dtype=dtype)
        reparameterize(model, measure=False)
        start = time.perf_counter()
        before, peak = resident_peak(lambda: restore_picture(open_picture(picture), model, budget=budget, inform=hear))
        seconds = time.perf_counter() - start
    return {"before": before, "peak": peak, "allowed": parse_bytes(budget), "seconds": seconds, **seen}
