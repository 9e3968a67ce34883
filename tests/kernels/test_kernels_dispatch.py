"""Backends of `zoo.kernels`: which one computes, how it is set, and what is needed for it."""

from __future__ import annotations

import importlib.util

import fresh_process
import pytest
import torch

from zoo import kernels
from zoo.kernels import dispatch
from zoo.kernels.dispatch import exceeds_int32, runs_kernel


def test_auto_is_pytorch_until_a_gain_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, device="meta")
    with kernels.use_backend("auto"):
        assert not runs_kernel("ska", x)
        monkeypatch.setattr(dispatch, "_MEASURED", frozenset({"ska"}))
        assert not runs_kernel("ska", x)  # no CUDA tensor


def test_with_block_restores_the_backend() -> None:
    before = kernels.get_backend()
    with kernels.use_backend("torch"):
        assert kernels.get_backend() == "torch"
        with pytest.raises(ValueError, match="backend"), kernels.use_backend("none"):  # type: ignore[arg-type]
            pass
        assert kernels.get_backend() == "torch"
    assert kernels.get_backend() == before


def test_triton_leaves_other_devices_and_types_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with kernels.use_backend("triton"):
        assert not runs_kernel("ska", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with kernels.use_backend("interpret"):
        assert runs_kernel("ska", torch.zeros(1))
        assert not runs_kernel("ska", torch.zeros(1), torch.zeros(1, dtype=torch.float64))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"got 'tritn'\. Did you mean triton\?"):
        kernels.set_backend("tritn")  # type: ignore[arg-type]


def test_backends_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RuntimeError, match="needs TRITON_INTERPRET=1"):
        kernels.set_backend("interpret")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="'triton' needs triton, which is not installed"):
        kernels.set_backend("triton")


def test_offsets() -> None:
    assert not exceeds_int32(torch.empty(0, 7, device="meta"), torch.empty(2**20, device="meta"))
    assert exceeds_int32(torch.empty(2**16, 2**16, device="meta"))
    assert exceeds_int32(torch.empty(2**16, 2**16, device="meta")[:, :1])  # few elements, far apart


@pytest.mark.slow  # starts Python anew
def test_imports_and_computes_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, zoo.kernels as kernels\n"
        "x = torch.randn(1, 2, 4)\n"
        "print(kernels.modulate(x, x[:, 0], x[:, 1]).shape, torch.ops.zoo.modulate(x, x[:, 0], x[:, 1], 1e-6).shape)"
    )
    done = fresh_process.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[1, 2, 4]") == 2
