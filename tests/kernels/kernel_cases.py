"""Inputs of the operators of `zoo.kernels` that several tests share, and the comparison of kernels with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo import kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest error relative to the largest number of the reference; the interpreter truncates to bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an operator.

    Args:
        function: Of `zoo.kernels`, with its settings.
        inputs: Makes its tensors in float64, the same every time.
        settings: What the custom operator takes after the tensors.
    """

    function: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]
    settings: tuple[Any, ...] = ()


def _numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def adaln(batch: int, tokens: int, channels: int) -> list[Tensor]:
    """Return x, y, gate, scale and shift; the last three are parts of one tensor, as in models."""
    x, y, conditions = _numbers(*[(batch, tokens, channels)] * 2, (batch, 3 * channels))
    return [x, y, *conditions.chunk(3, 1)]


def aggregation(batch: int, channels: int, sets: int, side: int, height: int, width: int) -> list[Tensor]:
    """Return x and weight of `ska`."""
    return _numbers((batch, channels, height, width), (batch, sets, side * side, height, width))


def gate(batch: int, hidden: int, height: int, width: int) -> list[Tensor]:
    """Return x and weight of `dwconv_gate`."""
    x, weight = _numbers((batch, 2 * hidden, height, width), (2 * hidden, 1, 3, 3))
    return [x, weight / 3]


def repa(rows: int, inputs: int, active: int, outputs: int) -> list[Tensor]:
    """Return the inputs of `repa_ffn`."""
    shapes = (rows, inputs), (active, inputs), (active,), (outputs, active), (outputs, inputs), (outputs,)
    x, fc1_weight, fc1_bias, fc2_weight, weight, bias = _numbers(*shapes)
    wide, narrow = max(inputs, 1) ** 0.5, max(active, 1) ** 0.5
    return [x, fc1_weight / wide, fc1_bias, fc2_weight / narrow, weight / wide, bias]


def frequencies(batch: int, groups: int, size: int, height: int, width: int) -> list[Tensor]:
    """Return x, w1, b1, w2 and b2 of `frequency_filter`."""
    matrix, vector = (2, groups, size, size), (2, groups, size)
    x, w1, b1, w2, b2 = _numbers((batch, groups * size, height, width), matrix, vector, matrix, vector)
    return [x, w1 / size**0.5, b1, w2 / size**0.5, b2]


def _frequency_call(*inputs: Tensor, threshold: float) -> Tensor:
    return kernels.frequency_filter(*inputs, threshold)


def frequency_case(threshold: float, *sizes: int) -> Case:
    """Return a case of `frequency_filter` with these sizes of `frequencies`."""
    return Case(
        function=partial(_frequency_call, threshold=threshold),
        inputs=partial(frequencies, *sizes),
        settings=(threshold,),
    )


def experts(
    tokens: int, dim: int, hidden: int, outputs: int, *, top_k: int = 2, number: int = 3, free: int = 0, halves: int = 1
) -> list[Tensor]:
    """Return x, gates, index, up, up_bias and down; no token chooses expert 1, some choose one without weights."""
    shapes = (tokens, dim), (tokens, top_k), (number, halves * hidden, dim), (number, halves * hidden)
    x, gates, up, up_bias, down = _numbers(*shapes, (number, outputs, hidden))
    choices = torch.tensor([expert for expert in range(number + free) if expert != 1])
    index = choices[(torch.arange(tokens)[:, None] * 7 + torch.arange(top_k)) % len(choices)]
    return [x, gates.abs(), index, up / max(dim, 1) ** 0.5, up_bias, down / max(hidden, 1) ** 0.5]


def _experts_call(
    x: Tensor, gates: Tensor, index: Tensor, up: Tensor, bias: Tensor, down: Tensor, **settings: Any
) -> Tensor:
    return kernels.routed_experts(x, gates, index, up, bias, down, **settings)


def experts_case(activation: str, gated: bool, **sizes: int) -> Case:
    """Return a case of `routed_experts` with these sizes of `experts`."""
    return Case(
        function=partial(_experts_call, activation=activation, gated=gated),
        inputs=partial(experts, **sizes, halves=2 if gated else 1),
        settings=(activation, gated),
    )


def _modulate_inputs(batch: int, tokens: int, channels: int) -> list[Tensor]:
    x, _, _, scale, shift = adaln(batch, tokens, channels)
    return [x, scale, shift]


CASES: dict[str, Case] = {
    "modulate": Case(function=kernels.modulate, inputs=partial(_modulate_inputs, 2, 17, 48), settings=(1e-6,)),
    "gate_modulate": Case(function=kernels.gate_modulate, inputs=partial(adaln, 2, 17, 48), settings=(1e-6,)),
    "ska": Case(function=kernels.ska, inputs=partial(aggregation, 2, 12, 4, 3, 5, 7)),
    "dwconv_gate": Case(function=kernels.dwconv_gate, inputs=partial(gate, 2, 5, 6, 7)),
    "repa_ffn": Case(function=kernels.repa_ffn, inputs=partial(repa, 70, 40, 24, 48)),
    "routed_experts": experts_case("gelu", False, tokens=17, dim=24, hidden=20, outputs=18, free=1),
    "frequency_filter": frequency_case(0.2, 2, 2, 5, 6, 7),
}
"""Name of the operator -> a call with ragged sizes."""

