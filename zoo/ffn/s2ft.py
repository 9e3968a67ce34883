"""Sparse fine-tuning: some hidden channels of every feed-forward layer learn, all other weights stay.

S2FT (NeurIPS 2024, https://openreview.net/forum?id=lEUle8S4xQ) chooses channels of coupled structures, brings them
together and trains the dense slice. Its abstract and repository page were read, not its selection study; here the
slice is a matrix beside the frozen product, which starts at zero and merges into it exactly. That columns of the second
product learn ("down") is the default; "both" adds the rows that make the channels. Attention's heads, which the paper
tunes too, are left out.

PAT (https://arxiv.org/abs/2408.14721; abstract and authors' code were read) is left out: it masks channels of the
residual stream in all layers at once, none of a feed-forward layer's own, and only RMSNorm, after a factor, does not
notice when they are cut out. A LayerNorm, which vision models have, takes another mean over fewer channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.prune import PruneConfig, PruneScores, channel_scores
from zoo.ffn.technique import (
    Changes,
    FFNReport,
    ffn_layers,
    forget_change,
    listed,
    replace_kind,
    replace_module,
    require_types,
)

__all__ = ["S2FTConfig", "SliceLinear", "apply", "merge", "restructure"]

SliceScores = Literal["random", "activation", "idle", "magnitude", "cfsp", "obs", "taylor"]
Slice = Literal["down", "both"]


@dataclass(frozen=True, kw_only=True)
class S2FTConfig:
    """Which channels learn.

    Args:
        share: Of the hidden channels of every layer, above 0 and at most 1.
        scores: "random"; "activation": those with the largest activations on the data; "idle": the smallest;
            "magnitude": the largest weights in the second product; "cfsp", "obs", "taylor": see `PruneConfig`.
        slice: "down": columns of the second product; "both": also the rows of the first.
        pattern: Only layers whose name matches this regular expression.
        seed: Of the random choice.

    Raises:
        ValueError: `share` is out of range, or a word is unknown.
    """

    share: float = 0.05
    scores: SliceScores = "random"
    slice: Slice = "down"
    pattern: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        if not 0 < self.share <= 1:
            raise ValueError(f"share is of the hidden channels, above 0 and at most 1, got {self.share}.")


class SliceLinear(nn.Module):
    """y = dense(x) + a learned change of some columns, or of some rows, of its weight.

    Args:
        dense: The product; frozen.
        count: Channels that learn.
        rows: They are outputs; otherwise inputs.

    Shape:
        (..., in_features) -> (..., out_features).
    """

    channels: Tensor

    def __init__(self, dense: nn.Linear, count: int, rows: bool = False) -> None:
        super().__init__()
        self.dense, self.rows = dense.requires_grad_(False), rows
        self.in_features, self.out_features = dense.in_features, dense.out_features
        kind: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        shape = (count, dense.in_features) if rows else (dense.out_features, count)
        self.change = nn.Parameter(torch.zeros(shape, **kind))
        self.register_buffer("channels", torch.zeros(count, dtype=torch.int64, device=kind["device"]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x)
        if self.rows:
            return y.index_add(-1, self.channels, F.linear(x, self.change).to(y.dtype))
        return y + F.linear(x.index_select(-1, self.channels), self.change)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Return one product with the same result."""
        self.dense.weight.index_add_(0 if self.rows else 1, self.channels, self.change)
        return self.dense

    def extra_repr(self) -> str:
        return f"{len(self.channels)} {'rows' if self.rows else 'columns'} learn"


def apply(model: nn.Module, config: S2FTConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Freeze a model but for channels of its feed-forward layers, in place; its output stays as it is.

    A new head, and all else that shall learn, is set with `requires_grad_(True)` afterwards.

    Args:
        model: Trained.
        config: How.
        data: Batches of inputs, or of (inputs, labels), for "activation" and "idle".

    Raises:
        ValueError: No layer is known, data is missing, or it was done before.
    """
    config = config or S2FTConfig()
    changes = Changes(model, "s2ft")
    ffns = ffn_layers(model, config.pattern, "linear")
    scores = _scores(model, ffns, config, data)
    names = {id(module): name for name, module in model.named_modules()}
    facts: dict[str, Any] = {}
    model.requires_grad_(False)
    for layer, ffn in ffns.items():
        hidden, params = ffn.hidden_dim, ffn.num_parameters
        count = max(1, math.ceil(config.share * hidden))
        chosen = scores[layer].argsort(descending=True, stable=True)[:count].sort().values
        columns = chosen + ffn.first_column
        halves = torch.cat([chosen, chosen + hidden]) if ffn.packed is not None else chosen
        ups = [part for part in (ffn.up, ffn.gate) if part is not None] if config.slice == "both" else []
        added = 0
        for part, channels, rows in [(ffn.down, columns, False), *((up, halves, True) for up in ups)]:
            name = names[id(part)]
            sliced = SliceLinear(part, len(channels), rows)
            sliced.channels.copy_(channels)
            replace_module(model, name, sliced)
            facts[name] = {"count": len(channels), "rows": rows}
            added += sliced.change.numel()
        what = f"{count} of {hidden} channels learn"
        changes.add(layer, what, (params, params + added), (ffn.macs(), ffn.macs() + added))
    return changes.report(facts)


def _scores(
    model: nn.Module, ffns: Mapping[str, DenseFFN], config: S2FTConfig, data: Iterable[Any] | None
) -> dict[str, Tensor]:
    if config.scores == "magnitude":
        return {name: ffn.channels().down.float().norm(dim=0).cpu() for name, ffn in ffns.items()}
    method: PruneScores = "activation" if config.scores == "idle" else config.scores
    pruning = PruneConfig(scores=method, compensation="none", seed=config.seed)
    batches = listed(data, "Choosing channels by activation") if pruning.needs_data else []
    scores = channel_scores(model, ffns, pruning, batches)
    return {name: -score for name, score in scores.items()} if config.scores == "idle" else scores


def merge(model: nn.Module) -> list[str]:
    """Add what was learned to the dense weights, in place: the model has its own form and keys again.

    What `apply` has frozen stays frozen: `model.requires_grad_(True)` lets all learn on.

    Returns:
        Names of the products.
    """
    found = replace_kind(model, SliceLinear, SliceLinear.merge)
    forget_change(model, "s2ft")
    return found


def restructure(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Put changes of as many channels beside the products; weights are loaded after."""
    for name, facts in layers.items():
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        replace_module(model, name, SliceLinear(dense, int(facts["count"]), bool(facts["rows"])))
