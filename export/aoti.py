"""Libraries that PyTorch's inductor compiled ahead of time (.pt2): `torch._inductor.aoti_load_package` runs one.

A library is for the processor it was compiled on, and for one shape: with open sizes inductor compiles attention
wrongly (torch 2.15).
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo.export.network import (
    ExportError,
    Network,
    capture,
    described,
    in_plain_memory,
    quiet,
    require_shapes,
    shapes_of,
)

from zoo.processor import instructions
from zoo.text import first_line

__all__ = ["SUFFIX", "compiled", "has_compiler", "metadata", "runner", "write"]

SUFFIX = ".aoti.pt2"


def has_compiler() -> bool:
    """Tell whether there is a C++ compiler, which inductor needs."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl"))


def write(network: Network, path: Path) -> None:
    """Compile a network that is ready.

    Args:
        network: Of fixed shapes.
        path: File to write, which ends in .pt2.

    Raises:
        ExportError: It has something that cannot be compiled.
    """
    facts = network.metadata | {"shapes": json.dumps(shapes_of(network))}
    facts["types"] = json.dumps({key: _type(value) for key, value in network.inputs.items()})
    facts["by_position"] = json.dumps(network.by_position)
    facts["instructions"] = " ".join(instructions())
    path.write_bytes(compiled(capture(network, "compiled"), facts))


def compiled(program: torch.export.ExportedProgram, facts: dict[str, str] | None = None) -> memoryview:
    """Return a traced network as a compiled library.

    Args:
        program: Of fixed shapes.
        facts: What `metadata` gives back.

    Raises:
        ExportError: It has something that cannot be compiled.
    """
    from torch._inductor import aoti_compile_and_package

    with quiet(), torch.no_grad():
        try:
            buffer = BytesIO()  # torch's own writer ends the process where the disk is full
            options = {"aot_inductor.metadata": facts} if facts else None
            aoti_compile_and_package(program, package_path=buffer, inductor_configs=options)
        except OSError:
            raise
        except Exception as error:  # the compiler's own, of many kinds
            raise ExportError(f"PyTorch's inductor cannot compile this model: {first_line(error)}") from error
    return buffer.getbuffer()


def metadata(path: str | Path) -> dict[str, str]:
    """Return the facts that `export` stored in a file."""
    return {key: str(value) for key, value in _load(path).get_metadata().items() if not key.startswith("AOTI_")}


def runner(path: str | Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Load a compiled library.

    Args:
        path: The file.

    Returns:
        Inputs by name -> outputs; it raises ExportError where they do not fit the file.

    Raises:
        ExportError: The file cannot be run.
    """
    program = _load(path)
    facts = program.get_metadata()
    shapes, by_position = json.loads(facts.get("shapes", "{}")), facts.get("by_position") == "true"
    types = json.loads(facts.get("types", "{}"))

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        require_shapes(path, shapes, inputs)  # the library itself does not look, and computes nonsense
        if wrong := [
            f"{key} {_type(value)}" for key, value in inputs.items() if types.get(key, _type(value)) != _type(value)
        ]:
            raise ExportError(f"{path} takes {types}, got {', '.join(wrong)}.")
        plain = {key: in_plain_memory(value) for key, value in inputs.items()}
        try:
            output = program(*plain.values()) if by_position else program(**plain)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ExportError(f"{path} cannot be run on {described(inputs)}: {first_line(error)}") from error
        return [output] if isinstance(output, Tensor) else list(output)

    return run


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _load(path: str | Path) -> Any:
    from torch._inductor import aoti_load_package

    if not Path(path).is_file():
        raise ExportError(f"There is no file {path}.")
    lacking = sorted(_instructions_in(path) - set(instructions()))
    if instructions() and lacking:  # they would end the process
        raise ExportError(
            f"{path} was compiled for a processor with {', '.join(lacking)}, unlike this one: export it here."
        )
    try:
        return aoti_load_package(str(path))
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise ExportError(f"{path} is not a compiled library: {first_line(error)}") from error


def _instructions_in(path: str | Path) -> set[str]:
    """Return what the library needs of a processor, without loading it; nothing where that is not told."""
    try:
        with zipfile.ZipFile(path) as package:
            notes = [name for name in package.namelist() if name.endswith("_metadata.json")]
            return {word for name in notes for word in json.loads(package.read(name)).get("instructions", "").split()}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile):
        return set()  # what it is instead, loading tells
