"""Pictures and tiles: bugs of one line that the other tests would let live."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from torch import Tensor, nn

import zoo
from zoo.pictures import plans
from zoo.pictures.picture import Picture
from zoo.pictures.read import open_picture, peek
from zoo.pictures.restore import restore_picture
from zoo.pictures.restored_image import as_image
from zoo.pictures.tiling import restore_tensor
from zoo.pictures.write import write_picture


class Restorer(nn.Module):
    """Enlarges by repetition and notes the shapes that it got; its working memory is known."""

    receptive_field = 0

    def __init__(self, scale: int = 1, in_chans: int = 3, multiple_of: int = 1, bytes_per_pixel: int = 1000) -> None:
        super().__init__()
        self.scale, self.in_chans, self.multiple_of, self.bytes_per_pixel = (
            scale,
            in_chans,
            multiple_of,
            bytes_per_pixel,
        )
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3) * self.weight


def ramp(*shape: int) -> Tensor:
    """Values that are all different, in (0, 1)."""
    count = int(np.prod(shape))
    return ((torch.arange(count) + 0.5) / count).view(shape)


# --- borders


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [4, 8])
def test_a_picture_is_mirrored_without_repeating_its_border(size: int, step: int) -> None:
    """As NumPy reflects: 0 1 2 | 1 0 1 2, also where more is missing than there is."""
    model, x = Restorer(multiple_of=step), ramp(1, 3, size, 7)
    out = restore_tensor(model, x)
    assert torch.equal(out, x)
    (seen,) = model.seen
    below, right = -size % step, -7 % step
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 0), (0, right)), mode="reflect")
    expected = np.pad(expected, ((0, 0), (0, 0), (0, below), (0, 0)), mode="reflect" if size > 1 else "edge")
    assert np.array_equal(seen.numpy(), expected)


# --- memory of tiles


def largest(model: Restorer) -> int:
    """Elements of the largest call, in pixels of its network's channels."""
    return max(x.numel() // x.shape[1] for x in model.seen)


@pytest.mark.parametrize(
    ("shape", "in_chans", "share"), [((1, 3, 64, 64), 3, 1), ((4, 3, 64, 64), 3, 4), ((2, 3, 64, 64), 1, 6)]
)
def test_tiles_count_every_picture_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], in_chans: int, share: int
) -> None:
    """What a call takes stays within the budget: that of all pictures, of all channels of a gray network."""
    monkeypatch.setattr(plans, "held_bytes", lambda device: 0)
    monkeypatch.setattr(plans, "_RUNTIME_BYTES", 0)
    model, x = Restorer(in_chans=in_chans), ramp(*shape)
    result = 2 * 4 * x.numel()
    allowed = result + 1000 * share * 1024  # tiles of 32x32 pixels
    out = restore_tensor(model, x, budget=allowed)
    assert torch.equal(out, x)
    assert 1000 * largest(model) <= allowed - result
    assert largest(model) >= share * 512, "no smaller than need be"


def test_tiles_in_half_precision_take_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "held_bytes", lambda device: 0)
    monkeypatch.setattr(plans, "_RUNTIME_BYTES", 0)
    calls = []
    for model in (Restorer(), Restorer().to(torch.bfloat16)):
        restore_tensor(model, ramp(1, 3, 64, 64), budget=2 * 4 * 3 * 64 * 64 + 1000 * 1024)
        calls.append(len(model.seen))
    assert calls == [4, 2]


# --- depths


def test_sixteen_bits_are_rounded_to_eight() -> None:
    """To the nearest of v / 257, not cut off, for every value."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    picture = Picture(color=values[..., None].repeat(3, axis=2), mode="RGB")
    found = np.asarray(as_image(picture))
    assert np.array_equal(found[..., 0], (values.astype(int) + 128) // 257)


def test_floats_are_rounded_to_eight_bits() -> None:
    values = (np.arange(256, dtype=np.float32) + 0.4).clip(0, 255)[:, None, None].repeat(3, axis=2) / np.float32(255)
    assert np.array_equal(np.asarray(as_image(Picture(color=values, mode="RGB")))[:, 0, 0], np.arange(256))


@pytest.mark.parametrize("levels", [255, 65535])
def test_results_are_rounded_to_the_nearest_level(levels: int) -> None:
    """Between two levels the nearer one; beyond the ends the ends."""
    model = Restorer()
    wanted = torch.tensor([-3.0, 0.4, 0.6, 100.49, 100.51, levels - 0.6, levels - 0.4, levels + 9.0])
    out = restore_tensor(model, (wanted / levels).view(1, 1, 1, 8).expand(1, 3, 1, 8), levels=levels)
    assert out[0, 0, 0].tolist() == [0, 0, 1, 100, 101, levels - 1, levels, levels]


def test_sixteen_bit_files_come_back_whole(tmp_path: Path) -> None:
    """All 16 bits of every channel, rows and columns in their places."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 4), dtype=np.uint16)
    write_picture(Picture(color=values[..., :3], alpha=values[..., 3:], mode="RGBA"), tmp_path / "deep.png")
    again = open_picture(tmp_path / "deep.png")
    assert np.array_equal(again.to_array(), values)


