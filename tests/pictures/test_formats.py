"""Every kind of file in, the same kind out; what docs/formats.md says is kept comes back from every format."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image, ImageCms, PngImagePlugin

from zoo.pictures.color import to_srgb
from zoo.pictures.formats import FORMATS, format_of, load_plugins, readable_suffixes
from zoo.pictures.metadata import Metadata
from zoo.pictures.picture import Picture, PictureError
from zoo.pictures.read import open_picture, peek
from zoo.pictures.restore import restore, restore_picture
from zoo.pictures.write import write_picture
from zoo.restoration.cfsr import CFSR

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3 = imagecodecs.cms_profile(
    "rgb", gamma=2.2, whitepoint=(0.3127, 0.329, 1.0), primaries=(0.68, 0.32, 1, 0.265, 0.69, 1, 0.15, 0.06, 1)
)

load_plugins()
Y, X = np.mgrid[:18, :22]
WAVES = np.stack([0.5 + 0.4 * np.sin(0.15 * X + 0.1 * k * Y + k) for k in range(4)], -1)
RGB, GRAY, ALPHA = (np.round(WAVES[..., part] * 255).astype(np.uint8) for part in (slice(0, 3), 0, 3))
RGB16, GRAY16, ALPHA16 = (np.round(WAVES[..., part] * 65535).astype(np.uint16) for part in (slice(0, 3), 0, 3))
RGBA, RGBA16 = np.dstack([RGB, ALPHA]), np.dstack([RGB16, ALPHA16])


@pytest.fixture(scope="module")
def model() -> CFSR:
    """Return a network that enlarges by interpolation, so that results can be foreseen."""
    torch.manual_seed(0)
    made = timm.create_model("cfsr_x2", depths=(1,), interpolation_init=True).eval()
    with torch.no_grad():
        made.upsample.weight[:, 3:] = 0
    return made


@pytest.fixture(autouse=True)
def _all_is_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def tiff(**options: Any) -> Callable[[Path], None]:
    array = options.pop("array", RGB)
    options.setdefault("photometric", "rgb" if array.ndim == 3 else "minisblack")
    return lambda path: tifffile.imwrite(path, array, metadata=None, **options)


def pillow(array: Any = RGB, mode: str | None = None, **options: Any) -> Callable[[Path], None]:
    image = Image.fromarray(array)
    if mode == "P":
        image = image.quantize(16)
    elif mode is not None:
        image = image.convert(mode)
    return lambda path: image.save(path, **options)


def written(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def chunked(**chunks: bytes) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for name, content in chunks.items():
        info.add(name.encode(), content)
    return info


def premultiplied() -> Any:
    return np.round(np.dstack([RGB * (ALPHA[..., None] / 255), ALPHA])).astype(np.uint8)


# Name of the file, how it is made, and the bits and channels that come back.
KINDS: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "gray8.tif": (tiff(array=GRAY), "uint8", 1),
    "white_is_zero.tif": (tiff(array=GRAY, photometric="miniswhite"), "uint8", 1),
    "gray16.tif": (tiff(array=GRAY16), "uint16", 1),
    "gray12.tif": (tiff(array=GRAY16 >> 4, bitspersample=12), "uint16", 1),
    "gray4.tif": (tiff(array=GRAY >> 4, bitspersample=4), "uint8", 1),
    "gray_float.tif": (tiff(array=WAVES[..., 0].astype(np.float32)), "float32", 1),
    "gray_double.tif": (tiff(array=WAVES[..., 0]), "float32", 1),
    "gray_int16.tif": (tiff(array=(WAVES[..., 0] * 3000 - 500).astype(np.int16)), "float32", 1),
    "gray_uint32.tif": (tiff(array=(WAVES[..., 0] * 4e9).astype(np.uint32)), "float32", 1),
    "rgb8.tif": (tiff(), "uint8", 3),
    "rgb16.tif": (tiff(array=RGB16), "uint16", 3),
    "rgb_float.tif": (tiff(array=WAVES[..., :3].astype(np.float32)), "float32", 3),
    "rgb_half.tif": (tiff(array=WAVES[..., :3].astype(np.float16)), "float32", 3),
    "rgb_hdr.tif": (tiff(array=(WAVES[..., :3] * 7 - 1).astype(np.float32)), "float32", 3),
    "rgba.tif": (tiff(array=RGBA, extrasamples=["unassalpha"]), "uint8", 4),
    "rgba16.tif": (tiff(array=RGBA16, extrasamples=["unassalpha"], compression="zlib", predictor=True), "uint16", 4),
    "associated.tif": (tiff(array=premultiplied(), extrasamples=["assocalpha"]), "uint8", 4),
    "unspecified.tif": (tiff(array=RGBA, extrasamples=["unspecified"]), "uint8", 4),
    "five.tif": (tiff(array=np.dstack([RGBA, ALPHA]), extrasamples=["unassalpha", "unspecified"]), "uint8", 4),
    "la.tif": (
        tiff(array=RGBA[..., 2:], photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig"),
        "uint8",
        2,
    ),
    "planar.tif": (tiff(array=np.ascontiguousarray(RGB.transpose(2, 0, 1)), planarconfig="separate"), "uint8", 3),
    "planar16.tif": (
        tiff(array=np.ascontiguousarray(RGB16.transpose(2, 0, 1)), planarconfig="separate", compression="lzw"),
        "uint16",
        3,
    ),
    "big_endian.tif": (tiff(array=RGB16, byteorder=">"), "uint16", 3),
    "bigtiff.tif": (tiff(bigtiff=True), "uint8", 3),
    "bigtiff_be.tiff": (tiff(array=RGB16, bigtiff=True, byteorder=">"), "uint16", 3),
    "tiled.tif": (tiff(tile=(16, 16), compression="zlib"), "uint8", 3),
    **{f"{kind}.tif": (tiff(compression=kind), "uint8", 3) for kind in ("lzw", "packbits", "zstd", "lzma", "webp")},
    "jpeg.tif": (tiff(compression="jpeg"), "uint8", 3),
    "jpeg_gray.tif": (tiff(array=GRAY, compression="jpeg"), "uint8", 1),
    "cmyk.tif": (tiff(array=RGBA, photometric="separated"), "uint8", 4),
    "cmyk16.tif": (tiff(array=RGBA16, photometric="separated"), "uint16", 4),
    "cmyk_alpha.tif": (
        tiff(array=np.dstack([RGBA, ALPHA]), photometric="separated", extrasamples=["unassalpha"]),
        "uint8",
        5,
    ),
    "palette.tif": (pillow(mode="P"), "uint8", 3),
    "ycbcr.tif": (pillow(mode="YCbCr"), "uint8", 3),
    "fax4.tif": (pillow(GRAY, "1", compression="group4", dpi=(200, 200)), "uint8", 1),
    "fax3.tif": (pillow(GRAY, "1", compression="group3"), "uint8", 1),
    "bilevel.tif": (tiff(array=GRAY > 128, compression="zlib"), "uint8", 1),
    **{f"{mode}.png": (pillow(GRAY, mode), "uint8", 1) for mode in ("1", "L")},
    "p.png": (pillow(mode="P"), "uint8", 3),
    "p_transparent.png": (pillow(mode="P", transparency=bytes(range(0, 256, 16))), "uint8", 4),
    "la.png": (pillow(RGBA, "LA"), "uint8", 2),
    "rgba.png": (pillow(RGBA), "uint8", 4),
    "gray16.png": (pillow(GRAY16), "uint16", 1),
    **{
        f"deep{array.shape[2]}.png": (written(bytes(imagecodecs.png_encode(array))), "uint16", array.shape[2])
        for array in (np.dstack([GRAY16, ALPHA16]), RGB16, RGBA16)
    },
    "gray.jpg": (pillow(GRAY, quality=98), "uint8", 1),
    "rgb.jfif": (pillow(quality=98), "uint8", 3),
    "cmyk.jpe": (pillow(mode="CMYK", quality=98), "uint8", 4),
    "rgb.webp": (pillow(quality=95), "uint8", 3),
    "lossless.webp": (pillow(RGBA, lossless=True), "uint8", 4),
    "rgb.avif": (pillow(quality=95), "uint8", 3),
    "rgba.avif": (pillow(RGBA, quality=95), "uint8", 4),
    **{
        f"deep{bits}.avif": (
            written(bytes(imagecodecs.avif_encode(RGB16 >> (16 - bits), level=95, bitspersample=bits, speed=9))),
            "uint16",
            3,
        )
        for bits in (10, 12)
    },
    "gray10.avif": (
        written(bytes(imagecodecs.avif_encode(GRAY16 >> 6, level=95, bitspersample=10, speed=9))),
        "uint16",
        1,
    ),
    "rgba10.avif": (
        written(bytes(imagecodecs.avif_encode(RGBA16 >> 6, level=95, bitspersample=10, speed=9))),
        "uint16",
        4,
    ),
    "rgb.jxl": (pillow(quality=95), "uint8", 3),
    "rgb16.jxl": (written(bytes(imagecodecs.jpegxl_encode(RGB16, lossless=True))), "uint16", 3),
    "gray16.jxl": (written(bytes(imagecodecs.jpegxl_encode(GRAY16, lossless=True))), "uint16", 1),
    "rgba16.jxl": (written(bytes(imagecodecs.jpegxl_encode(RGBA16, lossless=True))), "uint16", 4),
    "rgba.jp2": (pillow(RGBA), "uint8", 4),
    "rgb16.jp2": (written(bytes(imagecodecs.jpeg2k_encode(RGB16, level=0, codecformat="jp2"))), "uint16", 3),
    "gray16.j2k": (written(bytes(imagecodecs.jpeg2k_encode(GRAY16, level=0, codecformat="j2k"))), "uint16", 1),
    "rgb.bmp": (pillow(), "uint8", 3),
    "p.bmp": (pillow(mode="P"), "uint8", 3),
    "rgba.tga": (pillow(RGBA), "uint8", 4),
    "rgb.ppm": (pillow(), "uint8", 3),
    "rgb16.ppm": (written(b"P6 22 18 65535\n" + RGB16.astype(">u2").tobytes()), "uint16", 3),
    "gray16.pgm": (pillow(GRAY16), "uint16", 1),
    "bilevel.pbm": (pillow(GRAY, "1"), "uint8", 1),
    "float.pfm": (pillow(WAVES[..., 0].astype(np.float32)), "float32", 1),
    "rgb.gif": (pillow(), "uint8", 3),
    "clear.gif": (pillow(mode="P", transparency=3), "uint8", 4),
    "rgb.ico": (pillow(sizes=[(22, 18)]), "uint8", 3),
    "rgb.qoi": (pillow(), "uint8", 3),
    "rgb.pcx": (pillow(), "uint8", 3),
    "rgb.heic": (pillow(quality=95), "uint8", 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files(name: str, tmp_path: Path, model: CFSR) -> None:
    """A file comes back in its format, with its bits and channels, twice the size and in its colours."""
    make, dtype, channels = KINDS[name]
    make(tmp_path / name)
    kind = peek(tmp_path / name)
    before = open_picture(tmp_path / name)
    assert kind.size == before.size == (18, 22)
    assert (str(before.color.dtype), before.planes().shape[2]) == (dtype, channels)
    restore(tmp_path / name, model=model).save(tmp_path / f"out{Path(name).suffix}")
    after = open_picture(tmp_path / f"out{Path(name).suffix}")
    assert after.format == before.format
    assert after.mode == before.mode
    assert after.planes().dtype == before.planes().dtype
    assert (after.bits or 16) == (16 if name.startswith("gray12") else before.bits or 16)
    if before.values is not None:
        assert after.values is not None
        assert after.values[2] == before.values[2]
        span = before.values[1] - before.values[0]
        assert np.abs(np.subtract(after.values[:2], before.values[:2])).max() < 0.1 * span
    low, high = (
        np.asarray(picture.planes(), float)
        / picture.peak
        * ((picture.values or (0, 1))[1] - (picture.values or (0,))[0])
        + (picture.values or (0,))[0]
        for picture in (before, after)
    )
    shrunk = high.reshape(18, 2, 22, 2, -1).mean((1, 3))
    if before.alpha is not None:
        hidden = before.alpha[..., 0] < 0.2 * before.peak
        low[hidden], shrunk[hidden] = 0, 0
    loose = before.mode in ("1", "P") or name == "clear.gif"
    assert np.abs(shrunk - low)[2:-2, 2:-2].mean() < (0.03 if loose else 0.012) * max(1.0, low.max())


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "jpeg"])
@pytest.mark.parametrize("video", [False, True])
def test_ycbcr_becomes_rgb(compression: str | None, video: bool, tmp_path: Path) -> None:
    """With the file's own coefficients and range; where the values are read as they lie, colours would be others."""
    if video and compression == "jpeg":
        pytest.skip("a JPEG says its own")
    weights, black = ((0.2126, 0.7152, 0.0722), 16.0) if video else ((0.299, 0.587, 0.114), 0.0)
    rgb = WAVES[..., :3] * 0.8 + 0.1
    light = rgb @ np.array(weights)
    blue, red = ((rgb[..., at] - light) / (2 - 2 * weights[at]) for at in (2, 0))
    spans = (219.0, 224.0) if video else (255.0, 254.0)
    stored = np.stack([black + spans[0] * light, 128 + spans[1] * blue, 128 + spans[1] * red], axis=-1)
    tags = [(530, 3, 2, (1, 1), True)]
    if video:
        thousandths = [number for weight in weights for number in (round(weight * 10000), 10000)]
        ends = [number for end in (16, 235, 128, 240, 128, 240) for number in (end, 1)]
        tags += [(529, 5, 3, thousandths, True), (532, 5, 6, ends, True)]
    array, kind = (np.round(rgb * 255), "rgb") if compression == "jpeg" else (np.round(stored), "ycbcr")
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, array.astype(np.uint8), photometric=kind, compression=compression, extratags=tags)
    with tifffile.TiffFile(file) as tiff:
        assert tiff.pages[0].photometric.name == "YCBCR"
    assert np.abs(open_picture(file).color - rgb * 255).mean() < 2
    assert peek(file).colors == "color"


