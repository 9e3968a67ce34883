"""Cards and configs: each shipped weight has a good card, each YAML fits the code, each smoke run ends well."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from image_sets import image_folder, photo_folder
from lightning.pytorch.cli import LightningCLI
from registered import ALL_NAMES
from timm.models import get_arch_pretrained_cfgs

import zoo
from zoo.weights import cards_dir, shipped

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SMOKE = [path for path in CONFIGS if path.parent.name == "smoke"]
CARDS = sorted(path.parent for path in cards_dir().glob("*/README.md"))
SHIPPED = {
    full: cfg for name in ALL_NAMES for full, cfg in get_arch_pretrained_cfgs(name).items() if cfg.file == shipped(full)
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_have_a_card(name: str) -> None:
    """A `default_cfgs` entry that says that its weights are shipped is right, and a card goes with them."""
    assert Path(SHIPPED[name].file).is_file(), f"{name} is said to be shipped"
    assert cards_dir() / name in CARDS


def test_cards_have_an_entry() -> None:
    """Every card belongs to a registered weight tag or to a diffusers folder."""
    for folder in CARDS:
        known = folder.name in SHIPPED or (folder / "model_index.json").is_file()
        assert known, f"no default_cfgs entry for {folder.name}"


def test_cards_say_the_probabilities_that_classify_says() -> None:
    """Where weights state a temperature, the lines of Python of their card divide by it."""
    stated = {name: cfg.temperature for name, cfg in SHIPPED.items() if getattr(cfg, "temperature", None)}
    assert stated
    for name, temperature in stated.items():
        assert f"(model(image[None]) / {temperature:g}).softmax" in (cards_dir() / name / "README.md").read_text()


def test_shipped_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in cards_dir().rglob("*.safetensors")) < 60e6


class Parsed(LightningCLI):
    """Read and check a config without building what it describes."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


@cache
def parser() -> Any:
    """Return what reads configs; making it takes longer than reading one."""
    argv, sys.argv = sys.argv, ["train.py"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Parsed(
                run=False,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_kwargs={"exit_on_error": False},
                save_config_callback=None,
                args=["--config", str(CONFIGS[0])],
            ).parser
    finally:
        sys.argv = argv


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_fits_the_code(path: Path) -> None:
    """Every key exists, the seed is set, checkpoints are checked, nothing names one machine, the model builds."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "say in the first line what the run is"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = parser().parse_args(["--config", str(path)])
    assert config.seed_everything is not False
    assert "seed_everything:" in text
    assert not [line for line in text.splitlines() if ": /" in line or "~" in line or "${" in line]
    plugins = {plugin.class_path for plugin in config.trainer.plugins}
    assert "zoo.tasks.callbacks.CheckedCheckpointIO" in plugins
    assert "zoo.tasks.callbacks.ExactResume" in {callback.class_path for callback in config.trainer.callbacks}
    if "backbone" in config.model.init_args:
        arguments = dict(config.model.init_args.model_args or {})
        indices = config.model.init_args.out_indices
        timm.create_model(
            config.model.init_args.backbone, features_only=True, out_indices=indices, device="meta", **arguments
        )
    elif isinstance(config.model.init_args.get("model"), str):  # distillation builds its models from folders
        arguments = dict(config.model.init_args.model_args or {})
        classes = {"num_classes": config.model.init_args.num_classes} if "num_classes" in config.model.init_args else {}
        model = timm.create_model(config.model.init_args.model, device="meta", **classes, **arguments)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        assert size is None or size[0] == config.data.init_args.image_size


def test_shipped_weights_name_their_config() -> None:
    assert {path.parent.name for path in CONFIGS} >= {"classification", "restoration", "diffusion", "smoke"}
    assert {"repavit"} <= {path.stem for path in SMOKE}


def data_for(path: Path, root: Path) -> Path | None:
    """Write images of the kind that a smoke config trains on, if it trains on images."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    init = config["init_args"]
    if "data_dir" not in init:
        return None
    if not config["class_path"].endswith("PairedImages"):
        return image_folder(root, train=8, val=4, size=init.get("image_size", 16))
    for folder in [*(init.get("train_folders") or ["."]), init.get("val_folder")]:
        if folder:
            photo_folder(root / folder)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.stem)
def test_smoke_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, validation, checkpoints and logs of a small run, from the file as it is."""
    data = data_for(path, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": False},
            args=["fit", "--config", str(path), *(["--data.init_args.data_dir", str(data)] if data else [])],
        )
    assert cli.trainer.state.finished
    assert cli.trainer.global_step >= 1
    assert all(float(value) == float(value) for value in cli.trainer.callback_metrics.values()), "a metric is NaN"
    assert list(tmp_path.rglob("*.ckpt"))
    assert not (ROOT / "runs" / "smoke").exists()
    assert zoo.__version__
