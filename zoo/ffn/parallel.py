"""PAF: attention and feed-forward layer side by side, y = x + attention(norm1 x) + FFN(norm2 x).

Investigating the Role of Feed-Forward Networks in Transformers Using Parallel Attention and Feed-Forward Net Design,
https://arxiv.org/abs/2305.13297; abstract and authors' code were read. Its language models have norms behind layers;
here norms stay in front, each branch with its own (`norm="own"`), or one for both (`norm="shared"`), as in GPT-J, PaLM
and ViT-22B, https://arxiv.org/abs/2302.05442. A trained model becomes another one, to be trained on; a new one is
trained from scratch. Keys of the state dict stay.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.ffn.technique import Changes, FFNReport, block_macs, replace_module, require_types
from zoo.layers.ffn import RePaFFN

__all__ = ["ParallelBlock", "ParallelConfig", "ParallelDiffusionBlock", "ParallelRePaBlock", "apply", "restructure"]

Norm = Literal["own", "shared"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """What the two branches take.

    Args:
        norm: "own": each its own norm of x; "shared": both that of attention, for timm's blocks only.
        pattern: Only blocks whose name matches this regular expression.

    Raises:
        ValueError: `norm` is unknown.
    """

    norm: Norm = "own"
    pattern: str | None = None

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))


class ParallelBlock(nn.Module):
    """timm's ViT block with both layers side by side.

    Args:
        block: Its parts, and their names, are taken over.
        norm: "shared" leaves the feed-forward layer's norm out.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    norm1: nn.Module
    norm2: nn.Module
    attn: nn.Module
    mlp: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, norm: Norm = "own") -> None:
        super().__init__()
        self.shared = norm == "shared"
        for name, part in block._modules.items():
            if not (self.shared and name == "norm2"):
                self.add_module(name, part)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        normed = self.norm1(x)
        attended = self.ls1(self.attn(normed, attn_mask=attn_mask, is_causal=is_causal))
        given = self.ls2(self.mlp(normed if self.shared else self.norm2(x)))
        return x + self.drop_path1(attended) + self.drop_path2(given)


class ParallelRePaBlock(ParallelBlock):
    """RePaViT's block with both layers side by side; norm and residual of the feed-forward layer are inside of it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return self.mlp(x) + self.drop_path1(attended)


class ParallelDiffusionBlock(ParallelBlock):
    """diffusers' block with both layers side by side; with adaLN each keeps its shift, scale and gate.

    diffusers knows repeated blocks by the name of their class: compile the whole model, not regions of it.

    Args:
        block: Of self-attention alone, with `norm_type` "ada_norm_zero" (DiT, our PixelDiT) or "layer_norm".
        norm: "own".
    """

    norm3: nn.Module
    attn1: nn.Module
    ff: nn.Module

    def __init__(self, block: nn.Module, norm: Norm = "own") -> None:
        super().__init__(block, norm)
        self.adaptive = block.norm_type == "ada_norm_zero"

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        x, kwargs = hidden_states, cross_attention_kwargs or {}
        if not self.adaptive:
            return x + self.attn1(self.norm1(x), attention_mask=attention_mask, **kwargs) + self.ff(self.norm3(x))
        normed, gate, shift, scale, last_gate = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        attended = self.attn1(normed, attention_mask=attention_mask, **kwargs)
        given = self.ff(self.norm3(x) * (1 + scale[:, None]) + shift[:, None])
        return x + gate.unsqueeze(1) * attended + last_gate.unsqueeze(1) * given


def _kind(block: Any) -> type[ParallelBlock] | None:
    """Return what a known block becomes."""
    attention = sys.modules.get("diffusers.models.attention")  # exists where its file was imported
    if type(block) is Block:
        return ParallelBlock
    if list(block._modules) == ["norm1", "attn", "drop_path1", "mlp"] and isinstance(block.mlp, RePaFFN):
        return ParallelRePaBlock
    if attention is not None and isinstance(block, attention.BasicTransformerBlock):
        alone = block.attn2 is None and block.pos_embed is None and not block.only_cross_attention
        if alone and not hasattr(block, "fuser") and block.norm_type in ("ada_norm_zero", "layer_norm"):
            return ParallelDiffusionBlock
    return None


def _blocks(model: nn.Module, pattern: str | None) -> dict[str, type[ParallelBlock]]:
    """Return what blocks become, by name.

    Raises:
        ValueError: No block is known.
    """
    found: dict[str, type[ParallelBlock]] = {}
    others: list[str] = []
    for name, module in model.named_modules():
        if pattern is not None and not re.search(pattern, name):
            continue
        kind = _kind(module)
        if kind is not None:
            found[name] = kind
        elif any(re.search("attn|attention", key) for key in module._modules):
            others.append(f"{name or 'the model itself'} is a {type(module).__name__}")
    if not found:
        wanted = f" whose name matches {pattern!r}" if pattern else ""
        known = "ViT blocks of timm, RePaViT's, and blocks of diffusers with self-attention alone (DiT)"
        seen = f"{others[0]}; known are" if others else "known are"
        raise ValueError(f"{type(model).__name__} has no block{wanted} to run side by side: {seen} {known}.")
    return found


def apply(model: nn.Module, config: ParallelConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Run attention and feed-forward layer of every block side by side, in place, with the model's weights.

    Args:
        model: With ViT blocks of timm, RePaViT's, or diffusers' blocks with self-attention alone.
        config: What the branches take.
        data: Not used.

    Raises:
        ValueError: No block is known, one has no norm to share, or it was done before.
    """
    config = config or ParallelConfig()
    changes = Changes(model, "parallel")
    kinds = _blocks(model, config.pattern)
    odd = [name for name, kind in kinds.items() if kind is not ParallelBlock]
    if config.norm == "shared" and odd:
        what = type(model.get_submodule(odd[0])).__name__
        raise ValueError(f"{odd[0]} is a {what}, whose norms are parts of its branches: take norm='own'.")
    for name, kind in kinds.items():
        block = model.get_submodule(name)
        changes.replace(name, kind(block, config.norm), f"side by side, {config.norm} norm", (block_macs(block),) * 2)
    return changes.report({name: {"norm": config.norm} for name in kinds})


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a model the same blocks; weights are loaded after."""
    kinds = _blocks(model, None)
    for name, facts in layers.items():
        replace_module(model, name, kinds[name](model.get_submodule(name), facts["norm"]))