def test_colours_that_are_not_known_are_named(tmp_path: Path) -> None:
    """Not read as gray with two channels more."""
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="icclab")
    with pytest.raises(
        PictureError, match=r"a\.tif is in ICCLAB: known are gray, RGB, palette, CMYK, YCbCr and LAB\.$"
    ):
        open_picture(tmp_path / "a.tif")


def test_structural_tags_are_not_copied(tmp_path: Path, model: CFSR) -> None:
    """What libtiff and tifffile wrote of the old layout is not in the new file; what tells of the picture is."""
    tags = [(315, "s", 0, "someone", True), (33432, "s", 0, "me", True), (50000, "s", 0, "private", True)]
    tifffile.imwrite(
        tmp_path / "in.tif",
        RGB,
        photometric="rgb",
        rowsperstrip=1,
        compression="lzw",
        resolution=(300, 300),
        resolutionunit="inch",
        extratags=tags,
        iccprofile=SRGB,
    )
    restore(tmp_path / "in.tif", model=model).save(tmp_path / "out.tif")
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        page = file.pages[0]
        found = {tag.code: tag.value for tag in page.tags}
        assert (page.imagewidth, page.imagelength, int(page.compression)) == (44, 36, 5)
        assert (found[315], found[33432]) == ("someone", "me")
        assert found[282] == (300, 1)
        assert found[34675] == SRGB
        assert found.keys().isdisjoint({270, 50000})
        assert len(page.dataoffsets) < 36


