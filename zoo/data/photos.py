"""Image files of data sets: found, paired with their degraded versions, and read. No training library needed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.data.degradations import Pixels, to_float
from zoo.files import walk
from zoo.pictures.folders import is_picture
from zoo.pictures.read import open_picture
from zoo.text import natural_order

__all__ = ["Pair", "find_images", "find_pairs", "pair_folders", "read_pair", "read_pixels", "to_tensor"]

_CLEAN = ("hr", "gt", "target", "groundtruth", "gtmod12")  # names of folders of clean images, in small letters
_DEGRADED = re.compile(r"(lr|input|blur|rainy|noisy).*", re.IGNORECASE)
_VIEWS = ("inputl", "inputr")  # names of folders of the views of a dual-pixel sensor (DPDD), in small letters


@dataclass(frozen=True)
class Pair:
    """A clean image and its degraded version.

    Args:
        clean: File.
        degraded: File, or the files of the left and the right view of a dual-pixel sensor; empty where the degraded
            version is to be made.
    """

    clean: Path
    degraded: tuple[Path, ...] = ()


def find_images(folder: str | Path) -> list[Path]:
    """Return all image files under a folder, sorted by path, without what is not the user's (".", "._", `__MACOSX`).

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}.")
    found = [Path(parent, name) for parent, _, names in walk(folder) for name in names]
    files = sorted(path for path in found if is_picture(path.name) and path.is_file())
    if not files:
        others = sum(path.is_file() for path in found)
        raise FileNotFoundError(f"No image (.png, .jpg, .tif, ...) under {folder}, which holds {others} other files.")
    return files


def find_pairs(source: str | Path, scale: int = 1, views: int = 1) -> list[Pair]:
    """Return the images of a benchmark set.

    Args:
        source: A folder of clean images; a folder with one of HR, GT or target and, if the degraded versions are files,
            one of LR*, input*, blur* or noisy* (for scale 2 and up the part of it whose path names the scale: X2, x2);
            or a text file that names clean images of the set in its own folder, one a line, with or without suffix.
        scale: Of the degraded versions, clean pixels per degraded pixel.
        views: 2 takes both views of a dual-pixel sensor, from the folders inputL and inputR; 1 leaves these out.

    Raises:
        FileNotFoundError: There is no such folder or file, or an image that it names is missing.
        ValueError: A clean image has no degraded version, or a name fits several images.
    """
    source = Path(source)
    if source.is_file():
        return _listed(source, find_pairs(source.parent, scale, views))
    folders = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    clean = [path for path in folders if path.name.lower() in _CLEAN]
    if len(clean) != 1:
        if any(_DEGRADED.fullmatch(path.name) for path in folders):
            raise FileNotFoundError(
                f"{source} holds degraded images but not one folder of clean ones ({', '.join(_CLEAN)}): name the "
                "folder of the clean images."
            )
        return [Pair(path) for path in find_images(source)]
    if views == 2:
        both = [path for path in folders if path.name.lower() in _VIEWS]  # sorted: left, right
        if len(both) != 2:
            raise FileNotFoundError(f"{source} has no folders inputL and inputR of the views of a dual-pixel sensor.")
        return pair_folders(clean[0], both, scale)
    files = find_images(clean[0])
    degraded = [path for path in folders if _DEGRADED.fullmatch(path.name) and path.name.lower() not in _VIEWS]
    candidates = [file for folder in degraded for file in find_images(folder)]
    if scale > 1:
        named = re.compile(rf"x_?{scale}(?!\d)", re.IGNORECASE)
        in_folders = [file for file in candidates if named.search(file.parent.relative_to(source).as_posix())]
        candidates = in_folders or [file for file in candidates if _bare(file.stem, scale) != file.stem] or candidates
    if not candidates:
        return [Pair(path) for path in files]
    return [Pair(file, (partner,)) for file, partner in zip(files, _partners(files, candidates, scale), strict=True)]


def pair_folders(clean: str | Path, degraded: Sequence[str | Path], scale: int = 1) -> list[Pair]:
    """Pair the images of a folder with their degraded versions in another one, or in two: one a view.

    Images belong together that have the same path below their folders; file suffixes may differ, and a degraded image
    may name its scale ("babyx2.png"). Where no name fits at all (SIDD, DPDD), equally many images of one size belong
    together in the order of their names, 2 before 10.

    Args:
        clean: Folder, searched with all subfolders.
        degraded: One or two folders.
        scale: Of the degraded versions, clean pixels per degraded pixel.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
        ValueError: A clean image has no degraded version.
    """
    files = find_images(clean)
    views = [_partners(files, find_images(folder), scale) for folder in degraded]
    return [Pair(file, tuple(partners)) for file, *partners in zip(files, *views, strict=True)]


