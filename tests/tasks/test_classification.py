"""Training a classifier: losses, mixing, freezing, schedules, pictures, and weights that are a published file."""

from __future__ import annotations

import csv
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_sets import image_folder
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import zoo  # noqa: F401  registers the models
from zoo.data.images import ImageClassification
from zoo.moe import MoEConfig, Router
from zoo.notices import Notice
from zoo.tasks.classification import Classification
from zoo.tasks.optim import OptimConfig
from zoo.weights import save_checkpoint, sha256_of

TINY = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), train=16, val=8)


def module(**kwargs: Any) -> Classification:
    return Classification("repavit_tiny", **{"num_classes": 2, "model_args": TINY, **kwargs})


def data(folder: Path, **kwargs: Any) -> ImageClassification:
    return ImageClassification(str(folder), **{"image_size": 16, "batch_size": 8, "crop_padding": 1, **kwargs})


def fit(task: Classification, images: ImageClassification, root: Path, **kwargs: Any) -> Trainer:
    options = dict(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(**{**options, **kwargs})
        trainer.fit(task, images)
    return trainer


def test_learns_logs_and_shows(folder: Path, tmp_path: Path) -> None:
    """Discs and squares are told apart after a few epochs; CSV and TensorBoard have the numbers and pictures."""
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(str(tmp_path), "tensorboard")]
    task = module(optim=OptimConfig(lr=1e-2), label_smoothing=0.0)
    trainer = fit(task, data(folder), tmp_path, max_epochs=12, logger=loggers, log_every_n_steps=1)
    accuracy = float(trainer.callback_metrics["val/acc1"])  # before the test run, which replaces the metrics
    assert accuracy >= 0.9
    (metrics,) = trainer.test(task, data(folder), verbose=False)
    assert metrics["test/acc1"] == pytest.approx(accuracy, abs=0.2)

    rows = list(csv.DictReader((Path(loggers[0].log_dir) / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 12 * 4
    assert sum(losses[-4:]) < sum(losses[:4]) / 2
    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    assert {"val/acc1", "val/loss", "train/loss"} <= set(events.Tags()["scalars"])
    picture = events.Images("val/images")[-1]
    assert (picture.height, picture.width) == (22 + 2, 8 * 22 + 2)  # the first batch: eight framed images in a row


def test_a_checkpoint_keeps_the_names_of_its_classes(folder: Path, tmp_path: Path) -> None:
    """Other data, whose folders are fewer, are labelled as those that were learnt; unknown ones are refused."""
    task = module(optim=OptimConfig(lr=1e-2), label_smoothing=0.0)
    trainer = fit(task, data(folder), tmp_path, max_epochs=12)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "some" / "val").mkdir(parents=True)
    shutil.copytree(folder / "val" / "square", tmp_path / "some" / "val" / "square")
    (found,) = trainer.test(module(), data(tmp_path / "some"), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert found["test/acc1"] > 0.8
    (tmp_path / "some" / "val" / "square").rename(tmp_path / "some" / "val" / "triangle")
    with pytest.raises(ValueError, match="has the class 'triangle', which is none of the known ones"):
        trainer.test(module(), data(tmp_path / "some"), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_pictures_that_are_prepared_otherwise_than_the_model_states(folder: Path, tmp_path: Path) -> None:
    task = module(optim=OptimConfig(lr=1e-2))
    fit(task, data(folder, mean=(0.5,) * 3, std=(0.5,) * 3), tmp_path)
    model, record = task.trained_model()
    save_checkpoint(model.state_dict(), tmp_path / "mine.safetensors", record=record)
    own = Classification(str(tmp_path / "mine.safetensors"), 2, pretrained=True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.warns(Notice, match=r"pictures otherwise .*: mean \(0.485, 0.456, 0.406\) for \(0.5, 0.5, 0.5\)"):
        trainer.validate(own, data(folder), verbose=False)


def test_channels_of_data_and_model(folder: Path, tmp_path: Path) -> None:
    gray = dict(mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="takes images of 3 channels, the data give 1: set mean and std"):
        fit(module(), data(folder, **gray), tmp_path)
    task = module(model_args={**TINY, "in_chans": 1})
    fit(task, data(folder, **gray), tmp_path)
    record = task.model_record()
    assert record is not None
    assert (record.input_size, record.mean) == ((1, 16, 16), (0.5,))


def test_experts_are_trained_with_their_routers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MoE++: the balance loss is logged and counts, and the routers learn."""
    experts = MoEConfig(shared=1, experts=3, top_k=2, scores="random", zero=1, copies=1, constants=1)
    task = Classification("vit_tiny_patch16_224", 2, TINY, experts=experts, optim=OptimConfig(lr=1e-2))
    routers = [module.weight for module in task.modules() if isinstance(module, Router)]
    before = [weight.detach().clone() for weight in routers]
    trainer = fit(task, data(folder), tmp_path, max_epochs=2)
    assert len(routers) == TINY["depth"]
    assert all((new - old).abs().max() > 1e-3 for new, old in zip(routers, before, strict=True))
    assert trainer.callback_metrics["train/balance"] > 0
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)  # which needs a running trainer
    batch = torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
    totals = []
    for task.balance in (0.0, 1.0):
        totals.append(float(task.training_step(batch, 0)))
    assert totals[1] > totals[0]


def test_mixing_uses_soft_targets(folder: Path, tmp_path: Path) -> None:
    task = module(mixup=0.8, cutmix=1.0)
    fit(task, data(folder), tmp_path, max_steps=1)
    assert type(task.loss).__name__ == "SoftTargetCrossEntropy"
    with pytest.raises(ValueError, match="batch_size must be even, got 3"):
        fit(module(mixup=0.8), data(folder, batch_size=3), tmp_path, max_steps=1)


def test_frozen_parameters_stay(folder: Path, tmp_path: Path) -> None:
    task = module(freeze=["patch_embed", "blocks.0"], optim=OptimConfig(lr=0.1, warmup=0.0))
    before = {key: value.clone() for key, value in task.model.named_parameters()}
    fit(task, data(folder), tmp_path, max_steps=2)
    for name, parameter in task.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(("patch_embed", "blocks.0")), name
    with pytest.raises(ValueError, match=r"no parameter of repavit_tiny starts with 'blcoks'"):
        module(freeze=["blcoks"])


def test_fine_tuning_from_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`export_weights` writes a file that `pretrained=True` takes, with another number of classes."""
    task = module()
    digest = task.export_weights(tmp_path / "model.safetensors")
    assert digest == sha256_of(tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"), sha256=digest, num_classes=2)
    tuned = module(num_classes=5, pretrained=True, model_args={**TINY, "pretrained_cfg_overlay": overlay})
    own = task.model.state_dict()
    for key, value in tuned.model.state_dict().items():
        assert key.startswith("head.") or torch.equal(value, own[key]), key
    half = task.export_weights(tmp_path / "half.safetensors", torch.float16)
    assert half != digest
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "model.safetensors").stat().st_size


def rates(folder: Path, root: Path, **kwargs: Any) -> tuple[list[float], Trainer]:
    """Return the learning rate of each of 20 optimizer steps."""
    seen: list[float] = []
    task = module(optim=OptimConfig(**kwargs))
    step = task.optimizer_step

    def watched(*args: Any, **named: Any) -> None:
        optimizer = task.optimizers(use_pl_optimizer=False)
        seen.append(max(group["lr"] for group in optimizer.param_groups))
        step(*args, **named)

    task.optimizer_step = watched  # type: ignore[method-assign]
    trainer = fit(task, data(folder), root, max_epochs=5, limit_val_batches=0)
    assert len(seen) == 20
    return seen, trainer


def test_schedules(folder: Path, tmp_path: Path) -> None:
    """Warm-up rises in a line, then the rate falls as the name says, step by step."""
    warm = dict(lr=1e-2, warmup=0.25, warmup_lr=1e-4, min_lr=1e-5)
    cosine, _ = rates(folder, tmp_path, sched="cosine", **warm)
    assert cosine[0] == pytest.approx(1e-4)
    assert cosine[1] == pytest.approx(1e-4 + (1e-2 - 1e-4) / 5)
    assert max(cosine) == pytest.approx(1e-2, rel=0.2)
    assert cosine[-1] < 1e-3
    assert all(later < earlier for earlier, later in pairwise(cosine[5:]))
    line, _ = rates(folder, tmp_path, sched="poly", lr=1e-2, warmup=0.0, min_lr=0.0)
    assert line == pytest.approx([1e-2 * (1 - step / 20) for step in range(20)])
    steps, _ = rates(folder, tmp_path, sched="step", lr=1e-2, warmup=0.0)
    assert steps == pytest.approx([1e-2] * 6 + [1e-3] * 6 + [1e-4] * 6 + [1e-5] * 2)
    constant, _ = rates(folder, tmp_path, sched="constant", lr=1e-2, warmup=0.25, warmup_lr=0.0)
    assert constant == pytest.approx([0.0, 2e-3, 4e-3, 6e-3, 8e-3] + [1e-2] * 15)
    none, trainer = rates(folder, tmp_path, sched="none", lr=1e-2)
    assert none == [1e-2] * 20
    assert not trainer.lr_scheduler_configs


def test_layer_decay_and_weight_decay(folder: Path, tmp_path: Path) -> None:
    """The classifier keeps the whole rate, earlier layers get less; norms and biases are not decayed."""
    task = module(optim=OptimConfig(lr=1e-2, layer_decay=0.5, weight_decay=0.1, sched="none"))
    trainer = fit(task, data(folder), tmp_path, max_steps=1)
    groups = trainer.optimizers[0].param_groups
    where = {id(parameter): group for group in groups for parameter in group["params"]}
    names = dict(task.model.named_parameters())
    scale = {name: where[id(parameter)]["lr_scale"] for name, parameter in names.items()}
    assert scale["head.weight"] == 1.0
    rising = [
        scale[name] for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight")
    ]
    assert rising[0] < rising[1] < rising[2] < 1.0
    decay = {name: where[id(parameter)]["weight_decay"] for name, parameter in names.items()}
    assert decay["blocks.0.attn.qkv.weight"] == 0.1
    assert decay["blocks.0.attn.qkv.bias"] == decay["blocks.0.mlp.norm.weight"] == decay["pos_embed"] == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(lr=-1.0), "lr must not be negative"),
        (dict(warmup=5), "warmup is a share"),
    ],
)
def test_optimizer_arguments_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**given)


def test_low_resolution_first(folder: Path, tmp_path: Path) -> None:
    """The first share of the steps sees small images, the rest and validation full ones."""
    task = module(low_res=(8, 0.5), model_args={**TINY, "dynamic_img_size": True})
    sides: list[int] = []
    task.model.patch_embed.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1]))
    fit(task, data(folder), tmp_path, max_epochs=1, limit_val_batches=1, num_sanity_val_steps=0)
    with pytest.warns(Notice, match=r"first 50 % of the steps train at 8 pixels.*says little until they are over"):
        task.on_fit_start()
    assert sides == [8, 8, 16, 16, 16]
    with pytest.raises(ValueError, match=r"low_res has 24 pixels, no fewer than the images' 16: .*null"):
        fit(module(low_res=(24, 0.5)), data(folder), tmp_path)


def test_any_timm_model_trains(folder: Path, tmp_path: Path) -> None:
    """Models of timm itself are trained by the same task."""
    task = Classification("test_vit", num_classes=2, model_args={"img_size": 16})
    assert timm.is_model("test_vit")
    fit(task, data(folder), tmp_path, max_steps=1)
