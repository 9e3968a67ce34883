"""What a trained model is, for whoever gets its weights: the model's own record with the facts of its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from zoo.record import ModelRecord, RecordError, record_of
from zoo.tasks.plain import plain

__all__ = ["trained_record"]

_OF_OTHER_INPUTS = ("test_input_size", "test_crop_pct", "min_input_size")


def trained_record(model: nn.Module, base: str | None, data: Any) -> ModelRecord | None:
    """Return the record of a classifier or restorer that is being trained.

    Args:
        model: As `zoo.create_model` built it.
        base: What the training started from; None is nothing.
        data: The data module; of a classifier's, `class_names`, `image_size`, `mean`, `std`, `crop_pct` and
            `interpolation` are taken, of a restorer's `degradation`.

    Returns:
        The record; None of a model that has none.
    """
    try:
        record = record_of(model).of_own_weights()
    except RecordError:
        return None
    record = dataclasses.replace(record, base=_told(base) if base else None)
    names = list(getattr(data, "class_names", None) or ())
    if record.task == "classification" and 0 < len(names) <= record.num_classes:
        unused = [f"unused {number}" for number in range(len(names), record.num_classes)]
        record = record.updated(label_names=[*names, *unused], label_descriptions=None)
    if hasattr(data, "image_size") and hasattr(data, "mean"):
        side, channels = data.image_size, (record.input_size or (3,))[0]
        height, width = (side, side) if isinstance(side, int) else side
        record = record.updated(
            **dict.fromkeys(_OF_OTHER_INPUTS),
            input_size=(channels, height, width),
            mean=tuple(data.mean),
            std=tuple(data.std),
            crop_pct=data.crop_pct,
            crop_mode=data.crop_mode,
            interpolation="bicubic" if data.interpolation == "random" else data.interpolation,
        )
    degradation = getattr(data, "degradation", None)
    low, high = plain(getattr(degradation, "low", None)), plain(getattr(degradation, "high", None))
    if low is not None and high is not None and record.task == "denoise":
        record = record.updated(sigma=low if low == high else (low, high))
    return record


def _told(base: str) -> str:
    """Return the name of what a training began from; of what every run calls alike, with that of its run."""
    path = Path(base)
    if path.name == "model":  # as `SaveOwnModel` writes it
        return f"{path.resolve().parent.name}/{path.name}"
    if path.parent.name == "checkpoints":
        return f"{path.resolve().parent.parent.name}/{path.name}"
    return path.name
