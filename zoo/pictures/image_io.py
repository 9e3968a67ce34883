"""Pictures of any kind in and out: channels and alpha as arrays, mode, colour profile and EXIF kept."""

from __future__ import annotations

import dataclasses
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from zoo.files import whole

__all__ = ["Picture", "PictureError", "open_picture", "pair_views"]

Array = NDArray[Any]

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
_PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> colour type of the PNG header


class PictureError(ValueError):
    """A picture that cannot be read, is of an unknown kind, or cannot be written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as planes of numbers, and what is needed to turn them back into the same kind of picture.

    Args:
        color: (H, W, 1) gray, (H, W, 3) colour, or (H, W, 6) of two views; uint8, uint16, or float32 in [0, 1]. Inks of
            CMYK are inverted, so that they look like RGB.
        black: (H, W, 1), the inverted black of CMYK.
        alpha: (H, W, 1) opacity.
        mode: Pillow mode; "array" for a NumPy array.
        shape: Layout of the NumPy array: its number of axes and its dtype.
        icc_profile: Colour profile.
        exif: EXIF block. Pixels are never turned: the orientation in it stays true.
        name: For messages.
    """

    color: Array
    black: Array | None = None
    alpha: Array | None = None
    mode: str = "RGB"
    shape: tuple[int, str] | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None
    name: str = "the picture"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.color.shape[0], self.color.shape[1]

    @property
    def peak(self) -> float:
        """The number that stands for full brightness."""
        return 1.0 if self.color.dtype == np.float32 else float(np.iinfo(self.color.dtype).max)

    def to_array(self) -> Array:
        """Return the picture as (H, W) or (H, W, C), with the axes and dtype of the array it came from, if it did."""
        planes = [self.color, *(plane for plane in (self.black, self.alpha) if plane is not None)]
        array = np.concatenate(planes, axis=2) if len(planes) > 1 else self.color
        if self.shape is None:
            return array[..., 0] if array.shape[2] == 1 else array
        axes, dtype = self.shape
        if axes == 2:
            array = array[..., 0]
        return array >= 0.5 if dtype == "bool" else array.astype(dtype, copy=False)

    def to_image(self) -> Image.Image:
        """Return a Pillow image of the mode that the picture came in, with profile and EXIF in its `info`.

        Pillow has no 16-bit colour: such a picture becomes 8-bit here; `save` keeps the 16 bits in a PNG.
        """
        image = self._image()
        if self.icc_profile:
            image.info["icc_profile"] = self.icc_profile
        if self.exif:
            image.info["exif"] = self.exif
        return image

    def _image(self) -> Image.Image:
        if self.mode.startswith("I;16"):
            return Image.fromarray(self.color[..., 0].astype(">u2" if self.mode == "I;16B" else "<u2"))
        if self.mode == "I":
            return Image.fromarray(self.color[..., 0].astype(np.int32))
        if self.mode == "F":
            return Image.fromarray(self.color[..., 0])
        if self.mode == "CMYK":
            assert self.black is not None  # open_picture sets it for this mode
            return Image.fromarray(255 - np.concatenate([self.color, self.black], axis=2), "CMYK")
        array = _to_bytes(dataclasses.replace(self, shape=None).to_array())
        image = Image.fromarray(array)
        if self.mode == "1":
            return image.point(lambda value: 255 * (value >= 128), "1")
        if self.mode == "P":
            method = Image.Quantize.FASTOCTREE if image.mode == "RGBA" else Image.Quantize.MEDIANCUT
            return image.quantize(256, method, dither=Image.Dither.NONE)
        if self.mode in ("La", "RGBa", "RGBX", "YCbCr", "HSV"):
            return image.convert(self.mode)
        return image

    def save(self, path: str | Path, quality: int = 95) -> None:
        """Write the picture whole or not at all, in the format of the file's suffix, with profile and EXIF.

        Args:
            path: Target; 16-bit colour keeps its 16 bits in a .png and becomes 8-bit elsewhere.
            quality: Of JPEG, WebP and AVIF, 1 to 100.

        Raises:
            PictureError: The suffix is unknown, the format cannot hold this kind of picture, or writing fails.
        """
        path = Path(path)
        known = Image.registered_extensions()
        file_format = known.get(path.suffix.lower())
        if file_format is None or file_format not in Image.SAVE:
            raise PictureError(f"Cannot write {path.name}: {path.suffix or 'no suffix'} names no image format.")
        try:
            path.parent.stat()  # missing folders are a mistake, not made
            with whole(path) as temporary, temporary.open("wb") as file:
                if file_format == "PNG" and self.color.dtype == np.uint16 and not self.mode.startswith("I"):
                    file.write(_encode_png16(self))
                else:
                    options: dict[str, Any] = {"icc_profile": self.icc_profile, "exif": self.exif or b""}
                    if file_format in ("JPEG", "WEBP", "AVIF"):
                        options["quality"] = quality
                    if file_format == "JPEG":
                        options["subsampling"] = 0
                    self.to_image().save(file, file_format, **options)
        except (OSError, ValueError, KeyError) as error:
            raise PictureError(f"Cannot write {path}: {error}") from error


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


def pair_views(left: Picture, right: Picture) -> Picture:
    """Return the two views of a dual-pixel sensor as one picture of six channels; all else is the left one's.

    Raises:
        PictureError: They are not two colour pictures of one size and depth, without transparency.
    """
    for view in (left, right):
        if view.color.shape[2] != 3 or view.alpha is not None or view.black is not None:
            raise PictureError(f"{view.name} is no view of a dual-pixel sensor: expected RGB without transparency.")
    if left.color.shape != right.color.shape or left.color.dtype != right.color.dtype:
        kinds = [f"{view.size[1]}x{view.size[0]} pixels of {view.color.dtype}" for view in (left, right)]
        raise PictureError(f"{left.name} has {kinds[0]}, {right.name} {kinds[1]}: no two views of one picture.")
    color = np.concatenate([left.color, right.color], axis=2)
    return dataclasses.replace(left, color=color, name=f"{left.name} and {right.name}")


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


def _to_bytes(array: Array) -> NDArray[np.uint8]:
    """8-bit values of an array with other depth."""
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype == np.float32:
        return (array.clip(0, 1) * 255).round().astype(np.uint8)
    return array


def _encode_png16(picture: Picture) -> bytes:
    """A PNG file with 16 bits a channel, which Pillow cannot write for colour."""
    array = dataclasses.replace(picture, shape=None).to_array()
    array = array[..., None] if array.ndim == 2 else array
    height, width, channels = array.shape
    rows = np.zeros((height, 1 + width * channels * 2), np.uint8)  # each row starts with filter 0
    rows[:, 1:] = np.ascontiguousarray(array, ">u2").view(np.uint8).reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOR_TYPES[channels], 0, 0, 0)
    chunks = [chunk(b"IHDR", header)]
    if picture.icc_profile:
        chunks.append(chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc_profile)))
    if picture.exif:
        chunks.append(chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
    chunks += [chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
