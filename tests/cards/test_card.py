"""Model cards: written whole, checked for what would mislead a reader, loaded on the public path."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from denoisers import diffusion_policy, pixel_dit
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from timm.models import get_pretrained_cfg

import zoo
from zoo.cards import card as cards
from zoo.cards.card import Metric, card_facts, check_card, make_card, published
from zoo.cards.catalog_writer import _denoiser_facts
from zoo.cfg import ModelCfg
from zoo.cli import parse
from zoo.diffusion import DiffusionPolicyPipeline, PixelDiTPipeline
from zoo.weights import CheckpointError, cards_dir, front_matter, save_checkpoint, sha256_of

CONFIG = next((cards_dir().parent / "configs").rglob("*.yaml")).relative_to(cards_dir().parent).as_posix()


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, Any]:
    """Return what a card needs to be told."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "samples.png")
    return dict(
        metrics=[Metric(name="PSNR (Y)", value=37.5, unit="dB", dataset="Set5", protocol="x2, MATLAB bicubic, crop 2")],
        config=CONFIG,
        datasets=["bsds500"],
        training="100 steps on one core.",
        core_hours=2,
        data="Photos for research.",
        commands=["zoo evaluate cfsr_x2.bsds --data Set5=DIR"],
        limitations="A test.",
        parity="1e-12 (relative, float64).",
        picture=tmp_path / "samples.png",
        caption="One red picture.",
    )


@pytest.fixture
def card(tmp_path: Path, facts: dict[str, Any]) -> Path:
    """Return the folder of a good card of CFSR x2 with random weights."""
    return make_card("cfsr_x2.bsds", timm.create_model("cfsr_x2").state_dict(), folder=tmp_path / "card", **facts)


def test_card_of_a_restorer(card: Path) -> None:
    """The folder is a Hub repository that plain timm reads."""
    assert sorted(path.name for path in card.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]
    front = front_matter(card / "README.md")
    assert front["license"] == "apache-2.0"
    assert front["sha256"] == {"model.safetensors": sha256_of(card / "model.safetensors")}
    assert front["parameters"] == 298236
    assert front["scale"] == 2
    assert front["model-index"][0]["name"] == "cfsr_x2.bsds"
    config = json.loads((card / "config.json").read_text())
    assert config["architecture"] == "cfsr_x2"
    assert not {"task", "scale", "sha256", "file"} & config["pretrained_cfg"].keys()
    model = timm.create_model(f"local-dir:{card}", pretrained=True).eval()
    assert torch.equal(model(torch.ones(1, 3, 8, 8)), zoo.create_model(str(card))(torch.ones(1, 3, 8, 8)))
    text = (card / "README.md").read_text()
    assert "| PSNR (Y) | 37.5 dB | Set5 | x2, MATLAB bicubic, crop 2 |" in text
    assert "![One red picture.](samples.png)" in text
    assert "https://arxiv.org/abs/2401.05633" in text
    assert "About 2 core hours: 0.03 kWh" in text
    assert "## Data\n\nPhotos for research.\n" in text
    assert "Measured by\n\n```\nzoo evaluate cfsr_x2.bsds --data Set5=DIR\n```" in text


def test_curve_of_the_training(tmp_path: Path, facts: dict[str, Any]) -> None:
    """A second picture, checked like the first."""
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "training.png")
    state = timm.create_model("cfsr_x2").state_dict()
    curve = {"curve": tmp_path / "training.png", "curve_caption": "Loss."}
    folder = make_card("cfsr_x2.bsds", state, folder=tmp_path / "card", **facts, **curve)
    assert "![Loss.](training.png)\n\nLoss.\n" in (folder / "README.md").read_text()
    (folder / "training.png").unlink()
    assert any("training.png" in problem for problem in check_card(folder))


def test_card_facts_for_the_catalogue(card: Path, facts: dict[str, Any]) -> None:
    found = card_facts(card)
    assert found["license"] == "apache-2.0"
    assert [Metric(**metric) for metric in found["metrics"]] == facts["metrics"]
    assert found["config"] == CONFIG
    assert found["parity"].startswith("1e-12")
    assert card_facts(card / "nowhere") == {}


