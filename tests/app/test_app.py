"""What the page of `zoo app` does with what it is given, without a browser."""

from __future__ import annotations

import ast
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageSequence

from zoo.cli import main
from zoo.cli.app import exploring, generating, plot
from zoo.cli.app.offers import Offers
from zoo.cli.app.service import Limits, Service
from zoo.cli.app.space import space_files
from zoo.cli.classify import default_model
from zoo.cli.output import UsageError
from zoo.sources import cards_dir

CLASSIFIER, RESTORER = "repavit_tiny.cifar10", "cfsr_x2.bsds"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """The page's functions with small limits."""
    made = Service(Offers.of(), Limits(pixels=100_000, result_pixels=50_000, pictures=8))
    yield made
    made.close()
    assert not made.folder.exists()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uploads that are no pictures, damaged, or made to fill the memory."""
    folder = tmp_path_factory.mktemp("odd")
    Image.new("RGB", (24, 16)).save(folder / "good.jpg")
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html><script>alert(1)</script></html>")
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:300])
    (folder / "raw.nef").write_bytes(b"II*\0" + bytes(100))
    (folder / "<b>.png").write_text("no picture")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (1, 90_000)).save(folder / "thin.png")
    frames = [Image.new("L", (100, 100), shade) for shade in range(0, 240, 20)]
    frames[0].save(folder / "long.gif", save_all=True, append_images=frames[1:])
    small, *large = Image.new("L", (2, 2)), *[Image.new("L", (300, 300))] * 2
    small.save(folder / "pages.tif", save_all=True, append_images=large)
    return {path.name: path for path in folder.iterdir()}


BAD = ("empty.png", "page.jpg", "cut.jpg", "raw.nef", "<b>.png", "bomb.png", "long.gif", "pages.tif")


def test_shipped_weights_are_offered(service: Service) -> None:
    assert CLASSIFIER in service.offers.classifiers
    assert service.offers.classifiers[0] == default_model()  # as `zoo classify`, what knows photographs
    assert RESTORER in service.offers.restorers
    assert "pixeldit.cifar10" in service.offers.pipelines
    assert {"sr", "denoise"} <= set(service.offers.tasks)


def test_own_models_appear_where_they_belong(tmp_path: Path) -> None:
    offers = Offers.of([str(cards_dir() / name) for name in (CLASSIFIER, RESTORER, "pixeldit.cifar10")])
    assert [group[0].rpartition("/")[2] for group in (offers.classifiers, offers.restorers, offers.pipelines)] == [
        CLASSIFIER, RESTORER, "pixeldit.cifar10",
    ]  # fmt: skip
    own = exploring.rows(offers)[:3]
    assert [row.weights for row in own] == ["yours"] * 3
    assert CLASSIFIER in exploring.card_of(offers.classifiers[0], offers)
    with pytest.raises(ValueError, match=r"Did you mean repavit_tiny"):
        Offers.of(["repavit_tinny"])


def test_odd_uploads_are_said_and_the_others_classified(service: Service, odd: dict[str, Path]) -> None:
    found, failed = service.classify([odd["good.jpg"], odd["thin.png"], *(odd[name] for name in BAD[:6])], [CLASSIFIER])
    assert [name for name, _ in found] == ["good.jpg"]
    (answer,) = found[0][1]
    assert len(answer.top) == 5
    assert answer.seconds > 0
    for name, line in zip(("thin.png", *BAD[:6]), failed, strict=True):
        assert name in line
        assert "\n" not in line
        assert str(odd[name].parent) not in line  # where uploads lie is nobody's business
    for files, models in (([], [CLASSIFIER]), ([odd["good.jpg"]], []), ([odd["good.jpg"]] * 9, [CLASSIFIER]),
                          ([odd["good.jpg"]], ["../../etc"])):  # fmt: skip
        with pytest.raises(UsageError):
            service.classify(files, models)


@pytest.mark.parametrize("name", BAD)
def test_odd_uploads_are_not_restored(service: Service, odd: dict[str, Path], name: str) -> None:
    before = set(service.folder.iterdir())
    with pytest.raises(UsageError) as said:
        service.restore(odd[name])
    assert name in str(said.value)
    assert str(odd[name].parent) not in str(said.value)
    assert set(service.folder.iterdir()) == before  # nothing half-done stays


@pytest.mark.parametrize("name", ["gray16.tif", "cmyk.tif", "frames.gif", "alpha.png", "sideways.jpg", "none"])
def test_the_result_has_the_format_of_the_upload(service: Service, tmp_path: Path, name: str) -> None:
    path, pixels = tmp_path / name, np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 150
    if name == "gray16.tif":
        Image.fromarray(pixels).save(path)
    elif name == "cmyk.tif":
        Image.new("CMYK", (24, 16), (10, 20, 30, 40)).save(path)
    elif name == "frames.gif":
        Image.new("L", (24, 16)).save(path, save_all=True, append_images=[Image.new("L", (24, 16), 200)])
    elif name == "sideways.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (16, 24)).save(path, exif=exif)
    else:
        Image.new("RGBA", (24, 16), (90, 80, 70, 60)).save(path, "PNG")
    done = service.restore(path)
    assert done.file.suffix == (path.suffix or ".png")
    assert done.output_size == (32, 48)
    assert done.before.size == done.after.size == (48, 32)
    with Image.open(done.file) as result, Image.open(path) as given:
        assert result.format == given.format
        assert result.mode == given.mode
        assert len(list(ImageSequence.Iterator(result))) == len(list(ImageSequence.Iterator(given)))


def test_options_that_do_not_fit_are_said(service: Service, odd: dict[str, Path]) -> None:
    cases: list[tuple[dict[str, str], str]] = [
        ({"scale": "nan"}, "no scale"), ({"scale": "64"}, "would have"), ({"budget": "x"}, "memory size"),
        ({"model": "zzz"}, "does not offer"), ({"task": "derain"}, "No weights for derain"),
        ({"quality": "z"}, "--quality"),
        ({"task": "denoise", "scale": "8"}, "at scale 8"),
    ]  # fmt: skip
    for options, said in cases:
        with pytest.raises(UsageError, match=said):
            service.restore(odd["good.jpg"], **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Choose a picture"):
        service.restore(None)


@pytest.mark.slow
def test_generate_with_and_without_a_cache(service: Service) -> None:
    steps: list[tuple[int, int]] = []
    made = generating.generate(
        service, "pixeldit.cifar10", "ship", count=1, steps=4, seed=3, cache="taylorseer",
        tell=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert made.names == ["ship"]
    assert steps == [(done, 8) for done in range(1, 9)]  # four without, four with
    assert len(made.plain) == len(made.cached) == 1
    assert made.timeline is not None
    assert made.timeline.stat().st_size > 1000
    assert generating.choices_of(service, "pixeldit.cifar10")[:2] == ["airplane", "automobile"]
    for options, said in (({"subject": "shipp"}, "Did you mean"), ({"count": 99}, "count"), ({"steps": 0}, "steps"),
                          ({"seed": -1}, "seed"), ({"cache": "z"}, "No cache"), ({"subject": " "}, "what to show"),
                          ({"model": "x"}, "does not offer")):  # fmt: skip
        asked = {"model": "pixeldit.cifar10", "subject": "ship", "count": 1, "steps": 2} | options
        with pytest.raises(ValueError, match=said):
            generating.generate(service, asked.pop("model"), asked.pop("subject"), **asked)  # type: ignore[arg-type]


def test_every_model_can_be_looked_up() -> None:
    rows = exploring.rows()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.weights for row in rows} == {"", "shipped", "the authors'"}
    assert sum(row.time is not None for row in rows) > 20
    assert [row.name for row in exploring.search("denoise shipped apache")] == ["restormer_tiny_denoise_color.bsds"]
    assert not exploring.search("no such words")
    for row in rows[:: len(rows) // 10]:
        card = exploring.card_of(row.name)
        assert card.startswith(f"## {row.name}\n")
        assert "](before" not in card  # pictures have addresses that the page serves


def test_old_files_are_deleted(service: Service) -> None:
    old, new = service.folder / "old" / "upload.png", service.folder / "new.png"
    old.parent.mkdir()
    for path in (old, new):
        path.write_bytes(b"x")
    past = time.time() - 1000
    os.utime(old, (past, past))
    os.utime(old.parent, (past, past))
    service.sweep(600)
    assert not old.parent.exists()
    assert new.exists()


def test_a_service_manager_ends_the_page_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM ends the serving, after which the files of visitors go; by itself it would end the process at once."""
    folders: list[Path] = []

    def serve(service: Service, *, stop: threading.Event, **rest: object) -> None:
        folders.append(service.folder)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(60)
        service.close()

    page = types.ModuleType("zoo.cli.app.page")
    page.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo.cli.app.page", page)
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert main(["app"]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not folders[0].exists()


def test_a_space_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", "--space", str(tmp_path / "space")]) == 0
    assert {path.name for path in (tmp_path / "space").iterdir()} == set(space_files())
    front = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert len(front["short_description"]) <= 60  # the Hub refuses more
    ast.parse((tmp_path / "space" / "app.py").read_text())
    assert "ffn-zoo[app]" in (tmp_path / "space" / "requirements.txt").read_text()
    assert main(["app", "--space", str(tmp_path / "space")]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope_model"], "No model is called"),
        (["--port", "0"], "--port"),
        (["--keep", "1"], "--keep"),
        (["--max-queue", "0"], "--max-queue"),
        (["diffusion_policy.point"], "is for policy"),
    ],
)
def test_wrong_calls_are_said_before_anything_is_served(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["app", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_drawing_has_a_point_a_measured_model() -> None:
    rows = [
        exploring.Row(name="fast", task="classification", time=10.0, top1=70.0),
        exploring.Row(name="good", task="classification", time=30.0, top1=80.0),
        exploring.Row(name="<slow>", task="classification", time=31.0, top1=75.0),
        exploring.Row(name="unknown", task="classification", top1=75.0),
    ]
    assert [row.name for row in plot.unbeaten(rows)] == ["fast", "good"]
    svg = plot.drawing(rows)
    found = re.findall(r'<circle class="(\w+)".*?data-model="(.*?)"', svg)
    assert sorted(found) == [("best", "fast"), ("best", "good"), ("other", "&lt;slow&gt;")]
    assert svg.count("<title>") == 3
    assert plot.drawing(rows[3:]) == ""
    assert plot.drawing(exploring.rows()).count("<circle") > 10
