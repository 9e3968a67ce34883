"""The folder that a training leaves: weights with their record and a card, for every other command."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from zoo.cards.card import Metric
from zoo.cards.own import is_own_folder, write_own_model
from zoo.notices import notice
from zoo.record import ModelRecord, write_config
from zoo.tasks.checkpoints import read_training_checkpoint
from zoo.weights import WEIGHTS_NAME, save_checkpoint

__all__ = ["SaveOwnModel"]

_METRICS = {
    "acc1": ("Top-1 accuracy", "%", 100.0),
    "acc5": ("Top-5 accuracy", "%", 100.0),
    "psnr": ("PSNR", "dB", 1.0),
    "ssim": ("SSIM", "", 1.0),
    "mae": ("MAE", "", 1.0),
}


class SaveOwnModel(Callback):
    """Write a classifier's or restorer's folder when training is over.

    Its weights are the best that a `ModelCheckpoint` with a monitored value has kept, else the last, averaged where
    there are averaged ones. The card states what the last validation of these weights has measured; without one there
    is no card, the folder holds weights and record alone, and a notice says so.

    Args:
        folder: Replaced where a training has written it before.

    Raises:
        FileExistsError: The folder holds something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._validated = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._require_own()

    def _require_own(self) -> None:
        folder = self.folder
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if not is_own_folder(folder) and names != {"config.json", WEIGHTS_NAME}:
            raise FileExistsError(f"{folder} was not written by a training: it is not replaced.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._validated != trainer.global_step:
            values = {}
        best = next((entry for entry in trainer.checkpoint_callbacks if _is_best(entry)), None)
        if best is not None:
            pl_module.load_state_dict(read_training_checkpoint(cast(Any, best).best_model_path)["state_dict"])
            values = {cast(Any, best).monitor: float(cast(Any, best).best_model_score)}
        model, record = cast(Any, pl_module).trained_model()
        if record is None:
            notice(f"{self.folder} is not written: nobody knows what the model is.")
            return
        metrics = _metrics(values, trainer)
        if not metrics:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(model.state_dict(), self.folder / WEIGHTS_NAME, record=record)
            write_config(self.folder, record)
            notice(
                f"{self.folder} has no card, which `zoo publish` needs: no validation has measured its weights, those "
                f"after step {trainer.global_step}. Validation runs at the end of an epoch, or each val_check_interval."
            )
            return
        data = cast(Any, trainer).datamodule
        write_own_model(
            self.folder, model, record, metrics=metrics, training=_training(trainer, record), overwrite=True,
            datasets=[_name(data)], config=self._config(trainer),
        )  # fmt: skip

    def _config(self, trainer: Trainer) -> Path | None:
        """Return the file that Lightning's command line has written."""
        # trainer.log_dir would wait for the other processes
        folders = [trainer.default_root_dir, *(getattr(logger, "log_dir", None) for logger in trainer.loggers)]
        files = (Path(folder) / "config.yaml" for folder in folders if folder)
        return next((file for file in files if file.is_file()), None)


def _is_best(callback: Any) -> bool:
    return isinstance(callback, ModelCheckpoint) and bool(callback.monitor and callback.best_model_path)


def _metrics(values: dict[str, float], trainer: Trainer) -> list[Metric]:
    found = []
    for name, value in values.items():
        stage, _, kind = name.partition("/")
        if stage == "val" and kind in _METRICS:
            title, unit, factor = _METRICS[kind]
            where = f"{_name(cast(Any, trainer).datamodule)} (validation)"
            found.append(
                Metric(
                    name=title,
                    value=round(factor * value, 4),
                    unit=unit,
                    dataset=where,
                    protocol=f"`{name}` of the training's own validation",
                )
            )
    return found


def _name(data: Any) -> str:
    where = str(getattr(data, "data_dir", "own data"))
    return Path(where).resolve().name if Path(where).exists() else where


def _training(trainer: Trainer, record: ModelRecord) -> str:
    begun = f" from {record.base}" if record.base else ""
    return f"{trainer.current_epoch} epochs, {trainer.global_step} steps{begun}, in {trainer.precision} precision."
