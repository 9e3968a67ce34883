"""RePaSwin: a Swin transformer whose feed-forward layers shrink exactly after training.

RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network Layers
(ICML 2025), https://arxiv.org/abs/2505.21847. Authors' code: https://github.com/Ackesnal/RePaViT (Apache-2.0).
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    resample_patch_embed,
    resize_rel_pos_bias_table,
)
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage, WindowAttention
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from zoo.cfg import ModelCfg
from zoo.layers.derived import derive_after_loading
from zoo.layers.ffn import RePaFFN, active_channels, convert_ffn_keys, ffn_facts, idle_ratio_of, idle_untold
from zoo.weights import build_model

__all__ = ["RePaSwin", "RePaSwinBlock", "checkpoint_filter_fn", "detect", "untold"]


class RePaSwinBlock(SwinTransformerBlock):
    """Window attention with a LayerNorm before it, then a `RePaFFN` that holds its own norms and residual.

    Windows, shift and attention mask are timm's; the constructor is not called, because it would build another
    feed-forward layer first.

    Args:
        dim: Channels C.
        input_resolution: Height and width of the token map.
        num_heads: Attention heads.
        hidden_dim: Hidden channels of the feed-forward layer.
        active_dim: Hidden channels with activation.
        window_size: Height and width of a window, tokens.
        shift_size: Shift of the windows, tokens.
        dynamic_mask: Compute the attention mask in each forward, for inputs of any size.
        feature_norm: Norm of the feed-forward layer.
        merged: Build the feed-forward layer in its inference form.
        proj_drop: Dropout rate of both branches' outputs.
        attn_drop: Dropout rate of the attention weights.
        drop_path: Rate at which a sample skips a branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        hidden_dim: int,
        active_dim: int,
        window_size: tuple[int, int],
        shift_size: tuple[int, int],
        *,
        dynamic_mask: bool = False,
        feature_norm: Literal["BatchNorm", "LayerNorm"] = "BatchNorm",
        merged: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.dim = dim
        self.input_resolution = input_resolution
        self.always_partition = False
        self.dynamic_mask = dynamic_mask
        self.target_shift_size = shift_size
        self.window_size, self.shift_size = self._calc_window_shift(window_size, shift_size)
        self.window_area = self.window_size[0] * self.window_size[1]
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = WindowAttention(
            dim,
            num_heads,
            window_size=self.window_size,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = RePaFFN(  # type: ignore[assignment]
            dim,
            hidden_dim,
            active_dim,
            feature_norm=feature_norm,
            drop=proj_drop,
            drop_path=drop_path,
            merged=merged,
            device=device,
            dtype=dtype,
        )
        self.register_buffer("attn_mask", None, persistent=False)
        self.reset_parameters()
        derive_after_loading(self)

    def derive_buffers(self) -> None:
        """Compute the attention mask and the offsets of pairs of tokens on the device of the weights."""
        attention: Any = self.attn
        place: Any = self.norm1.weight
        attention.relative_position_index = torch.empty_like(attention.relative_position_index, device=place.device)
        attention.init_non_persistent_buffers()
        self.init_non_persistent_buffers()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        return self.mlp(x)


class RePaSwin(SwinTransformer):
    """Classify images or extract features; timm's SwinTransformer with `RePaSwinBlock`s.

    Built in training form. After training, `zoo.reparameterize(model.eval())` merges the feed-forward layers.
    Differs from the paper's code: token maps that the window does not divide are padded, and idle ratios are exact.

    Args:
        img_size: Input height and width, pixels; `set_input_size` changes it later.
        patch_size: Side of a patch, pixels.
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the token map.
        embed_dim: Channels C of the first stage; each stage doubles them.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Side of a window, tokens; a pair is (height, width), one pair a stage is possible.
        mlp_ratio: Hidden channels of the feed-forward layers, over C.
        idle_ratio: Share of hidden channels without activation, 0 ... 1.
        channel_idle: False activates every channel, whatever `idle_ratio`.
        feature_norm: "BatchNorm", or "LayerNorm" for the vanilla layer, which cannot be merged.
        merged: Build the inference form, for weights that were merged.
        dynamic_img_size: Take any size; attention masks are built in each forward.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of attention and feed-forward outputs.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Rate at which a sample skips a branch of the last block; grows linearly from 0.
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
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax", "catavgmax"] = "avg",
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        *,
        window_size: int | tuple[int, int] | tuple[tuple[int, int], ...] = 7,
        mlp_ratio: float = 4.0,
        idle_ratio: float = 0.75,
        channel_idle: bool = True,
        feature_norm: Literal["BatchNorm", "LayerNorm"] = "BatchNorm",
        merged: bool = False,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(depths) != len(num_heads):
            raise ValueError(f"depths and num_heads must have one entry a stage, got {depths} and {num_heads}.")
        if feature_norm not in ("BatchNorm", "LayerNorm"):
            raise ValueError(f"feature_norm must be 'BatchNorm' or 'LayerNorm', got {feature_norm!r}.")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=(0,) * len(depths),  # timm's blocks would be built only to be replaced
            num_heads=num_heads,
            window_size=window_size,  # type: ignore[arg-type]  # timm takes a pair a stage too
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
        )
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        windows = cast(tuple[tuple[int, int], ...], self._ref_window_sizes)  # one a stage
        for i, layer in enumerate(self.layers):
            stage, dim, window = cast(SwinTransformerStage, layer), embed_dim * 2**i, windows[i]
            hidden_dim = int(dim * mlp_ratio)
            active_dim = active_channels(hidden_dim, idle_ratio if channel_idle else 0.0)
            stage.depth = depths[i]
            stage.blocks = nn.Sequential(
                *(
                    RePaSwinBlock(
                        dim,
                        cast(tuple[int, int], stage.output_resolution),
                        num_heads[i],
                        hidden_dim,
                        active_dim,
                        window,
                        (window[0] // 2, window[1] // 2) if j % 2 else (0, 0),
                        dynamic_mask=dynamic_img_size,
                        feature_norm=feature_norm,
                        merged=merged,
                        proj_drop=proj_drop_rate,
                        attn_drop=attn_drop_rate,
                        drop_path=rates[i][j],
                        device=device,
                        dtype=dtype,
                    )
                    for j in range(depths[i])
                )
            )
            if not next(stage.parameters()).is_meta:  # drawing numbers that are not there takes half a second
                stage.blocks.apply(init_weights_vit_timm)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys, in training or merged form, to ours; our own keys pass unchanged.

    The authors merge patches at the end of a stage, timm and we at the start of the next. Attention masks and position
    indices are dropped, they are computed. A patch embedding or position table of another size is resampled.

    Args:
        state_dict: Weights in the authors' or our naming.
        model: The `RePaSwin` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form.
    """
    own, converted = model.state_dict(), {}
    authors = "head.weight" in state_dict or any(key.startswith("layers.0.downsample.") for key in state_dict)
    for key, value in state_dict.items():
        if key.endswith((".attn_mask", ".relative_position_index")):
            continue
        if authors:
            key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample.", key)
            key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key == "patch_embed.proj.weight" and value.ndim == 4 and value.shape[-2:] != own[key].shape[-2:]:
            value = resample_patch_embed(value, list(own[key].shape[-2:]))
        if key.endswith(".relative_position_bias_table") and key in own and len(value) != len(own[key]):
            square, heads = math.isqrt(len(value)) ** 2 == len(value), value.shape[1:] == own[key].shape[1:]
            if square and heads:  # otherwise strict loading says what is wrong
                window = cast(WindowAttention, model.get_submodule(key.rpartition(".")[0])).window_size
                value = resize_rel_pos_bias_table(value, window, tuple(own[key].shape))
        converted[key] = value
    return convert_ffn_keys(converted, model)


_VARIANTS: dict[str, dict[str, Any]] = {
    "repaswin_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "repaswin_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "repaswin_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise a RePaSwin of a published size by its weights.

    The idle ratio can be read from our keys and from merged weights; the authors' training form does not hold it and
    gets the published one. The image size is not stored either.

    Args:
        state_dict: Weights in the authors' or our naming.

    Returns:
        (registered name, constructor arguments), or None for another network.
    """
    patch = state_dict.get("patch_embed.proj.weight")
    table = state_dict.get("layers.0.blocks.0.attn.relative_position_bias_table")
    found = {match[0] for key in state_dict if (match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.", key))}
    facts = {prefix: ffn_facts(state_dict, prefix) for prefix in sorted(found)}
    if patch is None or table is None or not facts or None in facts.values():
        return None
    layers = {prefix: fact for prefix, fact in facts.items() if fact is not None}
    depths = tuple(sum(prefix.startswith(f"layers.{stage}.") for prefix in layers) for stage in range(4))
    size = (patch.shape[0], depths)
    name = next((name for name, args in _VARIANTS.items() if (args["embed_dim"], args["depths"]) == size), None)
    if name is None:
        return None
    head = state_dict.get("head.fc.weight", state_dict.get("head.weight"))
    first = next(iter(layers.values()))
    kwargs: dict[str, Any] = dict(
        patch_size=patch.shape[2],
        in_chans=patch.shape[1],
        num_classes=0 if head is None else head.shape[0],
        window_size=(math.isqrt(table.shape[0]) + 1) // 2,
        merged=first.merged,
        feature_norm=first.feature_norm,
    )
    hidden = {prefix: 4 * size[0] * 2 ** int(prefix.split(".")[1]) for prefix in layers}
    active = [(hidden[prefix], fact.active_dim) for prefix, fact in layers.items() if fact.active_dim is not None]
    ratio = idle_ratio_of(active) if active else None
    if ratio is not None:
        kwargs["idle_ratio"] = ratio
    return name, kwargs


def untold(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Return the arguments that change the outputs and that no tensor tells, with what they may be."""
    return {
        **idle_untold(state_dict),
        "img_size": "pixels; windows and their shifts depend on it",
    }


_NOTES = (
    "The authors' weights are at https://huggingface.co/Ackesnal/RePaViT; their file names are not known here: the one"
    " that names the variant is taken, and checked by strict loading.",
)


def _cfg(**kwargs: Any) -> ModelCfg:
    fields: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        fixed_input_size=True,
        interpolation="bicubic",
        crop_pct=0.875,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head.fc",
        license="apache-2.0",
        origin_url="https://github.com/Ackesnal/RePaViT",
        paper_ids="arXiv:2505.21847",
        paper_name="RePaViT: Scalable Vision Transformer Acceleration "
        "via Structural Reparameterization on Feedforward Network Layers",
        parity="Meets the authors' outputs to 4.2e-15 (relative, float64): logits, blocks and the merged form.",
        notes=_NOTES,
    )
    return ModelCfg(**{**fields, **kwargs})


def _authors(top1: float) -> ModelCfg:
    """Return the cfg of the authors' weights of a variant."""
    return _cfg(top1=top1, hf_hub_id="Ackesnal/RePaViT", hub_search=True)


default_cfgs = generate_default_cfgs(
    {
        "repaswin_tiny.in1k": _authors(top1=78.4),
        "repaswin_small.in1k": _authors(top1=81.4),
        "repaswin_base.in1k": _authors(top1=82.6),
    }
)


def _create_repaswin(variant: str, pretrained: bool = False, **kwargs: Any) -> RePaSwin:
    return build_model(
        RePaSwin,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def repaswin_tiny(pretrained: bool = False, **kwargs: Any) -> RePaSwin:
    """RePaSwin-Tiny/0.75: 28.3 M parameters, 17.5 M merged; 4.49 GMACs at 224, 2.76 merged."""
    return _create_repaswin("repaswin_tiny", pretrained, **kwargs)


@register_model
def repaswin_small(pretrained: bool = False, **kwargs: Any) -> RePaSwin:
    """RePaSwin-Small/0.75: 49.7 M parameters, 29.9 M merged; 8.74 GMACs at 224, 5.27 merged."""
    return _create_repaswin("repaswin_small", pretrained, **kwargs)


@register_model
def repaswin_base(pretrained: bool = False, **kwargs: Any) -> RePaSwin:
    """RePaSwin-Base/0.75: 87.9 M parameters, 52.8 M merged; 15.4 GMACs at 224, 9.27 merged."""
    return _create_repaswin("repaswin_base", pretrained, **kwargs)
