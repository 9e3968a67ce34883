"""The runtimes: what each needs, how its artefact is built from a network, and how it is loaded for fixed shapes."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from zoo.text import first_line

if TYPE_CHECKING:
    from zoo.export.network import Network

__all__ = ["ENGINES", "ENGINE_NAMES", "EngineError", "EngineName", "Runner", "Runtime", "check_engine", "installed"]

EngineName = Literal["onnxruntime", "openvino", "inductor", "eager", "auto"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)

Shapes = Sequence[tuple[int, ...]]
Runner = Callable[[Sequence[Tensor]], list[Tensor]]
"""Takes the network's inputs in their order, returns its outputs; may be called from several threads at once."""


class EngineError(RuntimeError):
    """A model that an engine cannot run, or an engine that does not compute what its model does."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A runtime.

    Args:
        label: For people.
        needs: Modules that have to be installed.
        extra: Extra of this package that brings them.
        open_shapes: One artefact serves all shapes of a network with open dimensions; they are fixed when it is loaded.
        build: Write the artefact of a network into a folder, for so many threads.
        load: Load it for shapes (None: open ones) and threads.
    """

    label: str
    needs: tuple[str, ...]
    extra: str
    open_shapes: bool
    build: Callable[[Network, Path, int], None]
    load: Callable[[Path, Shapes | None, int], Runner]

    def versions(self) -> dict[str, str]:
        """Return the versions that an artefact depends on; two runtimes that read the same file share it."""
        names = ("torch", "onnx", "onnxscript") if self.open_shapes else ("torch",)
        return {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name) is not None}

    def version(self) -> str:
        """Return the version of the runtime itself."""
        return importlib.metadata.version(self.needs[0] if self.needs else "torch")

    def missing(self) -> str:
        """Say in words what is not installed here, or damaged; empty where nothing is."""
        lacking = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if lacking:
            return f"{' and '.join(lacking)} is missing: pip install 'ffn-zoo[{self.extra}]'"
        from zoo.export import broken
        from zoo.export.aoti import has_compiler

        for name in self.needs[:1]:  # the runtime itself: what only builds takes long to import
            if said := broken(name):
                return f"{name} {said}"
        if not self.needs and not has_compiler():
            return "a C++ compiler (g++) is missing: install one with the system's packages"
        return ""


def check_engine(name: str) -> EngineName:
    """Return the name of an engine that can run here.

    Raises:
        ValueError: There is no such engine; the message names the nearest.
        ImportError: What it needs is not installed; the message names the extra.
    """
    if name not in ENGINE_NAMES:
        near = difflib.get_close_matches(str(name), ENGINE_NAMES, 1, 0)[0]
        raise ValueError(f"engine must be one of {', '.join(ENGINE_NAMES)}, got {name!r}. Did you mean {near}?")
    runtime = ENGINES.get(name)
    if runtime is not None and (lacking := runtime.missing()):
        raise ImportError(f"The engine {name!r} cannot run here: {lacking}.")
    return name  # type: ignore[return-value]  # it is one of the names


def installed() -> tuple[EngineName, ...]:
    """Return the engines that can run here, without "auto"."""
    return ("eager", *(name for name in ENGINE_NAMES if name in ENGINES and not ENGINES[name].missing()))


# ONNX Runtime

_ONNX = "model.onnx"


def _build_onnx(network: Network, folder: Path, threads: int) -> None:
    del threads
    from zoo.export.onnx import write

    write(network, folder / _ONNX)


def _fixed_onnx(path: Path, shapes: Shapes) -> str | bytes:
    """Return a model whose inputs have these shapes; its path where it has them already, or is too large to copy."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    inputs = [(value.type.tensor_type.shape.dim, shape) for value, shape in zip(model.graph.input, shapes, strict=True)]
    fixed = all([dim.dim_value for dim in dims] == list(shape) for dims, shape in inputs)
    if fixed or (path.parent / f"{_ONNX}.data").exists():
        return str(path)
    for dims, shape in inputs:
        for dim, size in zip(dims, shape, strict=True):
            dim.dim_value = size
    for value in model.graph.output:  # inferred anew
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return bytes(model.SerializeToString())


def _load_onnx(folder: Path, shapes: Shapes | None, threads: int) -> Runner:
    import onnxruntime

    from zoo.export.network import in_plain_memory

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # the second run would take a block for all it needs beside that of the first
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads > 1 else "1")  # cores are shared
    source = str(folder / _ONNX) if shapes is None else _fixed_onnx(folder / _ONNX, shapes)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        raise EngineError(f"ONNX Runtime cannot run this model: {first_line(error)}") from error
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        fed = {name: in_plain_memory(value).numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(value)) for value in session.run(None, fed)]

    return run


# OpenVINO


def _load_openvino(folder: Path, shapes: Shapes | None, threads: int) -> Runner:
    import openvino

    from zoo.export.network import in_plain_memory
    from zoo.export.openvino import last_line

    core = openvino.Core()
    try:
        model = core.read_model(str(folder / _ONNX))
        if shapes is not None:
            model.reshape({value: list(shape) for value, shape in zip(model.inputs, shapes, strict=True)})
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "CACHE_DIR": str(folder / "openvino"),
        }
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot run this model: {last_line(error)}") from error
    local = threading.local()  # a request serves one call at a time

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        request = getattr(local, "request", None)
        if request is None:
            request = local.request = compiled.create_infer_request()
        request.infer([in_plain_memory(value).numpy() for value in inputs], share_inputs=True)
        outputs = (request.get_output_tensor(index).data for index in range(len(model.outputs)))
        return [torch.from_numpy(np.array(values)) for values in outputs]

    return run


# PyTorch's ahead-of-time inductor

_PACKAGE = "model.pt2"


def _build_inductor(network: Network, folder: Path, threads: int) -> None:
    del threads  # the number of this moment is compiled in; it is part of the key
    from zoo.export.aoti import compiled
    from zoo.export.network import ExportError, capture

    program = capture(network, "compiled")
    try:
        library = compiled(program)
    except ExportError as error:
        raise EngineError(str(error)) from error
    (folder / _PACKAGE).write_bytes(library)


def _load_inductor(folder: Path, shapes: Shapes | None, threads: int) -> Runner:
    del shapes, threads
    from torch._inductor import aoti_load_package

    from zoo.export.network import in_plain_memory

    program = aoti_load_package(str(folder / _PACKAGE))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        result: Any = program(*map(in_plain_memory, inputs))  # it would read others as if they were
        return [result] if isinstance(result, Tensor) else list(result)

    return run


ENGINES: dict[str, Runtime] = {
    "onnxruntime": Runtime(
        label="ONNX Runtime",
        needs=("onnxruntime", "onnx", "onnxscript"),
        extra="export",
        open_shapes=True,
        build=_build_onnx,
        load=_load_onnx,
    ),
    "openvino": Runtime(
        label="OpenVINO",
        needs=("openvino", "onnx", "onnxscript"),
        extra="openvino",
        open_shapes=True,
        build=_build_onnx,
        load=_load_openvino,
    ),
    "inductor": Runtime(
        label="PyTorch's inductor",
        needs=(),
        extra="",
        open_shapes=False,
        build=_build_inductor,
        load=_load_inductor,
    ),
}
"""Every engine but eager PyTorch, by name."""
