"""Depth: whole feed-forward or attention layers go, one by one, each time the one that the output misses least.

After 2SSP's second stage (https://arxiv.org/abs/2501.17771, attention) and FinerCut (https://arxiv.org/abs/2405.18218,
both kinds of layers; its output error is taken, its other metrics are not). A layer that goes adds nothing to the
residual stream any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.technique import (
    Changes,
    FFNReport,
    block_macs,
    evaluating,
    every_layer,
    listed,
    output_error,
    outputs_of,
    replace_module,
    require_types,
)
from zoo.profiling import count_params

__all__ = ["DepthConfig", "Nothing", "apply", "attention_removals", "removable", "restructure"]

Units = Literal["ffn", "attention", "both"]


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Which layers may go, and how many.

    Args:
        remove: Number of layers that go.
        units: "ffn", "attention" or "both".
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: `remove` is below 1, or `units` is unknown.
    """

    remove: int = 2
    units: Units = "ffn"
    pattern: str | None = None

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        if self.remove < 1:
            raise ValueError(f"remove is a number of layers, at least 1, got {self.remove}.")


class Nothing(nn.Module):
    """Adds nothing to the residual stream: zeros of the first input's shape.

    Shape:
        (..., C) -> (..., C), zeros.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(x)


def attention_removals(blocks: int, sparsity: float, ffn_params: int, attention_params: int, alpha: float = 1.5) -> int:
    """Return how many attention layers 2SSP removes: round(B s^((P_ffn / P_attention) / alpha)).

    Args:
        blocks: B.
        sparsity: s, share of all parameters of the blocks that go.
        ffn_params: Of one block's feed-forward layer.
        attention_params: Of one block's attention.
        alpha: The paper's 1.5.
    """
    return round(blocks * sparsity ** (ffn_params / attention_params / alpha))


def removable(model: nn.Module, units: Units = "ffn", pattern: str | None = None) -> dict[str, nn.Module]:
    """Return the layers that can go, by name: feed-forward layers, and attention layers named `attn` beside them.

    Raises:
        ValueError: There is none.
    """
    return _removable(model, every_layer(model, pattern)[0], units)


def _removable(model: nn.Module, ffns: Mapping[str, DenseFFN], units: Units) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, ffn in ffns.items():
        if not name or not ffn.whole or ffn.first_column or ffn.dim != ffn.out_dim:
            continue
        module = model.get_submodule(name)
        parent = name.rpartition(".")[0]
        attention = getattr(model.get_submodule(parent), "attn", None)
        if units != "ffn" and isinstance(attention, nn.Module) and not isinstance(attention, Nothing):
            found[f"{parent}.attn" if parent else "attn"] = attention
        if units != "attention":
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no {units} layer that can go: known are blocks with `attn`, `mlp`."
        )
    return found


def apply(model: nn.Module, config: DepthConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Remove whole layers of a model in place.

    Args:
        model: Trained, of timm.
        config: How.
        data: Batches of inputs, or of (inputs, labels); a few dozen samples: every choice runs them once a layer.

    Raises:
        ValueError: Fewer layers can go than asked for, data is missing, or it was done before.
    """
    config = config or DepthConfig()
    changes = Changes(model, "depth")
    ffns = every_layer(model, config.pattern)[0]
    layers = _removable(model, ffns, config.units)
    if config.remove > len(layers):
        raise ValueError(f"remove must be at most {len(layers)}, the layers that can go, got {config.remove}.")
    batches = listed(data, "Removing layers")
    with evaluating(model):
        outputs = outputs_of(model, batches)
    gone: list[str] = []
    for _ in range(config.remove):
        errors = {}
        for name, module in layers.items():
            if name not in gone:
                replace_module(model, name, Nothing())
                try:
                    errors[name] = output_error(model, batches, outputs)
                finally:
                    replace_module(model, name, module)
        best = min(errors, key=errors.__getitem__)
        replace_module(model, best, Nothing())
        gone.append(best)
    for name in (name for name in layers if name in gone):
        ffn = ffns.get(name)
        macs = ffn.macs() if ffn is not None else block_macs(layers[name])
        changes.add(name, "removed", (count_params(layers[name]), 0), (macs, 0))
    return changes.report(dict.fromkeys(gone, 0), output_error(model, batches, outputs))


def restructure(model: nn.Module, layers: Mapping[str, int]) -> None:
    """Take the same layers out of a dense model."""
    for name in layers:
        replace_module(model, name, Nothing())
