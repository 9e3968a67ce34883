"""The `zoo` command: quick, quiet where it should be, one line for every mistake, files whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh_process
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_folders import classifier_folder, denoiser_folder, restorer_folder

from zoo import catalog, cli
from zoo.cli import main
from zoo.cli.classify import default_model
from zoo.cli.inputs import find_pictures
from zoo.cli.output import UsageError, change, millions, number, replacing

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]


def noise(path: Path, size: tuple[int, int] = (12, 9)) -> Path:
    """Write a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders with a tiny model of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {
        "classifier": str(classifier_folder(root / "classifier")),
        "restorer": str(restorer_folder(root / "restorer")),
        "denoiser": str(denoiser_folder(root / "denoiser")),
    }


def run(capsys: Captured, *argv: str | Path) -> tuple[int, str, str]:
    """Run a command in this process: exit code, standard output, standard error."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def error_of(capsys: Captured, *argv: str | Path, code: int = 2) -> str:
    """Run a command that must fail, and return its one line."""
    found, out, err = run(capsys, *argv)
    assert found == code, err
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("zoo: error: ")
    return err


# --- start


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--help"], ["list"], ["list", "--json"], ["info", next(iter(catalog.load()))]])
def test_answers_at_once_without_torch(argv: list[str]) -> None:
    """Nothing heavy is imported, and few modules in all: torch alone would be two thousand."""
    code = (
        f"import sys; sys.argv[1:] = {argv!r}\n"
        "from zoo_command import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'numpy', 'PIL', 'huggingface_hub', 'diffusers', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 300, len(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scripts_of_any_name_get_the_models(tmp_path: Path) -> None:
    """Importing zoo registers, whatever the script is called; nothing is hooked into imports."""
    code = (
        f"import sys; sys.argv = [{str(tmp_path / 'zoo')!r}]\n"
        "import zoo, timm\n"
        "assert timm.is_model('repavit_tiny')\n"
        "assert 'diffusers' not in sys.modules\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith('zoo.')]\n"
        "assert callable(zoo.spandrel.install)\n"
    )
    done = fresh_process.run(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_command_registers_before_it_works() -> None:
    """What `zoo_command` puts off is done for every command that needs it."""
    code = (
        "import sys; sys.argv[1:] = ['classify', 'missing.png', '--model', 'repavit_tiny.cifar10']\n"
        "from zoo_command import main\n"
        "main()\n"
        "import zoo; assert callable(zoo.create_model)\n"
    )
    done = fresh_process.run(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_module_and_pipe() -> None:
    """`python -m zoo` is the command; a reader that has seen enough is no error."""
    done = subprocess.run(
        f"{sys.executable} -m zoo list --json | head -c 5", shell=True, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("[")
    assert "Traceback" not in done.stderr


def test_every_command_has_the_common_options() -> None:
    _, commands = cli._parser()
    assert {"list", "info", "classify", "restore", "generate", "export", "publish", "verify"} <= commands.keys()
    for name, parser in commands.items():
        text = parser.format_help()
        assert "--json" in text, name
        assert "--quiet" in text, name
        assert "--debug" in text, name
        assert callable(parser.get_default("run")), name
        assert parser.description, name


def test_nothing_prints_help(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "classify" in capsys.readouterr().out


# --- mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lst"], "no command 'lst'. Did you mean list?"),
        (["list", "--tsk", "sr"], "does not take '--tsk'. Did you mean --task?"),
        (["list", "--sort", "parms"], "Did you mean params?"),
        (["list", "--max-params", "many"], "'many' is no count"),
        (["list", "--task", "clasification"], "Did you mean classification?"),
        (["info"], "required: NAME"),
        (["info", "repavit_tinny"], "Did you mean repavit_tiny"),
        (["classify", "x.png", "--model", "repavit_tinny"], "Did you mean repavit_tiny"),
        (["classify", "x.png", "--model", "cfsr_x2"], "cannot classify"),
        (["classify", "x.png", "--model", "repamlpmixer_s16"], "No weights are published"),
        (["classify", "x.png", "--topk", "0"], "--topk must be at least 1"),
        (["restore", "x.png", "-o", "out", "--model", "cfsr_x22"], "Did you mean cfsr_x2"),
        (["restore", "x.png", "-o", "out", "--device", "gpu"], "no device 'gpu'"),
        (["generate", "-o", "x.png", "--model", "repavit_tiny"], "not a diffusion pipeline"),
        (["generate", "-o", "x.png", "--count", "0"], "--count must be at least 1"),
        (
            ["generate", "-o", "x.png", "--cache", "cg-taylor", "--threshold", "-0.1"],
            "--threshold must be a number from",
        ),
        (["generate", "-o", "x.png", "--cache", "bac", "--updates", "0"], "--updates must be at least 1, got 0"),
        (["generate", "-o", "x.png", "--cache", "cg-taylor=x"], "--cache cg-taylor=NUMBER sets --threshold, got 'x'."),
        (["generate", "-o", "x.png", "--cache", "taylorseer=0"], "--interval must be at least 1, got 0"),
        (
            ["generate", "-o", "x.png", "--cache", "bac=3", "--updates", "4"],
            "--cache bac=3 sets --updates: leave one of them out.",
        ),
        (["generate", "-o", "x.png", "--threshold", "0.1"], "--threshold belongs to --cache cg-taylor or first-block"),
        (["export", "cfsr_x2", "--format", "onx"], "Did you mean onnx?"),
        (["verify"], "Give names, or --all."),
        (["publish", "cfsr_x22", "--repo-id", "a/b"], "no card of 'cfsr_x22'"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    """What was given, what fits, the nearest right choice; exit code 2; no file appears."""
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="Did you mean repavit_tiny"):
        main(["info", "repavit_tinny", "--debug"])


def test_work_that_fails_is_exit_code_1(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise RuntimeError("first line\n  second line")

    monkeypatch.setattr("zoo.cli.listing.run_info", fail)
    assert error_of(capsys, "info", "cfsr_x2", code=1) == "zoo: error: first line second line [Z900]\n"


# --- list and info


def test_list_as_table_json_and_names(capsys: Captured) -> None:
    code, out, _ = run(capsys, "list", "cfsr*")
    assert code == 0
    assert "cfsr_x2" in out
    assert "repavit" not in out
    entries = json.loads(run(capsys, "list", "--json")[1])
    assert [entry["name"] for entry in entries] == list(catalog.load())
    assert run(capsys, "list", "-q")[1].split() == list(catalog.load())


@pytest.mark.parametrize("key", ["name", "params", "macs", "merged-params"])
def test_list_sorts(capsys: Captured, key: str) -> None:
    names = run(capsys, "list", "-q", "--sort", key)[1].split()
    field = key.replace("-", "_")
    values = [
        name if key == "name" else catalog.load()[name].get(field, catalog.load()[name]["params"]) for name in names
    ]
    assert values == sorted(values)
    assert run(capsys, "list", "-q", "--sort", key, "--reverse")[1].split() == names[::-1]


def test_list_filters(capsys: Captured) -> None:
    small = run(capsys, "list", "-q", "--max-params", "1M", "--task", "sr")[1].split()
    assert small
    assert all(catalog.load()[name]["params"] <= 1e6 for name in small)
    published = run(capsys, "list", "-q", "--pretrained")[1].split()
    assert all(catalog.load()[name]["weights"] for name in published)


def test_list_without_result(capsys: Captured) -> None:
    assert "Did you mean repavit_tiny" in error_of(capsys, "list", "repavit_tinny*", code=1)
    code, out, err = run(capsys, "list", "nothing*", "--json")
    assert (code, json.loads(out), err) == (1, [], "")


@pytest.mark.parametrize("name", list(catalog.load()))
def test_info(capsys: Captured, name: str) -> None:
    """Every model and each of its weights can be shown, as text and as JSON."""
    facts = catalog.load()[name]
    for full in (name, *(f"{name}.{tag}" for tag in facts["weights"])):
        code, out, err = run(capsys, "info", full)
        assert (code, err) == (0, "")
        assert facts["summary"] in out
        assert json.loads(run(capsys, "info", full, "--json")[1])["name"] == name


# --- classify


def test_classify(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """Pictures of several kinds, most probable first."""
    noise(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").convert("LA").save(tmp_path / "b.png")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "c.png")
    command = ["classify", tmp_path, "--model", models["classifier"], "--topk", "2"]
    code, out, err = run(capsys, *command, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [Path(result["file"]).name for result in report["results"]] == ["a.png", "b.png", "c.png"]
    for result in report["results"]:
        first, second = result["top"]
        assert first["probability"] >= second["probability"]
        assert first["label"] == ["red", "green", "blue"][first["index"]]
    code, out, _ = run(capsys, *command)
    assert "a.png" in out
    assert "%" in out
    assert len(run(capsys, *command, "-q")[1].splitlines()) == 3


def test_no_class_is_likely(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """Weights that state a threshold say where a picture shows none of their classes, and divide by a temperature."""
    folder = shutil.copytree(models["classifier"], tmp_path / "careful")
    path = noise(tmp_path / "a.png")
    plain = json.loads(run(capsys, "classify", path, "--model", folder, "--json")[1])["results"][0]
    assert plain["likely"]
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("zoo", {}).update(temperature=1e6, threshold=0.4)
    (folder / "config.json").write_text(json.dumps(config))
    flat = json.loads(run(capsys, "classify", path, "--model", folder, "--json")[1])["results"][0]
    assert not flat["likely"]
    assert flat["top"][0]["probability"] == pytest.approx(1 / 3, abs=1e-3)
    assert run(capsys, "classify", path, "--model", folder, "-q")[1] == f"{path}\tnone that it knows\n"
    _, out, err = run(capsys, "classify", path, "--model", folder)
    assert "perhaps red" in out
    assert "knows 3 classes: red, green, blue. Below 40 % none is likely." in err


def test_numbers_of_wordnet_are_told_in_words(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """A classifier trained on ImageNet's folders has n01440764 for a class: who asks it wants to read "tench"."""
    folder = shutil.copytree(models["classifier"], tmp_path / "nette")
    config = json.loads((folder / "config.json").read_text())
    names = ["n01440764", "n03028079", "n99999999"]  # the last one is none of WordNet's
    config["label_names"] = names
    config.get("pretrained_cfg", {}).pop("label_names", None)
    (folder / "config.json").write_text(json.dumps(config))
    out = run(capsys, "classify", noise(tmp_path / "a.png"), "--model", folder, "--json")[1]
    words = {item["index"]: item["label"] for item in json.loads(out)["results"][0]["top"]}
    assert words == {0: "tench", 1: "church", 2: "n99999999"}


