"""Any size: which networks follow each other, what Lanczos does after them, and which part is looked at."""

from __future__ import annotations

import dataclasses
import itertools
import numbers
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from zoo.pictures.color import from_linear, to_linear
from zoo.pictures.picture import Array, Picture

__all__ = ["Size", "chain", "crop_box", "resize"]

_LONGEST_CHAIN = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large a result is to be; nothing given is as large as the network makes it.

    Args:
        scale: Output pixels per input pixel.
        width: Pixels across; the height follows, unless it is given too.
        height: Pixels down.
        max_side: Pixels of the longer side.

    Raises:
        ValueError: More than one of scale, sides and max_side is given, or one is no positive number.
    """

    scale: float | None = None
    width: int | None = None
    height: int | None = None
    max_side: int | None = None

    def __post_init__(self) -> None:
        kinds = [self.scale is not None, self.width is not None or self.height is not None, self.max_side is not None]
        if sum(kinds) > 1:
            raise ValueError("A size is a scale, or a width and a height, or a longest side; more than one is given.")
        for name in ("scale", "width", "height", "max_side"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {value!r}.")
            if not 0 < float(value) < 1e6:
                raise ValueError(f"{name} must be positive and less than a million, got {value}.")
            if name != "scale" and not float(value).is_integer():
                raise ValueError(f"{name} must be a whole number of pixels, got {value}.")
        if self.scale is not None and self.scale > 64:
            raise ValueError(f"scale must be at most 64, got {self.scale:g}.")

    @property
    def in_pixels(self) -> bool:
        """Whether the scale differs from picture to picture."""
        return self.scale is None and (self.width, self.height, self.max_side) != (None, None, None)

    def of(self, size: tuple[int, int], scale: int) -> tuple[int, int]:
        """Return height and width of the result.

        Args:
            size: Height and width of the picture.
            scale: Of the network, where nothing is asked for.
        """
        height, width = size
        if self.width is not None and self.height is not None:
            return int(self.height), int(self.width)
        factor = float(scale)
        if self.scale is not None:
            factor = self.scale
        elif self.width is not None:
            factor = self.width / width
        elif self.height is not None:
            factor = self.height / height
        elif self.max_side is not None:
            factor = self.max_side / max(size)
        return max(1, round(height * factor)), max(1, round(width * factor))


def chain(factor: float, scales: Sequence[int]) -> tuple[int, ...]:
    """Return the scales of networks that follow each other: the least product that reaches a factor, fewest networks.

    Args:
        factor: Output pixels per input pixel; at most 1 needs no network.
        scales: Of the networks that there are; those of 1 only go first, once.
    """
    if factor <= 1 + 1e-6:
        return ()
    larger = sorted({scale for scale in scales if scale > 1}, reverse=True)
    best: tuple[int, int, tuple[int, ...]] | None = None
    for length in range(1, _LONGEST_CHAIN + 1):
        for found in itertools.combinations_with_replacement(larger, length):
            product = int(np.prod(found))
            if product >= factor - 1e-6 and (best is None or (product, length) < best[:2]):
                best = product, length, found
    if best is not None:
        return best[2]
    return tuple(larger[:1]) * _LONGEST_CHAIN  # Lanczos enlarges the rest


def crop_box(crop: str | tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a part, within a picture.

    Args:
        crop: These four; or "640x480+100+50", width x height + left + top; or "640x480" for the middle.
        size: Height and width of the picture.

    Raises:
        ValueError: It is none of these, or lies outside.
    """
    height, width = size
    if isinstance(crop, str):
        match = re.fullmatch(r"(\d+)x(\d+)(?:\+(\d+)\+(\d+))?", crop.strip())
        if match is None:
            raise ValueError(f'A part is written "640x480+100+50" (size, left, top), or "640x480"; got {crop!r}.')
        across, down = min(int(match[1]), width), min(int(match[2]), height)
        left = (width - across) // 2 if match[3] is None else int(match[3])
        top = (height - down) // 2 if match[4] is None else int(match[4])
        crop = (
            (left, top, left + int(match[1]), top + int(match[2]))
            if match[3]
            else (left, top, left + across, top + down)
        )
    try:
        left, top, right, bottom = (int(value) for value in crop)
    except (TypeError, ValueError) as error:
        raise ValueError(f"A part is (left, top, right, bottom) in pixels, got {crop!r}.") from error
    said = f"The part from {left},{top} to {right},{bottom}"
    right, bottom = min(right, width), min(bottom, height)
    if not (0 <= left < right and 0 <= top < bottom):
        is_empty = 0 <= right <= left < width or 0 <= bottom <= top < height
        what = "is empty" if is_empty else f"lies outside {width}x{height} pixels"
        raise ValueError(f"{said} {what}.")
    return left, top, right, bottom


def resize(plane: Array, size: tuple[int, int], picture: Picture, light: bool = True) -> Array:
    """Resize planes by Lanczos, in linear light where their numbers stand for light.

    Args:
        plane: (H, W, C), float32 in [0, 1].
        size: Height and width.
        picture: Whose metadata says what the numbers mean.
        light: Whether they are light; inks and opacity are not.
    """
    if plane.shape[:2] == size:
        return plane
    light = light and picture.black is None
    out = np.empty((*size, plane.shape[2]), np.float32)
    for channel in range(plane.shape[2]):
        values = plane[..., channel].clip(0, 1)
        values = (to_linear(values, picture.metadata) if light else values).astype(np.float32)
        image = Image.fromarray(values).resize(size[::-1], Image.Resampling.LANCZOS)
        values = np.asarray(image).clip(0, 1)
        out[..., channel] = from_linear(values, picture.metadata) if light else values
    return out
