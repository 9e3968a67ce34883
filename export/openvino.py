"""OpenVINO files, by way of ONNX: the graph in NAME.xml, the weights beside it in NAME.bin; and its runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo.export.onnx
from torch import Tensor
from zoo.export.network import ExportError, Network, described, in_plain_memory

__all__ = ["SUFFIX", "convert", "last_line", "metadata", "runner", "write"]

SUFFIX = ".xml"
_INSTALL = "pip install 'ffn-zoo[openvino]'"
_FACTS = "zoo"  # where the facts are in the file's rt_info


def write(network: Network, path: Path, *, half: bool = False) -> None:
    """Write a network that is ready.

    Args:
        network: What `prepare`, `open_network` or `call_network` returned.
        path: File to write; its weights go beside it.
        half: Store weights as float16.

    Raises:
        ImportError: The `openvino` extra is missing.
        ExportError: It has something that ONNX or OpenVINO cannot express.
        OSError: A file cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        zoo.export.onnx.write(network, graph)
        convert(graph, path, network.metadata, half=half)


def convert(graph: Path, path: Path, facts: Mapping[str, str], *, half: bool = False) -> None:
    """Turn an ONNX file into an OpenVINO file.

    Args:
        graph: The ONNX file.
        path: File to write, which ends in .xml; its weights go beside it.
        facts: What the file is to say of itself.
        half: Store weights as float16.

    Raises:
        ImportError: The `openvino` extra is missing.
        ExportError: OpenVINO has no such operator.
        OSError: A file cannot be written.
    """
    openvino = _openvino()
    try:
        model = openvino.convert_model(str(graph))
    except Exception as error:  # OpenVINO's own have no common class
        raise ExportError(f"The network cannot be written for OpenVINO: {last_line(error)}") from error
    for key, value in facts.items():
        model.set_rt_info(value, [_FACTS, key])
    try:
        openvino.save_model(model, str(path), compress_to_fp16=half)
        openvino.Core().read_model(str(path))  # what is cut short is not kept
    except RuntimeError as error:
        raise OSError(f"{path.name} or {path.stem}.bin is cut short, as on a full disk: {last_line(error)}") from error


def metadata(path: str | Path) -> dict[str, str]:
    """Return the facts that `export` stored in a file.

    Raises:
        ExportError: The file cannot be read.
    """
    found = _read(path).get_rt_info()
    return {key: str(getattr(value, "value", value)) for key, value in found[_FACTS].items()} if _FACTS in found else {}


def runner(path: str | Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Load an OpenVINO file, on the CPU, in float32.

    Args:
        path: The file that ends in .xml.

    Returns:
        Inputs by name -> outputs; it raises ExportError where they do not fit the file.

    Raises:
        ImportError: The `openvino` extra is missing.
        ExportError: The file cannot be run.
    """
    model = _read(path)
    try:
        compiled = _openvino().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot run {path}: {last_line(error)}") from error

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        try:
            found = compiled({key: in_plain_memory(value).numpy() for key, value in inputs.items()})
        except (RuntimeError, TypeError, ValueError) as error:
            raise ExportError(f"{path} cannot be run on {described(inputs)}: {last_line(error)}") from error
        return [torch.from_numpy(np.array(found[index])) for index in range(len(compiled.outputs))]

    return run


def _read(path: str | Path) -> Any:
    openvino = _openvino()
    if not Path(path).is_file():
        raise ExportError(f"There is no file {path}.")
    try:
        return openvino.Core().read_model(str(path))
    except RuntimeError as error:
        raise ExportError(f"{path} is not a file that OpenVINO can read: {last_line(error)}") from error


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"OpenVINO files need {error.name}, which is missing: {_INSTALL}.") from error
    return openvino


def last_line(error: BaseException) -> str:
    """Return the last line that says something: those before it say where in OpenVINO's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
