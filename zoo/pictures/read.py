"""Pictures of any kind in: files, Pillow images and arrays become planes with all that goes with them."""

from __future__ import annotations

import dataclasses
import io
import numbers
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageCms, UnidentifiedImageError

from zoo.pictures import containers, png
from zoo.pictures.formats import RAW_SUFFIXES, Kind, load_plugins
from zoo.pictures.metadata import exif_of, from_info, upright
from zoo.pictures.picture import Array, Picture, PictureError
from zoo.pictures.remarks import (
    pillow_bound,
    pillow_reads_long_texts,
    pillow_silenced,
    pillow_unbounded,
    remark,
)
from zoo.pictures.tiff import goes_on, is_tiff, pages_of, read_tiff, samples_of, to_unit

__all__ = ["from_image", "open_picture", "peek"]

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
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # formats whose further frames follow in time
_PAGED = ("HEIF",)
_TURNED = ("JXL", "TIFF", "HEIF")  # formats that come turned upright from their library
_HEAD = 2**16  # bytes in which marks of a format are looked for: in AVIF and HEIC a profile may stand before them
_PPM_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PPM_HEAD = re.compile(rb"P6" + 2 * (_PPM_GAP + rb"\d+") + _PPM_GAP + rb"(\d+)\s")  # width, height, and the peak


def open_picture(
    source: str | os.PathLike[str] | Image.Image | Array | BinaryIO,
    *,
    every_frame: bool = False,
    max_pixels: int | None = None,
) -> Picture:
    """Read a picture from a file, a Pillow image or a NumPy array, and turn it upright.

    Args:
        source: File of any format of Pillow's, or of its plugins for HEIC and JPEG XL where they are installed, gray,
            RGB, CMYK or palette, of 1 to 16 bits or floats, with or without transparency. Pillow image of these modes.
            Array (H, W) or (H, W, 1 to 4): uint8, uint16, bool, or floating point in [0, 1]; 2 and 4 channels end in
            alpha. Or a binary file that can seek.
        every_frame: Read all frames of an animation, or pages; otherwise the first alone.
        max_pixels: Most pixels that are read, of all frames together, against files made to fill the memory; None is
            twice Pillow's MAX_IMAGE_PIXELS, 179 million.

    Raises:
        PictureError: It is no readable image, is truncated, is too large to be safe, or is of another kind.
        ValueError: `max_pixels` is no number.
    """
    if max_pixels is not None and not isinstance(max_pixels, numbers.Real):
        raise ValueError(f"max_pixels must be a number such as 200e6, got {max_pixels!r}.")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image) and hasattr(source, "picture"):  # a `RestoredImage`, with 16 bits and frames
        picture: Picture = source.current()  # type: ignore[attr-defined]
        return picture if every_frame else dataclasses.replace(picture, frames=())
    if isinstance(source, Image.Image):
        return from_image(source, "the image")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        _check_file(path)
        picture = _guarded(str(path), path, every_frame, max_pixels)
        seen = path.stat()
        times = (seen.st_atime_ns, seen.st_mtime_ns)
        return dataclasses.replace(picture, metadata=dataclasses.replace(picture.metadata, times=times))
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _guarded("the picture", source, every_frame, max_pixels)
    kind = type(source).__name__
    hint = {"Tensor": ": x.permute(1, 2, 0).numpy() is one", "bytes": ": io.BytesIO makes a file of them"}
    hint |= dict.fromkeys(("list", "tuple"), ": restore one after the other")
    raise PictureError(f"A picture is a path, a Pillow image or a NumPy array, got {kind}{hint.get(kind, '')}.")


def _check_file(path: Path) -> None:
    if not os.path.isfile(path):
        what = "a pipe or a device" if os.path.exists(path) else "not there"
        if os.path.isdir(path):
            what = "a folder" if os.access(path, os.R_OK) else "a folder that cannot be read"
        raise PictureError(f"{path} is {what}: expected an image file.")
    if path.suffix.lower() in RAW_SUFFIXES:
        raise PictureError(f"{path} is a camera's raw file: develop it with a raw converter first.")


def _guarded(name: str, file: Path | BinaryIO, every_frame: bool, max_pixels: int | None) -> Picture:
    """Read a file; whatever a library raises becomes a PictureError that names it."""
    with _explained(name, file, max_pixels):
        data = _head(file)
        if is_tiff(data):
            return _read_tiff(name, file, every_frame, max_pixels)
        file = _without_damage(name, file, data)
        return _read_pillow(name, file, data, every_frame, max_pixels)


