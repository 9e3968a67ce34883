"""A picture as planes of numbers, with what is needed to turn them back into the same kind of picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Picture", "PictureError", "pair_views"]

Array = NDArray[Any]


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
        from zoo.pictures.write import as_image  # it needs this class

        return as_image(self)

    def save(self, path: str | Path, quality: int = 95) -> None:
        """Write the picture whole or not at all, in the format of the file's suffix, with profile and EXIF.

        Args:
            path: Target; 16-bit colour keeps its 16 bits in a .png and becomes 8-bit elsewhere.
            quality: Of JPEG, WebP and AVIF, 1 to 100.

        Raises:
            PictureError: The suffix is unknown, the format cannot hold this kind of picture, or writing fails.
        """
        from zoo.pictures.write import write_picture  # it needs this class

        write_picture(self, path, quality)


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