def test_photographs_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of these the most accurate."""

    def shipped(top1: float) -> dict[str, object]:
        return {"source": "shipped", "metrics": [{"name": "Top-1 accuracy", "value": top1}]}

    known = {
        "a": {"task": "classification", "weights": {"cifar10": shipped(99), "imagenette": shipped(70)}},
        "b": {"task": "classification", "weights": {"in1k": {"source": "authors"}, "imagenette": shipped(80)}},
        "c": {"task": "sr", "weights": {"imagenette": shipped(90)}},
    }
    monkeypatch.setattr("zoo.catalog.load", lambda: known)
    assert default_model() == "b.imagenette"


def test_names_stay_whole_in_a_pipe(
    capsys: Captured, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long ones, and ones that look like markup; a terminal folds them."""
    path = noise(tmp_path / ("long" * 30) / "[red]folder:cat:" / "a.png")
    model = str(shutil.copytree(models["classifier"], tmp_path / ("model" * 20)))
    text = run(capsys, "classify", path, "--model", model)[1]
    assert str(path) in text
    assert model in text
    monkeypatch.setenv("COLUMNS", "60")
    assert str(path) not in run(capsys, "classify", path, "--model", model)[1]


def test_bad_pictures_are_listed(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """A missing file, a text called .png and half a picture: one line each, the good one is done, exit code 1."""
    good = noise(tmp_path / "good.png", (40, 40))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:900])
    code, out, err = run(capsys, "classify", tmp_path, tmp_path / "none.png", "--model", models["classifier"], "--json")
    report = json.loads(out)
    assert (code, err) == (1, "")
    assert [Path(result["file"]).name for result in report["results"]] == ["good.png"]
    assert sorted(Path(entry["file"]).name for entry in report["failed"]) == ["half.png", "none.png", "text.png"]
    code, _, err = run(capsys, "classify", tmp_path, "--model", models["classifier"])
    assert code == 1
    assert "text.png is not an image" in err
    assert "2 of 3 failed." in err


