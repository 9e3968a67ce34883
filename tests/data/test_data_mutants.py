"""Data: bugs of one line that the other tests would let live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import images
from zoo.data.degradations import (
    BicubicDownscale,
    Chain,
    DefocusBlur,
    GaussianNoise,
    JpegCompression,
    MotionBlur,
    to_float,
)
from zoo.data.images import ImageClassification, stratified_split
from zoo.data.paired_images import TrainingPatches
from zoo.data.photos import Pair
from zoo.data.resize import imresize


def photo(height: int = 40, width: int = 32) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(0.3 * x + 0.2 * k * y + k) for k in range(3)]
    return np.stack(waves, -1).round().astype(np.uint8)


# --- MATLAB's resize


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_halves_are_rounded_up(dtype: type) -> None:
    """An edge in the middle of the kernel weighs one half exactly: 2.5 becomes 3 and 3.5 becomes 4, as in MATLAB."""
    for height, expected in ((5, 3), (7, 4)):
        row = np.array([0, 0, 0, height, height, height, height, height], dtype)
        assert imresize(np.tile(row, (8, 1)), 0.5)[:, 1].tolist() == [expected] * 4


def test_each_pass_is_rounded_and_the_height_goes_first() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    found = imresize(image, 0.5)
    height_first = imresize(imresize(image, size=(8, 16)), size=(8, 8))
    width_first = imresize(imresize(image, size=(16, 8)), size=(8, 8))
    at_the_end = np.floor(imresize(image.astype(np.float64), 0.5) + 0.5).clip(0, 255).astype(np.uint8)
    assert np.array_equal(found, height_first)
    assert not np.array_equal(found, width_first)
    assert not np.array_equal(found, at_the_end)


def test_the_side_that_changes_most_goes_first() -> None:
    image = np.random.default_rng(1).integers(0, 256, (16, 16), dtype=np.uint8)
    assert np.array_equal(imresize(image, size=(12, 4)), imresize(imresize(image, size=(16, 4)), size=(12, 4)))
    assert not np.array_equal(imresize(image, size=(12, 4)), imresize(imresize(image, size=(12, 16)), size=(12, 4)))


def test_overshoot_is_clipped() -> None:
    image = np.zeros((12, 12), np.uint8)
    image[6:] = 255
    big = imresize(image, 2)
    assert (big.min(), big.max()) == (0, 255)
    assert imresize(image.astype(np.float64), 2).max() > 255


# --- degradations


def test_a_chain_reaches_as_far_as_all_its_steps() -> None:
    """Two blurs one after the other: their margins add up, and no pixel beyond is needed."""
    steps = [MotionBlur(7), DefocusBlur(2.5)]
    chain = Chain([*steps, GaussianNoise(0), BicubicDownscale(2)])
    assert chain.margin == steps[0].margin + steps[1].margin
    point = np.zeros((61, 61, 1), np.float32)
    point[30, 30] = 1
    spread = Chain(list(steps))(point, np.random.default_rng(0))
    rows, columns, _ = spread.nonzero()
    assert max(steps[0].margin, steps[1].margin) < np.abs(np.stack([rows, columns]) - 30).max() <= chain.margin


def test_patches_see_what_a_chain_reaches(tmp_path: Any) -> None:
    """A degraded patch equals the same place of the whole degraded photo."""
    Image.fromarray(photo(64, 64)).save(tmp_path / "a.png")
    chain = Chain([MotionBlur(7, bend=0), DefocusBlur(2.5)])
    data = TrainingPatches([Pair(tmp_path / "a.png")], chain, patch_size=8, patches_per_image=1)
    whole = chain(photo(64, 64), np.random.default_rng(7))
    for top, left in ((0, 0), (20, 31), (56, 56)):
        patch = data._degrade(photo(64, 64), top, left, 8, np.random.default_rng(7))
        assert np.abs(patch - whole[top : top + 8, left : left + 8]).max() < 1e-5


def test_a_chain_is_evaluated_as_its_steps_are() -> None:
    """Test noise and quality, the protocol's generator, not those of training."""
    steps = [DefocusBlur(1.5), GaussianNoise((0, 5), test_sigma=40), JpegCompression((90, 95), test_quality=15)]
    expected: Any = photo()
    rng = np.random.default_rng(3)
    for step in steps:
        expected = step.evaluate(expected, rng)
    chain = Chain(list(steps))
    found = chain.evaluate(photo(), np.random.default_rng(3))
    assert np.array_equal(found, expected)
    trained = chain(photo(), np.random.default_rng(3))
    assert np.abs(to_float(found) - to_float(trained)).mean() > 0.02
    assert not Chain([BicubicDownscale(2)]).random
    assert Chain([GaussianNoise(1), BicubicDownscale(2)]).random


