"""Product-key memory: a very wide feed-forward layer of which a token finds its few best channels without trying all.

Large Memory Layers with Product Keys (NeurIPS 2019), https://arxiv.org/abs/1907.05242, authors' code
https://github.com/facebookresearch/XLM. Key (i, j) of n * n is the i-th first half beside the j-th second half, so that
its score is a sum, and the k best pairs are among the k best of each half. `scores="relu"` is the improved memory of
Approximating Two-Layer Feedforward Networks (https://arxiv.org/abs/2310.10837, authors' code
https://github.com/RobertCsordas/moe): ReLU in the place of a softmax over the chosen, no bias in the query, and a start
as that of a dense layer of n * n channels, one of three in the code; which one the paper reports was not read. Both
papers are on language models; their code was read, not their texts. The memory has no output bias.
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

__all__ = ["ProductKeyConfig", "ProductKeyMemory", "apply", "restructure"]

Scores = Literal["relu", "softmax"]


@dataclass(frozen=True, kw_only=True)
class ProductKeyConfig:
    """How large the memories are, and how they are read.

    Args:
        keys: n, half keys of each kind: n * n values. None: as many as fit into the dense layer's parameters.
        top_k: Values of a token and head; both papers' 32.
        heads: Each has a query and keys of its own; values are shared.
        key_dim: Channels of a query, even; None: those of the layer.
        scores: What weighs the values: "relu", or "softmax" over the chosen ones, as in the first paper.
        batch_norm: BatchNorm behind the query, with which the first paper's memories use more of their values.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range, or `scores` is unknown.
    """

    keys: int | None = None
    top_k: int = 32
    heads: int = 4
    key_dim: int | None = None
    scores: Scores = "relu"
    batch_norm: bool = False
    pattern: str | None = None

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        for name in ("keys", "top_k", "heads", "key_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.key_dim is not None and self.key_dim % 2:
            raise ValueError(f"key_dim must be even, two halves, got {self.key_dim}.")
        if self.keys is not None and self.top_k > self.keys**2:
            raise ValueError(f"top_k must be at most {self.keys**2}, the values of {self.keys} keys, got {self.top_k}.")


class ProductKeyMemory(nn.Module):
    """y = sum over heads and their k best pairs (i, j) of w(q1 a_i + q2 b_j) v_ij, q = query(x), w ReLU or softmax.

    Args:
        dim: Channels C.
        out_dim: Channels of the output.
        keys: n; values have the numbers i * n + j.
        top_k: k, at most n * n.
        heads: Queries of a token.
        key_dim: Channels of a query.
        scores: "relu" or "softmax".
        batch_norm: BatchNorm behind the query.
        layers: Of the network; more of them start smaller with "relu".

    Shape:
        (..., C) -> (..., out_dim).
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        keys: int,
        top_k: int,
        *,
        heads: int = 4,
        key_dim: int | None = None,
        scores: Scores = "relu",
        batch_norm: bool = False,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.top_k, self.heads, self.scores = top_k, heads, scores
        half = (key_dim or dim) // 2
        self.query = nn.Linear(dim, heads * 2 * half, bias=scores == "softmax")
        self.norm = nn.BatchNorm1d(heads * 2 * half) if batch_norm else None
        self.keys = nn.Parameter(torch.empty(heads, 2, keys, half))
        self.values = nn.EmbeddingBag(keys * keys, out_dim, mode="sum")
        if scores == "relu":
            scale = math.sqrt(2 / layers)
            nn.init.normal_(self.keys, std=scale * dim**-0.5)
            nn.init.normal_(self.values.weight, std=scale / keys)
        else:
            nn.init.uniform_(self.keys, -(half**-0.5), half**-0.5)
            nn.init.normal_(self.values.weight, std=out_dim**-0.5)

    def halves(self, x: Tensor) -> Tensor:
        """Return the scores (T, heads, 2, n) of all half keys for tokens (T, C)."""
        query = self.query(x)
        if self.norm is not None:
            query = self.norm(query)
        return torch.einsum("thpd,hpnd->thpn", query.unflatten(-1, (self.heads, 2, -1)), self.keys)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best scores (T, heads, k) of tokens (T, C), and the numbers of their values."""
        halves = self.halves(x)
        keys = halves.shape[-1]
        kept = min(self.top_k, keys)
        best, place = halves.topk(kept, dim=-1)
        pairs = best[..., 0, :, None] + best[..., 1, None, :]
        scores, chosen = pairs.flatten(-2).topk(self.top_k, dim=-1)
        first, second = place[..., 0, :].gather(-1, chosen // kept), place[..., 1, :].gather(-1, chosen % kept)
        return scores, first * keys + second

    def forward(self, x: Tensor) -> Tensor:
        scores, index = self.select(x.reshape(-1, x.shape[-1]))
        weights = scores.relu() if self.scores == "relu" else scores.softmax(-1)
        out = self.values(index.flatten(1), per_sample_weights=weights.flatten(1).to(self.values.weight.dtype))
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.query.weight.numel() + self.keys.numel() + self.heads * self.top_k * self.values.embedding_dim


def _fitting_keys(ffn: DenseFFN, config: ProductKeyConfig, key_dim: int) -> int:
    """Return the most half keys for which a memory has no more parameters than the dense layer."""
    room = ffn.num_parameters - config.heads * key_dim * (ffn.dim + 2)  # the query, its bias or a norm
    linear = config.heads * key_dim
    return int((math.sqrt(max(0, linear**2 + 4 * ffn.out_dim * room)) - linear) / (2 * ffn.out_dim))


def _build(ffn: DenseFFN, config: ProductKeyConfig, layers: int) -> ProductKeyMemory:
    key_dim = config.key_dim or ffn.dim
    if key_dim % 2:
        raise ValueError(f"queries of {key_dim} channels have no halves; {key_dim - 1} fit, as key_dim")
    keys = config.keys or _fitting_keys(ffn, config, key_dim)
    if config.top_k > keys**2:
        raise ValueError(
            f"{keys} keys, which the layer's parameters have room for, are {keys**2} values and top_k is "
            f"{config.top_k}; fewer heads, a smaller key_dim or a number of keys of your own fit"
        )
    return ProductKeyMemory(
        ffn.dim,
        ffn.out_dim,
        keys,
        config.top_k,
        heads=config.heads,
        key_dim=key_dim,
        scores=config.scores,
        batch_norm=config.batch_norm,
        layers=layers,
    )


def apply(model: nn.Module, config: ProductKeyConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Put memories with new weights in the place of a model's feed-forward layers, in place, to be trained.

    The first paper replaces one or a few layers of many, as `pattern` allows; the second all.

    Args:
        model: Of timm or diffusers.
        config: How.
        data: Not used.

    Raises:
        ValueError: A layer cannot be replaced, or it was done before.
    """
    config = config or ProductKeyConfig()
    what = f"product keys, {config.heads} x {config.top_k} values a token"
    return replace_layers(
        model, "product_key", config.pattern, lambda ffn, layers: _build(ffn, config, layers), asdict(config), what
    )


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same layers; weights are loaded after."""
    restructure_layers(model, layers, lambda ffn, facts: _build(ffn, ProductKeyConfig(**facts), 1))
