"""PSNR, SSIM and MAE as the restoration papers measure them, with everything that changes the number named; and the
Frechet distance between sets of images, in any network's features.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.evaluation.protocols import Protocol, SsimWindow
from zoo.evaluation.realblur import align

__all__ = [
    "ColorSpace",
    "FeatureStatistics",
    "SsimWindow",
    "frechet_distance",
    "luma",
    "mae",
    "measure",
    "psnr",
    "square_root",
    "ssim",
]

ColorSpace = Literal["y", "rgb"]
_BT601 = (65.481, 128.553, 24.966)
_RADIUS = {"gaussian": 5, "volume": 5, "uniform": 3}  # of the windows, pixels
_SIGMA = 1.5  # of the Gaussian windows, pixels


def luma(images: Tensor, rounded: bool = False) -> Tensor:
    """Return BT.601 studio-swing luma, (B, C, H, W) in [0, 255] -> (B, 1, H, W) in [16, 235].

    Args:
        images: RGB, or one channel, which counts as three equal ones.
        rounded: Round to whole numbers, halves up, as MATLAB's `rgb2ycbcr` does for 8-bit images; exact for these.

    Raises:
        ValueError: `images` is not (B, 1, H, W) or (B, 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1, H, W) or (B, 3, H, W), got {tuple(images.shape)}.")
    if rounded:  # in whole numbers, since float32 would decide some of the halves by its own rounding
        weights = images.new_tensor([1000 * weight for weight in _BT601], dtype=torch.float64).round()
        total = (images.double() * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)
        return (total / 255_000 + 16.5).floor().to(images.dtype)
    return (images * images.new_tensor(_BT601).view(1, 3, 1, 1)).sum(1, keepdim=True) / 255 + 16


def psnr(
    output: Tensor,
    target: Tensor,
    *,
    space: ColorSpace,
    crop: int = 0,
    quantize: bool = True,
    rounded_luma: bool = False,
) -> Tensor:
    """Measure the peak signal-to-noise ratio of each image, dB with peak 255.

    With `space="y"` and `crop` equal to the scale this is BasicSR's protocol for classical super-resolution.

    Args:
        output: Restored images (B, C, H, W) in [0, 1]; values beyond are clamped.
        target: True images, same shape and range.
        space: "y" compares BT.601 luma, "rgb" all channels.
        crop: Border pixels left out on each side.
        quantize: Round both to 8 bits first, half to even; otherwise floats are compared.
        rounded_luma: Round luma to whole numbers before comparing.

    Returns:
        (B,), float64; infinite for equal images.

    Raises:
        ValueError: Shapes differ, nothing is left after the crop, or the colour space is unknown.
    """
    output, target = _prepare(output, target, space, crop, quantize, rounded_luma)
    error = (output - target).double().square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error)


def mae(output: Tensor, target: Tensor, *, space: ColorSpace, crop: int = 0, quantize: bool = True) -> Tensor:
    """Measure the mean absolute error of each image, in units of full brightness (0 to 1).

    Args:
        output: Restored images (B, C, H, W) in [0, 1]; values beyond are clamped.
        target: True images, same shape and range.
        space: "y" compares BT.601 luma, "rgb" all channels.
        crop: Border pixels left out on each side.
        quantize: Round both to 8 bits first.

    Returns:
        (B,), float64.

    Raises:
        ValueError: As `psnr`.
    """
    output, target = _prepare(output, target, space, crop, quantize, False)
    return (output - target).double().abs().flatten(1).mean(1) / 255


