"""HybridNorm: norms on query, key and value in attention, and a norm around the feed-forward layer.

HybridNorm (NeurIPS 2025), https://arxiv.org/abs/2503.04598, on language models: r = attention(x) + x; u = norm(r); y
= FFN(u) + u. The first block of HybridNorm* keeps a norm in front of attention and adds r instead of u. Such a model
is trained from scratch: it is another function than one with norms in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.ffn.technique import Changes, FFNReport, block_macs, replace_module, vit_blocks

__all__ = ["HybridNormBlock", "HybridNormConfig", "apply", "restructure"]


@dataclass(frozen=True, kw_only=True)
class HybridNormConfig:
    """Which of the two.

    Args:
        special_first: The first block is that of HybridNorm*.
    """

    special_first: bool = True


class HybridNormBlock(nn.Module):
    """A block with norms on query, key and value, and one around the feed-forward layer.

    Args:
        dim: Channels C.
        num_heads: Of attention.
        mlp: Feed-forward layer.
        first: The first block of HybridNorm*.
        depth: Blocks of the network; output products start smaller by sqrt(2 depth).

    Shape:
        (B, N, C) -> (B, N, C).

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, mlp: nn.Module, first: bool = False, depth: int = 12) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels are not divisible into {num_heads} heads.")
        head = dim // num_heads
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim) if first else None
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm, self.v_norm = nn.LayerNorm(head), nn.LayerNorm(head), nn.LayerNorm(head)
        self.norm2, self.mlp, self.first = nn.LayerNorm(dim), mlp, first
        for weight in (self.proj.weight, getattr(getattr(mlp, "fc2", None), "weight", None)):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=0.02 / math.sqrt(2 * depth))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, head)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), self.v_norm(v))
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        r = x + self._attention(x if self.norm1 is None else self.norm1(x))
        u = self.norm2(r)
        return self.mlp(u) + (r if self.first else u)


def _blocks(model: nn.Module) -> dict[str, Block]:
    found = vit_blocks(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no ViT blocks of timm: HybridNorm knows how to build those.")
    return found


def _build(block: Any, first: bool, depth: int) -> HybridNormBlock:
    kind = block.attn.qkv.weight
    return HybridNormBlock(block.attn.qkv.in_features, block.attn.num_heads, block.mlp, first, depth).to(kind)


def apply(model: nn.Module, config: HybridNormConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Give a vision transformer HybridNorm blocks with new attention, in place, to be trained from scratch.

    Args:
        model: timm ViT.
        config: Which of the two.
        data: Not used.

    Raises:
        ValueError: The model has no blocks of this kind, or it was done before.
    """
    config = config or HybridNormConfig()
    changes, facts = Changes(model, "hybrid_norm"), {}
    blocks = _blocks(model)
    for place, (name, block) in enumerate(blocks.items()):
        first = config.special_first and place == 0
        new = _build(block, first, len(blocks))
        what = "HybridNorm* first block" if first else "HybridNorm"
        changes.replace(name, new, what, (block_macs(block), block_macs(new)))
        facts[name] = {"first": first, "depth": len(blocks)}
    return changes.report(facts)


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a model the same blocks; weights are loaded after."""
    blocks = _blocks(model)
    for name, facts in layers.items():
        replace_module(model, name, _build(blocks[name], facts["first"], facts["depth"]))