def test_exif_of_a_tiff(tmp_path: Path, model: CFSR) -> None:
    """Its directories of EXIF and GPS come through, in either byte order and in BigTIFF."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 8
    exif.get_ifd(0x8769).update({0x9003: "2024:01:01 00:00:00", 0xA002: 22, 0xA003: 18})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    Image.fromarray(RGB).save(tmp_path / "in.tif", exif=exif.tobytes())
    picture = restore_picture(open_picture(tmp_path / "in.tif"), model)
    assert picture.size == (44, 36), "turned upright"
    for settings in ({}, {"byteorder": ">"}, {"bigtiff": True}):
        write_picture(dataclasses.replace(picture, settings=settings), tmp_path / "out.tif")
        with Image.open(tmp_path / "out.tif") as image:
            found = image.getexif()
            assert found[0x010F] == "Maker"
            assert found.get(0x0112, 1) == 1
            assert found.get_ifd(0x8769)[0x9003] == "2024:01:01 00:00:00"
            assert (found.get_ifd(0x8769)[0xA002], found.get_ifd(0x8769)[0xA003]) == (36, 44)
            assert tuple(map(float, found.get_ifd(0x8825)[2])) == (1, 2, 3)


# --- what goes beside the pixels


def everything() -> Metadata:
    """Return metadata of every kind."""
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    return Metadata(
        icc_profile=P3,
        exif=exif.tobytes().removeprefix(b"Exif\0\0"),
        xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>',
        iptc=b"\x1c\x02\x50\x00\x02me",
        dpi=(300.0, 150.0),
        text=(("Copyright", "me"), ("parameters", "a tiger 漢字")),
        comment=b"(c) me",
    )


def table() -> dict[str, dict[str, str]]:
    """Read the table of the docs."""
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


SUFFIXES = {"TIFF": "tif", "JPEG": "jpg", "HEIF": "heic", "JPEG2000": "jp2"}


@pytest.mark.parametrize("name", table())
def test_the_table_of_the_docs(name: str, tmp_path: Path) -> None:
    """What is written into a file of each format comes back as the table says."""
    row = table()[name]
    path = tmp_path / f"x.{SUFFIXES.get(name, name.lower())}"
    assert format_of(path) == name
    plain = Picture(color=np.repeat(np.repeat(RGB, 2, 0), 2, 1), metadata=everything())
    write_picture(plain, path, quality=98)
    with Image.open(path) as image:
        assert image.format == name
    found = open_picture(path).metadata
    given = everything()
    assert (found.icc_profile == given.icc_profile) == (row["profile"] == "yes")
    if row["profile"] == "sRGB":
        expected, _ = to_srgb(plain)
        mean = np.abs(open_picture(path).color.astype(float) - expected.color).mean()
        assert mean < (6 if name in ("GIF", "JXL") else 1)
        assert np.abs(plain.color.astype(float) - expected.color).mean() > 4, "they differ"
    for part in ("EXIF", "XMP", "IPTC"):
        assert (getattr(found, part.lower()) is not None) == (row[part] == "yes"), part
    alone = dataclasses.replace(plain, metadata=Metadata(dpi=given.dpi))
    write_picture(alone, path)
    again = open_picture(path).metadata
    if row["resolution"] == "yes":
        assert again.dpi == pytest.approx(given.dpi, abs=0.1)
    elif row["resolution"] == "in EXIF":
        with Image.open(path) as image:
            assert (image.getexif()[0x011A], image.getexif()[0x011B]) == (300, 150)
    else:
        assert again.dpi is None
    for part in ("text", "comment"):
        write_picture(dataclasses.replace(plain, metadata=Metadata(**{part: getattr(given, part)})), path)
        again = open_picture(path).metadata
        words = "parameters: a tiger 漢字" if part == "text" else "(c) me"
        where = {"yes": getattr(again, part), "as comment": again.comment, "in XMP": again.xmp, "as text": again.text}
        if row[part] == "no":
            assert (again.text, again.comment, again.xmp) == ((), None, None)
        elif row[part] == "yes":
            assert where["yes"] == getattr(given, part)
        else:
            assert words in (again.words() + (again.xmp or b"").decode())
    deep = dataclasses.replace(plain, color=np.repeat(np.repeat(RGB16, 2, 0), 2, 1), metadata=Metadata())
    write_picture(deep, path)
    saved = open_picture(path)
    bits = saved.bits or (16 if saved.color.dtype == np.uint16 else 8)
    assert bits == min(int(row["bits"]), 16)
    clear = dataclasses.replace(
        deep, color=plain.color, alpha=np.repeat(np.repeat(ALPHA[..., None], 2, 0), 2, 1), mode="RGBA"
    )
    write_picture(clear, path)
    alpha = open_picture(path).alpha
    if row["transparency"] == "white":
        assert alpha is None
    else:
        assert alpha is not None
        assert len(np.unique(alpha)) > 2 or row["transparency"] == "one"
    moving = dataclasses.replace(plain, duration=70.0, frames=(dataclasses.replace(plain, color=255 - plain.color),))
    write_picture(moving, path)
    again = open_picture(path, every_frame=True)
    assert len(again.frames) == (0 if row["frames"] == "first" else 1)
    if row["frames"] == "animation":
        assert again.duration == 70
    inks = dataclasses.replace(plain, black=plain.color[..., :1], mode="CMYK", metadata=Metadata())
    write_picture(inks, path)
    assert (open_picture(path).black is not None) == ("CMYK" in row["colours"])
    gray = dataclasses.replace(plain, color=plain.color[..., :1], mode="L", metadata=Metadata())
    write_picture(gray, path)
    mode = open_picture(path).mode
    assert (mode in ("L", "P")) == ("gray" in row["colours"]) or name in ("GIF", "AVIF")  # read as colour
    side = int(row["longest side"] or 0)
    assert FORMATS[name].side == (side or FORMATS[name].side)
    if side:
        with pytest.raises(
            PictureError, match=rf"{side + 1}x1 pixels are too many for {name}, which takes {side} a side"
        ):
            write_picture(Picture(color=np.zeros((1, side + 1, 3), np.uint8)), path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "jxl", "heic"])
def test_plain_save_keeps_metadata(suffix: str, tmp_path: Path, model: CFSR) -> None:
    """EXIF says the new size and upright, has whole maker notes; XMP too; the date of the file stays."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    exif.get_ifd(0x8769).update({0x927C: b"notes" * 9, 0xA002: 22, 0xA003: 18})
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6" exif:PixelXDimension="22"/></x:xmpmeta>'
    path = tmp_path / "in.jpg"
    Image.fromarray(RGB).save(path, exif=exif, xmp=xmp, dpi=(300, 300), icc_profile=SRGB, quality=95)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    restored = restore(path, model=model)
    assert restored.size == (36, 44)
    target = tmp_path / f"out.{suffix}"
    restored.save(target)
    assert target.stat().st_mtime == 1_000_000_000
    found = open_picture(target)
    assert found.size == (44, 36)
    assert found.metadata.exif is not None
    told = Image.Exif()
    told.load(found.metadata.exif)
    assert (told[0x010F], told.get(0x0112, 1)) == ("Maker", 1)
    assert told.get_ifd(0x8769)[0x927C] == b"notes" * 9
    assert (told.get_ifd(0x8769)[0xA002], told.get_ifd(0x8769)[0xA003]) == (36, 44)
    assert b'tiff:Orientation="1" exif:PixelXDimension="36"' in (found.metadata.xmp or b"")
    if suffix != "jxl":
        assert found.metadata.icc_profile == SRGB
    restore(path, model=model, strip=True).save(target)
    assert open_picture(target).metadata.exif is None
    assert open_picture(target).metadata.xmp is None
    assert target.stat().st_mtime > 1_500_000_000


