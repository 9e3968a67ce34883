"""Pictures of any kind out, whole or not at all; what a format cannot hold is converted, and said."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image

from zoo.files import whole
from zoo.pictures import containers, png
from zoo.pictures.color import has_meaning, is_hdr, profile_of, to_srgb
from zoo.pictures.formats import FORMATS, Format, Kind, format_of, load_plugins, losses, too_large
from zoo.pictures.image import is_path, plain_image, to_bytes
from zoo.pictures.metadata import Metadata, description_xmp, has_resolution, resolution_exif
from zoo.pictures.picture import Picture, PictureError
from zoo.pictures.tiff import encode_tiff

__all__ = ["encode", "kept_frames", "kind_of", "write_image", "write_picture"]

_PALETTES = ("PNG", "GIF", "TIFF", "BMP", "TGA", "PCX")  # formats with a palette
_BILEVEL = ("PNG", "TIFF", "BMP", "PPM", "TGA", "MSP", "XBM", "PCX")
_LONGEST_MARKER = 65533  # bytes of a marker of a JPEG
_QUALITY = 95


def kind_of(picture: Picture) -> Kind:
    """Return what kind of picture this is, as `peek` does for a file."""
    bits = picture.bits or (
        32 if picture.peak == 1 else 16 if picture.peak == 65535 else 1 if picture.mode == "1" else 8
    )
    return Kind(
        format=picture.format or "",
        size=picture.size,
        colors="cmyk" if picture.black is not None else "gray" if picture.color.shape[2] == 1 else "color",
        alpha=picture.alpha is not None,
        bits=bits,
        frames=1 + len(picture.frames),
        pixels=sum(math.prod(page.size) for page in (picture, *picture.frames)),
    )


def write_picture(picture: Picture, path: str | Path, quality: int = _QUALITY, **options: Any) -> None:
    """See `Picture.save`.

    Args:
        picture: What is written.
        path: Target.
        quality: Of formats that lose some.
        **options: Of Pillow's, for the format.
    """
    path = Path(path)
    name = format_of(path)
    if name is None:
        raise PictureError(f"Cannot write {path.name}: {path.suffix or 'no suffix'} names no image format.")
    if path.suffix.lower() in (".j2k", ".j2c", ".jpc"):
        options.setdefault("no_jp2", True)
    try:
        path.parent.stat()  # missing folders are a mistake, not made
        data = encode(picture, name, quality, options)
        with whole(path) as temporary:
            temporary.write_bytes(data)
        if picture.metadata.times is not None:
            os.utime(path, ns=picture.metadata.times)
    except PictureError as error:
        raise PictureError(f"Cannot write {path}: {error}") from error
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # encoders raise what they like
        raise PictureError(f"Cannot write {path}: {error or type(error).__name__}") from error


def write_image(picture: Picture, fp: Any, name: str | None, params: Mapping[str, Any]) -> None:
    """Write as `Image.save` does, with its arguments."""
    options = dict(params)
    quality = options.pop("quality", _QUALITY)
    load_plugins()
    if is_path(fp) and (name is None or format_of(fp) == name.upper()):
        write_picture(picture, fp, quality, **options)
        return
    known = (name or format_of(getattr(fp, "name", "") or "") or "").upper()
    if known not in Image.SAVE:
        raise PictureError(f"Cannot write the picture: {name or 'no format'} names no image format.")
    data = encode(picture, known, quality, options)
    if is_path(fp):
        with whole(fp) as temporary:
            temporary.write_bytes(data)
    else:
        fp.write(data)


def encode(picture: Picture, name: str, quality: int, options: Mapping[str, Any] | None = None) -> bytes:
    """Return a picture, with its frames, as a file of a format.

    Args:
        picture: What is written.
        name: Pillow's name of the format.
        quality: Of formats that lose some.
        options: Of Pillow's, for the format.

    Raises:
        PictureError: It is too large for the format, or the format's library refuses it.
    """
    reason = too_large(picture.size, name)
    if reason is not None:
        raise PictureError(reason)
    said = losses(kind_of(picture), name)
    holds = FORMATS.get(name, Format(alpha="none"))
    frames = [dataclasses.replace(picture, frames=()), *kept_frames(picture, name)]
    animated = len(frames) > 1 and holds.frames == "animation"
    fitted = [_fitted(frame, name, holds, said, animated) for frame in frames]
    metadata = _placed(fitted[0].metadata, name, holds, said)
    fitted[0] = dataclasses.replace(fitted[0], metadata=metadata)
    given = dict(options or {})
    if name == "TIFF":
        data = encode_tiff(fitted, quality, given.get("compression"))
    else:
        data = _ENCODERS.get(name, _other)(fitted, name, quality, given)
    if said:
        warnings.warn(f"{name}: {', '.join(dict.fromkeys(said))}.", stacklevel=4)
    return data


def kept_frames(picture: Picture, name: str) -> tuple[Picture, ...]:
    """Return the frames after the first that a format, of Pillow's name, can hold: all or none."""
    holds = FORMATS.get(name, Format(alpha="none")).frames
    return picture.frames if holds == "pages" or (holds == "animation" and picture.duration is not None) else ()


