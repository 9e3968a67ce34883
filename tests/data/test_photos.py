"""Benchmark sets on disk: the customary layouts, names that carry a scale, lists, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.photos import find_pairs, read_pixels, to_tensor


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(source: Path, scale: int = 1) -> list[tuple[str, str | None]]:
    return [(pair.clean.stem, pair.degraded and pair.degraded.parent.name) for pair in find_pairs(source, scale)]


def test_a_folder_of_clean_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.jpg", "deep/c.webp", "notes.txt")
    assert found(tmp_path) == [("a", None), ("b", None), ("c", None)]


def test_super_resolution_sets(tmp_path: Path) -> None:
    """Set5's layout: HR, and one folder a scale with the scale in the names too."""
    touch(tmp_path, "HR/baby.png", "HR/fox2.png")
    touch(tmp_path, *(f"LR_bicubic/X{scale}/{name}x{scale}.png" for scale in (2, 4) for name in ("baby", "fox2")))
    assert found(tmp_path, 2) == [("baby", "X2"), ("fox2", "X2")]
    assert found(tmp_path, 4) == [("baby", "X4"), ("fox2", "X4")]
    with pytest.raises(ValueError, match=r"no degraded version at scale 3 of baby.png"):
        find_pairs(tmp_path, 3)


def test_flat_and_equal_names(tmp_path: Path) -> None:
    touch(tmp_path, "GT/baby.png", "LRbicx4/baby.png", "LRbicx2/baby.png")
    assert found(tmp_path, 4) == [("baby", "LRbicx4")]
    rain = touch(tmp_path / "rain", "target/1.png", "target/2.png", "input/1.png", "input/2.jpg")
    assert found(rain) == [("1", "input"), ("2", "input")]
    alone = touch(tmp_path / "alone", "HR/a.png")
    assert found(alone, 2) == [("a", None)]


def test_a_list_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "val/12.png", "val/3.jpg", "train/9.png", "train/double.png", "val/double.png")
    listed = tmp_path / "set.txt"
    listed.write_text("3\n12.png\n\n")
    assert found(listed) == [("3", None), ("12", None)]
    listed.write_text("4\n")
    with pytest.raises(FileNotFoundError, match=r"names 4, which is not below"):
        find_pairs(listed)
    listed.write_text("double\n")
    with pytest.raises(ValueError, match="names double, which fits"):
        find_pairs(listed)
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="neither a folder nor a text file"):
        find_pairs(listed)


def test_degraded_images_alone_are_no_set(tmp_path: Path) -> None:
    touch(tmp_path, "LR_bicubic/X2/ax2.png")
    with pytest.raises(FileNotFoundError, match="but not one folder of clean ones"):
        find_pairs(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match="No folder"):
        find_pairs(tmp_path / "nowhere")


def test_read_and_turn_into_tensors(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_pixels(tmp_path / "a.png", "RGB"), pixels)
    assert read_pixels(tmp_path / "a.png", "L").shape == (5, 7, 1)
    tensor = to_tensor(pixels[:, ::-1])  # views with negative strides come from flips
    assert tensor.shape == (3, 5, 7)
    assert np.array_equal((tensor * 255).round().byte().permute(1, 2, 0).numpy(), pixels[:, ::-1])
