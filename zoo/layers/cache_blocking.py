"""Cache blocking: run a merged network on a few images at a time, so that its maps stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["run_in_parts"]

_BYTES = 16 * 2**20  # FFNet-1, batch 16, one core: 1.23 s; 1.29 with 8 MiB, 1.31 with 32, 1.39 with the whole batch


def run_in_parts(module: nn.Module, x: Tensor, numbers: int, at_most: int | None = None) -> Tensor:
    """Run a module on a few images at a time, if its largest map would not fit the cache otherwise.

    For merged networks: a hook inside of the module sees the parts. Splits only on a CPU, in evaluation mode, without
    gradients, and outside of compilers and exporters, whose programs have to fit every batch.

    Args:
        module: Treats each image on its own.
        x: (B, C, H, W).
        numbers: How many numbers the largest map inside of the module has for one image.
        at_most: Bytes that this map may have; None is 16 MiB.

    Returns:
        What `module(x)` returns, one tensor with the batch first.
    """
    if isinstance(x, Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return module(x)
    if torch.is_grad_enabled() or module.training or x.device.type != "cpu":
        return module(x)
    images = max(1, (at_most or _BYTES) // (numbers * x.element_size()))
    if x.shape[0] <= images:
        return module(x)
    return torch.cat([module(part) for part in x.split(images)])
