"""What the Triton launches share: tiles, tuned for a GPU or the default ones, and the layout and precision of inputs.

Tuned tiles are in `tuned/NAME_OF_THE_GPU.json`, written by `zoo bench kernels --tune`. Nothing is tuned at launch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "FOLDER",
    "SPACES",
    "Key",
    "Tiles",
    "asked_for",
    "block",
    "candidates",
    "choose",
    "file_name",
    "forced",
    "precision",
    "rows_of",
    "tuned",
]

Tiles = dict[str, int]
"""Sizes of blocks, warps and stages of a launch, by name."""

Key = tuple[str, str]
"""Name of a kernel; sizes and type of a call, as in the files."""

FOLDER = Path(__file__).parent / "tuned"
"""Where tuned tiles are kept."""

_PRODUCT = {
    "block_rows": (64, 128),
    "block_outputs": (64, 128, 256),
    "block_inner": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 5),
}
SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    "dwconv_gate": {"tile": (512, 1024, 2048), "block_channels": (16, 32, 64, 128), "num_warps": (2, 4, 8)},
    "frequency_filter": {"block_columns": (8, 16, 32), "num_warps": (4, 8, 16)},
    "modulate": {"tile": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8, 16)},
    "modulate_backward": {"part_tokens": (8, 16, 32, 64), "num_warps": (2, 4, 8, 16)},
    "repa_ffn": _PRODUCT,
    "routed_experts": _PRODUCT,
    "ska": {"tile": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
}
"""Kernel -> the tiles that tuning tries."""

_SHARED_BYTES = 227 * 1024  # of a multiprocessor of H100
_ACCUMULATORS = 192  # of a thread; more of them spill

_forced: dict[Key, Tiles] = {}
_asked: dict[Key, Tiles] | None = None


def choose(kernel: str, tensor: Tensor, *, outputs: int, inner: int, rows: int, default: Tiles) -> Tiles:
    """Return the tiles of a launch: those tuned for the tensor's GPU, else the default.

    Args:
        kernel: A key of `SPACES`, followed by what else distinguishes its launches.
        tensor: Tells device and type.
        outputs: N, columns or channels of the output.
        inner: K, what is summed over.
        rows: M; calls with the same next power of two share tiles, so that batches of any size find theirs.
        default: All tiles with their values where nothing was measured.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    key = kernel, f"N={outputs} K={inner} {dtype} M<={1 << max(rows - 1, 0).bit_length()}"
    if _asked is not None:
        _asked[key] = default
    if key in _forced:
        return default | _forced[key]
    if tensor.device.type != "cuda":
        return default
    return default | tuned(torch.cuda.get_device_name(tensor.device)).get(key, {})


def file_name(device_name: str) -> str:
    """Return the name of the file with a GPU's tiles: "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


@lru_cache(maxsize=8)
def tuned(device_name: str) -> dict[Key, Tiles]:
    """Return what was tuned on a GPU, read when it is first asked for."""
    path = FOLDER / file_name(device_name)
    if not path.is_file():
        return {}
    tables: dict[str, dict[str, Tiles]] = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    return {(kernel, sizes): tiles for kernel, table in tables.items() for sizes, tiles in table.items()}


@contextlib.contextmanager
def forced(tiles: dict[Key, Tiles]) -> Iterator[None]:
    """Launch with given tiles within a `with` block.

    Args:
        tiles: Kernel and sizes -> tiles that replace the tuned and default ones.
    """
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def asked_for() -> Iterator[dict[Key, Tiles]]:
    """Yield a dictionary that fills with the default tiles of all launches within the `with` block."""
    global _asked
    before, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = before


def candidates(kernel: str, item_size: int) -> list[Tiles]:
    """Return the tiles to try for a kernel; those of products that surely do not fit a multiprocessor are left out.

    Args:
        kernel: As in `choose`.
        item_size: Bytes of a number of the inputs.
    """
    space = SPACES[kernel.partition(" ")[0]]
    found = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    return [tiles for tiles in found if "block_inner" not in tiles or _fits(tiles, item_size)]


def _fits(tiles: Tiles, item_size: int) -> bool:
    loaded = (tiles["block_rows"] + tiles["block_outputs"]) * tiles["block_inner"]
    accumulators = tiles["block_rows"] * tiles["block_outputs"] // (32 * tiles["num_warps"])
    return loaded * tiles["num_stages"] * item_size <= _SHARED_BYTES and accumulators <= _ACCUMULATORS


def block(size: int, most: int) -> int:
    """Return the power of two, at least 16, that holds `size`, or `most` if that is less."""
    return min(max(1 << max(size - 1, 0).bit_length(), 16), most)


def rows_of(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def precision(tensor: Tensor) -> str:
    """Return how float32 numbers are multiplied: exactly unless `torch.set_float32_matmul_precision` allows less."""
    exact = tensor.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
