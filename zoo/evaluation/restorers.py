"""Measure restorers on benchmark sets as the papers do: pairs made or read, restored, compared by a named protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.degradations import JpegCompression, RealPhoto, noisy, to_float
from zoo.data.photos import Pair, read_pair, to_tensor
from zoo.data.resize import imresize
from zoo.evaluation.metrics import measure
from zoo.evaluation.protocols import Protocol
from zoo.pictures.tiling import restore_tensor

__all__ = ["Restorer", "Score", "bicubic", "evaluate", "load_pair", "network", "unchanged"]

Restorer = Callable[[Tensor], Tensor]
"""Maps (1, C, H, W) in [0, 1] to (1, C, scale * H, scale * W), not clamped."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one image got.

    Args:
        file: The clean image.
        values: "psnr" (dB), "ssim", and by some protocols "mae" (0 to 1).
        seconds: Time of the restoration alone.
    """

    file: Path
    values: dict[str, float]
    seconds: float


def network(model: nn.Module, *, budget: int | float | str | None = None, self_ensemble: bool = False) -> Restorer:
    """Return a network as a restorer.

    Args:
        model: From `zoo.pictures.restore.load_restorer`.
        budget: Memory limit, as in `zoo.restore`.
        self_ensemble: Average over eight flips and turns, what papers mark with "+".
    """
    return lambda x: restore_tensor(model, x, budget=budget, self_ensemble=self_ensemble)


def bicubic(scale: int) -> Restorer:
    """Return the baseline of super-resolution: MATLAB's bicubic enlargement of the 8-bit image.

    Args:
        scale: Output pixels per input pixel along each side.
    """

    def enlarge(x: Tensor) -> Tensor:
        pixels = (x[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return to_tensor(imresize(pixels, scale))[None]

    return enlarge


def unchanged(x: Tensor) -> Tensor:
    """Return the degraded image itself: the baseline of denoising, deblurring and deraining."""
    return x


def load_pair(
    pair: Pair,
    protocol: Protocol,
    *,
    scale: int = 1,
    sigma: float | None = None,
    quality: int | None = None,
    channels: int = 3,
    index: int = 0,
) -> tuple[Tensor, Tensor]:
    """Read a clean image and read or make its degraded version, as a protocol says.

    Args:
        pair: Files. Of a degraded image with 16 bits the high 8 are read, as the papers' code does; the two views of a
            dual-pixel sensor become 6 channels and keep their 16 bits.
        protocol: Says how a degraded version is made that is no file.
        scale: Clean pixels per degraded pixel; the clean image is cut from the top left to fit.
        sigma: Of the noise where the protocol adds it, in units of 1/255.
        quality: Of the JPEG compression where the protocol compresses.
        index: Of the image in its set, which decides what is random.
        channels: 3, where gray images count three times, or 1, where colour is turned to gray as Pillow does (OpenCV
            may differ by one level).

    Returns:
        Both (1, C, H, W), float32; the clean one in [0, 1].

    Raises:
        ValueError: A file is unreadable, the two are no pair, or the degraded version can only be a file.
    """
    source, clean = read_pair(pair, "L" if channels == 1 else "RGB", scale)
    if source is not None:
        return to_tensor(source)[None], to_tensor(clean)[None]
    if protocol.degradation == "bicubic" and scale > 1:
        source = imresize(clean, 1 / scale)
    elif protocol.degradation == "noise" and sigma is not None:
        source = noisy(to_float(clean), sigma)
    elif protocol.degradation == "jpeg" and quality is not None:
        source = JpegCompression.compress(clean if scale == 1 else imresize(clean, 1 / scale), quality)
    elif protocol.degradation == "photo":
        source = RealPhoto(scale).evaluate(clean, np.random.default_rng((0, index)))
    else:
        raise ValueError(
            f"The protocol {protocol.name!r} needs degraded images as files, and there is none for {pair.clean}: give "
            "a folder that holds one folder of clean images (HR, GT, target) and one of degraded ones (LR*, input*)."
        )
    return to_tensor(source)[None], to_tensor(clean)[None]


def evaluate(
    restorer: Restorer,
    pairs: Sequence[Pair],
    protocol: Protocol,
    *,
    scale: int = 1,
    sigma: float | None = None,
    quality: int | None = None,
    channels: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Restore and measure every image of a set; the papers' figure is the mean of the values.

    Args:
        restorer: What is measured.
        pairs: From `zoo.data.photos.find_pairs`.
        protocol: How; from `zoo.evaluation.protocols`.
        scale: Of the restorer.
        sigma: Of the noise where the protocol adds it, in units of 1/255.
        quality: Of the JPEG compression where the protocol compresses.
        channels: 3, or 1 for a gray restorer.
        progress: Called with (images done, images in all).

    Raises:
        ValueError: As `load_pair`, or an image is too small for its metric; every error names the file.
        RuntimeError: The network fails on an image.
    """
    scores = []
    for index, pair in enumerate(pairs):
        with _naming(pair):
            how: dict[str, Any] = dict(scale=scale, sigma=sigma, quality=quality, channels=channels, index=index)
            source, clean = load_pair(pair, protocol, **how)
            start = time.perf_counter()
            with torch.inference_mode():
                output = restorer(source).cpu()
            seconds = time.perf_counter() - start
            values = {name: float(value) for name, value in measure(protocol, output, clean, scale).items()}
        scores.append(Score(file=pair.clean, values=values, seconds=seconds))
        if progress is not None:
            progress(len(scores), len(pairs))
    return scores


@contextmanager
def _naming(pair: Pair) -> Iterator[None]:
    """Put the name of the image before what an error says, where it is not there yet."""
    try:
        yield
    except Exception as error:
        said = str(error) or type(error).__name__
        names = [str(pair.clean), *(str(path) for path in pair.degraded)]
        if any(name in said for name in names):
            raise
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"{pair.clean}: {said}") from error
