"""Pictures in and out: every mode, profile and orientation kept, clear refusals, and which model is chosen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_sets import photo_folder
from PIL import Image, ImageCms, ImageOps
from registered import build
from skimage import data
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from tiny_folders import classifier_folder, restorer_folder
from torch import nn

import zoo
from zoo.data import degradations, resize
from zoo.pictures import restore as inference
from zoo.pictures import restorers
from zoo.pictures.metadata import Metadata
from zoo.pictures.picture import Picture, PictureError
from zoo.pictures.read import open_picture, peek
from zoo.pictures.restore import Networks, Size, load_restorer, restore, restore_picture
from zoo.pictures.restored_image import as_image
from zoo.pictures.write import write_picture
from zoo.record import record_of
from zoo.restoration.cfsr import CFSR
from zoo.weights import CheckpointError, save_checkpoint

ORIENTATION = 0x0112
MODES = ["1", "L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "P", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I", "F"]


@pytest.fixture(scope="module")
def model() -> CFSR:
    """Return a network that enlarges by interpolation, so that results can be foreseen."""
    torch.manual_seed(0)
    made = timm.create_model("cfsr_x2", depths=(1,), interpolation_init=True).eval()
    with torch.no_grad():
        made.upsample.weight[:, 3:] = 0
    return made


def photo(mode: str = "RGB", size: tuple[int, int] = (21, 17)) -> Image.Image:
    """Draw a smooth picture of a mode."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [0.5 + 0.4 * np.sin(0.15 * x + 0.1 * k * y + k) for k in range(4)]
    rgb = Image.fromarray((255 * np.stack(waves[:3], -1)).round().astype(np.uint8))
    if mode in ("I;16", "I;16B", "I", "F"):
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray((waves[0] * (1 if mode == "F" else 65535)).astype(dtype))
    if mode in ("LA", "La", "RGBA", "RGBa"):
        rgb.putalpha(Image.fromarray((255 * waves[3]).astype(np.uint8)))
        return rgb.convert("LA").convert(mode) if mode == "La" else rgb.convert(mode)
    return rgb.quantize(64) if mode == "P" else rgb.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_kept(mode: str, model: CFSR) -> None:
    """The result has the mode of the input, twice the size, and its colours."""
    image = photo(mode)
    assert image.mode == mode
    out = restore(image, model=model)
    assert isinstance(out, Image.Image)
    assert (out.mode, out.size) == (mode, (42, 34))
    seen = image, out
    if mode not in ("I;16", "I;16B", "I", "F", "CMYK"):
        seen = tuple((i.convert("LA") if mode == "La" else i).convert("RGBA") for i in seen)
    before, after = (np.asarray(i).astype(float) for i in seen)
    peak = {"F": 1, "I": 65535, "I;16": 65535, "I;16B": 65535}.get(mode, 255)
    shrunk = after.reshape(17, 2, 21, 2, -1).mean((1, 3)).reshape(before.shape)
    inner = (slice(2, -2), slice(2, -2))
    assert np.abs(shrunk - before)[inner].mean() / peak < (0.02 if mode in ("1", "P", "HSV") else 0.006)


@pytest.mark.parametrize("size", [(1, 1), (1, 33), (67, 2), (5, 3), (33, 67)])
def test_sizes(size: tuple[int, int], model: CFSR) -> None:
    out = restore(photo(size=size), model=model)
    assert out.size == (2 * size[0], 2 * size[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.bool_, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 1), (9, 8, 2), (9, 8, 3), (9, 8, 4)])
