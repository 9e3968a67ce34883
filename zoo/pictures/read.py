"""Pictures of any kind in: files, Pillow images and arrays become planes with their mode, profile and EXIF."""

from __future__ import annotations

import dataclasses
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from zoo.pictures.picture import Array, Picture, PictureError

__all__ = ["open_picture"]

# Mode of the file -> mode in which its channels are restored. A CMYK picture stays in its inks, so its profile holds.
_WORKING_MODES = {
    "1": "L",
    "L": "L",
    "LA": "LA",
    "La": "LA",
    "RGB": "RGB",
    "RGBX": "RGB",
    "RGBA": "RGBA",
    "RGBa": "RGBA",
    "P": "RGB",
    "PA": "RGBA",
    "CMYK": "CMYK",
    "YCbCr": "RGB",
    "HSV": "RGB",
}


def open_picture(source: str | os.PathLike[str] | Image.Image | Array) -> Picture:
    """Read a picture from a file, a Pillow image or a NumPy array.

    Args:
        source: File in any format Pillow reads: 1-bit, gray, gray with alpha, RGB, RGBA, palette (with or without
            transparency), CMYK, YCbCr, HSV, 16-bit gray, float gray, and 16-bit RGB(A) PNG; of several frames, the
            first. Pillow image of these modes. Array (H, W) or (H, W, 1 to 4): uint8, uint16, bool, or floating point
            in [0, 1]; 2 and 4 channels end in alpha.

    Raises:
        PictureError: It is no readable image, is truncated, is too large to be safe, or is of another kind.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_image(source, "the image")
    if not isinstance(source, (str, os.PathLike)):
        raise PictureError(f"A picture is a path, a Pillow image or a NumPy array, got {type(source).__name__}.")
    path = Path(source)
    if not path.is_file():
        raise PictureError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: expected an image file.")
    try:
        with Image.open(path) as image:
            if (frames := getattr(image, "n_frames", 1)) > 1:
                warnings.warn(f"{path} has {frames} frames; only the first is used.", stacklevel=3)
            low_bytes = _low_bytes(path, image)
            image.load()
            picture = _from_image(image, str(path))
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{path} is refused: {error} Set PIL.Image.MAX_IMAGE_PIXELS higher if you trust the file."
        ) from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{path} is not an image, or of a format that Pillow cannot read.") from error
    except PictureError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise PictureError(f"{path} is damaged: {error}.") from error
    return picture if low_bytes is None else _widen(picture, low_bytes)


def _low_bytes(path: Path, image: ImageFile.ImageFile) -> Array | None:
    """Low bytes of a 16-bit colour PNG, of which Pillow keeps the high ones; None for other files."""
    if image.format != "PNG" or len(image.tile) != 1 or image.tile[0].args not in ("RGB;16B", "RGBA;16B"):
        return None
    with Image.open(path) as second:  # read as if little-endian, the other byte of each sample is the high one
        tile = second.tile[0]
        second.tile = [tile._replace(args=str(tile.args).replace("16B", "16L"))]
        return np.array(second)


def _widen(picture: Picture, low: Array) -> Picture:
    """Add the low bytes to an 8-bit picture."""
    alpha = picture.alpha

    def join(high: Array, low: Array) -> Array:
        return (high.astype(np.uint16) << 8) | low

    return dataclasses.replace(
        picture,
        color=join(picture.color, low[..., :3]),
        alpha=None if alpha is None else join(alpha, low[..., 3:]),
    )


def _from_image(image: Image.Image, name: str) -> Picture:
    exif = image.info.get("exif") or image.getexif().tobytes()
    common: dict[str, Any] = {
        "icc_profile": image.info.get("icc_profile"),
        "exif": exif if image.getexif() else None,
        "name": name,
    }
    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        return Picture(color=_deep_gray(np.array(image), mode, name)[..., None], mode=mode, **common)
    if mode not in _WORKING_MODES:
        raise PictureError(f"{name} has the colour mode {mode}; known are {', '.join(_WORKING_MODES)}, I;16, I and F.")
    working = _WORKING_MODES[mode]
    if "transparency" in image.info and working in ("L", "RGB"):  # a palette entry or a colour that is transparent
        working, mode = ("LA", "LA") if working == "L" else ("RGBA", "P" if mode == "P" else "RGBA")
    elif mode in ("P", "PA") and image.palette is not None and image.palette.mode == "RGBA":
        working = "RGBA"
    array = np.array(image if image.mode == working else image.convert(working))
    if array.ndim == 2:
        array = array[..., None]
    if working == "CMYK":
        array = 255 - array
        return Picture(color=array[..., :3], black=array[..., 3:], mode="CMYK", **common)
    channels = 1 if working.startswith("L") else 3
    alpha = array[..., channels:] if array.shape[2] > channels else None
    return Picture(color=array[..., :channels], alpha=alpha, mode="RGBA" if mode == "PA" else mode, **common)


def _deep_gray(array: Array, mode: str, name: str) -> Array:
    """uint16 or float32 of a gray picture with more than 8 bits."""
    low, high = float(array.min()), float(array.max())
    if mode == "F":
        if not (low >= 0 and high <= 1):
            raise PictureError(f"{name} has float pixels from {low:g} to {high:g}; expected values in [0, 1].")
        return array
    if low < 0 or high > 65535:
        raise PictureError(f"{name} has integer pixels from {low:g} to {high:g}; expected 16 bits, 0 to 65535.")
    return array.astype(np.uint16)


def _from_array(array: Array) -> Picture:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)) or 0 in array.shape:
        raise PictureError(f"An image array is (H, W) or (H, W, 1 to 4) and not empty, got shape {array.shape}.")
    shape = (array.ndim, array.dtype.name)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
        shape = (shape[0], "bool")
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise PictureError(f"A float image array has values in [0, 1], got {low:g} to {high:g}.")
        array = array.astype(np.float32)
    elif array.dtype not in (np.uint8, np.uint16):
        raise PictureError(f"An image array is uint8, uint16, bool or floating point, got {array.dtype}.")
    if array.ndim == 2:
        array = array[..., None]
    has_alpha = array.shape[2] in (2, 4)
    color, alpha = (array[..., :-1], array[..., -1:]) if has_alpha else (array, None)
    return Picture(color=color, alpha=alpha, mode="array", shape=shape, name="the array")
