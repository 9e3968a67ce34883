"""PSNR, SSIM and MAE as the restoration papers measure them, with everything that changes the number named."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.protocols import Protocol, SsimWindow

__all__ = ["ColorSpace", "SsimWindow", "luma", "mae", "measure", "psnr", "ssim"]

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
    x, y = output.double(), target.double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_smooth(z, window) for z in (x, y, x * x, y * y, x * y))
    sample = side**2 / (side**2 - 1) if window == "uniform" else 1.0
    var_x, var_y = sample * (mean_xx - mean_x**2), sample * (mean_yy - mean_y**2)
    covariance = sample * (mean_xy - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


def measure(protocol: Protocol, output: Tensor, target: Tensor, scale: int = 1) -> dict[str, Tensor]:
    """Compare images by a named protocol of `zoo.protocols`.

    Args:
        protocol: How.
        output: Restored images (B, C, H, W) in [0, 1], not rounded.
        target: True images, same shape and range.
        scale: Of the restorer.

    Returns:
        "psnr" (dB), "ssim", and where the protocol has it "mae" (0 to 1); each (B,), float64.

    Raises:
        ValueError: Shapes differ, or the images are too small.
    """
    crop = scale if protocol.crop_scale else 0
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
