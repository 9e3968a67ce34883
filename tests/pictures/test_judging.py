"""What a picture has gone through: blocks and noise are seen where they are, and the reason is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from skimage import data

from zoo.data.degradations import CameraNoise, GaussianNoise, JpegCompression
from zoo.data.resize import imresize
from zoo.pictures.judging import blockiness, judge, noise_level

RNG = np.random.default_rng


def photos() -> list[np.ndarray[Any, Any]]:
    """Clean photos: shrunk, so that what their own files did to them is gone."""
    return [imresize(getattr(data, name)(), 0.5) for name in ("astronaut", "coffee", "chelsea")]


@pytest.mark.parametrize("quality", [75, 50, 30])
def test_blocks_are_seen(quality: int) -> None:
    for photo in photos():
        clean, coded = judge(photo), judge(JpegCompression(quality)(photo, RNG(0)))
        assert (clean.kind, coded.kind) == ("clean", "real")
        assert coded.blockiness > clean.blockiness + 0.05
        assert "JPEG blocks" in coded.words
        assert clean.words.startswith("no JPEG blocks")


def test_blocks_may_begin_anywhere() -> None:
    coded = JpegCompression(60)(photos()[0], RNG(0))
    assert blockiness(coded[3:, 5:, 1].astype(np.float32)) == pytest.approx(
        blockiness(coded[..., 1].astype(np.float32)), rel=0.05
    )


@pytest.mark.parametrize("noise", [GaussianNoise(8.0), CameraNoise(8.0)])
def test_noise_is_seen(noise: Any) -> None:
    for photo in photos():
        noisy = (noise(photo, RNG(0)).clip(0, 1) * 255).round().astype(np.uint8)
        assert judge(noisy).kind == "real"
        assert "noise of" in judge(noisy).words
        assert judge(photo).noise < judge(noisy).noise


def test_noise_in_numbers() -> None:
    flat = np.full((200, 300), 128, np.float32)
    for sigma in (2.0, 5.0, 10.0):
        assert noise_level(flat + RNG(1).normal(0, sigma, flat.shape).astype(np.float32)) == pytest.approx(
            sigma, rel=0.15
        )


def test_any_picture() -> None:
    """Small ones, gray ones, 16 bits and floats; what is too small to tell counts as clean."""
    photo = photos()[0]
    assert judge(photo[:7, :9]).kind == "clean"
    assert judge(np.zeros((64, 64, 3), np.uint8)).kind == "clean"
    gray = JpegCompression(40)(photo, RNG(0))[..., :1]
    assert judge(gray).kind == "real"
    for other, peak in ((gray.astype(np.uint16) * 257, 65535.0), (gray / np.float32(255), 1.0)):
        assert judge(other, peak).blockiness == pytest.approx(judge(gray).blockiness, abs=1e-3)
