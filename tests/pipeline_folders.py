"""Saved pipelines of diffusers with random weights and real tokenizers, as users have them in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from caching.tiny_pipelines import flux_transformer
from denoisers import dit, pixart, randomize, sd3
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_text import clip, clip_tokenizer, qwen, qwen_tokenizer, t5, t5_tokenizer

from zoo.diffusion import DiTPipeline


def _vae(**changes: object) -> AutoencoderKL:
    sizes = dict(sample_size=16, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(**{**sizes, **kinds, **changes}).eval()


def class_pipeline() -> DiffusionPipeline:
    """DiT of 4 classes, saved as diffusers' own."""
    return DiTPipeline(dit(), _vae(), DDIMScheduler(), {0: "cat, tabby", 1: "dog", 2: "ship", 3: "truck"})


def flux_parts() -> dict[str, object]:
    """Return all parts of a Flux."""
    return dict(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(shift_factor=0.1, use_quant_conv=False),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        transformer=flux_transformer(),
    )  # fmt: skip


def flux() -> DiffusionPipeline:
    """Flux."""
    return FluxPipeline(**flux_parts())


def flux_from_image() -> DiffusionPipeline:
    """Flux from an image."""
    return FluxImg2ImgPipeline(**flux_parts())


def stable_diffusion_3() -> DiffusionPipeline:
    """Stable Diffusion 3 without T5."""
    model = sd3()
    return StableDiffusion3Pipeline(
        transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(shift_factor=0.1),
        text_encoder=clip(projection=6), tokenizer=clip_tokenizer(), text_encoder_2=clip(projection=6),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def pixart_alpha() -> DiffusionPipeline:
    """PixArt."""
    return PixArtAlphaPipeline(t5_tokenizer(), t5(), _vae(), pixart(), DPMSolverMultistepScheduler())


def stable_diffusion() -> DiffusionPipeline:
    """Stable Diffusion, which has a UNet."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=12,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return StableDiffusionPipeline(
        _vae(),
        clip(),
        clip_tokenizer(),
        unet,
        EulerDiscreteScheduler(steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    )


def _wan_transformer(channels: int = 16) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return randomize(
        WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=12, in_channels=channels, out_channels=16, text_dim=12,
            freq_dim=16, ffn_dim=24, num_layers=3, rope_max_seq_len=16,
        )
    )  # fmt: skip


def wan() -> DiffusionPipeline:
    """Wan."""
    vae = AutoencoderKLWan(base_dim=3, num_res_blocks=1).eval()
    return WanPipeline(t5_tokenizer(), t5("umt5"), vae, FlowMatchEulerDiscreteScheduler(shift=3.0), _wan_transformer())


def wan_from_image() -> DiffusionPipeline:
    """Wan 2.2 from an image, without an encoder of images."""
    vae = AutoencoderKLWan(base_dim=3, num_res_blocks=1).eval()
    return WanImageToVideoPipeline(
        t5_tokenizer(), t5("umt5"), vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=_wan_transformer(36)
    )


def qwen_image() -> DiffusionPipeline:
    """Qwen-Image."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(base_dim=3, num_res_blocks=1).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return QwenImagePipeline(scheduler, vae, qwen(), qwen_tokenizer(), randomize(transformer))


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "dit": class_pipeline,
    "flux": flux,
    "flux_image": flux_from_image,
    "sd3": stable_diffusion_3,
    "pixart": pixart_alpha,
    "sd": stable_diffusion,
    "wan": wan,
    "wan_image": wan_from_image,
    "qwen": qwen_image,
}


def saved(kind: str, folder: Path) -> str:
    """Write one of `PIPELINES` and return its folder."""
    torch.manual_seed(0)
    PIPELINES[kind]().save_pretrained(folder)
    return str(folder)
