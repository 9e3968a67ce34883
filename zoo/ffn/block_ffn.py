"""BlockFFN: fine-grained experts chosen by ReLU, with losses that make neighbours choose alike.

BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation Sparsity (COLM 2025),
https://arxiv.org/abs/2507.08771, on language models. Ours: the bias of the router, which lets a dense layer be the
start; neighbours of image patches to the right and below; chunks that are runs of tokens. The slope of the locality
loss was not read in the paper: 10.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.dense_ffn import ACTIVATIONS, DenseFFN
from zoo.ffn.technique import FFNReport, replace_layers, restructure_layers

__all__ = [
    "BlockFFN",
    "BlockFFNConfig",
    "apply",
    "chunk_level_sparsity",
    "chunk_sparsification",
    "locality",
    "record_logits",
    "restructure",
    "token_level_sparsity",
]


@dataclass(frozen=True, kw_only=True)
class BlockFFNConfig:
    """How a dense layer is divided.

    Args:
        expert_dim: Hidden channels of an expert; the paper has 64 to 128.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: `expert_dim` is below 1.
    """

    expert_dim: int = 64
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.expert_dim < 1:
            raise ValueError(f"expert_dim must be at least 1, got {self.expert_dim}.")


class BlockFFN(nn.Module):
    """y = sum_i A_i E_i(x), A = RMSNorm(relu(W_r x + b_r)), E_i(x) = W_down,i act(W_up,i x).

    Args:
        dim: Channels C.
        hidden_dim: Hidden channels of all experts.
        out_dim: Channels of the output.
        experts: N; divides `hidden_dim`.
        activation: Key of the activations of `zoo.ffn.dense_ffn`.
        bias: Products have biases.

    Shape:
        (..., C) -> (..., out_dim).
    """

    def __init__(
        self, dim: int, hidden_dim: int, out_dim: int, experts: int, activation: str = "silu", bias: bool = True
    ) -> None:
        super().__init__()
        self.experts, self.activation = experts, activation
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, out_dim, bias=bias)
        self.router = nn.Linear(dim, experts)
        self.gain = nn.Parameter(torch.ones(experts))

    def logits(self, x: Tensor) -> Tensor:
        """Return the router's values before ReLU, (..., N)."""
        return self.router(x)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.logits(x)
        weights = F.rms_norm(F.relu(raw), (self.experts,), self.gain, eps=1e-6)
        hidden = ACTIVATIONS[self.activation](self.up(x)).unflatten(-1, (self.experts, -1))
        return self.down((hidden * weights.unsqueeze(-1)).flatten(-2))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token that activates all experts."""
        return self.up.weight.numel() + self.down.weight.numel() + self.router.weight.numel()


def _build(ffn: DenseFFN, config: BlockFFNConfig) -> BlockFFN:
    if ffn.gated:
        raise ValueError("it is gated, and gates would undo the router's zeros")
    if ffn.hidden_dim % config.expert_dim:
        fitting = [width for width in range(8, ffn.hidden_dim + 1, 8) if ffn.hidden_dim % width == 0]
        near = min(fitting or [ffn.hidden_dim], key=lambda width: abs(width - config.expert_dim))
        raise ValueError(f"{ffn.hidden_dim} channels are no whole experts of {config.expert_dim}; {near} fits")
    experts = ffn.hidden_dim // config.expert_dim
    layer = BlockFFN(ffn.dim, ffn.hidden_dim, ffn.out_dim, experts, ffn.activation, ffn.up.bias is not None)
    with torch.no_grad():
        layer.router.weight.zero_()  # equal positive values: RMSNorm makes all weights 1, the dense layer
        layer.router.bias.fill_(1.0)
        layer.up.load_state_dict(ffn.up.state_dict())
        layer.down.weight.copy_(ffn.down.weight)
        if layer.down.bias is not None:
            layer.down.bias.copy_(ffn.down.bias) if ffn.down.bias is not None else layer.down.bias.zero_()
    return layer


def apply(model: nn.Module, config: BlockFFNConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Divide a model's layers into experts that are all on, in place: the same output until it is trained.

    Args:
        model: Of timm or diffusers.
        config: How.
        data: Not used.

    Raises:
        ValueError: A layer cannot be divided (the message names it and a width that fits), or it was done before.
    """
    config = config or BlockFFNConfig()
    what = f"experts of {config.expert_dim} channels, chosen by ReLU"
    return replace_layers(model, "block_ffn", config.pattern, lambda ffn, _: _build(ffn, config), asdict(config), what)


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, lambda ffn, facts: _build(ffn, BlockFFNConfig(**facts)))


@contextmanager
def record_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the routers' values before ReLU, (B, T, N) of every layer that runs, for the losses."""
    seen: list[Tensor] = []
    routers = [module.router for module in model.modules() if isinstance(module, BlockFFN)]
    handles = [router.register_forward_hook(lambda _, args, output: seen.append(output)) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def locality(logits: Tensor, grid: tuple[int, int] | None = None, alpha: float = 10.0) -> Tensor:
    """Return the activation locality loss: cross entropy of a token's activity against its neighbours'.

    Args:
        logits: (B, T, N) before ReLU.
        grid: Height and width of the patches, which are the last tokens; None: the neighbour is the next token.
        alpha: Slope of the sigmoid that makes activities of logits.
    """
    activity = torch.sigmoid(alpha * logits)

    def difference(a: Tensor, b: Tensor) -> Tensor:
        return F.binary_cross_entropy(a.clamp(1e-6, 1 - 1e-6), b.detach())

    if grid is None:
        return difference(activity[:, :-1], activity[:, 1:])
    height, width = grid
    patches = activity[:, activity.shape[1] - height * width :].unflatten(1, grid)
    return (difference(patches[:, :, :-1], patches[:, :, 1:]) + difference(patches[:, :-1], patches[:, 1:])) / 2


def chunk_sparsification(logits: Tensor, chunk: int = 8) -> Tensor:
    """Return the mean probability that an expert is active in a chunk of tokens: 1 - prod_k (1 - p_ik).

    Args:
        logits: (B, T, N) before ReLU; p is relu(logits), divided by its sum over experts.
        chunk: L, tokens of a chunk, at most all; tokens that are left over at the end are left out.
    """
    chunk = min(chunk, logits.shape[1])
    active = F.relu(logits)
    p = active / active.sum(-1, keepdim=True).clamp_min(1e-12)
    tokens = p.shape[1] // chunk * chunk
    kept = 1 - (1 - p[:, :tokens].unflatten(1, (-1, chunk))).prod(2)
    return kept.mean()


def token_level_sparsity(logits: Tensor) -> float:
    """Return the mean share of experts that a token leaves off."""
    return float((logits <= 0).float().mean())


def chunk_level_sparsity(logits: Tensor, chunk: int = 8) -> float:
    """Return the mean share of experts that all tokens of a chunk leave off."""
    chunk = min(chunk, logits.shape[1])
    tokens = logits.shape[1] // chunk * chunk
    return float((logits[:, :tokens].unflatten(1, (-1, chunk)) <= 0).all(2).float().mean())
