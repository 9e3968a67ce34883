"""PyTorch's exported programs (.pt2): `torch.export.load(path).module()` runs one, inputs are keywords."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor
from zoo.export.network import ExportError, Network, capture, described, quiet

from zoo.text import first_line

__all__ = ["SUFFIX", "metadata", "runner", "write"]

SUFFIX = ".pt2"
_FACTS = "metadata.json"


def write(network: Network, path: Path) -> None:
    """Write a network that is ready.

    Args:
        network: What `prepare`, `open_network` or `call_network` returned.
        path: File to write.

    Raises:
        ExportError: It has something that cannot be exported.
    """
    program = capture(network, "exported")
    with quiet():
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
            raise ExportError(f"{path} cannot be run on {described(inputs)}: {first_line(error)}") from error
        return [output] if isinstance(output, Tensor) else list(output)

    return run


def _load(path: str | Path, extra: dict[str, str]) -> torch.export.ExportedProgram:
    if not Path(path).is_file():
        raise ExportError(f"There is no file {path}.")
    try:
        return torch.export.load(path, extra_files=extra)
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError, BadZipFile) as error:
        raise ExportError(f"{path} is not an exported program: {first_line(error)}") from error
