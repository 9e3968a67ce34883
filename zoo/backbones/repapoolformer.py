"""RePaPoolFormer: a PoolFormer whose feed-forward layers shrink exactly after training.

RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network Layers
(ICML 2025), https://arxiv.org/abs/2505.21847. Authors' code: https://github.com/Ackesnal/RePaViT (Apache-2.0), which
has this form without results or weights.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, GroupNorm1, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models.metaformer import MetaFormer, MetaFormerStage, Pooling, Scale
from torch import Tensor, nn

from zoo.cfg import ModelCfg
from zoo.layers.ffn import (
    FeatureNorm,
    RePaFFN,
    active_channels,
    convert_ffn_keys,
    ffn_facts,
    idle_ratio_of,
    idle_untold,
)
from zoo.weights import build_model

__all__ = ["RePaPoolBlock", "RePaPoolFormer", "checkpoint_filter_fn", "detect", "untold"]


class RePaPoolBlock(nn.Module):
    """Mix tokens by average pooling, then channels with a `RePaFFN`; both branches have a layer scale.

    Args:
        dim: Channels C.
        active_dim: Hidden channels with activation, of 4 * C.
        pool_size: Side of the pooling window, tokens.
        layer_scale: Start value of both layer scales.
        feature_norm: Norm of the feed-forward layer.
        merged: Build the feed-forward layer in its inference form.
        drop: Dropout rate of the feed-forward output.
        drop_path: Rate at which a sample skips a branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> (B, C, H, W), channels last in memory.
    """

    def __init__(
        self,
        dim: int,
        active_dim: int,
        pool_size: int,
        layer_scale: float,
        *,
        feature_norm: FeatureNorm = "BatchNorm",
        merged: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm1(dim, device=device, dtype=dtype)
        self.token_mixer = Pooling(pool_size)
        self.layer_scale1 = Scale(dim, layer_scale, device=device, dtype=dtype)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = RePaFFN(
            dim,
            4 * dim,
            active_dim,
            feature_norm=feature_norm,
            layer_scale=layer_scale,
            merged=merged,
            drop=drop,
            drop_path=drop_path,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.layer_scale1(self.token_mixer(self.norm1(x))))
        return self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, H, W, C): 1x1 convolutions as plain products


class RePaPoolFormer(MetaFormer):
    """Classify images or extract features; timm's MetaFormer with `RePaPoolBlock`s and the norm before the pooling.

    Built in training form. After training, `zoo.reparameterize(model.eval())` merges the feed-forward layers; the layer
    scale is folded into weights and bias (the authors' code forgets the bias, so their merged outputs differ).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "avg", "max", "avgmax", or "" for the token map.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        pool_size: Side of the pooling window, tokens.
        layer_scale: Start value of the layer scales.
        idle_ratio: Share of hidden channels without activation, 0 ... 1.
        channel_idle: False activates every channel, whatever `idle_ratio`.
        feature_norm: "BatchNorm", or "LayerNorm" (here a GroupNorm of one group, as in PoolFormer), which cannot be
            merged.
        merged: Build the inference form, for weights that were merged.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of feed-forward outputs.
        drop_path_rate: Rate at which a sample skips a branch of the last block; grows linearly from 0.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chans, H, W), normalised, any size from 32 pixels -> (B, num_classes).

    Raises:
        ValueError: An argument is not one of the allowed values.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax"] = "avg",
        depths: tuple[int, ...] = (2, 2, 6, 2),
        dims: tuple[int, ...] = (64, 128, 320, 512),
        pool_size: int = 7,
        layer_scale: float = 1e-5,
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
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims must have one entry a stage, got {depths} and {dims}.")
        if pool_size % 2 == 0:
            raise ValueError(f"pool_size must be odd, or the token map would grow; got {pool_size}.")
        if feature_norm not in ("BatchNorm", "LayerNorm"):
            raise ValueError(f"feature_norm must be 'BatchNorm' or 'LayerNorm', got {feature_norm!r}.")
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            depths=(0,) * len(depths),  # timm's blocks would be built only to be replaced
            dims=dims,
            drop_rate=drop_rate,
            downsample_norm=None,
            output_norm=GroupNorm1,
            use_mlp_head=False,
            device=device,
            dtype=dtype,
        )
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, layer in enumerate(self.stages):
            stage = cast(MetaFormerStage, layer)
            active_dim = active_channels(4 * dims[i], idle_ratio if channel_idle else 0.0, "down")
            stage.blocks = nn.Sequential(
                *(
                    RePaPoolBlock(
                        dims[i],
                        active_dim,
                        pool_size,
                        layer_scale,
                        feature_norm="BatchNorm" if feature_norm == "BatchNorm" else "GroupNorm",
                        merged=merged,
                        drop=proj_drop_rate,
                        drop_path=rates[i][j],
                        device=device,
                        dtype=dtype,
                    )
                    for j in range(depths[i])
                )
            )
            if not next(stage.parameters()).is_meta:  # drawing numbers that are not there takes a while
                stage.blocks.apply(self._init_weights)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head.norm(x)  # type: ignore[operator]
        x = self.head.flatten(self.head.global_pool(x))  # type: ignore[operator]
        x = self.head.drop(x)  # type: ignore[operator]
        return x if pre_logits else self.head.fc(x)  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the layer scales, which start near zero and mean that."""
        return {name for name, _ in self.named_parameters() if "layer_scale" in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^head\.norm", (99999,)),
            ],
        )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys, in training or merged form, to ours; our own keys pass unchanged.

    Args:
        state_dict: Weights in the authors' or our naming.
        model: The `RePaPoolFormer` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form.
    """
    converted = {}
    for key, value in state_dict.items():
        if found := re.match(r"network\.(\d+)\.(.+)", key):  # even: blocks of a stage, odd: convolution before the next
            index, rest = int(found[1]), found[2]
            if index % 2:
                key = f"stages.{(index + 1) // 2}.downsample.{rest.replace('proj.', 'conv.')}"
            else:
                key = f"stages.{index // 2}.blocks.{re.sub('layer_scale_1$', 'layer_scale1.scale', rest)}"
        key = re.sub(r"^patch_embed\.proj\.", "stem.conv.", key)
        key = re.sub(r"^norm\.", "head.norm.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        converted[key] = value
    if any(key.startswith("network.") and key.endswith(".mlp.fc3.weight") for key in state_dict):
        warnings.warn(
            "These PoolFormer weights were merged by the authors' code, which leaves the layer scale out of the bias: "
            "outputs differ from the trained model's by percents. Load the training form and call zoo.reparameterize.",
            stacklevel=2,
        )
    return convert_ffn_keys(converted, model)


_SMALL, _MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
_VARIANTS: dict[str, dict[str, Any]] = {
    "repapoolformer_s12": dict(depths=(2, 2, 6, 2), dims=_SMALL),
    "repapoolformer_s24": dict(depths=(4, 4, 12, 4), dims=_SMALL),
    "repapoolformer_s36": dict(depths=(6, 6, 18, 6), dims=_SMALL, layer_scale=1e-6),
    "repapoolformer_m36": dict(depths=(6, 6, 18, 6), dims=_MEDIUM, pool_size=3, layer_scale=1e-6),
    "repapoolformer_m48": dict(depths=(8, 8, 24, 8), dims=_MEDIUM, pool_size=3, layer_scale=1e-6),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise a RePaPoolFormer of a published size by its weights.

    Args:
        state_dict: Weights in the authors' or our naming.

    Returns:
        (registered name, constructor arguments), or None for another network.
    """
    authors = "network.0.0.norm1.weight" in state_dict
    blocks = r"network\.([0246])\.(\d+)\.mlp\." if authors else r"stages\.([0123])\.blocks\.(\d+)\.mlp\."
    found = {match[0]: int(match[1]) for key in state_dict if (match := re.match(blocks, key))}
    stem = state_dict.get("patch_embed.proj.weight" if authors else "stem.conv.weight")
    facts = {prefix: ffn_facts(state_dict, prefix) for prefix in sorted(found)}
    if stem is None or not facts or None in facts.values():
        return None
    layers = {prefix: fact for prefix, fact in facts.items() if fact is not None}
    stage = {prefix: index // 2 if authors else index for prefix, index in found.items()}
    depths = tuple(sum(index == i for index in stage.values()) for i in range(4))
    size = (stem.shape[0], depths)
    name = next((name for name, args in _VARIANTS.items() if (args["dims"][0], args["depths"]) == size), None)
    if name is None:
        return None
    dims = _VARIANTS[name]["dims"]
    head, first = state_dict.get("head.weight" if authors else "head.fc.weight"), next(iter(layers.values()))
    kwargs: dict[str, Any] = dict(
        in_chans=stem.shape[1],
        num_classes=0 if head is None else head.shape[0],
        merged=first.merged,
        feature_norm=first.feature_norm,
    )
    hidden = {prefix: 4 * dims[index] for prefix, index in stage.items()}
    active = [(hidden[prefix], fact.active_dim) for prefix, fact in layers.items() if fact.active_dim is not None]
    ratio = idle_ratio_of(active, "down") if active else None
    if ratio is not None:
        kwargs["idle_ratio"] = ratio
    return name, kwargs


def untold(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Return the arguments that change the outputs and that no tensor tells, with what they may be."""
    return idle_untold(state_dict)


def _cfg(**kwargs: Any) -> ModelCfg:
    fields: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        interpolation="bicubic",
        crop_pct=0.875,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stem.conv",
        classifier="head.fc",
        license="apache-2.0",
        origin_url="https://github.com/Ackesnal/RePaViT",
        paper_ids="arXiv:2505.21847",
        paper_name="RePaViT: Scalable Vision Transformer Acceleration "
        "via Structural Reparameterization on Feedforward Network Layers",
        parity="Meets the authors' outputs to 4.2e-15 (relative, float64): logits, blocks and the merged form.",
        notes=("The authors published no weights of this form.",),
    )
    return ModelCfg(**{**fields, **kwargs})


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in _VARIANTS})


