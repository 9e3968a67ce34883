"""Operators of `zoo.kernels` in PyTorch: against the layers they serve, and for compilers and exporters."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero
from kernel_cases import CASES, adaln, experts, frequencies, gate, repa
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo import kernels
from zoo.bench.plain_backbones import plain_ska
from zoo.kernels import gated
from zoo.kernels.frequency import frequency_filter
from zoo.layers.ffn import RePaFFN
from zoo.layers.frequency_filter import AdaptiveFrequencyFilter
from zoo.layers.gated_ffn import GatedFFN
from zoo.moe.experts import MoEFFN, masked_experts

NAMES = list(CASES)
# Name -> how many inputs the backward pass takes.
BACKWARD = {"ska": 2, "dwconv_gate": 2, "modulate": 2, "gate_modulate": 5, "frequency_filter": 5}


def formula(name: str) -> Any:
    """Return what an operator computes where its kernel does not run."""
    return getattr(sys.modules[getattr(kernels, name).__module__], f"{name}_formula")


def operator(name: str) -> Any:
    """Return a custom operator."""
    return getattr(torch.ops.zoo, name).default


def arguments(name: str, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> list[Any]:
    """Return all arguments of a custom operator."""
    case = CASES[name]
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in case.inputs()]
    if grad:
        inputs = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    return [*inputs, *case.settings]


class Call(nn.Module):
    """A custom operator as a module."""

    def __init__(self, name: str, settings: tuple[Any, ...]) -> None:
        super().__init__()
        self.name, self.settings = name, settings

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(torch.ops.zoo, self.name)(*inputs, *self.settings)


def test_modulate_is_the_norm_of_diffusers() -> None:
    x, y, _, _, _ = adaln(2, 5, 8)
    layer, emb = AdaLayerNormZero(8).double(), torch.randn(2, 8, dtype=torch.float64)
    expected, gate, shift, scale, _ = layer(x, emb=emb)
    first_shift, first_scale = layer.linear(layer.silu(emb)).chunk(6, 1)[:2]
    torch.testing.assert_close(kernels.modulate(x, first_scale, first_shift), expected)

    total, out = kernels.gate_modulate(x, y, gate, scale, shift)
    torch.testing.assert_close(total, x + gate.unsqueeze(1) * y)
    torch.testing.assert_close(out, layer.norm(total) * (1 + scale[:, None]) + shift[:, None])


def test_ska_is_the_plain_one() -> None:
    x, weight = CASES["ska"].inputs()
    torch.testing.assert_close(kernels.ska(x, weight), plain_ska(x, weight))


def test_dwconv_gate_is_the_middle_of_the_layer() -> None:
    layer = GatedFFN(4, 5).double()
    x = torch.randn(2, 6, 7, 4, dtype=torch.float64)
    hidden = layer.project_in(x).permute(0, 3, 1, 2)
    out = kernels.dwconv_gate(hidden, layer.dwconv.weight)
    torch.testing.assert_close(layer.project_out(out.permute(0, 2, 3, 1)), layer(x))


@torch.no_grad()
def test_dwconv_gate_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes maps that are channels first a few channels at a time."""
    monkeypatch.setattr(gated, "_PART_BYTES", 1)
    x, weight = gate(2, 35, 5, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(kernels.dwconv_gate(x, weight), kernels.dwconv_gate(last, weight))
    inner = gated.dwconv_gate_by_parts(x, weight, (0, 1))  # rows without their neighbours are left out
    torch.testing.assert_close(inner, kernels.dwconv_gate(last, weight)[:, :, 1:-1])


def test_repa_ffn_is_the_merged_layer() -> None:
    x, *weights = repa(7, 8, 6, 8)
    layer = RePaFFN(8, 32, 6, merged=True).double()
    assert layer.linear is not None
    assert layer.active_fc1 is not None
    assert layer.active_fc2 is not None
    parameters = layer.active_fc1.weight, layer.active_fc1.bias, layer.active_fc2.weight
    for parameter, value in zip((*parameters, layer.linear.weight, layer.linear.bias), weights, strict=True):
        parameter.data = value
    torch.testing.assert_close(kernels.repa_ffn(x, *weights), layer(x))


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_frequency_filter_is_the_layer(threshold: float) -> None:
    x, *weights = frequencies(2, 8, 3, 9, 10)
    layer = AdaptiveFrequencyFilter(24, sparsity_threshold=threshold).double()
    for parameter, value in zip((layer.w1, layer.b1, layer.w2, layer.b2), weights, strict=True):
        parameter.data = value
    torch.testing.assert_close(kernels.frequency_filter(x, *weights, threshold), layer(x))


def test_frequency_filter_stays_in_float32_under_autocast() -> None:
    x, *weights = (tensor.float() for tensor in frequencies(1, 2, 3, 5, 6))
    expected = frequency_filter(x, *weights, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (frequency_filter, torch.ops.zoo.frequency_filter):
            torch.testing.assert_close(function(x, *weights, 0.1), expected)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "sigmoid"])
