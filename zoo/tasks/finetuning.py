"""Fine-tune a classifier on own pictures: from class folders to a folder that says all about the model."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from zoo.cards.card import Metric
from zoo.cards.own import is_own_folder, write_own_model
from zoo.data.images import ImageClassification, has_split, opened, require_readable, tell_copies
from zoo.data.labelled_images import VALIDATION_SPLITS
from zoo.factory import image_size_args
from zoo.ffn.reparam import reparameterize
from zoo.files import whole
from zoo.notices import Notice, notice
from zoo.record import ModelRecord, attach, record_of
from zoo.tasks.checkpoints import read_training_checkpoint
from zoo.tasks.classification import Classification
from zoo.tasks.confusion import draw_confusion
from zoo.tasks.labels import are_classes_of
from zoo.tasks.optim import OptimConfig
from zoo.tasks.plain import plain

__all__ = ["Finetuned", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What came of a fine-tuning.

    Args:
        folder: Holds the model.
        classes: Names.
        confusion: Pictures of the class of the row that were taken for the class of the column.
        files: Pictures that it was measured on.
        epochs: Trained, in all.
        best_epoch: Whose weights were kept, from 1.
        trained_on: Number of pictures.
        seconds: Of the whole work.
    """

    folder: Path
    classes: list[str]
    confusion: list[list[int]]
    files: list[str]
    epochs: int
    best_epoch: int
    trained_on: int
    seconds: float

    @property
    def right(self) -> int:
        """Pictures whose class was told."""
        return sum(row[place] for place, row in enumerate(self.confusion))

    @property
    def accuracy(self) -> float:
        """Their share."""
        return self.right / max(1, len(self.files))


@dataclass(kw_only=True)
class _Epochs(Callback):
    """Tell each epoch's numbers to whoever shows them."""

    tell: Callable[[dict[str, float]], None]
    started: float = field(default_factory=time.monotonic)
    count: int = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.count = trainer.current_epoch + 1
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.tell(
            {
                "epoch": self.count,
                "train_loss": values.get("train/loss", float("nan")),
                "val_loss": values["val/loss"],
                "val_acc1": values["val/acc1"],
                "seconds": time.monotonic() - self.started,
            }
        )


