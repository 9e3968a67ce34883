"""Find the fastest tiles of the kernels on a GPU and write them where `zoo.kernels.launch` looks for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from zoo import kernels
from zoo.bench.kernel_rows import Row
from zoo.bench.timing import Progress
from zoo.files import whole
from zoo.kernels import launch
from zoo.kernels.launch import Key, Tiles

__all__ = ["fastest_tiles", "save_tiles", "tune"]

Timer = Callable[[Callable[[], object]], float]


def tune(rows: Iterable[Row], timer: Timer, progress: Progress | None = None, *, total: int = 0) -> Path:
    """Tune the launches of all rows, forward, on the current GPU, and write their tiles.

    Args:
        rows: What to tune for.
        timer: Returns the median time of a call in ms.
        progress: Told after each row.
        total: Number of rows, for the progress.

    Returns:
        The file.

    Raises:
        OSError: The folder of the package cannot be written to.
    """
    if not os.access(launch.FOLDER, os.W_OK):
        raise PermissionError(
            f"{launch.FOLDER} cannot be written to: tune in a source checkout, installed with pip -e."
        )
    chosen: dict[Key, Tiles] = {}
    for number, row in enumerate(rows):
        if not row.train:
            chosen |= fastest_tiles(row, timer, "triton", chosen)
        if progress is not None:
            progress(f"tuning {row.name}", number + 1, total)
    return save_tiles(chosen, torch.cuda.get_device_name())


def fastest_tiles(row: Row, timer: Timer, backend: kernels.Backend, known: dict[Key, Tiles]) -> dict[Key, Tiles]:
    """Return the fastest tiles of each launch of a row, tried one launch after the other.

    Args:
        row: Its function is run.
        timer: Returns the median time of a call in ms.
        backend: That launches kernels.
        known: Tiles that were chosen before; those launches are left as they are.
    """
    from triton.runtime.errors import OutOfResources

    def call() -> None:
        with torch.no_grad():
            row.function(*row.inputs)

    found: dict[Key, Tiles] = {}
    with kernels.use_backend(backend):
        with launch.asked_for() as asked:
            call()
        for key in asked:
            if key in known:
                continue
            times: list[tuple[float, Tiles]] = []
            for tiles in launch.candidates(key[0], row.inputs[0].element_size()):
                with launch.forced({**known, **found, key: tiles}):
                    try:
                        call()
                        times.append((timer(call), tiles))
                    except OutOfResources:  # registers or shared memory of this GPU
                        continue
            if times:
                found[key] = min(times, key=lambda timed: timed[0])[1]
    return found


def save_tiles(chosen: dict[Key, Tiles], device_name: str) -> Path:
    """Add tiles to the file of a GPU; entries of other launches in it stay.

    Args:
        chosen: Kernel and sizes -> tiles.
        device_name: As the driver gives it.

    Returns:
        The file.
    """
    path = launch.FOLDER / launch.file_name(device_name)
    tables: dict[str, dict[str, Tiles]] = {}
    if path.is_file():
        tables = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    for (kernel, sizes), tiles in chosen.items():
        tables.setdefault(kernel, {})[sizes] = tiles
    data = {"device": device_name, "torch": torch.__version__, "kernels": tables}
    with whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    launch.tuned.cache_clear()
    return path
