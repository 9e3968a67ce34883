"""What is done to clean photos: shrinking, noise, blur, JPEG compression, alone or one after another.

Each degradation is a function of the image and the generator it gets; in evaluation, Gaussian noise is that of the
published protocols. No training library is needed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from zoo.data.resize import imresize

__all__ = [
    "BicubicDownscale",
    "CameraNoise",
    "Chain",
    "DefocusBlur",
    "Degradation",
    "GaussianBlur",
    "GaussianNoise",
    "JpegCompression",
    "MotionBlur",
    "RealPhoto",
    "noisy",
    "to_float",
]

Pixels = NDArray[Any]
_FINE = 8  # points per pixel side from which the edge of a blur disc is drawn
_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


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
        return self.compress(image, int(rng.integers(self.low, self.high + 1)))

    def evaluate(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        return self(image, rng) if self.test_quality is None else self.compress(image, self.test_quality)

    @staticmethod
    def compress(image: Pixels, quality: int, subsampling: int = 2) -> NDArray[np.uint8]:
        """Compress with a quality; `subsampling` of colour is Pillow's: 0 is none, 2 is half the resolution."""
        pixels = _to_bytes(image)
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(
            buffer, "JPEG", quality=quality, subsampling=0 if pixels.shape[2] == 1 else subsampling
        )
        with Image.open(buffer) as coded:
            return np.array(coded).reshape(pixels.shape)  # a copy: that of the picture cannot be written


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


class GaussianBlur(Degradation):
    """Blur with a Gaussian: round, or of two widths and turned.

    Args:
        sigma: Standard deviation, pixels; a pair draws it uniformly for every patch, and for each of two widths.
        isotropic: Share of round ones.

    Raises:
        ValueError: A width is not positive, the pair is not ordered, or `isotropic` is not in 0 ... 1.
    """

    random = True

    def __init__(self, sigma: float | tuple[float, float] = (0.1, 1.5), isotropic: float = 0.5) -> None:
        self.low, self.high = _range("sigma", sigma, 0.01, math.inf)
        self.isotropic = _range("isotropic", isotropic, 0.0, 1.0)[0]
        self.margin = math.ceil(3 * self.high)

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        return self.blur(image, rng)

    def blur(self, image: Pixels, rng: np.random.Generator, pixels: float = 1.0) -> NDArray[np.float32]:
        """Blur an image in which a pixel that `sigma` is given in is `pixels` pixels wide."""
        widths = pixels * rng.uniform(self.low, self.high, 2)
        if rng.random() < self.isotropic:
            widths[1] = widths[0]
        turn = rng.uniform(0, math.pi)
        radius = max(1, math.ceil(3 * widths.max()))
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
        along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        return _convolve(image, np.exp(-0.5 * ((along / widths[0]) ** 2 + (across / widths[1]) ** 2)))


class CameraNoise(Degradation):
    """Add noise as a camera's JPEG shows it: stronger in bright places, and alike in neighbouring pixels.

    Photons count as Poisson numbers and the sensor adds Gaussian noise; filling in the missing colours of the sensor's
    pattern spreads both, so that the noise is coarser than white noise. The result is clipped.

    Args:
        sigma: Standard deviation at half brightness in units of 1/255; a pair draws it for every patch.
        spread: Width of the Gaussian that spreads the noise, pixels; a pair draws it for every patch.
        gray: Share of patches with equal noise in all channels.

    Raises:
        ValueError: A value is negative, a pair is not ordered, or `gray` is not in 0 ... 1.
    """

    random = True

    def __init__(
        self,
        sigma: float | tuple[float, float] = (1.0, 10.0),
        spread: float | tuple[float, float] = (0.0, 0.8),
        gray: float = 0.4,
    ) -> None:
        self.low, self.high = _range("sigma", sigma, 0.0, math.inf)
        self.spread = _range("spread", spread, 0.0, math.inf)
        self.gray = _range("gray", gray, 0.0, 1.0)[0]
        self.margin = math.ceil(3 * self.spread[1])

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        sigma, photons, spread = rng.uniform(self.low, self.high) / 255, rng.uniform(), rng.uniform(*self.spread)
        channels = 1 if rng.random() < self.gray else image.shape[2]
        noise = rng.standard_normal((*image.shape[:2], channels)).astype(np.float32)
        if spread > 0.2:
            radius = math.ceil(3 * spread)
            line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / spread) ** 2)
            kernel = np.outer(line, line)
            noise = _convolve(noise, kernel) * np.float32(kernel.sum() / math.sqrt((kernel**2).sum()))
        clean = to_float(image)
        strength = np.sqrt(photons * 2 * clean.clip(0, 1) + 1 - photons)
        return (clean + np.float32(sigma) * strength * noise).clip(0, 1).astype(np.float32)


