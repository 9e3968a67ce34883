"""RePaMlpMixer: an MLP-Mixer whose channel-mixing layers shrink exactly after training.

RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network Layers
(ICML 2025), https://arxiv.org/abs/2505.21847. Authors' code: https://github.com/Ackesnal/RePaViT (Apache-2.0), which
has this form without results or weights.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from zoo.cfg import ModelCfg
from zoo.layers.ffn import RePaFFN, active_channels, convert_ffn_keys, ffn_facts, idle_ratio_of, idle_untold
from zoo.weights import build_model

__all__ = ["RePaMixerBlock", "RePaMlpMixer", "checkpoint_filter_fn", "detect", "untold"]


class RePaMixerBlock(nn.Module):
    """Mix tokens with a vanilla feed-forward layer, then channels with a `RePaFFN`.

    The LayerNorm of token mixing runs over the tokens, not over the channels as in MLP-Mixer.

    Args:
        dim: Channels C.
        seq_len: Tokens N.
        active_dim: Hidden channels with activation, of 4 * C.
        feature_norm: Norm of channel mixing.
        merged: Build channel mixing in its inference form.
        drop: Dropout rate of both outputs.
        drop_path: Rate at which a sample skips a layer in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        active_dim: int,
        *,
        feature_norm: Literal["BatchNorm", "LayerNorm"] = "BatchNorm",
        merged: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mlp_tokens = RePaFFN(
            seq_len,
            dim // 2,
            dim // 2,
            feature_norm="LayerNorm",
            drop=drop,
            drop_path=drop_path,
            device=device,
            dtype=dtype,
        )
        self.mlp_channels = RePaFFN(
            dim,
            4 * dim,
            active_dim,
            feature_norm=feature_norm,
            merged=merged,
            drop=drop,
            drop_path=drop_path,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp_tokens(x.transpose(1, 2)).transpose(1, 2)  # (B, C, N) and back
        return self.mlp_channels(x)


class RePaMlpMixer(MlpMixer):
    """Classify images or extract features; timm's MlpMixer with `RePaMixerBlock`s.

    Built in training form. After training, `zoo.reparameterize(model.eval())` merges the channel mixing; the token
    mixing has a LayerNorm and stays. Differs from the paper's code: there `idle_ratio` is ignored and always 0.75.

    Args:
        img_size: Input height and width, pixels; the weights of token mixing depend on it.
        patch_size: Side of a patch, pixels.
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "avg", or "" for all tokens.
        embed_dim: Channels C.
        num_blocks: Number of blocks.
        idle_ratio: Share of hidden channels without activation, 0 ... 1.
        channel_idle: False activates every channel, whatever `idle_ratio`.
        feature_norm: "BatchNorm", or "LayerNorm" for vanilla channel mixing, which cannot be merged.
        merged: Build the inference form, for weights that were merged.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the layers' outputs.
        drop_path_rate: Rate at which a sample skips a layer, the same in every block.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chans, H, W), normalised -> (B, num_classes).

    Raises:
        ValueError: An argument is not one of the allowed values.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg"] = "avg",
        embed_dim: int = 512,
        num_blocks: int = 8,
        idle_ratio: float = 0.75,
        *,
        channel_idle: bool = True,
        feature_norm: Literal["BatchNorm", "LayerNorm"] = "BatchNorm",
        merged: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if global_pool not in ("", "avg"):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}.")
        if feature_norm not in ("BatchNorm", "LayerNorm"):
            raise ValueError(f"feature_norm must be 'BatchNorm' or 'LayerNorm', got {feature_norm!r}.")
        super().__init__(
            img_size=img_size,  # type: ignore[arg-type]  # timm takes a pair too
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            num_blocks=0,  # timm's blocks would be built only to be replaced
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
        )
        self.blocks = nn.Sequential(
            *(
                RePaMixerBlock(
                    embed_dim,
                    self.stem.num_patches,
                    active_channels(4 * embed_dim, idle_ratio if channel_idle else 0.0),
                    feature_norm=feature_norm,
                    merged=merged,
                    drop=proj_drop_rate,
                    drop_path=drop_path_rate,
                    device=device,
                    dtype=dtype,
                )
                for _ in range(num_blocks)
            )
        )
        self.blocks.apply(_init_ffn)
        reduction = self.stem.feat_ratio()
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(num_blocks)
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name no parameter: there is no position embedding; biases and norms are exempt by their shape."""
        return set()


def _init_ffn(module: nn.Module) -> None:
    """Start as timm's Mixer does: Xavier-uniform for the undivided hidden layer, biases near zero."""
    if not isinstance(module, RePaFFN):
        return
    bound = math.sqrt(6 / (module.dim + module.hidden_dim))
    for layer in (module.active_fc1, module.active_fc2, module.idle_fc1, module.idle_fc2):
        if layer is not None:
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=1e-6)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys, in training or merged form, to ours; our own keys pass unchanged.

    Args:
        state_dict: Weights in the authors' or our naming.
        model: The `RePaMlpMixer` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form.
    """
    return convert_ffn_keys(state_dict, model)


_VARIANTS: dict[str, dict[str, Any]] = {
    "repamlpmixer_s32": dict(patch_size=32, embed_dim=512, num_blocks=8),
    "repamlpmixer_s16": dict(patch_size=16, embed_dim=512, num_blocks=8),
    "repamlpmixer_b32": dict(patch_size=32, embed_dim=768, num_blocks=12),
    "repamlpmixer_b16": dict(patch_size=16, embed_dim=768, num_blocks=12),
    "repamlpmixer_l32": dict(patch_size=32, embed_dim=1024, num_blocks=24),
    "repamlpmixer_l16": dict(patch_size=16, embed_dim=1024, num_blocks=24),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise a RePaMlpMixer of a published size by its weights.

    Args:
        state_dict: Weights in the authors' or our naming.

    Returns:
        (registered name, constructor arguments), or None for another network.
    """
    patch = state_dict.get("stem.proj.weight")
    depth = len({found[1] for key in state_dict if (found := re.match(r"blocks\.(\d+)\.mlp_channels\.", key))})
    facts = [ffn_facts(state_dict, f"blocks.{i}.mlp_channels.") for i in range(depth)]
    if patch is None or "blocks.0.mlp_tokens.norm.weight" not in state_dict or not facts or None in facts:
        return None
    size = dict(patch_size=patch.shape[2], embed_dim=patch.shape[0], num_blocks=depth)
    name = next((name for name, args in _VARIANTS.items() if args == size), None)
    if name is None:
        return None
    layers = [fact for fact in facts if fact is not None]
    kwargs: dict[str, Any] = dict(
        img_size=math.isqrt(state_dict["blocks.0.mlp_tokens.norm.weight"].shape[0]) * patch.shape[2],
        in_chans=patch.shape[1],
        num_classes=state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        merged=layers[0].merged,
        feature_norm=layers[0].feature_norm,
    )
    active = [(4 * patch.shape[0], layer.active_dim) for layer in layers if layer.active_dim is not None]
    ratio = idle_ratio_of(active) if active else None
    if ratio is not None:
        kwargs["idle_ratio"] = ratio
    return name, kwargs


