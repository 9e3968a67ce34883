"""What a picture file says beside its pixels: profile, EXIF, XMP, IPTC, resolution, text; kept true for a new size."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image

__all__ = ["Metadata", "exif_of", "from_info", "stripped", "to_info", "upright"]

_ORIENTATION, _EXIF_IFD, _GPS_IFD, _INTEROP_IFD = 0x0112, 0x8769, 0x8825, 0xA005
_SIZES = {0x0100: 0, 0x0101: 1, 0xA002: 0, 0xA003: 1}  # tags of width and height -> index into (width, height)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_MOST_DPI = 1e7  # more is damage, and does not fit a PNG
_XMP_KEY, _IPTC_KEY = "XML:com.adobe.xmp", "Raw profile type iptc"
_PROFILE_KEYS = re.compile(r"Raw profile type .*")
_NOT_TEXT = {"aspect", "transparency", "compression"}  # of Pillow's info, beside numbers and bytes
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """What is kept beside the pixels.

    Args:
        icc_profile: Colour profile.
        exif: EXIF block, from its byte order on; without the "Exif" that JPEG puts before.
        xmp: XMP packet.
        iptc: IPTC-IIM records, as in Photoshop's resource 0x0404.
        dpi: Pixels per inch across and down.
        text: Keys and values of PNG text.
        comment: Comment of a JPEG or a GIF.
        gamma: PNG's gAMA, the exponent of encoding: 0.45455 is usual.
        chromaticity: PNG's cHRM: x and y of white, red, green and blue.
        intent: PNG's sRGB: the picture is in sRGB, with this rendering intent.
        cicp: Code points (ITU-T H.273) of primaries, transfer function, matrix and full range.
        light: PNG chunks mDCV and cLLI, which go with cICP.
        times: Times of access and change of the file, nanoseconds.
    """

    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: tuple[tuple[str, str], ...] = ()
    comment: bytes | None = None
    gamma: float | None = None
    chromaticity: tuple[float, ...] | None = None
    intent: int | None = None
    cicp: tuple[int, int, int, int] | None = None
    light: tuple[tuple[bytes, bytes], ...] = ()
    times: tuple[int, int] | None = None

    def words(self) -> str:
        """Return text and comment as lines, "key: value"."""
        lines = [f"{key}: {value}" for key, value in self.text]
        if self.comment:
            lines.append(self.comment.decode("utf-8", "replace").rstrip("\0"))
        return "\n".join(lines).encode("utf-8", "replace").decode()

    def resized(self, size: tuple[int, int]) -> Metadata:
        """Return this for pixels of another size, upright: sizes and orientation true, no thumbnail of what was.

        Args:
            size: Height and width, pixels.
        """
        return dataclasses.replace(
            self,
            exif=None if self.exif is None else _corrected_exif(self.exif, size[::-1]),
            xmp=None if self.xmp is None else _corrected_xmp(self.xmp, size[::-1]),
        )


def stripped(metadata: Metadata) -> Metadata:
    """Return only what the look of the pixels depends on."""
    names = ("icc_profile", "gamma", "chromaticity", "intent", "cicp", "light")
    return Metadata(**{name: getattr(metadata, name) for name in names})


def from_info(image: Image.Image, text: Mapping[str, Any] | None = None) -> Metadata:
    """Read what Pillow found beside the pixels of an image.

    Args:
        image: It, loaded.
        text: PNG text, where Pillow keeps it apart; None looks for it among the rest.
    """
    info = image.info
    if text is None:
        known = image.format in ("PNG", None) or getattr(image, "picture", None) is not None
        text = {
            str(key): value for key, value in info.items() if isinstance(value, str) and key not in _NOT_TEXT and known
        }
    xmp = info.get("xmp") or text.get(_XMP_KEY) or _from_hex(str(text.get("Raw profile type xmp", "")))
    exif = info.get("exif")
    if not exif:
        found = exif_of(image)
        exif = found.tobytes() if len(found) else None
    photoshop = info.get("photoshop")
    iptc = photoshop.get(0x0404) if isinstance(photoshop, dict) else None
    if iptc is None and _IPTC_KEY in text:
        iptc = _from_hex(str(text[_IPTC_KEY]))
    comment = info.get("comment")
    if image.format == "JPEG2000" and bytes(comment or b"").startswith(b"Created by OpenJPEG"):
        comment = None
    return Metadata(
        icc_profile=info.get("icc_profile") or None,
        exif=exif.removeprefix(b"Exif\0\0") if exif else None,
        xmp=xmp.encode() if isinstance(xmp, str) else xmp or None,
        iptc=iptc or None,
        dpi=_dpi(image),
        text=tuple(
            (str(key), str(value)) for key, value in text.items() if key != _XMP_KEY and not _PROFILE_KEYS.match(key)
        ),
        comment=comment.encode() if isinstance(comment, str) else comment or None,
        gamma=_gamma(info.get("gamma")),
        chromaticity=_chromaticity(info.get("chromaticity")),
        intent=info.get("srgb"),
        cicp=info.get("cicp"),
        light=info.get("light", ()),
    )


def exif_of(image: Image.Image) -> Image.Exif:
    """Return what EXIF says of an image; nothing where it is damaged, which is no reason to lose the picture."""
    try:
        return image.getexif()
    except Exception:  # Pillow's readers of EXIF raise what they like
        return Image.Exif()


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    dpi = image.info.get("dpi")
    if not isinstance(dpi, tuple | list) or len(dpi) != 2:
        return None
    if image.format in ("JPEG", "MPO") and not image.info.get("jfif_unit") and 0x011A not in exif_of(image):
        return None  # Pillow's own 72, which is nowhere in the file
    try:
        return plausible(*map(float, dpi))
    except (TypeError, ValueError):
        return None


def plausible(across: float, down: float) -> tuple[float, float] | None:
    """Return a resolution in pixels per inch, or None of what is none: 1 stands for an aspect alone."""
    return (across, down) if min(across, down) > 1 and max(across, down) < _MOST_DPI else None


def _gamma(value: Any) -> float | None:
    """Return a gAMA that can be one; PNG readers ignore others."""
    return float(value) if isinstance(value, int | float) and 1e-4 < value < 1e4 else None


def _chromaticity(value: Any) -> tuple[float, ...] | None:
    """Return a cHRM of white, red, green and blue that span colours; PNG readers ignore others."""
    if not isinstance(value, tuple) or len(value) != 8 or not all(isinstance(each, int | float) for each in value):
        return None
    white, red, green, blue = zip(*[iter(value)] * 2, strict=True)
    area = (green[0] - red[0]) * (blue[1] - red[1]) - (blue[0] - red[0]) * (green[1] - red[1])
    return value if white[1] > 1e-3 and abs(area) > 1e-3 else None


def to_info(metadata: Metadata) -> dict[str, Any]:
    """Return what goes into the `info` of a Pillow image."""
    info: dict[str, Any] = {key: value for key, value in metadata.text if key not in ("exif", "dpi", "icc_profile")}
    names = ("icc_profile", "exif", "xmp", "dpi", "comment", "gamma", "chromaticity", "cicp")
    info |= {name: value for name in names if (value := getattr(metadata, name)) is not None}
    if metadata.intent is not None:
        info["srgb"] = metadata.intent
    if metadata.iptc is not None:
        info["photoshop"] = {0x0404: metadata.iptc}
    if metadata.light:
        info["light"] = metadata.light
    return info


def upright(orientation: int) -> tuple[bool, bool, bool]:
    """Return what turns a picture of an EXIF orientation upright: transpose, then flip top-bottom, then left-right."""
    table = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}
    transpose, down, across = table.get(orientation, (0, 0, 0))
    return bool(transpose), bool(down), bool(across)


def iptc_as_hex(iptc: bytes) -> str:
    """Return IPTC records as ImageMagick and ExifTool keep them in PNG text."""
    block = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + b"\0" * (len(iptc) % 2)
    digits = block.hex()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    return f"\niptc\n{len(block):8d}\n{lines}\n"


def _from_hex(text: str) -> bytes | None:
    parts = text.split()
    if len(parts) < 3:
        return None
    try:
        block = bytes.fromhex("".join(parts[2:]))
    except ValueError:
        return None
    if block.startswith(b"8BIM\x04\x04\0\0") and len(block) >= 12:
        return block[12 : 12 + struct.unpack(">I", block[8:12])[0]]
    return block


def description_xmp(text: str) -> bytes:
    """Return an XMP packet with a description."""
    shown = escape(_NO_XML.sub("", text))
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
        f'<rdf:li xml:lang="x-default">{shown}</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF>'
        '</x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def resolution_exif(dpi: tuple[float, float]) -> bytes:
    """Return an EXIF block that holds a resolution."""
    exif = Image.Exif()
    exif[0x011A], exif[0x011B], exif[0x0128] = dpi[0], dpi[1], 2
    return exif.tobytes().removeprefix(b"Exif\0\0")


def has_resolution(exif: bytes) -> bool:
    """Tell whether an EXIF block holds a resolution."""
    try:
        return any(tag == 0x011A for _, tag, _, _ in _entries(exif, *_start(exif)))
    except (struct.error, KeyError, ValueError):
        return False


def _start(block: bytes | bytearray) -> tuple[str, int]:
    order = {b"II": "<", b"MM": ">"}[bytes(block[:2])]
    return order, struct.unpack(order + "I", block[4:8])[0]


def _entries(block: bytes | bytearray, order: str, offset: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield place, tag, bytes of the value, and the value's place of every entry of a directory."""
    (count,) = struct.unpack(order + "H", block[offset : offset + 2])
    for place in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, number, value = struct.unpack(order + "HHII", block[place : place + 12])
        size = _TYPE_BYTES.get(kind, 1) * number
        yield place, tag, size, value if size > 4 else place + 8