class RealPhoto(Degradation):
    """Make of a clean photo what a phone's or a web page's JPEG shows of it.

    After BSRGAN (Zhang et al., ICCV 2021, https://arxiv.org/abs/2103.14006) and Real-ESRGAN (Wang et al., ICCVW 2021,
    https://arxiv.org/abs/2107.10833): blur (round or turned), resizing by several filters, noise and a first JPEG
    compression in random order, a last resizing to the scale, and a JPEG compression at the end; qualities of the
    papers are 30 to 95, noise 1 to 25 or 30 of 255, blur up to 3 pixels. Ours: mostly mild ranges, as photos of phones
    are, noise that is that of a camera (`CameraNoise`), and a share that is only shrunk as the benchmarks are, and
    compressed.

    Args:
        scale: Integer factor; 1 keeps the size.
        plain: Share of patches that are only shrunk and compressed.
        blur: Range of the width of the blur, pixels of the result; half of the other patches are blurred.
        noise: Range of the noise at half brightness, of 255; half of the other patches are noisy.
        quality: Range of JPEG qualities.
        test_quality: Validation and test photos are only shrunk and compressed with this quality; None degrades them
            as in training.

    Raises:
        ValueError: `scale` is less than 1, a range is not ordered or out of bounds.
    """

    random = True

    def __init__(
        self,
        scale: int = 2,
        plain: float = 0.4,
        blur: tuple[float, float] = (0.1, 0.7),
        noise: tuple[float, float] = (1.0, 10.0),
        quality: tuple[int, int] = (40, 95),
        test_quality: int | None = None,
    ) -> None:
        if scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}.")
        self.scale, self.plain = scale, _range("plain", plain, 0.0, 1.0)[0]
        self.margin = 8 * scale  # a block of the last compression; blurs reach as far at most
        self._blur, self._noise = GaussianBlur(blur), CameraNoise(noise)
        self._jpeg, self._tested = JpegCompression(quality, test_quality), test_quality is not None

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        if rng.random() < self.plain:
            return self._compressed(self._shrunk(image), rng)
        height, width = (length // self.scale for length in image.shape[:2])

        def blurred(x: Pixels) -> Pixels:
            return self._blur.blur(x, rng, x.shape[0] / height)

        def resized(x: Pixels) -> Pixels:
            part = rng.uniform(0.7, 1.0) if self.scale == 1 else rng.uniform(0.6, 1.5) / self.scale
            size = [max(1, round(part * length)) for length in image.shape[:2]]
            return _resized(x, size[0], size[1], _FILTERS[rng.integers(0, len(_FILTERS))])

        often: list[tuple[Callable[[Pixels], Pixels], float]] = [
            (blurred, 0.5),
            (resized, 0.2 if self.scale == 1 else 0.8),
            (lambda x: self._noise(x, rng), 0.5),
            (lambda x: self._compressed(x, rng), 0.4),
        ]
        for index in rng.permutation(len(often)):
            step, share = often[index]
            if rng.random() < share:
                image = step(image)
        image = _resized(image, height, width, _FILTERS[rng.integers(0, len(_FILTERS))])
        return self._compressed(image, rng) if rng.random() < 0.9 else _to_bytes(image)

    def evaluate(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        return self._jpeg.evaluate(self._shrunk(image), rng) if self._tested else self(image, rng)

    def _shrunk(self, image: Pixels) -> Pixels:
        return _to_bytes(image) if self.scale == 1 else imresize(_to_bytes(image), 1 / self.scale)

    def _compressed(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """Compress; a quarter of the files keeps colour at full resolution, as cameras' best settings do."""
        quality, whole = int(rng.integers(self._jpeg.low, self._jpeg.high + 1)), rng.random() < 0.25
        return self._jpeg.compress(image, quality, subsampling=0 if whole else 2)


class Chain(Degradation):
    """Apply several degradations one after another, for example blur, noise and JPEG compression.

    Args:
        steps: In order; those that shrink the image multiply to the scale of the whole.

    Raises:
        ValueError: There is none.
    """

    def __init__(self, steps: list[Degradation]) -> None:
        if not steps:
            raise ValueError("steps must be at least one degradation, got none.")
        self.steps = list(steps)
        self.random = any(step.random for step in self.steps)
        for step in self.steps:  # a margin is in pixels of what its step gets
            self.margin += step.margin * self.scale
            self.scale *= step.scale

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


def _resized(image: Pixels, height: int, width: int, method: Image.Resampling) -> Pixels:
    """Resize (H, W, C) by one of Pillow's filters, wider where the image shrinks; the size it has is left alone."""
    if image.shape[:2] == (height, width):
        return image
    planes = [Image.fromarray(plane).resize((width, height), method) for plane in to_float(image).transpose(2, 0, 1)]
    return np.stack([np.asarray(plane) for plane in planes], -1).clip(0, 1)


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
