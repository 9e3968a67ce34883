"""Low-rank adaptation (LoRA, Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685) through the peft library."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

__all__ = ["add_lora", "idle_adapters", "merge_lora"]


def add_lora(model: nn.Module, rank: int) -> Any:
    """Fix a classifier's weights and add adapters to its linear layers and 1x1 convolutions; the head learns as it is.

    Args:
        model: A timm classifier, changed in place.
        rank: Of the adapters.

    Returns:
        peft's view of the model, for `merge_lora`.

    Raises:
        ValueError: `rank` is less than 1, or no layer takes an adapter.
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ImportError("LoRA needs peft, which is missing: pip install 'ffn-zoo[train]'.") from error
    if rank < 1:
        raise ValueError(f"The rank of LoRA must be at least 1, got {rank}.")
    heads = _heads(model)
    names = [name for name, module in model.named_modules() if _takes_adapter(module) and not name.startswith(heads)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer or 1x1 convolution for LoRA beside its classifier."
        )
    pattern = "|".join(map(re.escape, names))
    adapted = LoraModel(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"({pattern})"), "default")
    for name, parameter in model.named_parameters():
        if name.startswith(heads):
            parameter.requires_grad_(True)
    return adapted


def _heads(model: Any) -> tuple[str, ...]:
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _takes_adapter(module: nn.Module) -> bool:
    point = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or point


def idle_adapters(model: nn.Module) -> list[str]:
    """Return the layers whose adapters got no gradient: the model reads their weights without calling them."""
    return [
        name.partition(".lora_B")[0]
        for name, parameter in model.named_parameters()
        if ".lora_B." in name and parameter.grad is None
    ]


def merge_lora(adapted: Any) -> nn.Module:
    """Add the adapters to the weights and return the plain model, whose `state_dict` keys are the architecture's."""
    return adapted.merge_and_unload()
