"""Buffers that are computed, not stored: made again where a model was built on the meta device and got its weights."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import nn

__all__ = ["derive_after_loading"]


class _Deriving(Protocol):
    def derive_buffers(self) -> None:
        """Compute the buffers that no state dict holds, on the device of the parameters."""


def derive_after_loading(module: nn.Module) -> None:
    """Let a module compute its buffers once `load_state_dict(..., assign=True)` has brought its weights off `meta`.

    Args:
        module: Has a method `derive_buffers`.
    """
    module.register_load_state_dict_post_hook(_derive)


def _derive(module: nn.Module, keys: Any) -> None:
    if any(buffer.is_meta for buffer in module.buffers()) and not next(module.parameters()).is_meta:
        cast(_Deriving, module).derive_buffers()