def test_the_thumbnail_is_dropped(tmp_path: Path) -> None:
    """An EXIF block as cameras write it: the second directory and its picture are gone, the rest has not moved."""
    thumbnail = b"\xff\xd8" + b"private" * 50 + b"\xff\xd9"
    first = struct.pack("<H", 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x010F, 2, 6, 38)
    second = (
        struct.pack("<H", 2)
        + struct.pack("<HHII", 0x0201, 4, 1, 74)
        + struct.pack("<HHII", 0x0202, 4, 1, len(thumbnail))
    )
    block = b"II*\0\x08\0\0\0" + first + struct.pack("<I", 44) + b"Maker\0" + second + bytes(4) + thumbnail
    picture = Picture(color=RGB, metadata=Metadata(exif=block).resized((36, 44)))
    assert picture.metadata.exif is not None
    assert b"private" not in picture.metadata.exif
    write_picture(picture, tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert dict(image.getexif()) == {0x0112: 1, 0x010F: "Maker"}
        assert not image.getexif().get_ifd(1)
    assert Metadata(exif=b"nonsense").resized((1, 1)).exif is None


def test_what_png_says_of_colour(tmp_path: Path, model: CFSR) -> None:
    """gAMA, cHRM and cICP are copied; in other formats they become a profile, or sRGB; the look stays."""
    light = np.round((WAVES[..., :3] ** 2.2) * 255).astype(np.uint8)
    chrm = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    Image.fromarray(light).save(tmp_path / "in.png", pnginfo=chunked(gAMA=struct.pack(">I", 100000), cHRM=chrm))
    restored = restore(tmp_path / "in.png", model=model)
    restored.save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["gamma"] == 1.0
        assert image.info["chromaticity"] == pytest.approx((0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))
    expected = open_picture(restored.resize((22, 18), Image.Resampling.BOX))
    restored.save(tmp_path / "out.jpg")
    profiled = open_picture(tmp_path / "out.jpg")
    assert profiled.metadata.icc_profile is not None
    restored.save(tmp_path / "out.bmp")
    plain = open_picture(tmp_path / "out.bmp")
    shown, _ = to_srgb(profiled)
    assert np.abs(shown.color.astype(float) - plain.color).mean() < 3
    assert plain.color.mean() > expected.color.mean() + 20
    metadata = Metadata(cicp=(9, 16, 0, 1), light=((b"cLLI", bytes(8)),))
    write_picture(Picture(color=RGB, metadata=metadata), tmp_path / "pq.png")
    restored = restore(tmp_path / "pq.png", model=model)
    restored.save(tmp_path / "out.png")
    data = (tmp_path / "out.png").read_bytes()
    assert b"cICP\x09\x10\x00\x01" in data
    assert b"cLLI" in data
    restored.save(tmp_path / "out.avif")
    assert (tmp_path / "out.avif").read_bytes().count(b"nclx\x00\x09\x00\x10") == 1
    with pytest.warns(UserWarning, match="JPEG: light above white is cut off, colours become sRGB"):
        restored.save(tmp_path / "out.jpg")


def test_sixteen_bit_jxl_is_srgb(tmp_path: Path) -> None:
    """imagecodecs says that deep samples are light; the file that is written says what they are."""
    write_picture(Picture(color=RGB16), tmp_path / "lossy.jxl")
    write_picture(Picture(color=RGB16), tmp_path / "lossless.jxl", quality=100)
    write_picture(Picture(color=RGB16, alpha=ALPHA16[..., None], mode="RGBA"), tmp_path / "alpha.jxl", quality=100)
    write_picture(Picture(color=GRAY16[..., None], mode="I;16"), tmp_path / "gray.jxl", quality=100)
    for name, most in (("lossy", 700), ("lossless", 0), ("alpha", 0), ("gray", 0)):
        found = open_picture(tmp_path / f"{name}.jxl")
        assert found.metadata.icc_profile is not None
        assert b"Lin" not in found.metadata.icc_profile.replace(b"\0", b"")
        expected = GRAY16[..., None] if name == "gray" else RGB16
        assert np.abs(found.color.astype(int) - expected).mean() <= most


def test_a_transparent_deep_colour(tmp_path: Path, model: CFSR) -> None:
    array = RGB16.copy()
    array[4:8, 4:8] = 8071, 10642, 10233
    data = bytes(imagecodecs.png_encode(array))
    place = data.index(b"IDAT") - 4
    content = b"tRNS" + struct.pack(">3H", 8071, 10642, 10233)
    import zlib

    chunk = struct.pack(">I", 6) + content + struct.pack(">I", zlib.crc32(content))
    (tmp_path / "in.png").write_bytes(data[:place] + chunk + data[place:])
    restore(tmp_path / "in.png", model=model).save(tmp_path / "out.png")
    out = open_picture(tmp_path / "out.png")
    assert (out.color.dtype, out.alpha is not None) == (np.uint16, True)
    assert out.alpha is not None
    assert out.alpha[12, 12] == 0
    assert out.alpha[30, 30] == 65535


# --- frames


def frames(alpha: bool) -> list[Image.Image]:
    shifted = [np.roll(RGB, 4 * index, 1) for index in range(4)]
    if not alpha:
        return [Image.fromarray(array) for array in shifted]
    masks = [np.where(np.roll(ALPHA, 4 * index, 1) > 120, 255, 0).astype(np.uint8) for index in range(4)]
    return [Image.fromarray(np.dstack(both)) for both in zip(shifted, masks, strict=True)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.gif", {"duration": [50, 100, 150, 200], "loop": 0}),
        ("clear.gif", {"duration": [50, 100, 150, 200], "loop": 3, "disposal": 2}),
        ("once.gif", {"duration": 70}),
        ("clear.webp", {"duration": [50, 100, 150, 200], "loop": 2, "quality": 90}),
        ("clear.png", {"duration": [50, 100, 150, 200], "loop": 2}),
        ("default.png", {"duration": [100, 150, 200], "loop": 2, "default_image": True}),
        ("x.avif", {"duration": [50, 100, 150, 200], "quality": 90}),
    ],
)
def test_animations(name: str, options: dict[str, Any], tmp_path: Path, model: CFSR) -> None:
    """Every frame is restored, with its time; the number of runs stays, and so does that there is none."""
    images = frames(alpha=name.startswith(("clear", "default")))
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], **options)
    before = open_picture(tmp_path / name, every_frame=True)
    restored: Any = restore(tmp_path / name, model=model)
    assert restored.n_frames == 4
    assert np.asarray(restored.convert("RGB"))[20, 20].tolist() != (
        restored.seek(2) or np.asarray(restored.convert("RGB"))[20, 20].tolist()
    )
    restored.save(tmp_path / f"out{Path(name).suffix}")
    after = open_picture(tmp_path / f"out{Path(name).suffix}", every_frame=True)
    assert len(after.frames) == 3
    assert [frame.duration for frame in (after, *after.frames)] == [
        frame.duration for frame in (before, *before.frames)
    ]
    assert after.loop == before.loop
    for old, new in zip((before, *before.frames), (after, *after.frames), strict=True):
        assert new.size == (36, 44)
        assert (old.alpha is None) == (new.alpha is None)
        seen = np.ones((18, 22, 1), bool) if old.alpha is None else old.alpha > 128
        shrunk = new.color.reshape(18, 2, 22, 2, 3).mean((1, 3))
        assert (np.abs(shrunk - old.color) * seen).mean() < 8