def _corrected_exif(block: bytes, size: tuple[int, int]) -> bytes | None:
    """Set orientation and pixel sizes and cut the thumbnail off, in place: maker notes must not move.

    Returns:
        The block, or None where it is damaged.
    """
    data = bytearray(block)
    try:
        order, first = _start(data)
        directories, used = [first], 0
        for directory in directories:  # grows while it is read
            for place, tag, length, value in _entries(data, order, directory):
                if tag == _ORIENTATION:
                    data[place + 2 : place + 12] = struct.pack(order + "HIHH", 3, 1, 1, 0)
                elif tag in _SIZES:
                    data[place + 2 : place + 12] = struct.pack(order + "HII", 4, 1, size[_SIZES[tag]])
                elif tag in (_EXIF_IFD, _GPS_IFD, _INTEROP_IFD) and len(directories) < 8:
                    directories.append(struct.unpack(order + "I", data[place + 8 : place + 12])[0])
                used = max(used, place + 12 + 4, value + length)
        end = first + 2 + 12 * struct.unpack(order + "H", data[first : first + 2])[0]
        (thumbnail,) = struct.unpack(order + "I", data[end : end + 4].ljust(4, b"\0"))
        if thumbnail:
            data[end : end + 4] = bytes(4)
            for place, tag, _, value in _entries(data, order, thumbnail):
                if tag == 0x0201:  # the thumbnail itself; its length follows
                    start, length = struct.unpack(order + "I", data[place + 8 : place + 12])[0], len(data)
                    for other, name, _, _ in _entries(data, order, thumbnail):
                        if name == 0x0202:
                            (length,) = struct.unpack(order + "I", data[other + 8 : other + 12])
                    stop = min(start + length, len(data))
                    data[start:stop] = bytes(max(0, stop - start))
                del value
            if thumbnail >= used:
                del data[used:]
    except (struct.error, KeyError, IndexError):
        return None
    return bytes(data)


def _corrected_xmp(packet: bytes, size: tuple[int, int]) -> bytes:
    """Set orientation and pixel sizes in an XMP packet; drop thumbnails, and what tells of gain maps and videos.

    These stand behind the picture in the files of telephones, and are not written.
    """
    for element in (rb"xmp:Thumbnails", rb"Container:Directory"):
        packet = re.sub(rb"<" + element + rb">.*?</" + element + rb">", b"", packet, flags=re.DOTALL)
    packet = re.sub(rb"\s(?:hdrgm|G?Camera):(?:Version|MotionPhoto\w*|MicroVideo\w*)=([\"']).*?\1", b"", packet)
    values = {b"tiff:Orientation": 1}
    values |= {b"tiff:ImageWidth": size[0], b"exif:PixelXDimension": size[0]}
    values |= {b"tiff:ImageLength": size[1], b"exif:PixelYDimension": size[1]}
    for name, value in values.items():
        packet = re.sub(name + rb"=([\"'])\s*\d+\s*\1", name + b'="%d"' % value, packet)
        packet = re.sub(rb"<" + name + rb">\s*\d+\s*<", b"<" + name + b">%d<" % value, packet)
    return packet
