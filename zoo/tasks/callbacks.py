"""What Lightning leaves out: exact resume, word of checkpoints that were not written, diffusers folders, experts."""

from __future__ import annotations

import inspect
import json
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn

from zoo.data.samplers import ResumableSampler
from zoo.ffn.ewa import EWAConfig, ExpertsWeightsAveraging, apply, average, expert_spread
from zoo.files import whole
from zoo.notices import notice
from zoo.tasks.checkpoints import read_training_checkpoint, why_not_written
from zoo.tasks.plain import differences, plain

__all__ = ["AverageExperts", "CheckedCheckpointIO", "ExactResume", "SavePretrained"]


class ExactResume(Callback):
    """Make a resumed run equal to one that was never interrupted, also in mid-epoch.

    Random states of Python, NumPy and PyTorch (all devices) are saved per process and restored, and the training
    sampler skips the samples that its epoch has had. Validation gets random numbers of its own, so that it does not
    matter whether it ran before or after the interruption. In a new run, processes after the first get random numbers
    of their own. The data module must use `ResumableSampler`, `SeededDataset` and `LateLoader`. A checkpoint between
    two optimizer steps of an accumulated gradient loses what was accumulated.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._run: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = self._before_validation or _random_state()
        states = [state]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, state)
            states = gathered
        checkpoint["exact_resume"] = {"rng": states, "run": _settings(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("exact_resume", {})
        states, self._run = saved.get("rng", []), saved.get("run")
        if self._run is not None:
            _end_epoch(trainer, checkpoint, self._run)
        self._restored = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue where the checkpoint was written; the loader has not asked its sampler for anything yet.

        Raises:
            ValueError: The checkpoint lies in mid-epoch, and the order of samples would be another one.
        """
        if self._run is not None:
            self._compare(trainer, pl_module, self._run)
            self._run = None
        if self._restored is None:
            if trainer.global_rank > 0:  # noise, mixing and dropout of the processes must not be the same
                _seed(torch.initial_seed() + trainer.global_rank)
            return
        state, self._restored = self._restored, None
        _set_random_state(state)
        loader = trainer.train_dataloader
        sampler = getattr(loader, "sampler", None)
        if loader is None or not isinstance(sampler, ResumableSampler):
            return
        seen = _seen(trainer)
        sampler.start = seen * (loader.batch_size or 1) if seen < trainer.num_training_batches else 0

    def _compare(self, trainer: Trainer, pl_module: LightningModule, run: dict[str, Any]) -> None:
        """Say which settings of the run differ, and refuse those that would repeat samples or leave some out."""
        now, seen = _settings(trainer), _seen(trainer)
        order = differences(run["order"], now["order"])
        if order and 0 < seen < run["batches"]:
            listed = ", ".join(f"{name} {new} instead of {old}" for name, (old, new) in order.items())
            raise ValueError(
                f"{trainer.ckpt_path} lies in mid-epoch, after {seen} of {run['batches']} batches: with {listed}, "
                "samples would be seen twice or never. Go on as before, or from a checkpoint at the end of an epoch."
            )
        changed = differences({**run["settings"], **run["order"]}, {**now["settings"], **now["order"]})
        if changed:
            listed = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            notice(f"Going on from {trainer.ckpt_path} with another set-up than before: {listed}.")
        if order and hasattr(pl_module, "keep_place_in_schedule"):
            cast(Any, pl_module).keep_place_in_schedule()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training or trainer.validating:
            self._before_validation = _random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_validation is not None:
            _set_random_state(self._before_validation)
            self._before_validation = None


def _end_epoch(trainer: Trainer, checkpoint: dict[str, Any], run: dict[str, Any]) -> None:
    """Let an epoch that has had all its batches be over where epochs now have more: Lightning compares the numbers."""
    now = {"processes": trainer.world_size, "batch_size": getattr(cast(Any, trainer).datamodule, "batch_size", None)}
    if all(now[name] in (None, run["order"][name]) for name in now):
        return
    current = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    if current["processed"] >= run["batches"]:
        for name in current:
            current[name] = max(current[name], 2**31)


