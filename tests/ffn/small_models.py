"""Small models with feed-forward layers of every known kind, and data for them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

KINDS = ("timm", "glu", "swiglu", "dit", "flux")


def vit(depth: int = 3, **kwargs: Any) -> nn.Module:
    """A ViT of width 16 on 4 tokens, with weights large enough that its layers matter."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5, "mlp_ratio": 4}
    model = timm.create_model("vit_tiny_patch16_224", depth=depth, **{**options, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def build(kind: str) -> nn.Module:
    """Return a small model with feed-forward layers of one kind."""
    from timm.layers import GluMlp, SwiGLU

    torch.manual_seed(0)
    if kind == "timm":
        return vit()
    if kind == "glu":
        return vit(mlp_layer=GluMlp)
    if kind == "swiglu":
        return vit(mlp_layer=SwiGLU)
    if kind == "dit":
        from zoo.diffusion.pixel_dit import PixelDiT

        model = PixelDiT(
            sample_size=8, patch_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3
        )
        with torch.no_grad():  # as built, its gates are zero and its layers do not matter
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def batches(kind: str, count: int = 3, size: int = 16) -> list[Any]:
    """Return calibration batches for `build(kind)`."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind in ("timm", "glu", "swiglu"):
        return [(randn(size, 3, 16, 16), torch.randint(0, 5, (size,), generator=generator)) for _ in range(count)]
    if kind == "dit":
        return [
            {
                "hidden_states": randn(size, 3, 8, 8),
                "timestep": torch.randint(0, 1000, (size,), generator=generator),
                "class_labels": torch.randint(0, 3, (size,), generator=generator),
                "target": randn(size, 3, 8, 8),
            }
            for _ in range(count)
        ]
    return [
        {
            "hidden_states": randn(4, 4, 4),
            "encoder_hidden_states": randn(4, 3, 8),
            "pooled_projections": randn(4, 8),
            "timestep": torch.rand(4, generator=generator),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
            "target": randn(4, 4, 4),
        }
        for _ in range(count)
    ]