def _fitted(picture: Picture, name: str, holds: Format, said: list[str], animated: bool) -> Picture:
    """Convert the pixels to what a format can hold."""
    metadata = picture.metadata
    if picture.black is not None and "cmyk" not in holds.colors:
        picture, _ = to_srgb(picture)
    metadata = picture.metadata
    gray_profile = metadata.icc_profile is not None and metadata.icc_profile[16:20] == b"GRAY"
    if name == "JXL" and picture.peak != 255 and containers.says_linear(metadata.icc_profile):
        pass  # it is written as light
    elif (not holds.icc and (metadata.icc_profile or has_meaning(metadata))) or (
        gray_profile and "gray" not in holds.colors
    ):
        picture, what = to_srgb(picture)
        said += [what] if what else []
    elif name not in ("PNG",) and has_meaning(metadata) and not (name == "AVIF" and metadata.cicp is not None):
        if is_hdr(metadata):
            picture, what = to_srgb(picture)
            said += [what] if what else []
        else:
            profile = profile_of(metadata, picture.color.shape[2] == 1)
            plain = dataclasses.replace(metadata, icc_profile=profile, gamma=None, chromaticity=None, cicp=None)
            picture = dataclasses.replace(picture, metadata=plain)
    if picture.alpha is not None and holds.alpha == "none":
        picture = _on_white(picture)
    most = 8 if animated else holds.bits
    if name != "TIFF" and picture.values is not None and not (name in ("PFM",) and picture.mode == "F"):
        low, high, _ = picture.values
        said.append(f"values from {low:g} to {high:g} fill the range of the format")
        picture = dataclasses.replace(picture, values=None)
    if picture.peak == 1 and most < 32:
        deep: dict[str, Any] = {part: _scaled(getattr(picture, part), 65535) for part in _PARTS}
        mode = "I;16" if picture.mode == "F" else picture.mode
        picture = dataclasses.replace(picture, mode=mode, **deep)
    if picture.peak == 65535 and most == 8:
        shallow: dict[str, Any] = {
            part: None if (plane := getattr(picture, part)) is None else to_bytes(plane) for part in _PARTS
        }
        mode = "L" if picture.mode.startswith("I") else picture.mode
        picture = dataclasses.replace(picture, mode=mode, **shallow)
    if picture.mode == "array":
        modes = {(1, False): "L", (3, False): "RGB", (1, True): "LA", (3, True): "RGBA"}
        mode = modes[picture.color.shape[2], picture.alpha is not None]
        mode = {65535: "I;16", 1: "F"}.get(int(picture.peak), mode) if mode == "L" else mode
        picture = dataclasses.replace(picture, mode=mode)
    return picture


