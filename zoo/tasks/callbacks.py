"""What Lightning leaves out of a resume: random state and the place inside an epoch; and checkpoints that were not written."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from zoo.data.samplers import ResumableSampler

__all__ = ["CheckedCheckpointIO", "ExactResume"]


class ExactResume(Callback):
    """Make a resumed run equal to one that was never interrupted, also in mid-epoch.

    Random states of Python, NumPy and PyTorch (all devices) are saved per process and restored, and the training
    sampler skips the samples that its epoch has had.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = {
            "python": random.getstate(),
            "numpy": _plain(np.random.get_state()),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        states = [state]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, state)
            states = gathered
        checkpoint["exact_resume"] = {"rng": states}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("exact_resume", {}).get("rng", [])
        self._restored = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None:
            return
        loader = trainer.train_dataloader
        sampler = getattr(loader, "sampler", None)
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if isinstance(sampler, ResumableSampler) and not trainer.fit_loop.epoch_loop._is_training_done:
            sampler.start = seen * loader.batch_size

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        name, words, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(words, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"]:
            torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])


def _plain(state: Any) -> tuple[Any, ...]:
    """NumPy's generator state without arrays, so that `torch.load(weights_only=True)` reads it."""
    name, words, *rest = state
    return (str(name), [int(word) for word in words], *(float(r) if isinstance(r, float) else int(r) for r in rest))


class CheckedCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, read it back, then rename it; say so when it cannot be written.

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
        except OSError as error:
            raise RuntimeError(f"The checkpoint {target} could not be written: {error}.") from error
        finally:
            temporary.unlink(missing_ok=True)
