"""`train.py`: what it prints, what it refuses and how it ends; each config runs as it is."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  its loggers keep the stderr they meet: not the one captured in a single test
import pytest
import torch
import yaml
from image_sets import image_folder
from jsonargparse import Namespace
from timm.layers import use_fused_attn

import zoo
from zoo.cli import main
from zoo.cli.train import find_config, reason
from zoo.diffusion import PixelDiT
from zoo.record import read_record
from zoo.tasks.command import TrainingCLI, run_lightning
from zoo.tasks.diffusion import Diffusion

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "configs" / "smoke" / "repavit.yaml"


def train(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run train.py in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def test_print_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole configuration, defaults included, is valid YAML that can be run again."""
    assert train(monkeypatch, "fit", "--config", str(SMOKE), "--print_config") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"] == "zoo.tasks.classification.Classification"
    assert config["model"]["init_args"]["optim"]["sched"] == "cosine"
    assert config["data"]["init_args"]["hflip"] == 0.5


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("trainer.max_epoch", "trainer has no option 'max_epoch'. Did you mean max_epochs?"),
        ("model.init_args.mixupp", "model.init_args has no option 'mixupp'. Did you mean mixup?"),
        ("model.init_args.optim.min_lrr", "model.init_args.optim has no option 'min_lrr'. Did you mean min_lr?"),
        ("data.init_args.bacth_size", "data.init_args has no option 'bacth_size'. Did you mean batch_size?"),
        ("modell", "There is no option 'modell'. Did you mean model?"),
    ],
)
def test_unknown_key(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped key stops the run before it starts, with the key's name and exit code 2."""
    config = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    *parents, last = place.split(".")
    target = config
    for parent in parents:
        target = target[parent]
    target[last] = 1
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    assert train(monkeypatch, "fit", "--config", str(tmp_path / "wrong.yaml")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--trainer.max_epoch 3", "trainer has no option 'max_epoch'. Did you mean max_epochs?"),
        ("--trainer.max_epochz 3", "trainer has no option 'max_epochz'. Did you mean max_epochs?"),
        ("--data.init_args.image_sice 32", "data.init_args has no option 'image_sice'. Did you mean image_size?"),
        ("--data.batch_sice 3", "data.init_args has no option 'batch_sice'. Did you mean batch_size?"),
        ("--model.init_args.optim.lrr 1", "model.init_args.optim has no option 'lrr'. Did you mean lr?"),
        ("--model.init_args.optim.lr abc", "model.init_args.optim.lr takes float, got 'abc'."),
        ("--data.init_args.batch_size 1.5", "data.init_args.batch_size takes int, got '1.5'."),
        ("--model.init_args.low_res [24]", "model.init_args.low_res takes tuple with 2 elements, got '[24]'."),
        ("--trainer.precision bf17", "bf16 or int, got 'bf17'. Did you mean bf16?"),
        (
            "--data.init_args.interpolation bicubik",
            "takes bilinear, bicubic, random, got 'bicubik'. Did you mean bicubic?",
        ),
        (
            "--data.class_path zoo.data.images.Images",
            "data.class_path: zoo.data.images has no Images. Did you mean FolderImages?",
        ),
        ("--model.class_path Klassification", "such as zoo.tasks.classification.Classification; got 'Klassification'."),
        ("--trainer.callbacks+=Foo", "such as zoo.tasks.callbacks.ExactResume; got 'Foo'."),
        ("--data.init_args.image_size null", "data.init_args.image_size takes int or tuple[int, int], got null."),
        ("--modle.x 1", "There is no option 'modle'. Did you mean model?"),
        ("--confg x", "There is no option 'confg'. Did you mean config?"),
        ("--optimizer.lr 1", "--optimizer takes a class of torch first: --optimizer AdamW. The tasks of this zoo have"),
        ("--lr_scheduler.T_max 1", "--lr_scheduler takes a class of torch first: --lr_scheduler CosineAnnealingLR."),
    ],
)
def test_wrong_arguments(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the option, what it takes and the nearest right one, in place of the parser's ten."""
    assert train(monkeypatch, "fit", "--config", str(SMOKE), *arguments.split()) == (1 if "null" in arguments else 2)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_options_may_come_before_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They change what it says, as behind it; the parser alone would know no class yet, and let the config win."""
    options = ("--data.init_args.image_size", "40", "--trainer.max_epochs=7")
    assert train(monkeypatch, "fit", *options, "--config", str(SMOKE), "--print_config") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["data"]["init_args"]["image_size"], config["trainer"]["max_epochs"]) == (40, 7)
    assert train(monkeypatch, "fit", "--config") == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fitt", "A training takes fit, validate or test, got 'fitt'. Did you mean fit?"),
        ("predict", "got 'predict'. Trained models predict by zoo classify, restore and generate."),
    ],
)
def test_unknown_command(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, command, "--config", str(SMOKE)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"trainer:\n  max_epochs: [3\n", "is no YAML that can be read: while parsing a flow sequence"),
        (b"\x00\xff", "is no YAML that can be read"),
        (b"", "holds no settings: expected trainer, model and data"),
        (b"hello", "holds no settings"),
    ],
)
def test_a_config_that_is_none_is_named(
    stored: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_bytes(stored)
    assert train(monkeypatch, "fit", f"--config={tmp_path / 'mine.yaml'}") == 2
    error = capsys.readouterr().err
    assert f"mine.yaml {message}" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [(), ("fit",)])
def test_nothing_to_train(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, *arguments) == 2
    assert "zoo train fit --config classification/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model.init_args.optim.sched", "cosin"), "cosin"),
        (("--model.init_args.optim.lr", "-1"), "lr must not be negative"),
        (("--model.init_args.optim.opt", "muonn"), "timm has no optimizer 'muonn'. Did you mean muon?"),
        (("--model.init_args.model", "repavit_tinny"), "repavit_tinny"),
        (("--model.init_args.model", "repavit_tiny.cifar11"), "cifar11"),
        (("--data.init_args.data_dir", "/no/such/folder"), "There is no folder /no/such/folder"),
        (("--ckpt_path", "missing.ckpt"), "missing.ckpt"),
    ],
)
def test_wrong_values(
    change: tuple[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that says what is wrong, no traceback, and an exit code that is not 0."""
    monkeypatch.chdir(tmp_path)
    data = image_folder(tmp_path / "data", train=4, val=2)
    code = train(
        monkeypatch, "fit", "--config", str(SMOKE), "--data.init_args.data_dir", str(data),
        *change,
    )  # fmt: skip
    error = capsys.readouterr().err
    assert code != 0
    assert message in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        train(monkeypatch, "fit", "--config", str(SMOKE), "--data.init_args.data_dir", "/no/such/folder", "--debug")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch.cli", None)
    assert train(monkeypatch, "fit") == 2
    assert "pip install 'ffn-zoo[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "accelerator", "plain"),
    [("bf16-mixed", "cpu", True), ("bf16-true", "auto", True), ("32-true", "cpu", False), ("bf16-mixed", "gpu", False)],
)
def test_attention_that_is_faster(
    precision: str, accelerator: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain one in bfloat16 on a CPU, for the run alone, and unless the user has chosen."""
    seen: list[tuple[bool, bool, bool]] = []
    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    trainer = Namespace(precision=precision, accelerator=accelerator, default_root_dir=None)

    def run(cli: Any, **kwargs: Any) -> None:
        cli.config = Namespace(subcommand="fit", fit=Namespace(trainer=trainer))
        cli.before_instantiate_classes()
        seen.append((use_fused_attn(), torch.backends.cuda.flash_sdp_enabled(), not reduced()))

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("zoo.tasks.command.TrainingCLI.__init__", run)
    run_lightning([])
    assert seen == [(not plain,) * 3]
    assert use_fused_attn()
    assert not reduced()
    assert torch.backends.cuda.flash_sdp_enabled()
    monkeypatch.setenv("TIMM_FUSED_ATTN", "1")
    run_lightning([])
    assert seen[1] == (True, True, True)


def test_all_that_a_run_writes_follows_its_root() -> None:
    cli = object.__new__(TrainingCLI)
    for config in sorted((ROOT / "configs").rglob("*.yaml")):
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        trainer = Namespace({**settings["trainer"], "precision": "32-true", "accelerator": "cpu"})
        if (root := trainer.get("default_root_dir")) is None:
            continue
        trainer.default_root_dir = "mine"
        cli.config = Namespace(subcommand="fit", fit=Namespace(trainer=trainer, config=[config]))
        cli.before_instantiate_classes()
        assert root not in str(trainer), config


@pytest.mark.slow
def test_fit_resume_and_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three commands of the README: train, go on from the last checkpoint, measure."""
    data = image_folder(tmp_path / "data", train=8, val=4)
    common = ("--config", str(SMOKE), "--data.init_args.data_dir", str(data))
    monkeypatch.chdir(tmp_path)
    assert train(monkeypatch, "fit", *common, "--trainer.default_root_dir", "mine") == 0
    (last,) = tmp_path.rglob("last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "mine"}  # logs and checkpoints have followed
    common = (*common, "--trainer.default_root_dir", "runs/smoke/repavit")
    assert train(monkeypatch, "fit", *common, "--trainer.max_epochs", "3", "--ckpt_path", str(last)) == 0
    assert train(monkeypatch, "test", *common, "--ckpt_path", str(last)) == 0
    metrics = "".join(path.read_text() for path in tmp_path.rglob("metrics.csv"))
    assert "val/acc1" in metrics
    assert "test/acc1" in metrics
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    model = tmp_path / "runs" / "smoke" / "repavit" / "model"
    assert read_record(model).label_names == ("circle", "square")
    assert "Top-1 accuracy" in (model / "README.md").read_text()
    assert zoo.create_model(str(model)).num_classes == 2


@pytest.mark.slow
def test_second_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that ends before a validation says that it leaves no card; the next card names what it began from."""
    data = image_folder(tmp_path / "data", train=8, val=4)
    common = (
        "fit",
        "--config",
        str(SMOKE),
        "--data.init_args.data_dir",
        str(data),
        "--trainer.enable_progress_bar",
        "false",
    )
    monkeypatch.chdir(tmp_path)
    assert train(monkeypatch, *common, "--trainer.default_root_dir", "mine", "--trainer.max_steps", "1") == 0
    assert "mine/model has no card" in capsys.readouterr().err
    assert not (tmp_path / "mine" / "model" / "README.md").exists()
    again = ("--model.init_args.model", "mine/model", "--model.init_args.pretrained", "true")
    again += ("--model.init_args.model_args", "null", "--model.init_args.mimetic_init", "false")
    assert train(monkeypatch, *common, *again, "--trainer.default_root_dir", "next") == 0
    assert "no card" not in capsys.readouterr().err
    assert "trained from `mine/model`" in (tmp_path / "next" / "model" / "README.md").read_text()


@pytest.mark.slow
def test_resume_says_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate given beside a checkpoint holds and is printed; checkpoints that do not fit end in one line."""
    data = image_folder(tmp_path / "data", train=8, val=4)
    common = ("fit", "--config", "smoke/repavit", "--data.init_args.data_dir", str(data))
    monkeypatch.chdir(tmp_path)
    assert main(["train", *common, "--trainer.max_epochs", "1"]) == 0
    (last,) = tmp_path.rglob("last.ckpt")
    capsys.readouterr()
    resume = ("train", *common, "--ckpt_path", str(last), "--model.init_args.optim.lr", "0.5")
    assert main([*resume]) == 0
    assert (
        f"note: Going on from {last} with other settings than before: optim.lr 0.001 -> 0.5." in capsys.readouterr().err
    )
    rates = [row["optimizer_states"][0]["param_groups"][0]["initial_lr"] for row in map(load, tmp_path.rglob("*.ckpt"))]
    assert max(rates) == 0.5
    half = tmp_path / "half.ckpt"
    half.write_bytes(last.read_bytes()[:5000])
    cfsr = tmp_path / "cfsr.ckpt"
    torch.save({**load(last), "task": "zoo.tasks.restoration.Restoration"}, cfsr)
    for path, message in ((half, "damaged or was not written to its end"), (cfsr, "is of the task Restoration")):
        assert main(["train", *common, "--ckpt_path", str(path)]) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith(f"error: {path}")
        assert message in error[-1]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_what_workers_raise_is_one_line() -> None:
    error = ValueError("Caught PictureError in DataLoader worker process 0.\nTraceback\n  x\nzoo.E: a is b.")
    assert reason(error) == "a is b."


def test_what_a_class_raises_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The package that PushT lacks, where the environment is one of the settings."""
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    assert main(["train", "fit", "--config", "diffusion/policy_pusht"]) == 1
    assert "error: PushT needs gym-pusht: pip install 'ffn-zoo[pusht]'" in capsys.readouterr().err


def test_configs_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("classification/repavit_tiny_cifar10", "configs/smoke/cfsr.yaml", "finetune_example"):
        assert Path(find_config(name)).is_file()
    assert main(["train", "fit", "--config=classification/repavit_tiny_cifar", "--print_config"]) == 2
    assert "Did you mean classification/repavit_tiny_cifar10" in capsys.readouterr().err


@pytest.mark.slow
def test_denoiser_from_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of a training that went on from a pipeline needs that no longer."""
    model = PixelDiT(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, patch_size=4, sample_size=16, num_classes=2
    )
    Diffusion(model, class_names=["circle", "square"]).save_pretrained(tmp_path / "pipeline")
    data = image_folder(tmp_path / "data", train=8, val=4)
    config = str(ROOT / "configs" / "smoke" / "pixeldit.yaml")
    monkeypatch.chdir(tmp_path)
    options = (
        "--data.init_args.data_dir",
        str(data),
        "--model.init_args.model",
        "pipeline",
        "--trainer.max_steps",
        "1",
    )
    assert train(monkeypatch, "fit", "--config", config, *options) == 0
    shutil.rmtree(tmp_path / "pipeline")
    (last,) = tmp_path.rglob("*.ckpt")
    loaded = Diffusion.load_from_checkpoint(last, weights_only=False)
    assert loaded.model.config.sample_size == 16
    assert loaded.class_names == ["circle", "square"]