_PARTS = ("color", "black", "alpha")


def _scaled(plane: Any, peak: int) -> Any:
    return None if plane is None else np.round(plane.clip(0, 1) * peak).astype(np.uint16)


def _on_white(picture: Picture) -> Picture:
    """Lay a picture on white, for a format without transparency."""
    assert picture.alpha is not None  # the caller looks
    shown = picture.alpha.astype(np.float64) / picture.peak

    def on_white(plane: Any) -> Any:
        laid = plane * shown + picture.peak * (1 - shown)  # inks are inverted: none of them is white, too
        return (laid if picture.peak == 1 else np.round(laid)).astype(plane.dtype)

    color = on_white(picture.color)
    black = None if picture.black is None else on_white(picture.black)
    mode = "CMYK" if black is not None else "L" if color.shape[2] == 1 else "RGB"
    if mode == "L" and picture.peak != 255:
        mode = "F" if picture.peak == 1 else "I;16"
    mode = "P" if picture.mode == "P" else mode
    return dataclasses.replace(picture, color=color, black=black, alpha=None, mode=mode)


def _placed(metadata: Metadata, name: str, holds: Format, said: list[str]) -> Metadata:
    """Put what goes beside the pixels where a format has a place for it."""
    lost: list[str] = []
    exif, xmp, comment, text = metadata.exif, metadata.xmp, metadata.comment, metadata.text
    if name == "JPEG" and exif is not None and len(exif) + 6 > _LONGEST_MARKER:
        exif = None
        lost.append("EXIF (too long)")
    if name == "JPEG" and xmp is not None and len(xmp) + 29 > _LONGEST_MARKER:
        xmp = None
        lost.append("XMP (too long)")
    words = metadata.words()
    if words and not holds.text and (text or not holds.comment):
        what = "text" if text else "comment"
        if holds.comment:
            comment = words.encode("utf-8")[: _LONGEST_MARKER - 2]
            said.append(f"{what} goes into the comment")
        elif holds.xmp and xmp is None:
            xmp, comment = description_xmp(words), None
            said.append(f"{what} goes into XMP")
        else:
            comment = None
            lost.append(what)
        text = ()
    if metadata.dpi is not None and not holds.dpi and (exif is None or not has_resolution(exif)):
        if holds.exif and exif is None:
            exif = resolution_exif(metadata.dpi)
        else:
            lost.append(f"{metadata.dpi[0]:g} dpi")
    for part, there in (("EXIF", holds.exif), ("XMP", holds.xmp), ("IPTC", holds.iptc)):
        if getattr(metadata, part.lower()) is not None and not there:
            lost.append(part)
    if lost:
        said.append(f"there is no place for {', '.join(lost)}")
    return dataclasses.replace(
        metadata,
        exif=exif if holds.exif else None,
        xmp=xmp if holds.xmp else None,
        iptc=metadata.iptc if holds.iptc else None,
        comment=comment,
        text=text,
    )


def _shown(picture: Picture, name: str) -> Image.Image:
    """Return an 8-bit Pillow image of a mode that a format takes."""
    palette = picture.mode == "P" and name in _PALETTES
    if palette and picture.alpha is not None and name in ("TIFF", "BMP", "PCX", "TGA"):
        palette = False
    if palette or (picture.mode == "1" and name in _BILEVEL) or picture.mode == "CMYK":
        return plain_image(picture)
    array = to_bytes(picture.planes())
    if picture.mode == "1":
        array = np.where(array >= 128, 255, 0).astype(np.uint8)
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if "gray" not in FORMATS.get(name, Format()).colors and image.mode in ("L", "LA"):
        image = image.convert("RGBA" if image.mode == "LA" else "RGB")
    return image


