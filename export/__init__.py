"""Turn models into files for other runtimes, one module a format.

`zoo.export.export(model, "model.onnx", format="onnx")`; `zoo export NAME --format onnx` does the same and more.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn
from zoo.export.network import ExportError, Kind, Network, compare, fixed, prepare, whole

from zoo.text import first_line

__all__ = ["FORMATS", "ONE_SHAPE", "ExportError", "Kind", "Target", "broken", "check", "export", "target"]

FORMATS = {
    "onnx": "zoo.export.onnx",
    "torch-export": "zoo.export.torch_export",
    "aoti": "zoo.export.aoti",
    "executorch": "zoo.export.executorch",
    "openvino": "zoo.export.openvino",
}
"""Name of each format and the module that writes it."""
ONE_SHAPE = ("aoti", "executorch")
"""Formats whose files take one image of one size."""


class Target(Protocol):
    """What the module of a format offers."""

    SUFFIX: str
    """Usual suffix of the files, with its dot."""

    def write(self, network: Network, path: Path) -> None:
        """Write a network that is ready."""
        ...

    def runner(self, path: str | Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
        """Return what runs a file: inputs by name -> outputs."""
        ...

    def metadata(self, path: str | Path) -> dict[str, str]:
        """Return the facts that are in a file."""
        ...


def broken(name: str) -> str:
    """Say that an installed module cannot be imported, and what mends it, to follow its name; empty where it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # of a damaged installation, or one for another NumPy: of many kinds
        return f"is here but cannot be imported ({first_line(error)}): pip install --force-reinstall {name}"
    return ""


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


def export(
    model: nn.Module,
    out: str | Path,
    *,
    format: str,
    kind: Kind | None = None,
    name: str | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
) -> Path:
    """Write a model, merged and in float32, as a file of a format; `zoo.export.artefact` has precisions and a README.

    Inputs and outputs are `image` -> `logits` (normalised image; `features` without classes, several maps of timm's
    `features_only`), `image` -> `restored` (both in [0, 1]), or `hidden_states`, `timestep` (float), `class_labels` ->
    `sample`. Name, weight digest, input normalisation and labels are in the file, and `target(format).metadata(out)`
    returns them.

    Args:
        model: A classifier, a backbone, a restorer or a class-conditional denoiser; it is not changed.
        out: Path of the file; it appears only when it is complete.
        format: A key of `FORMATS`.
        kind: What the model is; None finds out.
        name: Name to store; None takes the registered one.
        image_size: Side of the images of a classifier that was built for another than its published size, or of a
            restorer whose file is to have one size; pixels.
        dynamic_size: Leave height and width open where the network can take any; the batch size is open too. Formats
            of `ONE_SHAPE` have one shape, of one image.

    Raises:
        ValueError: There is no such format, or it cannot be told what the model is.
        ImportError: The format's extra is missing.
        ExportError: The network has something that the format cannot express.
        OSError: `out` cannot be written.
    """
    module, one = target(format), format in ONE_SHAPE
    with whole(out) as temporary:
        options = {"image_size": image_size, "dynamic_size": dynamic_size and not one}
        network = prepare(model, kind=kind, name=name, **options)
        module.write(fixed(network) if one else network, temporary)
    return Path(out)


def check(
    path: str | Path,
    model: nn.Module,
    *,
    format: str,
    kind: Kind | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
) -> float:
    """Run a file in its runtime and compare it with its model in eager mode, unmerged, at three sizes.

    Args:
        path: File that `export` wrote.
        model: The model it was written from.
        format: As it was in `export`.
        kind: What the model is; None finds out.
        image_size: As it was in `export`.
        dynamic_size: As it was in `export`.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        ValueError: There is no such format.
        ImportError: The format's extra is missing.
        ExportError: The file cannot be run, or returns another shape or values that are not finite.
    """
    run, one = target(format).runner(path), format in ONE_SHAPE
    options = {"image_size": image_size, "dynamic_size": dynamic_size and not one}
    return compare(run, model, kind=kind, one=one, **options)
