"""FreqNet's frequency layer in place of feed-forward layers.

Frequency-Aware Deepfake Detection (FreqNet, AAAI 2024), https://arxiv.org/abs/2403.07240: amplitude and phase of a
map's spectrum go through convolutions of their own and back. Only the abstract and public notes on it were read;
expansion, the handling of class tokens and the small offset that keeps the phase's gradient finite are ours.
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

__all__ = ["FreqNetConfig", "FrequencyFFN", "FrequencyLayer", "apply", "restructure"]


@dataclass(frozen=True, kw_only=True)
class FreqNetConfig:
    """How the layers are built.

    Args:
        prefix_tokens: Class and register tokens in front of the patches; they go through a product of their own.
        activation: ReLU on the new amplitudes.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: `prefix_tokens` is negative.
    """

    prefix_tokens: int = 1
    activation: bool = True
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.prefix_tokens < 0:
            raise ValueError(f"prefix_tokens must not be negative, got {self.prefix_tokens}.")


class FrequencyLayer(nn.Module):
    """Convolve amplitude and phase of a map's spectrum, each on its own (FCL); computed in float32.

    Args:
        dim: Channels C.
        activation: ReLU on the new amplitudes.

    Shape:
        (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, dim: int, activation: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.amplitude, self.phase = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.amplitude.weight.dtype
        spectrum = torch.fft.fft2(x.float(), norm="ortho") + 1e-8
        amplitude = self.amplitude(spectrum.abs().to(kept)).float()
        phase = self.phase(spectrum.angle().to(kept)).float()
        if self.activation:
            amplitude = F.relu(amplitude)
        return torch.fft.ifft2(torch.polar(amplitude, phase), norm="ortho").real.to(x.dtype)


class FrequencyFFN(nn.Module):
    """The frequency layer on the square map of a transformer's patches.

    Args:
        dim: Channels C.
        prefix_tokens: Tokens in front of the patches.
        activation: ReLU on the new amplitudes.

    Shape:
        (B, prefix + H * H, C) -> the same.
    """

    def __init__(self, dim: int, prefix_tokens: int, activation: bool = True) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.layer = FrequencyLayer(dim, activation)
        self.prefix = nn.Linear(dim, dim) if prefix_tokens else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, self.prefix_tokens :]
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(
                f"The patches must be a square map behind {self.prefix_tokens} tokens, got {x.shape[1]} tokens."
            )
        y = self.layer(tokens.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        return y if self.prefix is None else torch.cat([self.prefix(x[:, : self.prefix_tokens]), y], 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the products for one patch; transforms are not counted."""
        return self.layer.amplitude.weight.numel() + self.layer.phase.weight.numel()


def _build(ffn: DenseFFN, config: FreqNetConfig) -> FrequencyFFN:
    if ffn.dim != ffn.out_dim:
        raise ValueError(f"it maps {ffn.dim} channels to {ffn.out_dim}, and as many are needed")
    return FrequencyFFN(ffn.dim, config.prefix_tokens, config.activation)


def apply(model: nn.Module, config: FreqNetConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Give a model frequency layers with new weights, in place, to be trained.

    Args:
        model: Transformer of timm or diffusers on square maps.
        config: How.
        data: Not used.

    Raises:
        ValueError: A layer cannot be replaced, or it was done before.
    """
    config = config or FreqNetConfig(prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)))
    return replace_layers(
        model, "freqnet", config.pattern, lambda ffn, _: _build(ffn, config), asdict(config), "frequency layer"
    )


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, lambda ffn, facts: _build(ffn, FreqNetConfig(**facts)))
