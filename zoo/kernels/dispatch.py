"""Choose what computes the operators of this package: plain PyTorch or the Triton kernels."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor

__all__ = [
    "Backend",
    "autocast",
    "check_backend",
    "check_shapes",
    "exceeds_int32",
    "get_backend",
    "no_autocast",
    "runs_kernel",
    "set_backend",
    "use_backend",
]

Backend = Literal["auto", "torch", "triton", "interpret"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MEASURED: frozenset[str] = frozenset()
"""Operators whose kernel was measured to beat compiled PyTorch and the best library call: what "auto" runs."""


def check_backend(backend: str) -> Backend:
    """Return the name of a backend that can run here; nothing is asked of a device.

    Args:
        backend: As in `set_backend`.

    Raises:
        ValueError: There is no such backend.
        RuntimeError: Triton is not installed, or its interpreter is not switched on.
    """
    names = get_args(Backend)
    if backend not in names:
        near = difflib.get_close_matches(backend, names, 1, 0)[0]
        raise ValueError(f"The kernel backend must be one of {', '.join(names)}, got {backend!r}. Did you mean {near}?")
    if backend in ("triton", "interpret") and importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"The kernel backend {backend!r} needs triton, which is not installed: use torch.")
    if backend == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("The kernel backend 'interpret' needs TRITON_INTERPRET=1 set before Python starts.")
    return cast(Backend, backend)


_backend: Backend = check_backend(os.environ.get("ZOO_KERNELS", "auto"))  # a global: compilers guard on it


def get_backend() -> Backend:
    """Return the backend in use."""
    return _backend


def set_backend(backend: Backend) -> None:
    """Set the backend for the whole process; it starts as the environment variable `ZOO_KERNELS`, else as "auto".

    Args:
        backend: "torch": PyTorch everywhere. "triton": the kernels for CUDA tensors (compute capability 8.0 or more)
            in float32, float16 and bfloat16, PyTorch for the rest. "auto": as "triton", but only those operators whose
            gain was measured; so far there is none. "interpret": the kernels on the CPU in Triton's interpreter, which
            is slow and for tests.

    Raises:
        ValueError: There is no such backend.
        RuntimeError: Triton is not installed, or its interpreter is not switched on.
    """
    global _backend
    _backend = check_backend(backend)


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Set the backend as `set_backend` does, for a `with` block.

    Args:
        backend: As in `set_backend`.
    """
    before = _backend
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def runs_kernel(operator: str, *tensors: Tensor) -> bool:
    """Return whether the Triton kernel of an operator computes these tensors under the backend in use.

    Args:
        operator: Name of the operator, without "zoo::".
        *tensors: Its floating point inputs.
    """
    if _backend == "torch" or (_backend == "auto" and operator not in _MEASURED):
        return False
    device = "cpu" if _backend == "interpret" else "cuda"
    return all(tensor.device.type == device and tensor.dtype in _DTYPES for tensor in tensors)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to the type that autocast asks of matrix products and convolutions, where it is on.

    Args:
        *tensors: Of one device; only floating point ones narrower than float64 are cast, as autocast does.
    """
    if not _is_autocast_on(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor.to(dtype) if tensor.dtype in _DTYPES else tensor for tensor in tensors)


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which nothing is cast for the device of a tensor.

    Args:
        tensor: On any device.
    """
    return torch.autocast(tensor.device.type, enabled=False) if _is_autocast_on(tensor) else contextlib.nullcontext()


def _is_autocast_on(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # autocast does not know "meta"


def check_shapes(**expected: tuple[Tensor, tuple[int, ...]]) -> None:
    """Make sure that a kernel will read within its tensors: unlike formulas, kernels do not broadcast.

    Args:
        **expected: Name of an argument -> the tensor and the shape that it must have.

    Raises:
        ValueError: A tensor has another shape.
    """
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}.")


def exceeds_int32(*tensors: Tensor) -> bool:
    """Return whether an element lies too far from the first one of its tensor for 32-bit offsets.

    Args:
        *tensors: Of any strides.
    """
    return any(
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**30
        for tensor in tensors
    )  # 2**30: the last block of a launch may count a little beyond the end