def test_pages(tmp_path: Path, model: CFSR) -> None:
    """Pages of different kinds and sizes come back in order; thumbnails and masks are no pages."""
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        writer.write(RGB, photometric="rgb", metadata=None)
        writer.write(RGB[::4, ::4], photometric="rgb", metadata=None, subfiletype=1)
        writer.write(GRAY16[:9], photometric="minisblack", metadata=None)
    restore(tmp_path / "in.tif", model=model).save(tmp_path / "out.tif")
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert [(page.shape, page.dtype) for page in file.pages] == [((36, 44, 3), np.uint8), ((18, 44), np.uint16)]
    fax = [Image.fromarray(array).convert("1") for array in (GRAY, GRAY[::-1])]
    fax[0].save(tmp_path / "fax.tif", save_all=True, append_images=fax[1:], compression="group4")
    restore(tmp_path / "fax.tif", model=model).save(tmp_path / "out.tif")
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert [(page.shape, int(page.compression), page.bitspersample) for page in file.pages] == [
            ((36, 44), 4, 1)
        ] * 2
    with pytest.warns(UserWarning, match="JPEG: only the first of 2 pages is written"):
        restore(tmp_path / "fax.tif", model=model).save(tmp_path / "out.jpg")
    restore(tmp_path / "in.tif", model=model).save(tmp_path / "first.png")
    assert open_picture(tmp_path / "first.png", every_frame=True).frames == ()