def test_card_of_a_classifier_from_a_training_checkpoint(tmp_path: Path, facts: dict[str, Any]) -> None:
    """Half precision; label names and constructor arguments of the weights are in config.json."""
    model = timm.create_model("repavit_tiny.cifar10")
    checkpoint = {"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}, "epoch": 1}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    folder = make_card(
        "repavit_tiny.cifar10", tmp_path / "last.ckpt", dtype=torch.float16, folder=tmp_path / "card", **facts
    )
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"][3] == "cat"
    assert "Classes: airplane, automobile, bird, cat, " in (folder / "README.md").read_text()
    assert loaded.pretrained_cfg["input_size"] == (3, 32, 32)
    assert (folder / "model.safetensors").stat().st_size < 12e6
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-3, atol=1e-4)


def test_card_of_a_denoiser(tmp_path: Path, facts: dict[str, Any]) -> None:
    """A diffusers folder with our card beside it."""
    pipeline = PixelDiTPipeline(pixel_dit(), DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "run")
    paper = {"paper": "DiT", "paper_ids": "arXiv:2212.09748", "origin": "https://github.com/facebookresearch/DiT"}
    folder = make_card(
        "pixeldit.toy", tmp_path / "run", dtype=torch.float16, folder=tmp_path / "card", paper=paper, **facts
    )
    assert not [file for file in folder.rglob("*.json") if str(tmp_path) in file.read_text()]
    digests = front_matter(folder / "README.md")["sha256"]
    assert list(digests) == ["transformer/diffusion_pytorch_model.safetensors"]
    assert zoo.create_pipeline(str(folder)).transformer.dtype == torch.float32
    assert zoo.create_pipeline(str(folder), dtype=torch.float16).transformer.dtype == torch.float16
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_checkpoint(pixel_dit().half().state_dict(), file)
    with pytest.raises(CheckpointError, match="not the published file"):
        zoo.create_pipeline(str(folder))
    with pytest.raises(ValueError, match="save_pretrained"):
        make_card("pixeldit.toy", {}, folder=tmp_path / "other", **facts)


def test_card_of_a_policy(tmp_path: Path, facts: dict[str, Any]) -> None:
    """A denoiser that plans actions says so, and how it is used."""
    pipeline = DiffusionPolicyPipeline(diffusion_policy(), DDPMScheduler(num_train_timesteps=100), n_action_steps=4)
    pipeline.save_pretrained(tmp_path / "run")
    folder = make_card("policy.toy", tmp_path / "run", folder=tmp_path / "card", **facts)
    front = front_matter(folder / "README.md")
    assert (front["task"], front["pipeline_tag"]) == ("policy", "robotics")
    assert "evaluate_policy(pipeline" in (folder / "README.md").read_text()
    found = _denoiser_facts("policy", {"toy": folder})
    assert (found["task"], found["input_size"]) == ("policy", [6, 2])
    assert found["params"] == front["parameters"]
    assert found["weights"]["toy"]["num_classes"] is None


def test_nothing_is_left_of_a_card_that_fails(tmp_path: Path, facts: dict[str, Any]) -> None:
    state_dict = timm.create_model("cfsr_x2").state_dict()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias"):
        make_card(
            "cfsr_x2.bsds", {k: v for k, v in state_dict.items() if k != "norm.bias"}, folder=tmp_path / "card", **facts
        )
    with pytest.raises(ValueError, match=r"The config configs/none\.yaml does not exist"):
        make_card("cfsr_x2.bsds", state_dict, folder=tmp_path / "card", **{**facts, "config": "configs/none.yaml"})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_existing_card_is_kept_unless_told(card: Path, facts: dict[str, Any]) -> None:
    state_dict = timm.create_model("cfsr_x2").state_dict()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        make_card("cfsr_x2.bsds", state_dict, folder=card, **facts)
    make_card("cfsr_x2.bsds", state_dict, folder=card, overwrite=True, **facts)
    assert check_card(card) == []


