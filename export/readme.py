"""The short README beside an exported file: what it is, what goes in and comes out, and lines of Python that run it."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from typing import Any

from zoo.export.network import Network

__all__ = ["readme"]

_TITLES = {
    "onnx": "ONNX",
    "openvino": "OpenVINO",
    "torch-export": "an exported program of PyTorch",
    "executorch": "an ExecuTorch program",
    "aoti": "a library that PyTorch's inductor compiled for this processor",
}
_NEEDS = {format: "torch" for format in _TITLES} | {"onnx": "onnxruntime", "openvino": "openvino"}
_RUN = {
    "onnx": """session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
outputs = session.run(None, {{{dictionary}}})""",
    "openvino": """precision = {{"INFERENCE_PRECISION_HINT": "f32"}}  # else bfloat16 where the processor has it
model = openvino.compile_model("{file}", "CPU", precision)
found = model({{{dictionary}}})
outputs = [found[index] for index in range(len(model.outputs))]""",
    "torch-export": """program = torch.export.load("{file}").module()
with torch.no_grad():
    found = program({tensors})
outputs = [value.numpy() for value in (found if isinstance(found, (tuple, list)) else [found])]""",
    "executorch": """from executorch.runtime import Runtime

program = Runtime.get().load_program("{file}")
method = program.load_method("forward")  # both have to stay
outputs = [value.numpy() for value in method.execute([{tensors}])]  # these shapes only""",
    "aoti": """import os

from torch._inductor import aoti_load_package

os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"  # else other shapes, types and memory formats give nonsense
found = aoti_load_package("{file}")({tensors})  # these shapes only
outputs = [value.numpy() for value in (found if isinstance(found, (tuple, list)) else [found])]""",
}
_SEEING = ("classifier", "features")
"""Kinds that take normalised images."""
_PIL = {"bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS", "nearest": "NEAREST"}


def readme(
    network: Network, *, format: str, file: str, precision: str, difference: str, loss: Sequence[str] = ()
) -> str:
    """Return the text, in Markdown.

    Args:
        network: What was written.
        format: A key of `zoo.export.FORMATS`.
        file: Name of the file.
        precision: In words.
        difference: What the comparison with the model found, in words.
        loss: Lines on what lower precision costs.
    """
    facts = network.metadata
    lines = [f"# {facts['name']} as {_TITLES[format]}", ""]
    about = {
        "File": f"`{file}`" + (f" and `{file.removesuffix('.xml')}.bin`" if format == "openvino" else ""),
        "Model": facts.get("class") or f"{facts['kind']} {facts['name']}",
        "Task": facts.get("task"),
        "License of the weights": facts.get("license"),
        "Paper": facts.get("paper"),
        "Weights, SHA-256": facts.get("weights_sha256"),
        "Written by": facts.get("producer"),
        "Input": _inputs(network),
        "Output": _output(network),
        "Precision": precision,
        "Compared with the model": difference,
    }
    lines += [f"- {key}: {value}." for key, value in about.items() if value]
    if "labels" in facts:
        labels = json.loads(facts["labels"])
        shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        lines.append(f"- Labels: {len(labels)}, in the file's metadata under `labels`: {shown}.")
    if "threshold" in facts and network.output in ("logits", "probabilities"):
        lines.append(f"- Below a probability of {facts['threshold']} none of the classes is likely.")
    lines += [f"- {line}" for line in loss]
    lines += ["", f"With {_NEEDS[format]}, NumPy and Pillow, in the folder of the file:", "", "```python"]
    return "\n".join([*lines, *_snippet(network, format, file), "```", ""])


