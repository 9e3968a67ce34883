"""Eight-bit ONNX files by ONNX Runtime's static quantisation: calibrated with pictures, the loss measured on others.

Only convolutions and products with constant weights become int8. The first and the last stay in float; so do those
that cost most, as found by quantising one at a time, where the others alone lose too much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import create_transform
from torch import Tensor, nn
from zoo.export.network import ExportError, Network, quiet
from zoo.export.pictures import pictures_of, preprocessing

from zoo.text import first_line

__all__ = ["Samples", "draw_samples", "quantize"]

Feed = dict[str, NDArray[Any]]
"""Inputs of the graph by name."""

_TYPES = ["Conv", "MatMul", "Gemm"]
_CALIBRATION = {"classifier": 32, "restorer": 16}  # pictures at most
_HELD_OUT = {"classifier": 500, "restorer": 8}
_RANKING = {"classifier": 8, "restorer": 2}  # of the calibration pictures, to find what costs most
_SIDE = 64, 96  # pixels a side at most of what restorers are calibrated and measured with, before enlarging
_FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the layers that stay in float beside the first and the last
_MAX_LOSS = {"dB": 0.1, "relative": 0.05}  # on the calibration pictures, from which on fewer layers stay in float
_MOST_STEPS = 120  # of the ranking: of larger networks neighbours are taken together


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Pictures as the network takes them.

    Args:
        kind: classifier or restorer.
        calibration: Those that decide.
        held_out: Those that only measure.
        clean: What restorers should return for both, (1, C, H, W) in [0, 1]; None where nobody knows.
        measure: PSNR in dB of a restored picture, given the clean one.
    """

    kind: str
    calibration: list[Feed]
    held_out: list[Feed]
    clean: tuple[list[Tensor] | None, list[Tensor] | None] = (None, None)
    measure: Callable[[Tensor, Tensor], float] | None = None

    def loss(
        self, found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]], *, held_out: bool
    ) -> dict[str, Any]:
        """Return what the outputs of a file have lost.

        Args:
            found: Outputs of the int8 file, one a picture.
            expected: Of the float one.
            held_out: For the held-out pictures.
        """
        error = sum(
            float(np.square(one.astype(np.float64) - two).sum()) for one, two in zip(found, expected, strict=True)
        )
        size = sum(float(np.square(two.astype(np.float64)).sum()) for two in expected)
        lost: dict[str, Any] = {"pictures": len(found), "relative_error": math.sqrt(error / max(size, 1e-30))}
        if self.kind == "classifier":
            same = [int(one.argmax() == two.argmax()) for one, two in zip(found, expected, strict=True)]
            return lost | {"agreeing_top1": sum(same) / len(same)}
        if not all(np.isfinite(one).all() for one in found):
            raise ExportError("The int8 file returns values that are not finite.")
        count, top = sum(two.size for two in expected), 255.0 if expected[0].dtype == np.uint8 else 1.0
        lost["psnr_to_float"] = -10 * math.log10(max(error / count / top**2, 1e-12))
        if (clean := self.clean[held_out]) is not None and self.measure is not None:
            before, after = (
                float(np.mean([self.measure(_image(one), truth) for one, truth in zip(outputs, clean, strict=True)]))
                for outputs in (expected, found)
            )
            lost |= {"psnr_float": before, "psnr_int8": after, "lost_db": before - after}
        return lost


def draw_samples(network: Network, model: nn.Module, folder: str | Path) -> Samples:
    """Read the pictures of a folder as a network takes them: some to calibrate with, others to measure the loss.

    Of restorers the degraded version of a picture is read or made by the customary protocol of the task.

    Args:
        network: What is to be quantised.
        model: The model it was made from.
        folder: Searched with all below it; pairs of HR, LR and the like are known as in `zoo evaluate`.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
        ValueError: There is only one picture, or a picture cannot be read.
    """
    kind = network.metadata["kind"]
    if kind not in _CALIBRATION:
        raise ValueError(f"int8 is for classifiers and restorers; {network.metadata['name']} is exported as {kind}.")
    return _of_classifier(network, model, folder) if kind == "classifier" else _of_restorer(network, model, folder)