# --- images in Python


def test_changed_images_are_saved_as_they_are(tmp_path: Path, model: CFSR) -> None:
    """What is drawn or put into `info` after the restoration is in the file; a crop is a plain image."""
    (tmp_path / "in.png").write_bytes(bytes(imagecodecs.png_encode(RGB16)))
    restored = restore(tmp_path / "in.png", model=model)
    restored.save(tmp_path / "deep.png")
    assert open_picture(tmp_path / "deep.png").color.dtype == np.uint16
    restored.info["dpi"] = (200, 200)
    restored.save(tmp_path / "dpi.png")
    assert open_picture(tmp_path / "dpi.png").metadata.dpi == pytest.approx((200, 200), abs=0.1)
    assert open_picture(tmp_path / "dpi.png").color.dtype == np.uint16
    restored.putpixel((3, 3), (255, 0, 0))
    restored.save(tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as image:
        assert image.getpixel((3, 3)) == (255, 0, 0)
    assert type(restored.crop((0, 0, 9, 9))) is Image.Image
    buffer = io.BytesIO()
    restored.save(buffer, "JPEG", quality=30)
    assert buffer.getvalue()[:2] == b"\xff\xd8"
    with pytest.raises(PictureError, match="no format names no image format"):
        restored.save(io.BytesIO())


def test_suffixes_are_those_of_the_libraries() -> None:
    known = readable_suffixes()
    assert known > {".jfif", ".jpe", ".avif", ".tga", ".jxl", ".heic", ".apng", ".tif", ".jp2", ".webp", ".psd"}
    assert known.isdisjoint({".pdf", ".mpg", ".h5", ".txt", ".eps"})
    assert format_of("x.psd") is None
    assert re.fullmatch(r"MPO|JPEG", str(format_of("x.mpo")))


def test_raw_files_are_named_as_such(tmp_path: Path) -> None:
    for suffix in (".nef", ".CR3", ".dng"):
        (tmp_path / f"x{suffix}").write_bytes(b"II*\0")
        with pytest.raises(PictureError, match="is a camera's raw file: develop it"):
            open_picture(tmp_path / f"x{suffix}")
    tifffile.imwrite(tmp_path / "cfa.tif", GRAY16, photometric="cfa", metadata=None)
    with pytest.raises(PictureError, match="holds undeveloped sensor data: develop it"):
        open_picture(tmp_path / "cfa.tif")


def test_whatever_a_library_raises_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png")
    for error in (
        struct.error("short"),
        RecursionError("deep"),
        SyntaxError("bad"),
        BaseException("panic"),
        KeyError("k"),
    ):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "load", fail)
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", fail)
        with pytest.raises(PictureError, match=r"x.png is damaged: "):
            open_picture(tmp_path / "x.png")


