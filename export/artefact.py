"""What `zoo export` leaves: a file of a format and precision, compared with its model, and a README beside it."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import zoo.export.openvino
from torch import nn
from zoo.export import ONE_SHAPE, ExportError, broken, target
from zoo.export.aoti import has_compiler
from zoo.export.network import BatchError, Kind, Network, compare, fixed, prepare, whole
from zoo.export.pictures import compare_pictures, taking_pictures
from zoo.export.precision import TOLERANCE, check_precision, in_half
from zoo.export.readme import readme
from zoo.export.step import Step, compare_step

__all__ = ["Artefact", "check_output", "check_runtime", "write_artefact", "write_step"]

_NEEDS = {
    "onnx": (("onnx", "onnxscript"), ("onnxruntime",), "export"),
    "openvino": (("onnx", "onnxscript", "openvino"), (), "openvino"),
    "executorch": (("executorch",), (), "executorch"),
}
"""Of a format: modules that write it, modules that also run it, and the extra of this package that brings them."""

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_PICTURE_TOLERANCE = 5e-3  # of probabilities, and of values of pixels in [0, 1]: one level of 255 and a little


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A file that was written.

    Args:
        path: Where it is.
        readme: Where its README is.
        bytes: Of the file, with the weights beside it where there are any.
        max_error: Largest difference from the model; None where they were not compared.
        loss: What int8 costs, by name; empty in other precisions.
        note: What the file lacks, in words; empty where it lacks nothing.
    """

    path: Path
    readme: Path
    bytes: int
    max_error: float | None
    loss: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def check_runtime(format: str, precision: str = "fp32", *, run: bool = True) -> None:
    """Refuse, before any work, what cannot be written or run here.

    Args:
        format: A key of `zoo.export.FORMATS`.
        precision: One of `zoo.export.precision.PRECISIONS`.
        run: The file is to be compared with its model.

    Raises:
        ValueError: There is no such format, or it does not have the precision.
        ImportError: A module is missing, and the message names the extra; or a compiler.
    """
    target(format)
    check_precision(format, precision)
    if format == "aoti" and not has_compiler():
        raise ImportError(f"The format {format!r} needs a C++ compiler (g++): install one with the system's packages.")
    write, runs, extra = _NEEDS.get(format, ((), (), ""))
    needed = (*write, *(runs if run or precision == "int8" else ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The format {format!r} needs {' and '.join(missing)}, which is missing: pip install 'ffn-zoo[{extra}]'."
        )
    for name in needed:
        if said := broken(name):
            raise ImportError(f"The format {format!r} needs {name}, which {said}.")


def check_output(format: str, path: Path) -> None:
    """Refuse a file name that a runtime would not load.

    Raises:
        ValueError: The suffix is another than the runtime's.
    """
    wanted = {"openvino": ".xml", "aoti": ".pt2"}.get(format, path.suffix)
    if path.suffix != wanted:
        raise ValueError(f"-o takes a file that ends in {wanted} for {format}, got {path.name!r}.")


def write_artefact(
    model: nn.Module,
    out: str | Path,
    *,
    format: str,
    precision: str = "fp32",
    kind: Kind | None = None,
    with_preprocess: bool = False,
    data: str | Path | None = None,
    name: str | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
    check: bool = True,
    told: Callable[[str], object] = lambda text: None,
) -> Artefact:
    """Write a model for another runtime, compare the file with the model, and put a README beside it.

    Args:
        model: A classifier, a backbone, a restorer or a class-conditional denoiser; it is not changed.
        out: Path of the file; nothing appears where an error comes first.
        format: A key of `zoo.export.FORMATS`.
        precision: One of `zoo.export.precision.PRECISIONS`.
        kind: What the model is; None finds out.
        with_preprocess: Take 8-bit pictures, return probabilities or 8-bit pictures.
        data: Folder of pictures that int8 is calibrated and measured with.
        name: Name to store; None takes the registered one.
        image_size: Side of the images of a classifier that was built for another than its published size, or of a
            restorer whose file is to have one size; pixels.
        dynamic_size: Leave height and width open where the network can take any; "aoti" and "executorch" have one
            shape, of one image.
        check: Compare the file with the model, and keep it only where they agree.
        told: Told in words what is being done.

    Raises:
        ValueError: The format, precision, or what goes with them is wrong.
        FileNotFoundError: There is no picture in `data`.
        ImportError: A module is missing; the message names the extra.
        ExportError: The model has something that the format lacks, or the file computes something else.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    check_runtime(format, precision, run=check)
    check_output(format, out)
    one = format in ONE_SHAPE
    options: dict[str, Any] = {"image_size": image_size, "dynamic_size": dynamic_size and not one}
    network = prepare(model, kind=kind, name=name, **options)
    if precision in _TYPES and format != "openvino":
        network = in_half(network, _TYPES[precision])
    if with_preprocess:
        network = taking_pictures(network, model, **options)
    if one:
        network = fixed(network)
    samples = None if precision != "int8" else _samples(network, model, data)

    def written(network: Network, *, one: bool) -> Artefact:
        def compared(path: Path) -> float:
            run = target(format).runner(path)
            if with_preprocess:
                return compare_pictures(lambda inputs: run(inputs)[0], network, model, kind=kind, **options)
            return compare(run, model, kind=kind, **options, one=one)

        return _write(network, out, format, precision, compared if check else None, samples, told)

    try:
        return written(network, one=one)
    except BatchError:  # window attention of some networks counts its windows for one number of images
        found = written(fixed(network), one=True)
    return replace(found, note="The file takes one image at a time: the network cannot leave their number open.")


def write_step(
    step: Step,
    out: str | Path,
    *,
    format: str,
    precision: str = "fp32",
    check: bool = True,
    told: Callable[[str], object] = lambda text: None,
) -> Artefact:
    """Write a denoiser as a run called it, compare the file with it, and put a README beside it.

    Args:
        step: From `zoo.export.step.record_steps`.
        out: Path of the file; nothing appears where an error comes first.
        format: A key of `zoo.export.FORMATS`.
        precision: fp32, fp16 or bf16.
        check: Compare the file with the denoiser, and keep it only where they agree.
        told: Told in words what is being done.

    Raises:
        ValueError: The format does not have the precision, or int8 is asked for.
        ImportError: A module is missing; the message names the extra.
        ExportError: The denoiser has something that the format lacks, or the file computes something else.
        OSError: `out` cannot be written.
    """
    check_runtime(format, precision, run=check)
    check_output(format, Path(out))
    if precision == "int8":
        raise ValueError("int8 is for classifiers and restorers; a pipeline's denoiser has fp32, fp16 and bf16.")
    network = step.network
    if precision in _TYPES and format != "openvino":
        network = in_half(network, _TYPES[precision])

    def compared(path: Path) -> float:
        return compare_step(target(format).runner(path), step)

    return _write(network, Path(out), format, precision, compared if check else None, None, told)


def _samples(network: Network, model: nn.Module, data: str | Path | None) -> Any:
    from zoo.export.int8 import draw_samples

    if data is None:
        raise ValueError("int8 is calibrated and measured with pictures: give data, a folder of them (--data DIR).")
    return draw_samples(network, model, data)


def _write(
    network: Network,
    out: Path,
    format: str,
    precision: str,
    compared: Callable[[Path], float] | None,
    samples: Any,
    told: Callable[[str], object],
) -> Artefact:
    loss: dict[str, Any] = {}
    error = None
    with whole(out) as temporary:
        told("exporting")
        if samples is not None:
            loss = _write_int8(network, temporary, format, samples, told)
        elif format == "openvino":
            zoo.export.openvino.write(network, temporary, half=precision == "fp16")
        else:
            target(format).write(network, temporary)
        size = sum(part.stat().st_size for part in temporary.parent.iterdir())
        said = "no"
        if compared is not None:
            told("comparing")
            error = compared(temporary)
            allowed = _PICTURE_TOLERANCE if "picture" in network.inputs else 0.0
            allowed = max(allowed, TOLERANCE.get(precision, float("inf")))
            if error > allowed:
                raise ExportError(
                    f"The file differs from the model by {error:.1e} of the largest output, more than the {allowed:g} "
                    f"of {precision}, and is not kept; without comparison (--no-check) it is."
                )
            said = f"at most {error:.1e}{'' if 'picture' in network.inputs else ' of the largest output'} apart"
        text = readme(
            network,
            format=format,
            file=out.name,
            precision=f"{precision}: {check_precision(format, precision)}",
            difference=said,
            loss=loss.get("lines", ()),
        )
        _readme_of(temporary).write_text(text, encoding="utf-8")
    return Artefact(path=out, readme=_readme_of(out), bytes=size, max_error=error, loss=loss)


def _write_int8(
    network: Network, path: Path, format: str, samples: Any, told: Callable[[str], object]
) -> dict[str, Any]:
    from zoo.export.int8 import quantize

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        target("onnx").write(network, plain)
        small = Path(folder) / "int8.onnx" if format == "openvino" else path
        loss = quantize(plain, small, samples, told=told)
        if format == "openvino":
            zoo.export.openvino.convert(small, path, network.metadata)
    return loss


def _readme_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.md")
