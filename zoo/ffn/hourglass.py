"""Hourglass FFN: a stack of wide-narrow-wide layers with residuals of their own, https://arxiv.org/abs/2602.06471.

u_0 = x, u_{i+1} = u_i + W2_i act(W1_i norm(u_i)), and the branch gives u_K - u_0, since the block adds x itself. The
paper is on language models; in vision nothing was published. Its models are gated; here they are plain (our reading).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.technique import FFNReport, replace_layers, restructure_layers

__all__ = ["HourglassConfig", "HourglassFFN", "apply", "restructure"]


@dataclass(frozen=True, kw_only=True)
class HourglassConfig:
    """How the layers are built.

    Args:
        layers: K; the paper's best is 4.
        ratio: Hidden over outer width; the paper's best is 0.4 to 0.6.
        norm: LayerNorm in front of every layer but the first, which the block has normalised.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range.
    """

    layers: int = 4
    ratio: float = 0.4
    norm: bool = True
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.layers < 1 or self.ratio <= 0:
            raise ValueError(f"layers must be at least 1 and ratio above 0, got {self.layers} and {self.ratio}.")


class HourglassFFN(nn.Module):
    """K narrow layers one after the other; their sum is what the block adds.

    Args:
        dim: Channels C.
        hidden_dim: Hidden channels of each layer.
        layers: K.
        norm: LayerNorms in front of all layers but the first.

    Shape:
        (..., C) -> (..., C).
    """

    def __init__(self, dim: int, hidden_dim: int, layers: int, norm: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm and i else nn.Identity() for i in range(layers))
        self.ups = nn.ModuleList(nn.Linear(dim, hidden_dim) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(hidden_dim, dim) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        u = x
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            u = u + down(F.gelu(up(norm(u))))
        return u - x

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return sum(layer.weight.numel() for layer in (*self.ups, *self.downs))  # type: ignore[misc, operator]


def _build(ffn: DenseFFN, config: HourglassConfig) -> HourglassFFN:
    if ffn.dim != ffn.out_dim:
        raise ValueError(f"it maps {ffn.dim} channels to {ffn.out_dim}, and residuals need as many")
    return HourglassFFN(ffn.dim, max(1, round(config.ratio * ffn.dim)), config.layers, config.norm)


def apply(model: nn.Module, config: HourglassConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Give a model hourglass layers with new weights, in place, to be trained from scratch.

    Args:
        model: Of timm or diffusers.
        config: How.
        data: Not used.

    Raises:
        ValueError: A layer cannot be replaced, or it was done before.
    """
    config = config or HourglassConfig()
    what = f"{config.layers} layers of ratio {config.ratio:g}"
    return replace_layers(model, "hourglass", config.pattern, lambda ffn, _: _build(ffn, config), asdict(config), what)


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, lambda ffn, facts: _build(ffn, HourglassConfig(**facts)))
