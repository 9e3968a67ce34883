"""Pictures of any kind out: as Pillow images, and as files that appear whole or not at all."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zoo.files import whole
from zoo.pictures.picture import Array, Picture, PictureError

__all__ = ["as_image", "write_picture"]

_PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> colour type of the PNG header


def as_image(picture: Picture) -> Image.Image:
    """See `Picture.to_image`."""
    image = _image(picture)
    if picture.icc_profile:
        image.info["icc_profile"] = picture.icc_profile
    if picture.exif:
        image.info["exif"] = picture.exif
    return image


def _image(picture: Picture) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray(picture.color[..., 0].astype(">u2" if picture.mode == "I;16B" else "<u2"))
    if picture.mode == "I":
        return Image.fromarray(picture.color[..., 0].astype(np.int32))
    if picture.mode == "F":
        return Image.fromarray(picture.color[..., 0])
    if picture.mode == "CMYK":
        assert picture.black is not None  # open_picture sets it for this mode
        return Image.fromarray(255 - np.concatenate([picture.color, picture.black], axis=2), "CMYK")
    array = _to_bytes(dataclasses.replace(picture, shape=None).to_array())
    image = Image.fromarray(array)
    if picture.mode == "1":
        return image.point(lambda value: 255 * (value >= 128), "1")
    if picture.mode == "P":
        method = Image.Quantize.FASTOCTREE if image.mode == "RGBA" else Image.Quantize.MEDIANCUT
        return image.quantize(256, method, dither=Image.Dither.NONE)
    if picture.mode in ("La", "RGBa", "RGBX", "YCbCr", "HSV"):
        return image.convert(picture.mode)
    return image


def write_picture(picture: Picture, path: str | Path, quality: int = 95) -> None:
    """See `Picture.save`."""
    path = Path(path)
    known = Image.registered_extensions()
    file_format = known.get(path.suffix.lower())
    if file_format is None or file_format not in Image.SAVE:
        raise PictureError(f"Cannot write {path.name}: {path.suffix or 'no suffix'} names no image format.")
    try:
        path.parent.stat()  # missing folders are a mistake, not made
        with whole(path) as temporary, temporary.open("wb") as file:
            if file_format == "PNG" and picture.color.dtype == np.uint16 and not picture.mode.startswith("I"):
                file.write(_encode_png16(picture))
            else:
                options: dict[str, Any] = {"icc_profile": picture.icc_profile, "exif": picture.exif or b""}
                if file_format in ("JPEG", "WEBP", "AVIF"):
                    options["quality"] = quality
                if file_format == "JPEG":
                    options["subsampling"] = 0
                picture.to_image().save(file, file_format, **options)
    except (OSError, ValueError, KeyError) as error:
        raise PictureError(f"Cannot write {path}: {error}") from error


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
