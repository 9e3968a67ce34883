"""MoFME: experts that only modulate one shared layer, for restoration networks.

Efficient Mixture of Feature Modulation Experts (AAAI 2024), https://arxiv.org/abs/2312.16610. Base u = gelu(A x) * (B
x); expert i is (Gamma_i u) * u + Beta_i u; the sum over the chosen experts goes through a small network. The
uncertainty of the router is ours: the released code's samples are identical and its calibrated weights average to
zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.technique import FFNReport, replace_layers, restructure_layers

__all__ = ["MoFMEConfig", "MoFMEFFN", "apply", "restructure"]


@dataclass(frozen=True, kw_only=True)
class MoFMEConfig:
    """How the experts are built and chosen.

    Args:
        experts: N; the paper has 4, 8 or 16.
        top_k: Experts of a token; the paper has 2 or 4.
        ratio: Hidden over outer width of the network behind the experts.
        samples: Dropout samples of the router's logits in training; 1 is a plain router.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range.
    """

    experts: int = 4
    top_k: int = 2
    ratio: float = 4.0
    samples: int = 5
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k must lie in 1 ... {self.experts} (experts), got {self.top_k}.")
        if self.ratio <= 0 or self.samples < 1:
            raise ValueError(f"ratio must be above 0 and samples at least 1, got {self.ratio} and {self.samples}.")


class MoFMEFFN(nn.Module):
    """One shared layer, N modulations of it, a router, and a network behind them.

    Args:
        dim: Channels C.
        hidden_dim: Hidden channels of the network behind.
        experts: N.
        top_k: Experts of a token.
        samples: Of the router's logits in training.

    Shape:
        (..., C) -> (..., C).
    """

    def __init__(self, dim: int, hidden_dim: int, experts: int, top_k: int, samples: int = 5) -> None:
        super().__init__()
        self.top_k, self.samples = top_k, samples
        self.gate, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.empty(experts, dim, dim))
        self.beta = nn.Parameter(torch.empty(experts, dim, dim))
        self.gamma_bias = nn.Parameter(torch.ones(experts, dim))
        self.beta_bias = nn.Parameter(torch.zeros(experts, dim))
        for weight in (self.gamma, self.beta):
            nn.init.normal_(weight, std=0.02)
        self.router = nn.Linear(dim, experts)
        self.adaptor = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))

    def weights(self, x: Tensor) -> Tensor:
        """Return the experts' weights (..., N): not negative, 0 for those that are not chosen, 1 in all."""
        if self.training and self.samples > 1:
            logits = torch.stack([self.router(F.dropout(x, 0.1)) for _ in range(self.samples)])
            logits = logits.mean(0) / torch.sqrt(1 + math.pi / 8 * logits.var(0))
        else:
            logits = self.router(x)
        best = logits.topk(self.top_k, -1).indices
        chosen = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
        return chosen.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights(x)
        u = F.gelu(self.gate(x)) * self.value(x)
        # the sum over experts of their modulations is one modulation a token
        scale = torch.einsum("...n,nij,...j->...i", w, self.gamma, u) + w @ self.gamma_bias
        shift = torch.einsum("...n,nij,...j->...i", w, self.beta, u) + w @ self.beta_bias
        return self.adaptor(scale * u + shift)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token, with its chosen experts."""
        dim = self.gate.in_features
        behind = sum(layer.weight.numel() for layer in self.adaptor if isinstance(layer, nn.Linear))
        return 2 * dim * dim + self.router.weight.numel() + 2 * self.top_k * dim * dim + behind


def _build(ffn: DenseFFN, config: MoFMEConfig) -> MoFMEFFN:
    if ffn.dim != ffn.out_dim:
        raise ValueError(f"it maps {ffn.dim} channels to {ffn.out_dim}, and as many are needed")
    return MoFMEFFN(ffn.dim, round(config.ratio * ffn.dim), config.experts, config.top_k, config.samples)


def apply(model: nn.Module, config: MoFMEConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Give a model layers of modulated experts with new weights, in place, to be trained.

    Args:
        model: Of timm or diffusers.
        config: How.
        data: Not used.

    Raises:
        ValueError: A layer cannot be replaced, or it was done before.
    """
    config = config or MoFMEConfig()
    what = f"{config.experts} modulations, {config.top_k} a token"
    return replace_layers(model, "mofme", config.pattern, lambda ffn, _: _build(ffn, config), asdict(config), what)


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, lambda ffn, facts: _build(ffn, MoFMEConfig(**facts)))
