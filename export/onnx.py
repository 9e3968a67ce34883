"""Write models as ONNX files, and compare such files with their models in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo.export.network import ExportError, Kind, Network, capture, check_by, described, prepare, whole

__all__ = ["SUFFIX", "check", "export", "runner", "write"]

SUFFIX = ".onnx"
_INSTALL = "pip install 'ffn-zoo[export]'"


def export(
    model: nn.Module,
    out: str | Path,
    *,
    kind: Kind | None = None,
    name: str | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
) -> Path:
    """Write a model as an ONNX file, merged and in float32, with PyTorch's default opset.

    Inputs and outputs are `image` -> `logits` (normalised image; `features` without classes), `image` -> `restored`
    (both in [0, 1]), or `hidden_states`, `timestep` (float), `class_labels` -> `sample`. Name, weight digest, input
    normalisation and labels are in the file's `metadata_props`. Weights over 2 GB go to a second file beside it.

    Args:
        model: A classifier, a restorer or a class-conditional denoiser; it is not changed.
        out: Path of the file; it appears only when it is complete.
        kind: What the model is; None finds out.
        name: Name to store; None takes the registered one.
        image_size: Side of the images of a classifier that was built for another than its published size, pixels.
        dynamic_size: Leave height and width open where the network can take any; the batch size is always open.

    Raises:
        ImportError: The `export` extra is missing.
        ExportError: The network has something that ONNX cannot express.
        OSError: `out` cannot be written.
    """
    try:
        import onnxscript  # noqa: F401  what torch.onnx needs, in words that say how to get it
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}, which is missing: {_INSTALL}.") from error
    with whole(out) as temporary:
        network = prepare(model, kind=kind, name=name, image_size=image_size, dynamic_size=dynamic_size)
        write(network, temporary)
    return Path(out)


def write(network: Network, path: Path) -> None:
    """Write a network that is ready.

    Args:
        network: What `prepare`, `open_network` or `call_network` returned.
        path: File to write.

    Raises:
        ExportError: It has something that ONNX cannot express.
    """
    program = _translate(capture(network, "written as ONNX"), network)
    program.model.metadata_props.update(network.metadata)
    for weight in program.model.graph.initializers.values():  # said by the tensor; ONNX Runtime's quantize_dynamic
        weight.shape = weight.type = None  # turns some, and then finds the shape that is said beside it wrong
    program.save(path)


def _translate(program: torch.export.ExportedProgram, network: Network) -> Any:
    args, kwargs = network.arguments
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's own use of deprecated functions
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
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ExportError(f"The network cannot be written as ONNX: {reason}") from error


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
    try:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidProtobuf, NoSuchFile
    except ImportError as error:
        raise ImportError(f"Checking an ONNX file needs {error.name}, which is missing: {_INSTALL}.") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except (Fail, InvalidProtobuf, NoSuchFile) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"{path} is not an ONNX file that ONNX Runtime can run: {reason}") from error

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        try:
            found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
            return [torch.from_numpy(value) for value in found]
        except (Fail, InvalidArgument) as error:
            raise ExportError(f"{path} cannot be run on {described(inputs)}: {str(error).splitlines()[0]}") from error

    return run


check = check_by(runner)
