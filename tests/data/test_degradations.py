"""Degradations: what each does in numbers, the same for equal generators, and refusals."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo.data import degradations
from zoo.data.degradations import (
    BicubicDownscale,
    CameraNoise,
    Chain,
    DefocusBlur,
    Degradation,
    GaussianBlur,
    GaussianNoise,
    JpegCompression,
    MotionBlur,
    RealPhoto,
    to_float,
)

RANDOM: dict[str, Degradation] = {
    "noise": GaussianNoise((0, 50)),
    "jpeg": JpegCompression((10, 60)),
    "motion": MotionBlur((3, 9)),
    "defocus": DefocusBlur((0.5, 3)),
    "gaussian": GaussianBlur((0.5, 2)),
    "camera": CameraNoise((2, 10)),
    "photo": RealPhoto(scale=1),
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


@pytest.mark.parametrize("degradation", [MotionBlur((2, 9)), DefocusBlur((0.5, 4)), GaussianBlur((0.3, 3))])
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


def test_steps_after_a_smaller_picture_count_in_its_pixels() -> None:
    """As the benchmarks of compressed super-resolution: shrunk, then compressed."""
    image, chain = photo(), Chain([BicubicDownscale(2), DefocusBlur(1.5), JpegCompression(75)])
    assert (chain.scale, chain.margin) == (2, 2 * chain.steps[1].margin)
    assert chain(image, np.random.default_rng(0)).shape == (20, 16, 3)


def test_camera_noise_grows_with_brightness_and_is_coarse() -> None:
    gray = np.full((128, 128, 3), 0.5, np.float32)
    noise = CameraNoise(8.0, spread=0.0, gray=0.0)(gray, np.random.default_rng(0)) - gray
    assert noise.std() * 255 == pytest.approx(8.0, rel=0.05)
    coarse = (CameraNoise(8.0, spread=0.8, gray=1.0)(gray, np.random.default_rng(0)) - gray)[..., 0]
    assert coarse.std() * 255 == pytest.approx(8.0, rel=0.1)
    assert np.corrcoef(coarse[:, 1:].ravel(), coarse[:, :-1].ravel())[0, 1] > 0.5
    ramps = [
        (CameraNoise(8.0, 0.0, 0.0)(np.full_like(gray, level), np.random.default_rng(3)) - level).std()
        for level in (0.1, 0.8)
    ]
    assert ramps[0] < ramps[1]


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_real_photo_stays_in_place(scale: int) -> None:
    """Whatever is drawn, the result is 8 bits, has the scale, and lies where the plainly shrunk picture lies."""
    y, x = np.mgrid[:96, :64]
    image = np.stack([127 + 90 * np.sin(x / 20 + k) * np.cos(y / 25) for k in range(3)], -1).round().astype(np.uint8)
    shrunk = to_float(image if scale == 1 else BicubicDownscale(scale)(image, np.random.default_rng(0)))
    degradation = RealPhoto(scale, noise=(0.0, 2.0))
    mean = np.mean([to_float(degradation(image, np.random.default_rng(seed))) for seed in range(24)], 0)
    assert mean.shape == shrunk.shape
    inner = slice(2, -2)
    assert np.abs(mean - shrunk)[inner, inner].max() < 0.04
    tested = RealPhoto(scale, test_quality=75).evaluate(image, np.random.default_rng(0))
    plain = image if scale == 1 else BicubicDownscale(scale)(image, np.random.default_rng(0))
    assert np.array_equal(tested, JpegCompression(75)(plain, np.random.default_rng(1)))


def test_real_photos_are_drawn_in_the_shares_that_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half are blurred, half noisy, four in five resized to 0.6 to 1.5 of the result; 0.4 of 0.9 compressed twice."""
    done: dict[str, list[Any]] = {"blur": [], "noise": [], "jpeg": [], "size": []}
    degradation, image, draws = RealPhoto(2, plain=0.0), photo()[:, :, :3], 600

    def counted(name: str, call: Any, fact: Any) -> Any:
        return lambda *given, **named: done[name].append(fact(*given, **named)) or call(*given, **named)

    monkeypatch.setattr(degradation._blur, "blur", counted("blur", lambda x, *_: x, lambda x, rng, unit: unit))
    monkeypatch.setattr(degradation, "_noise", counted("noise", lambda x, rng: x, lambda x, rng: None))
    monkeypatch.setattr(
        degradation._jpeg,
        "compress",
        counted("jpeg", lambda x, *_, **__: x, lambda x, q, subsampling: (q, subsampling)),
    )
    monkeypatch.setattr(
        degradations, "_resized", counted("size", lambda x, *_: x, lambda x, height, width, kind: height)
    )
    for seed in range(draws):
        degradation(image, np.random.default_rng(seed))
    shares = {name: len(calls) / draws for name, calls in done.items()}
    assert shares == pytest.approx({"blur": 0.5, "noise": 0.5, "jpeg": 1.3, "size": 1.8}, abs=0.08)
    heights = [height for height in done["size"] if height != 20]  # the last is always the result's
    assert (min(heights), max(heights)) == (12, 30)
    qualities = [quality for quality, _ in done["jpeg"]]
    assert (min(qualities), max(qualities)) == (40, 95)
    assert np.mean([subsampling == 0 for _, subsampling in done["jpeg"]]) == pytest.approx(0.25, abs=0.06)


def test_ranges_of_real_photos_are_those_of_the_shipped_weights() -> None:
    known = RealPhoto()
    assert (known.scale, known.plain, known.margin) == (2, 0.4, 16)
    assert (known._blur.low, known._blur.high, known._noise.low, known._noise.high) == (0.1, 0.7, 1.0, 10.0)
    camera = CameraNoise()
    assert (camera.low, camera.high, camera.spread, camera.gray, camera.margin) == (1.0, 10.0, (0.0, 0.8), 0.4, 3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="gray must be at least 0"):
        CameraNoise(gray=1.2)
    for wrong in (0, 101, (60, 10)):
        with pytest.raises(ValueError, match="quality must be at least 1 and at most 100, a pair in rising order"):
            JpegCompression(wrong)
    with pytest.raises(ValueError, match="length must be at least 1"):
        MotionBlur(0.5)
    with pytest.raises(ValueError, match="bend must be at least 0, got -1"):
        MotionBlur(bend=-1)
    with pytest.raises(ValueError, match=r"radius must be at least 0\.01"):
        DefocusBlur(0)
    with pytest.raises(ValueError, match="at least one degradation, got none"):
        Chain([])
    with pytest.raises(ValueError, match="scale must be at least 1, got 0"):
        RealPhoto(0)
    with pytest.raises(ValueError, match="plain must be at least 0 and at most 1"):
        RealPhoto(2, plain=1.5)
