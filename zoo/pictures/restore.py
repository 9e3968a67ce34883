"""Restore pictures: a picture in, the same kind of picture out, with any restorer of the zoo."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from zoo.pictures.picture import Picture, PictureError, pair_views
from zoo.pictures.read import open_picture
from zoo.pictures.restorers import load_restorer
from zoo.pictures.tiling import Progress, restore_tensor

__all__ = [
    "Picture",
    "PictureError",
    "load_restorer",
    "open_picture",
    "pair_views",
    "restore",
    "restore_picture",
    "restore_tensor",
]

Source = str | os.PathLike[str] | Image.Image | NDArray[Any]


def restore(
    image: Source | tuple[Source, Source],
    task: str = "sr",
    scale: int | None = None,
    model: str | nn.Module | None = None,
    weights: str | os.PathLike[str] | None = None,
    budget: int | float | str | None = "4GB",
    tile: int | None = None,
    overlap: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    self_ensemble: bool = False,
    progress: Progress | None = None,
    sigma: float | None = None,
) -> Any:
    """Restore a picture of any kind and size.

    The result has the mode of the input (gray, colour, alpha, palette, CMYK, 16-bit gray), its colour profile and its
    EXIF block; pixels are never turned, so the orientation in the EXIF block stays true. Opacity is scaled apart, and
    colour under full transparency is filled from its surroundings before.

    Args:
        image: Path, Pillow image, or array (H, W) or (H, W, 1 to 4) of uint8, uint16, bool, or floats in [0, 1]; or a
            tuple of two, the left and the right view of a dual-pixel sensor.
        task: "sr", "denoise", ...: chooses shipped weights where neither `model` nor `weights` is given.
        scale: Output pixels per input pixel; None takes the model's, or 2 for "sr" where there is no model.
        model: Name of a restorer ("cfsr_x2", "cfsr_x2.authors"), or a restorer. None recognises it from `weights`.
        weights: Weight file, ours or the authors', or a tag of `model`. None takes the model's published weights.
        budget: Memory the whole process (or the device) may hold, without the program files that the system shares:
            bytes, or like "4GB"; None is no limit.
        tile: Side of tiles with their overlap, input pixels, instead of a choice by `budget`.
        overlap: Of tiles, input pixels; None takes the receptive field, where the result is that of the whole picture.
        device: Where to run; None takes a given restorer's place, else CUDA where it is, else the CPU.
        dtype: Precision of the network, for example "bfloat16"; None is float32.
        self_ensemble: Average over eight flips and turns: better by about 0.1 dB, eight times as slow.
        progress: Called with (parts done, parts in all).
        sigma: Standard deviation of the noise, of 255: takes the weights trained for it.

    Returns:
        A Pillow image, or an array where an array was given.

    Raises:
        PictureError: The picture is unreadable, damaged, or of an unknown kind.
        ValueError: No weights fit, the scale or the noise is not the model's, or the budget or tile is too small.
        CheckpointError: The weights do not exist, are damaged, or do not fit.
    """
    views = image if isinstance(image, tuple) else (image,)
    if len(views) > 2:
        raise ValueError(f"One picture is restored, or the two views of a dual-pixel sensor; got {len(views)}.")
    pictures = [open_picture(view) for view in views]
    picture = pair_views(*pictures) if len(pictures) == 2 else pictures[0]
    restorer = load_restorer(task, scale, model, weights, sigma=sigma, device=device, dtype=dtype)
    restored = restore_picture(
        picture,
        restorer,
        budget=budget,
        tile=tile,
        overlap=overlap,
        self_ensemble=self_ensemble,
        progress=progress,
    )
    return restored.to_array() if isinstance(views[0], np.ndarray) else restored.to_image()


def restore_picture(
    picture: Picture,
    model: nn.Module,
    *,
    budget: int | float | str | None = "4GB",
    tile: int | None = None,
    overlap: int | None = None,
    self_ensemble: bool = False,
    progress: Progress | None = None,
    inform: Callable[[str], object] | None = None,
) -> Picture:
    """Restore an opened picture, for example from a batch of files with one model; see `restore`.

    Args:
        picture: From `open_picture`, or from `pair_views`.
        model: From `load_restorer`, or any restorer.
        budget: Memory limit.
        tile: Side of tiles.
        overlap: Of tiles.
        self_ensemble: Average over eight flips and turns.
        progress: Called with (parts done, parts in all); black ink is not counted.
        inform: Told in words how the picture is run, see `restore_tensor`.

    Raises:
        ValueError: The budget or the tile is too small, or the network restores two views and got one, or the reverse.
        RuntimeError: The network's output is not finite.
    """
    if (picture.color.shape[2] == 6) != (getattr(model, "in_chans", 3) == 6):
        kinds = "one picture", "two views of a dual-pixel sensor"
        wanted, given = kinds if picture.color.shape[2] == 6 else kinds[::-1]
        raise ValueError(f"{type(model).__name__} with these weights restores {wanted}, got {given}.")
    levels = None if picture.peak == 1 else int(picture.peak)

    def run(planes: NDArray[Any], progress: Progress | None) -> NDArray[Any]:
        x = torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1)))[None]
        out = restore_tensor(
            model,
            x,
            budget=budget,
            tile=tile,
            overlap=overlap,
            self_ensemble=self_ensemble,
            levels=levels,
            progress=progress,
            inform=inform if planes is color else None,
        )
        if levels is None:
            out = out.clamp_(0, 1)
        return out[0].permute(1, 2, 0).numpy().astype(planes.dtype, copy=False)

    color = picture.color if picture.alpha is None else _bleed(picture.color, picture.alpha)
    restored = run(color, progress)
    size = restored.shape[:2]
    return Picture(
        color=restored,
        black=None if picture.black is None else run(picture.black, None),
        alpha=None if picture.alpha is None else _resize_plane(picture.alpha, size, picture.peak),
        mode=picture.mode,
        shape=picture.shape,
        icc_profile=picture.icc_profile,
        exif=picture.exif,
        name=picture.name,
    )


def _resize_plane(plane: NDArray[Any], size: tuple[int, int], peak: float) -> NDArray[Any]:
    """Enlarge opacity by bicubic interpolation."""
    if plane.shape[:2] == size:
        return plane
    flat = plane[..., 0] if plane.dtype == np.uint8 else plane[..., 0].astype(np.float32)
    out = np.asarray(Image.fromarray(flat).resize(size[::-1], Image.Resampling.BICUBIC))[..., None].clip(0, peak)
    return (out.round() if plane.dtype == np.uint16 else out).astype(plane.dtype, copy=False)


def _bleed(color: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Fill colour that full transparency hides from its visible surroundings, so that no dark seam grows at edges."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return color
    values = torch.from_numpy(color.astype(np.float32).transpose(2, 0, 1))[None]
    weight = torch.from_numpy((~hidden).astype(np.float32).transpose(2, 0, 1))[None]
    levels = [(values * weight, weight)]
    while max(levels[-1][1].shape[-2:]) > 1:  # ever coarser means of what is visible
        total, weight = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in levels[-1])
        levels.append((total, weight))
    filled = levels[-1][0] / levels[-1][1]
    for total, weight in reversed(levels[:-1]):
        coarse = F.interpolate(filled, total.shape[-2:], mode="nearest")
        filled = torch.where(weight > 0, total / weight.clamp_min(1e-12), coarse)
    out = filled[0].permute(1, 2, 0).numpy().astype(color.dtype)
    return np.where(hidden, out, color)
