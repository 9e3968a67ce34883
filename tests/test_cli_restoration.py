"""`zoo restore` beyond the plain case, and `zoo evaluate`: metrics, reports, pages, names, and failures in a batch."""

from __future__ import annotations

import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_sets import photo_folder
from PIL import Image
from registered import build
from test_cli import error_of, run
from tiny_folders import classifier_folder, restorer_folder
from torch import Tensor, nn

from zoo.cli import compare, restore
from zoo.cli.inputs import find_pictures
from zoo.data.resize import imresize
from zoo.evaluation.metrics import psnr, ssim
from zoo.evaluation.protocols import PROTOCOLS
from zoo.pictures import restore as inference
from zoo.weights import save_checkpoint

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(restorer_folder(tmp_path_factory.mktemp("models") / "restorer"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three low-resolution pictures, and their originals in `tmp_path/HR`."""
    photo_folder(tmp_path / "HR", 3, (40, 36))
    for path in sorted((tmp_path / "HR").iterdir()):
        (tmp_path / "low").mkdir(exist_ok=True)
        low = imresize(np.asarray(Image.open(path)), 0.5)
        Image.fromarray(low).save(tmp_path / "low" / f"{path.stem}x2.png")
    return tmp_path / "low"


DENOISER = "restormer_tiny_denoise_color.bsds"


class Same(nn.Module):
    """A denoiser of scale 1 that adds a little or nothing."""

    scale, in_chans, multiple_of = 1, 3, 1

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.pretrained_cfg = dict(architecture="same", task="denoise", sigma=25)
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


@pytest.fixture
def denoiser(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make `load_restorer` return a denoiser; the arguments that it got are in the returned dictionary."""
    asked: dict[str, Any] = {"offset": 0.0}

    def load(task: str, scale: Any, model: Any, weights: Any, **options: Any) -> nn.Module:
        asked.update(task=task, scale=scale, model=model, weights=weights, **options)
        return Same(asked["offset"])

    monkeypatch.setattr(inference, "load_restorer", load)
    return asked


# --- restore: reports, metrics, names


def test_report_and_metrics(capsys: Captured, upscaler: str, photos: Path, tmp_path: Path) -> None:
    """Every picture is measured against its reference, by the task's protocol, on the file as it was written."""
    command = ["restore", photos, "-o", tmp_path / "out", "--model", upscaler, "--metrics", tmp_path / "HR"]
    code, text, _ = run(capsys, *command, "--report", tmp_path / "report.json")
    assert code == 0
    assert "Mean of 3: PSNR" in text
    assert "y-crop" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["scale"], report["task"], report["settings"]["jpeg_quality"]) == (2, "sr", 95)
    values = []
    for entry in report["restored"]:
        stem = Path(entry["file"]).stem.removesuffix("x2")
        pair = [
            torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
            for path in (entry["output"], tmp_path / "HR" / f"{stem}.png")
        ]
        expected = {"psnr": psnr(*pair, space="y", crop=2), "ssim": ssim(*pair, space="y", crop=2)}
        assert entry["metrics"] == pytest.approx({key: float(value) for key, value in expected.items()})
        assert entry["warnings"] == []
        assert entry["method"] == "whole"
        assert entry["seconds"] > 0
        values.append(entry["metrics"]["psnr"])
    assert report["metrics"]["protocol"] == "y-crop"
    assert report["metrics"]["means"]["psnr"] == pytest.approx(np.mean(values))
    again = json.loads(run(capsys, *command, "--skip-existing", "--json")[1])  # also of what exists
    assert (len(again["skipped"]), again["restored"]) == (3, [])
    assert again["metrics"]["means"] == pytest.approx(report["metrics"]["means"])


def test_the_method_is_said(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    photo_folder(tmp_path / "in", 1, (90, 70))
    command = ["restore", tmp_path / "in", "-o", tmp_path / "out", "--model", upscaler, "--tile", "24"]
    _, text, err = run(capsys, *command)
    assert re.search(r"\d+ tiles, blended", text)
    assert "blended over 3 pixels" in err
    assert "--exact insists" in err
    _, text, err = run(capsys, *command, "--force", "--exact")
    assert re.search(r"\d+ tiles, exact", text)
    assert "times the work of the whole picture" in err


def test_references_that_do_not_fit(capsys: Captured, upscaler: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "HR" / "photo1.png").unlink()
    Image.new("RGB", (50, 36)).save(tmp_path / "HR" / "photo2.png")
    command = ["restore", photos, "-o", tmp_path / "out", "--model", upscaler, "--metrics"]
    code, _, err = run(capsys, *command, tmp_path / "HR")
    assert code == 0
    assert "photo1x2.png: no reference of this name" in err
    assert "photo2x2.png: the reference has 50x36 pixels, the result 40x36" in err
    photo_folder(tmp_path / "others").joinpath("photo0.png").rename(tmp_path / "others" / "other.png")
    (tmp_path / "others" / "photo1.png").unlink()
    assert "has no picture that is called like one of the 3 inputs" in error_of(capsys, *command, tmp_path / "others")
    assert "there is no folder" in error_of(capsys, *command, tmp_path / "none")


def test_template_format_and_quality(capsys: Captured, upscaler: str, photos: Path, tmp_path: Path) -> None:
    """Names are made of fields; formats and their quality are as asked."""
    command = ["restore", photos, "--model", upscaler, "-q", "--template", "{index:03d}_{stem}_x{scale}{suffix}"]
    sizes = []
    for quality in (20, 95):
        out = tmp_path / str(quality)
        code, text, _ = run(capsys, *command, "-o", out, "--format", "jpg", "--jpeg-quality", str(quality))
        assert code == 0
        assert [Path(line).name for line in text.split()] == [f"{i:03d}_photo{i}x2_x2.jpg" for i in range(3)]
        sizes.append(sum(path.stat().st_size for path in out.iterdir()))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "{name}.png"], "--template names a file with {stem}, {suffix}"),
        (["--template", "fixed.png"], "--template names a file with"),
        (["--template", "../{stem}{suffix}"], "--template names a file with"),
        (["--template", "{stem"], "--template '{stem'"),
        (["--template", "{stem:d}"], "--template '{stem:d}'"),
        (["--template", "{scale}.png"], "would both become"),
        (["--jpeg-quality", "0"], "--jpeg-quality must be from 1 to 100, got 0"),
        (["--scale", "0"], "'0' is no scale; write 2, 2.5 or x8"),
        (["--scale", "3", "--width", "100"], "more than one is given"),
        (["--crop", "10"], "--crop takes"),
        (["--format", "txt"], "no format that can be written"),
        (["--compare", "page.png"], "--compare writes a .html file"),
        (["--sigma", "15"], "--sigma is the noise of --task denoise, at least 0; got 15 for sr"),
        (["--task", "denois"], "Did you mean denoise?"),
    ],
)
def test_wrong_options(
    capsys: Captured, upscaler: str, photos: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    command = ["restore", photos, "-o", tmp_path / "out", "--model", upscaler, "--task", "sr"]
    assert message in error_of(capsys, *command, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["denoise", "deblur", "derain", "defocus"])
def test_weights_that_are_not_shipped(
    capsys: Captured, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(restore, "_ships", lambda asked: asked == "sr")
    message = error_of(capsys, "restore", photos, "-o", tmp_path / "out", "--task", task)
    assert f"No weights for {task} are shipped yet: give a weight file with --weights" in message
    assert "cfsr_x2 is for sr, not" in error_of(
        capsys, "restore", photos, "-o", tmp_path / "out", "--task", task, "--model", "cfsr_x2"
    )


def test_weights_file_alone(capsys: Captured, photos: Path, tmp_path: Path) -> None:
    """Architecture and scale are recognised from the file."""
    model = timm.create_model("cfsr_x2")
    save_checkpoint(model.state_dict(), tmp_path / "any.safetensors")
    command = ["restore", photos, "-o", tmp_path / "out", "--weights", tmp_path / "any.safetensors", "--json"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    report = json.loads(out)
    assert (report["model"], len(report["restored"])) == ("cfsr_x2", 3), "not the published weights' name"
    assert report["settings"]["weights"] == str(tmp_path / "any.safetensors")


def test_sigma_reaches_the_choice_of_weights(
    capsys: Captured, photos: Path, tmp_path: Path, denoiser: dict[str, Any]
) -> None:
    code, _, _ = run(
        capsys, "restore", photos, "-o", tmp_path / "out", "--sigma", "25", "--model", DENOISER.partition(".")[0]
    )
    assert code == 0
    assert (denoiser["sigma"], denoiser["model"]) == (25.0, DENOISER.partition(".")[0])


def test_what_hardly_changed_is_said(capsys: Captured, photos: Path, tmp_path: Path, denoiser: dict[str, Any]) -> None:
    """A denoiser that finds no noise: which other tasks there are; no word where it did something."""
    command = ["restore", photos, "-o", tmp_path / "out", "--weights", "x.pth", "--task", "denoise", "--force"]
    _, _, err = run(capsys, *command)
    assert "3 of 3 hardly changed" in err
    assert "deblur (motion blur)" in err
    denoiser["offset"] = 0.1
    assert run(capsys, *command)[2] == ""


def test_warnings_belong_to_their_picture(
    capsys: Captured, photos: Path, tmp_path: Path, denoiser: dict[str, Any]
) -> None:
    frames = [Image.new("L", (12, 9), level) for level in (10, 200)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    command = ["restore", photos, "-o", tmp_path / "out", "--weights", "x.pth", "--task", "denoise", "--json"]
    report = json.loads(run(capsys, *command)[1])
    said = {Path(entry["file"]).name: entry["warnings"] for entry in report["restored"]}
    assert said.pop("moving.gif") == []
    assert not any(said.values())
    (photos / "not.jpg").write_bytes((photos / "photo0x2.png").read_bytes())
    report = json.loads(run(capsys, *command, "--force")[1])
    said = {Path(entry["file"]).name: entry["warnings"] for entry in report["restored"]}
    assert said.pop("not.jpg") == ["this is a PNG file; the result is written as JPEG"]
    assert not any(said.values())


def test_a_full_disk_fails_one_picture(
    capsys: Captured, upscaler: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, nothing half-written, the rest done, exit code 1."""
    save = Image.Image.save

    def full(self: Image.Image, file: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, file, *args, **kwargs)

    calls: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "save", full)
    code, out, err = run(capsys, "restore", photos, "-o", tmp_path / "out", "--model", upscaler, "-q")
    assert code == 1
    assert len(out.split()) == 2
    assert err.count("\n") == 1
    assert "photo1x2.png: Cannot write" in err
    assert "No space left on device" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["photo0x2.png", "photo2x2.png"]


def test_frames_keep_their_order(tmp_path: Path) -> None:
    for name in ("frame10.png", "frame2.png", "frame1.png", "b/x.png", "a10/x.png", "a9/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [picture.relative.as_posix() for picture in find_pictures([str(tmp_path)])]
    assert found == ["frame1.png", "frame2.png", "frame10.png", "a9/x.png", "a10/x.png", "b/x.png"]
    matches = [picture.path.name for picture in find_pictures([str(tmp_path / "frame*.png")])]
    assert matches == ["frame1.png", "frame2.png", "frame10.png"]


# --- restore: the page


class Page(HTMLParser):
    """Reads a page: its tags balance, and it asks for nothing from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "input", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_is_one_file(
    capsys: Captured, upscaler: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slider for each picture, all embedded; names are escaped; a large picture has a detail; no more than fit."""
    Image.open(photos / "photo0x2.png").save(photos / "<b>&.png")
    command = ["restore", photos, "-o", tmp_path / "out", "--model", upscaler, "--compare", tmp_path / "page.html"]
    assert run(capsys, *command)[0] == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert len(page.all("input")) == 4
    assert all(attributes["aria-label"] and attributes["type"] == "range" for attributes in page.all("input"))
    assert all(str(attributes["src"]).startswith("data:image/png;base64,") for attributes in page.all("img"))
    assert len(page.all("img")) == 8
    assert re.search(r"(src|href)=.?(https?:)?//", text) is None
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;.png" in text
    assert "20x18 -&gt; 40x36 pixels" in text
    assert "--force" in error_of(capsys, *command)
    monkeypatch.setattr(compare, "_LONGEST", 32)
    monkeypatch.setattr(compare, "_DETAIL", (16, 16))
    monkeypatch.setattr(compare, "_LOSSLESS", 300)
    monkeypatch.setattr(compare, "_MOST", 2)
    _, _, err = run(capsys, *command, "--skip-existing")
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.all("input")) == 4, "two pictures, each with a detail"
    assert {str(attributes["src"])[11:15] for attributes in page.all("img")} == {"png;", "jpeg"}
    assert "shows the first 2; 2 are left out" in err


def test_the_detail_is_where_most_has_changed() -> None:
    before = Image.new("RGB", (3000, 2000), (90, 90, 90))
    after = before.copy()
    after.paste((200, 90, 90), (2100, 1500, 2200, 1600))
    left, top, right, bottom = compare._most_changed(before, after)
    assert (right - left, bottom - top) == (960, 640)
    assert left <= 2100
    assert right >= 2200
    assert top <= 1500
    assert bottom >= 1600


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "CMYK", "I;16", "F"])
def test_every_kind_of_picture_can_be_shown(mode: str) -> None:
    values = np.linspace(0, 1, 12 * 9).reshape(9, 12)
    made = {"I;16": (values * 65535).astype(np.uint16), "F": values.astype(np.float32)}
    image = (
        Image.fromarray(made[mode]) if mode in made else Image.fromarray((values * 255).astype(np.uint8)).convert(mode)
    )
    shown = compare._shown(inference.open_picture(image))
    assert (shown.mode, shown.size) == ("RGB", (12, 9))
    assert int(np.asarray(shown).max()) > 200


# --- evaluate


def test_evaluate_a_baseline(capsys: Captured, photos: Path, tmp_path: Path) -> None:
    """HR and LR folders, or HR alone with LR made: the same numbers; as table, JSON and bare."""
    (tmp_path / "HR").rename(tmp_path / "set-HR")
    (tmp_path / "Set3" / "LR_bicubic").mkdir(parents=True)
    (tmp_path / "set-HR").rename(tmp_path / "Set3" / "HR")
    photos.rename(tmp_path / "Set3" / "LR_bicubic" / "X2")
    sets = [f"read={tmp_path / 'Set3'}", f"made={tmp_path / 'Set3' / 'HR'}"]
    command = ["evaluate", "bicubic", "--scale", "2", "--data", *sets]
    code, out, _ = run(capsys, *command, "--json")
    assert code == 0
    report = json.loads(out)
    read, made = report["sets"]
    assert report["protocol"] == "y-crop"
    assert (read["images"], read["made"], made["made"]) == (3, 0, 3)
    assert read["psnr"] == pytest.approx(made["psnr"], abs=1e-9)
    assert np.mean([image["psnr"] for image in read["per_image"]]) == pytest.approx(read["psnr"])
    code, out, _ = run(capsys, *command, "--limit", "1")
    assert "1 of 3" in out
    assert "Protocol y-crop: BasicSR's" in out
    assert "degraded images made here: made." in out
    lines = run(capsys, *command, "-q")[1].splitlines()
    assert [line.split("\t")[0] for line in lines] == ["read", "made"]


def test_evaluate_a_classifier_names_the_command_that_does(capsys: Captured, tmp_path: Path) -> None:
    model = classifier_folder(tmp_path / "my model")
    data = ["--data", f"x={tmp_path}"]
    error = error_of(capsys, "evaluate", "repavit_tiny.cifar10", *data)
    assert "zoo train validate --config classification/repavit_tiny_cifar10 --model.init_args.model repavit" in error
    assert "--config CONFIG" in error_of(capsys, "evaluate", model, *data)
    (model / "training.yaml").touch()
    assert f"--config '{model}/training.yaml'" in error_of(capsys, "evaluate", model, *data)


def test_evaluate_a_model(capsys: Captured, upscaler: str, tmp_path: Path) -> None:
    """What the network gives is measured; eight flips change it."""
    photo_folder(tmp_path / "HR", 2, (40, 36))
    values = []
    for options in ([], ["--self-ensemble"]):
        report = json.loads(run(capsys, "evaluate", upscaler, "--data", tmp_path / "HR", "--json", *options)[1])
        assert (report["scale"], report["sets"][0]["set"]) == (2, "HR")
        values.append(report["sets"][0]["psnr"])
    assert values[0] != values[1]


def test_evaluate_noise(capsys: Captured, tmp_path: Path, denoiser: dict[str, Any]) -> None:
    """Several strengths, the protocol's noise; the baseline is what the unchanged image has."""
    photo_folder(tmp_path / "val", 2, (40, 36))
    data = ["--data", f"set={tmp_path / 'val'}", "--json"]
    baseline = json.loads(run(capsys, "evaluate", "input", "--sigma", "15,50", *data)[1])
    model = json.loads(run(capsys, "evaluate", DENOISER, "--sigma", "15,50", *data)[1])
    assert [entry["sigma"] for entry in model["sets"]] == [15, 50]
    for a, b in zip(baseline["sets"], model["sets"], strict=True):
        assert a["psnr"] == pytest.approx(b["psnr"])
    assert baseline["sets"][0]["psnr"] == pytest.approx(24.6, abs=0.5)
    assert denoiser["sigma"] is None, "weights that are named serve for every strength"
    own = json.loads(run(capsys, "evaluate", DENOISER, *data)[1])
    assert [entry["sigma"] for entry in own["sets"]] == [25]
    run(capsys, "evaluate", DENOISER.partition(".")[0], "--sigma", "15,50", *data)
    assert denoiser["sigma"] == 50, "weights for one strength are found by it"


def test_evaluate_pairs(capsys: Captured, tmp_path: Path, denoiser: dict[str, Any]) -> None:
    """Deblurring, deraining and defocus sets come with their degraded images."""
    photo_folder(tmp_path / "set" / "target", 2)
    photo_folder(tmp_path / "set" / "input", 2)
    for name in ("derain", "deblur", "dpdd", "sidd"):
        report = json.loads(
            run(
                capsys,
                "evaluate",
                DENOISER,
                "--protocol",
                name,
                "--data",
                tmp_path / "set",
                "--json",
            )[1]
        )
        assert report["protocol"] == name
        assert report["sets"][0]["ssim"] == pytest.approx(1)
        assert ("mae" in report["sets"][0]) == PROTOCOLS[name].mae
    alone = tmp_path / "set" / "target"
    assert "needs degraded images as files" in error_of(
        capsys, "evaluate", DENOISER, "--protocol", "derain", "--data", alone
    )


def test_evaluate_reads_degraded_images_as_they_are(capsys: Captured, tmp_path: Path, denoiser: dict[str, Any]) -> None:
    """A set that holds its own is measured once, and no quality or noise is said that it does not have."""
    for part in ("HR", "LR_bicubic"):
        photo_folder(tmp_path / "set" / part, 2)
    data = ["--data", f"mine={tmp_path / 'set'}", f"made={tmp_path / 'set' / 'HR'}", "--json"]
    call = ["evaluate", "input", "--protocol", "jpeg"]
    sets = json.loads(run(capsys, *call, "--scale", "1", *data)[1])["sets"]
    assert [(each["set"], each["jpeg_quality"]) for each in sets] == [("mine", None), ("made", 40)]
    assert "-" in run(capsys, *call, "--scale", "1", *data[:-1])[1]
    error = error_of(capsys, *call, "--jpeg-quality", "75,50", *data)
    assert f"mine holds its own, {tmp_path / 'set' / 'LR_bicubic'}: give the clean ones alone" in error
    assert f"mine={tmp_path / 'set' / 'HR'}" in error
    noisy = json.loads(run(capsys, "evaluate", "input", "--protocol", "rgb", *data)[1])["sets"]
    assert [(each["set"], each["sigma"]) for each in noisy] == [
        ("mine", None), ("made", 15), ("made", 25), ("made", 50)
    ]  # fmt: skip
    assert "--sigma with several values" in error_of(capsys, "evaluate", "input", "--sigma", "15,25", *data)
    told = json.loads(run(capsys, "evaluate", DENOISER, "--sigma", "15", *data)[1])["sets"]
    assert [each["sigma"] for each in told] == [15, 15]


# --- two views of a dual-pixel sensor


@pytest.fixture
def dual(tmp_path: Path) -> str:
    """Write weights of a network that makes one picture of two views, and views laid out as DPDD's."""
    save_checkpoint(build("restormer", in_chans=6, dual_pixel=True).state_dict(), tmp_path / "dual.safetensors")
    for folder in ("target", "inputC", "inputL", "inputR"):
        photo_folder(tmp_path / "DPDD" / folder, 2, (24, 20))
    return str(tmp_path / "dual.safetensors")


def test_restore_two_views(capsys: Captured, dual: str, tmp_path: Path) -> None:
    """Left views with their right ones, by name; one that has none fails alone."""
    left, right = tmp_path / "DPDD" / "inputL", tmp_path / "DPDD" / "inputR"
    command = ["restore", left, "--right", right, "-o", tmp_path / "out", "--weights", dual]
    code, out, _ = run(capsys, *command, "--compare", tmp_path / "page.html", "--metrics", right, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["task"] == "defocus"
    assert [Path(entry["right"]).parent.name for entry in report["restored"]] == ["inputR"] * 2
    assert Image.open(tmp_path / "out" / "photo0.png").mode == "RGB"
    assert (tmp_path / "page.html").is_file()
    (right / "photo1.png").unlink()
    code, _, err = run(capsys, *command, "--force")
    assert code == 1
    assert "There is no right view of this name" in err
    single = ["restore", left / "photo0.png", "--right", right / "photo0.png", "-o", tmp_path / "one.png"]
    assert run(capsys, *single, "--weights", dual)[0] == 0
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "one.png")), np.asarray(Image.open(tmp_path / "out/photo0.png"))
    )


def test_views_and_weights_that_do_not_fit(capsys: Captured, dual: str, upscaler: str, tmp_path: Path) -> None:
    left, right, out = tmp_path / "DPDD" / "inputL", tmp_path / "DPDD" / "inputR", ["-o", tmp_path / "out"]
    assert "give the right ones by --right" in error_of(capsys, "restore", left, *out, "--weights", dual)
    wrong = ["restore", left, *out, "--right", right]
    assert "restores one picture, not two views: leave out --right" in error_of(capsys, *wrong, "--model", upscaler)
    assert "No weights for defocus are shipped yet" in error_of(capsys, *wrong)
    assert "--right: there is no folder" in error_of(capsys, *wrong[:-1], tmp_path / "nowhere", "--weights", dual)


def test_evaluate_two_views(capsys: Captured, dual: str, tmp_path: Path) -> None:
    report = json.loads(run(capsys, "evaluate", dual, "--data", tmp_path / "DPDD", "--json")[1])
    (found,) = report["sets"]
    assert report["protocol"] == "dpdd"
    assert (found["images"], found["made"]) == (2, 0)
    (tmp_path / "DPDD" / "inputR").rename(tmp_path / "DPDD" / "right")
    assert "no folders inputL and inputR" in error_of(capsys, "evaluate", dual, "--data", tmp_path / "DPDD")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bicubic"], "bicubic needs a --scale of at least 2"),
        (["input", "--scale", "2"], "input has none"),
        (["bicubic", "--scale", "2", "--protocol", "ycrop"], "Did you mean y-crop?"),
        (["bicubic", "--scale", "2", "--sigma", "25"], "--sigma is for a protocol that adds noise"),
        (["input", "--sigma", "a,b"], "--sigma takes numbers from 0 to 255"),
        (["input", "--limit", "0"], "--limit must be at least 1"),
        (["input", "--protocol", "y-crop"], "is for super-resolution"),
        (["cfsr_x22"], "Did you mean cfsr_x2"),
    ],
)
def test_evaluate_mistakes(capsys: Captured, tmp_path: Path, argv: list[str], message: str) -> None:
    photo_folder(tmp_path / "HR", 1)
    assert message in error_of(capsys, "evaluate", *argv, "--data", tmp_path / "HR")


def test_evaluate_wrong_sets(capsys: Captured, tmp_path: Path) -> None:
    photo_folder(tmp_path / "HR", 1)
    command = ["evaluate", "bicubic", "--scale", "2", "--data"]
    assert "there is no folder or list" in error_of(capsys, *command, "a=nowhere")
    assert "different names" in error_of(capsys, *command, f"a={tmp_path}", f"a={tmp_path}")
    (tmp_path / "empty").mkdir()
    assert "No image" in error_of(capsys, *command, tmp_path / "empty")
    (tmp_path / "HR" / "bad.png").write_text("no picture")
    assert "bad.png is not an image" in error_of(capsys, *command, tmp_path / "HR")