def _create_repapoolformer(variant: str, pretrained: bool = False, **kwargs: Any) -> RePaPoolFormer:
    return build_model(
        RePaPoolFormer,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def repapoolformer_s12(pretrained: bool = False, **kwargs: Any) -> RePaPoolFormer:
    """RePaPoolFormer-S12: 11.9 M parameters, 6.0 M merged; 1.81 GMACs at 224, 0.82 merged."""
    return _create_repapoolformer("repapoolformer_s12", pretrained, **kwargs)


@register_model
def repapoolformer_s24(pretrained: bool = False, **kwargs: Any) -> RePaPoolFormer:
    """RePaPoolFormer-S24: 21.4 M parameters, 9.6 M merged; 3.39 GMACs at 224, 1.42 merged."""
    return _create_repapoolformer("repapoolformer_s24", pretrained, **kwargs)


@register_model
def repapoolformer_s36(pretrained: bool = False, **kwargs: Any) -> RePaPoolFormer:
    """RePaPoolFormer-S36: 30.9 M parameters, 13.1 M merged; 4.97 GMACs at 224, 2.01 merged."""
    return _create_repapoolformer("repapoolformer_s36", pretrained, **kwargs)


@register_model
def repapoolformer_m36(pretrained: bool = False, **kwargs: Any) -> RePaPoolFormer:
    """RePaPoolFormer-M36: 56.3 M parameters, 23.7 M merged; 8.76 GMACs at 224, 3.56 merged."""
    return _create_repapoolformer("repapoolformer_m36", pretrained, **kwargs)


@register_model
def repapoolformer_m48(pretrained: bool = False, **kwargs: Any) -> RePaPoolFormer:
    """RePaPoolFormer-M48: 73.6 M parameters, 30.2 M merged; 11.5 GMACs at 224, 4.60 merged."""
    return _create_repapoolformer("repapoolformer_m48", pretrained, **kwargs)
