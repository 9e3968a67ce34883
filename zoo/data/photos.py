"""Image files of data sets: found, paired with their degraded versions, and read. No training library needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zoo.data.degradations import Pixels, to_float

__all__ = ["Pair", "find_images", "find_pairs", "read_pixels", "to_tensor"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
_CLEAN = ("hr", "gt", "target", "groundtruth", "gtmod12")  # names of folders of clean images, in small letters
_DEGRADED = re.compile(r"(lr|input|blur|rainy|noisy).*", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A clean image and its degraded version.

    Args:
        clean: File.
        degraded: File; None where the degraded version is to be made.
    """

    clean: Path
    degraded: Path | None = None


def find_images(folder: str | Path) -> list[Path]:
    """Return all image files under a folder, sorted by path.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise FileNotFoundError(f"No image ({', '.join(_SUFFIXES)}) under {folder}.")
    return files


def find_pairs(source: str | Path, scale: int = 1) -> list[Pair]:
    """Return the images of a benchmark set.

    Args:
        source: A folder of clean images; a folder with one of HR, GT or target and, if the degraded versions are files,
            one of LR*, input*, blur* or noisy* (for scale 2 and up the part of it whose path names the scale: X2, x2);
            or a text file that names clean images below its own folder, one a line, with or without suffix.
        scale: Of the degraded versions, clean pixels per degraded pixel.

    Raises:
        FileNotFoundError: There is no such folder or file, or an image that it names is missing.
        ValueError: A clean image has no degraded version, or a name fits several images.
    """
    source = Path(source)
    if source.is_file():
        return [Pair(path) for path in _listed(source)]
    folders = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    clean = [path for path in folders if path.name.lower() in _CLEAN]
    if len(clean) != 1:
        if any(_DEGRADED.fullmatch(path.name) for path in folders):
            raise FileNotFoundError(
                f"{source} holds degraded images but not one folder of clean ones ({', '.join(_CLEAN)}): name the "
                "folder of the clean images."
            )
        return [Pair(path) for path in find_images(source)]
    files = find_images(clean[0])
    degraded = [path for path in folders if _DEGRADED.fullmatch(path.name)]
    candidates = [file for folder in degraded for file in find_images(folder)]
    if scale > 1:
        named = re.compile(rf"x_?{scale}(?!\d)", re.IGNORECASE)
        in_folders = [file for file in candidates if named.search(file.parent.relative_to(source).as_posix())]
        candidates = in_folders or [file for file in candidates if _bare(file, scale) != file.stem] or candidates
    if not candidates:
        return [Pair(path) for path in files]
    by_stem = {_bare(file, scale): file for file in candidates} | {file.stem: file for file in candidates}
    missing = [file.name for file in files if file.stem not in by_stem]
    if missing:
        raise ValueError(f"{source} has no degraded version at scale {scale} of {missing[0]}.")
    return [Pair(file, by_stem[file.stem]) for file in files]


def _bare(file: Path, scale: int) -> str:
    """Name of a degraded image without suffix and without its scale: "babyx2.png" -> "baby"."""
    return re.sub(rf"_?x{scale}$", "", file.stem, flags=re.IGNORECASE)


def _listed(file: Path) -> list[Path]:
    """Return the images that a text file names, in its order."""
    try:
        names = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is neither a folder nor a text file that names images.") from error
    known: dict[str, list[Path]] = {}
    for path in find_images(file.parent):
        for name in (path.name, path.stem):
            known.setdefault(name, []).append(path)
    found = []
    for name in (name.strip() for name in names if name.strip()):
        fitting = known.get(name, [])
        if not fitting:
            raise FileNotFoundError(f"{file} names {name}, which is not below {file.parent}.")
        if len(fitting) > 1:
            raise ValueError(f"{file} names {name}, which fits {fitting[0]} and {fitting[1]}.")
        found.append(fitting[0])
    return found


def read_pixels(path: Path, mode: str) -> NDArray[np.uint8]:
    """Read an 8-bit image as (H, W, C) in a Pillow mode, "RGB" or "L".

    Raises:
        ValueError: It is not a readable image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(mode))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def to_tensor(pixels: Pixels) -> Tensor:
    """Turn (H, W, C), uint8 or float32 in units of full brightness, into (C, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(to_float(np.ascontiguousarray(pixels)).transpose(2, 0, 1)))