@pytest.mark.parametrize("gated", [False, True])
def test_routed_experts_are_those_of_the_layer(activation: str, gated: bool) -> None:
    x, gates, index, up, up_bias, down = experts(9, 6, 4, 6, halves=2 if gated else 1, free=1)
    sizes = {"shared_dim": 2, "expert_dim": 4, "experts": 3, "top_k": 2}
    layer = MoEFFN(6, 6, **sizes, activation=activation, gated=gated, zero=1).double()
    assert layer.experts_up_bias is not None
    layer.experts_up.data, layer.experts_up_bias.data, layer.experts_down.data = up, up_bias, down
    inputs = [tensor.requires_grad_() for tensor in (x, gates, up, up_bias, down)]
    weights = (layer.experts_up, layer.experts_up_bias, layer.experts_down)
    expected = masked_experts(layer, x, gates, index)
    found = torch.ops.zoo.routed_experts(x, gates, index, up, up_bias, down, activation, gated)
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(found.sin().sum(), inputs)
    torch.testing.assert_close(slopes, torch.autograd.grad(expected.sin().sum(), [x, gates, *weights]))


def test_routed_experts_need_no_bias() -> None:
    x, gates, index, up, up_bias, down = experts(5, 6, 4, 6)
    none = torch.ops.zoo.routed_experts(x, gates, index, up.requires_grad_(), None, down, "gelu", False)
    zeros = kernels.routed_experts(x, gates, index, up, torch.zeros_like(up_bias), down)
    torch.testing.assert_close(none, zeros)
    torch.testing.assert_close(torch.autograd.grad(none.sum(), up), torch.autograd.grad(zeros.sum(), up))


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    """Compare the operator's own backward pass with that of the plain formulas, in float64."""
    inputs = arguments(name, torch.float64, grad=True)
    wanted = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
    slopes = []
    for function in (operator(name), formula(name)):
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        slopes.append(torch.autograd.grad(sum(out.sin().sum() for out in results), wanted))
    torch.testing.assert_close(*slopes)


@pytest.mark.slow  # traces the operator and its gradients with dynamic shapes
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(operator(name), arguments(name, grad=True))


@pytest.mark.parametrize("name", BACKWARD)
def test_opcheck_of_the_backward_pass(name: str) -> None:
    inputs = arguments(name)
    results = operator(name)(*inputs)
    grads = [torch.ones_like(out) for out in (results if isinstance(results, tuple) else (results,))]
    if name == "gate_modulate":
        _, y, gate, scale, _, eps = inputs
        rest = [results[0], y, gate, scale, eps]
    else:
        rest = [*inputs[: BACKWARD[name]], *CASES[name].settings]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator(f"{name}_backward"), (*grads, *rest), test_utils=tests)