ODD: dict[str, Case] = {
    "modulate, one token": Case(function=kernels.modulate, inputs=partial(_modulate_inputs, 1, 1, 1152)),
    "modulate, no token": Case(function=kernels.modulate, inputs=partial(_modulate_inputs, 2, 0, 8)),
    "gate_modulate, one token": Case(function=kernels.gate_modulate, inputs=partial(adaln, 3, 1, 7)),
    "gate_modulate, no sample": Case(function=kernels.gate_modulate, inputs=partial(adaln, 0, 4, 8)),
    "ska, 5x5": Case(function=kernels.ska, inputs=partial(aggregation, 1, 6, 2, 5, 4, 3)),
    "ska, one pixel": Case(function=kernels.ska, inputs=partial(aggregation, 1, 8, 8, 1, 1, 1)),
    "ska, no sample": Case(function=kernels.ska, inputs=partial(aggregation, 0, 8, 1, 3, 4, 4)),
    "dwconv_gate, one pixel": Case(function=kernels.dwconv_gate, inputs=partial(gate, 1, 1, 1, 1)),
    "dwconv_gate, no sample": Case(function=kernels.dwconv_gate, inputs=partial(gate, 0, 3, 4, 4)),
    "repa_ffn, one row": Case(function=kernels.repa_ffn, inputs=partial(repa, 1, 130, 17, 3)),
    "repa_ffn, no row": Case(function=kernels.repa_ffn, inputs=partial(repa, 0, 16, 16, 16)),
    "routed_experts, one token": experts_case("relu", False, tokens=1, dim=8, hidden=8, outputs=8),
    "routed_experts, no token": experts_case("relu", False, tokens=0, dim=8, hidden=8, outputs=8),
    "routed_experts, only free": experts_case("silu", True, tokens=3, dim=8, hidden=8, outputs=8, number=1, free=1),
    "frequency_filter, one pixel": frequency_case(0.0, 1, 3, 1, 1, 1),
    "frequency_filter, one row": frequency_case(0.0, 2, 1, 9, 1, 40),
    "frequency_filter, one column": frequency_case(0.0, 1, 1, 2, 17, 1),
    "frequency_filter, 64 x 64": frequency_case(0.0, 1, 1, 3, 64, 64),
    "frequency_filter, written in parts": frequency_case(0.1, 1, 1, 16, 33, 33),
    "frequency_filter, too tall": frequency_case(0.1, 1, 1, 2, 65, 3),
    "frequency_filter, no sample": frequency_case(0.1, 0, 2, 4, 4, 4),
} | {
    f"routed_experts, {name}": experts_case(name, gated, tokens=6, dim=16, hidden=8, outputs=16)
    for name, gated in (("silu", True), ("gelu_tanh", True), ("quick_gelu", False), ("sigmoid", False))
}
"""What is odd -> a call with it."""


def strided(tensor: Tensor) -> Tensor:
    """Return the same numbers, with gaps between them in memory."""
    return torch.stack([tensor, tensor], -1)[..., 0] if tensor.is_floating_point() else tensor


def channels_last(tensor: Tensor) -> Tensor:
    """Return the same numbers with neighbouring channels, if they are a map."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def outputs_and_gradients(case: Case, inputs: list[Tensor], backend: kernels.Backend) -> list[Tensor]:
    """Return what a case gives under a backend, and its gradients for fixed random ones of the outputs."""
    inputs = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    with kernels.use_backend(backend):
        result = case.function(*inputs)
        results = list(result) if isinstance(result, tuple) else [result]
        grads = [grad.to(out) for grad, out in zip(_numbers(*[out.shape for out in results]), results, strict=True)]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        return [*results, *torch.autograd.grad(results, wanted, grads)]


def check_kernel(
    case: Case,
    dtype: torch.dtype,
    backend: kernels.Backend,
    device: str = "cpu",
    layout: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Compare a kernel with PyTorch in float64 on the same rounded inputs.

    Raises:
        AssertionError: An output or a gradient differs by more than `TOLERANCE`, or has another shape or type.
    """
    rounded = [
        tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device) for tensor in case.inputs()
    ]
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in rounded]
    expected = outputs_and_gradients(case, exact, "torch")
    found = outputs_and_gradients(case, [layout(tensor) for tensor in rounded] if layout else rounded, backend)
    for number, (value, truth) in enumerate(zip(found, expected, strict=True)):
        assert value.shape == truth.shape, f"result {number}"
        assert value.dtype == dtype, f"result {number}"
        if truth.numel() > 0:
            error = (value.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-6)
            assert error < TOLERANCE[dtype], f"result {number}: relative error {error:.1e}"
