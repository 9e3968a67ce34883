"""AVIF, HEIC and JPEG XL with more than 8 bits a sample, which Pillow does not write."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image

from zoo.pictures.color import to_linear
from zoo.pictures.metadata import Metadata
from zoo.pictures.picture import Array, Picture, PictureError

__all__ = ["boxes", "encode_avif", "encode_heif", "encode_jxl", "says_linear"]


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
    if array.ndim == 3 and array.shape[2] == 2:
        array = np.concatenate([array[..., :1].repeat(3, 2), array[..., 1:]], axis=2)
    if bits > 8:
        array = np.round(array.astype(np.float64) * (((1 << bits) - 1) / 65535)).astype(np.uint16)
    color = picture.metadata.cicp or (1, 13, 6, 1)
    deep = bytes(
        imagecodecs.avif_encode(
            array,
            level=quality,
            speed=6,
            bitspersample=bits,
            pixelformat="400" if array.ndim == 2 else "444" if quality >= 90 else "420",
            primaries=color[0],
            transfer=color[1],
            matrix=9 if color[0] == 9 else 6,
        )
    )
    mode = "L" if array.ndim == 2 else "RGB" if array.shape[2] == 3 else "RGBA"
    around = io.BytesIO()
    beside = {key: options[key] for key in ("icc_profile", "exif", "xmp") if options.get(key) is not None}
    sampling = "4:0:0" if mode == "L" else options.get("subsampling", "4:2:0")
    Image.new(mode, (1, 1)).save(around, "AVIF", quality=1, subsampling=sampling, **beside)
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

    imagecodecs takes samples of more than 8 bits for linear light. Where they are not, what is lossy is given as light
    and what is not as it is, and the file says that sRGB is to come out.

    Args:
        picture: uint16 or float32; in sRGB, or in linear light with the profile that says so.
        quality: 1 to 100; 100 is without loss.
    """
    # distances as of libjxl's own cjxl
    distance = 0.1 + (100 - quality) * 0.09 if quality >= 30 else 53 / 3000 * quality**2 - 23 / 20 * quality + 25
    loss: dict[str, Any] = {"lossless": True} if quality == 100 else {"distance": distance}
    pixels = _pixels(picture)
    if says_linear(picture.metadata.icc_profile):
        data = bytes(imagecodecs.jpegxl_encode(pixels, usecontainer=True, **loss))
    else:
        light = pixels.astype(np.float64) / picture.peak
        colors = light.reshape(*light.shape[:2], -1)[..., : picture.color.shape[2]]
        colors[...] = to_linear(colors, Metadata())
        if picture.peak == 65535:
            light = np.round(light * 65535)
        light = light.astype(pixels.dtype)
        data = bytes(imagecodecs.jpegxl_encode(pixels if quality == 100 else light, usecontainer=True, **loss))
        said = _saying_srgb(data)
        if said is None:  # an unknown layout of the head: light stays light
            said = bytes(imagecodecs.jpegxl_encode(light, usecontainer=True, **loss))
        data = said
    extra = b""
    for name, content in ((b"Exif", picture.metadata.exif), (b"xml ", picture.metadata.xmp)):
        if content is not None:
            content = bytes(4) + content if name == b"Exif" else content
            extra += struct.pack(">I4s", 8 + len(content), name) + content
    for name, _, _, stop in boxes(data):
        if name in (b"ftyp", b"jxll"):
            place = stop
    return data[:place] + extra + data[place:]


def says_linear(icc_profile: bytes | None) -> bool:
    """Tell whether a profile is the one that libjxl makes for linear light with the primaries of sRGB."""
    texts = (b"RGB_D65_SRG_Rel_Lin", b"Gra_D65_Rel_Lin")
    both = (*texts, *(text.decode().encode("utf-16-be") for text in texts))
    return icc_profile is not None and any(text in icc_profile for text in both)


class _Bits:
    """Reads the head of a JPEG XL code stream, least bits first (ISO/IEC 18181-1, annexes B and D)."""

    def __init__(self, data: bytes, start: int) -> None:
        self.value, self.place = int.from_bytes(data[start : start + 256], "little"), 0

    def take(self, count: int) -> int:
        found = self.value >> self.place & ((1 << count) - 1)
        self.place += count
        return found

    def choose(self, *choices: tuple[int, int]) -> int:
        """Read a U32: each choice is an offset and the bits that are added."""
        offset, count = choices[self.take(2)]
        return offset + self.take(count)

    def enum(self) -> int:
        return self.choose((0, 0), (1, 0), (2, 4), (18, 6))

    def depth(self) -> None:
        if self.take(1):
            self.choose((32, 0), (16, 0), (24, 0), (1, 6))
            self.take(4)
        else:
            self.choose((8, 0), (10, 0), (12, 0), (1, 6))


def _saying_srgb(data: bytes) -> bytes | None:
    """Return a JPEG XL file whose head says sRGB instead of linear light; None where it does not say that."""
    start = next((content for name, _, content, _ in boxes(data) if name == b"jxlc"), 0)
    if data[start : start + 2] != b"\xff\x0a":
        return None
    bits = _Bits(data, start + 2)
    small = bits.take(1)
    sides = ((1, 9), (1, 13), (1, 18), (1, 30))
    bits.take(5) if small else bits.choose(*sides)
    if bits.take(3) == 0:
        bits.take(5) if small else bits.choose(*sides)
    if bits.take(1) or bits.take(1):  # all as usual, or orientation, preview and the like
        return None
    bits.depth()
    bits.take(1)
    for _ in range(bits.choose((0, 0), (1, 0), (2, 4), (1, 12))):
        if bits.take(1):
            continue
        if bits.enum() != 0:  # no opacity
            return None
        bits.depth()
        bits.choose((0, 0), (3, 0), (4, 0), (1, 3))
        if bits.choose((0, 0), (0, 4), (16, 5), (48, 10)):
            return None
        bits.take(1)
    bits.take(1)
    if bits.take(1) or bits.take(1):  # sRGB already, or a profile
        return None
    gray = bits.enum() == 1
    if bits.enum() != 1 or (not gray and bits.enum() != 1) or bits.take(1):
        return None
    place = bits.place
    if bits.enum() != 8:
        return None
    head = bits.value & ~(15 << (place + 2)) | (13 - 2) << (place + 2)
    out = bytearray(data)
    span = len(data[start + 2 : start + 258])
    out[start + 2 : start + 258] = head.to_bytes(span, "little")
    return bytes(out)
