"""Learning rates by kind of block: embeddings, attention, feed-forward layers and norms each have their own factor.

The Sharpness Disparity Principle in Transformers (ICML 2025, https://arxiv.org/abs/2502.19002): the average sharpness
rises from embeddings over query and key, feed-forward layers, value and output to norms, from early in training on, and
AdamW whose rates rise against it trains language models nearly twice as fast. Abstract and order were read, the paper's
factors were not: none is a default here. Query, key, value and output share one factor, since most vision models make
them in one product; whether images show the disparity was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import nn

from zoo.catalog import did_you_mean
from zoo.ffn.ewa import ExpertsWeightsAveraging
from zoo.ffn.low_rank import LowRankLinear
from zoo.ffn.s2ft import SliceLinear
from zoo.ffn.structured import SelfGuided
from zoo.ffn.technique import dense_layers
from zoo.layers.ffn import RePaFFN

__all__ = ["KINDS", "block_groups", "kinds_of", "require_factors"]

KINDS = ("embedding", "attention", "ffn", "norm")
_OTHER = "other"


def require_factors(factors: Mapping[str, float]) -> None:
    """Say which kind is unknown, or which factor is none.

    Raises:
        ValueError: There is one.
    """
    for kind, factor in factors.items():
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS)
            raise ValueError(f"block_lr: no kind of block is called {kind!r}.{hint} Kinds: {', '.join(KINDS)}.")
        if isinstance(factor, bool) or not isinstance(factor, Real) or not 0 <= float(factor) < math.inf:
            raise ValueError(
                f"block_lr: the factor of {kind} must be a number and must not be negative, got {factor!r}."
            )


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Return the kind of block of every parameter, by name; "other" is a stem's, a head's, a convolution's.

    Args:
        model: Any; feed-forward layers are found as `zoo.ffn` finds them; what techniques put in their places too.
    """
    ffns = dense_layers(model)[0].values()
    products = {id(part) for ffn in ffns for part in (*ffn.products, *ffn.between)}
    modules = dict(model.named_modules())
    products |= {id(part) for layer in modules.values() if _made(layer) for part in layer.modules()}
    kinds = {}
    for name, module in modules.items():
        for key in module._parameters:
            full = f"{name}.{key}" if name else key
            if "norm" in type(module).__name__.lower():
                kinds[full] = "norm"
            elif id(module) in products:
                kinds[full] = "ffn"
            else:
                kinds[full] = _kind(full, modules)
    return kinds


def _made(module: nn.Module) -> bool:
    """Tell whether a technique put a module in the place of a feed-forward layer, or of a product in one."""
    parts = (RePaFFN, LowRankLinear, SelfGuided, SliceLinear, ExpertsWeightsAveraging)
    ours = type(module).__module__.startswith("zoo.")
    return isinstance(module, parts) or (ours and isinstance(getattr(module, "macs", None), int))


def _kind(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return what the nearest name, or class, around a parameter says; not that of the model itself."""
    while name:
        module = modules.get(name)
        words = f"{name.rpartition('.')[2]} {'' if module is None else type(module).__name__}".lower()
        if "embed" in words:
            return "embedding"
        if "attn" in words or "attention" in words:
            return "attention"
        name = name.rpartition(".")[0]
    return _OTHER


def block_groups(
    model: nn.Module, factors: Mapping[str, float], weight_decay: float, lr: float | None = None
) -> list[dict[str, Any]]:
    """Return groups of parameters for an optimizer, with the factor as timm's `lr_scale`.

    Args:
        model: Parameters that need no gradient are left out.
        factors: By kind, see `KINDS`; other parameters have 1.
        weight_decay: Of matrices; biases, norms and `no_weight_decay()` have none.
        lr: Learning rate where no schedule of timm reads `lr_scale`; None: one does.

    Raises:
        ValueError: A kind is named that the model lacks, or is unknown.
    """
    require_factors(factors)
    kinds = kinds_of(model)
    lacking = [kind for kind in factors if kind not in kinds.values()]
    if lacking:
        raise ValueError(f"block_lr: {type(model).__name__} has no {lacking[0]} parameters; leave it out.")
    spared: set[str] = set(getattr(model, "no_weight_decay", lambda: ())())
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in spared
            groups.setdefault((kinds[name], decays), []).append(parameter)
    found = []
    for (kind, decays), parameters in groups.items():
        scale = factors.get(kind, 1.0)
        rate = {} if lr is None else {"lr": lr * scale}
        decay = weight_decay if decays else 0.0
        found.append({"params": parameters, "weight_decay": decay, "lr_scale": scale, **rate})
    return found
