"""Training checkpoints on disk: read without running code from them; what is wrong is said in one line."""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.text import first_line
from zoo.weights import CheckpointError

__all__ = ["read_training_checkpoint", "why_not_written"]


def read_training_checkpoint(path: str | Path, map_location: Any = "cpu", resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint that Lightning has written, without running code from it.

    Args:
        path: The file.
        map_location: As of `torch.load`.
        resume: Whether the training is to go on from it, which takes more than weights.

    Raises:
        CheckpointError: There is no such file, it is damaged, holds more than plain data, or is none of a training.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    try:
        loaded = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error):  # that is no pickle at all
            raise CheckpointError(
                f"{path} holds more than plain data and could run code when read: it is refused. Take a checkpoint "
                "that this version has written."
            ) from error
        raise _damaged(path) from error
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        AssertionError,
    ) as error:
        raise _damaged(path) from error
    if not isinstance(loaded, dict) or (resume and not {"state_dict", "loops", "optimizer_states"} <= loaded.keys()):
        raise CheckpointError(f"{path} is no checkpoint of a training: it has no state to go on from.")
    return loaded


def _damaged(path: str | Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or was not written to its end: take an earlier checkpoint of the run.")


def why_not_written(checkpoint: Any, target: Path, error: Exception) -> str:
    """Return why a checkpoint could not be written: PyTorch's writer does not say that a disk is full."""
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    needed, free = _size(checkpoint), shutil.disk_usage(folder).free
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or free < needed:
        return f"No space left, {folder} has {free / 1e6:.1f} MB and {needed / 1e6:.1f} MB are needed: make room there"
    return first_line(error)


def _size(value: Any) -> int:
    """Return the bytes of all tensors in nested mappings and sequences."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0
