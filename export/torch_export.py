"""Write models as PyTorch's exported programs (.pt2), and compare such files with their models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor, nn
from zoo.export.network import ExportError, Kind, Network, capture, check_by, described, prepare, whole

__all__ = ["SUFFIX", "check", "export", "metadata", "runner", "write"]

SUFFIX = ".pt2"
_FACTS = "metadata.json"


def export(
    model: nn.Module,
    out: str | Path,
    *,
    kind: Kind | None = None,
    name: str | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
) -> Path:
    """Write a model as an exported program, merged and in float32; `torch.export.load(out).module()` runs it.

    Inputs are keywords: `image` (normalised for classifiers, in [0, 1] for restorers, as the restored one), or
    `hidden_states`, `timestep` (float) and `class_labels`. `metadata(out)` returns name, weight digest, input
    normalisation and labels.

    Args:
        model: A classifier, a restorer or a class-conditional denoiser; it is not changed.
        out: Path of the file; it appears only when it is complete.
        kind: What the model is; None finds out.
        name: Name to store; None takes the registered one.
        image_size: Side of the images of a classifier that was built for another than its published size, pixels.
        dynamic_size: Leave height and width open where the network can take any; the batch size is always open.

    Raises:
        ExportError: The network has something that cannot be exported.
        OSError: `out` cannot be written.
    """
    with whole(out) as temporary:
        write(prepare(model, kind=kind, name=name, image_size=image_size, dynamic_size=dynamic_size), temporary)
    return Path(out)


def write(network: Network, path: Path) -> None:
    """Write a network that is ready.

    Args:
        network: What `prepare`, `open_network` or `call_network` returned.
        path: File to write.

    Raises:
        ExportError: It has something that cannot be exported.
    """
    program = capture(network, "exported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own use of deprecated functions
        buffer = BytesIO()  # torch's own writer ends the process where the disk is full
        torch.export.save(program, buffer, extra_files={_FACTS: json.dumps(network.metadata)})
    path.write_bytes(buffer.getbuffer())


def metadata(path: str | Path) -> dict[str, str]:
    """Return the facts that `export` stored in a file."""
    extra = {_FACTS: ""}
    _load(path, extra)
    facts: dict[str, str] = json.loads(extra[_FACTS])
    return facts


def runner(path: str | Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Load an exported program.

    Args:
        path: The file.

    Returns:
        Inputs by name -> outputs; it raises ExportError where they do not fit the file.

    Raises:
        ExportError: The file cannot be run.
    """
    program = _load(path, {})
    module = program.module()
    by_position = bool(program.example_inputs and program.example_inputs[0])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        try:
            output = module(*inputs.values()) if by_position else module(**inputs)
        except (RuntimeError, AssertionError, ValueError) as error:  # the program's own guards raise any
            raise ExportError(f"{path} cannot be run on {described(inputs)}: {str(error).splitlines()[0]}") from error
        return [output] if isinstance(output, Tensor) else list(output)

    return run


check = check_by(runner)


def _load(path: str | Path, extra: dict[str, str]) -> torch.export.ExportedProgram:
    if not Path(path).is_file():
        raise ExportError(f"There is no file {path}.")
    try:
        return torch.export.load(path, extra_files=extra)
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError, BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"{path} is not an exported program: {reason}") from error