def test_arrays(shape: tuple[int, ...], dtype: Any, model: CFSR) -> None:
    """An array comes back as an array of its rank and type."""
    values = np.random.default_rng(0).random(shape)
    array = values > 0.5 if dtype == np.bool_ else values.astype(dtype)
    if np.issubdtype(dtype, np.integer):
        array = (values * np.iinfo(dtype).max).astype(dtype)
    out = restore(array, model=model)
    assert isinstance(out, np.ndarray)
    assert out.dtype == array.dtype
    assert out.shape == (18, 16, *shape[2:])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_two_views_become_one_picture(dtype: Any) -> None:
    """The network sees the left and the right view as six channels; tiles too give three."""
    dual = build("restormer", in_chans=6, dual_pixel=True)
    peak = 1 if dtype == np.float32 else np.iinfo(dtype).max
    values = np.random.default_rng(0).random((2, 40, 56, 3))
    left, right = (values * peak).astype(dtype)
    with torch.no_grad():
        expected = dual(torch.from_numpy(np.concatenate([left, right], 2) / np.float32(peak)).permute(2, 0, 1)[None])
    expected = expected[0].clamp(0, 1).permute(1, 2, 0).numpy() * peak
    found = restore((left, right), model=dual)
    assert isinstance(found, np.ndarray)
    assert found.dtype == dtype
    assert np.abs(found - expected).max() <= (0.6 if peak > 1 else 1e-5)
    assert restore((left, right), model=dual, tile=40, overlap=8).shape == (40, 56, 3)
    assert not np.array_equal(found, restore((right, left), model=dual))
    if dtype == np.uint8:
        images = tuple(Image.fromarray(view) for view in (left, right))
        assert np.array_equal(np.asarray(restore(images, model=dual, self_ensemble=False)), found)


def test_views_that_do_not_fit(model: CFSR) -> None:
    dual = build("restormer", in_chans=6, dual_pixel=True)
    view = np.zeros((9, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="Restormer with these weights restores two views of a dual-pixel sensor, got"):
        restore(view, model=dual)
    with pytest.raises(ValueError, match="CFSR with these weights restores one picture, got two views"):
        restore((view, view), model=model)
    with pytest.raises(PictureError, match="8x9 pixels of uint8, the array 8x9 pixels of uint16: no two views of one"):
        restore((view, view.astype(np.uint16)), model=dual)
    with pytest.raises(PictureError, match="is no view of a dual-pixel sensor: expected RGB without transparency"):
        restore((view, view[..., :1]), model=dual)
    with pytest.raises(ValueError, match="or the two views of a dual-pixel sensor; got 3"):
        restore((view, view, view), model=dual)  # type: ignore[arg-type]


def test_sixteen_bits_are_kept(tmp_path: Path, model: CFSR) -> None:
    """Gray and colour PNG files with 16 bits go through at their depth."""
    values = (np.random.default_rng(0).random((6, 7, 4)) * 65535).astype(np.uint16)
    for name, planes in (("gray", values[..., :1]), ("rgb", values[..., :3]), ("rgba", values)):
        picture = Picture(
            color=planes[..., :3],
            alpha=planes[..., 3:] if planes.shape[2] == 4 else None,
            mode={"gray": "I;16", "rgb": "RGB", "rgba": "RGBA"}[name],
        )
        write_picture(picture, tmp_path / f"{name}.png")
        again = open_picture(tmp_path / f"{name}.png")
        assert again.color.dtype == np.uint16
        assert np.array_equal(again.to_array(), planes[..., 0] if name == "gray" else planes)
        restored = restore_picture(again, model)
        assert restored.color.dtype == np.uint16
        assert len(np.unique(restored.color & 255)) > 30  # the low bytes are not all alike
        assert as_image(restored).size == (14, 12)
        write_picture(restored, tmp_path / "out.png")
        assert np.array_equal(open_picture(tmp_path / "out.png").to_array(), restored.to_array())


def test_profile_and_orientation(tmp_path: Path, model: CFSR) -> None:
    """ICC profile and EXIF come through a plain `save`; the result is the enlarged picture, upright."""
    image, profile = photo(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = image.getexif()
    exif[ORIENTATION] = 6  # the camera lay on its side
    for suffix in ("jpg", "png", "webp"):
        path, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
        image.save(path, icc_profile=profile, exif=exif, quality=98)
        out = restore(path, model=model)
        assert out.info["icc_profile"] == profile
        out.save(target)
        with Image.open(target) as saved:
            assert saved.info["icc_profile"] == profile
            assert saved.getexif().get(ORIENTATION, 1) == 1
            upright = np.asarray(saved.convert("RGB"), float)
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), float)
        assert upright.shape[:2] == (42, 34)
        assert np.abs(upright.reshape(21, 2, 17, 2, 3).mean((1, 3)) - expected)[2:-2, 2:-2].mean() < 3


