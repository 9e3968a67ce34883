"""Every command and snippet of README.md and docs/commands.md runs, on small pictures, with the shipped weights."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from PIL import Image
from pipeline_folders import saved
from skimage import data
from timm.data import create_transform
from tiny_folders import denoiser_folder

import zoo
import zoo.moe
from tests.hub_server import HubServer, use_hub
from tests.image_sets import CLASSES, parquet_folder, picture
from zoo.bench import pipelines
from zoo.cards import card
from zoo.cards.own import write_own_model
from zoo.cli import main
from zoo.pictures.eight_bit import read_eight_bit
from zoo.record import record_of

ROOT = Path(__file__).resolve().parents[1]
TEXT = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/commands.md"))
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line.strip()]
WALK = next(text.splitlines() for language, text in BLOCKS if language == "bash" and "zoo finetune" in text)
PIPELINES = {"FLUX": "flux", "WAN": "wan"}
KNOWN = ("cat", "ship")  # of the data: two classes of CIFAR-10, for weights that were trained on it
SLOW_TARGETS = {"make demo", "make test"}  # the demo has its own test; this suite is the other


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the README's commands name: pictures and a data set."""
    cat = Image.fromarray(data.chelsea()).resize((60, 40))
    cat.save(tmp_path / "cat.jpg")
    cat.save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    cat.save(tmp_path / "photos" / "one.png")
    (tmp_path / "set5").mkdir()
    cat.save(tmp_path / "set5" / "cat.png")
    parquet_folder(tmp_path / "DIR", size=32, classes=KNOWN)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


def test_the_readme_has_commands_and_snippets() -> None:
    assert len(COMMANDS) >= 8
    assert sum(language == "python" for language, _ in BLOCKS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet",  # what would download is in tests/caching/test_readme_pipelines.py
    [text for language, text in BLOCKS if language == "python" and "from_pretrained" not in text],
)
def test_snippet(snippet: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in {*SLOW_TARGETS, *WALK}])
def test_command(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends well in this process; that `zoo` and `python -m zoo` start it is in test_cli.py."""
    program, *words = shlex.split(command, comments=True)
    monkeypatch.chdir(place)
    if "runs/pixeldit_moe" in command or "pixeldit_moe_cifar10.yaml" in command:  # what the commands before it make
        _save_experts(place / "runs" / ("pixeldit_moe_cifar10/pipeline" if program == "zoo" else "pixeldit_moe"))
    if program == "python":
        words += ["--trainer.fast_dev_run=1", "--data.init_args.batch_size=4", "--data.init_args.eval_batch_size=4"]
        if "configs/diffusion" in command:  # pictures are sampled after the step
            words += ["--model.init_args.sample_steps=2", "--model.init_args.grid_rows=1"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(words[0], run_name="__main__")
        assert end.value.code == 0, capsys.readouterr().err
        return
    assert program == "zoo"
    if len(words) > 1 and words[1] in PIPELINES:  # a tiny one in the place of the user's
        saved(PIPELINES[words[1]], place / words[1])
        words = ["16" if word == "512" else word for word in words]
    if words[0] == "tune-cache" and "pixeldit.cifar10" in words:  # a tiny one: it makes a hundred runs
        words[words.index("pixeldit.cifar10")] = str(denoiser_folder(place / "tiny"))
    if "VIT" in words:
        _save_vit(place / "VIT")
    if words[0] == "train":
        words += ["--trainer.fast_dev_run=1", "--data.init_args.batch_size=4", "--data.init_args.eval_batch_size=4"]
    if command == "zoo verify --all":  # each card is checked in test_registry_cards.py
        monkeypatch.setattr(card, "check_card", lambda folder: [])
    if words[0] == "tune-cache":  # of 10 pictures of 50 steps
        words = ["psnr>=20" if word == "psnr>=40" else word for word in words]
        words += ["--steps", "8", "--count", "1", "--rounds", "1"]
    if words[0] == "bench":
        words += ["--threads", "1", "--rounds", "1"]  # two would wait for each other where every processor has a test
    if command.startswith("zoo bench pixeldit"):  # of 25 steps at ten numbers of experts
        words += ["--steps", "2"]
        monkeypatch.setattr(pipelines, "_TOP_K", (0, 2))
    assert main(words) == 0, capsys.readouterr().err


def _save_experts(folder: Path) -> None:
    pipe = zoo.create_pipeline("pixeldit.cifar10")
    experts, _ = zoo.moe.convert(pipe.transformer, zoo.MoEConfig(experts=12, top_k=2, scores="random"))
    pipe.register_modules(transformer=experts)
    pipe.save_pretrained(folder)


def test_the_walk_of_the_documents_is_that_of_the_readme() -> None:
    assert "\n".join(WALK) in (ROOT / "docs/start.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.enable_socket
def test_from_own_folder_to_published_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The walk, in at most six lines: the same pictures are told right at every stage, up to the Hub and back."""
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(CLASSES):
        (tmp_path / "PHOTOS" / name).mkdir(parents=True)
        for index in range(12):
            picture(label, index, 40).save(tmp_path / "PHOTOS" / name / f"{index}.jpg")
    assert len(WALK) <= 6
    server = HubServer()
    try:
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        for line in WALK:
            program, *words = shlex.split(line, comments=True)
            assert program == "zoo"
            if words[0] == "finetune":
                words += ["--epochs", "1"]
            if words[0] == "publish":
                words = [word for word in words if word != "--dry-run"] + ["--token", "secret"]
            assert main(words) == 0, capsys.readouterr().err
        files = [
            str(tmp_path / "PHOTOS" / name) for name in (tmp_path / "mine/validation.txt").read_text().splitlines()
        ]
        stated = card.card_facts(tmp_path / "mine")["metrics"][0]
        right = {model: told(files, model, capsys) for model in ("mine", "me/mine")} | {"onnx": told_by_onnx(files)}
        assert set(right.values()) == {round(stated["value"] * len(files) / 100)}, (stated, right)
    finally:
        server.stop()


def _save_vit(folder: Path) -> None:
    """Write a small vision transformer of the user's own, for the classes of `DIR`."""
    model = zoo.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=2
    ).eval()
    record = record_of(model).of_own_weights().updated(label_names=KNOWN, crop_pct=1.0)
    metric = card.Metric(name="Top-1 accuracy", value=50.0, unit="%", dataset="shapes", protocol="made in a test")
    write_own_model(folder, model, record, metrics=[metric], training="Not trained.")