def finetune(
    data_dir: str | Path,
    model: str,
    output: str | Path,
    *,
    image_size: int | None = None,
    epochs: int = 20,
    patience: int = 5,
    batch_size: int | None = None,
    lr: float = 5e-4,
    freeze: Sequence[str] = (),
    lora: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    num_workers: int = 0,
    accelerator: str = "auto",
    pretrained: bool = True,
    model_args: dict[str, Any] | None = None,
    skip_damaged: bool = False,
    overwrite: bool = False,
    tell: Callable[[dict[str, float]], None] = lambda numbers: None,
) -> Finetuned:
    """Train a classifier on own pictures, measure it on held-out ones, and write its folder.

    The weights of the epoch with the least validation loss are kept. The accuracy is that of these weights, picture by
    picture in the way that `zoo classify` goes.

    Args:
        data_dir: `DIR/CLASS/*.jpg`, of which a share of every class is held out; or `DIR/{train,val}/CLASS/*.jpg`;
            also Parquet files and shards, as for `ImageClassification`.
        model: What to start from, as `zoo.create_model` takes it: "emov2_1m.cifar10".
        output: Folder to write.
        image_size: Side of the square input, pixels; None takes that of the pretrained weights.
        epochs: At most.
        patience: Epochs without a lower validation loss after which the training ends.
        batch_size: None takes an eighth of the training pictures, a power of two from 4 to 64.
        lr: Of the classifier; earlier layers learn more slowly, by 0.75 a layer.
        freeze: Parts that stay as they are.
        lora: Rank of low-rank adapters; only they and the classifier learn.
        val_fraction: Share of each class that is held out where there is no folder for validation.
        seed: Of the parts, of order and augmentation.
        num_workers: Loader processes.
        accelerator: As of Lightning's trainer.
        pretrained: Start from the published weights of a registered name.
        model_args: More arguments of the model.
        skip_damaged: Leave out pictures that cannot be read; otherwise they are an error that lists them.
        overwrite: Replace a folder that this function has written.
        tell: Called with the numbers of each epoch.

    Raises:
        ValueError: Pictures, classes or the model are not as they should be.
        FileExistsError: The output is there and not to be replaced.
    """
    started = time.monotonic()
    data_dir = Path(data_dir)
    _require_replaceable(Path(output), overwrite)
    seed_everything(seed, verbose=False)
    held_out = not any(has_split(data_dir, name) for name in VALIDATION_SPLITS if name != "test")
    if held_out and has_split(data_dir, "test"):
        notice(
            f"A part of every class of train is held out ({val_fraction:g}); {data_dir}'s test images are left alone."
        )
    args = dict(model_args or {})
    data = ImageClassification(
        str(data_dir), seed=seed, num_workers=num_workers, val_fraction=val_fraction if held_out else 0.0,
        damaged="skip" if skip_damaged else "stop", scale=(0.6, 1.0),
    )  # fmt: skip
    classes = data.class_names
    if len(classes) == 1:
        raise ValueError(f"{data_dir} has one class, {classes[0]!r}: a classifier takes two or more.")
    if not skip_damaged:
        require_readable(data, "--skip-damaged leaves them out.")
    tell_copies(data)
    if image_size is not None and "img_size" not in args:
        fitting = image_size_args(model, image_size, **args)
        args |= {
            key: value for key, value in fitting.items() if key == "img_size"
        }  # the record has the size of the data
    with _quiet():
        task = Classification(
            model, len(classes), args, pretrained, OptimConfig(lr=lr, warmup=0.1, layer_decay=None if lora else 0.75),
            freeze=list(freeze) or None, lora=lora, channels_last=True,
        )  # fmt: skip
    record = record_of(task.model)
    if record.task != "classification":
        raise ValueError(f"{model} is a model for {record.task}: it cannot learn classes.")
    size = record.input_size or (3, 224, 224)
    if size[0] not in (1, 3):
        raise ValueError(f"{model} takes images of {size[0]} channels; pictures have 1 or 3.")
    if are_classes_of(data, record.label_names):  # in the order of its head
        data.take_classes(record.label_names or ())
        classes = data.class_names
    cfg = resolve_model_data_config(task.model)
    data.image_size = image_size or (int(size[1]) if size[1] == size[2] else (int(size[1]), int(size[2])))
    data.mean, data.std, data.crop_pct = cfg["mean"], cfg["std"], cfg["crop_pct"]
    data.interpolation, data.crop_mode = cfg["interpolation"], cfg["crop_mode"]
    train = data._open("train", training=True)
    data.batch_size = batch_size or _batch_size(len(train))
    data.eval_batch_size, data.keep_bytes = 64, 2**29
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch, _quiet():
        best = ModelCheckpoint(scratch, "best", monitor="val/loss", mode="min", save_weights_only=True)
        seen = _Epochs(tell=tell)
        trainer = Trainer(
            accelerator=accelerator, devices=1, max_epochs=epochs, gradient_clip_val=1.0, logger=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[best, EarlyStopping("val/loss", patience=patience, mode="min", check_finite=True), seen],
            default_root_dir=scratch,
        )  # fmt: skip
        trainer.fit(task, data)
        score = best.best_model_score
        if not best.best_model_path or score is None or not torch.isfinite(score):  # Lightning keeps such weights, too
            raise ValueError("The loss was not a number in every epoch: take a lower --lr.")
        checkpoint = read_training_checkpoint(best.best_model_path)
        task.load_state_dict(checkpoint["state_dict"])
        tuned, own = task.trained_model()
        assert own is not None  # zoo.create_model has built the model
        tuned = tuned.cpu().to(memory_format=torch.contiguous_format)
        confusion, files = _measure(tuned, own, data)
        result = Finetuned(
            folder=Path(output), classes=classes, confusion=confusion, files=files, epochs=seen.count,
            best_epoch=int(checkpoint["epoch"]) + 1, trained_on=len(train), seconds=time.monotonic() - started,
        )  # fmt: skip
        picture = Path(scratch) / "confusion.png"
        draw_confusion(classes, confusion, picture)
        _write(result, tuned, own, task, data, trainer, picture, held_out, overwrite=overwrite)
    return result


