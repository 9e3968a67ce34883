"""Chunks of PNG files: what Pillow leaves out, and 16 bits in colour."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

import imagecodecs
import numpy as np
from PIL import PngImagePlugin

from zoo.pictures.metadata import _XMP_KEY, Metadata, iptc_as_hex
from zoo.pictures.picture import Array

__all__ = ["bare", "chunks", "deepened", "info_of", "is_png", "with_light"]

_LONGEST_KEY = 79
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of every chunk that is whole."""
    place = len(_SIGNATURE)
    while place + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        if place + 12 + length > len(data):
            return
        yield name, data[place + 8 : place + 8 + length]
        place += 12 + length


def is_png(head: bytes) -> bool:
    """Tell whether a file that begins so is a PNG."""
    return head.startswith(_SIGNATURE)


def bare(data: bytes) -> bytes:
    """Return a PNG with its pixels alone: all that PNG allows a reader to ignore is left out but sound transparency."""
    kept, place, lengths = [_SIGNATURE], len(_SIGNATURE), {0: (2,), 2: (6,), 3: range(1, 257)}
    while place + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        end = place + 12 + length
        sound = data[end - 4 : end] == struct.pack(">I", zlib.crc32(data[place + 4 : end - 4]))
        if not name[0] & 32 or (name == b"tRNS" and sound and length in lengths.get(data[25], ())):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _joined(parts: Iterable[tuple[bytes, bytes]]) -> bytes:
    out = [_SIGNATURE]
    for name, content in parts:
        out.append(struct.pack(">I4s", len(content), name) + content + struct.pack(">I", zlib.crc32(name + content)))
    return b"".join(out)


def deepened(small: bytes, pixels: Array) -> bytes:
    """Put 16-bit pixels into a PNG file that was made of one pixel.

    Args:
        small: Whole file with all its other chunks.
        pixels: (H, W, C), uint16, 1 to 4 channels.
    """
    whole = imagecodecs.png_encode(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    new = [(name, content) for name, content in chunks(bytes(whole)) if name in (b"IHDR", b"IDAT")]
    parts: list[tuple[bytes, bytes]] = []
    for name, content in chunks(small):
        if name == b"IHDR":
            parts.append(new[0])
        elif name == b"IDAT":
            parts += new[1:]
            new = new[:1]
        elif name not in (b"tRNS", b"PLTE", b"sBIT"):
            parts.append((name, content))
    return _joined(parts)


def with_light(data: bytes, metadata: Metadata) -> bytes:
    """Put in the chunks that go with cICP, which Pillow does not write."""
    if metadata.icc_profile is not None or metadata.cicp is None or not metadata.light:
        return data
    head, *others = chunks(data)
    return _joined([head, *metadata.light, *others])


def info_of(metadata: Metadata) -> PngImagePlugin.PngInfo:
    """Return the chunks that say what goes beside the pixels, but profile, EXIF and resolution."""
    info = PngImagePlugin.PngInfo()
    if metadata.icc_profile is None:
        if metadata.cicp is not None:
            red, transfer, _, full = metadata.cicp
            info.add(b"cICP", bytes((red, transfer, 0, full)))
        if metadata.gamma is not None:
            info.add(b"gAMA", struct.pack(">I", round(metadata.gamma * 100000)))
        if metadata.chromaticity is not None:
            info.add(b"cHRM", struct.pack(">8I", *(round(value * 100000) for value in metadata.chromaticity)))
        if metadata.intent is not None:
            info.add(b"sRGB", bytes((metadata.intent,)))
    if metadata.xmp is not None:
        info.add_itxt(_XMP_KEY, metadata.xmp.decode("utf-8", "replace"))
    if metadata.iptc is not None:
        info.add_text("Raw profile type iptc", iptc_as_hex(metadata.iptc), zip=True)
    text = list(metadata.text)
    if metadata.comment and not any(key == "Comment" for key, _ in text):
        text.append(("Comment", metadata.comment.decode("utf-8", "replace").rstrip("\0")))
    for given, value in text:
        key = given.encode("latin-1", "replace").decode("latin-1").replace("\0", " ")[:_LONGEST_KEY].strip()
        key = key or "Comment"
        value = value.encode("utf-8", "replace").decode()  # text of Python may hold halves of characters
        try:
            value.encode("latin-1")
            info.add_text(key, value, zip=len(value) > 1024)
        except UnicodeEncodeError:
            info.add_itxt(key, value, zip=len(value) > 1024)
    return info
