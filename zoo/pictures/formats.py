"""Which file formats there are, and what each can hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["FORMATS", "Kind", "format_of", "load_plugins", "readable_suffixes", "writable_suffixes"]

# Formats of Pillow that are no pictures, or that Pillow reads only with another program.
_NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
_NOT_WRITTEN = (*_NO_PICTURES, "ICNS", "PALM")  # of sizes of their own, and of a palette that nothing reads back
RAW_SUFFIXES = (".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".iiq", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2")
"""Of cameras' raw files, which are to be developed first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What a file format can hold.

    Args:
        colors: Kinds of colour, of "gray", "color" and "cmyk".
        bits: Most bits of a gray or colour sample.
        color_bits: Most bits of a colour sample, where it is fewer.
        alpha: "full", "one" (each pixel opaque or not), or "none".
        icc, exif, xmp, iptc, dpi, text, comment: Whether there is a place for it.
        side: Most pixels of a side.
        frames: "animation", "pages" or "" for one picture.
    """

    colors: tuple[str, ...] = ("gray", "color")
    bits: int = 8
    color_bits: int = 64
    alpha: str = "full"
    icc: bool = False
    exif: bool = False
    xmp: bool = False
    iptc: bool = False
    dpi: bool = False
    text: bool = False
    comment: bool = False
    side: int = 2**31 - 1
    frames: str = ""


_WEB: dict[str, Any] = {"icc": True, "exif": True, "xmp": True}
FORMATS = {
    "PNG": Format(bits=16, iptc=True, dpi=True, text=True, frames="animation", **_WEB),
    "TIFF": Format(
        colors=("gray", "color", "cmyk"), bits=32, iptc=True, dpi=True, comment=True, frames="pages", **_WEB
    ),
    "JPEG": Format(
        colors=("gray", "color", "cmyk"), alpha="none", iptc=True, dpi=True, comment=True, side=65500, **_WEB
    ),
    "WEBP": Format(colors=("color",), side=16383, frames="animation", **_WEB),
    "AVIF": Format(bits=12, side=65536, frames="animation", **_WEB),
    "HEIF": Format(bits=12, side=16384, frames="pages", **_WEB),
    "JXL": Format(bits=32, exif=True, xmp=True),
    "JPEG2000": Format(bits=16, comment=True),
    "GIF": Format(alpha="one", comment=True, side=65535, frames="animation"),
    "BMP": Format(alpha="none", dpi=True),
    "TGA": Format(side=65535),
    "PPM": Format(bits=16, alpha="none"),
    "PFM": Format(colors=("gray",), bits=32, alpha="none"),
    "ICO": Format(colors=("color",), side=256),
    "QOI": Format(colors=("color",)),
    "MSP": Format(colors=("gray",), bits=1, alpha="none"),
    "XBM": Format(colors=("gray",), bits=1, alpha="none"),
    "PCX": Format(alpha="none", side=65535),
    "SGI": Format(side=65535),
}
"""What formats hold, by Pillow's names; others are tried with 8-bit colour, and hold nothing else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What kind of picture a file holds, known from its head.

    Args:
        format: Pillow's name of the file format.
        size: Height and width as shown, pixels.
        colors: "gray", "color" or "cmyk".
        alpha: Whether there is transparency.
        bits: Of a sample.
        frames: Number of frames or pages.
        pixels: Of all of them together, which may differ in size.
    """

    format: str
    size: tuple[int, int]
    pixels: int
    colors: str = "color"
    alpha: bool = False
    bits: int = 8
    frames: int = 1


@functools.cache
def load_plugins() -> None:
    """Register every format that is installed: Pillow's own, and those of the extra "formats"."""
    Image.init()
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters, of picture files that can be read here."""
    load_plugins()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in Image.OPEN and name not in _NO_PICTURES)


@functools.cache
def writable_suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters, of picture files that can be written here."""
    load_plugins()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in Image.SAVE and name not in _NOT_WRITTEN)


def format_of(path: str | Path) -> str | None:
    """Return Pillow's name of the format that a suffix stands for, or None where it cannot be written."""
    suffix = Path(path).suffix.lower()
    if suffix not in writable_suffixes():
        return None
    name = Image.registered_extensions()[suffix]
    return "PFM" if suffix == ".pfm" else "JPEG" if name == "MPO" else name


def losses(kind: Kind, name: str) -> list[str]:
    """Return what of the pixels a format cannot hold, and what becomes of it, each in a few words."""
    holds, said = FORMATS.get(name, Format(alpha="none")), []
    if kind.colors == "cmyk" and "cmyk" not in holds.colors:
        said.append("CMYK becomes RGB")
    elif kind.colors == "color" and "color" not in holds.colors:
        said.append("colour becomes gray")
    if kind.alpha and holds.alpha == "none":
        said.append("transparency becomes white")
    elif kind.alpha and holds.alpha == "one" and kind.format != name:
        said.append("each pixel becomes transparent or not")
    most = min(holds.bits, holds.color_bits if kind.colors == "color" else holds.bits)
    if kind.bits > most:
        said.append(f"{kind.bits} bits become {most}")
    elif name in ("TIFF", "PNG") and (8 < kind.bits < 16 or (1 < kind.bits < 8 and kind.colors == "gray")):
        said.append(f"{kind.bits} bits become {8 if kind.bits < 8 else 16}")
    pages = kind.format in ("TIFF", "HEIF", "")
    if kind.frames > 1 and (not holds.frames or (pages and holds.frames == "animation")):
        said.append(f"only the first of {kind.frames} {'pages' if pages else 'frames'} is written")
    elif kind.frames > 1 and kind.bits > 8 and holds.frames == "animation":
        said.append(f"{kind.bits} bits become 8")
    return said


def too_large(size: tuple[int, int], name: str) -> str | None:
    """Return why a picture of a height and width does not go into a format, or None."""
    side = FORMATS.get(name, Format()).side
    if max(size) <= side:
        return None
    others = " or ".join(other for other in ("PNG", "TIFF") if other != name)
    return f"{size[1]}x{size[0]} pixels are too many for {name}, which takes {side} a side: choose {others}"