def test_one_bit_pictures_are_split_in_the_middle() -> None:
    """No dithering: 127 is black, 128 white; a boolean array likewise."""
    levels = np.array([[0, 1, 100, 127, 128, 129, 200, 255]], np.uint8)
    expected = [[False] * 4 + [True] * 4]
    assert np.asarray(as_image(Picture(color=levels[..., None], mode="1"))).tolist() == expected
    picture = Picture(color=levels[..., None], mode="array", shape=(2, "bool"))
    assert picture.to_array().tolist() == expected


class Darker(Restorer):
    """Gives four tenths of what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.4 * super().forward(x)


def test_a_restored_mask_is_split_in_the_middle() -> None:
    mask = np.eye(6, dtype=bool)
    assert np.array_equal(zoo.restore(mask, model=Restorer()), mask)
    assert not zoo.restore(mask, model=Darker()).any()
    assert not np.asarray(zoo.restore(Image.fromarray(mask), model=Darker())).any()


# --- files


def test_jpeg_keeps_colour_at_full_resolution(tmp_path: Path) -> None:
    """Columns of red and blue stay apart: 4:4:4, where Pillow's own choice halves the chroma."""
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    write_picture(Picture(color=stripes), tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert JpegImagePlugin.get_sampling(image) == 0
        error = np.abs(np.asarray(image).astype(int) - stripes).mean()
    assert error < 8
    sizes = []
    for quality in (10, 95):
        write_picture(Picture(color=stripes), tmp_path / "b.jpg", quality=quality)
        sizes.append((tmp_path / "b.jpg").stat().st_size)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_opacity_is_enlarged_by_bicubic_interpolation(dtype: type) -> None:
    """An edge of opacity becomes a slope, within the range and in the type of the picture."""
    peak = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    alpha = np.zeros((8, 8, 1), dtype)
    alpha[:, 4:] = peak
    color = np.full((8, 8, 3), peak / 2, dtype)
    found = restore_picture(Picture(color=color, alpha=alpha, mode="RGBA"), Restorer(scale=2)).alpha
    assert found is not None
    assert (found.shape, found.dtype) == ((16, 16, 1), dtype)
    flat = (alpha[..., 0] / peak * 255).astype(np.uint8)
    expected = np.asarray(Image.fromarray(flat).resize((16, 16), Image.Resampling.BICUBIC)) / 255
    assert np.abs(found[..., 0] / peak - expected).max() < 0.01
    assert len(np.unique(expected)) > 3


# --- heads of files, turned pictures, parts


@pytest.mark.parametrize(
    ("mode", "suffix", "colors", "alpha"),
    [
        ("L", "tif", "gray", False), ("RGB", "tif", "color", False), ("RGBA", "tif", "color", True),
        ("CMYK", "tif", "cmyk", False), ("L", "png", "gray", False), ("RGB", "png", "color", False),
        ("RGBA", "png", "color", True), ("RGB", "jpg", "color", False),
    ],
)  # fmt: skip
def test_the_head_tells_the_kind(tmp_path: Path, mode: str, suffix: str, colors: str, alpha: bool) -> None:
    Image.new(mode, (6, 4)).save(tmp_path / f"a.{suffix}")
    kind = peek(tmp_path / f"a.{suffix}")
    assert kind.format == {"tif": "TIFF", "png": "PNG", "jpg": "JPEG"}[suffix]
    assert (kind.colors, kind.alpha, kind.bits, kind.frames, kind.pixels) == (colors, alpha, 8, 1, 24)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    image.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    picture = open_picture(tmp_path / f"a.{suffix}")
    assert np.array_equal(picture.color[..., 0], expected)
    assert peek(tmp_path / f"a.{suffix}").size == expected.shape


def test_floats_above_one_are_refused() -> None:
    assert zoo.restore(np.ones((8, 8, 3), np.float32), model=Restorer()) is not None
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got 0 to 1\.5"):
        zoo.restore(np.linspace(0, 1.5, 192, dtype=np.float32).reshape(8, 8, 3), model=Restorer())


@pytest.mark.parametrize("opaque", [True, False])
def test_a_part_is_cut_from_all_planes(opaque: bool) -> None:
    values = (np.arange(16 * 16 * 4) % 251).astype(np.uint8).reshape(16, 16, 4)
    image = Image.fromarray(values[..., :3] if opaque else values)
    whole, part = (np.asarray(zoo.restore(image, model=Restorer(), crop=crop)) for crop in (None, (2, 3, 9, 12)))
    assert part.shape == (9, 7, 3 if opaque else 4)
    assert np.array_equal(part, whole[3:12, 2:9])


def test_only_a_budget_refuses_a_result_of_lanczos() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    assert np.asarray(zoo.restore(image, model=Restorer(2), scale=3, budget=None)).shape == (24, 24, 3)
    with pytest.raises(ValueError, match="too small for a result of 24x24 pixels: allow at least"):
        zoo.restore(image, model=Restorer(2), scale=3, budget="1MB")


def test_durations_are_milliseconds_as_floats(tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=70)
    picture = open_picture(tmp_path / "a.gif", every_frame=True)
    assert [(page.duration, type(page.duration)) for page in (picture, *picture.frames)] == [(70.0, float)] * 2