def ssim(
    output: Tensor,
    target: Tensor,
    *,
    space: ColorSpace,
    crop: int = 0,
    quantize: bool = True,
    rounded_luma: bool = False,
    window: SsimWindow = "gaussian",
) -> Tensor:
    """Measure the structural similarity of each image, in float64.

    Args:
        output: Restored images (B, C, H, W) in [0, 1]; values beyond are clamped.
        target: True images, same shape and range.
        space: "y" compares BT.601 luma, "rgb" all channels.
        crop: Border pixels left out on each side.
        quantize: Round both to 8 bits first, half to even; otherwise floats are compared.
        rounded_luma: Round luma to whole numbers before comparing.
        window: "gaussian" is Wang's `ssim_index`: 11x11, sigma 1.5, where it fits into the image, mean of the channels.
            "volume" is MATLAB's `ssim` of an RGB array, which it takes for a volume: an 11x11x11 Gaussian of sigma 1.5
            over rows, columns and channels, borders replicated. "uniform" is scikit-image's default: 7x7 mean with
            sample covariances, where it fits, mean of the channels.

    Returns:
        (B,), float64, at most 1.

    Raises:
        ValueError: Shapes differ, fewer pixels a side are left than the window has, or a choice is unknown.
    """
    if window not in _RADIUS:
        raise ValueError(f"window must be one of {', '.join(_RADIUS)}, got {window!r}.")
    output, target = _prepare(output, target, space, crop, quantize, rounded_luma)
    side = 2 * _RADIUS[window] + 1
    height, width = output.shape[-2:]
    if window != "volume" and min(height, width) < side:
        raise ValueError(f"SSIM needs at least {side}x{side} pixels after the crop, got {height}x{width}.")
    return _similarity(output, target, window).flatten(1).mean(1)


