"""A tiny random instance of every transformer of diffusers that has lists of blocks, and one step of each.

Sizes are the least that each class takes. `tests/denoisers.py` has more to say of the families that our tests use most.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import torch
from denoisers import SKIPPABLE, UNIT_ONLY, _call, condition, randomize
from diffusers import ModelMixin
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

Inputs = dict[str, Any]
Noise = Callable[..., Tensor]

TEXT = 3
WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
    freq_dim=16, ffn_dim=24, num_layers=3, rope_max_seq_len=16,
)  # fmt: skip
FLUX = dict(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=1,
    joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
)  # fmt: skip


class Spec(NamedTuple):
    """How an instance is made, and what it is called with.

    Args:
        config: Arguments of the class.
        inputs: Arguments of a call but the time, from a source of noise for a batch of 2; the first one is the image.
        time: Arguments that take the timestep, by name, with what it is divided by.
        shape: Of the timestep.
    """

    config: dict[str, Any]
    inputs: Callable[[Noise], Inputs]
    time: Mapping[str, float] = MappingProxyType({"timestep": 1.0})
    shape: tuple[int, ...] = (2,)


def _ids(image: int = 16, text: int = TEXT, axes: int = 3) -> Inputs:
    grid = torch.arange(image).float().unsqueeze(1).expand(image, axes)
    return {"img_ids": grid, "txt_ids": torch.zeros(text, axes)}


def _flux(n: Noise) -> Inputs:
    return {"hidden_states": n(16, 4), "encoder_hidden_states": n(TEXT, 12), **_ids()}


def _video(n: Noise) -> Inputs:
    return {"hidden_states": n(4, 1, 8, 8), "encoder_hidden_states": n(TEXT, 12)}


def _picture(n: Noise) -> Inputs:
    return {"hidden_states": n(4, 8, 8), "encoder_hidden_states": n(TEXT, 12)}


SPECS: dict[str, Spec] = {
    "AceStepTransformer1DModel": Spec(
        dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4,
        ),
        lambda n: {
            "hidden_states": n(8, 4),
            "encoder_hidden_states": n(TEXT, 16),
            "context_latents": n(8, 8),
            "timestep_r": torch.zeros(2),
        },
        {"timestep": 1000.0},
    ),
    "AnyFlowTransformer3DModel": Spec(
        WAN,
        lambda n: {
            "hidden_states": n(1, 4, 8, 8),
            "encoder_hidden_states": n(TEXT, 12),
            "r_timestep": torch.zeros(2, 1),
        },
        shape=(2, 1),
    ),
    "AnyFlowFARTransformer3DModel": Spec(
        {**WAN, "full_chunk_limit": 1, "chunk_partition": (1,)},
        lambda n: {
            "hidden_states": n(1, 4, 8, 8),
            "encoder_hidden_states": n(TEXT, 12),
            "r_timestep": torch.zeros(2, 1),
            "chunk_partition": (1,),
        },
        shape=(2, 1),
    ),
    "BriaTransformer2DModel": Spec(FLUX, _flux),
    "BriaFiboTransformer2DModel": Spec(
        {**FLUX, "text_encoder_dim": 6},
        lambda n: {**_flux(n), "text_encoder_layers": [n(TEXT, 6) for _ in range(4)]},
    ),
    "BriaFibo2Transformer2DModel": Spec(
        dict(
            in_channels=4, patch_size=2, dim=24, n_layers=3, n_refiner_layers=1, n_heads=1, cap_feat_dim=12,
            injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=2,
            gist_min_text_len=2, gist_max_text_len=8, axes_dims=(8, 8, 8), axes_lens=(16, 16, 16),
        ),
        lambda n: {"hidden_states": n(4, 8, 8), "encoder_hidden_states": n(2, TEXT, 12)},
        {"timestep": 1000.0},
    ),
    "ChronoEditTransformer3DModel": Spec(WAN, lambda n: {**_video(n), "hidden_states": n(4, 2, 8, 8)}),
    "CogView3PlusTransformer2DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, text_embed_dim=12,
            time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
        ),
        lambda n: {
            **_picture(n),
            "original_size": torch.full((2, 2), 8.0),
            "target_size": torch.full((2, 2), 8.0),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    "ConsisIDTransformer3DModel": Spec(
        dict(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=12, num_layers=3, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=3,
        ),
        lambda n: {"hidden_states": n(2, 4, 4, 4), "encoder_hidden_states": n(TEXT, 12)},
    ),
    "CosmosTransformer3DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=12, num_layers=3, mlp_ratio=2,
            text_embed_dim=12, adaln_lora_dim=4, max_size=(2, 16, 16), concat_padding_mask=False,
        ),
        _video,
    ),
    "Cosmos3OmniTransformer": Spec(
        dict(
            head_dim=12, hidden_size=24, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
            num_hidden_layers=3, latent_channel=4, patch_latent_dim=16, vocab_size=8,
            rope_scaling={"mrope_section": [2, 2, 2], "mrope_interleaved": True, "rope_type": "default"},
        ),
        lambda n: {
            "vision_tokens": [n(4, 1, 8, 8)[:1]],
            "input_ids": torch.arange(TEXT),
            "text_indexes": torch.arange(TEXT),
            "position_ids": torch.arange(TEXT + 16).unsqueeze(0).expand(3, -1),
            "und_len": TEXT,
            "sequence_length": TEXT + 16,
            "vision_token_shapes": [(1, 4, 4)],
            "vision_sequence_indexes": torch.arange(TEXT, TEXT + 16),
            "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + 16),
            "vision_noisy_frame_indexes": [torch.arange(1)],
        },
        {"vision_timesteps": 1.0},
        (16,),
    ),
    "DreamLiteTransformer2DModel": Spec(
        dict(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, norm_num_groups=2,
            cross_attention_dim=12, use_linear_projection=True,
        ),
        _picture,
    ),
    "EasyAnimateTransformer3DModel": Spec(
        dict(
            num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
            sample_height=8, num_layers=3, mmdit_layers=2, time_embed_dim=8, text_embed_dim=12,
        ),
        _video,
    ),
    "ErnieImageTransformer2DModel": Spec(
        dict(
            hidden_size=24, num_attention_heads=1, num_layers=3, ffn_hidden_size=24, in_channels=4, out_channels=4,
            text_in_dim=12, rope_axes_dim=(8, 8, 8),
        ),
        lambda n: {"hidden_states": n(4, 4, 4), "text_bth": n(TEXT, 12), "text_lens": torch.tensor([TEXT, 2])},
    ),
    "Flux3Transformer2DModel": Spec(
        dict(
            in_channels=4, cond_in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16,
            num_attention_heads=1, joint_attention_dim=12, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda n: {"hidden_states": n(16, 4), "encoder_hidden_states": n(TEXT, 12), **_ids(axes=4)},
        {"timestep": 1000.0},
    ),
    "GlmImageTransformer2DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=1,
            text_embed_dim=12, time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=8,
        ),
        lambda n: {
            **_picture(n),
            "prior_token_id": torch.zeros(2, 16, dtype=torch.long),
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
            "target_size": torch.full((2, 2), 8.0),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    "HeliosTransformer3DModel": Spec(
        {**{key: value for key, value in WAN.items() if key != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        _video,
    ),
    "HiDreamImageTransformer2DModel": Spec(
        dict(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=2, caption_channels=[12, 6], text_emb_dim=12, num_routed_experts=2,
            num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 1, 0, 1],
            force_inference_output=True,
        ),
        lambda n: {
            "hidden_states": n(4, 8, 8),
            "encoder_hidden_states_t5": n(TEXT, 12),
            "encoder_hidden_states_llama3": torch.stack([n(TEXT, 6), n(TEXT, 6)]),
            "pooled_embeds": n(12),
        },
        {"timesteps": 1.0},
    ),
    "HunyuanVideo15Transformer3DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=3,
            num_refiner_layers=1, text_embed_dim=12, text_embed_2_dim=6, image_embed_dim=6, rope_axes_dim=(4, 6, 6),
            target_size=16,
        ),
        lambda n: {
            "hidden_states": n(4, 1, 4, 4),
            "encoder_hidden_states": n(TEXT, 12),
            "encoder_attention_mask": torch.ones(2, TEXT),
            "encoder_hidden_states_2": n(2, 6),
            "encoder_attention_mask_2": torch.ones(2, 2),
            "image_embeds": n(2, 6),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=12,
            rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=6, has_clean_x_embedder=True,
        ),
        lambda n: {
            "hidden_states": n(4, 1, 8, 8),
            "encoder_hidden_states": n(TEXT, 12),
            "encoder_attention_mask": torch.ones(2, TEXT),
            "pooled_projections": n(12),
            "image_embeds": n(2, 6),
            "guidance": torch.full((2,), 6000.0),
            "indices_latents": torch.zeros(1),
            "latents_clean": n(4, 1, 8, 8),
            "indices_latents_clean": torch.zeros(1),
            "latents_history_2x": n(4, 2, 8, 8),
            "indices_latents_history_2x": torch.zeros(2),
            "latents_history_4x": n(4, 4, 8, 8),
            "indices_latents_history_4x": torch.zeros(4),
        },
    ),
    "Ideogram4Transformer2DModel": Spec(
        dict(
            in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=1, intermediate_size=16,
            adaln_dim=8, llm_features_dim=12, mrope_section=(4, 2, 2),
        ),
        lambda n: {
            "hidden_states": n(16 + TEXT, 4),
            "encoder_hidden_states": n(16 + TEXT, 12),
            "position_ids": torch.arange(16 + TEXT).view(1, -1, 1).expand(2, -1, 3),
            "segment_ids": torch.ones(2, 16 + TEXT),
            "indicator": torch.tensor([3] * TEXT + [2] * 16).expand(2, -1),
        },
        {"timestep": 1000.0},
    ),
    "JoyImageEditTransformer3DModel": Spec(
        dict(
            in_channels=4, hidden_size=24, num_attention_heads=2, text_dim=12, mlp_width_ratio=2.0, num_layers=3,
            rope_dim_list=[4, 4, 4],
        ),
        _video,
    ),
    "JoyImageEditPlusTransformer3DModel": Spec(
        dict(
            in_channels=4, hidden_size=24, num_attention_heads=2, text_dim=12, mlp_width_ratio=2.0, num_layers=3,
            rope_dim_list=[4, 4, 4],
        ),
        lambda n: {
            "hidden_states": n(16, 4, 1, 2, 2),
            "encoder_hidden_states": n(TEXT, 12),
            "shape_list": [[(1, 4, 4)]] * 2,
        },
    ),
    "Kandinsky5Transformer3DModel": Spec(
        dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=6, time_dim=8, model_dim=24, ff_dim=24,
            num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 4, 4),
        ),
        lambda n: {
            "hidden_states": n(1, 8, 8, 4),
            "encoder_hidden_states": n(TEXT, 12),
            "pooled_projections": n(6),
            "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    "Kandinsky6Transformer3DModel": Spec(
        dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=6, time_dim=8, model_dim=24, ff_dim=24,
            num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 4, 4), visual_cond=False, in_audio_dim=4,
            out_audio_dim=4,
        ),
        lambda n: {
            "hidden_states": n(1, 8, 8, 4),
            "encoder_hidden_states": n(TEXT, 12),
            "pooled_projections": n(6),
            "audio_hidden_states": n(5, 4),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Spec(
        dict(
            in_visual_dim=4, out_visual_dim=4, time_dim=8, model_dim=64, ff_dim=16, num_visual_blocks=3,
            axes_dims=(16, 24, 24),
        ),
        lambda n: {"hidden_states": n(1, 8, 8, 9)},
    ),
    "Krea2Transformer2DModel": Spec(
        dict(
            in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=12, num_text_layers=2,
            text_num_attention_heads=1, text_num_key_value_heads=1, text_intermediate_size=12,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        ),
        lambda n: {
            "hidden_states": n(16, 4),
            "encoder_hidden_states": n(TEXT, 2, 12),
            "position_ids": torch.arange(16 + TEXT).unsqueeze(1).expand(-1, 3),
        },
        {"timestep": 1000.0},
    ),
    "LongCatAudioDiTTransformer": Spec(
        dict(dit_dim=16, dit_depth=3, dit_heads=2, dit_text_dim=12, latent_dim=4, ff_mult=2.0),
        lambda n: {
            "hidden_states": n(8, 4),
            "encoder_hidden_states": n(TEXT, 12),
            "encoder_attention_mask": torch.ones(2, TEXT),
        },
        {"timestep": 1000.0},
    ),
    "LongCatImageTransformer2DModel": Spec({**FLUX, "pooled_projection_dim": 12}, _flux, {"timestep": 1000.0}),
    "LTX2VideoTransformer3DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=3, caption_channels=12,
        ),
        lambda n: {
            "hidden_states": n(16, 4),
            "encoder_hidden_states": n(TEXT, 12),
            "audio_hidden_states": n(5, 4),
            "audio_encoder_hidden_states": n(TEXT, 12),
            "num_frames": 1,
            "height": 4,
            "width": 4,
            "audio_num_frames": 5,
        },
    ),
    "LuminaNextDiT2DModel": Spec(
        dict(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=3, num_attention_heads=2, num_kv_heads=1,
            multiple_of=8, cross_attention_dim=12,
        ),
        lambda n: {
            **_picture(n),
            "encoder_mask": torch.ones(2, TEXT),
            "cross_attention_kwargs": {},
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 6), torch.zeros(8, 8, 6)),
        },
        {"timestep": 1000.0},
    ),
    "MiniMaxH3Transformer3DModel": Spec(
        dict(
            num_attention_heads=1, attention_head_dim=16, hidden_size=16, num_layers=3, num_refiner_layers=1,
            ffn_dim=16, in_channels=4, audio_in_channels=4, text_dim=12, freq_dim=8,
            time_embed_hidden_dim=16, time_embed_dim=8, rope_freq_dim=2,
        ),
        lambda n: {
            "hidden_states": n(16, 16)[:1],
            "audio_hidden_states": n(4, 4)[:1],
            "encoder_hidden_states": n(TEXT, 12)[:1],
            "timestep_indices": torch.zeros(TEXT + 20, dtype=torch.long),
            "token_tags": torch.tensor([0] * TEXT + [1] * 16 + [2] * 4),
            "position_ids": torch.arange(TEXT + 20).unsqueeze(1).expand(-1, 3),
            "text_indices": torch.arange(TEXT),
            "video_indices": torch.arange(TEXT, TEXT + 16),
            "audio_indices": torch.arange(TEXT + 16, TEXT + 20),
        },
    ),
    "MiniMaxMusic3RVQDepthDecoder": Spec(
        dict(
            hidden_size=16, num_layers=3, num_attention_heads=2, intermediate_size=16, audio_vocab_size=8,
            num_codebooks=2,
        ),
        lambda n: {"inputs_embeds": n(4, 16)},
        {},
    ),
    "MiniMaxMusic3Transformer1DModel": Spec(
        dict(
            in_channels=4, condition_dim=12, num_layers=3, num_attention_heads=2, attention_head_dim=8, ff_inner_dim=16,
            rotary_dim=4, fourier_embedding_dim=8,
        ),
        lambda n: {"hidden_states": n(4, 8), "encoder_hidden_states": n(8, 12)},
    ),
    "MotifVideoTransformer3DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=2,
            num_single_layers=3, num_decoder_layers=1, text_embed_dim=12, rope_axes_dim=(4, 6, 6),
        ),
        _video,
    ),
    "NucleusMoEImageTransformer2DModel": Spec(
        dict(
            in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=12, axes_dims_rope=(4, 6, 6), mlp_ratio=1.0, num_experts=2, moe_intermediate_dim=8,
            capacity_factors=2.0, dense_moe_strategy="leave_first_block_dense",
        ),
        lambda n: {
            "hidden_states": n(16, 16),
            "encoder_hidden_states": n(TEXT, 12),
            "img_shapes": [(1, 4, 4)] * 2,
            "encoder_hidden_states_mask": torch.ones(2, TEXT, dtype=torch.bool),
        },
        {"timestep": 1000.0},
    ),
    "OmniGenTransformer2DModel": Spec(
        dict(
            in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
            num_layers=3, pad_token_id=0, vocab_size=8, max_position_embeddings=64, original_max_position_embeddings=64,
            pos_embed_max_size=8, time_step_dim=8,
            rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        ),
        lambda n: {
            "hidden_states": n(4, 8, 8),
            "input_ids": torch.ones(2, TEXT, dtype=torch.long),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(2, TEXT + 17, TEXT + 17),
            "position_ids": torch.arange(TEXT + 17).expand(2, -1),
        },
    ),
    "OvisImageTransformer2DModel": Spec({**FLUX, "out_channels": 4}, _flux, {"timestep": 1000.0}),
    "PRXTransformer2DModel": Spec(
        dict(
            in_channels=4, context_in_dim=12, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=3, axes_dim=[4, 4],
        ),
        _picture,
        {"timestep": 1000.0},
    ),
    "PriorTransformer": Spec(
        dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=12, num_embeddings=TEXT),
        lambda n: {"hidden_states": n(12), "proj_embedding": n(12), "encoder_hidden_states": n(TEXT, 12)},
    ),
    "QwenImage21Transformer2DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=1,
            context_in_dim=12, mlp_ratio=1, axes_dims_rope=(4, 6, 6),
        ),
        lambda n: {
            "hidden_states": n(16, 4),
            "encoder_hidden_states": n(TEXT, 12),
            "img_shapes": [[(1, 4, 4)]] * 2,
            "img_mask": torch.tensor([[False] * TEXT + [True] * 4] * 2),
        },
        {"timestep": 1000.0},
    ),
    "RFD4ProteinaTransformer": Spec(
        dict(
            nlayers=3, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, token_type_emb_dim=4,
            cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=8, xt_pair_dist_dim=8, tri_mult_c=4, num_sequence_classes=4,
            feats_seq=("xt_bb_ca", "xt_local_latents"), feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
            feats_pair_repr=("xt_bb_ca_pair_dists",), feats_pair_cond=("time_emb_bb_ca",),
        ),
        lambda n: {
            "bb_ca": n(5, 3),
            "local_latents": n(5, 4),
            "padding_mask": torch.ones(2, 5),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(2, 5),
                "supports_local_latent": torch.ones(2, 5),
            },
        },
        {"bb_ca_time": 1000.0, "local_latents_time": 1000.0},
    ),
    "SanaVideoTransformer3DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=12, num_layers=3,
            num_cross_attention_heads=1, cross_attention_head_dim=12, cross_attention_dim=12, caption_channels=12,
            sample_size=8, rope_max_seq_len=16,
        ),
        _video,
    ),
    "SanaWMTransformer3DModel": Spec(
        dict(
            in_channels=4, num_layers=4, hidden_size=24, num_attention_heads=2, softmax_every_n=2, linear_head_dim=12,
            caption_channels=12, chunk_plucker_channels=4,
        ),
        lambda n: {
            "hidden_states": n(4, 2, 4, 4),
            "encoder_hidden_states": n(1, TEXT, 12),
            "encoder_attention_mask": torch.ones(2, TEXT),
        },
        shape=(2, 1, 2),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Spec(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=3, caption_channels=12, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=1,
            audio_attention_head_dim=8, audio_cross_attention_dim=8,
        ),
        lambda n: {
            "hidden_states": n(16, 4),
            "encoder_hidden_states": n(TEXT, 12),
            "video_rotary_emb": (torch.ones(2, 16, 16), torch.zeros(2, 16, 16)),
        },
    ),
    "SkyReelsV2Transformer3DModel": Spec(WAN, _video),
    "StableAudio3DiTModel": Spec(
        dict(
            io_channels=4, embed_dim=16, depth=3, num_heads=2, cond_token_dim=12, global_cond_dim=12,
            local_add_cond_dim=4, timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=2,
        ),
        lambda n: {"hidden_states": n(4, 8), "encoder_hidden_states": n(TEXT, 12), "global_hidden_states": n(12)},
        {"timestep": 1000.0},
    ),
    "T5FilmDecoder": Spec(
        dict(input_dims=4, targets_length=8, d_model=16, num_layers=3, num_heads=2, d_kv=8, d_ff=16),
        lambda n: {
            "decoder_input_tokens": n(8, 4),
            "encodings_and_masks": [(n(TEXT, 16), torch.ones(2, TEXT))],
        },
        {"decoder_noise_time": 1000.0},
    ),
    "Transformer2DModel": Spec(
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, norm_num_groups=2,
             cross_attention_dim=12),
        _picture,
    ),
    "TransformerTemporalModel": Spec(
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, norm_num_groups=2),
        lambda n: {"hidden_states": n(4, 4, 4), "num_frames": 2},
    ),
    "WanAnimateTransformer3DModel": Spec(
        {
            **WAN,
            **dict(
                in_channels=12, latent_channels=4, image_dim=6, motion_encoder_channel_sizes={"4": 4, "8": 4},
                motion_encoder_size=8, motion_style_dim=8, motion_dim=2, motion_encoder_dim=8,
                face_encoder_hidden_dim=12, face_encoder_num_heads=1, inject_face_latents_blocks=3,
            ),
        },
        lambda n: {
            "hidden_states": n(12, 2, 8, 8),
            "encoder_hidden_states": n(TEXT, 12),
            "encoder_hidden_states_image": n(2, 6),
            "pose_hidden_states": n(4, 1, 8, 8),
            "face_pixel_values": n(3, 4, 8, 8),
        },
    ),
    "WanAnimate2Transformer3DModel": Spec(
        dict(
            text_len=TEXT, in_dim=8, dim=12, ffn_dim=24, freq_dim=16, text_dim=12, out_dim=4, num_heads=1, num_layers=3,
            use_img_emb=False,
        ),
        lambda n: {
            "hidden_states": list(n(4, 1, 8, 8)),
            "encoder_hidden_states": list(n(TEXT, 12)),
            "condition_latents": list(n(4, 1, 8, 8)),
            "kv_cache": WanAnimate2KVCache(3),
            "kv_cache_mode": "extract",
            "seq_len": 16,
            "offset_grid_sizes": torch.tensor([[1, 4, 4]] * 2),
        },
    ),
}  # fmt: skip


@cache
def all_transformers() -> dict[str, type[nn.Module]]:
    """Return every model class of `diffusers.models.transformers` that makes lists of blocks, by name."""
    found: dict[str, type[nn.Module]] = {}
    package = diffusers.models.transformers
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, cls in vars(importlib.import_module(module.name)).items():
            own = inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == module.name
            if own and "ModuleList" in inspect.getsource(cls):
                found[name] = cls
    return dict(sorted(found.items()))


_FAMILIES = {**SKIPPABLE, **UNIT_ONLY}


@cache
def _family_of() -> dict[str, str]:
    """Return the builders of `tests/denoisers.py` by class of what they return."""
    return {str(inspect.signature(build).return_annotation): family for family, build in _FAMILIES.items()}


def build(name: str) -> nn.Module:
    """Return a tiny instance of a class in evaluation mode, its weights the same each time."""
    torch.manual_seed(0)
    if name not in SPECS:
        return _FAMILIES[_family_of()[name]]()
    spec = SPECS[name]
    model = all_transformers()[name](**spec.config)
    for parameter in model.parameters():
        if parameter.ndim == 3:  # experts are made by torch.empty
            nn.init.normal_(parameter, std=0.2)
    return randomize(model)


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _leaves(each)


@torch.no_grad()
def steps(model: nn.Module, name: str, count: int = 5) -> list[Tensor]:
    """Call a model at the steps of a smooth path, and return what it gives at each, in one tensor.

    Args:
        model: What `build` returned for the name.
        name: Of its class.
        count: Steps.
    """
    found = []
    for step in range(count):
        generator = torch.Generator().manual_seed(0)
        moved = [False]

        def noise(*shape: int, moved: list[bool] = moved, at: int = step, source: Any = generator) -> Tensor:
            first = torch.randn(2, *shape, generator=source)
            if moved[0]:
                return first
            moved[0] = True  # the image
            return first + 0.01 * at * torch.randn(2, *shape, generator=source)

        time = 900.0 - 0.2 * step
        if name in SPECS:
            spec = SPECS[name]
            inputs = spec.inputs(noise)
            for argument, scale in spec.time.items():
                inputs[argument] = torch.full(spec.shape, time / scale)
            names = inspect.signature(type(model).forward).parameters
            if "return_dict" in names:
                inputs["return_dict"] = False
            output = model(**{argument: inputs[argument] for argument in names if argument in inputs})
        else:
            sample, inputs = condition(model, 2)
            other, _ = condition(model, 2, seed=1)
            output = _call(model, sample + 0.01 * step * other, torch.full((2,), time), inputs)
        found.append(torch.cat([each.flatten().float() for each in _leaves(output)]))
    return found