def _partners(files: list[Path], candidates: list[Path], scale: int) -> list[Path]:
    """Return the degraded version of each clean image, by name or else by order."""
    names, others = _names(files), _names(candidates)
    known = dict(zip((_bare(name, scale) for name in others), candidates, strict=True))
    known |= dict(zip(others, candidates, strict=True))
    missing = [name for name in names if name not in known]
    if not missing:
        return [known[name] for name in names]
    if scale > 1 or len(missing) < len(files) or len(files) != len(candidates):
        where = os.path.commonpath([file.parent for file in candidates])
        at = f" at scale {scale}" if scale > 1 else ""
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"{where} has no degraded version{at} of {files[names.index(missing[0])].name}{more}.")
    places = sorted(range(len(files)), key=lambda place: natural_order(names[place]))
    ordered = sorted(candidates, key=lambda path: natural_order(str(path)))
    return [partner for _, partner in sorted(zip(places, ordered, strict=True))]


def _names(files: list[Path]) -> list[str]:
    """Return the paths of files below the folder that holds all of them, without suffix."""
    folder = os.path.commonpath([file.parent for file in files])
    return [file.relative_to(folder).with_suffix("").as_posix() for file in files]


def _bare(name: str, scale: int) -> str:
    """Name of a degraded image without its scale: "babyx2" -> "baby"."""
    return re.sub(rf"_?x{scale}$", "", name, flags=re.IGNORECASE)


def _listed(file: Path, pairs: list[Pair]) -> list[Pair]:
    """Return those images that a text file names, in its order."""
    try:
        names = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is neither a folder nor a text file that names images.") from error
    known: dict[str, list[Pair]] = {}
    for pair in pairs:
        for name in (pair.clean.name, pair.clean.stem):
            known.setdefault(name, []).append(pair)
    found = []
    for name in (name.strip() for name in names if name.strip()):
        fitting = known.get(name, [])
        if not fitting:
            raise FileNotFoundError(f"{file} names {name}, which is not below {file.parent}.")
        if len(fitting) > 1:
            raise ValueError(f"{file} names {name}, which fits {fitting[0].clean} and {fitting[1].clean}.")
        found.append(fitting[0])
    return found


def read_pixels(path: Path, mode: str, deep: bool = False) -> Pixels:
    """Read an image as (H, W, C) with the channels of a Pillow mode, "RGB" or "L".

    Args:
        path: File.
        mode: "RGB" repeats gray three times; "L" turns colour to gray as Pillow does (OpenCV may differ by one level).
        deep: Return 16-bit images as float32 in units of full brightness; otherwise their high 8 bits are taken, as
            OpenCV does by default and the papers' code with it.

    Raises:
        ValueError: It is not a readable image, or one in the colours of print (CMYK).
    """
    picture = open_picture(path)
    if picture.black is not None:
        raise ValueError(f"{path} is a CMYK image: expected RGB or gray.")
    if picture.values is not None:
        low, high, dtype = picture.values
        raise ValueError(f"{path} has {dtype} values from {low:g} to {high:g}: expected 8 or 16 bits.")
    color: Pixels = picture.color
    if color.dtype == np.uint16:
        color = color / np.float32(65535) if deep else (color >> 8).astype(np.uint8)
    if mode == "L" and color.shape[2] == 3:
        if color.dtype != np.uint8:
            raise ValueError(f"{path} has 16-bit colour, which has no customary gray version.")
        return np.asarray(Image.fromarray(color).convert("L"))[..., None]
    return color.repeat(3, axis=2) if mode == "RGB" and color.shape[2] == 1 else color


def read_pair(pair: Pair, mode: str, scale: int = 1) -> tuple[Pixels | None, Pixels]:
    """Read the degraded version of an image, or None where it is to be made, and the clean image cut to fit.

    Args:
        pair: Files; the two views of a dual-pixel sensor become 6 channels and keep 16 bits.
        mode: "RGB" or "L".
        scale: Clean pixels per degraded pixel; the clean image is cut from the top left.

    Raises:
        ValueError: A file is unreadable, or their sizes are not those of a pair.
    """
    deep = len(pair.degraded) > 1
    clean = read_pixels(pair.clean, mode, deep)
    if min(clean.shape[:2]) < scale:
        raise ValueError(f"{pair.clean} has {clean.shape[1]}x{clean.shape[0]} pixels: too few for scale {scale}.")
    if not pair.degraded:
        return None, clean[: clean.shape[0] // scale * scale, : clean.shape[1] // scale * scale]
    views = [read_pixels(path, mode, deep) for path in pair.degraded]
    if any(view.shape != views[0].shape for view in views):
        raise ValueError(f"{' and '.join(map(str, pair.degraded))} differ in size: no two views of one picture.")
    height, width = (scale * side for side in views[0].shape[:2])
    cut = clean[:height, :width]
    if cut.shape[:2] != (height, width) or (scale == 1 and cut.shape != clean.shape):
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (views[0], clean)]
        raise ValueError(
            f"{pair.degraded[0]} has {sizes[0]} pixels and {pair.clean} {sizes[1]}: not a pair at scale {scale}."
        )
    return np.concatenate(views, axis=2) if deep else views[0], cut


def to_tensor(pixels: Pixels) -> Tensor:
    """Turn (H, W, C), uint8 or float32 in units of full brightness, into (C, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(to_float(np.ascontiguousarray(pixels)).transpose(2, 0, 1)))