def test_sixteen_bit_png_keeps_profile(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    picture = Picture(
        color=np.full((3, 4, 3), 1000, np.uint16),
        metadata=Metadata(icc_profile=b"some profile" * 20, exif=exif.tobytes().removeprefix(b"Exif\0\0")),
    )
    write_picture(picture, tmp_path / "deep.png")
    again = open_picture(tmp_path / "deep.png")
    assert again.metadata.icc_profile == picture.metadata.icc_profile
    assert Image.open(tmp_path / "deep.png").getexif()[ORIENTATION] == 3


def test_palette_with_transparency(tmp_path: Path, model: CFSR) -> None:
    image = photo().quantize(16)
    image.save(tmp_path / "in.png", transparency=0)
    with Image.open(tmp_path / "in.png") as opened:
        alpha = np.asarray(opened.convert("RGBA"))[..., 3]
    out = restore(tmp_path / "in.png", model=model)
    assert out.mode == "P"
    new = np.asarray(out.convert("RGBA"))[..., 3]
    assert (new == 0).any()
    assert abs(new.mean() - alpha.mean()) < 12


def test_a_transparent_colour(tmp_path: Path, model: CFSR) -> None:
    """A PNG whose one colour is transparent has opacity afterwards."""
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "key.png", transparency=(9, 8, 7))
    out = restore(tmp_path / "key.png", model=model)
    assert out.mode == "RGBA"
    assert np.asarray(out)[..., 3].max() == 0


def test_hidden_colour_does_not_bleed(model: CFSR) -> None:
    """Black under full transparency does not darken the visible edge beside it."""
    array = np.zeros((16, 16, 4), np.uint8)
    array[:, 8:] = 200, 100, 50, 255
    out = restore(array, model=model)
    visible = out[4:-4, 16:-4, :3].astype(int)
    assert np.abs(visible - [200, 100, 50]).max() <= 2


def test_transparent_everywhere(model: CFSR) -> None:
    out = restore(np.zeros((4, 5, 4), np.uint8), model=model)
    assert not out[..., 3].any()