def test_what_is_damaged_beside_the_pixels_loses_no_picture(tmp_path: Path, model: CFSR) -> None:
    """EXIF that is nonsense, profiles that are, or are for other channels, or larger than Pillow allows."""
    Image.fromarray(RGB).save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff nonsense")
    Image.fromarray(RGB).save(tmp_path / "icc.jpg", icc_profile=b"no profile" * 20)
    Image.fromarray(GRAY).save(tmp_path / "gray.jpg", icc_profile=P3)
    large = P3 + bytes(2**21)
    Image.fromarray(RGB).save(tmp_path / "large.png", icc_profile=large)
    for name in ("exif.jpg", "icc.jpg", "gray.jpg", "large.png"):
        restored = restore(tmp_path / name, model=model)
        for target in (f"out{Path(name).suffix}", "out.bmp"):
            restored.save(tmp_path / target)
            assert open_picture(tmp_path / target).size == (36, 44)


def test_lab_becomes_rgb(tmp_path: Path, model: CFSR) -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(RGB), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.save(tmp_path / "in.tif")
    with pytest.warns(UserWarning, match=r"in.tif is in LAB; it becomes RGB"):
        picture = open_picture(tmp_path / "in.tif")
    assert np.abs(picture.color.astype(int) - RGB).mean() < 2
    restore(tmp_path / "in.tif", model=model).save(tmp_path / "out.tif")
    assert open_picture(tmp_path / "out.tif").size == (36, 44)


def test_what_telephones_put_behind_a_picture(tmp_path: Path) -> None:
    """The words of XMP that tell of a gain map or a video go with these; the first picture is restored."""
    xmp = b'<x><r GCamera:MotionPhoto="1" hdrgm:Version="1.0" xmp:Rating="5"/>'
    xmp += b"<Container:Directory><a/></Container:Directory></x>"
    Image.fromarray(RGB).save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[Image.fromarray(GRAY)], xmp=xmp)
    with pytest.warns(UserWarning, match="what a telephone put behind the picture .gain map, video. is left out"):
        picture = open_picture(tmp_path / "x.jpg", every_frame=True)
    assert (picture.format, picture.frames) == ("JPEG", ())
    assert picture.metadata.xmp == b'<x><r xmp:Rating="5"/></x>'
    Image.fromarray(RGB).save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[Image.fromarray(GRAY)])
    with pytest.warns(UserWarning, match="holds 2 pictures; the first is used"):
        open_picture(tmp_path / "x.jpg", every_frame=True)
    assert Metadata(xmp=xmp).resized((1, 1)).xmp == b'<x><r xmp:Rating="5"/></x>'


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif", "jxl", "heic", "gif", "jp2", "bmp", "tga"])
def test_one_pixel(suffix: str, tmp_path: Path, model: CFSR) -> None:
    Image.new("RGB", (1, 1), (90, 120, 200)).save(tmp_path / f"in.{suffix}")
    restore(tmp_path / f"in.{suffix}", model=model).save(tmp_path / f"out.{suffix}")
    assert open_picture(tmp_path / f"out.{suffix}").size == (2, 2)


