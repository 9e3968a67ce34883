"""EUGens: a feed-forward layer as products of random projections, fitted by ridge regression.

EUGens (NeurIPS 2025), https://arxiv.org/abs/2601.22563. Features of order i are elementwise products of i projections
of [x; 1; |x|]. With the projections fixed the layer is linear in its output matrix, so that it is fitted to a trained
layer in closed form, without storing activations; afterwards all of it can be trained. The paper replaces one product
and its activation; the whole layer is replaced here, the other way it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.regression import fit_layers
from zoo.ffn.technique import FFNReport, restructure_layers

__all__ = ["EUGen", "EUGensConfig", "apply", "restructure"]


@dataclass(frozen=True, kw_only=True)
class EUGensConfig:
    """How many features.

    Args:
        features: m, of each order; the paper has 32 to 128.
        order: k; the paper has at most 2.
        ridge: Added to the normal equations, relative to their mean diagonal.
        seed: Of the projections.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range.
    """

    features: int = 64
    order: int = 2
    ridge: float = 1e-5
    seed: int = 0
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.features < 1 or self.order < 0 or self.ridge < 0:
            given = f"{self.features}, {self.order}, {self.ridge}"
            raise ValueError(f"features must be at least 1, order and ridge not negative, got {given}.")


class EUGen(nn.Module):
    """y = W phi(x), phi = [1, G_1 x+, (G_1 x+)(G_2 x+), ...] with x+ = [x; 1; |x|].

    Args:
        dim: Channels of x.
        out_dim: Channels of y.
        features: m, of each order.
        order: k.
        seed: Of the projections, which can be trained.

    Shape:
        (..., dim) -> (..., out_dim).
    """

    def __init__(self, dim: int, out_dim: int, features: int, order: int, seed: int = 0) -> None:
        super().__init__()
        self.order, self.features = order, features
        count = order * (order + 1) // 2
        generator = torch.Generator().manual_seed(seed)
        scale = (dim + 2) ** -0.5
        self.projections = nn.Parameter(scale * torch.randn(count, features, dim + 2, generator=generator))
        self.output = nn.Linear(order * features, out_dim)

    def phi(self, x: Tensor) -> Tensor:
        """Return the features (..., k m), without the constant, which is the output's bias."""
        ones = torch.ones_like(x[..., :1])
        extended = torch.cat([x, ones, x.norm(dim=-1, keepdim=True)], -1)
        parts, start = [], 0
        for order in range(1, self.order + 1):
            product = extended @ self.projections[start].t()
            for place in range(start + 1, start + order):
                product = product * (extended @ self.projections[place].t())
            parts.append(product)
            start += order
        return torch.cat(parts, -1) if parts else x[..., :0]

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.phi(x))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.projections.numel() + self.output.weight.numel()


def _build(ffn: DenseFFN, config: EUGensConfig) -> EUGen:
    return EUGen(ffn.dim, ffn.out_dim, config.features, config.order, config.seed)


def apply(model: nn.Module, config: EUGensConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Replace a trained model's feed-forward layers by fitted EUGens, in place.

    Args:
        model: Of timm or diffusers.
        config: How many features.
        data: Batches of inputs, or of (inputs, labels).

    Raises:
        ValueError: A layer cannot be replaced, data is missing, or it was done before.
    """
    config = config or EUGensConfig()
    what = f"{config.features} features of {config.order} orders"
    return fit_layers(
        model,
        "eugens",
        config.pattern,
        lambda ffn: _build(ffn, config),
        lambda layer, x: layer.phi(x),
        data,
        config.ridge,
        asdict(config),
        what=what,
    )


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, lambda ffn, facts: _build(ffn, EUGensConfig(**facts)))