def untold(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Return the arguments that change the outputs and that no tensor tells, with what they may be."""
    return idle_untold(state_dict)


def _cfg(patch_size: int) -> ModelCfg:
    side = 224 // patch_size
    return ModelCfg(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(side, side),
        fixed_input_size=True,
        interpolation="bicubic",
        crop_pct=0.875,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="stem.proj",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/Ackesnal/RePaViT",
        paper_ids="arXiv:2505.21847",
        paper_name="RePaViT: Scalable Vision Transformer Acceleration "
        "via Structural Reparameterization on Feedforward Network Layers",
        parity="Meets the authors' outputs to 4.2e-15 (relative, float64): logits, blocks and the merged form.",
        notes=("The authors published no weights of this form.",),
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg(args["patch_size"]) for name, args in _VARIANTS.items()}
)


def _create_repamlpmixer(variant: str, pretrained: bool = False, **kwargs: Any) -> RePaMlpMixer:
    return build_model(
        RePaMlpMixer,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )


@register_model
def repamlpmixer_s32(pretrained: bool = False, **kwargs: Any) -> RePaMlpMixer:
    """RePaMlpMixer-S/32: 19.1 M parameters, 8.6 M merged; 1.00 GMACs at 224, 0.49 merged."""
    return _create_repamlpmixer("repamlpmixer_s32", pretrained, **kwargs)


@register_model
def repamlpmixer_s16(pretrained: bool = False, **kwargs: Any) -> RePaMlpMixer:
    """RePaMlpMixer-S/16: 18.6 M parameters, 8.0 M merged; 3.78 GMACs at 224, 1.72 merged."""
    return _create_repamlpmixer("repamlpmixer_s16", pretrained, **kwargs)


@register_model
def repamlpmixer_b32(pretrained: bool = False, **kwargs: Any) -> RePaMlpMixer:
    """RePaMlpMixer-B/32: 60.3 M parameters, 24.8 M merged; 3.24 GMACs at 224, 1.50 merged."""
    return _create_repamlpmixer("repamlpmixer_b32", pretrained, **kwargs)


@register_model
def repamlpmixer_b16(pretrained: bool = False, **kwargs: Any) -> RePaMlpMixer:
    """RePaMlpMixer-B/16: 59.9 M parameters, 24.4 M merged; 12.6 GMACs at 224, 5.67 merged."""
    return _create_repamlpmixer("repamlpmixer_b16", pretrained, **kwargs)


@register_model
def repamlpmixer_l32(pretrained: bool = False, **kwargs: Any) -> RePaMlpMixer:
    """RePaMlpMixer-L/32: 207.1 M parameters, 80.9 M merged; 11.3 GMACs at 224, 5.09 merged."""
    return _create_repamlpmixer("repamlpmixer_l32", pretrained, **kwargs)


@register_model
def repamlpmixer_l16(pretrained: bool = False, **kwargs: Any) -> RePaMlpMixer:
    """RePaMlpMixer-L/16: 208.4 M parameters, 82.2 M merged; 44.5 GMACs at 224, 19.9 merged."""
    return _create_repamlpmixer("repamlpmixer_l16", pretrained, **kwargs)
