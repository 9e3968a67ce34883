"""Tiles of launches: what is looked up, under which key, and what tuning may try."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo.kernels import launch

DEFAULT = {"tile": 1024, "num_warps": 4}
SIZES = "N=64 K=9 bfloat16 M<=128"


def choose(rows: int, device: str = "cpu") -> launch.Tiles:
    tensor: Any = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    return launch.choose("ska", tensor, outputs=64, inner=9, rows=rows, default=DEFAULT)


def problems(path: Path) -> list[str]:
    """Return what is wrong with a file of tuned tiles."""
    data = json.loads(path.read_text())
    found = [] if path.name == launch.file_name(data["device"]) else ["name"]
    for kernel, table in data["kernels"].items():
        space = launch.SPACES.get(kernel.partition(" ")[0], {})
        for tiles in table.values():
            found += [kernel for name, value in tiles.items() if value not in space.get(name, ())]
    return found


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Store tiles of a made-up GPU."""
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Made-up 7")
    path = tmp_path / "nvidia_made_up_7.json"
    path.write_text(json.dumps({"device": "NVIDIA Made-up 7", "kernels": {"ska": {SIZES: {"tile": 512}}}}))
    launch.tuned.cache_clear()
    yield path
    launch.tuned.cache_clear()


def test_rows_share_tiles_up_to_the_next_power_of_two(tuned: Path) -> None:
    assert [choose(rows, "cuda:0")["tile"] for rows in (64, 65, 128, 129)] == [1024, 512, 512, 1024]
    assert choose(100, "cuda:0")["num_warps"] == 4  # what an entry leaves out is the default


def test_default_without_a_gpu_or_a_file(tuned: Path) -> None:
    assert choose(100) == DEFAULT
    tuned.unlink()
    launch.tuned.cache_clear()
    assert choose(100, "cuda:0") == DEFAULT


def test_tiles_are_recorded_and_forced() -> None:
    with launch.asked_for() as asked:
        choose(100)
    choose(1)
    assert asked == {("ska", SIZES): DEFAULT}
    with launch.forced({("ska", SIZES): {"tile": 2048}}):
        assert choose(100) == {"tile": 2048, "num_warps": 4}
        assert choose(1) == DEFAULT
    assert choose(100) == DEFAULT


@pytest.mark.parametrize("kernel", launch.SPACES)
def test_candidates_fit_a_multiprocessor(kernel: str) -> None:
    found = launch.candidates(f"{kernel} of some kind", 2)
    assert 1 < len(found) <= 100
    for tiles in found:
        if "block_inner" in tiles:
            loaded = (tiles["block_rows"] + tiles["block_outputs"]) * tiles["block_inner"] * tiles["num_stages"]
            assert 2 * loaded <= 227 * 1024
    assert len(launch.candidates(kernel, 4)) <= len(found)


def test_stored_files_are_valid(tuned: Path) -> None:
    assert problems(tuned) == []
    data = json.loads(tuned.read_text()) | {"kernels": {"ska": {SIZES: {"tile": 3}}, "nothing": {SIZES: {"tile": 512}}}}
    tuned.write_text(json.dumps(data))
    assert problems(tuned) == ["ska", "nothing"]
    shipped = Path(launch.__file__).parent / "tuned"
    assert [found for path in shipped.glob("*.json") for found in problems(path)] == []


def test_blocks() -> None:
    assert [launch.block(size, 64) for size in (0, 1, 16, 17, 64, 500)] == [16, 16, 16, 32, 64, 64]
