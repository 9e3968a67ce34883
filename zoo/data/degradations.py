"""What is done to clean photos: shrinking, noise, blur, JPEG compression, alone or one after another.

Each degradation is a function of the image and the generator it gets; in evaluation, Gaussian noise is that of the
published protocols. No training library is needed.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from zoo.data.resize import imresize

__all__ = [
    "BicubicDownscale",
    "Chain",
    "DefocusBlur",
    "Degradation",
    "GaussianNoise",
    "JpegCompression",
    "MotionBlur",
    "noisy",
    "to_float",
]

Pixels = NDArray[Any]
_FINE = 8  # points per pixel side from which the edge of a blur disc is drawn


class Degradation:
    """Turns a clean image into the one that a network restores.

    Attributes:
        scale: Clean pixels per degraded pixel along each side.
        random: Each patch is degraded anew; otherwise the whole photo is degraded once.
        margin: Clean pixels around a patch that its degraded version depends on.
    """

    scale: int = 1
    random: bool = False
    margin: int = 0

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """Return the degraded version of an (H, W, C) image; both are uint8, or float32 in units of full brightness."""
        raise NotImplementedError

    def evaluate(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """Return what validation and test restore; `rng` is that of the image and always the same."""
        return self(image, rng)


class BicubicDownscale(Degradation):
    """Shrink with MATLAB's bicubic `imresize`, bit for bit the low-resolution files of the benchmarks.

    Args:
        scale: Integer factor.

    Raises:
        ValueError: `scale` is less than 2.
    """

    def __init__(self, scale: int = 2) -> None:
        if scale < 2:
            raise ValueError(f"scale must be at least 2, got {scale}.")
        self.scale = scale

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        return imresize(image, 1 / self.scale)


class GaussianNoise(Degradation):
    """Add white Gaussian noise, neither clipped nor rounded.

    In evaluation it is the published protocol's, the same for each image of a size; see `noisy`.

    Args:
        sigma: Standard deviation in units of 1/255; a pair draws it uniformly between the two for every patch.
        test_sigma: That of validation and test; None takes `sigma`, and of a pair one value for each image.

    Raises:
        ValueError: A standard deviation is negative or the pair is not ordered.
    """

    random = True

    def __init__(self, sigma: float | tuple[float, float] = 25.0, test_sigma: float | None = None) -> None:
        self.low, self.high = _range("sigma", sigma, 0.0, math.inf)
        if test_sigma is not None and test_sigma < 0:
            raise ValueError(f"test_sigma must be at least 0, got {test_sigma}.")
        self.test_sigma = test_sigma

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        sigma = rng.uniform(self.low, self.high)
        return (to_float(image) + sigma / 255 * rng.standard_normal(image.shape)).astype(np.float32)

    def evaluate(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        sigma = rng.uniform(self.low, self.high) if self.test_sigma is None else self.test_sigma
        return noisy(to_float(image), sigma)


class JpegCompression(Degradation):
    """Compress as JPEG and read again, colour at half resolution, as most programs write it.

    Blocks start at the corner of a training patch, or of its surroundings where a step before in a `Chain` needs those.

    Args:
        quality: 1 to 100; a pair draws a whole number of the range for every patch.
        test_quality: That of validation and test; None takes `quality`, and of a pair one value for each image.

    Raises:
        ValueError: A quality is not in 1 ... 100 or the pair is not ordered.
    """

    random = True

    def __init__(self, quality: int | tuple[int, int] = (10, 60), test_quality: int | None = None) -> None:
        low, high = _range("quality", quality, 1, 100)
        self.low, self.high = int(low), int(high)
        self.test_quality = None if test_quality is None else int(_range("test_quality", test_quality, 1, 100)[0])

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        return self._compress(image, int(rng.integers(self.low, self.high + 1)))

    def evaluate(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        return self(image, rng) if self.test_quality is None else self._compress(image, self.test_quality)

    @staticmethod
    def _compress(image: Pixels, quality: int) -> NDArray[np.uint8]:
        pixels = _to_bytes(image)
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(
            buffer, "JPEG", quality=quality, subsampling=0 if pixels.shape[2] == 1 else 2
        )
        with Image.open(buffer) as coded:
            return np.asarray(coded).reshape(pixels.shape)


class MotionBlur(Degradation):
    """Blur along a short, slightly bent path, as a moving camera does.

    Args:
        length: Of the path, pixels; a pair draws it uniformly for every patch.
        bend: Largest angle by which the direction changes along the path, degrees.

    Raises:
        ValueError: A length is less than 1, the pair is not ordered, or `bend` is negative.
    """

    random = True

    def __init__(self, length: float | tuple[float, float] = (3.0, 15.0), bend: float = 60.0) -> None:
        self.low, self.high = _range("length", length, 1.0, math.inf)
        if bend < 0:
            raise ValueError(f"bend must be at least 0, got {bend}.")
        self.bend = bend
        self.margin = math.ceil(self.high / 2) + 1

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        length, start = rng.uniform(self.low, self.high), rng.uniform(0, 2 * math.pi)
        turn = math.radians(rng.uniform(-self.bend, self.bend))
        steps = _FINE * math.ceil(length)
        direction = start + turn * (np.arange(steps) / steps)
        path = np.cumsum(np.stack([np.sin(direction), np.cos(direction)]), axis=1) * (length / steps)
        return _convolve(image, _splat(path - path.mean(1, keepdims=True), self.margin))


class DefocusBlur(Degradation):
    """Blur with a disc, as a lens that is out of focus does.

    Args:
        radius: Of the disc, pixels; a pair draws it uniformly for every patch.

    Raises:
        ValueError: A radius is not positive or the pair is not ordered.
    """

    random = True

    def __init__(self, radius: float | tuple[float, float] = (0.5, 4.0)) -> None:
        self.low, self.high = _range("radius", radius, 0.01, math.inf)
        self.margin = math.ceil(self.high + 0.5)

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        radius, side = rng.uniform(self.low, self.high), 2 * self.margin + 1
        place = (np.arange(side * _FINE) + 0.5) / _FINE - side / 2
        inside = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64)
        kernel = inside.reshape(side, _FINE, side, _FINE).sum((1, 3))
        return _convolve(image, kernel)


class Chain(Degradation):
    """Apply several degradations one after another, for example blur, noise and JPEG compression.

    Args:
        steps: In order; only the last one may shrink the image.

    Raises:
        ValueError: There is none, or another than the last one shrinks.
    """

    def __init__(self, steps: list[Degradation]) -> None:
        if not steps or any(step.scale != 1 for step in steps[:-1]):
            raise ValueError("steps must be at least one degradation, of which only the last may shrink the image.")
        self.steps = list(steps)
        self.scale = self.steps[-1].scale
        self.random = any(step.random for step in self.steps)
        self.margin = sum(step.margin for step in self.steps)

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        for step in self.steps:
            image = step(image, rng)
        return image

    def evaluate(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        for step in self.steps:
            image = step.evaluate(image, rng)
        return image


def noisy(image: NDArray[np.float32], sigma: float) -> NDArray[Any]:
    """Add the noise of the denoising papers, the same for every image of a size: that of `np.random.seed(0)`.

    Bit for bit what DnCNN's successors and Restormer do: float64 noise of standard deviation sigma / 255 in (H, W, C)
    order, added in place to the float32 image, neither clipped nor rounded. NumPy's global generator is left alone.

    Args:
        image: (H, W, C), float32 in [0, 1].
        sigma: Standard deviation in units of 1/255.
    """
    out = image.copy()
    out += np.random.RandomState(0).normal(0, sigma / 255.0, image.shape)
    return out


def to_float(image: Pixels) -> NDArray[np.float32]:
    """Return an image as float32 in units of full brightness; 8-bit values are divided by 255 in float32."""
    values = image.astype(np.float32, copy=False)
    return values / np.float32(255) if image.dtype == np.uint8 else values


def _to_bytes(image: Pixels) -> NDArray[np.uint8]:
    return image if image.dtype == np.uint8 else (image.clip(0, 1) * 255).round().astype(np.uint8)


def _range(name: str, given: float | tuple[float, float], least: float, most: float) -> tuple[float, float]:
    """Return (low, high) of a number or an ordered pair."""
    low, high = given if isinstance(given, (tuple, list)) else (given, given)
    if not least <= low <= high <= most:
        upper = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} must be at least {least:g}{upper}, a pair in rising order, got {given}.")
    return low, high


def _splat(points: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """Draw points (2, N) of (y, x) around the centre of a square with bilinear weights."""
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    first = np.floor(points).astype(int)
    part = points - first
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - part[0]) * np.abs(1 - right - part[1])
            np.add.at(kernel, (first[0] + down + radius, first[1] + right + radius), weight)
    return kernel


def _convolve(image: Pixels, kernel: NDArray[np.float64]) -> NDArray[np.float32]:
    """Blur each channel; the kernel is normalised, and the border pixels are repeated beyond the image."""
    weights = torch.from_numpy(kernel / kernel.sum()).float()[None, None]
    radius = kernel.shape[0] // 2
    planes = torch.from_numpy(np.ascontiguousarray(to_float(image).transpose(2, 0, 1)))[:, None]
    planes = F.conv2d(F.pad(planes, (radius,) * 4, mode="replicate"), weights)
    return np.ascontiguousarray(planes[:, 0].permute(1, 2, 0).numpy())
