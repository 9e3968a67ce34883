"""A picture as planes of numbers, with what is needed to turn them back into the same kind of picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.pictures.metadata import Metadata

__all__ = ["Picture", "PictureError", "pair_views"]

Array = NDArray[Any]


class PictureError(ValueError):
    """A picture that cannot be read, is of an unknown kind, or cannot be written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as planes of numbers, and what is needed to turn them back into the same kind of picture.

    Args:
        color: (H, W, 1) gray, (H, W, 3) colour, or (H, W, 6) of two views; uint8, uint16, or float32 in [0, 1]. Inks of
            CMYK are inverted, so that they look like RGB. Upright, whatever the orientation in the file was.
        black: (H, W, 1), the inverted black of CMYK.
        alpha: (H, W, 1) opacity.
        mode: Pillow mode; "array" for a NumPy array.
        shape: Layout of the NumPy array: its number of axes and its dtype.
        bits: Of a sample in the file, where they are not those of the dtype: 10 or 12 of AVIF.
        values: Least and largest value and dtype of the file, of which `color` is the part from 0 to 1.
        metadata: Profile, EXIF, XMP, resolution and the like.
        format: Pillow's name of the file format it came in.
        settings: How the file was written, for example the compression of a TIFF.
        frames: The further frames of an animation, or pages of a document.
        duration: How long this frame is shown, milliseconds; None of a page.
        loop: How often an animation runs, 0 for ever; None where it does not say.
        name: For messages.
    """

    color: Array
    black: Array | None = None
    alpha: Array | None = None
    mode: str = "RGB"
    shape: tuple[int, str] | None = None
    bits: int | None = None
    values: tuple[float, float, str] | None = None
    metadata: Metadata = dataclasses.field(default_factory=Metadata)
    format: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frames: tuple[Picture, ...] = ()
    duration: float | None = None
    loop: int | None = None
    name: str = "the picture"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.color.shape[0], self.color.shape[1]

    @property
    def peak(self) -> float:
        """The number that stands for full brightness."""
        return 1.0 if self.color.dtype == np.float32 else float(np.iinfo(self.color.dtype).max)

    def planes(self) -> Array:
        """Return colour, black and alpha as (H, W, C)."""
        planes = [self.color, *(plane for plane in (self.black, self.alpha) if plane is not None)]
        return np.concatenate(planes, axis=2) if len(planes) > 1 else self.color

    def to_array(self) -> Array:
        """Return the picture as (H, W) or (H, W, C), with the axes and dtype of the array it came from, if it did."""
        array = self.planes()
        if self.shape is None:
            return array[..., 0] if array.shape[2] == 1 else array
        axes, dtype = self.shape
        if axes == 2:
            array = array[..., 0]
        return array > self.peak / 2 if dtype == "bool" else array.astype(dtype, copy=False)


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
