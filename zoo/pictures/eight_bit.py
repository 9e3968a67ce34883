"""The one way in which pictures reach a classifier or detector, in training and afterwards."""

from __future__ import annotations

import io
import os
from typing import Literal

import numpy as np
from PIL import Image

from zoo.pictures.image import to_bytes
from zoo.pictures.picture import PictureError
from zoo.pictures.read import open_picture
from zoo.pictures.remarks import without_remarks

__all__ = ["read_eight_bit"]


def read_eight_bit(
    source: str | os.PathLike[str] | bytes | Image.Image, mode: Literal["RGB", "L"] = "RGB", name: str = "the picture"
) -> Image.Image:
    """Read a picture of any kind as 8 bits a channel, upright.

    The orientation that a camera wrote is applied, 16-bit and float pixels are scaled, palettes and inks become
    colours, and transparency is dropped, as timm and torchvision do. Of several frames the first is taken.

    Args:
        source: File, the bytes of one, or a Pillow image.
        mode: Channels of the result.
        name: Of bytes, for the message.

    Raises:
        PictureError: It is no readable picture; the message names it.
    """
    with without_remarks():  # the first frame is meant, and what is beside the pixels is not
        if isinstance(source, bytes):
            try:
                picture = open_picture(io.BytesIO(source))
            except PictureError as error:
                raise PictureError(str(error).replace("the picture", name, 1)) from error
        else:
            picture = open_picture(source)
    color = to_bytes(picture.color)
    if picture.black is not None:
        inks = 255 - np.concatenate([color, picture.black], axis=2)
        return Image.fromarray(inks, "CMYK").convert(mode)
    return Image.fromarray(color[..., 0] if color.shape[2] == 1 else np.ascontiguousarray(color)).convert(mode)