def _inputs(network: Network) -> str:
    shapes = []
    for key, value in network.inputs.items():
        opened = network.dynamic_shapes.get(key, {})
        sides = [opened[axis].__name__ if axis in opened else str(size) for axis, size in enumerate(value.shape)]
        shapes.append(f"`{key}` ({', '.join(sides)}) {str(value.dtype).removeprefix('torch.')}")
    facts = network.metadata
    said = [", ".join(shapes), facts.get("input", "")]
    if facts["kind"] in _SEEING and "picture" not in network.inputs and "mean" in facts:
        said.append(f"mean {facts['mean']}, std {facts['std']}")
    if facts["kind"] == "restorer" and int(facts.get("multiple_of", 1)) > 1:
        said.append(f"height and width are multiples of {facts['multiple_of']}")
    if facts.get("sigma"):
        said.append(f"noise of sigma {facts['sigma']} of 255")
    return "; ".join(part for part in said if part)


def _output(network: Network) -> str:
    facts, name = network.metadata, network.output
    if facts["kind"] == "restorer":
        scale = f", {facts['scale']} times as high and wide" if str(facts["scale"]) != "1" else ""
        kind = "8-bit, clipped and rounded" if "picture" in network.inputs else "clipped to [0, 1]"
        return f"`{name}`, the restored picture, {kind}{scale}"
    if facts["kind"] == "features":
        sizes = (f"{key} {', '.join(map(str, json.loads(facts[key])))}" for key in ("channels", "reductions"))
        return (
            f"maps of features, one after the other; {'; '.join(sizes)}" if "channels" in facts else "maps of features"
        )
    divided = f", to be divided by {facts['temperature']} first" if "temperature" in facts else ""
    words = {
        "logits": f"one value a class, before softmax{divided}",
        "probabilities": "of the classes, after softmax",
        "features": "before the classifier",
    }
    return f"`{name}`" + (f", {words[name]}" if name in words else "") if name else "in the order of the model's"


def _snippet(network: Network, format: str, file: str) -> list[str]:
    facts = network.metadata
    lines = ["import numpy as np", f"import {_NEEDS[format]}"]
    upright = 'ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")'  # as zoo reads what a camera turned
    photo = f'picture = Image.new("RGB", ({{0}}, {{1}}), "gray")  # yours, of 8 bits: {upright}'
    if facts["kind"] not in (*_SEEING, "restorer"):
        for key, value in network.inputs.items():
            dtype = str(value.dtype).removeprefix("torch.")
            lines.append(f"{key} = np.zeros({tuple(value.shape)}, np.{dtype})")
        return [*_with_run(lines, network, format, file), "print([value.shape for value in outputs])"]
    lines.insert(1, "from PIL import Image, ImageOps")
    key, value = next(iter(network.inputs.items()))
    is_picture, axes = key == "picture", network.dynamic_shapes.get(key, {})
    height, width = value.shape[1:3] if is_picture else value.shape[2:]
    channels = value.shape[3] if is_picture else value.shape[1]
    prepared: list[str]
    if channels == 1:
        photo = photo.replace('"RGB"', '"L"')
    if facts["kind"] == "classifier" and is_picture:
        prepared = [photo.format(width, height), "picture = np.array(picture)[None]  # (1, height, width, 3)"]
        if 1 not in axes and "crop_mode" in facts:
            scaled = [*_transform(facts, (height, width), photo), "for step in transform.transforms[:2]:"]
            prepared = [*scaled, "    picture = step(picture)  # scaled and cropped", prepared[1]]
    elif facts["kind"] in _SEEING and (
        channels not in (1, 3) or "mean" not in facts or len(ast.literal_eval(facts["mean"])) != channels
    ):
        prepared = [f"{key} = np.zeros((1, {channels}, {height}, {width}), np.float32)  # yours, normalised"]
    elif facts["kind"] in _SEEING:
        prepared = _prepare(facts, tuple(json.loads(facts["input_size"])[1:]), photo)
    else:
        prepared = [photo.format(width, height), f"{key} = np.array(picture)[None]  # (1, height, width, 3)"]
        if channels != 3:
            prepared = [f"{key} = np.full((1, {height}, {width}, {channels}), 128, np.uint8)  # yours"]
        if not is_picture:
            prepared.append(f"{key} = {key}.transpose(0, 3, 1, 2).astype(np.float32) / 255")
    batch = 1 if 0 in axes or value.shape[0] == 1 else value.shape[0]
    if batch != 1:
        prepared.append(f"{key} = {key}.repeat({batch}, axis=0)")
    lines = _with_run([*lines, "", *prepared], network, format, file)
    if facts["kind"] == "restorer":
        if not is_picture:
            lines.append("restored = (outputs[0].transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)")
        else:
            lines.append("restored = outputs[0]")
        lines.append('Image.fromarray(restored[0]).save("restored.png")' if channels == 3 else "print(restored.shape)")
        return lines
    if network.output not in ("logits", "probabilities"):
        return [*lines, "print([value.shape for value in outputs])"]
    if network.output == "logits":
        scaled = f" / {facts['temperature']}" if "temperature" in facts else ""
        lines.append(f"scores = np.exp((outputs[0] - outputs[0].max(1, keepdims=True)){scaled})")
        lines.append("scores /= scores.sum(1, keepdims=True)")
    else:
        lines.append("scores = outputs[0]")
    return [*lines, "print(scores[0].argmax(), scores[0].max())  # index of the class, its probability"]


