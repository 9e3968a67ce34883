"""The adaLN blocks of diffusers with the operators of `zoo.kernels`: the same weights, names and numbers.

Scalable Diffusion Models with Transformers (ICCV 2023), section 3.2, https://arxiv.org/abs/2212.09748. Where no kernel
runs, diffusers' own code does.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention, normalization
from torch import Tensor, nn

from zoo.diffusion.blocks import register_block
from zoo.kernels import gate_modulate, modulate
from zoo.kernels.dispatch import runs_kernel

__all__ = ["AdaLayerNormZero", "AdaLayerNormZeroSingle", "BasicTransformerBlock", "adopt_kernels"]


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    """Norm that is scaled and shifted by the condition, in one pass; used by DiT, SD3, FLUX and others."""

    kernel_operators = ("modulate",)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if not _runs_modulate(self.norm, x):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulate(x, scale, shift, self.norm.eps), *others


class AdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    """The same for FLUX's single-stream blocks, whose two branches share a norm and a gate."""

    kernel_operators = ("modulate",)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        if not _runs_modulate(self.norm, x):
            return super().forward(x, emb)
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return modulate(x, scale, shift, self.norm.eps), gate


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """Block of DiT: the gate of the attention, the residual and the next norm are one operator.

    It keeps its name, by which diffusers finds repeated blocks.
    """

    kernel_operators = ("gate_modulate",)

    def forward(
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
        if cross_attention_kwargs or self._chunk_size is not None or not runs_kernel("gate_modulate", hidden_states):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        normed, gate, shift, scale, last_gate = self.norm1(
            hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype
        )
        attended = self.attn1(normed, attention_mask=attention_mask)
        hidden_states, normed = gate_modulate(hidden_states, attended, gate, scale, shift, self.norm3.eps)
        return last_gate.unsqueeze(1) * self.ff(normed) + hidden_states


register_block(BasicTransformerBlock)


def _runs_modulate(norm: nn.Module, x: Tensor) -> bool:
    return type(norm) is nn.LayerNorm and x.ndim == 3 and runs_kernel("modulate", x)


def _fits(block: attention.BasicTransformerBlock) -> bool:
    """Return whether a block is DiT's: self-attention alone, adaLN, nothing between them."""
    return (
        block.norm_type == "ada_norm_zero"
        and block.attn2 is None
        and block.pos_embed is None
        and not block.only_cross_attention
        and not block.norm3.elementwise_affine
    )


def adopt_kernels(model: nn.Module) -> int:
    """Let the adaLN norms and blocks of a diffusers model use the operators of `zoo.kernels`, in place.

    Weights, names and, where no kernel runs, numbers stay as they are. Calling it again changes nothing.

    Args:
        model: Any; the gates of other blocks than DiT's stay diffusers' own.

    Returns:
        How many norms and blocks use the operators now.
    """
    found = 0
    for module in model.modules():
        if type(module) is normalization.AdaLayerNormZero:
            module.__class__ = AdaLayerNormZero
        elif type(module) is normalization.AdaLayerNormZeroSingle:
            module.__class__ = AdaLayerNormZeroSingle
        elif type(module) is attention.BasicTransformerBlock and _fits(module):
            module.__class__ = BasicTransformerBlock
        found += isinstance(module, (AdaLayerNormZero, AdaLayerNormZeroSingle, BasicTransformerBlock))
    return found