@pytest.mark.parametrize("name", NAMES)
def test_export_keeps_one_node(name: str) -> None:
    inputs, call = arguments(name), Call(name, CASES[name].settings)
    tensors = tuple(inputs[: len(inputs) - len(call.settings)])
    program = torch.export.export(call, tensors)
    assert next(node.target for node in program.graph.nodes if node.op == "call_function") is operator(name)
    torch.testing.assert_close(program.module()(*tensors), call(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name: str) -> None:
    inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in CASES[name].inputs()]
    compiled = torch.compile(CASES[name].function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), CASES[name].function(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_operators_compile(name: str) -> None:
    tensors = arguments(name)[: len(CASES[name].inputs())]
    call = Call(name, CASES[name].settings)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_formula(name: str) -> None:
    counts = []
    for function in (operator(name), formula(name)):
        with FlopCounterMode(display=False) as counter:
            function(*arguments(name))
        counts.append(counter.get_total_flops())
    if name == "routed_experts":  # the formula computes all 3 experts for all tokens, the operator those 2 chosen
        counts[0] = counts[0] * 3 // 2
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in CASES[name].inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        out = CASES[name].function(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    casts = name in ("dwconv_gate", "repa_ffn", "routed_experts")  # like convolutions and matrix products
    assert out.dtype == (torch.bfloat16 if casts else torch.float32)


@pytest.mark.parametrize(
    ("name", "number", "shape", "message"),
    [
        ("modulate", 0, (2, 48), r"x must be \(B, N, C\), got \(2, 48\)"),
        ("modulate", 1, (2, 47), r"scale must be \(B, 48\), got \(2, 47\)"),
        ("gate_modulate", 1, (2, 17, 40), r"y must be \(B, N, 48\) like x, got \(2, 17, 40\)"),
        ("ska", 0, (2, 5, 7), r"x and weight must be \(B, C, H, W\) and \(B, G, K, H, W\)"),
        ("ska", 1, (2, 5, 9, 5, 7), "weight must have sets that divide the channels, got 5 for 12"),
        ("ska", 1, (2, 4, 4, 5, 7), "weight must have the taps of a square kernel of odd side, got 4"),
        ("dwconv_gate", 0, (2, 9, 6, 7), r"x must be \(B, 2 H, height, width\), got \(2, 9, 6, 7\)"),
        ("dwconv_gate", 1, (10, 1, 5, 5), r"weight must be \(10, 1, 3, 3\), got \(10, 1, 5, 5\)"),
        ("repa_ffn", 0, (2, 70, 40), r"x must be rows \(M, C\), got \(2, 70, 40\)"),
        ("repa_ffn", 3, (48, 25), r"fc2_weight must be \(48, 24\), got \(48, 25\)"),
        ("frequency_filter", 0, (2, 10, 0, 7), r"at least one pixel, got \(2, 10, 0, 7\)"),
        ("frequency_filter", 1, (2, 2, 4, 4), r"w1 must be \(2, g, C / g, C / g\) with C = 10, got \(2, 2, 4, 4\)"),
        ("frequency_filter", 4, (2, 2, 4), r"b2 must be \(2, 2, 5\), got \(2, 2, 4\)"),
        ("routed_experts", 2, (17,), r"got \(17, 24\), \(17, 2\), \(17,\), \(3, 18, 20\)"),
        ("routed_experts", 3, (3, 40, 24), r"up must be \(3, 20, 24\), got \(3, 40, 24\)"),
        ("routed_experts", 4, (3, 19), r"up_bias must be \(3, 20\), got \(3, 19\)"),
    ],
)
def test_shapes_that_do_not_fit(name: str, number: int, shape: tuple[int, ...], message: str) -> None:
    inputs = CASES[name].inputs()
    inputs[number] = torch.zeros(shape, dtype=inputs[number].dtype)
    with pytest.raises(ValueError, match=message):
        CASES[name].function(*inputs)


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("modulate", 1, r"scale must be \(2, 48\), got \(1, 48\)"),
        ("gate_modulate", 1, r"y must be \(2, 17, 48\), got \(1, 17, 48\)"),
        ("gate_modulate", 2, r"gate must be \(2, 48\), got \(1, 48\)"),
        ("ska", 1, r"weight must be \(2, 4, 9, 5, 7\), got \(1, 4, 9, 5, 7\)"),
        ("routed_experts", 1, r"gates must be \(17, 2\), got \(1, 2\)"),
        ("routed_experts", 2, r"index must be \(17, 2\), got \(1, 2\)"),
    ],
)
def test_operators_do_not_broadcast(name: str, number: int, message: str) -> None:
    inputs = arguments(name)
    inputs[number] = inputs[number][:1]
    with pytest.raises(ValueError, match=message):
        operator(name)(*inputs)


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("modulate", 2, "shift must be torch.float64 like scale, got torch.float32"),
        ("dwconv_gate", 1, "weight must be torch.float64 like x, got torch.float32"),
        ("repa_ffn", 4, "weight must be torch.float64 like x, got torch.float32"),
        ("routed_experts", 5, "down must be torch.float64 like x, got torch.float32"),
    ],
)
def test_types_that_do_not_fit(name: str, number: int, message: str) -> None:
    inputs = CASES[name].inputs()
    inputs[number] = inputs[number].float()
    with pytest.raises(ValueError, match=message):
        CASES[name].function(*inputs)


def test_unknown_activation() -> None:
    x, gates, index, up, up_bias, down = experts(5, 6, 4, 6)
    with pytest.raises(ValueError, match=r"got 'swish'\. Did you mean"):
        kernels.routed_experts(x, gates, index, up, up_bias, down, activation="swish")
