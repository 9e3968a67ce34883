"""Tiny random denoisers of several families, and one loop that calls them all as a pipeline would."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from zoo.diffusion import PixelDiT

Inputs = dict[str, Any]


def randomize(model: nn.Module) -> nn.Module:
    """Give weights that start at zero random values: a model whose blocks do nothing tests nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pixel_dit(**changes: Any) -> PixelDiT:
    """Return a PixelDiT for 8x8 images of 4 classes, 3 blocks of width 16."""
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8, patch_size=2, num_classes=4)
    return randomize(PixelDiT(**{**sizes, **changes}))


def dit() -> DiTTransformer2DModel:
    """Return diffusers' DiT of 4 classes."""
    return randomize(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            sample_size=8,
            num_embeds_ada_norm=4,
        )
    )


def pixart() -> PixArtTransformer2DModel:
    """Return a PixArt with cross-attention to text."""
    return randomize(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            out_channels=4,
            num_layers=3,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=12,
            use_additional_conditions=False,
        )
    )


def sd3() -> SD3Transformer2DModel:
    """Return an SD3 with joint attention, whose last block drops the text."""
    return randomize(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            pos_embed_max_size=4,
        )
    )


def flux() -> FluxTransformer2DModel:
    """Return a Flux with two double and two single blocks."""
    return randomize(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=12,
            pooled_projection_dim=12,
            axes_dims_rope=(4, 4, 8),
        )
    )


def sana() -> SanaTransformer2DModel:
    """Return a Sana with linear attention; diffusers registers its blocks with no cache."""
    return randomize(
        SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            sample_size=8,
            patch_size=1,
        )
    )


DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "pixel_dit": pixel_dit,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
}


def condition(model: nn.Module, batch: int, seed: int = 0) -> tuple[Tensor, Inputs]:
    """Return noise and the other inputs of a denoiser, timestep left out."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    kind = type(unwrap_module(model)).__name__
    if kind in ("PixelDiT", "DiTTransformer2DModel"):
        labels = torch.randint(0, 4, (batch,), generator=generator)
        return noise(model.config.in_channels, 8, 8), {"class_labels": labels}
    if kind == "FluxTransformer2DModel":
        return noise(16, 4), {
            "encoder_hidden_states": noise(3, 12),
            "pooled_projections": noise(12),
            "img_ids": torch.arange(16).float().unsqueeze(1).expand(16, 3),
            "txt_ids": torch.zeros(3, 3),
        }
    inputs: Inputs = {"encoder_hidden_states": noise(3, 12)}
    if kind == "SD3Transformer2DModel":
        inputs["pooled_projections"] = noise(12)
    return noise(4, 8, 8), inputs


@torch.no_grad()
def denoise(
    model: nn.Module,
    steps: int = 6,
    batch: int = 2,
    seed: int = 0,
    contexts: tuple[str, ...] = (),
    stop_after: int | None = None,
) -> Tensor:
    """Run a short denoising loop, and return the result.

    Args:
        model: One of the above.
        steps: Calls for each context.
        batch: Samples.
        seed: Of noise and condition; each context has a condition of its own.
        contexts: Names of cache contexts, one call each in every step; none means one call outside any context.
        stop_after: Raise KeyboardInterrupt after so many steps.
    """
    sample, _ = condition(model, batch, seed)
    conditions = [condition(model, batch, seed + index)[1] for index in range(max(1, len(contexts)))]
    for step in range(steps):
        if step == stop_after:
            raise KeyboardInterrupt
        timestep = torch.full((batch,), 900.0 - 800.0 * step / steps)
        total = torch.zeros_like(sample)
        for name, inputs in zip(contexts or (None,), conditions, strict=True):
            with model.cache_context(name) if name else nullcontext():
                output = model(sample, timestep=timestep, **inputs, return_dict=False)[0]
            total = total + output.chunk(2, dim=1)[0] if output.shape != sample.shape else total + output
        sample = sample - 0.1 * total
    return sample
