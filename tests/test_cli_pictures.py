"""`zoo restore` on files as people have them: batches that never die, odd names, pipes, any size, early refusals."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from image_sets import photo_folder
from PIL import Image
from test_cli import error_of, run
from tiny_folders import restorer_folder

from zoo.cli.inputs import find_pictures
from zoo.data.photos import find_images
from zoo.pictures import restore as inference
from zoo.pictures.read import open_picture
from zoo.pictures.restore import restore
from zoo.pictures.sizes import chain, crop_box

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(restorer_folder(tmp_path_factory.mktemp("models") / "restorer"))


def picture(path: Path, size: tuple[int, int] = (12, 9), mode: str = "RGB", **options: Any) -> Path:
    """Write a small picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    Image.fromarray(values).convert(mode).save(path, **options)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- batches


def test_a_batch_does_not_die(capsys: Captured, upscaler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever one picture raises, the others are done, it is named, and the exit code is 1."""
    errors = [MemoryError(), struct.error("short"), RecursionError("deep"), SyntaxError("bad"), KeyError("tag")]
    errors += [type("PanicException", (BaseException,), {})("a plugin panicked")]  # type: ignore[list-item]
    for index in range(len(errors) + 1):
        picture(tmp_path / "in" / f"{index}.png")
    genuine = inference.restore_picture

    def restore_picture(source: Any, *args: Any, **options: Any) -> Any:
        index = int(Path(source.name).stem)
        if index < len(errors):
            raise errors[index]
        return genuine(source, *args, **options)

    monkeypatch.setattr(inference, "restore_picture", restore_picture)
    code, out, _ = run(capsys, "restore", tmp_path / "in", "-o", tmp_path / "out", "--model", upscaler, "--json")
    report = json.loads(out)
    assert code == 1
    assert [entry["error"] for entry in report["failed"]] == [
        "Out of memory; a smaller --budget, or --crop, takes less.",
        "error: short",
        "RecursionError: deep",
        "SyntaxError: bad",
        "KeyError: 'tag'",
        "PanicException: a plugin panicked",
    ]
    assert names(tmp_path / "out") == ["6.png"]

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "restore_picture", interrupted)
    assert run(capsys, "restore", tmp_path / "in", "-o", tmp_path / "out2", "--model", upscaler)[0] == 130


def test_odd_names(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    """Names that are not UTF-8, with brackets, of hidden files, and the same ones in several formats."""
    folder = tmp_path / "photos [2024]"
    for name in ("a[1].png", "b.png", "b.jpg", "b.webp", ".hidden.png", "._b.png", "c.JFIF", "d.tga"):
        picture(folder / name, format="JPEG" if name == "c.JFIF" else None)
    odd = os.fsdecode(os.fsencode(folder) + b"/\xff\xe9.png")
    picture(folder / "x.png").rename(odd)
    (folder / "notes.txt").touch()
    command = ["restore", folder, "-o", tmp_path / "out", "--model", upscaler, "--report", tmp_path / "report.json"]
    code, out, err = run(capsys, *command, "--compare", tmp_path / "page.html")
    assert code == 0, err
    assert "\\udcff" in out
    assert len(json.loads((tmp_path / "report.json").read_text())["restored"]) == 7
    made = [os.fsencode(name) for name in os.listdir(tmp_path / "out")]
    assert sorted(made) == [b"a[1].png", b"b.jpg", b"b.png", b"b.webp", b"c.JFIF", b"d.tga", b"\xff\xe9.png"]
    code, out, err = run(capsys, *command[:2], "-o", tmp_path / "png", "--model", upscaler, "--format", "png", "--json")
    assert code == 0
    assert {"b.png", "b_png.png", "b_webp.png"} <= set(os.listdir(tmp_path / "png"))
    assert "has this name too; its result is called b_png.png" in json.dumps(json.loads(out)["restored"])
    for pattern, count in (("*.png", 3), ("a[[]1].png", 1), ("a[1].png", 1), ("[ab]*.png", 2)):
        assert len(find_pictures([str(folder / pattern)])) == count, pattern


def test_one_line_for_a_name_of_two(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    """A name may have line ends: errors and remarks about it have none."""
    for name in ("a\nb.png", "c\nd.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    picture(tmp_path / "e\nf.jpg", format="PNG")
    code, _, err = run(capsys, "restore", tmp_path, "-o", tmp_path / "out", "--model", upscaler)
    assert code == 1
    lines = err.splitlines()
    assert [line.partition(" is not an image")[0].count("b.png") for line in lines if "b.png" in line] == [2], err
    assert len([line for line in lines if "f.jpg" in line]) == len([line for line in lines if "e f.jpg" in line]) > 0
    assert run(capsys, "classify", tmp_path / "a\nb.png")[2].count("\n") == 2  # the error, and how many failed


def test_results_within_the_inputs(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    """The folder of results is not searched, so a second run does the same as the first."""
    picture(tmp_path / "a.png")
    command = ["restore", tmp_path, "-o", tmp_path / "out" / "x2", "--model", upscaler, "-q"]
    for options in ([], ["--force"]):
        code, out, _ = run(capsys, *command, *options)
        assert (code, len(out.split())) == (0, 1)


def test_links_and_locked_folders(
    capsys: Captured, upscaler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures behind links are restored once; what cannot be read is named, and the others are done."""
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "disk" / "b.png")
    (tmp_path / "in" / "disk").symlink_to(tmp_path / "disk")
    (tmp_path / "in" / "disk" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "locked").mkdir()
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    genuine = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return genuine(path)

    monkeypatch.setattr(os, "scandir", scandir)
    code, _, err = run(capsys, "restore", tmp_path / "in", "-o", tmp_path / "out", "--model", upscaler)
    assert (code, names(tmp_path / "out")) == (1, ["a.png", "disk/b.png"])
    assert f"{tmp_path / 'in' / 'locked'}: " in err
    assert "pipe.png is a pipe or a device" in err
    assert "gone.png: no such file. It is a link to nowhere. [Z104]" in err
    assert "3 of 5 failed" in err


