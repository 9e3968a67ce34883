"""RePaViT: a vision transformer whose feed-forward layers shrink exactly after training.

RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network Layers
(ICML 2025), https://arxiv.org/abs/2505.21847. Authors' code: https://github.com/Ackesnal/RePaViT (Apache-2.0).
The Swin, MLP-Mixer and PoolFormer forms are in repaswin.py, repamlpmixer.py and repapoolformer.py.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    Attention,
    DropPath,
    LayerNorm,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    resample_patch_embed,
)
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo.cfg import CIFAR10, IMAGENETTE, ModelCfg
from zoo.layers.ffn import RePaFFN, active_channels, convert_ffn_keys, ffn_facts, idle_ratio_of, idle_untold
from zoo.weights import build_model, shipped

__all__ = ["RePaBlock", "RePaViT", "checkpoint_filter_fn", "detect", "layer_idle_ratios", "untold"]


def layer_idle_ratios(
    idle_ratio: float, depth: int, heuristic: Literal["static", "linear"] = "static"
) -> tuple[Fraction, ...]:
    """Return the exact idle ratio of each layer.

    Args:
        idle_ratio: The same for every layer ("static"), or their mean over all but the last ("linear").
        depth: Number of layers.
        heuristic: "linear" grows with depth: (2t - 1) + (2 - 2t)(i + 1) / (depth - 1) for layer i, kept in 0 ... 1, and
            0 for the last layer.

    Raises:
        ValueError: `heuristic` is another word, or `idle_ratio` lies outside 0 ... 1.
    """
    if heuristic not in ("static", "linear"):
        raise ValueError(f"heuristic must be 'static' or 'linear', got {heuristic!r}.")
    if not 0 <= idle_ratio <= 1:
        raise ValueError(f"idle_ratio must lie in 0 ... 1, got {idle_ratio}.")
    ratio = Fraction(idle_ratio).limit_denominator(10**6)
    if heuristic == "static":
        return (ratio,) * depth
    rising = [(2 * ratio - 1) + (2 - 2 * ratio) * Fraction(i + 1, depth - 1) for i in range(depth - 1)]
    return (*(min(max(value, Fraction(0)), Fraction(1)) for value in rising), Fraction(0))


class RePaBlock(nn.Module):
    """Attention with a LayerNorm before it, then a `RePaFFN` that holds its own norms and residual.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        hidden_dim: Hidden channels of the feed-forward layer.
        active_dim: Hidden channels with activation.
        feature_norm: Norm of the feed-forward layer.
        merged: Build the feed-forward layer in its inference form.
        proj_drop: Dropout rate of both branches' outputs.
        attn_drop: Dropout rate of the attention weights.
        drop_path: Rate at which a sample skips a branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        active_dim: int,
        *,
        feature_norm: Literal["BatchNorm", "LayerNorm"] = "BatchNorm",
        merged: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.attn = Attention(
            dim, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=proj_drop, device=device, dtype=dtype
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = RePaFFN(
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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        return self.mlp(x)


class RePaViT(VisionTransformer):
    """Classify images or extract features; timm's VisionTransformer with `RePaBlock`s and a norm before them.

    Built in training form. After training, `zoo.reparameterize(model.eval())` merges the feed-forward layers.
    Differs from the paper's code: `idle_ratio` is exact (a rounding error cannot add a channel), `feature_norm` also
    holds with `channel_idle=False`, and dropout rates work.

    Args:
        img_size: Input height and width, pixels.
        patch_size: Side of a patch, pixels.
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "token", "avg", "avgmax", "max", "map", or "" for all tokens.
        embed_dim: Channels C.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Hidden channels of the feed-forward layers, over C.
        idle_ratio: Share of hidden channels without activation, 0 ... 1.
        heuristic: "static", or "linear" to let the idle ratio grow with depth (see `layer_idle_ratios`).
        channel_idle: False activates every channel, whatever `idle_ratio`.
        feature_norm: "BatchNorm", or "LayerNorm" for the vanilla layer, which cannot be merged.
        merged: Build the inference form, for weights that were merged.
        class_token: Prepend a class token.
        dynamic_img_size: Take any size that the patch divides; the position embedding is resampled in each forward.
        dynamic_img_pad: Take any size; images are padded to a multiple of the patch.
        drop_rate: Dropout rate before the classifier.
        pos_drop_rate: Dropout rate after the position embedding.
        patch_drop_rate: Share of patches dropped in training.
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
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "avgmax", "max", "token", "map"] = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        mlp_ratio: float = 4.0,
        idle_ratio: float = 0.75,
        heuristic: Literal["static", "linear"] = "static",
        channel_idle: bool = True,
        feature_norm: Literal["BatchNorm", "LayerNorm"] = "BatchNorm",
        merged: bool = False,
        class_token: bool = True,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        pools = ("", "avg", "avgmax", "max", "token", "map")
        if global_pool not in pools:
            raise ValueError(f"global_pool must be one of {pools}, got {global_pool!r}.")
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool='token' needs class_token=True.")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} heads for {embed_dim} channels.")
        if feature_norm not in ("BatchNorm", "LayerNorm"):
            raise ValueError(f"feature_norm must be 'BatchNorm' or 'LayerNorm', got {feature_norm!r}.")
        ratios = layer_idle_ratios(idle_ratio if channel_idle else 0.0, depth, heuristic if channel_idle else "static")
        hidden_dim = int(embed_dim * mlp_ratio)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=0,  # timm's blocks would be built only to be replaced
            num_heads=num_heads,
            class_token=class_token,
            pre_norm=True,
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            patch_drop_rate=patch_drop_rate,
            device=device,
            dtype=dtype,
        )
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.blocks = nn.Sequential(
            *(
                RePaBlock(
                    embed_dim,
                    num_heads,
                    hidden_dim,
                    active_channels(hidden_dim, ratio),
                    feature_norm=feature_norm,
                    merged=merged,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path,
                    device=device,
                    dtype=dtype,
                )
                for ratio, drop_path in zip(ratios, rates, strict=True)
            )
        )
        if not next(self.parameters()).is_meta:  # drawing numbers that are not there takes a third of a second
            self.blocks.apply(self._init_weights)
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys, in training or merged form, to ours; our own keys pass unchanged.

    A patch embedding, or a position embedding of a square grid, of another size is resampled.

    Args:
        state_dict: Weights in the authors' or our naming.
        model: The `RePaViT` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form.
    """
    renamed = {key: re.sub(r"^(blocks\.\d+)\.attn\.norm\.", r"\1.norm1.", key) for key in state_dict}
    state_dict = {renamed[key]: value for key, value in state_dict.items()}
    own = model.state_dict()
    for ours, theirs in (("fc_norm", "norm"), ("norm", "fc_norm")):  # the last norm stands behind average pooling
        if f"{ours}.weight" in own and f"{theirs}.weight" not in own and f"{ours}.weight" not in state_dict:
            for leaf in ("weight", "bias"):
                if f"{theirs}.{leaf}" in state_dict:
                    state_dict[f"{ours}.{leaf}"] = state_dict.pop(f"{theirs}.{leaf}")
    patch, own_patch = state_dict.get("patch_embed.proj.weight"), own["patch_embed.proj.weight"]
    if patch is not None and patch.ndim == 4 and patch.shape[-2:] != own_patch.shape[-2:]:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(patch, list(own_patch.shape[-2:]))
    position, prefix = state_dict.get("pos_embed"), int("cls_token" in own)
    if (
        position is not None
        and position.shape[1:] != own["pos_embed"].shape[1:]
        and position.shape[-1] == own["pos_embed"].shape[-1]
        and math.isqrt(position.shape[1] - prefix) ** 2 == position.shape[1] - prefix  # else strict loading says it
    ):
        grid = cast(Any, model).patch_embed.grid_size
        state_dict["pos_embed"] = resample_abs_pos_embed(position, new_size=list(grid), num_prefix_tokens=prefix)
    return convert_ffn_keys(state_dict, model)


_VARIANTS: dict[str, dict[str, Any]] = {
    "repavit_tiny": dict(embed_dim=192, depth=12, num_heads=3, idle_ratio=0.5),
    "repavit_small": dict(embed_dim=384, depth=12, num_heads=6, idle_ratio=0.5),
    "repavit_base": dict(embed_dim=768, depth=12, num_heads=12, idle_ratio=0.75),
    "repavit_large": dict(embed_dim=1024, depth=24, num_heads=16, idle_ratio=0.75),
    "repavit_huge": dict(embed_dim=1280, depth=32, num_heads=16, idle_ratio=0.75),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise a RePaViT of a published size by its weights.

    The idle ratio can be read from our keys and from merged weights; the authors' training form does not hold it and
    gets the published one.

    Args:
        state_dict: Weights in the authors' or our naming.

    Returns:
        (registered name, constructor arguments), or None for another network.
    """
    patch, position = state_dict.get("patch_embed.proj.weight"), state_dict.get("pos_embed")
    depth = len({found[1] for key in state_dict if (found := re.match(r"blocks\.(\d+)\.mlp\.", key))})
    facts = [ffn_facts(state_dict, f"blocks.{i}.mlp.") for i in range(depth)]
    if patch is None or position is None or "norm_pre.weight" not in state_dict or not facts or None in facts:
        return None
    layers = [fact for fact in facts if fact is not None]
    size = (patch.shape[0], depth)
    name = next((name for name, args in _VARIANTS.items() if (args["embed_dim"], args["depth"]) == size), None)
    if name is None:
        return None
    side = math.isqrt(position.shape[1] - int("cls_token" in state_dict))
    kwargs: dict[str, Any] = dict(
        img_size=side * patch.shape[2],
        patch_size=patch.shape[2],
        in_chans=patch.shape[1],
        num_classes=state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        merged=layers[0].merged,
        feature_norm=layers[0].feature_norm,
    )
    if "fc_norm.weight" in state_dict or "cls_token" not in state_dict:
        kwargs |= dict(global_pool="avg", class_token="cls_token" in state_dict)
    active = [layer.active_dim for layer in layers if layer.active_dim is not None]
    if len(active) == depth:
        kwargs |= _idle_arguments(active, 4 * size[0])
    return name, kwargs


def untold(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Return the arguments that change the outputs and that no tensor tells, with what they may be."""
    return idle_untold(state_dict)


def _idle_arguments(active: list[int], hidden_dim: int) -> dict[str, Any]:
    """Return the arguments that give the layers these active channels; the linear heuristic in steps of 0.001."""
    ratio = idle_ratio_of((hidden_dim, value) for value in active)
    if ratio is not None:
        return dict(idle_ratio=ratio)
    for step in range(1001):
        ratios = layer_idle_ratios(step / 1000, len(active), "linear")
        if [active_channels(hidden_dim, value) for value in ratios] == active:
            return dict(idle_ratio=step / 1000, heuristic="linear")
    return {}


_NOTES = (
    "The authors' weights are at https://huggingface.co/Ackesnal/RePaViT; their file names are not known here: the one"
    " that names the variant is taken, and checked by strict loading.",
)


def _cfg(**kwargs: Any) -> ModelCfg:
    fields: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(14, 14),
        fixed_input_size=True,
        interpolation="bicubic",
        crop_pct=0.875,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
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


_SMALL: dict[str, Any] = dict(
    depth=6, idle_ratio=0.5, class_token=False, global_pool="avg", dynamic_img_size=True
)  # the variant that we train ourselves

# A star makes a tag the default; it must come after a tag that has weights, or timm moves that one to the front.
default_cfgs = generate_default_cfgs(
    {
        "repavit_tiny.cifar10": _cfg(
            **CIFAR10,
            file=shipped("repavit_tiny.cifar10"),
            input_size=(3, 32, 32),
            pool_size=(8, 8),
            origin_url=None,
            model_args=dict(img_size=32, patch_size=4, **_SMALL),
        ),
        "repavit_tiny.imagenette": _cfg(
            **IMAGENETTE,
            file=shipped("repavit_tiny.imagenette"),
            input_size=(3, 128, 128),
            pool_size=(8, 8),
            origin_url=None,
            model_args=dict(img_size=128, patch_size=16, **_SMALL),
            interpolation="bilinear",
            temperature=0.754,
            threshold=0.914,
        ),
        "repavit_tiny.in1k*": _authors(top1=69.4),
        "repavit_small.in1k": _authors(top1=78.9),
        "repavit_base.in1k": _authors(top1=81.3),
        "repavit_large.in1k": _authors(top1=82.0),
        "repavit_huge.in1k": _authors(top1=81.4),
    }
)


def _create_repavit(variant: str, pretrained: bool = False, **kwargs: Any) -> RePaViT:
    return build_model(
        RePaViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )


@register_model
def repavit_tiny(pretrained: bool = False, **kwargs: Any) -> RePaViT:
    """RePaViT-Tiny (RePa-DeiT-Tiny/0.50): 5.74 M parameters, 4.38 M merged; 1.25 GMACs at 224, 0.99 merged."""
    return _create_repavit("repavit_tiny", pretrained, **kwargs)


@register_model
def repavit_small(pretrained: bool = False, **kwargs: Any) -> RePaViT:
    """RePaViT-Small (RePa-DeiT-Small/0.50): 22.1 M parameters, 16.7 M merged; 4.60 GMACs at 224, 3.55 merged."""
    return _create_repavit("repavit_small", pretrained, **kwargs)


@register_model
def repavit_base(pretrained: bool = False, **kwargs: Any) -> RePaViT:
    """RePaViT-Base (RePa-DeiT-Base/0.75): 86.6 M parameters, 51.1 M merged; 17.6 GMACs at 224, 10.6 merged."""
    return _create_repavit("repavit_base", pretrained, **kwargs)


@register_model
def repavit_large(pretrained: bool = False, **kwargs: Any) -> RePaViT:
    """RePaViT-Large/0.75: 304.5 M parameters, 178.4 M merged; 61.6 GMACs at 224, 36.8 merged."""
    return _create_repavit("repavit_large", pretrained, **kwargs)


@register_model
def repavit_huge(pretrained: bool = False, **kwargs: Any) -> RePaViT:
    """RePaViT-Huge/0.75: 632.5 M parameters, 369.9 M merged; 127.3 GMACs at 224, 75.7 merged."""
    return _create_repavit("repavit_huge", pretrained, **kwargs)