def _prepare(facts: Any, size: tuple[int, ...], photo: str) -> list[str]:
    """Return the lines that scale, crop and normalise a picture as timm does; timm's own where these are not enough."""
    mean, std, crop, way = facts["mean"], facts["std"], float(facts["crop_pct"]), facts["interpolation"]
    if facts["crop_mode"] != "center" or size[0] != size[1] or way not in _PIL:
        return [*_transform(facts, size, photo), "image = transform(picture)[None].numpy()"]
    side = size[0]
    return [
        photo.format(640, 480),
        f"side, scaled = {side}, {math.floor(side / crop)}  # pixels",
        "width, height = (max(scaled, scaled * one // other) for one, other in (picture.size, picture.size[::-1]))",
        f"picture = picture.resize((width, height), Image.Resampling.{_PIL[way]})",
        "left, top = round((width - side) / 2), round((height - side) / 2)",
        "pixels = np.asarray(picture.crop((left, top, left + side, top + side)), np.float32) / 255",
        *(["pixels = pixels[..., None]"] if json.loads(facts["input_size"])[0] == 1 else []),
        f"image = ((pixels - {mean}) / {std}).astype(np.float32).transpose(2, 0, 1)[None]",
    ]


def _transform(facts: Any, size: tuple[int, ...], photo: str) -> list[str]:
    """Return the lines that make a picture and timm's transform."""
    return [
        "from timm.data import create_transform",
        photo.format(640, 480),
        f"transform = create_transform(({json.loads(facts['input_size'])[0]}, {size[0]}, {size[1]}), "
        f"mean={facts['mean']}, std={facts['std']}, crop_pct={float(facts['crop_pct'])}, "
        f"crop_mode={facts['crop_mode']!r}, interpolation={facts['interpolation']!r})",
    ]


def _with_run(lines: list[str], network: Network, format: str, file: str) -> list[str]:
    tensors = dictionary = ""
    if format in ("torch-export", "aoti", "executorch"):
        by_name = not network.by_position and format != "executorch"
        # the others read memory as it lies; strides of NumPy's inserted sides are 0, which a copy mends
        plain = "" if format == "torch-export" else ".clone(memory_format=torch.contiguous_format)"
        tensors = ", ".join(f"{f'{key}=' if by_name else ''}torch.from_numpy({key}){plain}" for key in network.inputs)
    else:
        dictionary = ", ".join(f'"{key}": {key}' for key in network.inputs)
    return lines + _RUN[format].format(file=file, dictionary=dictionary, tensors=tensors).splitlines()
