"""MatFormer: nested widths of feed-forward layers in one set of weights, https://arxiv.org/abs/2310.07707.

Width m uses the first m hidden channels of every layer: F_m(x) = W2[:, :m] act(W1[:m] x + b1[:m]) + b2. Training draws
a width a step (the paper, as public notes on it say) or sums the losses of all widths (the authors' released MatViT).
The state dict is that of the dense model.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN, keep_channels, set_hidden_dim
from zoo.ffn.importance import Scores, default_loss, score_channels
from zoo.ffn.technique import (
    Changes,
    FFNReport,
    amend_change,
    ffn_layers,
    forget_change,
    listed,
    note_change,
    require_types,
)
from zoo.profiling import count_params

__all__ = [
    "MatFormerConfig",
    "NestedLinear",
    "apply",
    "export_width",
    "mix_n_match",
    "restructure",
    "set_width",
    "training_widths",
]

Sampling = Literal["uniform", "sandwich", "all"]


@dataclass(frozen=True, kw_only=True)
class MatFormerConfig:
    """Which widths, and how training takes them.

    Args:
        widths: Shares of the hidden channels, rising, the last one 1 (the paper's eighths).
        sampling: Widths of a training step: "uniform", one drawn at random; "sandwich", the smallest, the largest and
            one between; "all".
        scores: In a trained model channels are first sorted by these scores, a permutation that changes no output.
            "random" leaves their order.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: The widths do not rise to 1, or a word is unknown.
    """

    widths: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    sampling: Sampling = "uniform"
    scores: Scores = "random"
    pattern: str | None = None

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        widths = tuple(self.widths)
        if not widths or widths[-1] != 1 or list(widths) != sorted(set(widths)) or widths[0] <= 0:
            raise ValueError(f"widths are shares that rise to 1, got {self.widths}.")


class NestedLinear(nn.Linear):
    """A product whose first rows or columns can be used alone; the weights are those of `nn.Linear`.

    Attributes:
        width: Hidden channels in use; None is all.
        axis: 0: they are outputs; 1: they are inputs.
        halves: Outputs are values and gates, one behind the other.
    """

    width: int | None
    axis: int
    halves: int

    def forward(self, x: Tensor) -> Tensor:
        if self.width is None:
            return F.linear(x, self.weight, self.bias)
        if self.axis == 1:
            return F.linear(x, self.weight[:, : self.width], self.bias)
        parts = [
            slice(start, start + self.width) for start in range(0, self.out_features, self.out_features // self.halves)
        ]
        weight: Tensor = torch.cat([self.weight[part] for part in parts]) if self.halves > 1 else self.weight[parts[0]]
        bias: Tensor | None = self.bias
        if bias is not None:
            bias = torch.cat([bias[part] for part in parts]) if self.halves > 1 else bias[parts[0]]
        return F.linear(x, weight, bias)


def apply(
    model: nn.Module,
    config: MatFormerConfig | None = None,
    data: Iterable[Any] | None = None,
    *,
    loss: Any = default_loss,
) -> FFNReport:
    """Make the widths of a model's feed-forward layers nested, in place; the model starts at full width.

    Args:
        model: Of timm or diffusers.
        config: Which widths.
        data: Batches for the scores.
        loss: Loss of a batch for the scores.

    Raises:
        ValueError: No layer is known, one is not divisible, it was done before, or scores lack data.
    """
    config = config or MatFormerConfig()
    changes = Changes(model, "matformer")
    ffns = ffn_layers(model, config.pattern, "linear")
    for name, ffn in ffns.items():
        _check(name, ffn, config.widths)
    if config.scores != "random":
        batches = listed(data, "Sorting channels")
        scores = score_channels(model, ffns, batches, method=config.scores, loss=loss)[0]
        for name, ffn in ffns.items():
            keep_channels(ffn, scores[name].argsort(descending=True, stable=True).cpu())
    facts = {name: {"width": 1.0} for name in ffns}
    restructure(model, facts)
    for name, ffn in ffns.items():
        widths = [round(width * ffn.hidden_dim) for width in config.widths]
        params = count_params(model.get_submodule(name))
        changes.add(name, f"widths {', '.join(map(str, widths))}", (params, params), (ffn.macs(), ffn.macs(widths[0])))
    return changes.report(facts)


def _check(name: str, ffn: DenseFFN, widths: Sequence[float]) -> None:
    if ffn.first_column:
        raise ValueError(f"{name} shares its second product with attention: widths are for layers of their own.")
    uneven = [width for width in widths if abs(width * ffn.hidden_dim - round(width * ffn.hidden_dim)) > 1e-6]
    if uneven:
        raise ValueError(f"{name} has {ffn.hidden_dim} hidden channels, of which {uneven[0]:g} is no whole number.")


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Turn the products of a dense model's layers into nested ones, in place; no weight changes."""
    ffns = ffn_layers(model, takes="linear")
    for name, facts in layers.items():
        ffn = ffns[name]
        share = facts["width"] if isinstance(facts, Mapping) else 1.0  # older files have the widths alone
        for product, axis in ((ffn.up, 0), (ffn.gate, 0), (ffn.down, 1)):
            if product is not None:
                product.__class__ = NestedLinear
                product.width, product.axis = _channels(ffn, share), axis  # type: ignore[assignment]
                product.halves = 2 if axis == 0 and ffn.packed is not None else 1  # type: ignore[assignment]


def _channels(ffn: DenseFFN, share: float) -> int | None:
    return None if share == 1 else max(1, round(share * ffn.down.in_features))


def _nested(model: nn.Module) -> dict[str, DenseFFN]:
    found = {name: ffn for name, ffn in ffn_layers(model, takes="linear").items() if isinstance(ffn.down, NestedLinear)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no nested widths: zoo.ffn.matformer.apply makes them.")
    return found


def set_width(model: nn.Module, width: float | Sequence[float]) -> None:
    """Use a share of the hidden channels in every layer, or one share a layer, saved with the model; no weight changes.

    Raises:
        ValueError: The model has no nested widths, the number of shares is not that of its layers, or a share is not
            above 0 and at most 1.
    """
    ffns = _nested(model)
    shares = [float(width)] * len(ffns) if isinstance(width, (int, float)) else [float(share) for share in width]
    if len(shares) != len(ffns):
        raise ValueError(f"One share a layer: {len(ffns)} are needed, got {len(shares)}.")
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"A width is a share of the hidden channels, above 0 and at most 1, got {share:g}.")
    for share, ffn in zip(shares, ffns.values(), strict=True):
        for product in ffn.products:
            if isinstance(product, NestedLinear):
                product.width = _channels(ffn, share)
    amend_change(model, "matformer", {name: {"width": share} for name, share in zip(ffns, shares, strict=True)})


def training_widths(config: MatFormerConfig) -> Iterator[float]:
    """Yield the widths of one training step; the losses at all of them are summed. Draws from Python's generator."""
    if config.sampling == "all":
        yield from config.widths
    elif config.sampling == "uniform":
        yield random.choice(config.widths)
    else:
        yield from sorted({config.widths[0], config.widths[-1], random.choice(config.widths)})


def mix_n_match(model: nn.Module, budget: float, widths: Sequence[float]) -> list[float]:
    """Return a width for every layer within a budget: never falling with depth, as even as can be (Mix'n'Match).

    Args:
        model: With nested widths.
        budget: Share of the full layers' multiply-accumulates, for layers of one shape.
        widths: Trained shares, rising.

    Raises:
        ValueError: The smallest width is above the budget; the message says it.
    """
    count = len(_nested(model))
    rising = sorted(widths)
    if rising[0] > budget + 1e-9:
        raise ValueError(f"No widths meet a budget of {budget:g}: the nearest that can is {rising[0]:g}.")
    below = max(width for width in rising if width <= budget + 1e-9)
    above = next((width for width in rising if width > budget + 1e-9), below)
    wide = 0 if above == below else int((budget - below) * count / (above - below) + 1e-9)
    return [below] * (count - wide) + [above] * wide


def export_width(model: nn.Module, width: float | Sequence[float] | None = None) -> None:
    """Cut the layers down to the widths in use, in place, into a plain dense model.

    With one share in all layers a stock timm model of this `mlp_ratio` loads the weights.

    Args:
        model: With nested widths.
        width: Set first, see `set_width`; None takes those that are set.
    """
    if width is not None:
        set_width(model, width)
    ffns = _nested(model)
    widths = {}
    for name, ffn in ffns.items():
        assert isinstance(ffn.down, NestedLinear)
        hidden = ffn.hidden_dim
        kept = hidden if ffn.down.width is None else ffn.down.width
        for product in ffn.products:
            product.__class__ = nn.Linear
            for attribute in ("width", "axis", "halves"):
                delattr(product, attribute)
        keep_channels(ffn, torch.arange(kept))
        set_hidden_dim(model.get_submodule(name), kept)
        widths[name] = kept
    forget_change(model, "matformer")
    note_change(model, "prune", widths)
