"""How strongly a denoiser's adapters work, LoRA layers of PEFT and IP-Adapters: a callback may change it in a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

__all__ = ["are_close", "scaled_parts", "scales_of"]

Scale = tuple[str, float]


def scaled_parts(model: nn.Module) -> list[nn.Module]:
    """Return the layers of LoRA and the attention layers of IP-Adapters."""
    return [module for module in model.modules() if _is_lora(module) or _ip_adapter(module) is not None]


def scales_of(parts: Sequence[nn.Module]) -> list[Scale]:
    """Return the name and scale of each adapter at work, layer by layer."""
    found: list[Scale] = []
    for part in parts:
        if _is_lora(part):
            layer: Any = part
            active = () if layer.disable_adapters else layer.active_adapters
            found += [(name, float(layer.scaling[name])) for name in active if name in layer.scaling]
        else:
            found += [("", scale) for scale in _numbers(_ip_adapter(part))]
    return found


def are_close(ours: Sequence[Scale], theirs: Sequence[Scale]) -> bool:
    """Compare scales; diffusers multiplies and divides those of LoRA around each call, which leaves rounding."""
    return len(ours) == len(theirs) and all(
        name == other and math.isclose(scale, scaled, rel_tol=1e-6)
        for (name, scale), (other, scaled) in zip(ours, theirs, strict=True)
    )


def _is_lora(module: nn.Module) -> bool:
    return isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters")


def _ip_adapter(module: nn.Module) -> Any:
    """Return the scales in an attention layer's processor: a list, with an entry for each adapter."""
    scale = getattr(getattr(module, "processor", None), "scale", None)
    return scale if isinstance(scale, list | float | int) else None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int | float):
        yield float(value)
