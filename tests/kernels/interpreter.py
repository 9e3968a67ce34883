"""The Triton kernels in Triton's interpreter on the CPU; `test_triton_kernels.py` runs this file by itself."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, ODD, channels_last, check_kernel, strided

from zoo import kernels
from zoo.bench.plain_backbones import plain_ska
from zoo.bench.published_ska import published_ska
from zoo.kernels import (
    launch,
    triton_adaln,
    triton_frequency,
    triton_gated,
    triton_repa,
    triton_ska,
)
from zoo.kernels.adaln import modulate_formula
from zoo.layers.frequency_filter import AdaptiveFrequencyFilter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_pytorch(name: str, dtype: torch.dtype) -> None:
    check_kernel(CASES[name], dtype, "interpret")


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str) -> None:
    check_kernel(ODD[name], torch.float32, "interpret")


@pytest.mark.parametrize("name", ["frequency_filter, 64 x 64", "frequency_filter, written in parts"])
def test_large_maps_in_16_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 they are left to PyTorch: shared memory would not hold their products."""
    launched, forward = [], triton_frequency.forward
    monkeypatch.setattr(triton_frequency, "forward", lambda *inputs: launched.append(1) or forward(*inputs))
    check_kernel(ODD[name], torch.float32, "interpret")
    assert not launched
    check_kernel(ODD[name], torch.float16, "interpret")
    assert launched


@pytest.mark.parametrize("name", ["ska", "ska, 5x5"])
def test_published_design_of_ska(name: str) -> None:
    x, weight = (tensor.float().contiguous() for tensor in (CASES | ODD)[name].inputs())
    torch.testing.assert_close(published_ska(x, weight), plain_ska(x, weight))


@pytest.mark.parametrize("name", CASES)
def test_gaps_in_memory(name: str) -> None:
    check_kernel(CASES[name], torch.float32, "interpret", layout=strided)


@pytest.mark.parametrize("name", ["ska", "dwconv_gate", "frequency_filter"])
def test_channels_last(name: str) -> None:
    check_kernel(CASES[name], torch.float32, "interpret", layout=channels_last)


@pytest.mark.parametrize("name", ["ska", "dwconv_gate", "repa_ffn", "frequency_filter"])
def test_offsets_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton_frequency, triton_gated, triton_repa, triton_ska):
        monkeypatch.setattr(module, "exceeds_int32", lambda *tensors: True)
    check_kernel(CASES[name], torch.float32, "interpret")


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_a_well_behaved_operator(name: str) -> None:
    inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in CASES[name].inputs()]
    with kernels.use_backend("interpret"):
        operator = getattr(torch.ops.zoo, name).default
        torch.library.opcheck(operator, (*inputs, *CASES[name].settings), test_utils=("test_schema", "test_faketensor"))


def test_mixed_types_are_promoted() -> None:
    x, y, gate, scale, shift = CASES["gate_modulate"].inputs()
    low = [tensor.half() for tensor in (y, gate, scale, shift)]
    with kernels.use_backend("interpret"):
        total, out = kernels.gate_modulate(x.float(), *low)
    expected = kernels.gate_modulate(x.float(), *(tensor.float() for tensor in low))
    assert total.dtype == out.dtype == torch.float32
    torch.testing.assert_close((total, out), expected, rtol=1e-5, atol=1e-5)


def test_compiled_functions_follow_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], triton_adaln.forward
    monkeypatch.setattr(triton_adaln, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    inputs = [tensor.float() for tensor in CASES["modulate"].inputs()]
    compiled = torch.compile(kernels.modulate, backend="eager", fullgraph=True)
    for backend, launches in (("torch", 0), ("interpret", 1), ("torch", 1)):
        with kernels.use_backend(backend):
            torch.testing.assert_close(compiled(*inputs), modulate_formula(*inputs, 1e-6))
        assert len(calls) == launches


def test_affnet_filter_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], triton_frequency.forward
    monkeypatch.setattr(triton_frequency, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    layer = AdaptiveFrequencyFilter(16, sparsity_threshold=0.01)
    x = torch.randn(2, 16, 5, 6)
    with torch.no_grad():
        expected = layer(x)
        with kernels.use_backend("interpret"):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
            assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["repa_ffn", "frequency_filter", "ska", "dwconv_gate", "modulate"])
def test_any_tiles_give_the_same(name: str) -> None:
    inputs = [tensor.float() for tensor in CASES[name].inputs()]
    with kernels.use_backend("interpret"), launch.asked_for() as asked:
        expected = CASES[name].function(*inputs)
    assert asked
    for key, default in asked.items():
        tiles = launch.candidates(key[0], 4)
        assert all(each.keys() == default.keys() for each in tiles)
        with kernels.use_backend("interpret"), launch.forced({key: tiles[0]}):
            torch.testing.assert_close(CASES[name].function(*inputs), expected, rtol=1e-4, atol=1e-5)
