"""Whether the labels of the data are those of the model, asked before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import resolve_model_data_config
from torch import Tensor

from zoo.data.readable import placed
from zoo.notices import notice
from zoo.tasks.plain import differences

__all__ = ["are_classes_of", "check_classes", "check_labels", "label_by", "tell_other_pictures"]


def check_classes(datamodule: Any, num_classes: int) -> None:
    """Compare the classes of a data module, where it knows any, with those of a model.

    Args:
        datamodule: May have `class_names`.
        num_classes: The model's.

    Raises:
        ValueError: The data has more classes.
    """
    names = getattr(datamodule, "class_names", None)
    if names is None:
        return
    some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    if len(names) > num_classes:
        raise ValueError(
            f"The data has {len(names)} classes ({some}), the model {num_classes}: set num_classes to {len(names)}."
        )
    if len(names) < num_classes:
        notice(f"The data has {len(names)} classes ({some}), the model {num_classes}: the last ones stay unused.")


def are_classes_of(datamodule: Any, names: Sequence[str] | None) -> bool:
    """Tell whether a model that goes on learning knows the very classes of the data: its head is theirs, then.

    Args:
        datamodule: May have `class_names`.
        names: Of the model's classes; None where it states none.
    """
    found = getattr(datamodule, "class_names", None)
    return names is not None and found is not None and set(placed(found, names, "the data")) == set(names)


def label_by(datamodule: Any, names: Sequence[str] | None) -> None:
    """Let the labels of data be places among the classes that a model was trained on.

    Args:
        datamodule: May have `take_classes`.
        names: Of the model's classes; None leaves the data's own.
    """
    if names is not None and hasattr(datamodule, "take_classes"):
        datamodule.take_classes(names)


def tell_other_pictures(datamodule: Any, model: Any) -> None:
    """Say where data prepare pictures otherwise than a trained model states, which changes what is measured.

    Args:
        datamodule: May have `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.
        model: With timm's facts.
    """
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    given = {name: getattr(datamodule, name) for name in names if hasattr(datamodule, name)}
    other = differences(resolve_model_data_config(model), given)
    if other:
        told = "; ".join(f"{name} {own} for {stated}" for name, (stated, own) in other.items())
        notice(f"The data prepare pictures otherwise than the model states: {told}.")


def check_labels(labels: Tensor, first: int, last: int, *, wait: bool) -> None:
    """Refuse labels outside `first` ... `last`.

    Args:
        labels: Of a batch.
        first: Least that the model knows.
        last: Greatest.
        wait: Ask also where labels are on a device, which then has to finish its work first.

    Raises:
        ValueError: There is one.
    """
    if (labels.device.type != "cpu" and not wait) or not labels.numel() or labels.is_floating_point():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < first or high > last:
        wrong = low if low < first else high
        raise ValueError(f"The data has the label {wrong}; the model knows {first} ... {last}: set num_classes.")
