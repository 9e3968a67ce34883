"""Restored pictures as Pillow images whose plain `save` keeps what came with them."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

from PIL import Image

from zoo.pictures.image import plain_image
from zoo.pictures.metadata import from_info, to_info
from zoo.pictures.picture import Picture
from zoo.pictures.read import from_image
from zoo.pictures.write import write_image

__all__ = ["RestoredImage", "as_image"]


class RestoredImage(Image.Image):
    """A Pillow image that knows the picture it shows: 16 bits, frames, profile, EXIF, XMP, resolution, text.

    `save` writes all of it, in every format. Where pixels were changed since, they are written as they are now; images
    made of it (`resize`, `crop`, ...) are plain Pillow images with the same `info`.
    """

    picture: Picture | None = None
    _seen: tuple[int, dict[Any, Any]] | None = None
    _place = 0

    @property
    def n_frames(self) -> int:
        """Number of frames or pages."""
        return 1 if self.picture is None else 1 + len(self.picture.frames)

    @property
    def is_animated(self) -> bool:
        """Whether there are several frames or pages."""
        return self.n_frames > 1

    def seek(self, frame: int) -> None:
        """Show another frame.

        Raises:
            EOFError: There is none of this number.
        """
        if not 0 <= frame < self.n_frames:
            raise EOFError(f"There is no frame {frame} of {self.n_frames}.")
        if frame == self._place or self.picture is None:
            return
        shown = plain_image([self.picture, *self.picture.frames][frame])
        self.im, self._mode, self._size, self.palette = shown.im, shown.mode, shown.size, shown.palette
        self._place = frame
        self._seen = None if self._seen is None else (self._mark(), self._seen[1])

    def tell(self) -> int:
        """Return the number of the frame that is shown."""
        return self._place

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Write the image with all that came with it; what a format cannot hold is converted, with a warning.

        Args:
            fp: Path or binary file.
            format: Pillow's name of a format, where the suffix of the path does not say it.
            **params: Options of Pillow's for the format.

        Raises:
            PictureError: The suffix is unknown, the picture is too large for the format, or writing fails.
        """
        write_image(self.current(), fp, format, params)

    def current(self) -> Picture:
        """Return the picture: the one that was restored, or, where pixels were changed since, what they are now."""
        picture = self.picture
        if picture is None or self._seen is None or self._seen[0] != self._mark():
            now = from_image(self, "the image")
            return now if picture is None else dataclasses.replace(now, format=picture.format)
        if self._seen[1] != self.info:
            metadata = dataclasses.replace(from_info(self), times=picture.metadata.times)
            return dataclasses.replace(picture, metadata=metadata)
        return picture

    def _mark(self) -> int:
        return zlib.crc32(self.tobytes())


def as_image(picture: Picture) -> Image.Image:
    """Return a Pillow image of the mode that a picture came in; its plain `save` keeps all that came with it.

    Pillow has no 16-bit colour: such an image shows 8 bits; as long as its pixels are not changed, its `save` writes
    the 16.
    """
    shown = plain_image(picture)
    image = RestoredImage()
    image.im, image._mode, image._size, image.palette = shown.im, shown.mode, shown.size, shown.palette
    image.info.update(to_info(picture.metadata))
    if picture.duration is not None:
        image.info["duration"] = picture.duration
    if picture.loop is not None:
        image.info["loop"] = picture.loop
    image.picture = picture
    image._seen = (image._mark(), dict(image.info))
    return image
