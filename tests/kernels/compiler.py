"""Compile every Triton kernel for a GPU that is not there; `test_triton_kernels.py` runs this file by itself.

The interpreter accepts programs that the compiler does not. Nothing is launched: a driver is stood in for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import CASES, experts_case, frequencies
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from zoo.bench.published_ska import published_ska
from zoo.kernels import (
    triton_adaln,
    triton_experts,
    triton_frequency,
    triton_gated,
    triton_repa,
    triton_ska,
)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compile instead of launching; return the compiled kernels."""
    found: list[Any] = []
    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda index: 0,
    )
    monkeypatch.setattr(driver, "_active", device)

    def compile_only(kernel: JITFunction, grid: Any) -> Any:
        return lambda *args, **kwargs: found.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    return found


PRODUCTS = ("repa_ffn", "routed_experts", "frequency_filter")  # of matrices, which compile otherwise in float32


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in (*CASES, "gated experts")), *((name, torch.float32) for name in PRODUCTS)],
    ids=str,
)
def test_kernel_compiles(name: str, dtype: torch.dtype, compiled: list[Any]) -> None:
    case = CASES.get(name) or experts_case("gelu_tanh", True, tokens=6, dim=16, hidden=8, outputs=16)
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in case.inputs()]
    x = inputs[0]
    if name == "modulate":
        _, scale, shift = inputs
        triton_adaln.forward(x, scale, shift, 1e-6)
        triton_adaln.backward(x, x, scale, 1e-6)
    elif name == "gate_modulate":
        _, y, gate, scale, shift = inputs
        triton_adaln.forward(x, scale, shift, 1e-6, (y, gate))
        triton_adaln.backward(x, x, scale, 1e-6, (x, y, gate))
    elif name == "ska":
        triton_ska.forward(*inputs, torch.empty_like(x))
        triton_ska.backward(x, *inputs, torch.empty_like(x), torch.empty_like(inputs[1]))
        published_ska(*inputs)
    elif name == "dwconv_gate":
        half = x[:, ::2].contiguous()
        triton_gated.forward(*inputs, half)
        triton_gated.backward(half, *inputs, torch.empty_like(x))
    elif name == "frequency_filter":
        triton_frequency.forward(*inputs, *case.settings, torch.empty_like(x))
    elif name == "repa_ffn":
        triton_repa.forward(*inputs)
    else:
        triton_experts.forward(*inputs, *case.settings)
    assert len(compiled) in (1, 2, 3, 4)
    assert all("ptx" in kernel.asm for kernel in compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_models_fit_a_multiprocessor(
    dtype: torch.dtype, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kernels whose programs hold whole rows or maps; H100 has 227 KiB of shared memory for a program."""
    monkeypatch.setattr(CUDABackend, "make_ptx", lambda self, src, metadata, *_: metadata.update(name="none") or "")
    monkeypatch.setattr(CUDABackend, "make_cubin", lambda *_: b"")  # shared memory is given out before these two
    maps = [tensor.to(dtype) for tensor in frequencies(1, 8, 12, 32, 32)]
    triton_frequency.forward(*maps, 0.0, torch.empty_like(maps[0]))
    assert [kernel.metadata.shared <= 227 * 1024 for kernel in compiled] == [True]
