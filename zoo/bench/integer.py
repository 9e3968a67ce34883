"""Models in eight bits on an engine: written by `zoo.export` once, loaded for every shape and number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.bench.subjects import Subject
from zoo.engines import ENGINES, EngineError

__all__ = ["INTEGER_ENGINES", "IntegerCall", "write_integer"]

INTEGER_ENGINES = ("onnxruntime", "openvino")
"""Engines that run the eight-bit file of `zoo export --format onnx --precision int8`."""


def write_integer(each: Subject, data: str, folder: Path, told: Callable[[str], object] = lambda text: None) -> str:
    """Write the eight-bit file of a model as `zoo export` does, calibrated with pictures.

    Of a model with random weights only the first and the last layer stay in float: what it loses says nothing.

    Args:
        each: The model.
        data: Folder of pictures.
        folder: Folder to write into.
        told: Told in words what is being done.

    Returns:
        How many layers stay in float, in words.

    Raises:
        EngineError: The model cannot be written, or not in eight bits.
        FileNotFoundError: There is no picture.
        ValueError: A picture cannot be read, or there is only one.
    """
    from zoo.export.int8 import draw_samples, quantize
    from zoo.export.network import ExportError, prepare
    from zoo.export.onnx import write

    try:
        network = prepare(each.model)
        samples = draw_samples(network, each.model, data)
        plain = folder / "float.onnx"
        write(network, plain)
        found = quantize(plain, folder / "model.onnx", samples, search=each.trained, told=told)
    except ExportError as error:
        raise EngineError(f"int8: {error}") from error
    return f"{len(found['layers_in_float'])} of {found['layers']} layers in float"


class IntegerCall:
    """Calls an eight-bit file with one shape, on so many threads.

    Args:
        engine: One of `INTEGER_ENGINES`.
        folder: That `write_integer` wrote into.
        threads: CPU threads.
    """

    def __init__(self, engine: str, folder: Path, threads: int) -> None:
        self.engine, self.folder, self.threads = engine, folder, threads
        self._shape: tuple[int, ...] | None = None
        self._run: Any = None

    def __call__(self, image: Tensor) -> Tensor:
        shape = tuple(image.shape)
        if shape != self._shape:
            self._run, self._shape = ENGINES[self.engine].load(self.folder, [shape], self.threads), shape
        result: Tensor = self._run([image])[0]
        return result
