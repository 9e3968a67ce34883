"""TIFF in and out, of every common kind; which tags are copied is said here one by one, structural ones never are."""

from __future__ import annotations

import dataclasses
import io
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO, Literal

import numpy as np
import tifffile
from PIL import Image, TiffImagePlugin

from zoo.pictures.metadata import Metadata, plausible
from zoo.pictures.picture import Array, Picture, PictureError
from zoo.pictures.remarks import pillow_silenced

__all__ = ["encode_tiff", "goes_on", "is_tiff", "pages_of", "read_tiff", "samples_of", "to_unit"]

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _SEPARATED, _YCBCR = 0, 1, 2, 3, 5, 6
_NAMES = {"CFA": "undeveloped sensor data", "LINEAR_RAW": "undeveloped sensor data", "CIELAB": "LAB"}
_READ = ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "MASK", "SEPARATED", "YCBCR")
# Make, model, software, date, artist, copyright, ratings, and what Windows adds: told of the picture, not of the file.
_TOLD = (271, 272, 305, 306, 315, 33432, 18246, 18249, 40091, 40092, 40093, 40094, 40095)
_EXIF, _GPS = 34665, 34853
_KEPT_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946, 34925, 50000)  # none, LZW, JPEG, Deflate, PackBits, Deflate, LZMA, Zstd
_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)
_FAX = (2, 3, 4)
_PILLOW_COMPRESSIONS = {"raw": 1, "tiff_lzw": 5, "jpeg": 7, "tiff_adobe_deflate": 8, "tiff_deflate": 8}
_PILLOW_COMPRESSIONS |= {"packbits": 32773, "zstd": 50000, "lzma": 34925, "group3": 3, "group4": 4, "tiff_ccitt": 2}


