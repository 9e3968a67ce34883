"""PSNR and SSIM as the super-resolution and denoising papers measure them, colour space and crop named."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ColorSpace", "luma", "psnr", "ssim"]

ColorSpace = Literal["y", "rgb"]
_BT601 = (65.481, 128.553, 24.966)


def luma(images: Tensor, rounded: bool = False) -> Tensor:
    """Return BT.601 studio-swing luma, (B, C, H, W) in [0, 255] -> (B, 1, H, W) in [16, 235].

    Args:
        images: RGB, or one channel, which counts as three equal ones.
        rounded: Round to whole numbers, as MATLAB's `rgb2ycbcr` does for 8-bit images.

    Raises:
        ValueError: `images` is not (B, 1, H, W) or (B, 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1, H, W) or (B, 3, H, W), got {tuple(images.shape)}.")
    weights = images.new_tensor(_BT601).view(1, 3, 1, 1)
    y = (images * weights).sum(1, keepdim=True) / 255 + 16
    return y.round() if rounded else y


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
        output: Restored images (B, C, H, W) in [0, 1].
        target: True images, same shape and range.
        space: "y" compares BT.601 luma, "rgb" all channels.
        crop: Border pixels left out on each side.
        quantize: Clamp `output` to [0, 1] and round it to 8 bits first, half to even.
        rounded_luma: Round luma to whole numbers before comparing.

    Returns:
        (B,), float64; infinite for equal images.

    Raises:
        ValueError: Shapes differ, nothing is left after the crop, or the colour space is unknown.
    """
    output, target = _prepare(output, target, space, crop, quantize, rounded_luma)
    error = (output - target).double().square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error)


def ssim(
    output: Tensor,
    target: Tensor,
    *,
    space: ColorSpace,
    crop: int = 0,
    quantize: bool = True,
    rounded_luma: bool = False,
) -> Tensor:
    """Measure the structural similarity of each image as the authors' MATLAB code does.

    11x11 Gaussian window with sigma 1.5 over the region where it fits, in float64; "rgb" averages the channels.

    Args:
        output: Restored images (B, C, H, W) in [0, 1].
        target: True images, same shape and range.
        space: "y" compares BT.601 luma, "rgb" all channels.
        crop: Border pixels left out on each side.
        quantize: Clamp `output` to [0, 1] and round it to 8 bits first, half to even.
        rounded_luma: Round luma to whole numbers before comparing.

    Returns:
        (B,), float64, at most 1.

    Raises:
        ValueError: Shapes differ, fewer than 11 pixels a side are left, or the colour space is unknown.
    """
    output, target = _prepare(output, target, space, crop, quantize, rounded_luma)
    if min(output.shape[-2:]) < 11:
        height, width = output.shape[-2:]
        raise ValueError(f"SSIM needs at least 11x11 pixels after the crop, got {height}x{width}.")
    position = torch.arange(11, dtype=torch.float64, device=output.device) - 5
    window = torch.exp(-position.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(images: Tensor) -> Tensor:
        images = F.conv2d(images.flatten(0, 1).unsqueeze(1), window.view(1, 1, -1, 1))
        return F.conv2d(images, window.view(1, 1, 1, -1)).unflatten(0, output.shape[:2]).squeeze(2)

    x, y = output.double(), target.double()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


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
    output, target = output.float() * 255, target.float() * 255
    target = target.round()
    if quantize:
        output = output.clamp(0, 255).round()
    if space == "y":
        output, target = luma(output, rounded_luma), luma(target, rounded_luma)
    if crop:
        output, target = output[..., crop:-crop, crop:-crop], target[..., crop:-crop, crop:-crop]
    return output, target
