"""MATLAB's imresize: the published low-resolution files bit for bit, and what must hold for any image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.resize import imresize


def published(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "sr").glob("*/LR_bicubic/X*/*.png"))


def differs(path: Path, data_dir: Path) -> bool:
    """Make a published file anew from its high-resolution image and compare every pixel."""
    scale, name = int(path.parent.name[1:]), path.parents[2].name
    stem = path.stem.removesuffix(f"x{scale}")
    high = (
        data_dir / "bsds" / "val" / f"{stem}.jpg" if name == "B100" else data_dir / "sr" / name / "HR" / f"{stem}.png"
    )
    low = np.asarray(Image.open(path))
    image = np.asarray(Image.open(high))[: low.shape[0] * scale, : low.shape[1] * scale]
    return not np.array_equal(imresize(image, 1 / scale), low)


def test_some_published_files(data_dir: Path) -> None:
    """One file of each set and scale."""
    first = {path.parent: path for path in reversed(published(data_dir))}
    assert len(first) == 11
    assert [path for path in first.values() if differs(path, data_dir)] == []


@pytest.mark.slow
def test_all_published_files(data_dir: Path) -> None:
    files = published(data_dir)
    assert len(files) == 377
    assert [path for path in files if differs(path, data_dir)] == []


def test_by_hand() -> None:
    """Halving a step: eight taps of the widened kernel, the border repeated, rounded half up."""
    taps = np.array([-0.01171875, -0.03515625, 0.11328125, 0.43359375])  # half of Keys' kernel at 1.75, ... 0.25
    kernel = np.concatenate([taps, taps[::-1]])
    assert kernel.sum() == 1
    row = np.array([0, 0, 0, 0, 200, 200, 200, 200], np.uint8)
    padded = np.pad(row.astype(float), 3, mode="edge")
    expected = [int(np.floor(np.dot(kernel, padded[2 * i : 2 * i + 8]).clip(0, 255) + 0.5)) for i in range(4)]
    found = imresize(np.tile(row, (8, 1)), 0.5)
    assert found.tolist() == [expected] * 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("scale", [0.25, 1 / 3, 0.5, 1.0, 2.0, 3.0])
def test_constant_images_stay(scale: float, dtype: type) -> None:
    image = np.full((12, 24, 3), 77, dtype)
    found = imresize(image, scale)
    assert found.dtype == dtype
    assert found.shape == (int(np.ceil(12 * scale)), int(np.ceil(24 * scale)), 3)
    assert np.allclose(found, 77)


def test_scale_one_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    assert np.array_equal(imresize(image, 1.0), image)


def test_a_plane_stays_a_plane() -> None:
    """Away from the border, enlarging and shrinking keep linear surfaces; floats are not rounded."""
    y, x = np.mgrid[:24, :32].astype(float)
    plane = 0.3 * x - 0.7 * y
    for scale in (0.5, 2.0):
        rows, columns = (int(side * scale) for side in plane.shape)
        ys, xs = ((np.arange(n) + 0.5) / scale - 0.5 for n in (rows, columns))
        inner = slice(int(4 * max(scale, 1)), -int(4 * max(scale, 1)))
        found = imresize(plane, scale)
        assert np.abs(found - (0.3 * xs - 0.7 * ys[:, None]))[inner, inner].max() < 1e-12


def test_size_instead_of_scale() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(imresize(image, size=(10, 15)), imresize(image, 0.5))
    assert imresize(image, size=(7, 61)).shape == (7, 61, 3)


def test_one_pixel() -> None:
    assert imresize(np.full((1, 1), 9, np.uint8), 4).tolist() == [[9] * 4] * 4
    assert imresize(np.full((1, 5), 9, np.uint8), 0.25).tolist() == [[9, 9]]


@pytest.mark.parametrize(
    ("image", "kwargs", "error", "message"),
    [
        (np.zeros((2, 2)), {}, ValueError, "either scale or size"),
        (np.zeros((2, 2)), {"scale": 2, "size": (1, 1)}, ValueError, "either scale or size"),
        (np.zeros((2, 2)), {"scale": -1}, ValueError, "scale must be positive, got -1"),
        (np.zeros((2, 2)), {"size": (0, 1)}, ValueError, r"size must be positive, got \(0, 1\)"),
        (np.zeros(2), {"scale": 2}, ValueError, r"got shape \(2,\)"),
        (np.zeros((2, 2), int), {"scale": 2}, TypeError, "got int64"),
    ],
)
def test_refusals(image: np.ndarray, kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        imresize(image, **kwargs)
