"""Tensors that are derived from a parameter, kept as long as the parameter stays the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Kept", "can_keep"]


def can_keep(source: Tensor) -> bool:
    """Tell whether comparing a parameter is cheaper than deriving from it: on a CPU, without gradients, in eager mode.

    Args:
        source: The parameter.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return source.device.type == "cpu"


class Kept:
    """Derive a tensor from a parameter, or return the one of the last call where that is right and cheaper.

    The derived tensor is kept with a copy of the parameter: it is used only while the parameter has not changed by a
    bit, however it was written to, and never carries a graph.
    """

    def __init__(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None

    def __call__(self, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `make(source)`.

        Args:
            source: The parameter.
            make: Depends on nothing else that changes.
        """
        if not can_keep(source):
            return make(source)
        pair = self._pair
        if pair is None or pair[0].dtype != source.dtype or not torch.equal(pair[0], source):
            # an inference tensor could not be used in training, nor one in autocast's type outside of it
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                pair = self._pair = (source.detach().clone(), make(source.detach()))
        return pair[1]