def _seen(trainer: Trainer) -> int:
    """Return how many batches of its epoch a restored run has had."""
    epoch_loop = trainer.fit_loop.epoch_loop
    # a checkpoint written after a batch counts this batch as processed, but not yet as completed
    return epoch_loop.batch_progress.current.completed + int(epoch_loop.restarted_on_train_batch_end)


_TRAINER_SETTINGS = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")


def _settings(trainer: Trainer) -> dict[str, Any]:
    """Return as plain data what a run was started with: the order of its samples, and everything else."""
    loader, data = trainer.train_dataloader, cast(Any, trainer).datamodule
    sampler = getattr(loader, "sampler", None)
    order = {"processes": trainer.world_size, "batch_size": getattr(loader, "batch_size", None)}
    for name in ("size", "seed", "repeats", "phases", "block", "window"):
        if hasattr(sampler, name):
            order["samples" if name == "size" else name] = getattr(sampler, name)
    settings = {f"trainer.{name}": getattr(trainer, name) for name in _TRAINER_SETTINGS}
    for name in inspect.signature(type(data).__init__).parameters if data is not None else ():
        if name not in ("self", "num_workers", *order) and name in vars(data):
            settings[f"data.{name}"] = getattr(data, name)
    return {"order": plain(order), "settings": plain(settings), "batches": trainer.num_training_batches}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    """Return the states of all generators, without arrays, so that `torch.load(weights_only=True)` reads them."""
    name, words, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), [int(word) for word in words], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(words, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])


class AverageExperts(Callback):
    """Train feed-forward layers of the task's model as experts whose weights are averaged, see `zoo.ffn.ewa`.

    Checkpoints hold the experts, so that a run continues exactly; `zoo.ffn.ewa.collapse_state_dict` makes them dense.

    Args:
        config: Experts, share rate, which layers.
    """

    def __init__(self, config: EWAConfig = EWAConfig()) -> None:
        self.config = config
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        model = pl_module.model
        assert isinstance(model, nn.Module)
        if not any(isinstance(module, ExpertsWeightsAveraging) for module in model.modules()):
            apply(model, self.config)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after an optimizer step; batches that only add up gradients change nothing."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        model = pl_module.model
        assert isinstance(model, nn.Module)
        average(model, self.config.share_rate)
        if trainer.global_step % 50 == 0:
            pl_module.log("train/expert_spread", expert_spread(model))


_MARK = ".zoo.json"


class SavePretrained(Callback):
    """Write the task's model as a diffusers folder when training is over, with averaged weights where there are some.

    Args:
        folder: Replaced where this callback has written it before.

    Raises:
        TypeError: The task has no `save_pretrained`.
        FileExistsError: The folder holds something else.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "save_pretrained"):
            raise TypeError(f"{type(pl_module).__name__} has no save_pretrained: leave SavePretrained out.")
        if stage == "fit":
            self._require_own()

    def _require_own(self) -> None:
        folder = Path(self.folder)
        if folder.exists() and not (folder / _MARK).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(f"{folder} is not of SavePretrained's making and is not replaced: name another.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._require_own()
            with whole(self.folder) as temporary:
                pl_module.save_pretrained(temporary)  # type: ignore[operator]
                (temporary / _MARK).write_text(json.dumps({"task": type(pl_module).__name__}))


class CheckedCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, read it back, then rename it; say what is wrong with one, in one line.

    Lightning 2.6 reports success for a checkpoint in a folder that cannot be written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, temporary)
            torch.load(temporary, map_location="meta", weights_only=False, mmap=True)
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # PyTorch's writer and reader raise RuntimeError
            reason = why_not_written(checkpoint, target, error)
            raise RuntimeError(f"The checkpoint {target} could not be written: {reason}.") from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without running code from it.

        Raises:
            CheckpointError: It is damaged, holds more than plain data, or is none of a training.
        """
        return read_training_checkpoint(path, map_location or "cpu")