def _edit(card: Path, pattern: str, replacement: str) -> None:
    text = (card / "README.md").read_text()
    assert re.search(pattern, text, re.MULTILINE), pattern
    (card / "README.md").write_text(re.sub(pattern, replacement, text, count=1, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("pattern", "replacement", "problem"),
    [
        (r"^license: .*$", "license:", "no license"),
        (r"^parity: .*$", "parity: ''", "no parity"),
        (r"^datasets:\n- .*$", "datasets: []", "no datasets"),
        (r"^model-index:", "results:", "no metrics"),
        (r"protocol: .*$", "protocol: ''", "'PSNR (Y)' has no protocol"),
        (r"value: 37.5", "value: .nan", "value nan, not a finite number"),
        (r"value: 37.5", "value: about 37", "'about 37', not a finite number"),
        (r"^config: .*$", "config: configs/none.yaml", "config configs/none.yaml does not exist"),
        (r"^config: .*$", "", "names no config"),
        (r"^parameters: .*$", "parameters: 7", "298236 parameters, the front matter states 7"),
        (r"^sha256:\n  .*$", "", "states no sha256"),
        (r"^(sha256:\n)  .*$", r"\1  other.safetensors: ab", "model.safetensors has no sha256"),
        (r"!\[.*\]\(samples.png\)", "", "shows no picture"),
        (r"samples.png", "none.png", "picture none.png cannot be read"),
        (r"^## Limitations$", "", "section '## Limitations' is missing"),
        (r"\A---\n", "", "does not begin with front matter"),
    ],
)
def test_problems_of_a_card_are_named(card: Path, pattern: str, replacement: str, problem: str) -> None:
    _edit(card, pattern, replacement)
    found = check_card(card)
    assert any(problem in sentence for sentence in found), found


def test_damaged_files_of_a_card_are_named(card: Path, tmp_path: Path) -> None:
    (card / "samples.png").write_bytes(b"no picture")
    content = bytearray((card / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (card / "model.safetensors").write_bytes(content)
    problems = " ".join(check_card(card))
    assert "samples.png cannot be read" in problems
    assert "another sha256" in problems
    assert "do not load" in problems
    (card / "model.safetensors").unlink()
    assert "does not exist" in " ".join(check_card(card))
    assert "no card" in check_card(tmp_path / "nowhere")[0]
    (tmp_path / "model_index.json").write_text("{}")
    assert "push_to_hub of diffusers" in check_card(tmp_path)[0]


# --- the cards that this distribution ships


@pytest.mark.parametrize("folder", published(), ids=lambda folder: folder.name)
def test_shipped_card_is_good(folder: Path) -> None:
    assert check_card(folder) == []
    assert front_matter(folder / "README.md")["model-index"][0]["name"] == folder.name


@pytest.mark.parametrize("folder", published(), ids=lambda folder: folder.name)
def test_example_in_a_shipped_card_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python lines of the card, word for word but for fewer episodes, beside a photo."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1].replace("episodes=20", "episodes=1"), str(folder), "exec"), {})


@pytest.mark.parametrize("folder", published(), ids=lambda folder: folder.name)
def test_commands_of_a_shipped_card_are_taken(folder: Path) -> None:
    """What is said to measure the numbers is read by the command line, which names weights that exist."""
    block = re.search(r"Measured by\n\n```\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert block
    for line in block[1].splitlines():
        program, *words = shlex.split(line)
        assert program == "zoo"
        options = parse(words)
        for name in options.names if words[0] == "bench" else [options.model]:
            assert name in {"bicubic", "input", "policy"} or (cards_dir() / name).is_dir(), name


def test_every_shipped_weight_has_a_card() -> None:
    """Weights that a cfg takes from model_cards lie there, or nobody was promised them yet."""
    have = {folder.name for folder in published()}
    files = {folder.parent.name for folder in cards_dir().glob("*/model.safetensors")}
    assert files <= have
    for name in files:
        cfg = get_pretrained_cfg(name)
        assert isinstance(cfg, ModelCfg)
        assert cfg.license == front_matter(cards_dir() / name / "README.md")["license"]


def test_every_kind_of_shipped_denoiser_has_a_card() -> None:
    assert cards.denoiser_cards().keys() <= {folder.name.partition(".")[0] for folder in published()}
