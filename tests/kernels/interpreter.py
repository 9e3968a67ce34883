"""The Triton kernels in Triton's interpreter on the CPU; `test_triton_kernels.py` runs this file by itself."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, ODD, channels_last, check_kernel, strided

from zoo import kernels
from zoo.kernels import reference, triton_adaln, triton_gated, triton_repa, triton_ska

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_pytorch(name: str, dtype: torch.dtype) -> None:
    check_kernel(CASES[name], dtype, "interpret")


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str) -> None:
    check_kernel(ODD[name], torch.float32, "interpret")


@pytest.mark.parametrize("name", CASES)
def test_gaps_in_memory(name: str) -> None:
    check_kernel(CASES[name], torch.float32, "interpret", layout=strided)


@pytest.mark.parametrize("name", ["ska", "dwconv_gate"])
def test_channels_last(name: str) -> None:
    check_kernel(CASES[name], torch.float32, "interpret", layout=channels_last)


@pytest.mark.parametrize("name", ["ska", "dwconv_gate", "repa_ffn"])
def test_offsets_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton_gated, triton_repa, triton_ska):
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
            torch.testing.assert_close(compiled(*inputs), reference.modulate(*inputs, 1e-6))
        assert len(calls) == launches
