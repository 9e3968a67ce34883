"""Tiny random instances of diffusers' own pipelines, each with the call that tests make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from denoisers import auraflow, hunyuan_video, ltx, lumina2, randomize, sd3
from diffusers import (
    AuraFlowPipeline,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    LTXImageToVideoPipeline,
    Lumina2Pipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    StableCascadePriorPipeline,
    StableCascadeUNet,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn


class Subject(NamedTuple):
    """A pipeline, and a run of it for so many steps."""

    pipe: DiffusionPipeline
    run: Callable[..., Tensor]


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _prompts(*, pooled: bool = False) -> dict[str, Tensor]:
    """Return a prompt of three tokens and a negative one."""
    found = {"prompt_embeds": _noise(1, 3, 12), "negative_prompt_embeds": _noise(1, 3, 12, seed=2)}
    if pooled:
        found |= {"pooled_prompt_embeds": _noise(1, 12, seed=3), "negative_pooled_prompt_embeds": _noise(1, 12, seed=4)}
    return found


def _subject(pipe: DiffusionPipeline, output: str, **fixed: Any) -> Subject:
    pipe.set_progress_bar_config(disable=True)

    def run(steps: int = 8, **changes: Any) -> Tensor:
        arguments = {"generator": torch.manual_seed(0), "output_type": "latent", **fixed, **changes}
        return getattr(pipe(num_inference_steps=steps, **arguments), output)

    return Subject(pipe, run)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32, block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    ).eval()  # fmt: skip


def _parts(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


_ONE_TEXT = ("text_encoder", "tokenizer")
_TWO_TEXTS = (*_ONE_TEXT, "text_encoder_2", "tokenizer_2")


def flux_transformer() -> nn.Module:
    """Return a Flux for packed latents of a VAE with 4 channels."""
    torch.manual_seed(0)
    return randomize(
        FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=1, joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


def flux_text_to_image(model: nn.Module | None = None) -> Subject:
    """Flux, with contexts; guided where true_cfg_scale is above 1."""
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), None, **_parts(*_TWO_TEXTS), transformer=model or flux_transformer()
    )
    return _subject(pipe, "images", **_prompts(pooled=True), height=16, width=16, true_cfg_scale=4.0)


def flux_image_to_image(model: nn.Module | None = None) -> Subject:
    """Flux from an image, without contexts, and not from the first timestep on."""
    pipe = FluxImg2ImgPipeline(
        FlowMatchEulerDiscreteScheduler(), _vae(), **_parts(*_TWO_TEXTS), transformer=model or flux_transformer()
    )
    fixed = dict(image=_noise(1, 3, 16, 16).sigmoid(), strength=0.75, height=16, width=16, true_cfg_scale=4.0)
    return _subject(pipe, "images", **_prompts(pooled=True), **fixed)


def flux_kontext() -> Subject:
    """Flux Kontext, whose sequence holds the given image too."""
    pipe = FluxKontextPipeline(
        FlowMatchEulerDiscreteScheduler(), _vae(), **_parts(*_TWO_TEXTS), transformer=flux_transformer()
    )
    fixed = dict(image=_noise(1, 3, 16, 16).sigmoid(), height=16, width=16, _auto_resize=False, max_area=256)
    return _subject(pipe, "images", **_prompts(pooled=True), **fixed, true_cfg_scale=4.0)


def lumina2_text_to_image() -> Subject:
    """Lumina 2, which gives its transformer 1 - t / 1000, and no contexts."""
    pipe = Lumina2Pipeline(
        transformer=lumina2(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **_parts(*_ONE_TEXT)
    )
    masks = {f"{name}prompt_attention_mask": torch.ones(1, 3).bool() for name in ("", "negative_")}
    return _subject(pipe, "images", **_prompts(), **masks, height=64, width=64, guidance_scale=4.0)


def chroma_text_to_image() -> Subject:
    """Chroma, without contexts."""
    torch.manual_seed(0)
    model = randomize(
        ChromaTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=1, joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
            approximator_hidden_dim=16, approximator_layers=1,
        )
    )  # fmt: skip
    pipe = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **_parts(*_ONE_TEXT), transformer=model,
        image_encoder=None, feature_extractor=None,
    )  # fmt: skip
    masks = {f"{name}prompt_attention_mask": torch.ones(1, 3) for name in ("", "negative_")}
    return _subject(pipe, "images", **_prompts(), **masks, height=16, width=16, guidance_scale=4.0)


def sd3_text_to_image() -> Subject:
    """Stable Diffusion 3, guided in one batch, and in a second call where layers are skipped."""
    pipe = StableDiffusion3Pipeline(
        transformer=sd3(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        **_parts(*_TWO_TEXTS, "text_encoder_3", "tokenizer_3"),
    )  # fmt: skip
    return _subject(pipe, "images", **_prompts(pooled=True), height=64, width=64, guidance_scale=4.0)


def qwen_text_to_image() -> Subject:
    """Qwen-Image, which gives its transformer t / 1000."""
    torch.manual_seed(0)
    model = randomize(
        QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, **_parts(*_ONE_TEXT), transformer=model)
    masks = {f"{name}prompt_embeds_mask": torch.ones(1, 3).long() for name in ("", "negative_")}
    return _subject(pipe, "images", **_prompts(), **masks, height=16, width=16, true_cfg_scale=4.0)


def hunyuan_video_text_to_video() -> Subject:
    """HunyuanVideo, distilled for guidance: one call a step."""
    pipe = HunyuanVideoPipeline(
        None, None, transformer=hunyuan_video(), vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
        **_parts("text_encoder_2", "tokenizer_2"),
    )  # fmt: skip
    prompts = {"prompt_embeds": _noise(1, 3, 12), "pooled_prompt_embeds": _noise(1, 12)}
    return _subject(
        pipe, "frames", **prompts, prompt_attention_mask=torch.ones(1, 3), height=32, width=32, num_frames=1
    )


def wan_transformer(seed: int = 0) -> nn.Module:
    """Return a Wan."""
    torch.manual_seed(seed)
    return randomize(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=12, freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=16,
        )
    )  # fmt: skip


def wan_text_to_video(two: bool = False) -> Subject:
    """Wan, whose contexts say the index of the step; or Wan 2.2, with a second transformer for less noise."""
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipe = WanPipeline(
        **_parts(*_ONE_TEXT), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan_transformer(), transformer_2=wan_transformer(1) if two else None,
        boundary_ratio=0.6 if two else None,
    )  # fmt: skip
    return _subject(pipe, "frames", **_prompts(), height=32, width=32, num_frames=1, guidance_scale=4.0)


def ltx_image_to_video() -> Subject:
    """LTX from an image, whose first frame has timestep 0."""
    vae = AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    ).eval()  # fmt: skip
    vae.use_framewise_encoding = False
    pipe = LTXImageToVideoPipeline(FlowMatchEulerDiscreteScheduler(), vae, **_parts(*_ONE_TEXT), transformer=ltx())
    fixed = dict(
        image=_noise(1, 3, 32, 32).sigmoid(), prompt_embeds=_noise(1, 3, 12), prompt_attention_mask=torch.ones(1, 3),
        height=32, width=32, num_frames=9, guidance_scale=1.0,
    )  # fmt: skip
    return _subject(pipe, "frames", **fixed)


def auraflow_text_to_image() -> Subject:
    """AuraFlow, which gives its transformer t / 1000, where the last timestep is 1, and no contexts."""
    pipe = AuraFlowPipeline(
        transformer=auraflow(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(), **_parts(*_ONE_TEXT)
    )
    masks = {f"{name}prompt_attention_mask": torch.ones(1, 3) for name in ("", "negative_")}
    return _subject(pipe, "images", **_prompts(), **masks, height=8, width=8, guidance_scale=4.0)


def sd3_with_control() -> Subject:
    """Stable Diffusion 3 with a ControlNet that is on from the second to the last but one quarter of the steps."""
    sizes = dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12,
        pos_embed_max_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    pipe = StableDiffusion3ControlNetPipeline(
        transformer=sd3(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(),
        **_parts(*_TWO_TEXTS, "text_encoder_3", "tokenizer_3"), controlnet=randomize(SD3ControlNetModel(**sizes)),
    )  # fmt: skip
    fixed = dict(control_image=_noise(1, 3, 8, 8).sigmoid(), control_guidance_start=0.25, control_guidance_end=0.75)
    return _subject(pipe, "images", **_prompts(pooled=True), **fixed, height=8, width=8, guidance_scale=4.0)


def skyreels_frames_in_turns(**changes: Any) -> Subject:
    """SkyReels with frames at times of their own: more calls than its scheduler, which stands still, has timesteps."""
    torch.manual_seed(0)
    model = randomize(
        SkyReelsV2Transformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=12, freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=16, inject_sample_info=True,
        )
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipe = SkyReelsV2DiffusionForcingPipeline(
        **_parts(*_ONE_TEXT), transformer=model, vae=vae,
        scheduler=UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
    )  # fmt: skip
    fixed = dict(prompt=None, height=16, width=16, num_frames=9, guidance_scale=4.0)
    return _subject(pipe, "frames", **_prompts(), **{**fixed, **changes})


def stable_cascade_prior() -> Subject:
    """Stable Cascade's prior, which leaves out the last timestep of its scheduler."""
    torch.manual_seed(0)
    kinds = (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),)
    model = randomize(
        StableCascadeUNet(
            in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=8, block_out_channels=(8,),
            num_attention_heads=(2,), down_num_layers_per_block=(2,), up_num_layers_per_block=(2,),
            down_blocks_repeat_mappers=(1,), up_blocks_repeat_mappers=(1,), block_types_per_layer=kinds,
            clip_text_in_channels=12, clip_text_pooled_in_channels=12, clip_image_in_channels=8, kernel_size=1,
            switch_level=(),
        )
    )  # fmt: skip
    text_encoder: Any = nn.Linear(1, 1)
    text_encoder.dtype, text_encoder.device = torch.float32, torch.device("cpu")
    pipe = StableCascadePriorPipeline(None, text_encoder, model, DDPMWuerstchenScheduler())
    prompts = {f"{name}prompt_embeds": _noise(1, 3, 12, seed=len(name)) for name in ("", "negative_")}
    pooled = {f"{name}prompt_embeds_pooled": _noise(1, 1, 12, seed=len(name)) for name in ("", "negative_")}
    fixed = dict(height=128, width=128, guidance_scale=4.0, output_type="pt")
    return _subject(pipe, "image_embeddings", **prompts, **pooled, **fixed)
