"""What torch.fx is told where it cannot follow a module."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["require_leaf"]


def require_leaf(module: nn.Module, x: Tensor) -> None:
    """Say what to use where a tracer looks into a module that has to be a leaf of its graph.

    Args:
        module: Of a class that is registered with `timm.models.register_notrace_module`.
        x: The module's input.

    Raises:
        TypeError: The input is a tracer's.
    """
    if isinstance(x, Proxy):
        raise TypeError(
            f"torch.fx cannot look into {type(module).__name__}, whose steps depend on sizes: use timm.layers."
            "create_feature_extractor, or pass tracer_kwargs={'leaf_modules': timm.layers.get_notrace_modules()}."
        )
