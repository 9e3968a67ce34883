"""Write models as libraries that PyTorch's inductor compiled ahead of time (.pt2), and compare them with their models.

A library is for the processor it was compiled on, and for one shape: with open sizes inductor compiles attention
wrongly (torch 2.13), as the comparison shows.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo.export.network import (
    ExportError,
    Kind,
    Network,
    capture,
    compare,
    described,
    fixed,
    prepare,
    whole,
)

__all__ = ["SUFFIX", "check", "export", "metadata", "runner", "write"]

SUFFIX = ".aoti.pt2"


def export(
    model: nn.Module,
    out: str | Path,
    *,
    kind: Kind | None = None,
    name: str | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
) -> Path:
    """Compile a model, merged and in float32, for one batch and one size; half a minute and more of processor time.

    `torch._inductor.aoti_load_package(out)` returns a function of the inputs of `zoo.export.torch_export.export`.

    Args:
        model: A classifier, a restorer or a class-conditional denoiser; it is not changed.
        out: Path of the file, which ends in .pt2; it appears only when it is complete.
        kind: What the model is; None finds out.
        name: Name to store; None takes the registered one.
        image_size: Side of the images of a classifier that was built for another than its published size, pixels.
        dynamic_size: Of no effect: shapes are fixed.

    Raises:
        ExportError: The network has something that cannot be compiled, or there is no C++ compiler.
        OSError: `out` cannot be written.
    """
    del dynamic_size
    with whole(out) as temporary:
        write(fixed(prepare(model, kind=kind, name=name, image_size=image_size, dynamic_size=False)), temporary)
    return Path(out)


def write(network: Network, path: Path) -> None:
    """Compile a network that is ready.

    Args:
        network: Of fixed shapes.
        path: File to write, which ends in .pt2.

    Raises:
        ExportError: It has something that cannot be compiled.
    """
    from torch._inductor import aoti_compile_and_package

    program = capture(network, "compiled")
    facts = network.metadata | {"shapes": json.dumps({key: list(value.shape) for key, value in network.inputs.items()})}
    facts["by_position"] = json.dumps(network.by_position)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            buffer = BytesIO()  # torch's own writer ends the process where the disk is full
            aoti_compile_and_package(program, package_path=buffer, inductor_configs={"aot_inductor.metadata": facts})
        except OSError:
            raise
        except Exception as error:  # the compiler's own, of many kinds
            raise ExportError(f"PyTorch's inductor cannot compile this model: {_first_line(error)}") from error
    path.write_bytes(buffer.getbuffer())


def metadata(path: str | Path) -> dict[str, str]:
    """Return the facts that `export` stored in a file."""
    return {key: str(value) for key, value in _load(path).get_metadata().items() if not key.startswith("AOTI_")}


def check(
    path: str | Path,
    model: nn.Module,
    *,
    kind: Kind | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
) -> float:
    """Run a compiled library and compare it with its model in eager mode, unmerged, at its one shape.

    Args:
        path: File that `export` wrote.
        model: The model it was written from.
        kind: What the model is; None finds out.
        image_size: As it was in `export`.
        dynamic_size: Of no effect: shapes are fixed.

    Returns:
        The largest difference, relative to the largest output where that is above one.

    Raises:
        ExportError: The file cannot be run, or returns another shape or values that are not finite.
    """
    del dynamic_size
    run = runner(path)
    options: dict[str, Any] = {"kind": kind, "image_size": image_size, "dynamic_size": False, "one": True}
    return compare(lambda inputs: run(inputs)[0], model, **options)


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

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        wrong = {key: value for key, value in inputs.items() if list(value.shape) != shapes.get(key)}
        if wrong:  # the library itself does not look, and computes nonsense
            raise ExportError(f"{path} takes {shapes}, got {described(wrong)}.")
        try:
            output = program(*inputs.values()) if by_position else program(**inputs)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ExportError(f"{path} cannot be run on {described(inputs)}: {_first_line(error)}") from error
        return [output] if isinstance(output, Tensor) else list(output)

    return run


def _load(path: str | Path) -> Any:
    from torch._inductor import aoti_load_package

    if not Path(path).is_file():
        raise ExportError(f"There is no file {path}.")
    try:
        return aoti_load_package(str(path))
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise ExportError(f"{path} is not a compiled library: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
