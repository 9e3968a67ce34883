"""AVIF, HEIC and JPEG XL with more than 8 bits a sample, which Pillow does not write."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image

from zoo.pictures.picture import Array, Picture, PictureError

__all__ = ["boxes", "encode_avif", "encode_heif", "encode_jxl"]


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield name, place, place of the content, and end of every box of an ISO container."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, name = struct.unpack(">I4s", data[start : start + 8])
        content = start + 8
        if size == 1:
            (size,) = struct.unpack(">Q", data[start + 8 : start + 16])
            content += 8
        stop = end if size == 0 else start + size
        if stop > end or stop <= start:
            return
        yield name, start, content, stop
        start = stop


def _pixels(picture: Picture) -> Array:
    array = picture.planes()
    return np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)


def encode_avif(picture: Picture, quality: int, options: Mapping[str, Any]) -> bytes:
    """Return an AVIF of 10 or 12 bits, or of 8 bits with code points of colour (cICP).

    imagecodecs writes the samples without anything beside them, Pillow everything else around a picture of 8 bits: the
    boxes that describe the samples, and the samples, are put from the one into the other.

    Args:
        picture: uint16, or uint8.
        quality: 1 to 100.
        options: Of Pillow's: profile, EXIF and XMP.
    """
    bits = 8 if picture.peak == 255 else 10 if picture.bits == 10 else 12
    array = _pixels(picture)
    if bits > 8:
        array = np.round(array.astype(np.float64) * (((1 << bits) - 1) / 65535)).astype(np.uint16)
    color = picture.metadata.cicp or (1, 13, 6, 1)
    deep = bytes(
        imagecodecs.avif_encode(
            array,
            level=quality,
            speed=6,
            bitspersample=bits,
            pixelformat=None if array.ndim == 2 or array.shape[2] < 3 else "444" if quality >= 90 else "420",
            primaries=color[0],
            transfer=color[1],
            matrix=9 if color[0] == 9 else 6,
        )
    )
    channels = picture.color.shape[2] + (picture.alpha is not None)
    mode = {1: "L", 2: "RGBA", 3: "RGB", 4: "RGBA"}[channels]
    around = io.BytesIO()
    beside = {key: options[key] for key in ("icc_profile", "exif", "xmp") if options.get(key) is not None}
    Image.new(mode, (1, 1)).save(around, "AVIF", quality=1, subsampling=options.get("subsampling", "4:2:0"), **beside)
    return _transplanted(around.getvalue(), deep)


def _meta(data: bytes) -> dict[bytes, tuple[int, int]]:
    """Return where the boxes below `meta` are: content and end."""
    for name, _, content, stop in boxes(data):
        if name == b"meta":
            return {inner: (start, end) for inner, _, start, end in boxes(data, content + 4, stop)}
    raise PictureError("An AVIF without a head was made.")


def _items(data: bytes) -> dict[int, tuple[int, int, int, int]]:
    """Return item -> place of its offset and of its length in `iloc`, offset, length; as libavif writes it."""
    start, _ = _meta(data)[b"iloc"]
    version, sizes = data[start], data[start + 4]
    if version != 0 or sizes != 0x44:
        raise PictureError("An AVIF of an unknown layout was made.")
    base = data[start + 5] >> 4
    (count,) = struct.unpack(">H", data[start + 6 : start + 8])
    place, found = start + 8, {}
    for _ in range(count):
        item, _, extents = struct.unpack(">HH", data[place : place + 4]) + struct.unpack(
            ">H", data[place + 4 + base : place + 6 + base]
        )
        if extents != 1:
            raise PictureError("An AVIF of an unknown layout was made.")
        place += 6 + base
        found[item] = (place, place + 4, *struct.unpack(">II", data[place : place + 8]))
        place += 8
    return found


def _properties(data: bytes) -> dict[tuple[bytes, int], tuple[int, int]]:
    """Return where the properties are that describe samples, by name and number among their like."""
    start, end = _meta(data)[b"iprp"]
    found: dict[tuple[bytes, int], tuple[int, int]] = {}
    for name, _, content, stop in boxes(data, start, end):
        if name != b"ipco":
            continue
        for kind, place, inner, last in boxes(data, content, stop):
            wanted = kind in (b"ispe", b"pixi", b"av1C") or (kind == b"colr" and data[inner : inner + 4] == b"nclx")
            if wanted:
                number = sum(key[0] == kind for key in found)
                found[kind, number] = (place, last)
    return found


def _transplanted(around: bytes, deep: bytes) -> bytes:
    """Put the samples of one AVIF, and what describes them, into another one."""
    out = bytearray(around)
    new, old = _properties(deep), _properties(around)
    if [(key, end - start) for key, (start, end) in new.items()] != [
        (key, end - start) for key, (start, end) in old.items()
    ]:
        raise PictureError("The samples of an AVIF do not fit what is around them.")
    for key, (start, end) in old.items():
        out[start:end] = deep[slice(*new[key])]
    payload = bytearray()
    items, samples = _items(around), _items(deep)
    for name, place, _, _ in boxes(around):
        if name == b"mdat":
            head = place
    for item, (at, length_at, offset, length) in items.items():
        if item in samples:
            _, _, offset, length = samples[item]
            content = deep[offset : offset + length]
        else:
            content = around[offset : offset + length]
        out[at : at + 4] = struct.pack(">I", head + 8 + len(payload))
        out[length_at : length_at + 4] = struct.pack(">I", len(content))
        payload += content
    return bytes(out[:head]) + struct.pack(">I4s", 8 + len(payload), b"mdat") + bytes(payload)


def encode_heif(picture: Picture, options: Mapping[str, Any]) -> bytes:
    """Return a HEIC of 10 or 12 bits.

    Args:
        picture: uint16.
        options: Quality, profile, EXIF and XMP.
    """
    import pillow_heif

    array = picture.planes()
    if array.shape[2] < 3:
        array = np.concatenate([array[..., :1].repeat(3, 2), array[..., 1:]], axis=2)
    mode = "RGBA;16" if array.shape[2] == 4 else "RGB;16"
    file = pillow_heif.from_bytes(mode, picture.size[::-1], np.ascontiguousarray(array, "<u2").tobytes())
    kept = pillow_heif.options.SAVE_HDR_TO_12_BIT
    pillow_heif.options.SAVE_HDR_TO_12_BIT = picture.bits != 10
    out = io.BytesIO()
    try:
        file.save(out, **{key: value for key, value in options.items() if value is not None})
    finally:
        pillow_heif.options.SAVE_HDR_TO_12_BIT = kept
    return out.getvalue()


def encode_jxl(picture: Picture, quality: int) -> bytes:
    """Return a JPEG XL of 16 bits or floats, with EXIF and XMP.

    Args:
        picture: uint16 or float32, in sRGB.
        quality: 1 to 100; 100 is without loss.
    """
    # distances as of libjxl's own cjxl
    distance = 0.1 + (100 - quality) * 0.09 if quality >= 30 else 53 / 3000 * quality**2 - 23 / 20 * quality + 25
    loss: dict[str, Any] = {"lossless": True} if quality == 100 else {"distance": distance}
    data = bytes(imagecodecs.jpegxl_encode(_pixels(picture), usecontainer=True, **loss))
    extra = b""
    for name, content in ((b"Exif", picture.metadata.exif), (b"xml ", picture.metadata.xmp)):
        if content is not None:
            content = bytes(4) + content if name == b"Exif" else content
            extra += struct.pack(">I4s", 8 + len(content), name) + content
    for name, _, _, stop in boxes(data):
        if name in (b"ftyp", b"jxll"):
            place = stop
    return data[:place] + extra + data[place:]