def test_a_restored_image_is_restored_again(tmp_path: Path, model: CFSR) -> None:
    """It shows 8 bits and one frame, and hands on all that it holds."""
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(RGB16))
    once = restore(tmp_path / "deep.png", model=model)
    twice = restore(once, model=model)
    assert twice.picture.color.dtype == np.uint16
    assert np.array_equal(twice.picture.color, restore_picture(once.picture, model).color)
    frames = [Image.fromarray(np.roll(RGB, shift, 1)) for shift in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=[50, 60, 70], loop=0)
    moving = restore(tmp_path / "x.gif", model=model)
    assert restore(moving, model=model).n_frames == 3
    assert open_picture(moving).frames == ()
    once.putpixel((0, 0), (1, 2, 3))  # what was changed since holds
    assert open_picture(once).color[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("head", [b"P6 22 18 1023\n", b"P6\n# of 65535\n22 #w\n18\n1023 "])
def test_a_deep_ppm_says_its_peak(head: bytes, tmp_path: Path) -> None:
    """Also where a comment stands before it, or the pixels look like one."""
    pixels = np.round(WAVES[..., :3] * 1023).astype(np.uint16)
    pixels[0, :, 0] = 0x0123  # ends in "#"
    (tmp_path / "x.ppm").write_bytes(head + pixels.astype(">u2").tobytes() + b"\n")
    picture = open_picture(tmp_path / "x.ppm")
    assert np.array_equal(picture.color, np.round(pixels * (65535 / 1023)).astype(np.uint16))


# --- damage


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_no_page_is_lost_in_silence(compression: str | None, tmp_path: Path) -> None:
    """A TIFF that was cut off is damaged, wherever: its pages before that are not taken for all."""
    whole = tmp_path / "x.tif"
    with tifffile.TiffWriter(whole) as writer:
        for rows in (18, 17, 16):
            writer.write(RGB[:rows], photometric="rgb", metadata=None, compression=compression)
    data = whole.read_bytes()
    assert len(open_picture(whole, every_frame=True).frames) == 2
    for cut in range(1, len(data) // 2, 40):
        whole.write_bytes(data[:-cut])
        with pytest.raises(PictureError, match=r"x.tif is damaged"):
            open_picture(whole, every_frame=True)


def test_pages_that_only_pillow_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tifffile does not know comes from Pillow, with every page."""
    pages = [Image.fromarray(RGB), Image.fromarray(GRAY[:9])]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])

    def unknown(*_: Any) -> Any:
        raise NotImplementedError("old JPEG")

    monkeypatch.setattr("zoo.pictures.read.read_tiff", unknown)
    picture = open_picture(tmp_path / "x.tif", every_frame=True)
    assert [(page.mode, page.size) for page in (picture, *picture.frames)] == [("RGB", (18, 22)), ("L", (9, 22))]


def test_all_pages_count(tmp_path: Path) -> None:
    """A small first page does not hide large ones behind it from the bound on pixels."""
    pages = [Image.new("L", (2, 2)), *[Image.new("L", (40, 30))] * 3]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert peek(tmp_path / "x.tif").pixels == 3604
    for look in (peek, lambda path, most: open_picture(path, every_frame=True, max_pixels=most)):
        with pytest.raises(PictureError, match="its 4 frames of up to 40x30 pixels are more than 3000"):
            look(tmp_path / "x.tif", 3000)
    assert open_picture(tmp_path / "x.tif", max_pixels=3000).size == (2, 2)


def with_chunk(name: bytes, content: bytes, check: bool = True) -> bytes:
    """Return a PNG with one more chunk behind its head."""
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG")
    data = file.getvalue()
    end = struct.pack(">I", zlib.crc32(name + content) if check else 1)
    return data[:33] + struct.pack(">I", len(content)) + name + content + end + data[33:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (b"tRNS", b"\0"),
        (b"gAMA", b"\1"),
        (b"gAMA", bytes(4)),
        (b"cHRM", bytes(32)),
        (b"cHRM", bytes(4)),
        (b"pHYs", b"\1"),
        (b"pHYs", b"\xff" * 8 + b"\1"),
        (b"sRGB", b""),
        (b"iCCP", b""),
        (b"zTXt", b"k\0\5x"),
        (b"acTL", b"\0"),
        (b"tEXt", b"k\0wrong check sum"),
    ],
)
def test_damaged_chunks_lose_no_picture(name: bytes, content: bytes, tmp_path: Path) -> None:
    """What PNG allows readers to ignore is ignored where it is damaged, in every format of the result."""
    file = tmp_path / "x.png"
    file.write_bytes(with_chunk(name, content, check=b"wrong" not in content))
    assert peek(file).size == (18, 22)
    picture = open_picture(file)
    assert np.array_equal(picture.planes(), RGB)
    for suffix in (".png", ".jpg", ".tif", ".gif"):
        write_picture(picture, tmp_path / f"out{suffix}")
        assert peek(tmp_path / f"out{suffix}").size == (18, 22)


def test_damaged_pixels_stay_damage(tmp_path: Path) -> None:
    """Leaving out what is beside the pixels hides nothing of theirs."""
    data = bytearray(with_chunk(b"pHYs", b"\1"))
    data[data.index(b"IDAT") + 20] ^= 255
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(PictureError, match=r"x\.png is"):
        open_picture(tmp_path / "x.png")


def test_damaged_exif_is_said(tmp_path: Path) -> None:
    """One remark that names the file, and none of Pillow's own."""
    Image.fromarray(RGB).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peek(tmp_path / "x.jpg")
        open_picture(tmp_path / "x.jpg")
    said = [str(warning.message) for warning in caught]
    assert said == [f"{tmp_path / 'x.jpg'}: its EXIF is damaged and left out."]


def test_a_lossless_animation_stays_lossless(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(RGB, shift, 1)) for shift in range(3)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True, duration=50)
    picture = open_picture(tmp_path / "x.webp", every_frame=True)
    write_picture(picture, tmp_path / "y.webp")
    again = open_picture(tmp_path / "y.webp", every_frame=True)
    for one, other in zip((picture, *picture.frames), (again, *again.frames), strict=True):
        assert np.array_equal(one.color, other.color)


def test_the_first_of_a_deep_animated_jxl(tmp_path: Path) -> None:
    (tmp_path / "x.jxl").write_bytes(imagecodecs.jpegxl_encode(np.stack([RGB16] * 3), lossless=True))
    with pytest.warns(UserWarning, match="has 3 frames; only the first is used"):
        picture = open_picture(tmp_path / "x.jxl", every_frame=True)
    assert np.array_equal(picture.planes(), RGB16)


@pytest.mark.parametrize("info", [{"标题": "x"}, {"": "x"}, {"k" * 99: "v"}, {"a\0b": "\ud800"}, {"dpi": [300, 300]}])
def test_any_text_is_written(info: dict[str, Any], tmp_path: Path, model: CFSR) -> None:
    """Keys that PNG does not take, halves of characters, and lists for pairs come from programs."""
    image = Image.fromarray(RGB)
    image.info |= info
    result = restore(image, model=model)
    for suffix in (".png", ".jpg", ".tif", ".webp"):
        result.save(tmp_path / f"out{suffix}")
    found = open_picture(tmp_path / "out.png").metadata
    assert found.text or round(found.dpi[0]) == 300
