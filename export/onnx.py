"""ONNX files, with PyTorch's default opset, and ONNX Runtime; facts are in the file's `metadata_props`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from zoo.export.network import ExportError, Network, capture, described, in_plain_memory, quiet
from zoo.export.onnx_graph import rewrite

from zoo.text import first_line

__all__ = ["SUFFIX", "metadata", "runner", "write"]

SUFFIX = ".onnx"
_INSTALL = "pip install 'ffn-zoo[export]'"


def write(network: Network, path: Path) -> None:
    """Write a network that is ready; weights over 2 GB go to a second file beside it.

    Args:
        network: What `prepare`, `open_network` or `call_network` returned.
        path: File to write.

    Raises:
        ImportError: The `export` extra is missing.
        ExportError: It has something that ONNX cannot express.
    """
    try:
        import onnxscript  # noqa: F401  what torch.onnx needs, in words that say how to get it
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}, which is missing: {_INSTALL}.") from error
    program = _translate(_without_idle_squeezes(capture(network, "written as ONNX")), network)
    rewrite(program.model.graph)
    program.model.metadata_props.update(network.metadata)
    for weight in program.model.graph.initializers.values():  # said by the tensor; ONNX Runtime's quantize_dynamic
        weight.shape = weight.type = None  # turns some, and then finds the shape that is said beside it wrong
    program.save(path)


@contextmanager
def _exact_rules() -> Iterator[None]:
    """Let the exporter's rules for what changes nothing, as + 0 and x 1, match these numbers alone.

    They match 1e-8 as 0 too, and drop the little number that guards a division: black pictures give NaN
    (onnxscript 0.7).
    """
    from onnxscript.rewriter import _matcher

    with mock.patch.object(_matcher, "math", SimpleNamespace(isclose=lambda one, other, **_: one == other)):
        yield


def _without_idle_squeezes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replace what drops a dimension that is not 1: nothing in PyTorch, an error in ONNX (torch 2.15)."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.squeeze.dim and node.meta["val"].ndim == node.args[0].meta["val"].ndim:
            node.target, node.args = torch.ops.aten.alias.default, node.args[:1]
    return program


def _translate(program: torch.export.ExportedProgram, network: Network) -> Any:
    args, kwargs = network.arguments
    with quiet(), torch.no_grad(), _exact_rules():
        try:
            return torch.onnx.export(
                program,
                args,
                kwargs=kwargs,
                input_names=list(network.inputs),
                output_names=[network.output] if network.output else None,
                dynamic_shapes=network.dynamic_shapes or None,  # names of the open dimensions
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = first_line(error.__cause__ or error)
            raise ExportError(f"The network cannot be written as ONNX: {reason}") from error


def metadata(path: str | Path) -> dict[str, str]:
    """Return the facts that are in a file.

    Raises:
        ImportError: The `export` extra is missing.
        ExportError: The file cannot be run.
    """
    return dict(_session(path).get_modelmeta().custom_metadata_map)


def runner(path: str | Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Load an ONNX file into ONNX Runtime, on the CPU.

    Args:
        path: The file.

    Returns:
        Inputs by name -> outputs; it raises ExportError where they do not fit the file.

    Raises:
        ImportError: The `export` extra is missing.
        ExportError: The file cannot be run.
    """
    session = _session(path)
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        try:
            found = session.run(None, {key: in_plain_memory(value).numpy() for key, value in inputs.items()})
            return [torch.from_numpy(value) for value in found]
        except (Fail, InvalidArgument) as error:
            raise ExportError(f"{path} cannot be run on {described(inputs)}: {first_line(error)}") from error

    return run


def _session(path: str | Path) -> Any:
    try:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidProtobuf, NoSuchFile
    except ImportError as error:
        raise ImportError(f"Checking an ONNX file needs {error.name}, which is missing: {_INSTALL}.") from error
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except (Fail, InvalidProtobuf, NoSuchFile) as error:
        raise ExportError(f"{path} is not an ONNX file that ONNX Runtime can run: {first_line(error)}") from error