def test_nothing_to_do(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    command = ["restore", tmp_path / "in", "-o", tmp_path / "out", "--model", upscaler]
    assert "There is no picture in" in error_of(capsys, *command, code=1)
    for name in ("a.txt", "b.pdf"):
        (tmp_path / "in" / name).touch()
    assert "in (2 other files)" in error_of(capsys, *command, code=1)
    assert not (tmp_path / "out").exists()


# --- what is said before anything is computed


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        pytest.fail("a picture was restored")

    monkeypatch.setattr(inference, "restore_picture", fail)


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.webp", ["--width", "20000"], "20000x15000 pixels are too many for WEBP, which takes 16383 a side"),
        ("x.jpg", ["--scale", "64", "--width", "1"], "more than one is given"),
        ("x.jpg", ["--width", "70000"], "70000x52500 pixels are too many for JPEG, which takes 65500 a side"),
        ("x.png", ["--crop", "5x5+20+0"], "from 20,0 to 25,5 lies outside 12x9 pixels"),
        ("x.png", ["--max-pixels", "100"], "its 12x9 pixels are more than 100. Allow more by --max-pixels"),
        ("x.png", ["--report", "x.png/report.json"], "x.png"),
        ("x.txt", [], "is not an image"),
        ("x.nef", [], "is a camera's raw file: develop it"),
        ("gone.png", [], "no such file"),
    ],
)
def test_known_faults(
    capsys: Captured,
    upscaler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in ("x.txt", "x.nef"):
        Path(name).write_text("nothing")
    elif name != "gone.png":
        picture(Path(name))
    code, _, err = run(capsys, "restore", name, "-o", "out", "--model", upscaler, *options)
    assert code in (1, 2)
    assert message in err
    assert not Path("out").exists()


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        (["-o", "in", "--format", "png"], "in/a.png"),
        (["-o", "in", "--template", "{stem}_x2.png"], "in/a_x2.png"),
        (["-o", "link", "--format", "png"], "in/a.png"),
        (["-o", "hr", "--metrics", "hr", "--format", "png"], "hr/a.png"),
    ],
)
def test_nothing_that_is_read_is_replaced(
    capsys: Captured,
    upscaler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    replaced: str,
) -> None:
    """Neither another picture of the run, under whatever name, nor what it is compared with."""
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.jpg", "in/a.png", "in/a_x2.png", "hr/a.png"):
        picture(Path(name))
    Path("link").symlink_to("in")
    said = error_of(capsys, "restore", "in/a.jpg", "in/a.png", "in/a_x2.png", *options, "--model", upscaler, "--force")
    assert f"would replace {replaced}, which this run reads" in said


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "4QB"], "--budget takes 800MB, 4GB, ... or none, got '4QB'"),
        (["--tile", "0"], "--tile must be at least 1, got 0"),
        (["--overlap", "-1"], "--overlap must be at least 0, got -1"),
        (["--crop", "0x5"], "--crop takes"),
        (["--width", "1000000"], "width must be positive and less than a million, got 1000000"),
        (["--report", "x.png"], "--report writes a .json file, not 'x.png'"),
        (["--report", "r.html", "--compare", "./r.html"], "--compare and --report would both write r.html"),
    ],
)
def test_wrong_values_are_said_once(
    capsys: Captured,
    upscaler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    """What no picture could be restored with is a wrong call, not a failure of every picture."""
    monkeypatch.chdir(tmp_path)
    assert message in error_of(
        capsys, "restore", picture(tmp_path / "x.png"), "-o", tmp_path / "out", "--model", upscaler, *options
    )


def test_names_that_are_too_long(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    """A name that no disk takes fails alone, before anything is computed."""
    picture(tmp_path / "in" / f"{'a' * 251}.png")
    picture(tmp_path / "in" / "b.png")
    command = ["restore", tmp_path / "in", "x" * 300, "-o", tmp_path / "out", "--model", upscaler]
    code, _, err = run(capsys, *command, "--format", "tiff")
    assert (code, names(tmp_path / "out")) == (1, ["b.tiff"])
    assert "The name of the result has 256 bytes and may have 255: --template gives it another one" in err
    assert "no such file" in err
    code, _, err = run(capsys, "classify", "x" * 300)
    assert code == 1
    assert "no such file" in err


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser writes everywhere")
@pytest.mark.usefixtures("nothing_is_computed")
def test_a_place_that_cannot_be_written_to(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    command = ["restore", picture(tmp_path / "x.png"), "-o", tmp_path / "locked" / "out", "--model", upscaler]
    assert "cannot be written to" in error_of(capsys, *command, code=1)


def test_conversions_are_said_first(
    capsys: Captured, upscaler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong suffix, and what a format cannot hold; once each; what cannot be done stops nothing."""
    picture(tmp_path / "in" / "wrong.jpg", mode="RGBA", format="PNG")
    picture(tmp_path / "in" / "cmyk.tif", mode="CMYK")
    (tmp_path / "in" / "bad.png").write_text("no picture")
    genuine, said = inference.restore_picture, []

    def restore_picture(*args: Any, **options: Any) -> Any:
        said.append(capsys.readouterr().err)
        return genuine(*args, **options)

    monkeypatch.setattr(inference, "restore_picture", restore_picture)
    code, _, err = run(
        capsys, "restore", tmp_path / "in", "-o", tmp_path / "out", "--model", upscaler, "--format", "webp"
    )
    assert code == 1
    assert "wrong.jpg: this is a PNG file; the result is written as WEBP" in said[0]
    assert "cmyk.tif: WEBP: CMYK becomes RGB" in said[0]
    assert "1 of 3 cannot be done" in said[0]
    assert "CMYK" not in err, "once is enough"
    assert "bad.png is not an image" in err
    assert names(tmp_path / "out") == ["cmyk.webp", "wrong.webp"]
    code, _, err = run(capsys, "restore", tmp_path / "in" / "wrong.jpg", "-o", tmp_path / "kept", "--model", upscaler)
    assert code == 0
    with Image.open(tmp_path / "kept" / "wrong.jpg") as image:
        assert image.format == "JPEG"


def test_frames_that_are_not_written_are_not_restored(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    """A long animation to a JPEG takes as long as one picture."""
    frames = [Image.new("RGB", (12, 9), (40 * index, 90, 9)) for index in range(4)]
    for name in ("a.gif", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    for name, target, count in (
        ("a.gif", "b.jpg", 1),
        ("a.tif", "c.webp", 1),
        ("a.gif", "d.png", 4),
        ("a.tif", "e.tif", 4),
    ):
        command = ["restore", tmp_path / name, "-o", tmp_path / target, "--model", upscaler, "--json"]
        code, out, err = run(capsys, *command)
        assert code == 0, err
        (entry,) = json.loads(out)["restored"]
        assert entry.get("frames", 1) == count
        assert entry["method"] == (f"{count} frames" if count > 1 else "whole")
        assert any("only the first of 4" in text for text in entry["warnings"]) == (count == 1)
        with Image.open(tmp_path / target) as image:
            assert getattr(image, "n_frames", 1) == count


def test_formats_of_results(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    """The name of the result says the format; one that can only be read becomes the nearest; the umask holds."""
    source = picture(tmp_path / "a.png", mode="RGBA")
    for name, known in (("b.avif", "AVIF"), ("c.jxl", "JXL"), ("d.jfif", "JPEG"), ("e.jp2", "JPEG2000")):
        kept = os.umask(0o027)
        try:
            assert run(capsys, "restore", source, "-o", tmp_path / name, "--model", upscaler)[0] == 0
        finally:
            os.umask(kept)
        with Image.open(tmp_path / name) as image:
            assert image.format == known
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    picture(tmp_path / "x.png").rename(tmp_path / "x.psd")
    code, _, err = run(capsys, "restore", tmp_path / "x.psd", "-o", tmp_path / "out", "--model", upscaler)
    assert (code, names(tmp_path / "out")) == (0, ["x.png"])
    assert "x.psd: .psd cannot be written; the result is a .png" in err


def test_strip_and_dates(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", comment=b"(c) me", dpi=(300, 300))
    os.utime(source, (1_000_000_000, 1_000_000_000))
    for options, comment in (([], b"(c) me"), (["--strip"], None)):
        run(capsys, "restore", source, "-o", tmp_path / "b.jpg", "--model", upscaler, "--force", *options)
        found = open_picture(tmp_path / "b.jpg").metadata
        assert (found.comment, found.dpi is None) == (comment, comment is None)
        assert ((tmp_path / "b.jpg").stat().st_mtime == 1_000_000_000) == (comment is not None)


# --- pipes


class Pipe:
    """Stands for a stream of the process."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)

    def write(self, text: str) -> int:
        return self.buffer.write(text.encode())

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def test_pipes(capsys: Captured, upscaler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture comes through the input and goes through the output, and nothing else does."""
    data = picture(tmp_path / "a.webp").read_bytes()
    for options, known in (([], "WEBP"), (["--format", "png"], "PNG")):
        monkeypatch.setattr(sys, "stdin", Pipe(data))
        output = Pipe()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            code = run(capsys, "restore", "-", "-o", "-", "--model", upscaler, *options)[0]
        assert code == 0
        with Image.open(io.BytesIO(output.buffer.getvalue())) as image:
            assert (image.format, image.size) == (known, (24, 18))
    half = io.BytesIO()
    tifffile.imwrite(half, np.zeros((9, 12, 3), np.float16), photometric="rgb", metadata=None)  # unknown to Pillow
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    for content in (half.getvalue(), data):
        monkeypatch.setattr(sys, "stdin", Pipe(content))
        command = ["restore", "-", "-o", tmp_path / "piped", "--model", upscaler, "--max-pixels", "108"]
        code, _, err = run(capsys, *command)
        assert code == 0, err
    assert names(tmp_path / "piped") == ["stdin.tif", "stdin.webp"]
    monkeypatch.setattr(sys, "stdin", Pipe(b"nonsense"))
    assert "The input of 8 bytes is not an image" in error_of(
        capsys, "restore", "-", "-o", tmp_path, "--model", upscaler, code=1
    )
    monkeypatch.setattr(sys, "stdin", Pipe(picture(tmp_path / "a.png").read_bytes()[:200]))
    code, _, err = run(capsys, "restore", "-", "-o", tmp_path / "cut.png", "--model", upscaler, "--max-pixels", "108")
    assert code == 1
    assert "zoo: -: the input is damaged: " in err
    assert not (tmp_path / "cut.png").exists()
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png")
    assert "-o - takes one picture, got 2" in error_of(
        capsys, "restore", tmp_path / "in", "-o", "-", "--model", upscaler
    )
    assert "--report writes a file" in error_of(capsys, "restore", "-", "-o", "-", "--json")


# --- any size


@pytest.mark.parametrize(
    ("factor", "scales", "expected"),
    [
        (2, (2, 4), (2,)),
        (2.5, (2, 4), (4,)),
        (3, (2, 4), (4,)),
        (3, (2, 3, 4), (3,)),
        (4, (2, 4), (4,)),
        (8, (2, 4), (4, 2)),
        (6, (2, 3), (3, 2)),
        (8, (2,), (2, 2, 2)),
        (1, (2, 4), ()),
        (0.3, (2,), ()),
        (100, (2,), (2, 2, 2, 2)),
    ],
)
def test_chains(factor: float, scales: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert chain(factor, scales) == expected


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--scale", "2.5"], (30, 22)),
        (["--scale", "x3"], (36, 27)),
        (["--scale", "8"], (96, 72)),
        (["--width", "50"], (50, 38)),
        (["--height", "30"], (40, 30)),
        (["--width", "50", "--height", "20"], (50, 20)),
        (["--max-side", "6"], (6, 4)),
        (["--crop", "6x4+1+2"], (12, 8)),
        (["--crop", "6x4", "--scale", "3"], (18, 12)),
    ],
)
def test_any_size(capsys: Captured, upscaler: str, tmp_path: Path, options: list[str], size: tuple[int, int]) -> None:
    source = picture(tmp_path / "a.png", mode="RGBA")
    code, _, err = run(capsys, "restore", source, "-o", tmp_path / "b.png", "--model", upscaler, *options)
    assert code == 0
    with Image.open(tmp_path / "b.png") as image:
        assert (image.size, image.mode) == (size, "RGBA")
    assert ("the result is smaller" in err) == (options[0] == "--max-side")


def test_a_part_looks_as_in_the_whole(upscaler: str, tmp_path: Path) -> None:
    """As far as the network sees, or 64 pixels, is computed around it."""
    from zoo.factory import create_model

    model = create_model(upscaler, pretrained=True).eval()
    source = picture(tmp_path / "a.png", (150, 140))
    whole = np.asarray(restore(source, model=model), int)
    part = np.asarray(restore(source, model=model, crop=(70, 60, 100, 90)), int)
    assert part.shape == (60, 60, 3)
    assert np.abs(part - whole[120:180, 140:200]).max() <= 1
    corner = np.asarray(restore(source, model=model, crop="30x20+0+0"), int)
    assert np.abs(corner - whole[:40, :60]).max() <= 1
    assert crop_box("30x20", (140, 150)) == (60, 60, 90, 80)
    for wrong in ("30", "30x20+150+0", (5, 5, 5, 9)):
        with pytest.raises(ValueError, match=r"A part is written|lies outside|is empty"):
            crop_box(wrong, (140, 150))  # type: ignore[arg-type]


def test_lanczos_keeps_light(upscaler: str) -> None:
    """Fine black and white lines shrink to the gray that gives as much light, not to the middle of the numbers."""
    from zoo.factory import create_model

    model = create_model(upscaler, pretrained=True).eval()
    lines = np.zeros((64, 64), np.uint8)
    lines[:, ::2] = 255
    shrunk = np.asarray(restore(lines, model=model, max_side=16), int)
    assert shrunk.shape == (16, 16)
    assert abs(shrunk[4:-4, 4:-4].mean() - 188) <= 2
    flat = restore(np.full((9, 8, 3), 0.25, np.float32), model=model, width=20, height=11)
    assert flat.shape == (11, 20, 3)


def test_sizes_in_python(upscaler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped networks are chosen by the factor and follow each other; one of scale 1 is not enlarged by a scale."""
    asked: list[int | None] = []

    class Nearest(torch.nn.Module):
        def __init__(self, scale: int) -> None:
            super().__init__()
            self.scale, self.one = scale, torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3) * self.one

    def load(task: str, scale: int | None = None, *_: Any, **__: Any) -> torch.nn.Module:
        asked.append(scale)
        return Nearest(1 if task == "denoise" else scale or 1)

    monkeypatch.setattr(inference, "load_restorer", load)
    monkeypatch.setattr(inference, "shipped_scales", lambda task, kind="clean": (2, 4) if task == "sr" else ())
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    for options, networks, size in (
        ({"scale": 8}, [4, 2], (72, 96)),
        ({"scale": 3}, [4], (27, 36)),
        ({}, [2], (18, 24)),
        ({"width": 30}, [2, 4], (22, 30)),
    ):
        asked.clear()
        assert restore(image, **options).shape == (*size, 3)
        assert asked == networks
    with pytest.raises(ValueError, match="restores at scale 1, not 2"):
        restore(image, task="denoise", scale=2)
    assert restore(image, task="denoise", max_side=6).shape == (4, 6, 3)
    with pytest.raises(ValueError, match="more than one is given"):
        restore(image, scale=2, width=5)


# --- evaluate


def test_evaluate_names_the_file(capsys: Captured, tmp_path: Path) -> None:
    """In every error; hidden files are no images of the set."""
    photo_folder(tmp_path / "set", 2, (40, 36))
    (tmp_path / "set" / "._photo0.png").write_bytes(b"resource fork")
    (tmp_path / "set" / ".thumbnails").mkdir()
    (tmp_path / "set" / ".thumbnails" / "x.png").write_bytes(b"")
    assert [path.name for path in find_images(tmp_path / "set")] == ["photo0.png", "photo1.png"]
    command = ["evaluate", "bicubic", "--scale", "2", "--data", tmp_path / "set", "-q"]
    assert run(capsys, *command)[0] == 0
    picture(tmp_path / "set" / "tiny.png", (9, 9))
    assert "tiny.png: " in error_of(capsys, *command)
    (tmp_path / "set" / "tiny.png").unlink()
    picture(tmp_path / "set" / "cmyk.tif", (40, 36), "CMYK")
    assert "cmyk.tif is a CMYK image" in error_of(capsys, *command)


def test_pages_of_several_sizes(upscaler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are chosen for the page that is enlarged most, and a part has to lie in every page."""
    from zoo.factory import create_model

    large, small = (np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8) for side in (40, 10))
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        for page in (large, small):
            writer.write(page, photometric="rgb", metadata=None)
    monkeypatch.setattr(inference, "shipped_scales", lambda task, kind="clean": (2,))
    model = create_model(upscaler, pretrained=True).eval()
    monkeypatch.setattr(inference, "load_restorer", lambda *_, **__: model)
    network = inference.Networks(inference.Size(width=20))
    source = open_picture(tmp_path / "x.tif", every_frame=True)
    assert network.reaching(source.size, source) == [model]  # the first page alone would need none
    result = inference.restore_picture(source, [model], size=network.size)
    assert [page.size for page in (result, *result.frames)] == [(20, 20), (20, 20)]
    monkeypatch.setattr(inference, "restore_tensor", lambda *_, **__: pytest.fail("a page was restored"))
    with pytest.raises(ValueError, match="lies outside 10x10 pixels"):
        inference.restore_picture(source, [model], crop="8x8+20+20")


def test_a_result_has_to_fit_the_budget(upscaler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lanczos makes has no tiles: it is refused before anything is computed, not when the memory is full."""
    monkeypatch.setattr(inference, "restore_tensor", lambda *_, **__: pytest.fail("a picture was restored"))
    for size in ({"width": 60_000}, {"max_side": 999_999}):
        with pytest.raises(ValueError, match=r"A budget of 4000 MB is too small for a result of \d+x\d+ pixels: allow"):
            restore(Image.new("RGB", (12, 9)), model=upscaler, **size)


def test_remarks_are_made_once(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    """What was said before the work is not said again after it, with what only the work showed."""
    pages = [Image.new("RGB", (12, 9), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:], software="camera")
    command = ["restore", tmp_path / "x.tif", "-o", tmp_path / "x.gif", "--model", upscaler]
    code, _, err = run(capsys, *command)
    assert code == 0
    assert err.count("only the first of 2 pages is written") == 1
    assert "GIF: there is no place for EXIF." in err