def test_decompression_bomb_is_refused(
    capsys: Captured, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(tmp_path / "big.png", (200, 200))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    code, _, err = run(capsys, "restore", tmp_path / "big.png", "-o", tmp_path / "out", "--model", models["restorer"])
    assert code == 1
    assert "big.png is refused" in err
    assert not (tmp_path / "out" / "big.png").exists()


# --- restore


def test_restore_one_file(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """A file becomes the named file; it is not replaced without --force."""
    source, out = noise(tmp_path / "a.png"), tmp_path / "b.png"
    command = ["restore", source, "-o", out, "--model", models["restorer"]]
    code, text, _ = run(capsys, *command)
    assert code == 0
    assert "12x9" in text
    assert Image.open(out).size == (24, 18)
    before = out.read_bytes()
    assert "--force replaces" in error_of(capsys, *command)
    assert out.read_bytes() == before
    assert run(capsys, *command, "--force")[0] == 0
    assert run(capsys, *command, "--skip-existing", "--json")[0] == 0


def test_restore_keeps_the_tree(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """Folders are mirrored, hidden files left out, bad files listed, what exists skipped."""
    for name in ("a.png", "deep/b.jpg", "deep/er/c.png", ".hidden/d.png"):
        noise(tmp_path / "in" / name)
    (tmp_path / "in" / "deep" / "bad.png").write_text("no picture")
    (tmp_path / "in" / "notes.txt").write_text("no picture either")
    command = ["restore", tmp_path / "in", "-o", tmp_path / "out", "--model", models["restorer"]]
    code, out, _ = run(capsys, *command, "--json")
    report = json.loads(out)
    assert code == 1
    assert len(report["restored"]) == 3
    assert [Path(entry["file"]).name for entry in report["failed"]] == ["bad.png"]
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert made == ["a.png", "deep/b.jpg", "deep/er/c.png"]
    report = json.loads(run(capsys, *command, "--skip-existing", "--json")[1])
    assert len(report["skipped"]) == 3
    assert report["restored"] == []
    code, out, _ = run(capsys, *command, "--force", "--format", "webp", "-q")
    assert sorted(Path(line).suffix for line in out.splitlines()) == [".webp"] * 3


def test_restore_with_tiles_equals_the_whole(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    source = noise(tmp_path / "a.png", (70, 50))
    command = ["restore", source, "--model", models["restorer"]]
    assert run(capsys, *command, "-o", tmp_path / "whole.png")[0] == 0
    assert run(capsys, *command, "-o", tmp_path / "tiled.png", "--tile", "32", "--exact")[0] == 0
    whole, tiled = (np.array(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("whole", "tiled"))
    assert np.abs(whole - tiled).max() <= 1


@pytest.mark.parametrize(
    ("names", "output", "message"),
    [
        (["x/a.png", "y/a.png"], "out.png", "names one file for 2 pictures"),
        (["x/a.png"], "x", "would replace its own input"),
        (["x/a.png"], "file.txt/out", "cannot be written to"),
    ],
)
def test_restore_refuses_outputs(
    capsys: Captured, models: dict[str, str], tmp_path: Path, names: list[str], output: str, message: str
) -> None:
    files = [noise(tmp_path / name) for name in names]
    (tmp_path / "file.txt").write_text("not a folder")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, _, err = run(capsys, "restore", *files, "-o", tmp_path / output, "--model", models["restorer"])
    assert code in (1, 2)
    assert message in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_restore_refuses_models_of_another_kind(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    source = noise(tmp_path / "a.png")
    command = ["restore", source, "-o", tmp_path / "b.png", "--model"]
    assert "does not restore images" in error_of(capsys, *command, models["classifier"])
    assert "is no scale" in error_of(capsys, *command, models["restorer"], "--scale", "-3")
    assert "No weight file" in error_of(capsys, *command, "cfsr_x2", "--weights", "none.pth")


# --- generate


def test_generate_a_grid(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """A labelled grid; the same seed gives the same file; nothing is replaced without --force."""
    command = ["generate", "--model", models["denoiser"], "--classes", "cat,2", "--count", "5", "--steps", "3"]
    code, out, _ = run(capsys, *command, "-o", tmp_path / "a.png", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["classes"] == ["cat", "ship"]
    assert report["scheduler"] == "DDIMScheduler"
    assert run(capsys, *command, "-o", tmp_path / "b.png", "-q")[1].strip() == str(tmp_path / "b.png")
    first, second = (Image.open(tmp_path / f"{name}.png") for name in "ab")
    assert first.height > 2 * 96
    assert np.array_equal(np.array(first)[30:], np.array(second)[30:])  # the title above tells the time
    assert "--force" in error_of(capsys, *command, "-o", tmp_path / "a.png")


@pytest.mark.parametrize("cache", ["cg-taylor", "bac", "taylorseer", "first-block"])
def test_generate_with_a_cache_says_what_it_saves(
    capsys: Captured, models: dict[str, str], tmp_path: Path, cache: str
) -> None:
    command = ["generate", "--model", models["denoiser"], "--count", "2", "--steps", "12", "--cache", cache]
    code, out, err = run(capsys, *command, "-o", tmp_path / "a.png", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["speedup"] > 0
    assert report["psnr"] is None or report["psnr"] > 0
    assert "dB" in run(capsys, *command, "-o", tmp_path / "b.png")[1] or report["identical"]


def test_generate_single_pictures(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """A folder gets one file a picture, at its own size; a picture does not depend on the batch."""
    command = ["generate", "--model", models["denoiser"], "--classes", "dog", "--count", "3", "--steps", "2"]
    assert run(capsys, *command, "-o", tmp_path / "a", "--scheduler", "euler")[0] == 0
    assert run(capsys, *command, "-o", tmp_path / "b", "--scheduler", "euler", "--batch-size", "1")[0] == 0
    names = ["0000_dog.png", "0001_dog.png", "0002_dog.png"]
    assert sorted(os.listdir(tmp_path / "a")) == names
    for name in names:
        first, second = (np.array(Image.open(tmp_path / folder / name)).astype(int) for folder in "ab")
        assert first.shape == (8, 8, 3)
        assert np.abs(first - second).max() <= 1


def test_generate_names_the_classes(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    command = ["generate", "--model", models["denoiser"], "-o", tmp_path / "a.png", "--classes"]
    assert "Did you mean 'truck'" in error_of(capsys, *command, "truk")
    assert "from 0 to 3" in error_of(capsys, *command, "7")


# --- export, verify


@pytest.mark.slow
def test_export(capsys: Captured, models: dict[str, str], tmp_path: Path) -> None:
    """The file is compared with the model, and not replaced without --force."""
    command = ["export", models["restorer"], "--format", "torch-export", "-o", tmp_path / "model.bin"]
    code, out, err = run(capsys, *command, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["max_error"] < 1e-4
    assert report["bytes"] == (tmp_path / "model.bin").stat().st_size
    assert "--force" in error_of(capsys, *command)
    for size, name, said in (
        (["--image-size", "0"], "classifier", "got 0"),
        (["--image-size", "32"], "restorer", "--image-size fixes it together with --fixed-size"),
        (["--fixed-size"], "restorer", "add --image-size PIXELS"),
    ):
        command = ["export", models[name], "--format", "onnx", "-o", tmp_path / "x.onnx", *size]
        assert said in error_of(capsys, *command)
    fixed = ["export", models["restorer"], "--format", "torch-export", "-o", tmp_path / "fixed.pt2", "--fixed-size"]
    assert run(capsys, *fixed, "--image-size", "32")[0] == 0
    found = torch.export.load(tmp_path / "fixed.pt2").module()(image=torch.zeros(1, 3, 32, 32))
    assert found.shape[2:] == (64, 64)


def test_verify(capsys: Captured, models: dict[str, str]) -> None:
    """Problems are listed, and the exit code tells."""
    code, out, _ = run(capsys, "verify", models["restorer"], "--json")
    assert code == 1
    (report,) = json.loads(out)
    assert report["name"] == "restorer"
    assert not report["ok"]
    assert "no license" in report["problems"][0]
    assert run(capsys, "verify", models["restorer"], "-q")[1].strip() == "restorer"
    assert "0 of 1 good." in run(capsys, "verify", models["restorer"])[1]


# --- parts


def test_find_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as given, patterns from the first wildcard on, folders with all below; each file once."""
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.png", "in/B.JPG", "in/deep/c.webp", "in/deep/n.txt", "[x].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    found = {str(picture.path): str(picture.relative) for picture in find_pictures(["in", "in/a.png"])}
    assert found == {"in/B.JPG": "B.JPG", "in/a.png": "a.png", "in/deep/c.webp": "deep/c.webp"}
    assert [str(picture.relative) for picture in find_pictures(["in/**/*.webp"])] == ["deep/c.webp"]
    assert [str(picture.relative) for picture in find_pictures(["*/*.png"])] == ["in/a.png"]
    assert [str(picture.path) for picture in find_pictures(["[x].png"])] == ["[x].png"]
    assert [str(picture.path) for picture in find_pictures(["none*.png", "none.png"])] == ["none*.png", "none.png"]


@pytest.mark.parametrize(("text", "value"), [("30e6", 30e6), ("30M", 30e6), ("1.5G", 1.5e9), ("7k", 7e3), ("0", 0)])
def test_number(text: str, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "M", "-1", "nan", "inf", "3x"])
def test_no_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        number(text)


def test_units() -> None:
    assert [millions(value) for value in (5.74e6, 59.94e6, 304.5e6, 2e5)] == ["5.74 M", "59.9 M", "304 M", "0.20 M"]
    assert change("5.74 M", "4.38 M") == "5.74 -> 4.38 M"
    assert change("5.74 M", None) == change("5.74 M", "5.74 M") == "5.74 M"


def test_replacing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with replacing(target, force=False) as temporary:
        temporary.write_text("first")
    with pytest.raises(UsageError, match="--force replaces it"), replacing(target, force=False):
        pass

    def write_half(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"), replacing(target, force=True) as temporary:
        write_half(temporary)
    assert target.read_text() == "first"
    assert os.listdir(target.parent) == ["file.txt"]
    with pytest.raises(UsageError, match="is a folder"), replacing(tmp_path, force=True):
        pass


def test_progress_is_silent_without_a_terminal(capsys: Captured) -> None:
    from zoo.cli.output import progress

    args: Any = argparse.Namespace(quiet=False, json=False)
    with progress(args) as bar:
        for _ in bar.track(range(3), description="working"):
            pass
    assert capsys.readouterr() == ("", "")


def test_a_folder_of_a_pipeline_cannot_classify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["classify", "x.png", "--model", str(tmp_path)]) == 2
    assert "is a model for generation: it cannot classify." in capsys.readouterr().err
