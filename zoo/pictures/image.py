"""The pixels of pictures as Pillow images."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from zoo.pictures.picture import Array, Picture

__all__ = ["is_path", "plain_image", "to_bytes"]


def plain_image(picture: Picture) -> Image.Image:
    """Return a Pillow image of a picture's mode, with nothing beside the pixels."""
    if picture.mode.startswith("I;16") and picture.color.dtype == np.uint16:
        return Image.fromarray(picture.color[..., 0].astype(">u2" if picture.mode == "I;16B" else "<u2"))
    if picture.mode == "I" and picture.peak != 255:
        values = picture.color[..., 0].astype(np.float64)
        if picture.values is not None:
            values = np.round(values * (picture.values[1] - picture.values[0]) + picture.values[0])
        return Image.fromarray(values.astype(np.int32))
    if picture.mode == "F":
        color = picture.color[..., 0].astype(np.float32)
        if picture.values is not None:
            color = (color * (picture.values[1] - picture.values[0]) + picture.values[0]).astype(np.float32)
        return Image.fromarray(color)
    array = to_bytes(picture.planes())
    if picture.mode == "CMYK":
        return Image.fromarray(255 - array[..., :4], "CMYK")
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if picture.mode == "1":
        return image.point(lambda value: 255 * (value >= 128), "1")
    if picture.mode == "P":
        method = Image.Quantize.FASTOCTREE if image.mode == "RGBA" else Image.Quantize.MEDIANCUT
        return image.quantize(256, method, dither=Image.Dither.NONE)
    if picture.mode in ("La", "RGBa", "RGBX", "YCbCr", "HSV"):
        return image.convert(picture.mode)
    return image


def to_bytes(array: Array) -> Array:
    """8-bit values of an array with other depth."""
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype == np.float32:
        return (array.clip(0, 1) * 255).round().astype(np.uint8)
    return array


def is_path(fp: Any) -> bool:
    """Tell whether something is a path rather than a file."""
    return isinstance(fp, (str, os.PathLike))
