"""Techniques of `zoo.ffn` that a model is trained with, switched on by one setting of a task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zoo.catalog import did_you_mean
from zoo.ffn.block_ffn import chunk_sparsification, locality, record_logits
from zoo.ffn.matformer import MatFormerConfig, set_width, training_widths
from zoo.ffn.structured import SelfGuided, guide_share
from zoo.ffn.technique import require_types, technique_module
from zoo.ffn.versatile import set_temperature
from zoo.moe.losses import record_entropy

__all__ = ["FFNTraining"]

_CONFIGS = {
    "block_ffn": "BlockFFNConfig",
    "fdconv": "FDConvConfig",
    "freqnet": "FreqNetConfig",
    "hourglass": "HourglassConfig",
    "hybrid_norm": "HybridNormConfig",
    "layout": "LayoutConfig",
    "macaron": "MacaronConfig",
    "matformer": "MatFormerConfig",
    "mofme": "MoFMEConfig",
    "parallel": "ParallelConfig",
    "product_key": "ProductKeyConfig",
    "sigma_moe": "SigmaMoEConfig",
    "structured": "StructuredConfig",
    "versatile": "VersatileConfig",
}
_ELSEWHERE = {
    "ewa": "the callback zoo.tasks.callbacks.AverageExperts",
    "moe": "the setting experts",
    "forget": "zoo.ffn.forget",
    "s2ft": "zoo.ffn.s2ft",
}
_LOSSES = {  # the papers' weights, without BlockFFN's adaptation while training
    "block_ffn": {"locality": 1e-3, "sparsification": 5e-2},
    "sigma_moe": {"entropy": 1e-3},
}


class FFNTraining:
    """What a technique does to a model before and while it is trained.

    Args:
        model: Changed in place; keep it elsewhere.
        settings: Name of a technique, or {"technique": name, **fields of its configuration}: block_ffn, fdconv,
            freqnet, hourglass, hybrid_norm, layout, macaron, matformer, mofme, parallel, product_key, sigma_moe,
            structured, versatile. Those with losses of their own also take their weights: block_ffn "locality" and
            "sparsification", sigma_moe "entropy".

    Raises:
        ValueError: There is no such technique or field (the message names the nearest), or the model cannot be changed.
    """

    def __init__(self, model: nn.Module, settings: str | Mapping[str, Any]) -> None:
        fields: dict[str, Any] = {"technique": settings} if isinstance(settings, str) else dict(settings)
        self.technique = str(fields.pop("technique", ""))
        if self.technique in _ELSEWHERE:
            raise ValueError(f"ffn: {self.technique} is switched on by {_ELSEWHERE[self.technique]}.")
        if self.technique not in _CONFIGS:
            raise ValueError(
                f"ffn: no technique to train with is called {self.technique!r}."
                f"{did_you_mean(self.technique, _CONFIGS)} Techniques: {', '.join(_CONFIGS)}."
            )
        defaults = _LOSSES.get(self.technique, {})
        self.weights = {name: fields.pop(name, default) for name, default in defaults.items()}
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"ffn: {name} is the weight of a loss, a number of at least 0, got {weight!r}.")
        module = technique_module(self.technique)
        kind = getattr(module, _CONFIGS[self.technique])
        known = [field.name for field in dataclasses.fields(kind)] + list(self.weights)
        if wrong := [name for name in fields if name not in known]:
            raise ValueError(f"ffn: {self.technique} has no setting {wrong[0]!r}; it has {', '.join(known)}.")
        if self.technique == "freqnet":  # tokens before the map of patches
            fields.setdefault("prefix_tokens", getattr(model, "num_prefix_tokens", 1))
        require_types(kind, fields)
        self.config = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
        module.apply(model, self.config)

    def passes(self, model: nn.Module, step: int, total: int) -> Iterator[None]:
        """Prepare the model for each forward pass of a training step; the losses of all passes are summed.

        Args:
            model: That was changed.
            step: Optimizer steps done.
            total: Optimizer steps of the whole training.
        """
        if isinstance(self.config, MatFormerConfig):
            for width in training_widths(self.config):
                set_width(model, width)
                yield
            set_width(model, 1.0)
            return
        if self.technique == "structured":
            for module in model.modules():
                if isinstance(module, SelfGuided):
                    module.share = guide_share(step, total)
        elif self.technique == "versatile":
            set_temperature(model, step / max(1, total))
        yield

    def watch(self, model: nn.Module) -> AbstractContextManager[list[Tensor]]:
        """Collect what `losses` needs while the model runs."""
        watches = {"block_ffn": record_logits, "sigma_moe": record_entropy}
        return watches[self.technique](model) if self.technique in watches else nullcontext([])

    def losses(self, seen: list[Tensor]) -> dict[str, Tensor]:
        """Return the technique's own losses by name, weighted; there may be none."""
        parts: dict[str, Callable[[Tensor], Tensor]] = {"locality": locality, "sparsification": chunk_sparsification}
        return {
            name: weight * torch.stack([parts[name](logits) if name in parts else logits for logits in seen]).mean()
            for name, weight in self.weights.items()
            if weight and seen
        }
