"""Pictures reach training and prediction the same way: upright, 8 bits, files and bytes alike; damage has a name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.pictures.eight_bit import read_eight_bit
from zoo.pictures.picture import PictureError


def both(path: Path) -> np.ndarray:
    """Read a file and its bytes, which must give the same pixels."""
    one, two = read_eight_bit(path), read_eight_bit(path.read_bytes())
    assert one.mode == two.mode == "RGB"
    assert np.array_equal(np.asarray(one), np.asarray(two))
    return np.asarray(one)


def png16(array: np.ndarray) -> bytes:
    """A 16-bit colour PNG, which Pillow cannot write."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    expected = np.rint(ramp / 257).astype(np.uint8)
    for suffix in ("png", "tif"):
        Image.fromarray(ramp).save(tmp_path / f"gray.{suffix}")
        assert np.array_equal(both(tmp_path / f"gray.{suffix}")[..., 0], expected)
    (tmp_path / "colour.png").write_bytes(png16(np.stack([ramp, ramp[:, ::-1], ramp], -1)))
    colour = both(tmp_path / "colour.png")
    assert np.array_equal(colour[..., 0], expected)
    assert np.array_equal(colour[..., 1], expected[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    found = both(tmp_path / "x.jpg")
    assert found.shape[:2] == ((32, 64) if orientation < 5 else (64, 32))
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert found[corners[orientation]].min() > 200
    assert (found.max(-1) > 128).sum() in range(200, 320), "the other corners stay dark"


def test_every_kind_of_colour(tmp_path: Path) -> None:
    """Transparency is dropped, palettes are looked up, gray is repeated: as Pillow's own conversion does."""
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 4), dtype=np.uint8))
    rgb = np.asarray(rgba)[..., :3]
    rgba.save(tmp_path / "rgba.png")
    assert np.array_equal(both(tmp_path / "rgba.png"), rgb)
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(tmp_path / "palette.png", transparency=3)
    assert np.array_equal(both(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    for mode in ("L", "LA", "1", "CMYK"):
        file = tmp_path / f"{mode}.tif"
        image = Image.fromarray(rgb).convert("L").convert(mode) if mode == "LA" else Image.fromarray(rgb).convert(mode)
        image.save(file)
        assert np.array_equal(both(file), np.asarray(Image.open(file).convert("RGB"))), mode
    assert read_eight_bit(tmp_path / "rgba.png", "L").mode == "L"


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Pillow raises: one line with the file's name, or the row's."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    good = buffer.getvalue()
    damaged = {
        "truncated.png": good[: len(good) // 2],
        "text.jpg": b"no picture",
        "empty.png": b"",
        "chunk.png": good[:40] + b"\xff" * 60 + good[100:],
        "header.png": good[:16] + b"\0\0\0\0" + good[20:],
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PictureError, match=name) as caught:
            read_eight_bit(tmp_path / name)
        assert "\n" not in str(caught.value)
        with pytest.raises(PictureError, match="row 7 of x"):
            read_eight_bit(data, name="row 7 of x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "bomb.png").write_bytes(good)
    with pytest.raises(PictureError, match=r"bomb\.png"):
        read_eight_bit(tmp_path / "bomb.png")
