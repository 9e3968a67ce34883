"""VersatileFFN: one dense layer used in width, as overlapping experts, and in depth, as loops.

VersatileFFN, https://arxiv.org/abs/2512.14531, on language models. Width: windows of the hidden channels are experts,
chosen by a router. Depth: each token runs the layer 1 to L times. Both are fused by how deep a token is expected to go.
That gates are renormalised over the chosen windows, and that the norm inside the loop is one of the layer's own, are
readings of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.dense_ffn import ACTIVATIONS, DenseFFN
from zoo.ffn.technique import FFNReport, replace_layers, restructure_layers

__all__ = ["VersatileConfig", "VersatileFFN", "apply", "restructure", "set_temperature"]


@dataclass(frozen=True, kw_only=True)
class VersatileConfig:
    """How the layer is used.

    Args:
        windows: N, virtual experts.
        window: Their hidden channels as a share of all; N times it may be above 1, then windows overlap.
        top_k: Windows of a token.
        loops: L; the paper has 4.
        temperature: Of the Gumbel softmax at the start; the paper's falls from 5 to 0.1.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range.
    """

    windows: int = 8
    window: float = 0.125
    top_k: int = 2
    loops: int = 4
    temperature: float = 5.0
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.windows:
            raise ValueError(f"top_k must lie in 1 ... {self.windows} (windows), got {self.top_k}.")
        if not 0 < self.window <= 1 or self.loops < 1 or self.temperature <= 0:
            raise ValueError(
                f"window lies in 0 ... 1, loops is at least 1, temperature above 0: got {self.window}, {self.loops}, "
                f"{self.temperature}."
            )


class VersatileFFN(nn.Module):
    """A dense layer with a router for windows and one for loops; what the block adds to the residual stream.

    Args:
        dim: Channels C.
        hidden_dim: Hidden channels H.
        config: How.
        activation: Key of the activations of `zoo.ffn.dense_ffn`.
        bias: Products have biases.

    Shape:
        (..., C) -> (..., C).
    """

    def __init__(
        self, dim: int, hidden_dim: int, config: VersatileConfig, activation: str = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        self.config, self.activation, self.temperature = config, activation, config.temperature
        self.window = max(1, round(config.window * hidden_dim))
        count = config.windows
        stride = (hidden_dim - self.window) / (count - 1) if count > 1 else 0.0
        self.starts = [int(place * stride) for place in range(count)]
        self.up, self.down = nn.Linear(dim, hidden_dim, bias=bias), nn.Linear(hidden_dim, dim, bias=bias)
        self.norm = nn.LayerNorm(dim)
        self.router = nn.Linear(dim, count, bias=False)
        self.loop_router = nn.Linear(dim, config.loops, bias=False)

    def dense(self, x: Tensor) -> Tensor:
        """Return the dense layer's result."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))

    def width(self, x: Tensor) -> Tensor:
        """Return the chosen windows' sum, weighted; the output bias counts once."""
        logits = self.router(x)
        best = logits.topk(self.config.top_k, -1).indices
        gates = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best)).softmax(-1)
        hidden = ACTIVATIONS[self.activation](self.up(x))
        # windows share channels: a channel's weight is the sum of the gates of the windows that hold it
        share = torch.zeros_like(hidden)
        for place, start in enumerate(self.starts):
            share[..., start : start + self.window] += gates[..., place : place + 1]
        return self.down(hidden * share)

    def depth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the loops add, and the expected number of loops (..., 1)."""
        logits = self.loop_router(x)
        if self.training:
            p = F.gumbel_softmax(logits.float(), tau=self.temperature, hard=True).to(x.dtype)
        else:
            p = F.one_hot(logits.argmax(-1), self.config.loops).to(x.dtype)
        total, states = torch.zeros_like(x), x
        for loop in range(self.config.loops):
            states = states + self.dense(states if loop == 0 else self.norm(states))
            total = total + p[..., loop : loop + 1] * (states - x)
        expected = p @ torch.arange(1, self.config.loops + 1, device=x.device, dtype=x.dtype)
        return total, expected.unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        deep, expected = self.depth(x)
        share = (self.config.loops - expected) / self.config.loops
        return share * self.width(x) + (1 - share) * deep

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token as computed here: all loops and the width path."""
        once = self.up.weight.numel() + self.down.weight.numel()
        return (self.config.loops + 1) * once + self.router.weight.numel() + self.loop_router.weight.numel()


def set_temperature(model: nn.Module, progress: float, first: float = 5.0, last: float = 0.1) -> None:
    """Set the Gumbel temperature of all layers: exponential from `first` to `last` over progress 0 ... 1."""
    for module in model.modules():
        if isinstance(module, VersatileFFN):
            module.temperature = first * (last / first) ** min(1.0, max(0.0, progress))


def _build(ffn: DenseFFN, config: VersatileConfig) -> VersatileFFN:
    if ffn.gated or ffn.dim != ffn.out_dim:
        raise ValueError("it is gated or changes the number of channels")
    layer = VersatileFFN(ffn.dim, ffn.hidden_dim, config, ffn.activation, ffn.up.bias is not None)
    layer.up.load_state_dict(ffn.up.state_dict())
    with torch.no_grad():
        layer.down.weight.copy_(ffn.down.weight)
        if layer.down.bias is not None and ffn.down.bias is not None:
            layer.down.bias.copy_(ffn.down.bias)
    return layer


def apply(model: nn.Module, config: VersatileConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Use a model's layers in width and depth, in place, with their weights; the paper trains on from there.

    Args:
        model: Of timm or diffusers.
        config: How.
        data: Not used.

    Raises:
        ValueError: A layer cannot be replaced, or it was done before.
    """
    config = config or VersatileConfig()
    what = f"{config.windows} windows, up to {config.loops} loops"
    return replace_layers(model, "versatile", config.pattern, lambda ffn, _: _build(ffn, config), asdict(config), what)


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, lambda ffn, facts: _build(ffn, VersatileConfig(**facts)))
