"""Number types of exported files: which a format has, and networks that compute in half the bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from zoo.export.network import Network

__all__ = ["PRECISIONS", "TOLERANCE", "Precision", "check_precision", "in_half"]

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference of a file's outputs from the model's, over the largest output; int8 is judged by its loss."""

_HALF = "weights and arithmetic are {name}, inputs and outputs float32"
_TORCH = {
    "fp32": "float32",
    "fp16": _HALF.format(name="float16"),
    "bf16": _HALF.format(name="bfloat16"),
}
_MEANS = {
    "onnx": {
        "fp32": "float32",
        "fp16": _HALF.format(name="float16") + "; where a runtime has no float16 kernel, as on most CPUs, it computes "
        "in float32",
        "int8": "convolutions and products with weights are int8 (weights for each channel, activations uint8 for each "
        "tensor), all else float32",
    },
    "openvino": {
        "fp32": "float32",
        "fp16": "weights are float16; the runtime chooses the arithmetic",
        "int8": "convolutions and products with weights are int8 (weights for each channel, activations uint8 for each "
        "tensor), all else float32",
    },
    "torch-export": _TORCH,
    "executorch": {"fp32": "float32"},
    "aoti": _TORCH,
}
_LACKS = {
    ("onnx", "bf16"): "ONNX Runtime has no bfloat16 convolutions on the CPU",
    ("openvino", "bf16"): "OpenVINO takes bfloat16 when a model is loaded (INFERENCE_PRECISION_HINT), not from a file",
}


def check_precision(format: str, precision: str) -> str:
    """Return in words what a precision means in a format.

    Args:
        format: A key of `zoo.export.FORMATS`.
        precision: One of `PRECISIONS`.

    Raises:
        ValueError: The precision is unknown, or the format does not have it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    means = _MEANS[format]
    if precision not in means:
        others = ", ".join(other for other in _MEANS if precision in _MEANS[other])
        why = _LACKS.get((format, precision))
        raise ValueError(
            f"The format {format!r} has no {precision}{f': {why}' if why else ''}. "
            f"It has {', '.join(means)}; {precision} is in {others}."
        )
    return means[precision]


def in_half(network: Network, dtype: torch.dtype) -> Network:
    """Return a network whose weights and arithmetic have another type; its inputs and outputs stay as they are.

    Vectors, which time steps are, enter the network in float32: their digits count.

    Args:
        network: What `prepare` or `call_network` returned; it is not changed.
        dtype: torch.float16 or torch.bfloat16.
    """
    module = copy.deepcopy(network.module)
    inner: Any = module.model
    inner.to(dtype)

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating and value.ndim > 1 else value

        return tree_map(cast, (args, kwargs))

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v, output)

    inner.register_forward_pre_hook(enter, with_kwargs=True)
    inner.register_forward_hook(leave)
    return replace(network, module=module)
