"""Turn models into files for other runtimes, one target a module; every module has `export` and `check`.

`zoo.export.target("onnx").export(model, "model.onnx")`; `zoo export NAME --format onnx` does the same.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn
from zoo.export.network import ExportError, Kind, Network

__all__ = ["FORMATS", "ExportError", "Kind", "Target", "target"]

FORMATS = {
    "onnx": "zoo.export.onnx",
    "torch-export": "zoo.export.torch_export",
    "aoti": "zoo.export.aoti",
    "executorch": "zoo.export.executorch",
    "openvino": "zoo.export.openvino",
}
"""Name of each format and the module that writes it."""


class Target(Protocol):
    """What the module of a format offers."""

    SUFFIX: str
    """Usual suffix of the files, with its dot."""

    def export(
        self,
        model: nn.Module,
        out: str | Path,
        *,
        kind: Kind | None = None,
        name: str | None = None,
        image_size: int | None = None,
        dynamic_size: bool = True,
    ) -> Path:
        """Write `model` to `out` and return its path."""
        ...

    def write(self, network: Network, path: Path) -> None:
        """Write a network that is ready."""
        ...

    def runner(self, path: str | Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
        """Return what runs a file: inputs by name -> outputs."""
        ...

    def check(
        self,
        path: str | Path,
        model: nn.Module,
        *,
        kind: Kind | None = None,
        image_size: int | None = None,
        dynamic_size: bool = True,
    ) -> float:
        """Return the largest difference between the file's and the model's outputs."""
        ...


def target(format: str) -> Target:
    """Return the module that writes a format.

    Args:
        format: A key of `FORMATS`.

    Raises:
        ValueError: There is no such format; the message names the nearest.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No export format is called {format!r}.{hint} Formats: {', '.join(FORMATS)}.")
    return cast(Target, importlib.import_module(FORMATS[format]))
