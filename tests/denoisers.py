"""Tiny random denoisers of several families, and one loop that calls them all as a pipeline would."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    MochiTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from zoo.diffusion import DiffusionPolicyTransformer, PixelDiT

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


def flux2(**changes: Any) -> Flux2Transformer2DModel:
    """Return a Flux2: double blocks return two streams, single ones a joined one."""
    sizes = dict(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return randomize(Flux2Transformer2DModel(**{**sizes, **changes}))


def chroma() -> ChromaTransformer2DModel:
    """Return a Chroma."""
    return randomize(
        ChromaTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=1, joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
            approximator_hidden_dim=16, approximator_layers=1,
        )
    )  # fmt: skip


def qwen() -> QwenImageTransformer2DModel:
    """Return a QwenImage."""
    return randomize(
        QwenImageTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


_WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
    freq_dim=16, ffn_dim=24, num_layers=3, rope_max_seq_len=16,
)  # fmt: skip


def wan() -> WanTransformer3DModel:
    """Return a Wan."""
    return randomize(WanTransformer3DModel(**_WAN))


def wan_vace() -> WanVACETransformer3DModel:
    """Return a Wan VACE, whose control is added behind its first and last block."""
    return randomize(WanVACETransformer3DModel(**_WAN, vace_layers=[0, 2], vace_in_channels=4))


def ltx() -> LTXVideoTransformer3DModel:
    """Return an LTX."""
    return randomize(
        LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=3, caption_channels=12,
        )
    )  # fmt: skip


def cogvideox() -> CogVideoXTransformer3DModel:
    """Return a CogVideoX."""
    return randomize(
        CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=12, num_layers=3, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=3,
        )
    )  # fmt: skip


def cogview4() -> CogView4Transformer2DModel:
    """Return a CogView4, whose blocks call their feed-forward twice."""
    return randomize(
        CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=12, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
            rope_axes_dim=(8, 8),
        )
    )  # fmt: skip


def hunyuan_video() -> HunyuanVideoTransformer3DModel:
    """Return a HunyuanVideo with double and single blocks."""
    return randomize(
        HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=12,
            rope_axes_dim=(4, 6, 6),
        )
    )  # fmt: skip


def hunyuan_image() -> HunyuanImageTransformer2DModel:
    """Return a HunyuanImage with double and single blocks."""
    return randomize(
        HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, text_embed_dim=12, rope_axes_dim=(8, 8), patch_size=(2, 2),
        )
    )  # fmt: skip


def lumina2() -> Lumina2Transformer2DModel:
    """Return a Lumina2, whose main layers work on text and image together."""
    return randomize(
        Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1, num_attention_heads=1,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(8, 8, 8), axes_lens=(16, 16, 16), cap_feat_dim=12,
        )
    )  # fmt: skip


def z_image() -> ZImageTransformer2DModel:
    """Return a Z-Image, which takes lists of images."""
    return randomize(
        ZImageTransformer2DModel(
            in_channels=4, dim=24, n_layers=3, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=12,
            axes_dims=[8, 8, 8], axes_lens=[64, 16, 16],
        )
    )  # fmt: skip


def auraflow() -> AuraFlowTransformer2DModel:
    """Return an AuraFlow, whose single blocks return a joined stream."""
    return randomize(
        AuraFlowTransformer2DModel(
            sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=16,
        )
    )  # fmt: skip


def mochi() -> MochiTransformer3DModel:
    """Return a Mochi."""
    return randomize(
        MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16, in_channels=4,
            text_embed_dim=16, time_embed_dim=4, max_sequence_length=3,
        )
    )  # fmt: skip


def allegro() -> AllegroTransformer3DModel:
    """Return an Allegro."""
    return randomize(
        AllegroTransformer3DModel(
            num_attention_heads=1, attention_head_dim=12, num_layers=3, cross_attention_dim=12, sample_height=8,
            sample_width=8, sample_frames=2, caption_channels=12,
        )
    )  # fmt: skip


def stable_audio() -> StableAudioDiTModel:
    """Return a Stable Audio."""
    return randomize(
        StableAudioDiTModel(
            sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            num_key_value_attention_heads=2, cross_attention_dim=12, time_proj_dim=8, global_states_input_dim=12,
            cross_attention_input_dim=12,
        )
    )  # fmt: skip


def hunyuan_dit() -> HunyuanDiT2DModel:
    """Return a HunyuanDiT, whose later blocks take the output of earlier ones."""
    return randomize(
        HunyuanDiT2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
            num_layers=4, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=4, text_len=3,
            text_len_t5=3, activation_fn="gelu-approximate",
        )
    )  # fmt: skip


def latte() -> LatteTransformer3DModel:
    """Return a Latte, whose spatial and temporal blocks take turns."""
    return randomize(
        LatteTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
            patch_size=2, cross_attention_dim=16, caption_channels=12, video_length=2, norm_type="ada_norm_single",
            num_embeds_ada_norm=1000, norm_elementwise_affine=False, attention_bias=True,
            activation_fn="gelu-approximate",
        )
    )  # fmt: skip


def ltx2() -> LTX2VideoTransformer3DModel:
    """Return an LTX2, whose blocks return sound as well."""
    return randomize(
        LTX2VideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=2, caption_channels=12,
        )
    )  # fmt: skip


def diffusion_policy(**changes: Any) -> DiffusionPolicyTransformer:
    """Return a policy that plans 6 actions of 2 numbers from 2 observations of 3, 3 blocks of width 16."""
    sizes = dict(
        action_dim=2, observation_dim=3, horizon=6, n_obs_steps=2, num_layers=3, num_attention_heads=2,
        attention_head_dim=8, dropout=0.1,
    )  # fmt: skip
    model = DiffusionPolicyTransformer(**{**sizes, **changes})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)  # with the published 0.02 its blocks would do next to nothing
    return randomize(model)


# all that our own caches skip blocks of
SKIPPABLE: dict[str, Callable[[], nn.Module]] = {
    **DENOISERS,
    "allegro": allegro,
    "auraflow": auraflow,
    "chroma": chroma,
    "cogvideox": cogvideox,
    "cogview4": cogview4,
    "diffusion_policy": diffusion_policy,
    "flux2": flux2,
    "hunyuan_image": hunyuan_image,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "lumina2": lumina2,
    "mochi": mochi,
    "qwen": qwen,
    "stable_audio": stable_audio,
    "wan": wan,
    "wan_vace": wan_vace,
    "z_image": z_image,
}
# those whose attention and feed-forward modules they reuse
UNIT_ONLY: dict[str, Callable[[], nn.Module]] = {"hunyuan_dit": hunyuan_dit, "latte": latte}

_TEXT = 3
_SEQUENCE = (
    "ChromaTransformer2DModel",
    "Flux2Transformer2DModel",
    "LTXVideoTransformer3DModel",
    "QwenImageTransformer2DModel",
)
_VIDEO = (
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "AllegroTransformer3DModel",
)


def _more_inputs(kind: str, batch: int, noise: Callable[..., Tensor]) -> Inputs:
    """Return what a family takes beside image, timestep and text."""
    mask = torch.ones(batch, _TEXT)
    image_ids = torch.arange(16).float().unsqueeze(1)
    if kind == "LTXVideoTransformer3DModel":
        return {"encoder_attention_mask": mask, "num_frames": 1, "height": 4, "width": 4}
    if kind == "HunyuanVideoTransformer3DModel":
        guidance = torch.full((batch,), 6000.0)
        return {"encoder_attention_mask": mask, "pooled_projections": noise(12), "guidance": guidance}
    if kind == "CogView4Transformer2DModel":
        size = torch.full((batch, 2), 8.0)
        return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2)}
    if kind == "HunyuanDiT2DModel":
        return {
            "text_embedding_mask": mask,
            "encoder_hidden_states_t5": noise(_TEXT, 16),
            "text_embedding_mask_t5": mask,
            "image_meta_size": torch.full((batch, 6), 8.0),
            "style": torch.zeros(batch, dtype=torch.long),
            "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
        }
    inputs: dict[str, Callable[[], Inputs]] = {
        "Flux2Transformer2DModel": lambda: {
            "img_ids": image_ids.expand(16, 4),
            "txt_ids": torch.zeros(_TEXT, 4),
            "guidance": torch.ones(batch),
        },
        "ChromaTransformer2DModel": lambda: {"img_ids": image_ids.expand(16, 3), "txt_ids": torch.zeros(_TEXT, 3)},
        "QwenImageTransformer2DModel": lambda: {
            "encoder_hidden_states_mask": mask.bool(),
            "img_shapes": [[(1, 4, 4)]] * batch,
        },
        "SD3Transformer2DModel": lambda: {"pooled_projections": noise(12)},
        "WanVACETransformer3DModel": lambda: {"control_hidden_states": noise(4, 1, 8, 8)},
        "HunyuanImageTransformer2DModel": lambda: {"encoder_attention_mask": mask},
        "Lumina2Transformer2DModel": lambda: {"encoder_attention_mask": mask.bool()},
        "MochiTransformer3DModel": lambda: {"encoder_attention_mask": mask.bool()},
        "StableAudioDiTModel": lambda: {"global_hidden_states": noise(1, 12)},
        "AllegroTransformer3DModel": lambda: {
            "encoder_attention_mask": mask,
            "attention_mask": torch.ones(batch, 1, 8, 8),
        },
    }
    return inputs[kind]() if kind in inputs else {}


def condition(model: nn.Module, batch: int, seed: int = 0) -> tuple[Tensor, Inputs]:
    """Return noise and the other inputs of a denoiser, timestep left out."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    kind = type(unwrap_module(model)).__name__.removeprefix("MoE")
    if kind in ("PixelDiT", "DiTTransformer2DModel"):
        labels = torch.randint(0, 4, (batch,), generator=generator)
        return noise(model.config.in_channels, 8, 8), {"class_labels": labels}
    if kind == "DiffusionPolicyTransformer":
        return noise(6, 2), {"encoder_hidden_states": noise(2, 3)}
    if kind == "FluxTransformer2DModel":
        return noise(16, 4), {
            "encoder_hidden_states": noise(3, 12),
            "pooled_projections": noise(12),
            "img_ids": torch.arange(16).float().unsqueeze(1).expand(16, 3),
            "txt_ids": torch.zeros(3, 3),
        }
    if kind == "ZImageTransformer2DModel":
        return noise(4, 1, 8, 8), {"cap_feats": list(noise(_TEXT, 12))}
    shape: tuple[int, ...] = (4, 8, 8)
    if kind in _SEQUENCE:
        shape = (16, 4)
    elif kind in _VIDEO:
        shape = (4, 1, 8, 8)
    elif kind == "CogVideoXTransformer3DModel":
        shape = (2, 4, 4, 4)
    elif kind in ("MochiTransformer3DModel", "LatteTransformer3DModel"):
        shape = (4, 2, 8, 8)
    elif kind == "StableAudioDiTModel":
        shape = (4, 16)
    width = 16 if kind in ("HunyuanDiT2DModel", "MochiTransformer3DModel") else 12
    image, text = noise(*shape), noise(_TEXT, width)
    return image, {"encoder_hidden_states": text, **_more_inputs(kind, batch, noise)}


def _call(model: nn.Module, sample: Tensor, timestep: Tensor, inputs: Inputs) -> Tensor:
    kind = type(unwrap_module(model)).__name__.removeprefix("MoE")
    if kind == "ZImageTransformer2DModel":
        return torch.stack(model(list(sample), t=1 - timestep / 1000, **inputs, return_dict=False)[0])
    if kind == "LTXVideoTransformer3DModel":
        timestep = timestep.unsqueeze(1).expand(-1, sample.shape[1])
    return model(sample, timestep=timestep, **inputs, return_dict=False)[0]


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
                output = _call(model, sample, timestep, inputs)
            total = total + output.chunk(2, dim=1)[0] if output.shape != sample.shape else total + output
        sample = sample - 0.1 * total
    return sample