def _batch_size(count: int) -> int:
    size = 4
    while size * 2 <= min(64, count // 8):
        size *= 2
    return max(1, min(size, count))


def _measure(model: nn.Module, record: ModelRecord, data: ImageClassification) -> tuple[list[list[int]], list[str]]:
    """Classify the validation pictures one by one, as `zoo classify` does, and return the confusion and the files."""
    used = copy.deepcopy(model)
    attach(used, record)
    reparameterize(used, measure=False)
    transform = create_transform(**resolve_model_data_config(used))
    images, indices = opened(data, "validation")
    confusion = [[0] * record.num_classes for _ in range(record.num_classes)]
    files = []
    with torch.inference_mode():
        for index in indices:
            found = int(used(transform(images.image(index))[None]).argmax(-1))
            confusion[images.targets[index]][found] += 1
            files.append(images.name(index))
    return confusion, files


def _write(
    result: Finetuned,
    model: nn.Module,
    record: ModelRecord,
    task: Classification,
    data: ImageClassification,
    trainer: Trainer,
    picture: Path,
    held_out: bool,
    *,
    overwrite: bool,
) -> None:
    where = Path(data.data_dir).resolve().name
    part = (
        f"{data.val_fraction:g} of every class, held out (seed {data.seed})"
        if held_out
        else "its folder for validation"
    )
    metric = Metric(
        name="Top-1 accuracy",
        value=round(100 * result.accuracy, 2),
        unit="%",
        dataset=f"{where} (validation)",
        protocol=f"{result.right} of {len(result.files)} pictures, {part}; they also chose the epoch",
    )
    adapters = f", low-rank adapters of rank {task.hparams['lora']}" if task.hparams["lora"] else ""
    frozen = f", {', '.join(task.hparams['freeze'])} frozen" if task.hparams["freeze"] else ""
    length = f"{result.epochs} epochs, of which the weights of number {result.best_epoch} were kept"
    with whole(result.folder) as work:
        write_own_model(
            work,
            model,
            record,
            metrics=[metric],
            training=f"Fine-tuned on {result.trained_on} pictures at {data.image_size} pixels: {length}; batch"
            f" {data.batch_size}, AdamW, rate {task.optim.lr:g}{adapters}{frozen}.",
            config=_config(task, data, trainer),
            datasets=[where],
            limitations=f"Knows {len(result.classes)} classes and nothing else: every picture is given one of them.",
            picture=picture,
            caption="Rows are the true classes, columns what the model says",
        )
        listed = (_below(file, Path(data.data_dir)) for file in result.files)
        (work / "validation.txt").write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")


def _below(name: str, root: Path) -> str:
    """Return what a picture is called in its data, whose place is nobody's business: a path, or a row or sample."""
    if Path(name).is_file():
        return Path(name).relative_to(root).as_posix()
    what, _, source = name.partition(" of ")
    if Path(source).is_file():
        return f"{what} of {Path(source).relative_to(root).as_posix()}"
    return f"{what} of {root.resolve().name}{source.removeprefix(str(root))}"


def _require_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists; --force replaces it.")
    if not is_own_folder(folder):
        raise FileExistsError(f"{folder} holds something else than a model of your own: it is not replaced.")


def _config(task: Classification, data: ImageClassification, trainer: Trainer) -> dict[str, Any]:
    """Return the config with which `zoo train fit` repeats the run."""
    lightning, here = "lightning.pytorch.callbacks", "zoo.tasks.callbacks"
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    patience = next(callback.patience for callback in callbacks if isinstance(callback, EarlyStopping))
    return plain(
        {
            "seed_everything": data.seed,
            "trainer": {
                "max_epochs": trainer.max_epochs,
                "gradient_clip_val": 1.0,
                "num_sanity_val_steps": 0,
                "default_root_dir": f"runs/{Path(data.data_dir).resolve().name}",
                "plugins": [{"class_path": f"{here}.CheckedCheckpointIO"}],
                "callbacks": [
                    {"class_path": f"{here}.ExactResume"},
                    {
                        "class_path": f"{lightning}.ModelCheckpoint",
                        "init_args": {"save_last": True, "monitor": "val/loss", "mode": "min"},
                    },
                    {
                        "class_path": f"{lightning}.EarlyStopping",
                        "init_args": {"monitor": "val/loss", "patience": patience},
                    },
                    {"class_path": f"{lightning}.RichProgressBar"},
                ],
            },
            "model": {
                "class_path": "zoo.tasks.classification.Classification",
                "init_args": {key: task.hparams[key] for key in _MODEL_ARGUMENTS},
            },
            "data": {
                "class_path": "zoo.data.images.ImageClassification",
                "init_args": {key: _listed(getattr(data, key)) for key in _DATA_ARGUMENTS}
                | {"data_dir": Path(data.data_dir).resolve().name},  # where it lies is nobody's business
            },
        }
    )


_MODEL_ARGUMENTS = (
    "model", "num_classes", "model_args", "pretrained", "optim", "freeze", "lora", "channels_last"
)  # fmt: skip
_DATA_ARGUMENTS = (
    "data_dir", "image_size", "batch_size", "eval_batch_size", "num_workers", "scale", "interpolation", "crop_pct",
    "crop_mode",
    "mean", "std", "seed", "val_fraction", "damaged",
)  # fmt: skip


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks from the user, and let our own through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", Notice)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