def told(files: list[str], model: str, capsys: pytest.CaptureFixture[str]) -> int:
    """Count the pictures whose folder `zoo classify` names."""
    capsys.readouterr()
    assert main(["classify", *files, "--model", model, "-q"]) == 0
    lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    return sum(Path(file).parent.name == name for file, name in lines)


def told_by_onnx(files: list[str]) -> int:
    """Count them with the exported graph alone: its metadata says how pictures go in and what comes out."""
    session = onnxruntime.InferenceSession("mine.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    size = tuple(side if isinstance(side, int) else 64 for side in session.get_inputs()[0].shape[1:])
    transform = create_transform(
        size, mean=json.loads(facts["mean"]), std=json.loads(facts["std"]), crop_pct=float(facts["crop_pct"]),
        interpolation=facts["interpolation"],
    )  # fmt: skip
    labels, count = json.loads(facts["labels"]), 0
    for file in files:
        (scores,) = session.run(None, {session.get_inputs()[0].name: transform(read_eight_bit(file))[None].numpy()})
        count += labels[int(scores.argmax())] == Path(file).parent.name
    return count


def test_the_program_is_installed(place: Path) -> None:
    """`zoo` itself starts, where the README's commands are typed."""
    program = Path(sys.executable).with_name("zoo")
    done = subprocess.run([program, "info", "repavit_tiny.cifar10"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "repavit_tiny" in done.stdout


@pytest.mark.parametrize("target", sorted(SLOW_TARGETS))
def test_make_target(target: str) -> None:
    rules = (ROOT / "Makefile").read_text()
    assert f"\n{target.split()[1]}: " in rules