@contextmanager
def _explained(name: str, file: Path | BinaryIO, max_pixels: int | None) -> Iterator[None]:
    """Turn whatever reading raises into a PictureError, and leave the bound on pixels to `_check_size`."""
    load_plugins()
    try:
        with pillow_silenced(), pillow_reads_long_texts(), nullcontext() if max_pixels is None else pillow_unbounded():
            yield
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{name} is refused: {error} Allow more by --max-pixels (max_pixels in Python) if you trust the file."
        ) from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{name} is not an image, or of a format that {_readers(file)} cannot read.") from error
    except (PictureError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except PermissionError as error:
        raise PictureError(f"{name} cannot be read: {error.strerror}.") from error
    except BaseException as error:  # plugins raise what they like; those written in Rust not even an Exception
        raise PictureError(f"{name} is damaged: {str(error).strip() or type(error).__name__}.") from error


def _readers(file: Path | BinaryIO) -> str:
    """Name what reads files here, and what is missing for this one."""
    suffix = file.suffix.lower() if isinstance(file, Path) else ""
    missing = suffix in (".heic", ".heif", ".hif") and ".heic" not in Image.registered_extensions()
    missing |= suffix == ".jxl" and ".jxl" not in Image.registered_extensions()
    return "Pillow (without the plugins of `pip install 'ffn-zoo[formats]'`)" if missing else "Pillow"


def _check_size(name: str, sizes: Sequence[tuple[int, int]], max_pixels: int | None) -> int:
    """Refuse what does not fit the memory: all frames that are read are held at once. Return their pixels.

    Args:
        name: For messages.
        sizes: Width and height of every frame.
        max_pixels: Most pixels; None is twice Pillow's bound.
    """
    pixels, limit = sum(width * height for width, height in sizes), max_pixels
    if limit is None and (bound := pillow_bound()) is not None:
        limit = 2 * bound
    if limit is not None and pixels > limit:
        width, height = max(sizes)
        size = f"{'up to ' if len(set(sizes)) > 1 else ''}{width}x{height}"
        size = f"{len(sizes)} frames of {size}" if len(sizes) > 1 else size
        raise PictureError(
            f"{name} is refused: its {size} pixels are more than {limit}. Allow more by --max-pixels "
            "(max_pixels in Python) if you trust the file."
        )
    return pixels


def _head(file: Path | BinaryIO) -> bytes:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return opened.read(_HEAD)
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(0)
    return head


def _without_damage(name: str, file: Path | BinaryIO, head: bytes) -> Path | BinaryIO:
    """Return a PNG without the chunks beside its pixels where one of these keeps Pillow from reading it."""
    if not png.is_png(head):
        return file
    try:
        with Image.open(file):
            return file
    except Exception:  # Pillow's readers of chunks raise what they like
        bare = io.BytesIO(png.bare(_all(file)))
    try:
        with Image.open(bare):
            pass
    except Exception:  # there is more that is wrong, and is said when the file is read
        return file
    remark(f"{name}: what stands beside the pixels is damaged and left out.", stacklevel=6)
    return bare


def _all(file: Path | BinaryIO) -> bytes:
    if isinstance(file, Path):
        return file.read_bytes()
    file.seek(0)
    return file.read()


def _read_tiff(name: str, file: Path | BinaryIO, every_frame: bool, max_pixels: int | None) -> Picture:
    """Read by tifffile; what it does not know (old JPEG, subsampled YCbCr), by Pillow."""
    opened: Any = str(file) if isinstance(file, Path) else file
    places: list[int] | None = None
    try:
        with tifffile.TiffFile(opened) as tiff:
            pages = pages_of(tiff)
            places = [page.index for page in pages]
            if every_frame and goes_on(tiff):
                lost = f"{name} is damaged: it was cut off behind page {len(tiff.pages)}"
                if len(tiff.pages) > 1:
                    raise PictureError(f"{lost}, and the next one is missing.")
                remark(f"{lost}, or says wrongly that more follow.", stacklevel=6)
            _check_size(name, _sizes(pages if every_frame else pages[:1]), max_pixels)
            turns = [int(page.tags[274].value) if 274 in page.tags else 1 for page in pages]
        if not isinstance(file, Path):
            file.seek(0)
        pictures = read_tiff(opened, name, every_frame)
    except (PictureError, MemoryError):
        raise
    except Exception as error:
        try:
            if every_frame and (places is None or len(places) > 1):
                return _read_pages(name, file, places, max_pixels)
            return _read_pillow(name, file, b"", every_frame, max_pixels)
        except Exception:
            raise error from None
    turned = [_turned(picture, turn) for picture, turn in zip(pictures, turns, strict=False)]
    if len(pages) > 1 and not every_frame:
        _warn_frames(name, len(pages))
    if turned[0].settings.get("place"):
        remark(f"{name}: where it lies on the earth (GeoTIFF) is left out.", stacklevel=6)
    if dropped := turned[0].settings.get("dropped"):
        remark(f"{name}: {dropped} extra channels beside the picture are left out.", stacklevel=6)
    return dataclasses.replace(turned[0], frames=tuple(turned[1:]))


def _read_pages(name: str, file: Path | BinaryIO, places: list[int] | None, max_pixels: int | None) -> Picture:
    """Read pages of a TIFF by Pillow; None is all of them."""
    if not isinstance(file, Path):
        file.seek(0)
    pictures, sizes = [], []
    with Image.open(file) as image:
        for place in range(int(getattr(image, "n_frames", 1))) if places is None else places:
            image.seek(place)
            sizes.append(image.size)
            _check_size(name, sizes, max_pixels)
            image.load()
            pictures.append(dataclasses.replace(from_image(image, name), format="TIFF"))
    return dataclasses.replace(pictures[0], frames=tuple(pictures[1:]))


def _sizes(pages: Sequence[Any]) -> list[tuple[int, int]]:
    """Return width and height of every page of a TIFF."""
    return [(page.imagewidth, page.imagelength) for page in pages]


def _warn_frames(name: str, count: int) -> None:
    remark(f"{name} has {count} frames; only the first is used.", stacklevel=6)


def _read_pillow(name: str, file: Path | BinaryIO, data: bytes, every_frame: bool, max_pixels: int | None) -> Picture:
    if not isinstance(file, Path):
        file.seek(0)
    with Image.open(file) as image:
        _check_size(name, [image.size], max_pixels)
        count = int(getattr(image, "n_frames", 1))
        kind = image.format or ""
        alike = kind in _ANIMATED or kind in _PAGED
        if count > 1 and not (every_frame and alike):
            if kind == "PSD":
                pass  # layers, of which the whole picture is made
            elif kind == "MPO" or (every_frame and not alike):
                remark(
                    f"{name} holds {count} pictures; the first is used, the others (previews, gain maps, views) not.",
                    stacklevel=5,
                )
            else:
                _warn_frames(name, count)
        if count > 1 and every_frame and alike:
            _check_size(name, _frame_sizes(image, count), max_pixels)
            return _read_frames(image, name, kind, count, kind == "WEBP" and _is_lossless_webp(_all(file)))
        settings: dict[str, Any] = {}
        deep = None if count > 1 else _deep(image, file, data)
        image.load()
        if kind == "WEBP" and _is_lossless_webp(_all(file)):
            settings["lossless"] = True
        packet = image.info.get("xmp")
        if isinstance(packet, bytes) and re.search(rb"hdrgm:Version|(MotionPhoto|MicroVideo)=.1", packet):
            text = "what a telephone put behind the picture (gain map, video) is left out"
            remark(f"{name}: {text}.", stacklevel=5)
        if image.info.get("progressive"):
            settings["progressive"] = True
        if kind == "PNG":
            _complete_png(image, _all(file))
        elif kind == "JXL":
            whole = _all(file)
            for box, _, start, stop in containers.boxes(whole):
                if box == b"xml ":
                    image.info["xmp"] = whole[start:stop]
        picture = from_image(image, name) if deep is None else _deep_picture(image, deep, name)
    return dataclasses.replace(picture, format="JPEG" if kind == "MPO" else kind, settings=settings)


def _frame_sizes(image: Image.Image, count: int) -> list[tuple[int, int]]:
    """Return width and height of every frame; the pages of a HEIC differ in them."""
    if image.format not in _PAGED:
        return [image.size] * count
    sizes = []
    for index in range(count):
        image.seek(index)
        sizes.append(image.size)
    image.seek(0)
    return sizes


def _is_lossless_webp(data: bytes) -> bool:
    """Tell whether all pictures in a WebP are stored without loss."""
    kinds, place = set(), 12
    while place + 8 <= len(data):
        name, length = struct.unpack("<4sI", data[place : place + 8])
        if name == b"ANMF":  # a frame: 16 bytes, then chunks of its own
            place += 24
            continue
        if name in (b"VP8L", b"VP8 "):
            kinds.add(name)
        place += 8 + length + length % 2
    return kinds == {b"VP8L"}


def _complete_png(image: Image.Image, data: bytes) -> None:
    """Read what Pillow leaves out of a PNG, and put its transparent gray into the units of the pixels."""
    light = []
    for name, content in png.chunks(data):
        if name == b"IHDR" and content[8] < 8 and content[9] == 0 and isinstance(image.info.get("transparency"), int):
            image.info["transparency"] = image.info["transparency"] * 255 // ((1 << content[8]) - 1)
        elif name == b"cICP" and len(content) == 4:
            image.info["cicp"] = tuple(content)
        elif name in (b"mDCV", b"cLLI"):
            light.append((name, content))
    if light:
        image.info["light"] = tuple(light)


def _read_frames(image: Image.Image, name: str, kind: str, count: int, lossless: bool) -> Picture:
    """Read every frame of an animation, or every page."""
    pictures: list[Picture] = []
    default = kind == "PNG" and bool(image.info.get("default_image"))
    for index in range(count):
        image.seek(index)
        image.load()
        frame = image
        if image.mode == "P":  # its palette and its transparency may change from frame to frame
            frame = image.convert("RGBA" if "transparency" in image.info else "RGB")
            frame.info = {key: value for key, value in image.info.items() if key != "transparency"}
            frame.format = image.format
        picture = from_image(frame, name)
        if kind == "GIF":
            picture = dataclasses.replace(picture, mode="P")
        duration = float(image.info.get("duration", 0)) if kind in _ANIMATED else None
        if default and index == 0:
            duration = 0.0
        pictures.append(dataclasses.replace(picture, duration=duration, format=kind))
    if any(picture.alpha is not None for picture in pictures):
        pictures = [picture if picture.alpha is not None else _opaque(picture) for picture in pictures]
    first = pictures[0]
    settings = {key: True for key, holds in (("default_image", default), ("lossless", lossless)) if holds}
    loop = image.info.get("loop")
    return dataclasses.replace(first, frames=tuple(pictures[1:]), loop=loop, settings=settings)


def _opaque(picture: Picture) -> Picture:
    alpha = np.full((*picture.size, 1), picture.peak, picture.color.dtype)
    return dataclasses.replace(picture, alpha=alpha, mode=picture.mode if picture.mode == "P" else "RGBA")


def _deep(image: Image.Image, file: Path | BinaryIO, head: bytes) -> tuple[Array, int] | None:
    """Samples of more than 8 bits, of which Pillow keeps the high ones, as (H, W, C) uint16 or float32, and bits."""
    bits = _bits(image.format or "", head)
    if bits <= 8 and image.format != "JXL":
        return None
    data = _all(file)
    if image.format == "PNG":
        if image.mode in ("I;16", "I", "L", "1", "P") and head[25] != 4:  # gray, or a palette
            return None
        array = imagecodecs.png_decode(data)
    elif image.format == "AVIF":
        array = imagecodecs.avif_decode(data)
    elif image.format == "PPM":
        array = _deep_ppm(data, image.size)
    elif image.format == "JPEG2000":
        array = imagecodecs.jpeg2k_decode(data)
    elif image.format == "HEIF":
        import pillow_heif

        found = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
        return _channels(np.asarray(found)), bits
    elif image.format == "JXL":
        array = imagecodecs.jpegxl_decode(data)
        if array.ndim == 4:
            _warn_frames(str(file) if isinstance(file, Path) else "the picture", len(array))
            array = array[0]
        if array.dtype == np.uint8:
            return None
        bits = 16 if array.dtype == np.uint16 else 32
    else:
        return None
    array = _channels(np.asarray(array))
    if array.dtype == np.uint16 and bits < 16:
        array = np.round(array.astype(np.float64) * (65535 / ((1 << bits) - 1))).astype(np.uint16)
    return (array, bits) if array.dtype in (np.uint16, np.float32, np.float16) else None


def _deep_ppm(data: bytes, size: tuple[int, int]) -> Array:
    """Samples of a colour PPM with 16 bits, which Pillow shortens to 8."""
    head = _PPM_HEAD.match(data)
    if head is None:
        raise PictureError("The head of the PPM is damaged.")
    count, peak = size[0] * size[1] * 3, int(head[1])
    array = np.frombuffer(data, ">u2", count, head.end()).reshape(size[1], size[0], 3)
    return np.round(array.astype(np.float64) * (65535 / peak)).astype(np.uint16)


def _channels(array: Array) -> Array:
    return array[..., None] if array.ndim == 2 else array


def _bits(kind: str, head: bytes) -> int:
    """Bits of a sample, from the head of a file."""
    if kind == "PNG":
        return head[24]
    if kind in ("AVIF", "HEIF"):
        place = head.find(b"pixi")
        return head[place + 9] if place >= 0 else 8
    if kind == "PPM" and head[:2] == b"P6":
        found = _PPM_HEAD.match(head)
        return 16 if found and int(found[1]) > 255 else 8
    if kind == "JPEG2000":
        place = head.find(b"ihdr")
        if place >= 0:
            return (head[place + 14] & 0x7F) + 1 if head[place + 14] != 255 else 8
        place = head.find(b"\xff\x51")  # SIZ of a bare code stream
        return (head[place + 40] & 0x7F) + 1 if place >= 0 else 8
    return 8


def _deep_picture(image: Image.Image, deep: tuple[Array, int], name: str) -> Picture:
    """Return a picture of deep samples, with what Pillow found beside them."""
    array, bits = deep
    values = None
    if array.dtype not in (np.uint16,):
        array, values = to_unit(array, name)
    key = image.info.get("transparency")
    colors = 1 if array.shape[2] < 3 else 3
    if isinstance(key, (int, tuple)) and array.shape[2] in (1, 3):
        opaque = (array != np.asarray(key, array.dtype)).any(2, keepdims=True)
        array = np.concatenate([array, opaque * np.asarray(np.iinfo(array.dtype).max, array.dtype)], axis=2)
    color, alpha = array[..., :colors], array[..., colors:] if array.shape[2] > colors else None
    mode = ("I;16" if array.dtype == np.uint16 else "F") if colors == 1 else "RGB"
    if alpha is not None:
        mode = "LA" if colors == 1 else "RGBA"
    metadata = from_info(image, getattr(image, "text", None))
    picture = Picture(
        color=np.ascontiguousarray(color),
        alpha=alpha,
        mode=mode,
        bits=bits if bits in (10, 12, 14) else None,
        values=values,
        metadata=metadata,
        name=name,
    )
    return _turned(picture, _orientation(image))


def _orientation(image: Image.Image) -> int:
    """What EXIF says of how the pixels lie, where they are not turned yet."""
    if image.format in _TURNED:
        return 1
    found = exif_of(image).get(0x0112, 1)
    return found if isinstance(found, int) else 1


def _turned(picture: Picture, orientation: int) -> Picture:
    """Turn the pixels upright, and make the metadata say so."""
    transpose, down, across = upright(orientation)

    def turn(plane: Array | None) -> Array | None:
        if plane is None or not (transpose or down or across):
            return plane
        plane = plane.transpose(1, 0, 2) if transpose else plane
        plane = plane[::-1] if down else plane
        return np.ascontiguousarray(plane[:, ::-1] if across else plane)

    color = turn(picture.color)
    assert color is not None
    metadata = picture.metadata
    if transpose and metadata.dpi is not None:
        metadata = dataclasses.replace(metadata, dpi=metadata.dpi[::-1])
    changed = dataclasses.replace(picture, color=color, black=turn(picture.black), alpha=turn(picture.alpha))
    resized = metadata.resized(changed.size)
    if metadata.exif is not None and resized.exif is None:
        remark(f"{picture.name}: its EXIF is damaged and left out.", stacklevel=6)
    return dataclasses.replace(changed, metadata=resized)


def from_image(image: Image.Image, name: str) -> Picture:
    """Return a Pillow image as a picture.

    Args:
        image: It.
        name: For messages.

    Raises:
        PictureError: Its mode is unknown, or its values are no finite numbers.
    """
    if 0 in image.size:
        raise PictureError(f"{name} has no pixels: its size is {image.width}x{image.height}.")
    text = getattr(image, "text", None) if image.format == "PNG" else None
    common: dict[str, Any] = {"metadata": from_info(image, text), "name": name}
    mode = image.mode
    if mode == "LAB":
        remark(f"{name} is in LAB; it becomes RGB.", stacklevel=2)
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is not done in place
        plain = dataclasses.replace(common["metadata"], icc_profile=None)
        return _turned(Picture(color=np.asarray(converted), name=name, metadata=plain), _orientation(image))
    if mode == "F" or mode.startswith("I"):
        picture = _deep_gray(np.array(image), mode, image.info.get("transparency"), common)
        return _turned(picture, _orientation(image))
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
        picture = Picture(color=array[..., :3], black=array[..., 3:], mode="CMYK", **common)
        return _turned(picture, _orientation(image))
    channels = 1 if working.startswith("L") else 3
    alpha = array[..., channels:] if array.shape[2] > channels else None
    picture = Picture(color=array[..., :channels], alpha=alpha, mode="RGBA" if mode == "PA" else mode, **common)
    return _turned(picture, _orientation(image))


def _deep_gray(array: Array, mode: str, key: Any, common: dict[str, Any]) -> Picture:
    """Gray with more than 8 bits: uint16, or floats of any range."""
    if mode == "F" or array.min() < 0 or array.max() > 65535:
        unit, values = to_unit(array, str(common["name"]))
        return Picture(color=unit[..., None], values=values, mode="F" if mode == "F" else mode, **common)
    color = array.astype(np.uint16)[..., None]
    if isinstance(key, int):
        return Picture(color=color, alpha=np.where(color == key, 0, 65535).astype(np.uint16), mode="LA", **common)
    return Picture(color=color, mode=mode, **common)


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


def peek(path: Path, max_pixels: int | None = None) -> Kind:
    """Return what kind of picture a file holds, from its head.

    Raises:
        PictureError: It is no picture, or is too large to be safe.
    """
    _check_file(path)
    name = str(path)
    with _explained(name, path, max_pixels):
        data = _head(path)
        if is_tiff(data):
            return _peek_tiff(path, name, max_pixels)
        with Image.open(_without_damage(name, path, data)) as image:
            _check_size(name, [image.size], max_pixels)
            mode, kind = image.mode, image.format or ""
            alpha = mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info
            colors = (
                "cmyk"
                if mode == "CMYK"
                else "gray"
                if mode in ("1", "L", "LA", "La", "I;16", "I;16B", "I", "F")
                else "color"
            )
            bits = 32 if mode == "F" else 16 if mode.startswith("I") else 1 if mode == "1" else _bits(kind, data)
            size = image.size if upright(_orientation(image))[0] else image.size[::-1]
            count = int(getattr(image, "n_frames", 1)) if kind in _ANIMATED or kind in _PAGED else 1
            return Kind(
                format="JPEG" if kind == "MPO" else kind,
                size=size,
                colors=colors,
                alpha=alpha,
                bits=bits,
                frames=count,
                pixels=_check_size(name, _frame_sizes(image, count), max_pixels),
            )


def _peek_tiff(path: Path, name: str, max_pixels: int | None) -> Kind:
    try:
        with tifffile.TiffFile(str(path)) as tiff:
            pages = pages_of(tiff)
            page = pages[0]
            pixels = _check_size(name, _sizes(pages), max_pixels)
            size = (page.imagelength, page.imagewidth)
            turn = int(page.tags[274].value) if 274 in page.tags else 1
            number = int(page.photometric)
            bits = int(np.max(page.bitspersample))
            return Kind(
                format="TIFF",
                size=size[::-1] if upright(turn)[0] else size,
                colors="cmyk" if number == 5 else "gray" if number < 2 else "color",
                alpha=int(page.samplesperpixel) > samples_of(number),
                bits=bits,
                frames=len(pages),
                pixels=pixels,
            )
    except (PictureError, MemoryError):
        raise
    except Exception:
        with Image.open(path) as image:
            pixels = _check_size(name, [image.size], max_pixels)
            return Kind(format="TIFF", size=image.size[::-1], pixels=pixels)