def _split(items: Sequence[Any], kind: str, folder: str | Path) -> tuple[list[Any], list[Any]]:
    """Return some for calibration and others to hold out, evenly from all."""
    if len(items) < 2:
        raise ValueError(f"{folder} holds one picture; int8 needs two: one to calibrate with, one to measure with.")
    first = _spaced(range(len(items)), min(_CALIBRATION[kind], len(items) // 2))
    others = [index for index in range(len(items)) if index not in set(first)]
    return [items[index] for index in first], [items[index] for index in _spaced(others, _HELD_OUT[kind])]


def _spaced(items: Sequence[int], count: int) -> list[int]:
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _of_classifier(network: Network, model: nn.Module, folder: str | Path) -> Samples:
    from zoo.pictures.eight_bit import read_eight_bit

    facts = preprocessing(model) | {"input_size": tuple(json.loads(network.metadata["input_size"]))}
    mode: Literal["RGB", "L"] = "L" if facts["input_size"][0] == 1 else "RGB"
    pictures, read = _pictures(folder, lambda each: read_eight_bit(each, mode), mode)
    (key,) = network.inputs
    transform: Any = create_transform(**facts, is_training=False)
    inside = key == "picture" and pictures_of(network) is None
    geometry = [] if inside else transform.transforms[:2]  # scaled and cropped, still 8 bits

    def feed(each: Any) -> Feed:
        picture = read(each)
        if key == "image":
            return {key: transform(picture)[None].numpy()}
        for step in geometry:
            picture = step(picture)
        return {key: np.asarray(picture)[None]}

    calibration, held_out = _split(pictures, "classifier", folder)
    return Samples(kind="classifier", calibration=list(map(feed, calibration)), held_out=list(map(feed, held_out)))


def _pictures(
    folder: str | Path, read_file: Callable[[Any], Any], mode: Literal["RGB", "L"] = "RGB"
) -> tuple[Sequence[Any], Callable[[Any], Any]]:
    """Return the pictures of a folder, of Parquet files the training ones, and what reads one."""
    from zoo.data.labelled_images import has_parquet, open_labelled_images
    from zoo.data.photos import find_images

    if has_parquet(folder):
        table = open_labelled_images(str(folder), "train")
        table.mode = mode
        return range(len(table)), lambda index: table[index][0]
    return find_images(folder), read_file


def _of_restorer(network: Network, model: nn.Module, folder: str | Path) -> Samples:
    from zoo.data.photos import find_pairs
    from zoo.evaluation.metrics import measure
    from zoo.evaluation.protocols import protocol_of_task
    from zoo.evaluation.restorers import load_pair

    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    facts, (key, example) = network.metadata, next(iter(network.inputs.items()))
    scale, step = int(facts["scale"]), int(facts["multiple_of"])
    channels = int(getattr(model, "in_chans", 3))
    protocol = protocol_of_task(facts.get("task", "sr" if scale > 1 else "restore"))
    sigma = float(cfg["sigma"]) if isinstance(cfg.get("sigma"), int | float) else 25.0
    how: dict[str, Any] = dict(scale=scale, sigma=sigma, quality=75 if scale > 1 else 40, channels=min(channels, 3))
    axes = (1, 2) if key == "picture" else (2, 3)
    fixed = None if axes[0] in network.dynamic_shapes.get(key, {}) else tuple(example.shape[axis] for axis in axes)

    def feeds(pairs: Sequence[Any], most: int) -> tuple[list[Feed], list[Tensor] | None]:
        found: list[Feed] = []
        truths: list[Tensor] = []
        for index, pair in enumerate(pairs):
            try:
                source, clean = load_pair(pair, protocol, index=index, **how)
            except ValueError:
                if protocol.degradation is not None or pair.degraded:
                    raise
                source, clean = load_pair(type(pair)(pair.clean, (pair.clean,)), protocol, **how)[0], None
            height, width = fixed or (min(most, side) // step * step for side in source.shape[-2:])
            if height > source.shape[-2] or width > source.shape[-1] or not height or not width:
                continue
            top, left = (source.shape[-2] - height) // 2, (source.shape[-1] - width) // 2
            part = source[..., top : top + height, left : left + width].contiguous()
            if key == "picture":
                part = (part.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            found.append({key: part.numpy()})
            if clean is not None:
                rows, columns = (slice(at * scale, (at + side) * scale) for at, side in ((top, height), (left, width)))
                truths.append(clean[..., rows, columns])
        if not found:
            raise ValueError(f"All pictures in {folder} are smaller than what the network takes.")
        return found, truths if len(truths) == len(found) else None

    views = 2 if channels == 6 else 1
    calibration, held_out = _split(find_pairs(folder, scale, views), "restorer", folder)
    (first, first_clean), (second, second_clean) = feeds(calibration, _SIDE[0]), feeds(held_out, _SIDE[1])
    return Samples(
        kind="restorer",
        calibration=first,
        held_out=second,
        clean=(first_clean, second_clean),
        measure=lambda found, clean: float(measure(protocol, found, clean, scale)["psnr"]),
    )


def _image(output: NDArray[Any]) -> Tensor:
    """Return a restored picture as (1, C, H, W) in [0, 1]."""
    if output.dtype == np.uint8:
        return torch.from_numpy(output).permute(0, 3, 1, 2).float() / 255
    return torch.from_numpy(output)


def quantize(
    plain: Path,
    small: Path,
    samples: Samples,
    *,
    search: bool = True,
    told: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Write the int8 version of an ONNX file.

    Args:
        plain: The file, in float32.
        small: File to write.
        samples: Of `draw_samples`.
        search: Keep in float what costs most, where too much is lost; else the first and the last layer alone.
        told: Told in words what is being done.

    Returns:
        What it costs on the held-out pictures, the layers that stay in float, and the loss against their number;
        under "lines" the same in words.

    Raises:
        ExportError: The file has no layer that can be quantised, or ONNX Runtime cannot.
    """
    layers = _layers(plain)
    inner = layers[1:-1]
    if not inner:
        raise ExportError("The network has no layers between its first and its last: int8 would change nothing.")
    work = _Quantizer(plain, samples.calibration)
    expected = _outputs(plain, samples.calibration)
    few = samples.calibration[: _RANKING[samples.kind]]
    told("calibrating")
    ranked: list[tuple[float, list[str]]] = []
    curve: list[dict[str, Any]] = []
    for fraction in _FRACTIONS if search else _FRACTIONS[:1]:
        if fraction and not ranked:  # only where it is needed: it takes longest
            ranked = sorted(_costs(work, inner, few, expected[: len(few)], told), key=lambda pair: -pair[0])
        kept = {name for _, names in ranked[: math.ceil(fraction * len(ranked))] for name in names}
        chosen = [name for name in inner if name not in kept]
        if not chosen or (curve and len(chosen) == curve[-1]["int8"]):
            continue
        told(f"measuring with {len(layers) - len(chosen)} of {len(layers)} layers in float")
        lost = samples.loss(_outputs(work.build(chosen), samples.calibration), expected, held_out=False)
        curve.append({"int8": len(chosen), "float": len(layers) - len(chosen), "chosen": chosen, **lost})
        if _is_small(lost):
            break
    best = curve[-1] if _is_small(curve[-1]) else min(curve, key=lambda point: point["relative_error"])
    work.build(best["chosen"], small)
    told("measuring on held-out pictures")
    held_out = samples.loss(_outputs(small, samples.held_out), _outputs(plain, samples.held_out), held_out=True)
    result = held_out | {
        "layers": len(layers),
        "layers_in_float": [name for name in layers if name not in set(best["chosen"])],
        "calibration_pictures": len(samples.calibration),
        "curve": [{key: value for key, value in point.items() if key != "chosen"} for point in curve],
    }
    return result | {"lines": _lines(result)}


def _is_small(lost: dict[str, Any]) -> bool:
    if "lost_db" in lost:
        return bool(lost["lost_db"] <= _MAX_LOSS["dB"])
    return bool(lost["relative_error"] <= _MAX_LOSS["relative"])


def _lines(result: dict[str, Any]) -> list[str]:
    """Return the loss in words."""

    def words(point: dict[str, Any]) -> str:
        if "lost_db" in point:
            lost = round(point["lost_db"], 2) + 0.0  # no minus before 0.00
            return f"{lost:.2f} dB lost ({point['psnr_float']:.2f} to {point['psnr_int8']:.2f})"
        if "agreeing_top1" in point:
            return (
                f"{100 * point['agreeing_top1']:.1f} % of first classes agree, "
                f"outputs differ by {100 * point['relative_error']:.1f} %"
            )
        return f"{point['psnr_to_float']:.1f} dB to what the float model gives"

    kept = result["layers_in_float"]
    curve = "; ".join(f"{point['float']} in float: {words(point)}" for point in result["curve"])
    return [
        f"Loss against float32 on {result['pictures']} held-out pictures: {words(result)}.",
        f"Layers in float: {len(kept)} of {result['layers']} ({', '.join(kept)}).",
        f"By number of layers in float, on the {result['calibration_pictures']} calibration pictures: {curve}.",
    ]


def _costs(
    work: _Quantizer,
    layers: list[str],
    feeds: list[Feed],
    expected: Sequence[NDArray[Any]],
    told: Callable[[str], object],
) -> Iterator[tuple[float, list[str]]]:
    """Yield the squared error of the output where only some layers are int8, one or a few neighbours, and these."""
    together = math.ceil(len(layers) / _MOST_STEPS)
    for start in range(0, len(layers), together):
        names = layers[start : start + together]
        told(f"layer {start + 1} of {len(layers)}")
        found = _outputs(work.build(names), feeds)
        yield (
            sum(float(np.square(one - two.astype(np.float64)).sum()) for one, two in zip(found, expected, strict=True)),
            names,
        )


def _layers(path: Path) -> list[str]:
    """Return the names of convolutions and products with constant weights, in the order of the graph."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {value.name for value in graph.initializer}
    return [node.name for node in graph.node if node.op_type in _TYPES and node.input[1] in weights]


class _Quantizer:
    """Writes int8 versions of one file; the ranges of its tensors are found once."""

    def __init__(self, plain: Path, feeds: list[Feed]) -> None:
        self.plain, self.feeds = plain, feeds
        self.ranges, self.trial = plain.with_name("ranges.json"), plain.with_name("trial.onnx")
        self.percentile = True  # of the values seen, 99.999 %; else all

    def build(self, layers: list[str], path: Path | None = None) -> Path:
        """Write the version in which these layers are int8.

        Raises:
            ExportError: ONNX Runtime cannot quantise the file.
        """
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        path = path or self.trial
        try:
            with quiet():
                quantize_static(
                    str(self.plain),
                    str(path),
                    None if self.ranges.exists() else _reader(self.feeds),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=_TYPES,
                    nodes_to_quantize=layers,
                    per_channel=True,
                    reduce_range=False,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    use_external_data_format=self.plain.with_name(f"{self.plain.name}.data").exists(),
                    calibrate_method=CalibrationMethod.Percentile if self.percentile else CalibrationMethod.MinMax,
                    calibration_cache_path=str(self.ranges),
                    extra_options={
                        "CalibPercentile": 99.999,
                        "CalibStridedMinMax": 1,  # one picture after the other: all at once would fill the memory
                        "MatMulConstBOnly": True,
                        "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                    },
                )
        except OSError:
            raise
        except Exception as error:  # of ONNX, of ONNX Runtime, of many kinds
            if self.percentile:  # a tensor that hardly varies has no histogram: NumPy's own errors, of several kinds
                self.percentile = False
                return self.build(layers, path)
            raise ExportError(f"ONNX Runtime cannot quantise the network: {first_line(error)}") from error
        return path


def _outputs(path: Path, feeds: list[Feed]) -> list[NDArray[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(None, feed)[0]) for feed in feeds]


def _reader(feeds: list[Feed]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            self.left = iter(feeds)

        def __len__(self) -> int:
            return len(feeds)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(feeds[start_index:end_index])

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    return Reader()
