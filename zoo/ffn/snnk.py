"""SNNK: scalable neural network kernels in place of feed-forward layers, and as adapters.

Scalable Neural Network Kernels (ICLR 2024), https://arxiv.org/abs/2310.13225. The practical variant: features
relu(G x) / sqrt(m) with orthogonal blocks of random projections, whose inner products estimate the arc-cosine kernel.
Input and output products that meet a linear map are bundled into one matrix.
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
from zoo.ffn.regression import fit_layers
from zoo.ffn.technique import FFNReport, restructure_layers

__all__ = ["SNNK", "SNNKAdapter", "SNNKConfig", "apply", "orthogonal_projections", "restructure"]


@dataclass(frozen=True, kw_only=True)
class SNNKConfig:
    """How many features.

    Args:
        features: m; the paper has 8 to 128 for adapters.
        orthogonal: Projections in orthogonal blocks, which lowers the variance.
        ridge: Added to the normal equations, relative to their mean diagonal.
        seed: Of the projections.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range.
    """

    features: int = 256
    orthogonal: bool = True
    ridge: float = 1e-5
    seed: int = 0
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.features < 1 or self.ridge < 0:
            raise ValueError(f"features must be at least 1 and ridge not negative, got {self.features}, {self.ridge}.")


def orthogonal_projections(features: int, dim: int, generator: torch.Generator, orthogonal: bool = True) -> Tensor:
    """Return (m, D) Gaussian rows; in orthogonal blocks of D, each row with the length of a Gaussian one."""
    rows = torch.randn(features, dim, generator=generator)
    if not orthogonal:
        return rows
    lengths = rows.norm(dim=1, keepdim=True)
    blocks = [torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q for _ in range(math.ceil(features / dim))]
    return torch.cat(blocks)[:features] * lengths


class SNNK(nn.Module):
    """y = W relu(G x) / sqrt(m); G is a buffer, W is trained.

    Args:
        dim: Channels of x.
        out_dim: Channels of y.
        features: m.
        orthogonal: G in orthogonal blocks.
        seed: Of G.

    Shape:
        (..., dim) -> (..., out_dim).
    """

    projections: Tensor

    def __init__(self, dim: int, out_dim: int, features: int, orthogonal: bool = True, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("projections", orthogonal_projections(features, dim, generator, orthogonal))
        self.output = nn.Linear(features, out_dim)

    def phi(self, x: Tensor) -> Tensor:
        """Return the features (..., m)."""
        return F.relu(x @ self.projections.t()) / math.sqrt(len(self.projections))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.phi(x))

    @torch.no_grad()
    def bundle(self, following: nn.Linear) -> SNNK:
        """Return one layer that equals this one and a product behind it."""
        merged = SNNK(self.projections.shape[1], following.out_features, len(self.projections))
        merged.to(self.output.weight)
        merged.projections.copy_(self.projections)
        merged.output.weight.copy_(following.weight @ self.output.weight)
        bias = following.weight @ self.output.bias
        merged.output.bias.copy_(bias if following.bias is None else bias + following.bias)
        return merged

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.projections.numel() + self.output.weight.numel()


class SNNKAdapter(nn.Module):
    """y = x + SNNK(x), with an output that starts at zero: the identity.

    Args:
        dim: Channels C.
        features: m.
        seed: Of the projections.

    Shape:
        (..., C) -> (..., C).
    """

    def __init__(self, dim: int, features: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.layer = SNNK(dim, dim, features, seed=seed)
        nn.init.zeros_(self.layer.output.weight)
        nn.init.zeros_(self.layer.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def _build(ffn: DenseFFN, config: SNNKConfig) -> SNNK:
    return SNNK(ffn.dim, ffn.out_dim, config.features, config.orthogonal, config.seed)


def apply(model: nn.Module, config: SNNKConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Replace a trained model's feed-forward layers by fitted SNNKs, in place.

    Args:
        model: Of timm or diffusers.
        config: How many features.
        data: Batches of inputs, or of (inputs, labels).

    Raises:
        ValueError: A layer cannot be replaced, data is missing, or it was done before.
    """
    config = config or SNNKConfig()
    return fit_layers(
        model,
        "snnk",
        config.pattern,
        lambda ffn: _build(ffn, config),
        lambda layer, x: layer.phi(x),
        data,
        config.ridge,
        asdict(config),
        what=f"{config.features} random features",
    )


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, lambda ffn, facts: _build(ffn, SNNKConfig(**facts)))