def _similarity(output: Tensor, target: Tensor, window: SsimWindow) -> Tensor:
    """Structural similarity of each pixel of images in [0, 255] around which the window fits, float64."""
    side = 2 * _RADIUS[window] + 1
    x, y = output.double(), target.double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_smooth(z, window) for z in (x, y, x * x, y * y, x * y))
    sample = side**2 / (side**2 - 1) if window == "uniform" else 1.0
    var_x, var_y = sample * (mean_xx - mean_x**2), sample * (mean_yy - mean_y**2)
    covariance = sample * (mean_xy - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


def measure(protocol: Protocol, output: Tensor, target: Tensor, scale: int = 1) -> dict[str, Tensor]:
    """Compare images by a named protocol of `zoo.evaluation.protocols`.

    Args:
        protocol: How.
        output: Restored images (B, C, H, W) in [0, 1], not rounded.
        target: True images, same shape and range.
        scale: Of the restorer.

    Returns:
        "psnr" (dB), "ssim", and where the protocol has it "mae" (0 to 1); each (B,), float64.

    Raises:
        ValueError: Shapes differ, or the images are too small.
        ImportError: The protocol needs OpenCV, which is not installed.
    """
    if protocol.aligned:
        return _measure_aligned(output, target)
    crop = scale if protocol.crop_scale and scale > 1 else 0
    space, quantize, rounded = protocol.space, protocol.quantize, protocol.rounded_luma
    found = {
        "psnr": psnr(output, target, space=space, crop=crop, quantize=quantize, rounded_luma=rounded),
        "ssim": ssim(
            output, target, space=space, crop=crop, quantize=quantize, rounded_luma=rounded, window=protocol.window
        ),
    }
    if protocol.mae:
        found["mae"] = mae(output, target, space=space, crop=crop, quantize=quantize)
    return found


def _measure_aligned(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """PSNR and SSIM of 8-bit images that are laid onto their truth first, where they have pixels."""
    output, target = (x / 255 for x in _prepare(output, target, "rgb", 0, True, False))
    edge, found = _RADIUS["gaussian"], []
    for image, truth in zip(output.cpu(), target.cpu(), strict=True):
        if min(image.shape[1:]) <= 2 * edge:
            raise ValueError(f"SSIM needs at least {2 * edge + 1} pixels a side, got {tuple(image.shape[1:])}.")
        aligned, mask = align(image, truth)
        aligned, truth = aligned * mask, truth * mask
        error = (aligned - truth).double().square().sum() / (len(image) * mask.double().sum())
        similarity = _similarity(aligned[None] * 255, truth[None] * 255, "gaussian")[0]
        inner = mask[edge:-edge, edge:-edge].double()
        found.append((-10 * torch.log10(error), (similarity * inner).sum() / (len(image) * inner.sum())))
    return {name: torch.stack(values) for name, values in zip(("psnr", "ssim"), zip(*found, strict=True), strict=True)}


class FeatureStatistics:
    """Mean and covariance of the features of a set of images, taken in batch by batch, in float64.

    Args:
        features: Length of a feature.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64)
        self._scatter = torch.zeros(features, features, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take in a batch.

        Args:
            features: (B, features), of any type, on any device.

        Raises:
            ValueError: They are of another length.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (B, {len(self.mean)}), got {tuple(features.shape)}.")
        if len(features) == 0:
            return
        batch = features.detach().double().cpu()
        # means are merged rather than summed, so that nothing is lost where they are large
        own, total = batch.mean(0), self.count + len(batch)
        centred, shift = batch - own, own - self.mean
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Sample covariance (features, features).

        Raises:
            ValueError: There are fewer than 2 images.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, got {self.count}.")
        return self._scatter / (self.count - 1)


def square_root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance (features, features), in float64."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(samples: Tensor, mean: Tensor, root: Tensor) -> float:
    """Return the squared Frechet distance of two normal distributions: |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500. The name FID
    is for Inception's features only; with few images the distance comes out too large, whatever the features.

    Args:
        samples: (B, features), at least two, whose mean and covariance are the first distribution's.
        mean: (features,), of the other.
        root: (features, features), `square_root` of its covariance.

    Raises:
        ValueError: The shapes do not fit together, or there are fewer than two samples.
    """
    size = len(mean)
    if samples.ndim != 2 or len(samples) < 2 or samples.shape[1] != size or root.shape != (size, size):
        shapes = [tuple(each.shape) for each in (samples, mean, root)]
        raise ValueError(f"Samples (B, D), two or more, mean (D,) and root (D, D) must be of one size, got {shapes}.")
    own = samples.double()
    centred = (own - own.mean(0)) / (len(own) - 1) ** 0.5
    # the eigenvalues of (C1 C2)^(1/2) are the singular values of the samples times the root: few samples, little work
    cross = torch.linalg.svdvals(centred @ root).sum()
    shift = (own.mean(0) - mean.double()).square().sum()
    trace = centred.square().sum() + root.square().sum()
    return max(0.0, float(shift + trace - 2 * cross))  # rounding may take it below 0


def _smooth(x: Tensor, window: SsimWindow) -> Tensor:
    """Weighted means around each pixel, (B, C, H, W) in float64."""
    radius = _RADIUS[window]
    position = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.ones_like(position) if window == "uniform" else torch.exp(-position.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    channels = x.shape[1]
    planes = x.flatten(0, 1).unsqueeze(1)
    if window == "volume":
        planes = F.pad(planes, (radius, radius, radius, radius), mode="replicate")
    planes = F.conv2d(planes, weights.view(1, 1, -1, 1))
    out = F.conv2d(planes, weights.view(1, 1, 1, -1)).squeeze(1).unflatten(0, (-1, channels))
    if window == "volume":  # along the channels, where nearly the whole window lies on replicated ones
        seen = (torch.arange(channels, device=x.device)[:, None] + position.long()).clamp(0, channels - 1)
        mixing = weights.new_zeros(channels, channels).scatter_add_(1, seen, weights.expand(channels, -1))
        out = torch.einsum("dc,bchw->bdhw", mixing, out)
    return out


def _prepare(
    output: Tensor, target: Tensor, space: ColorSpace, crop: int, quantize: bool, rounded_luma: bool
) -> tuple[Tensor, Tensor]:
    """Check both images, bring them to [0, 255] and to the colour space, and crop them."""
    if output.shape != target.shape or output.ndim != 4:
        raise ValueError(
            f"output and target must be (B, C, H, W) alike, got {tuple(output.shape)} and {tuple(target.shape)}."
        )
    if space not in ("y", "rgb"):
        raise ValueError(f'space must be "y" or "rgb", got {space!r}.')
    if crop < 0 or 2 * crop >= min(output.shape[-2:]):
        height, width = output.shape[-2:]
        raise ValueError(f"crop must be at least 0 and leave pixels of a {height}x{width} image, got {crop}.")
    output, target = output.float().clamp(0, 1) * 255, target.float() * 255
    if quantize:
        output, target = output.round(), target.round()
    if space == "y":
        output, target = luma(output, rounded_luma), luma(target, rounded_luma)
    if crop:
        output, target = output[..., crop:-crop, crop:-crop], target[..., crop:-crop, crop:-crop]
    return output, target