def test_gray_network_on_colour() -> None:
    gray = timm.create_model("cfsr_x2", in_chans=1, depths=(1,), interpolation_init=True).eval()
    assert restore(photo("RGB"), model=gray).mode == "RGB"
    assert restore(photo("L"), model=gray).mode == "L"


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    """Write files that are not what they seem."""
    photo().save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    buffer = io.BytesIO()
    photo(size=(64, 64)).save(buffer, "JPEG")
    (tmp_path / "truncated.jpg").write_bytes(buffer.getvalue()[:-400])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "really.png").write_bytes(buffer.getvalue())  # a JPEG with another suffix is still an image
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated.png", "is damaged"),
        ("truncated.jpg", "is damaged.*truncated"),
        ("text.png", "is not an image"),
        ("empty.jpg", "is not an image"),
        ("missing.png", "is not there: expected an image file"),
        ("folder.png", "is a folder: expected an image file"),
    ],
)
def test_bad_files(name: str, message: str, bad_files: Path, model: CFSR) -> None:
    with pytest.raises(PictureError, match=message) as caught:
        restore(bad_files / name, model=model)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_renamed_jpeg_is_read(bad_files: Path) -> None:
    assert open_picture(bad_files / "really.png").size == (64, 64)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(size=(60, 50)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match=r"large.png is refused: .*--max-pixels .* if you trust"):
        open_picture(tmp_path / "large.png")
    with pytest.raises(PictureError, match=r"its 60x50 pixels are more than 2999"):
        open_picture(tmp_path / "large.png", max_pixels=2999)
    assert open_picture(tmp_path / "large.png", max_pixels=3000).size == (50, 60)
    pages = [Image.new("RGB", (20, 10), (50 * shade, 0, 0)) for shade in range(5)]
    for name in ("pages.tif", "moving.gif", "moving.webp"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(PictureError, match=r"its 5 frames of 20x10 pixels are more than 999"):
            open_picture(tmp_path / name, every_frame=True, max_pixels=999)
        with pytest.raises(PictureError, match=r"5 frames"):
            peek(tmp_path / name, max_pixels=999)
        assert len(open_picture(tmp_path / name, every_frame=True, max_pixels=1000).frames) == 4


def test_frames(tmp_path: Path) -> None:
    photo().save(tmp_path / "many.gif", save_all=True, append_images=[photo(), photo("L")])
    with pytest.warns(UserWarning, match="frames; only the first is used"):
        assert open_picture(tmp_path / "many.gif").mode in ("P", "RGB")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 5), np.uint8), r"got shape \(2, 2, 5\)"),
        (np.zeros((0, 2), np.uint8), "not empty"),
        (np.zeros((2, 2), np.int64), "got int64"),
        (np.full((2, 2), 255.0), r"values in \[0, 1\], got 255 to 255"),
        (np.full((2, 2), np.nan), "got nan to nan"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        open_picture(array)


def test_other_things() -> None:
    with pytest.raises(PictureError, match="a path, a Pillow image or a NumPy array, got int"):
        open_picture(3)  # type: ignore[arg-type]
    for other, hint in (([photo()], "one after the other"), (torch.zeros(3, 4, 5), "permute"), (b"", "BytesIO")):
        with pytest.raises(PictureError, match=f"got .*{hint}"):
            open_picture(other)  # type: ignore[arg-type]
    with pytest.raises(PictureError, match="the image has no pixels: its size is 0x5"):
        open_picture(Image.new("RGB", (0, 5)))
    with pytest.raises(PictureError, match="pixels that are no finite numbers"):
        open_picture(Image.fromarray(np.array([[0, np.inf]], np.float32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "2"}, "scale must be a number, got '2'"),
        ({"width": "100"}, "width must be a number, got '100'"),
        ({"height": 10.5}, "height must be a whole number of pixels, got 10.5"),
        ({"max_side": 2e6}, "max_side must be positive and less than a million"),
        ({"tile": "64"}, "tile must be a whole number of pixels, got '64'"),
        ({"overlap": 1.5, "tile": 8}, "overlap must be a whole number of pixels, got 1.5"),
        ({"crop": (1, 2, 3)}, r"\(left, top, right, bottom\) in pixels, got \(1, 2, 3\)"),
        ({"crop": 5}, "in pixels, got 5"),
        ({"max_pixels": "24M"}, "max_pixels must be a number such as 200e6, got '24M'"),
        ({"quality": 95}, 'quality is "fast", "balanced" or "best", got 95'),
        ({"sigma": "25"}, "sigma must be a number, got '25'"),
        ({"kind": "photo"}, 'kind is "auto", "clean" or "real", got \'photo\''),
        ({"kind": "real"}, 'kind="real" chooses among shipped weights: leave it out, or the model'),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, model: CFSR) -> None:
    """What is no number, or none of the choices, is named; it is neither a damaged picture nor taken for something."""
    with pytest.raises(ValueError, match=message):
        restore(photo(), model=model, **options)


@pytest.mark.parametrize("values", [[0, 70000], [-5, 3], [0, 255.0], [-1.5, 0.25]])
def test_values_of_any_range(values: list[float], model: CFSR) -> None:
    """Integers beyond 16 bits, and floats beyond 0 to 1, keep their range."""
    dtype = np.int32 if isinstance(values[1], int) else np.float32
    array = np.linspace(values[0], values[1], 20).astype(dtype).reshape(4, 5)
    out = np.asarray(restore(Image.fromarray(array), model=model))
    assert out.dtype == dtype
    assert abs(out.mean() - array.mean()) < 0.02 * (values[1] - values[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.nope", "names no image format"), ("x.ico", "300x17 pixels are too many"), ("no/such/x.png", "No such file")],
)
def test_unwritable(name: str, message: str, tmp_path: Path) -> None:
    """Nothing is left behind."""
    with pytest.raises(PictureError, match=f"Cannot write .*{message}"):
        write_picture(open_picture(photo("RGBA", (300, 17))), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.png"
    target.write_text("old")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(PictureError, match="No space left on device"):
        write_picture(open_picture(photo()), target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


# Which model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Write weights of a x2 network, as they would be shipped."""
    path = tmp_path / "x2.safetensors"
    save_checkpoint(timm.create_model("cfsr_x2", interpolation_init=True).state_dict(), path)
    return path


@pytest.fixture
def shipped(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let these be the only shipped weights."""
    for name in restorers._restorers():
        for full, cfg in get_arch_pretrained_cfgs(name.partition(".")[0]).items():
            if cfg.file:
                file = weights if full == "cfsr_x2.bsds" else tmp_path / "none"
                monkeypatch.setattr(get_pretrained_cfg_of(full), "file", str(file))
    return weights


def get_pretrained_cfg_of(name: str) -> Any:
    """Return the registered cfg itself, not a copy."""
    from timm.models._registry import _model_pretrained_cfgs

    return _model_pretrained_cfgs[name]


def test_shipped_weights_are_found(shipped: Path) -> None:
    """`zoo.restore` needs nothing but the picture; the chosen network is merged and in evaluation mode."""
    assert zoo.restore(photo()).size == (42, 34)
    restorer = load_restorer("sr", 2)
    assert isinstance(restorer, CFSR)
    assert not restorer.training
    assert sum(p.numel() for p in restorer.parameters()) == 287_868
    assert load_restorer("sr").scale == 2


def test_a_quality_takes_the_fastest_or_the_best(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast is the least work; balanced the highest PSNR on the cards; best that one over flips and turns."""
    monkeypatch.setattr(get_pretrained_cfg_of("ffnetsr_light_x2.div2k"), "file", str(shipped))
    for best in ("cfsr_x2.bsds", "ffnetsr_light_x2.div2k"):
        monkeypatch.setattr(restorers, "_measured", lambda name, best=best: 36.0 + (name == best))
        found = restorers.offers("sr", 2)
        assert (found["fast"].name, found["fast"].work) == ("cfsr_x2.bsds", 1)
        assert (found["balanced"].name, found["best"].name, found["best"].self_ensemble) == (best, best, True)
        assert found["best"].work == pytest.approx(8 * found["balanced"].work)
    assert found["balanced"].work == pytest.approx(406.69 / 65.06, rel=1e-3)
    assert load_restorer("sr", 2, device="cpu").pretrained_cfg["architecture"] == "cfsr_x2"
    averaged = zoo.restore(photo(), quality="best", model=load_restorer("sr", 2))
    assert np.array_equal(averaged, zoo.restore(photo(), self_ensemble=True, model=load_restorer("sr", 2)))


def test_real_photos_get_weights_of_their_own(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JPEG blocks and noise are seen; what is named is kept; networks that follow get clean pictures."""
    monkeypatch.setattr(get_pretrained_cfg_of("cfsr_x2.real"), "file", str(shipped))
    clean = resize.imresize(data.coffee()[:160, :160], 0.5)
    coded = degradations.JpegCompression(50)(clean, np.random.default_rng(0))
    networks = Networks(Size(scale=4), device="cpu")
    for pixels, kind, tag in ((clean, "clean", "bsds"), (coded, "real", "real")):
        picture = open_picture(pixels)
        first, second = networks.reaching(picture.size, picture)
        assert networks.name == f"cfsr_x2.{tag}"
        assert networks.reason.startswith("JPEG blocks") == (kind == "real")
        assert first.pretrained_cfg["tag"] == tag
        assert second.pretrained_cfg["tag"] == "bsds"
        asked = Networks(Size(), kind=kind, device="cpu")
        asked.reaching(picture.size, picture)
        assert (asked.name, asked.reason) == (f"cfsr_x2.{tag}", f"{kind} weights are asked for")
    named = Networks(Size(), model="cfsr_x2.bsds", device="cpu")
    assert named.reaching(picture.size, picture) == [named.first]


def test_scales_of_clean_and_real_weights_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed photo is enlarged x3 by real weights for x4, and made smaller, where clean ones for x3 are there."""
    scales = {"clean": (2, 3, 4), "real": (2, 4)}
    model = timm.create_model("cfsr_x2", embed_dim=8, depths=(1,)).eval()
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr("zoo.pictures.restore.shipped_scales", lambda task, kind="clean": scales[kind])
    monkeypatch.setattr(
        "zoo.pictures.restore.load_restorer", lambda task, scale, kind, **_: asked.append((scale, kind)) or model
    )
    clean = resize.imresize(data.coffee()[:160, :160], 0.5)
    coded = degradations.JpegCompression(50)(clean, np.random.default_rng(0))
    for pixels, found in ((clean, [(3, "clean")]), (coded, [(3, "clean"), (4, "real")])):
        asked.clear()
        picture = open_picture(pixels)
        Networks(Size(scale=3)).reaching(picture.size, picture)
        assert asked == found


def test_a_task_without_the_weights_that_are_looked_for_says_so() -> None:
    """On a compressed photo a denoiser names the task that is for it; what has one kind of weights says that."""
    clean = resize.imresize(data.coffee()[:160, :160], 0.5)
    coded = degradations.JpegCompression(40)(clean, np.random.default_rng(0))
    denoise, restore_ = (Networks(Size(), task, device="cpu") for task in ("denoise", "restore"))
    found = []
    for networks, pixels in ((denoise, coded), (denoise, clean), (restore_, coded), (restore_, clean)):
        picture = open_picture(pixels)
        networks.reaching(picture.size, picture)
        found.append((networks.name, networks.reason))
    denoiser, restorer = "restormer_tiny_denoise_color.bsds", "restormer_tiny_restore_color.real"
    assert [name for name, _ in found] == [denoiser, denoiser, restorer, restorer]
    blocks, none, seen, unneeded = (reason for _, reason in found)
    assert blocks.startswith("JPEG blocks")
    assert blocks.endswith('this is for noise alone, the task "restore" for compressed photos')
    assert none.startswith("no JPEG blocks")
    assert seen.startswith("JPEG blocks")
    assert unneeded.startswith("the task 'restore' has no others; no JPEG blocks")
    asked = Networks(Size(), "denoise", kind="real", device="cpu")
    asked.reaching(picture.size, picture)
    assert asked.reason == "real weights are asked for, and the task 'denoise' has none"


@pytest.mark.parametrize(
    ("task", "scale", "message"),
    [
        ("sr", 1, "The task 'sr' enlarges; scale 1 does not"),
        ("deblur", 2, r"No weights for the task 'deblur' at scale 2 are shipped; shipped are cfsr_x2.bsds \(sr, x2\)"),
        ("denoise", None, "No weights for the task 'denoise' at scale 1"),
    ],
)
def test_nothing_shipped(task: str, scale: int | None, message: str, shipped: Path) -> None:
    with pytest.raises(ValueError, match=message):
        restore(photo(), task, scale)


@pytest.mark.parametrize(
    ("sigma", "tag"), [(25.0, "sigma25"), (None, "blind"), (30.0, "blind"), (0.0, "blind"), (15.0, "sigma15")]
)
def test_noise_chooses_weights(sigma: float | None, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "restormer_denoise_color"
    asked: list[str] = []
    monkeypatch.setattr(restorers.timm, "create_model", lambda name, **_: asked.append(name) or nn.Conv2d(1, 1, 1))
    load_restorer("denoise", model=name, sigma=sigma)
    assert asked == [name if sigma is None else f"{name}.{tag}"]


def test_noise_without_weights(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights for noise of sigma 60; .*blind \(sigma 0 to 50\), .*sigma15"):
        load_restorer("denoise", model="restormer_denoise_color", sigma=60)
    with pytest.raises(ValueError, match=r"restormer_denoise_gray.sigma25 has no weights for noise of sigma 15"):
        load_restorer("denoise", model="restormer_denoise_gray.sigma25", sigma=15)
    with pytest.raises(ValueError, match="is one file, trained for its own noise"):
        load_restorer(weights=weights, sigma=15)
    with pytest.raises(ValueError, match="a restorer that is given has its own"):
        load_restorer(model=nn.Conv2d(1, 1, 1), sigma=15)


def test_weights_are_recognised(weights: Path) -> None:
    assert load_restorer(weights=weights).scale == 2
    assert load_restorer(weights=weights, model="cfsr_x2").scale == 2
    with pytest.raises(CheckpointError, match=r"holds cfsr_x2, not cfsr_x4"):
        load_restorer(weights=weights, model="cfsr_x4")
    with pytest.raises(ValueError, match="This CFSR restores at scale 2, not 4"):
        load_restorer(scale=4, weights=weights)


def test_a_tag_as_weights(shipped: Path) -> None:
    assert load_restorer(model="cfsr_x2", weights="bsds").scale == 2


def test_unknown_weights(tmp_path: Path) -> None:
    save_checkpoint(nn.Linear(2, 2).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is of no known restorer; known families are cfsr"):
        load_restorer(weights=tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="No weight file at"):
        load_restorer(weights=tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cfsr_x5", "No model is called 'cfsr_x5'. Did you mean cfsr_x"),
        ("cfsr_x2.df2k", "'cfsr_x2' has no weights called 'df2k'. It has cfsr_x2"),
        ("resnet18", r"'resnet18' does not restore images; cfsr_\*"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_restorer(model=name)


def test_a_given_network_is_left_alone(model: CFSR) -> None:
    assert load_restorer(model=model) is model
    half = load_restorer(model=model, dtype="bfloat16")
    assert half is not model
    assert next(half.parameters()).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="weights go with the name of a model"):
        load_restorer(model=model, weights="x.pth")


@pytest.mark.parametrize("dtype", ["int8", "floaty", torch.int64])
def test_wrong_dtype(dtype: Any, model: CFSR) -> None:
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        load_restorer(model=model, dtype=dtype)


def test_half_precision_is_close(model: CFSR) -> None:
    full, half = (np.asarray(restore(photo(), model=model, dtype=dtype), float) for dtype in (None, "bfloat16"))
    assert 0 < np.abs(full - half).mean() < 2


def test_everything_goes_through(model: CFSR) -> None:
    """Tiles, ensemble and progress reach the network; a file is as good as an image."""
    calls: list[tuple[int, int]] = []
    image = photo(size=(90, 40))
    options = dict(tile=40, exact=True, self_ensemble=True, progress=lambda done, count: calls.append((done, count)))
    found = np.asarray(restore(image, model=model, **options), int)
    assert len(calls) > 1
    assert np.abs(found - np.asarray(restore(image, model=model), int)).mean() < 1


def test_a_folder_of_files(tmp_path: Path, model: CFSR) -> None:
    for path in photo_folder(tmp_path / "in").iterdir():
        write_picture(restore_picture(open_picture(path), model), tmp_path / path.name)
        with Image.open(tmp_path / path.name) as out:
            assert out.size == (112, 96)


def test_names() -> None:
    """The module offers what the command line uses."""
    assert set(inference.__all__) <= set(vars(inference))
    assert get_pretrained_cfg("cfsr_x2.bsds").scale == 2


@torch.no_grad()
def test_a_trained_restorer_says_what_it_is(tmp_path: Path) -> None:
    """No variant has these sizes: only the record in the file tells them."""
    model = timm.create_model("cfsr_x3", embed_dim=8, depths=(1,)).eval()
    save_checkpoint(model.state_dict(), tmp_path / "mine.safetensors", record=record_of(model))
    found = load_restorer(weights=tmp_path / "mine.safetensors")
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_is_named_as_in_the_commands(tmp_path: Path) -> None:
    """A folder stands for a restorer in Python too; what is none is named."""
    folder = restorer_folder(tmp_path / "restorer")
    expected = np.asarray(restore(photo(), model=zoo.create_model(str(folder), pretrained=True)))
    for model in (folder, str(folder)):
        assert np.array_equal(np.asarray(restore(photo(), model=model)), expected)
    with pytest.raises(ValueError, match="which does not restore images"):
        restore(photo(), model=classifier_folder(tmp_path / "classifier"))
    with pytest.raises(ValueError, match="model must be a name, a path or a network, got 3"):
        restore(photo(), model=3)  # type: ignore[arg-type]