def is_tiff(head: bytes) -> bool:
    """Tell whether a file that begins so is a TIFF or a BigTIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def pages_of(tiff: tifffile.TiffFile) -> list[Any]:
    """Return the pages that are pictures of their own: no thumbnails, reduced versions and masks."""
    pages: list[Any] = [tiff.pages[index] for index in range(len(tiff.pages))]
    own = [page for page in pages if not int(getattr(page, "subfiletype", 0) or 0) & 5]
    return own or pages[:1]


def goes_on(tiff: tifffile.TiffFile) -> bool:
    """Tell whether the last page that is there says that another one follows: the file was cut off."""
    form, handle, last = tiff.tiff, tiff.filehandle, tiff.pages[len(tiff.pages) - 1]
    handle.seek(last.offset)
    (count,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    handle.seek(count * form.tagsize, 1)
    following = handle.read(form.offsetsize)
    return len(following) < form.offsetsize or struct.unpack(form.offsetformat, following)[0] != 0


def samples_of(photometric: int) -> int:
    """Return how many samples of a pixel are its colour; further ones are opacity, or unknown."""
    return {_SEPARATED: 4, _RGB: 3, _YCBCR: 3}.get(photometric, 1)


def read_tiff(file: str | BinaryIO, name: str, every_page: bool) -> list[Picture]:
    """Read the pages of a TIFF.

    Args:
        file: Path, or an open file.
        name: For messages.
        every_page: False reads the first alone.

    Raises:
        PictureError: It is undeveloped sensor data or a volume, or its values are no numbers.
        Exception: Of tifffile, where it is damaged or of an unknown kind.
    """
    with tifffile.TiffFile(file) as tiff:
        pages = pages_of(tiff)
        pictures = [_read_page(page, tiff, name) for page in (pages if every_page else pages[:1])]
        exif = _exif(file)
    pictures[0] = dataclasses.replace(pictures[0], metadata=dataclasses.replace(pictures[0].metadata, exif=exif))
    return pictures


def _read_page(page: Any, tiff: tifffile.TiffFile, name: str) -> Picture:
    photometric = getattr(page.photometric, "name", str(page.photometric))
    if photometric in _NAMES or 50706 in page.tags:  # the version of a DNG
        kind = _NAMES.get(photometric, "undeveloped sensor data")
        if kind == "LAB":
            raise NotImplementedError(f"{name} is in LAB")  # Pillow reads it
        raise PictureError(f"{name} holds {kind}: develop it with a raw converter first.")
    if photometric not in _READ:
        raise PictureError(f"{name} is in {photometric}: known are gray, RGB, palette, CMYK, YCbCr and LAB.")
    array = np.asarray(page.asarray())
    axes = page.axes
    if axes == "SYX":
        array = array.transpose(1, 2, 0)
    elif axes == "YX":
        array = array[..., None]
    elif axes != "YXS":
        raise PictureError(f"{name} is a volume ({axes}), not a picture.")
    bits = int(max(page.bitspersample) if isinstance(page.bitspersample, tuple) else page.bitspersample)
    values: tuple[float, float, str] | None = None
    settings: dict[str, Any] = {"compression": int(page.compression), "byteorder": tiff.byteorder}
    settings |= {"bigtiff": bool(tiff.is_bigtiff), "planar": axes == "SYX"}
    if 33550 in page.tags or 34264 in page.tags:  # the scale or the transformation of a GeoTIFF
        settings["place"] = True
    if page.is_tiled:
        settings["tile"] = (page.tilelength, page.tilewidth)
    number = int(page.photometric)
    if number == _PALETTE:
        table = np.asarray(page.colormap)
        table = (table >> 8 if table.max() > 255 else table).astype(np.uint8)
        color = np.moveaxis(table[:, array[..., 0]], 0, -1)
        return Picture(color=color, mode="P", format="TIFF", settings=settings, metadata=_metadata(page), name=name)
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype in (np.uint8, np.uint16):
        most = 255 if array.dtype == np.uint8 else 65535
        if (1 << bits) - 1 != most:
            array = np.round(array.astype(np.float64) * (most / ((1 << bits) - 1))).astype(array.dtype)
    else:
        array, values = to_unit(array, name)
    own = samples_of(number)
    if number == _SEPARATED and array.shape[2] < 4:
        raise PictureError(f"{name} has {array.shape[2]} inks; known are four, CMYK.")
    if number == _YCBCR and array.dtype not in (np.uint8, np.uint16):
        raise PictureError(f"{name} has YCbCr in {page.dtype}: known are 8 and 16 bits.")
    color, extra = array[..., :own], array[..., own:]
    peak = 1.0 if array.dtype == np.float32 else float(np.iinfo(array.dtype).max)
    alpha: Array | None = None
    if extra.shape[2]:
        samples = [int(sample) for sample in page.extrasamples] or [0]
        place = next((index for index, sample in enumerate(samples) if sample in (1, 2)), 0)
        alpha, settings["extrasample"] = extra[..., place : place + 1], samples[place]
        if array.dtype == np.float32:
            alpha = alpha.clip(0, 1)
        if samples[place] == 1:  # colour was multiplied by opacity
            shown = alpha.astype(np.float64) / peak
            divided = color / np.where(shown > 0, shown, 1)
            color = np.where(shown > 0, divided, color).clip(0, peak)
            color = (color if peak == 1 else np.round(color)).astype(array.dtype)
        if extra.shape[2] > 1:
            settings["dropped"] = extra.shape[2] - 1
    if number == _WHITE_IS_ZERO:
        color = (1 - color if peak == 1 else np.iinfo(color.dtype).max - color).astype(color.dtype)
    if number == _YCBCR and int(page.compression) in _LOSSLESS:  # decoders of JPEG give RGB
        color = _from_ycbcr(color, page, peak, (1 << bits) - 1)
    black = None
    if number == _SEPARATED:
        color = (1 - color if peak == 1 else np.iinfo(color.dtype).max - color).astype(color.dtype)
        color, black = color[..., :3], color[..., 3:]
        mode = "CMYK"
    elif own == 3:
        mode = "RGBA" if alpha is not None else "RGB"
    elif alpha is not None:
        mode = "LA"
    else:
        mode = "1" if bits == 1 else "L" if peak == 255 else "F" if peak == 1 else "I;16"
    return Picture(
        color=np.ascontiguousarray(color),
        black=black,
        alpha=alpha,
        mode=mode,
        bits=bits if bits in (10, 12, 14) else None,
        values=values,
        metadata=_metadata(page),
        format="TIFF",
        settings=settings,
        name=name,
    )


def _from_ycbcr(color: Array, page: Any, peak: float, most: int) -> Array:
    """Return RGB of (H, W, 3) in YCbCr, as section 21 of TIFF 6.0 says, with the page's coefficients and range.

    Args:
        color: Integers from 0 to `peak`.
        page: Of tifffile.
        peak: 255 or 65535.
        most: What `peak` is in the file.
    """

    def numbers(tag: int, usual: Sequence[float]) -> Array:
        value = page.tags[tag].value if tag in page.tags else ()
        if len(value) == 2 * len(usual):  # fractions
            value = [above / below if below else 0 for above, below in zip(value[::2], value[1::2], strict=True)]
        return np.asarray(value if len(value) == len(usual) else usual, np.float64)

    red, green, blue = numbers(529, (0.299, 0.587, 0.114))
    middle = (most + 1) / 2
    ends = numbers(532, (0, most, middle, most, middle, most)).reshape(3, 2) * (peak / most)
    spans, full = ends[:, 1] - ends[:, 0], np.array([peak, peak // 2, peak // 2])
    if not (spans > 0).all() or green <= 0:
        raise PictureError(f"The range or the coefficients of YCbCr in {page.parent.filename} are no numbers above 0.")
    y, cb, cr = np.moveaxis((color - ends[:, 0]) * full / spans, -1, 0)
    r, b = y + (2 - 2 * red) * cr, y + (2 - 2 * blue) * cb
    g = (y - red * r - blue * b) / green
    return np.round(np.stack([r, g, b], axis=-1)).clip(0, peak).astype(color.dtype)


def to_unit(array: Array, name: str) -> tuple[Array, tuple[float, float, str] | None]:
    """Bring values of any range to float32 from 0 to 1, and return least, largest and dtype where that is a change.

    Raises:
        PictureError: They are not all finite.
    """
    dtype = np.dtype(array.dtype)
    if dtype.kind == "c" or not np.isfinite(low := float(array.min())) or not np.isfinite(high := float(array.max())):
        what = "complex" if dtype.kind == "c" else "no finite"
        raise PictureError(f"{name} has pixels that are {what} numbers.")
    if dtype.kind == "f" and low >= 0 and high <= 1:
        return array.astype(np.float32), None if dtype == np.float32 else (0.0, 1.0, dtype.name)
    high = high if high > low else low + 1
    return ((array.astype(np.float64) - low) / (high - low)).astype(np.float32), (low, high, dtype.name)


def _metadata(page: Any) -> Metadata:
    def value(tag: int) -> Any:
        return page.tags[tag].value if tag in page.tags else None

    dpi = None
    if value(282) and value(283) and int(value(296) or 2) in (2, 3):
        inch = 2.54 if int(value(296) or 2) == 3 else 1.0
        across, down = (v[0] / v[1] * inch if v[1] else 0.0 for v in (value(282), value(283)))
        dpi = plausible(across, down)
    description = str(value(270) or "")
    if description.startswith(('{"shape"', "ImageJ=", "SCIFIO=")) or "<OME" in description:
        description = ""  # tells how the file is laid out
    iptc = _bytes(page, 33723)
    return Metadata(
        icc_profile=_bytes(page, 34675),
        xmp=_bytes(page, 700),
        iptc=iptc or _from_photoshop(_bytes(page, 34377) or b""),
        dpi=dpi,
        comment=description.encode() or None,
    )


def _bytes(page: Any, tag: int) -> bytes | None:
    """Return the value of a tag as it stands in the file."""
    if tag not in page.tags:
        return None
    entry = page.tags[tag]
    handle = page.parent.filehandle
    handle.seek(entry.valueoffset)
    return bytes(handle.read(entry.valuebytecount)) or None


def _from_photoshop(block: bytes) -> bytes | None:
    """Return the IPTC records among Photoshop's resources."""
    place = 0
    while block[place : place + 4] == b"8BIM" and place + 12 <= len(block):
        (number,) = struct.unpack(">H", block[place + 4 : place + 6])
        place += 6 + (block[place + 6] // 2 + 1) * 2
        (length,) = struct.unpack(">I", block[place : place + 4])
        if number == 0x0404:
            return block[place + 4 : place + 4 + length]
        place += 4 + length + length % 2
    return None


def _exif(file: str | BinaryIO) -> bytes | None:
    """Return an EXIF block of what the first page tells of the picture."""
    out = Image.Exif()
    try:
        if not isinstance(file, str):
            file.seek(0)
        with pillow_silenced(), Image.open(file) as image:
            found = image.getexif()
            for tag in _TOLD:
                if tag in found:
                    out[tag] = found[tag]
            for tag in (_EXIF, _GPS):
                if directory := found.get_ifd(tag):
                    out[tag] = dict(directory)
        return out.tobytes().removeprefix(b"Exif\0\0") if len(out) else None
    except Exception:  # a kind that Pillow does not know: nothing but this is lost
        return None


def encode_tiff(pictures: Sequence[Picture], quality: int, compression: str | None = None) -> bytes:
    """Return a TIFF file of one or several pages.

    Args:
        pictures: Pages; how the first one was written (compression, tiles, byte order, planes) is how these are.
        quality: Of JPEG compression.
        compression: Pillow's name of another one.
    """
    settings = pictures[0].settings
    kind = int(settings.get("compression", 8))
    if compression is not None:
        kind = _PILLOW_COMPRESSIONS.get(compression, 8)
    if kind in _FAX and all(picture.mode == "1" for picture in pictures):
        return _encode_fax(pictures, {2: "tiff_ccitt", 3: "group3", 4: "group4"}[kind])
    size = sum(picture.planes().nbytes for picture in pictures)
    order: Literal["<", ">"] = ">" if settings.get("byteorder") == ">" else "<"
    file = io.BytesIO()
    big = bool(settings.get("bigtiff")) or size > 2**32 - 2**25
    with tifffile.TiffWriter(file, bigtiff=big, byteorder=order) as writer:
        for index, picture in enumerate(pictures):
            _write_page(writer, picture, kind, quality, first=index == 0)
    return _with_exif(file, pictures[0].metadata.exif, order, big)


def _write_page(writer: tifffile.TiffWriter, picture: Picture, kind: int, quality: int, first: bool) -> None:
    settings, metadata = picture.settings, picture.metadata
    options: dict[str, Any] = {"metadata": None, "software": False, "iccprofile": metadata.icc_profile}
    array = picture.planes()
    peak = picture.peak
    if picture.mode == "P" and picture.alpha is None and array.dtype == np.uint8:
        palette = Image.fromarray(array).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        table = np.zeros((256, 3), np.uint16)
        colors = np.array(palette.getpalette(), np.uint16).reshape(-1, 3)[:256]
        table[: len(colors)] = colors * 257
        array, options["colormap"], options["photometric"] = np.asarray(palette)[..., None], table.T, "palette"
    elif picture.black is not None:
        inks = array[..., :4]
        inks = (1 - inks if peak == 1 else np.iinfo(array.dtype).max - inks).astype(array.dtype)
        array = np.concatenate([inks, array[..., 4:]], axis=2)
        options["photometric"] = "separated"
    else:
        options["photometric"] = "rgb" if picture.color.shape[2] == 3 else "minisblack"
    if picture.alpha is not None:
        sample = int(settings.get("extrasample", 2))
        options["extrasamples"] = [sample]
        if sample == 1:
            shown = picture.alpha.astype(np.float64) / peak
            array = array.astype(np.float64)
            array[..., :-1] *= shown
            array = (array if peak == 1 else np.round(array)).astype(picture.color.dtype)
    if picture.mode == "1":
        array = array >= 128
    elif picture.values is not None:
        low, high, dtype = picture.values
        array = array.astype(np.float64)
        own = array[..., : array.shape[2] - (picture.alpha is not None)]
        own[...] = own * (high - low) + low
        array = (np.round(array) if np.dtype(dtype).kind != "f" else array).astype(dtype)
    kind = kind if kind in _KEPT_COMPRESSIONS else 8
    if kind == 7 and (array.dtype != np.uint8 or picture.alpha is not None or "colormap" in options):
        kind = 8
    if kind == 7:
        options |= {"compression": "jpeg", "compressionargs": {"level": quality}}
        if options["photometric"] == "rgb":
            options["subsampling"] = (1, 1)
    elif kind != 1:
        options["compression"] = kind
        if kind in (5, 8, 32946, 50000) and array.dtype in (np.uint8, np.uint16) and "colormap" not in options:
            options["predictor"] = True
    tile = settings.get("tile")
    if tile and all(side % 16 == 0 for side in tile):
        options["tile"] = tuple(tile)
    if array.shape[2] == 1:
        array = array[..., 0]
    elif settings.get("planar") and kind != 7:
        array, options["planarconfig"] = np.ascontiguousarray(array.transpose(2, 0, 1)), "separate"
    else:
        options["planarconfig"] = "contig"
    if metadata.dpi is not None:
        options |= {"resolution": metadata.dpi, "resolutionunit": "inch"}
    if words := metadata.words():
        options["description"] = words.encode("utf-8")
    options["extratags"] = _tags(metadata, first)
    writer.write(np.ascontiguousarray(array), **options)


def _tags(metadata: Metadata, first: bool) -> list[tuple[int, str | int, int, Any, bool]]:
    """Return XMP, IPTC, what EXIF tells, and a place for the directories that EXIF has."""
    tags: list[tuple[int, str | int, int, Any, bool]] = []
    if metadata.xmp is not None:
        tags.append((700, 1, len(metadata.xmp), metadata.xmp, True))
    if metadata.iptc is not None:
        tags.append((33723, 7, len(metadata.iptc), metadata.iptc, True))
    if metadata.exif is not None and first:
        exif = Image.Exif()
        exif.load(metadata.exif)
        for tag in _TOLD:
            value = exif.get(tag)
            if isinstance(value, str) and value:
                text = value.encode("utf-8")
                tags.append((tag, 2, len(text) + 1, text, True))
            elif isinstance(value, bytes) and value:
                tags.append((tag, 1, len(value), value, True))
            elif isinstance(value, int):
                tags.append((tag, 3, 1, value & 0xFFFF, True))
        # tifffile does not write these tags: their neighbours, which nothing uses, are renamed afterwards
        tags += [(tag + 1, 4, 1, 0, True) for tag in (_EXIF, _GPS) if exif.get_ifd(tag)]
    return tags


def _with_exif(file: io.BytesIO, block: bytes | None, order: str, big: bool) -> bytes:
    """Append the directories of EXIF and GPS, and point to them."""
    if block is None:
        return file.getvalue()
    exif = Image.Exif()
    exif.load(block)
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    for tag in (_EXIF, _GPS):
        entries = exif.get_ifd(tag)
        if not entries:
            continue
        with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
            entry: Any = tiff.pages[0].tags[tag + 1]  # type: ignore[union-attr]
            code, place = entry.offset, entry.valueoffset
        offset = file.seek(0, io.SEEK_END)
        file.write(bytes(offset % 2))
        offset += offset % 2
        directory = TiffImagePlugin.ImageFileDirectory_v2(
            mark + (b"\x08\0\0\0\0\0\0\0\0\0\0\0" if big else bytes(4)), group=tag
        )
        for key, value in entries.items():
            if not isinstance(value, dict):  # the interoperability directory
                directory[key] = value
        file.write(directory.tobytes(offset))
        file.seek(place)
        file.write(struct.pack(order + "I", offset))
        file.seek(code)
        file.write(struct.pack(order + "H", tag))
    return file.getvalue()


def _encode_fax(pictures: Sequence[Picture], compression: str) -> bytes:
    """Return 1-bit pages in the compressions of facsimile, which tifffile does not write."""
    images = [Image.fromarray(picture.color[..., 0] >= 128) for picture in pictures]
    metadata, told = pictures[0].metadata, TiffImagePlugin.ImageFileDirectory_v2()
    for tag, _, _, value, _ in _tags(dataclasses.replace(metadata, exif=None), first=False):
        told[tag] = value
    if words := metadata.words():
        told[270] = words
    options: dict[str, Any] = {"compression": compression, "tiffinfo": told}
    if metadata.dpi is not None:
        options["dpi"] = metadata.dpi
    if metadata.exif is not None:
        exif = Image.Exif()
        exif.load(metadata.exif)
        options["exif"] = exif
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    file = io.BytesIO()
    images[0].save(file, "TIFF", **options)
    return file.getvalue()
