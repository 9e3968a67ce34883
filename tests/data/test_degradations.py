"""Degradations: what each does in numbers, the same for equal generators, and refusals."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo.data.degradations import (
    BicubicDownscale,
    Chain,
    DefocusBlur,
    Degradation,
    GaussianNoise,
    JpegCompression,
    MotionBlur,
    to_float,
)

RANDOM: dict[str, Degradation] = {
    "noise": GaussianNoise((0, 50)),
    "jpeg": JpegCompression((10, 60)),
    "motion": MotionBlur((3, 9)),
    "defocus": DefocusBlur((0.5, 3)),
    "chain": Chain([MotionBlur(5), GaussianNoise(5), JpegCompression(60)]),
}


def photo(channels: int = 3) -> np.ndarray[Any, Any]:
    """A smooth picture of 40x32 pixels."""
    y, x = np.mgrid[:40, :32]
    waves = [127 + 100 * np.sin(0.3 * x + 0.2 * k * y + k) for k in range(channels)]
    return np.stack(waves, -1).round().astype(np.uint8)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_generator_decides(name: str, channels: int) -> None:
    """Equal generators give equal results, others differ; size and type are kept; the image is left alone."""
    degradation, image = RANDOM[name], photo(channels)
    before = image.copy()
    first, again, other = (degradation(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert degradation.random
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == image.shape
    assert first.dtype in (np.uint8, np.float32)
    assert np.array_equal(image, before)
    tested = [degradation.evaluate(image, np.random.default_rng(3)) for _ in range(2)]
    assert np.array_equal(*tested)


@pytest.mark.parametrize("name", RANDOM)
def test_floats_are_taken_as_bytes_are(name: str) -> None:
    image, (one, two) = photo(), (np.random.default_rng(0), np.random.default_rng(0))
    found = [to_float(RANDOM[name](given, rng)) for given, rng in ((image, one), (to_float(image), two))]
    assert np.abs(found[0] - found[1]).max() < 1e-6


@pytest.mark.parametrize("degradation", [MotionBlur((2, 9)), DefocusBlur((0.5, 4))])
def test_blurs_keep_brightness_and_place(degradation: Degradation) -> None:
    """A kernel sums to one and is centred, and reaches no further than the stated margin."""
    point = np.zeros((61, 61, 1), np.float32)
    point[30, 30] = 1
    for seed in range(8):
        spread = degradation(point, np.random.default_rng(seed))[..., 0]
        assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
        assert float(spread.min()) >= 0
        rows, columns = spread.nonzero()
        assert max(np.abs(rows - 30).max(), np.abs(columns - 30).max()) <= degradation.margin
        place = [(spread * axis).sum() for axis in np.mgrid[:61, :61]]
        assert place == pytest.approx([30, 30], abs=0.05)


def test_a_straight_path_is_as_long_as_asked() -> None:
    """A uniform line of length L has a variance of L² / 12 along it, and the splat adds up to 1/4 a direction."""
    point = np.zeros((61, 61, 1), np.float32)
    point[30, 30] = 1
    for length in (4.0, 12.0):
        spread = MotionBlur(length, bend=0)(point, np.random.default_rng(5))[..., 0]
        variance = sum((spread * (axis - 30) ** 2).sum() for axis in np.mgrid[:61, :61])
        assert length**2 / 12 - 0.1 <= variance <= length**2 / 12 + 0.5


def test_a_disc_has_its_area() -> None:
    point = np.zeros((31, 31, 1), np.float32)
    point[15, 15] = 1
    spread = DefocusBlur(4.0)(point, np.random.default_rng(0))
    assert 1 / float(spread.max()) == pytest.approx(math.pi * 16, rel=0.02)


def test_jpeg_is_pillows() -> None:
    image, buffer = photo(), io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=20, subsampling=2)
    expected = np.asarray(Image.open(buffer))
    assert np.array_equal(JpegCompression(20)(image, np.random.default_rng(0)), expected)
    tested = JpegCompression((50, 90), test_quality=20).evaluate(image, np.random.default_rng(0))
    assert np.array_equal(tested, expected)
    errors = [
        np.abs(JpegCompression(quality)(image, np.random.default_rng(0)).astype(int) - image).mean()
        for quality in (5, 30, 95)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_a_chain_does_its_steps_in_order() -> None:
    image, steps = photo(), [DefocusBlur(1.5), GaussianNoise(10), BicubicDownscale(2)]
    chain, rng = Chain(steps), np.random.default_rng(4)
    expected = image
    for step in steps:
        expected = step(expected, rng)
    assert np.array_equal(chain(image, np.random.default_rng(4)), expected)
    assert (chain.scale, chain.random, chain.margin) == (2, True, steps[0].margin)


def test_refusals() -> None:
    for wrong in (0, 101, (60, 10)):
        with pytest.raises(ValueError, match="quality must be at least 1 and at most 100, a pair in rising order"):
            JpegCompression(wrong)
    with pytest.raises(ValueError, match="length must be at least 1"):
        MotionBlur(0.5)
    with pytest.raises(ValueError, match="bend must be at least 0, got -1"):
        MotionBlur(bend=-1)
    with pytest.raises(ValueError, match=r"radius must be at least 0\.01"):
        DefocusBlur(0)
    for steps in ([], [BicubicDownscale(2), GaussianNoise(5)]):
        with pytest.raises(ValueError, match="only the last may shrink"):
            Chain(steps)
