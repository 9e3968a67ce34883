"""PixelDiT: a class-conditional diffusion transformer on pixels.

The network is diffusers' own `DiTTransformer2DModel`. Scalable Diffusion Models with Transformers (Peebles and Xie,
ICCV 2023), https://arxiv.org/abs/2212.09748. Authors' code: https://github.com/facebookresearch/DiT (CC BY-NC 4.0,
not used here).
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from diffusers import CacheMixin, DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from zoo.diffusion.adaln import adopt_kernels
from zoo.diffusion.strict_loading import StrictModelMixin

# `DiffusionPipeline.from_pretrained` looks for the name ModelMixin here to learn how the class is loaded.
__all__ = ["ModelMixin", "PixelDiT"]


class SharedConditioning(nn.Module):
    """Stand in for a block's own embedder where the model has computed the conditioning already."""

    def forward(
        self, timestep: Tensor, class_labels: Tensor | None = None, hidden_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the conditioning (B, D), which the model hands down in place of the timestep."""
        return timestep


class PixelDiT(StrictModelMixin, DiTTransformer2DModel, CacheMixin):
    """A class-conditional diffusion transformer on pixels.

    Predicts the noise, the clean image or the velocity of noisy images of a class.
    Differs from diffusers' DiT: one embedder of timestep and class serves all blocks and the head, as in the paper.
    diffusers gives every block its own, which costs parameters and draws the dropped labels anew in every block, so
    that no sample is ever wholly unconditional in training. The initial weights are the paper's (adaLN-Zero).

    Args:
        num_attention_heads: Heads of each attention.
        attention_head_dim: Channels of a head; heads times this is the width, a multiple of 4.
        num_layers: Transformer blocks.
        sample_size: Height and width of the images in pixels.
        patch_size: Height and width of a token in pixels.
        in_channels: Channels of the images.
        num_classes: Classes; label `num_classes` means "no class" where `class_dropout_prob` is above 0.
        class_dropout_prob: Share of samples that lose their label in training, each as a whole. 0 rules out
            classifier-free guidance.
        dropout: Dropout rate of attention output and feed-forward.
        activation_fn: Activation of the feed-forward, in diffusers' words.

    Shape:
        (B, in_channels, H, W), timestep (B,) and class_labels (B,) -> (B, in_channels, H, W); H and W equal and a
        multiple of `patch_size`.

    Raises:
        ValueError: The sizes do not fit together, or a rate is outside [0, 1].
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["BasicTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 4,
        attention_head_dim: int = 64,
        num_layers: int = 6,
        sample_size: int = 32,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 10,
        class_dropout_prob: float = 0.1,
        *,
        dropout: float = 0.0,
        activation_fn: str = "gelu-approximate",
    ) -> None:
        if sample_size % patch_size:
            raise ValueError(f"sample_size must be a multiple of patch_size {patch_size}, got {sample_size}.")
        if num_attention_heads * attention_head_dim % 4:
            raise ValueError(f"The width must be a multiple of 4, got {num_attention_heads} * {attention_head_dim}.")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], got {class_dropout_prob}.")
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            num_layers=num_layers,
            dropout=dropout,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_classes,
        )
        # The parent registers its own arguments too; config.json must hold ours only, or loading complains.
        own = inspect.signature(PixelDiT.__init__).parameters
        self._internal_dict = FrozenDict({key: value for key, value in self.config.items() if key in own})
        self.conditioning = CombinedTimestepLabelEmbeddings(num_classes, self.inner_dim, class_dropout_prob)
        for block in self.transformer_blocks:
            block.norm1.emb = SharedConditioning()
        adopt_kernels(self)
        self._init_weights()

    @property
    def null_label(self) -> int:
        """Label that means "no class".

        Raises:
            ValueError: The model was built with `class_dropout_prob=0`.
        """
        if self.config.class_dropout_prob == 0:
            raise ValueError("This PixelDiT was built with class_dropout_prob=0: it knows no unconditional label.")
        return self.config.num_classes

    def _init_weights(self) -> None:
        """Initialise as the paper does: every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.pos_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
        nn.init.zeros_(projection.bias)
        embedder = self.conditioning.timestep_embedder
        for weight in (self.conditioning.class_embedder.embedding_table, embedder.linear_1, embedder.linear_2):
            nn.init.normal_(weight.weight, std=0.02)
        for zero in (*(block.norm1.linear for block in self.transformer_blocks), self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict from noisy images.

        Args:
            hidden_states: Noisy images (B, C, H, W), clean ones in [-1, 1].
            timestep: Timesteps (B,) in the training schedule's unit, 0 to 999; fractions are allowed.
            class_labels: Classes (B,), each from 0 to `num_classes`, the last meaning none.
            cross_attention_kwargs: Handed to the attention processors, as in diffusers.
            return_dict: Return a `Transformer2DModelOutput` instead of a tuple.

        Raises:
            ValueError: Timestep or labels are missing, or the images have another rank, channel count or size.
        """
        if timestep is None or class_labels is None:
            raise ValueError("PixelDiT needs timestep and class_labels.")
        channels, patch = self.config.in_channels, self.patch_size
        if hidden_states.ndim != 4 or hidden_states.shape[1] != channels:
            raise ValueError(f"hidden_states must be (B, {channels}, H, W), got {tuple(hidden_states.shape)}.")
        if hidden_states.shape[2] != hidden_states.shape[3] or hidden_states.shape[2] % patch:
            raise ValueError(f"H and W must be equal and a multiple of {patch}, got {tuple(hidden_states.shape[2:])}.")
        conditioning = self.conditioning(timestep, class_labels, hidden_dtype=hidden_states.dtype)  # (B, D)
        return super().forward(
            hidden_states,
            timestep=conditioning,
            cross_attention_kwargs=cross_attention_kwargs,
            return_dict=return_dict,
        )