def _beside(metadata: Metadata) -> dict[str, Any]:
    """Return Pillow's options for profile, EXIF and XMP."""
    options: dict[str, Any] = {"icc_profile": metadata.icc_profile}
    if metadata.exif is not None:
        options["exif"] = b"Exif\0\0" + metadata.exif
    if metadata.xmp is not None:
        options["xmp"] = metadata.xmp
    return options


def _saved(image: Image.Image, name: str, options: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def _timing(pictures: list[Picture]) -> dict[str, Any]:
    """Return Pillow's options for an animation."""
    if len(pictures) == 1:
        return {}
    options: dict[str, Any] = {"save_all": True}
    durations = [picture.duration for picture in pictures]
    options["duration"] = [round(duration) if duration is not None else 100 for duration in durations]
    if pictures[0].loop is not None:
        options["loop"] = pictures[0].loop
    return options


def _encode_png(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    metadata = pictures[0].metadata
    options: dict[str, Any] = {"pnginfo": png.info_of(metadata), **_beside(metadata)}
    options.pop("xmp", None)  # it is among the chunks
    if metadata.dpi is not None:
        options["dpi"] = metadata.dpi
    first = pictures[0]
    if first.peak == 65535:
        small = dataclasses.replace(first, color=first.color[:1, :1], alpha=None, mode="RGB")
        made = png.deepened(_saved(_shown(small, name), name, options | given), first.planes())
        return png.with_light(made, metadata)
    images = [_shown(picture, name) for picture in pictures]
    if len(images) > 1:
        images = [image.convert("RGBA" if image.has_transparency_data else "RGB") for image in images]
        options |= {"append_images": images[1:], "default_image": bool(first.settings.get("default_image"))}
        timing = _timing(pictures)
        if options["default_image"]:
            timing["duration"] = timing["duration"][1:]
        options |= timing
    return png.with_light(_saved(images[0], name, options | given), metadata)


def _encode_jpeg(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    metadata = pictures[0].metadata
    options: dict[str, Any] = {"quality": quality, "subsampling": 0, **_beside(metadata)}
    if pictures[0].settings.get("progressive"):
        options["progressive"] = True
    if metadata.dpi is not None:
        options["dpi"] = tuple(min(65535, round(value)) for value in metadata.dpi)
    if metadata.comment is not None:
        options["comment"] = metadata.comment
    if metadata.iptc is not None:
        block = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(metadata.iptc)) + metadata.iptc
        content = b"Photoshop 3.0\0" + block + b"\0" * (len(block) % 2)
        if len(content) + 2 <= _LONGEST_MARKER:
            options["extra"] = b"\xff\xed" + struct.pack(">H", len(content) + 2) + content
    return _saved(_shown(pictures[0], name), name, options | given)


def _encode_webp(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    first = pictures[0]
    options = {"quality": quality, **_beside(first.metadata)}
    if first.settings.get("lossless"):
        options |= {"lossless": True, "exact": True}
    images = [_shown(picture, name) for picture in pictures]
    if len(images) > 1:
        options |= {"append_images": images[1:], **_timing(pictures)}
    return _saved(images[0], name, options | given)


def _encode_avif(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    first = pictures[0]
    options = {"quality": quality, **_beside(first.metadata)}
    if quality >= 90:
        options["subsampling"] = "4:4:4"
    if "exif" in options:
        options["exif"] = first.metadata.exif
    if len(pictures) == 1 and (first.peak == 65535 or first.metadata.cicp is not None):
        return containers.encode_avif(first, quality, options | given)
    images = [_shown(picture, name) for picture in pictures]
    if len(images) > 1:
        options |= {"append_images": images[1:], **_timing(pictures)}
        options.pop("loop", None)
    return _saved(images[0], name, options | given)


def _encode_heif(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    first = pictures[0]
    options = {"quality": quality, **_beside(first.metadata)}
    if len(pictures) == 1 and first.peak == 65535:
        return containers.encode_heif(first, options | given)
    images = [_shown(picture, name) for picture in pictures]
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    return _saved(images[0], name, options | given)


def _encode_jxl(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    first = pictures[0]
    if first.peak != 255:
        return containers.encode_jxl(first, quality)
    options = {"quality": quality, **_beside(first.metadata)}
    options.pop("icc_profile")
    return _saved(_shown(first, name), name, options | given)


def _encode_jp2(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    first = pictures[0]
    if first.peak == 255:
        options = {} if first.metadata.comment is None else {"comment": first.metadata.comment}
        return _saved(_shown(first, name), name, options | given)
    array = first.planes()
    pixels = np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)
    return bytes(imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k" if given.get("no_jp2") else "jp2"))


def _encode_gif(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    clear = any(picture.alpha is not None for picture in pictures)
    images = [_indexed(picture, clear) for picture in pictures]
    options: dict[str, Any] = {"optimize": False}
    if clear:
        options["transparency"] = 255
    if pictures[0].metadata.comment is not None:
        options["comment"] = pictures[0].metadata.comment
    if len(images) > 1:
        options |= {"append_images": images[1:], "disposal": 2 if clear else 1, **_timing(pictures)}
    return _saved(images[0], name, options | given)


def _indexed(picture: Picture, clear: bool) -> Image.Image:
    """Return an image of 256 colours; the last index stands for what is transparent."""
    color = to_bytes(picture.color)
    image = Image.fromarray(color[..., 0] if color.shape[2] == 1 else color).convert("RGB")
    if not clear:
        return image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image = image.quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = (image.getpalette() or [])[: 255 * 3]
    image.putpalette(palette + [0] * (256 * 3 - len(palette)))
    if picture.alpha is not None:
        hidden = to_bytes(picture.alpha)[..., 0] < 128
        image.paste(255, (0, 0), Image.fromarray(hidden))
    image.info["transparency"] = 255
    return image


def _encode_ppm(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    first = pictures[0]
    if first.peak != 65535:
        return _saved(_shown(first, name), "PPM", given)
    height, width = first.size
    head = f"P{6 if first.color.shape[2] == 3 else 5}\n{width} {height}\n65535\n".encode()
    return head + first.color.astype(">u2").tobytes()


def _encode_pfm(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    gray = dataclasses.replace(pictures[0], mode="F")
    color = gray.color.astype(np.float32) / np.float32(gray.peak)
    if color.shape[2] == 3:
        color = color @ np.array([[0.2126], [0.7152], [0.0722]], np.float32)
    return _saved(plain_image(dataclasses.replace(gray, color=color, alpha=None)), "PPM", given)


def _encode_bmp(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    options = {} if pictures[0].metadata.dpi is None else {"dpi": pictures[0].metadata.dpi}
    return _saved(_shown(pictures[0], name), name, options | given)


def _encode_ico(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    return _saved(_shown(pictures[0], name), name, {"sizes": [pictures[0].size[::-1]], **given})


def _other(pictures: list[Picture], name: str, quality: int, given: dict[str, Any]) -> bytes:
    """Write by Pillow in the first mode that the format takes."""
    image = _shown(pictures[0], name)
    for mode in dict.fromkeys((image.mode, "RGBA" if image.has_transparency_data else "RGB", "RGB", "L", "P", "1")):
        try:
            return _saved(image if image.mode == mode else image.convert(mode), name, given)
        except (OSError, ValueError, KeyError) as error:
            reason = error
    raise PictureError(f"{name} does not take {image.mode} pixels: {reason}")


_ENCODERS = {
    "PNG": _encode_png,
    "JPEG": _encode_jpeg,
    "WEBP": _encode_webp,
    "AVIF": _encode_avif,
    "HEIF": _encode_heif,
    "JXL": _encode_jxl,
    "JPEG2000": _encode_jp2,
    "GIF": _encode_gif,
    "PPM": _encode_ppm,
    "PFM": _encode_pfm,
    "BMP": _encode_bmp,
    "ICO": _encode_ico,
}
