"""sigma-MoE: many small experts, chosen and weighted by sigmoids, in the place of a feed-forward layer.

Approximating Two-Layer Feedforward Networks for Efficient Transformers (Findings of EMNLP 2023),
https://arxiv.org/abs/2310.10837. Read were the abstract and the authors' code, https://github.com/RobertCsordas/moe_layer
(MIT), not the paper's text: y = sum over the k largest of sigmoid(w_i x) F_i(x), gates not renormalised; in training
each token loses each expert at a rate before it chooses; products start as those of a dense layer of as many channels;
`zoo.moe.entropy_loss` keeps the batch from using few experts. Ours: the dense layer's activation, gates and biases
are kept (the authors' layer has ReLU and no biases by default), and its hidden channels are shared out evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.technique import FFNReport, replace_layers, require_types, restructure_layers
from zoo.moe.experts import MoEFFN
from zoo.moe.router import Router

__all__ = ["SigmaMoEConfig", "SigmaRouter", "apply", "restructure"]

Start = Literal["new", "channels"]


@dataclass(frozen=True, kw_only=True)
class SigmaMoEConfig:
    """How the experts are built and chosen.

    Args:
        experts: n, which share the dense layer's hidden channels evenly.
        top_k: Experts of a token.
        dropout: Rate at which a token cannot choose an expert in training; the authors' 0.05.
        start: "new": weights as those of a new dense layer; "channels": those of the layer, the second product twice as
            large, since gates start near 1/2: with all experts on, a router of zeros is the dense layer.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range, or `start` is unknown.
    """

    experts: int = 16
    top_k: int = 4
    dropout: float = 0.05
    start: Start = "new"
    pattern: str | None = None

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k must lie in 1 ... {self.experts} (experts), got {self.top_k}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a rate of at least 0 and below 1, got {self.dropout}.")


class SigmaRouter(Router):
    """Choose k of n experts for every token, each with the weight sigmoid(w_i x).

    Args:
        dim: Channels of a token.
        experts: n.
        dropout: Rate at which a token cannot choose an expert in training. What it chooses for want of others weighs 0.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        As `Router`; the logits are those without dropout.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, experts, gate="sigmoid", device=device, dtype=dtype)
        self.dropout = dropout

    @torch.no_grad()
    def reset_parameters(self, scale: float = 1.0) -> None:
        """Draw directions of equal length, whose values have a standard deviation of scale / sqrt(dim)."""
        nn.init.normal_(self.weight)
        self.weight.mul_(scale / self.weight.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = allowed = self.logits(x)
        if self.training and self.dropout > 0:
            allowed = logits.masked_fill(torch.rand_like(logits) < self.dropout, -torch.inf)
        index = self._largest(allowed, k)
        return torch.sigmoid(allowed.gather(1, index)), index, logits


def _build(ffn: DenseFFN, config: SigmaMoEConfig, layers: int) -> MoEFFN:
    if ffn.hidden_dim % config.experts:
        fitting = [count for count in range(config.top_k, ffn.hidden_dim + 1) if ffn.hidden_dim % count == 0]
        near = min(fitting or [1], key=lambda count: abs(count - config.experts))
        raise ValueError(f"{ffn.hidden_dim} channels are not shared evenly among {config.experts} experts; {near} fit")
    moe = MoEFFN.from_dense(ffn, shared_dim=0, experts=config.experts, top_k=config.top_k, gate="sigmoid")
    kept = moe.experts_up
    moe.router = SigmaRouter(ffn.dim, config.experts, config.dropout, device=kept.device, dtype=kept.dtype)
    scale = math.sqrt(2 / layers)  # the authors', of networks with norms in front
    moe.router.reset_parameters(scale)
    with torch.no_grad():
        if config.start == "channels":
            moe.experts_down.mul_(2)
            return moe
        nn.init.normal_(moe.experts_up, std=scale * ffn.dim**-0.5)
        nn.init.normal_(moe.experts_down, std=scale * ffn.hidden_dim**-0.5)
        for bias in (moe.experts_up_bias, moe.shared_down.bias):
            if bias is not None:
                bias.zero_()
    return moe


def apply(model: nn.Module, config: SigmaMoEConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Give a model sigma-MoE layers with as many hidden channels in all, in place, to be trained.

    Add `zoo.moe.entropy_loss` of the routers to the loss, which `zoo.moe.record_entropy` collects; the authors' weight
    is 0.001. `zoo.moe.set_top_k` and `record_routing` work as on other mixtures.

    Args:
        model: Of timm or diffusers.
        config: How.
        data: Not used.

    Raises:
        ValueError: A layer cannot be divided (the message names it and a number that fits), or it was done before.
    """
    config = config or SigmaMoEConfig()
    what = f"{config.experts} experts, {config.top_k} a token, sigmoid gates"
    return replace_layers(
        model, "sigma_moe", config.pattern, lambda ffn, layers: _build(ffn, config, layers), asdict(config), what
    )


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, _rebuild)


def _rebuild(ffn: DenseFFN, facts: Mapping[str, Any]) -> MoEFFN:
    experts = facts["experts"]
    config = {name: fact for name, fact in facts.items() if name not in ("kept", "pruned", "top_k")}
    layer = _build(ffn, SigmaMoEConfig(**config, top_k=1), 1)
    kept = facts.get("kept", experts - facts.get("pruned", 0))  # by zoo.moe.prune_experts; "kept" in older files
    if kept < experts:
        layer.keep_experts(torch.arange(kept))
    layer.set_top_k(facts["top_k"])  # any number, by zoo.moe.set_top_k
    return layer