def test_noise_in_evaluation_is_the_same_for_all_images_of_a_size() -> None:
    noise = GaussianNoise((0, 50), test_sigma=25)
    one, other = (noise.evaluate(photo() + shift, np.random.default_rng(shift)) for shift in (0, 1))
    added = [found - to_float(photo() + shift) for shift, found in enumerate((one, other))]
    assert np.abs(added[0] - added[1]).max() < 1e-6
    assert float(added[0].std()) == pytest.approx(25 / 255, rel=0.05)


# --- what a classifier sees


def classification(**changes: Any) -> ImageClassification:
    settings: dict[str, Any] = dict(image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return ImageClassification("nowhere", **{**settings, **changes})


@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 1.0])
def test_evaluation_crops_as_much_as_it_says(crop_pct: float) -> None:
    """The middle `crop_pct` of the short side is seen, measured on a picture that grows brighter to the right."""
    picture = Image.fromarray(np.tile(np.linspace(0, 255, 128).round().astype(np.uint8), (128, 1))).convert("RGB")
    seen = classification(crop_pct=crop_pct)._transform(False)(picture)
    assert seen.shape == (3, 16, 16)
    width = float(seen[0, 8, -1] - seen[0, 8, 0]) * 16 / 15
    assert width == pytest.approx(crop_pct, abs=0.06)


def test_erased_places_are_filled_with_noise_of_their_own() -> None:
    """Random erasing draws every pixel anew, neither one colour for the place nor black."""
    transform = classification(reprob=1.0, crop_padding=0, hflip=0.0)._transform(True)
    seen = transform(Image.new("RGB", (16, 16), (128, 128, 128)))
    changed = (seen - 128 / 255).abs().amax(0) > 1e-3
    assert 4 <= int(changed.sum()) < 16 * 16
    assert len(seen[:, changed].unique()) > 2 * int(changed.sum())
    kept = classification(reprob=0.0, crop_padding=0, hflip=0.0)._transform(True)
    assert torch.allclose(kept(Image.new("RGB", (16, 16), (128, 128, 128))), torch.tensor(128 / 255))


def test_evaluation_is_never_augmented() -> None:
    options = dict(reprob=1.0, hflip=1.0, color_jitter=0.9, auto_augment="rand-m9", crop_pct=1.0)
    picture = Image.fromarray(photo(16, 16))
    seen = classification(**options)._transform(False)(picture)
    assert torch.allclose(seen, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)


def test_every_class_gives_its_share() -> None:
    """Disjoint, complete, the share of each class, at least one of two and none of one."""
    labels = [0] * 20 + [1] * 10 + [2] * 2 + [3]
    rest, held = stratified_split(labels, 0.2, seed=1)
    assert sorted(rest + held) == list(range(len(labels)))
    assert [sum(labels[index] == label for index in held) for label in range(4)] == [4, 2, 1, 0]
    assert stratified_split(labels, 0.2, seed=1) == (rest, held)
    assert stratified_split(labels, 0.2, seed=2) != (rest, held)


def test_a_split_is_found_however_it_is_stored(tmp_path: Path) -> None:
    """A name of the Hub may have it; a folder has it as a folder or a file."""
    assert images.has_split("org/name", "test")
    (tmp_path / "val").mkdir()
    assert not images.has_split(str(tmp_path), "test")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-00000.parquet").touch()
    assert images.has_split(str(tmp_path), "test")
    (tmp_path / "other" / "test" / "cat").mkdir(parents=True)
    assert images.has_split(str(tmp_path / "other"), "test")
