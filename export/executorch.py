"""ExecuTorch programs (.pte) for phones and small devices, and ExecuTorch's runtime.

What XNNPACK can compute goes to it, the rest to ExecuTorch's portable kernels. Shapes are fixed. Not every network is
lowered; `docs/engines.md` has the list that was tried.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
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

from zoo.text import first_line

__all__ = ["SUFFIX", "metadata", "runner", "write"]

SUFFIX = ".pte"
_FACTS = "zoo_metadata"  # a method that returns the facts, as bytes: a program has no other place for text
_INSTALL = "pip install 'ffn-zoo[executorch]'"


def write(network: Network, path: Path) -> None:
    """Lower a network that is ready.

    Args:
        network: Of fixed shapes.
        path: File to write.

    Raises:
        ImportError: The `executorch` extra is missing.
        ExportError: It has an operator that ExecuTorch lacks.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise ImportError(f"ExecuTorch files need {error.name}, which is missing: {_INSTALL}.") from error
    program = capture(network, "lowered")
    facts = torch.frombuffer(
        bytearray(json.dumps(network.metadata | {"shapes": shapes_of(network)}).encode()), dtype=torch.uint8
    )
    with _quiet():
        try:
            lowered = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], constant_methods={_FACTS: facts}
            )
            buffer = lowered.to_executorch().buffer
        except Exception as error:  # the compiler's own, of many kinds
            raise ExportError(f"ExecuTorch cannot lower this model: {first_line(error)}") from error
    path.write_bytes(buffer)


def metadata(path: str | Path) -> dict[str, str]:
    """Return the facts that `export` stored in a file."""
    return {key: value for key, value in _stored(_load(path)).items() if key != "shapes"}


def runner(path: str | Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Load a file into ExecuTorch's runtime.

    Args:
        path: The file.

    Returns:
        Inputs by name -> outputs; it raises ExportError where they do not fit the file.

    Raises:
        ImportError: The `executorch` extra is missing.
        ExportError: The file cannot be run.
    """
    program = _load(path)
    shapes = _stored(program)["shapes"]
    with _quiet():
        try:
            method = program.load_method("forward")
        except RuntimeError as error:
            raise ExportError(f"ExecuTorch's runtime cannot load {path}: {first_line(error)}") from error

    def run(inputs: dict[str, Tensor], held: Any = program) -> list[Tensor]:  # a method does not keep its program
        require_shapes(path, shapes, inputs)
        with _quiet():
            try:
                return [
                    value.clone() for value in method.execute([in_plain_memory(value) for value in inputs.values()])
                ]
            except RuntimeError as error:
                raise ExportError(f"{path} cannot be run on {described(inputs)}: {first_line(error)}") from error

    return run


def _load(path: str | Path) -> Any:
    try:
        from executorch.runtime import Runtime
    except ImportError as error:
        raise ImportError(f"ExecuTorch files need {error.name}, which is missing: {_INSTALL}.") from error
    if not Path(path).is_file():
        raise ExportError(f"There is no file {path}.")
    with _quiet():
        try:
            return Runtime.get().load_program(Path(path).read_bytes())
        except RuntimeError as error:
            raise ExportError(f"{path} is not an ExecuTorch program: {first_line(error)}") from error


def _stored(program: Any) -> dict[str, Any]:
    with _quiet():
        method = program.load_method(_FACTS)
        (facts,) = method.execute([])
    found: dict[str, Any] = json.loads(bytes(facts.tolist()))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep ExecuTorch's remarks to itself; those of its runtime are written past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with quiet():
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
