"""EMOv2: inverted residual blocks whose late expansions are attention in two window patterns at once.

EMOv2: Pushing 5M Vision Model Frontier (TPAMI 2025), https://arxiv.org/abs/2412.06674.
Authors' code: https://github.com/zhangzjn/EMOv2 (no licence stated).
"""

import re
from collections import OrderedDict
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.cfg import CIFAR10, IMAGENETTE, ModelCfg
from zoo.ffn.reparam import reparameterize
from zoo.layers.conv_norm import ConvNorm, fold_norm_into_linear
from zoo.layers.own import require_mergeable
from zoo.layers.window import HybridAttention, Partition
from zoo.weights import build_model, shipped

__all__ = ["EMOv2", "InvertedBlock", "Stem", "checkpoint_filter_fn", "detect", "untold"]

_PARTITIONS = ("both", "close", "remote")
_EPS = 1e-6  # of all norms


class Stem(nn.Module):
    """Halve the image: convolution 3x3 of stride 2, depthwise 3x3, 1x1.

    Args:
        in_chans: Input channels.
        dim: Output channels.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chans, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim, 3, 2, bias=True, eps=_EPS, device=device, dtype=dtype)
        self.conv2 = ConvNorm(dim, dim, 3, groups=dim, eps=_EPS, device=device, dtype=dtype)
        self.conv3 = nn.Conv2d(dim, dim, 1, bias=False, device=device, dtype=dtype)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))


class InvertedBlock(nn.Module):
    """Improved inverted residual block (i2RMB): norm, expand, depthwise convolution beside a shortcut, project.

    Expansion is a 1x1 convolution with activation or `HybridAttention`. Blocks that keep shape and channels add their
    input, and the expanded map to the output of the depthwise convolution.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        hidden_dim: Expanded channels.
        kernel_size: Side of the depthwise kernel, tokens.
        stride: Of the depthwise convolution.
        skip: Add the input; needs equal channels and stride 1.
        attn: Expand by attention.
        batch_norm: Norm the input by BatchNorm and expand with SiLU; else LayerNorm and GELU.
        dim_head: Channels of a query.
        window_size: Side of an attention window, tokens; 0 is the whole map.
        partition: Window patterns of the attention.
        layer_scale_init: Start value of the layer scale.
        drop_path: Rate at which a sample skips the block in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, dim, H, W) -> (B, out_dim, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        hidden_dim: int,
        *,
        kernel_size: int = 5,
        stride: int = 1,
        skip: bool = True,
        attn: bool = False,
        batch_norm: bool = True,
        dim_head: int = 16,
        window_size: int = 7,
        partition: Partition = "both",
        layer_scale_init: float = 1e-6,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim, self.skip = dim, skip
        self.norm: nn.Module = nn.BatchNorm2d(dim, eps=_EPS, **dd) if batch_norm else LayerNorm2d(dim, eps=_EPS, **dd)
        self.expand: nn.Module
        if attn:
            self.expand = HybridAttention(dim, hidden_dim, dim_head, window_size, partition, **dd)
        else:
            act = nn.SiLU() if batch_norm else nn.GELU()
            self.expand = nn.Sequential(OrderedDict(conv=nn.Conv2d(dim, hidden_dim, 1, **dd), act=act))
        self.local = ConvNorm(hidden_dim, hidden_dim, kernel_size, stride, groups=hidden_dim, eps=_EPS, **dd)
        self.act = nn.SiLU()
        self.proj = nn.Conv2d(hidden_dim, out_dim, 1, bias=False, **dd)
        self.ls: nn.Module = LayerScale2d(out_dim, layer_scale_init, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 and skip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(self.norm(x))
        local = self.act(self.local(hidden))
        if not self.skip:
            return self.drop_path(self.ls(self.proj(local)))  # which such a block has not
        return x + self.drop_path(self.ls(self.proj(hidden + local)))

    def example_input(self) -> Tensor:
        """Return a random input, (1, dim, 14, 14)."""
        weight = self.proj.weight
        return torch.randn(1, self.dim, 14, 14, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold norm and layer scale into the 1x1 convolutions, in place.

        Before attention the LayerNorm stays: padding comes between it and the projections, and padded tokens would
        change.

        Raises:
            RuntimeError: The block is in training mode.
        """
        if not isinstance(self.ls, LayerScale2d):
            return ()
        require_mergeable(self)
        folded = []
        if isinstance(self.expand, nn.Sequential):
            conv = cast(nn.Conv2d, self.expand.conv)
            if isinstance(self.norm, nn.BatchNorm2d):
                fold_norm_into_linear(self.norm, conv)
                self.norm = nn.Identity()
                folded.append("norm")
            elif isinstance(self.norm, LayerNorm2d) and self.norm.elementwise_affine:
                assert conv.bias is not None
                conv.bias += conv.weight.flatten(1) @ self.norm.bias
                conv.weight *= self.norm.weight.view(-1, 1, 1)
                self.norm = LayerNorm2d(self.dim, eps=_EPS, affine=False).eval()
                folded.append("affine part of the norm")
        self.proj.weight *= self.ls.gamma.view(-1, 1, 1, 1)
        self.ls = nn.Identity()
        return (*folded, "layer scale")


class EMOv2(nn.Module):
    """Classify images or extract features: a stem and four stages of `InvertedBlock`s, channels last in memory.

    Every stage starts with a convolutional block of stride 2 and twice the expansion. The other blocks of the last two
    stages attend. Built in training form; `zoo.reparameterize(model.eval())` folds norms, layer scales and query
    scales. Weights do not depend on the windows, so one file serves every image size and window.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "avg", "max", "avgmax", or "" for the feature map.
        depths: Blocks of each of the four stages.
        dims: Channels of each stage; the stem has half of the first.
        exp_ratios: Expanded channels of a stage's blocks, over their input's.
        dim_heads: Channels of a query in each stage.
        kernel_sizes: Odd sides of each stage's depthwise kernels, tokens.
        window_size: Side of the attention windows, tokens, for all stages or for each; 0 is one window of the whole
            map. Published: 7 at 224 pixels, 8 at 256 and 512, 10 in detection and segmentation.
        partition: Attend in "both" window patterns, or only in "close" (contiguous) or "remote" (strided) windows.
        layer_scale_init: Start value of the layer scales; the paper's 1e-6 needs a long training.
        merged: Build the inference form, for weights that were merged.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate at which a sample skips the last block in training; grows linearly from 0.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chans, H, W), normalised, any size -> (B, num_classes).

    Raises:
        ValueError: An argument is not one of the allowed values.
    """

    graph_depends_on_size = True  # whether a map is padded and is one window: an exported graph holds for one size

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax"] = "avg",
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (48, 72, 160, 288),
        exp_ratios: tuple[float, ...] = (2.0, 3.0, 4.0, 4.0),
        dim_heads: tuple[int, ...] = (16, 24, 32, 32),
        kernel_sizes: tuple[int, ...] = (5, 5, 5, 5),
        *,
        window_size: int | tuple[int, ...] = 7,
        partition: Partition = "both",
        layer_scale_init: float = 1e-6,
        merged: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        windows = (window_size,) * 4 if isinstance(window_size, int) else tuple(window_size)
        lists = dict(
            depths=depths,
            dims=dims,
            exp_ratios=exp_ratios,
            dim_heads=dim_heads,
            kernel_sizes=kernel_sizes,
            window_size=windows,
        )
        for name, values in lists.items():
            if len(values) != 4:
                raise ValueError(f"{name} must have one entry for each of the 4 stages, got {values}.")
        if any(size < 0 for size in windows):
            raise ValueError(f"window_size must be a number of tokens, or 0 for the whole map; got {window_size}.")
        if any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd, or the shortcuts would not fit; got {kernel_sizes}.")
        if partition not in _PARTITIONS:
            raise ValueError(f"partition must be 'both', 'close' or 'remote', got {partition!r}.")
        _check_pool(global_pool)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False

        width = dims[0] // 2
        self.stem = Stem(in_chans, width, **dd)
        self.feature_info = [dict(num_chs=width, reduction=2, module="stem")]
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        for i, (depth, dim, ratio) in enumerate(zip(depths, dims, exp_ratios, strict=True)):
            blocks = [
                InvertedBlock(
                    width if j == 0 else dim,
                    dim,
                    int(width * ratio * 2) if j == 0 else int(dim * ratio),
                    kernel_size=kernel_sizes[i],
                    stride=2 if j == 0 else 1,
                    skip=j > 0,
                    attn=i >= 2 and j > 0,
                    batch_norm=i < 2,
                    dim_head=dim_heads[i],
                    window_size=windows[i],
                    partition=partition,
                    layer_scale_init=layer_scale_init,
                    drop_path=rates[i][j],
                    **dd,
                )
                for j in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
            width = dim
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = width
        self.norm: nn.Module = LayerNorm2d(width, eps=_EPS, **dd)
        self.head = ClassifierHead(width, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self._init_head()
        if merged:
            reparameterize(self.eval(), measure=False)
            self.train()

    @torch.jit.ignore
    def _init_head(self) -> None:
        if isinstance(self.head.fc, nn.Linear):
            trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the layer scales."""
        return {name for name, _ in self.named_parameters() if name.endswith(".gamma")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return cast(nn.Module, self.head.fc)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` (0: none), and the pooling if it is given."""
        if global_pool is not None:
            _check_pool(global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self._init_head()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of chosen stages, and what `forward_features` returns.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: Stages, 0 is the stem; an integer takes so many from the end, None takes all.
            norm: Norm the last stage's map.
            stop_early: Do not run stages behind the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: Return the maps alone.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps = [x] if 0 in take else []
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[:last]
        for i, stage in enumerate(stages, 1):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i in take:
                maps.append(self.norm(x) if norm and i == len(self.stages) else x)
        if intermediates_only:
            return maps
        return self.norm(x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one asked for, and norm and classifier.

        Args:
            indices: Stages to keep, 0 is the stem; an integer takes so many from the end.
            prune_norm: Drop the last norm.
            prune_head: Drop the classifier.

        Returns:
            Indices of the stages kept.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[:last]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normed map of the last stage, (B, dims[-1], H / 32, W / 32)."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in self.stages:
                x = checkpoint_seq(stage, x)
        else:
            x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a feature map and classify it, or with `pre_logits` only pool it."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("", "avg", "max", "avgmax"):
        raise ValueError(f"global_pool must be 'avg', 'max', 'avgmax' or '', got {global_pool!r}.")


_RENAMED = (
    (r"^stage0\.2\.conv\.", "stem.conv3."),
    (r"^stage0\.0\.norm\.", "stem.conv1.bn."),
    (r"^stage0\.0\.", "stem.conv1."),
    (r"^stage0\.1\.norm\.", "stem.conv2.bn."),
    (r"^stage0\.1\.", "stem.conv2."),
    (r"\.norm\.norm\.", ".norm."),  # the authors wrap LayerNorm
    (r"\.eops\.0\.net\.conv\.", ".expand.conv."),
    (r"\.conv_local\.norm\.", ".local.bn."),
    (r"\.conv_local\.", ".local."),
    (r"\.proj\.conv\.", ".proj."),
    (r"^norm\.norm\.", "norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _is_merged(state_dict: dict[str, Tensor]) -> bool:
    return "stages.0.0.local.conv.bias" in state_dict


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys to ours: stages from 0, one projection for q, k and v; our own keys pass unchanged.

    Args:
        state_dict: Weights in the authors' or our naming.
        model: The `EMOv2` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form.
    """
    if "stem.conv1.bn.weight" in model.state_dict() and _is_merged(state_dict):
        raise ValueError("These weights are merged: build the model with merged=True, or merge it before loading.")
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if found := re.fullmatch(r"stage(\d)\.(\d+)\.eops\.0\.(qk|v)\.conv\.(weight|bias)", key):
            prefix, leaf = f"stage{found[1]}.{found[2]}.eops.0.", f".conv.{found[4]}"
            parts = [state_dict.get(f"{prefix}{part}{leaf}") for part in ("qk", "v")]
            tensors = [part.flatten(1) if found[4] == "weight" else part for part in parts if part is not None]
            key = f"stages.{int(found[1]) - 1}.{found[2]}.expand.qkv.{found[4]}"
            value = torch.cat(tensors)  # a part that is missing shows in the shape
        else:
            for pattern, replacement in _RENAMED:
                key = re.sub(pattern, replacement, key)
            key = re.sub(r"^stage([1-9])\.", lambda stage: f"stages.{int(stage[1]) - 1}.", key)
            if key.endswith(".ls.gamma"):
                value = value.flatten()  # (1, C, 1, 1) in the authors' files
        out[key] = value
    return out


_VARIANTS: dict[str, dict[str, Any]] = {
    "emov2_1m": dict(
        depths=(2, 2, 8, 3), dims=(32, 48, 80, 180), exp_ratios=(2.0, 2.5, 3.0, 3.5), dim_heads=(16, 16, 20, 20)
    ),
    "emov2_2m": dict(
        depths=(3, 3, 9, 3), dims=(32, 48, 120, 200), exp_ratios=(2.0, 2.5, 3.0, 3.5), dim_heads=(16, 16, 20, 20)
    ),
    "emov2_5m": dict(
        depths=(3, 3, 9, 3), dims=(48, 72, 160, 288), exp_ratios=(2.0, 3.0, 4.0, 4.0), dim_heads=(16, 24, 32, 32)
    ),
    "emov2_20m": dict(
        depths=(3, 3, 13, 3), dims=(64, 128, 320, 448), exp_ratios=(2.0, 3.0, 4.0, 4.0), dim_heads=(16, 32, 32, 32)
    ),
    "emov2_50m": dict(
        depths=(5, 8, 20, 7), dims=(64, 128, 384, 512), exp_ratios=(2.0, 3.0, 4.0, 4.0), dim_heads=(16, 32, 32, 32)
    ),
}
_VARIANTS |= {
    f"emov2_emo1_{size}": dict(_VARIANTS[f"emov2_{size}"], kernel_sizes=(3, 3, 5, 5), partition="remote")
    for size in ("1m", "2m", "5m", "20m")
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise an EMOv2 of a published size by its weights; windows are not in them, so the published ones are taken.

    Args:
        state_dict: Weights in the authors' or our naming.

    Returns:
        (registered name, constructor arguments), or None for another network.
    """
    authors = "stage1.0.eops.0.net.conv.weight" in state_dict
    first = state_dict.get("stage0.0.conv.weight" if authors else "stem.conv1.conv.weight")
    if first is None or not (authors or "stages.0.0.expand.conv.weight" in state_dict):
        return None
    tail = r"\.(\d+)\.proj\.conv\.weight" if authors else r"\.(\d+)\.proj\.weight"
    depths, dims, kernels = [], [], []
    for i in range(4):
        prefix = f"stage{i + 1}" if authors else f"stages.{i}"
        projections = [value for key, value in state_dict.items() if re.fullmatch(re.escape(prefix) + tail, key)]
        local = state_dict.get(f"{prefix}.0.{'conv_local' if authors else 'local'}.conv.weight")
        if not projections or local is None:
            return None
        depths.append(len(projections))
        dims.append(projections[0].shape[0])
        kernels.append(local.shape[-1])
    found = (tuple(depths), tuple(dims), tuple(kernels))
    for name, args in _VARIANTS.items():
        if found == (args["depths"], args["dims"], args.get("kernel_sizes", (5, 5, 5, 5))):
            head = state_dict.get("head.weight" if authors else "head.fc.weight")
            return name, dict(
                in_chans=first.shape[1],
                num_classes=0 if head is None else head.shape[0],
                merged=_is_merged(state_dict),
            )
    return None


def untold(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Return the arguments that change the outputs and that no tensor tells, with what they may be.

    The authors published 1M and 2M with one window only.
    """
    authors = state_dict.get("stage0.0.conv.weight")
    if authors is not None and 2 * authors.shape[0] == _VARIANTS["emov2_1m"]["dims"][0]:
        return {}
    return dict(window_size="7 as published for 224 pixels, 8 for 512; one, or one a stage")


_FILES = "https://github.com/zhangzjn/EMOv2/raw/main/resources/Cls/"
_NO_LICENCE = "The authors' repository states no licence."


def _cfg(name: str | None = None, *notes: str, **kwargs: Any) -> ModelCfg:
    fields: dict[str, Any] = dict(
        url=_FILES + name if name else "",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        interpolation="bicubic",
        crop_pct=0.875,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stem.conv1.conv",
        classifier="head.fc",
        origin_url="https://github.com/zhangzjn/EMOv2",
        paper_ids="arXiv:2412.06674",
        parity="Meets the authors' outputs to 2e-15 (relative, float64): logits, stages and the merged form.",
        paper_name="EMOv2: Pushing 5M Vision Model Frontier",
        notes=(*notes, _NO_LICENCE),
    )
    return ModelCfg(**{**fields, **kwargs})


_UNPUBLISHED = "The authors published no ImageNet weights of this size."

default_cfgs = generate_default_cfgs(
    {
        "emov2_1m.in1k": _cfg("EMOv2_1M_224.pth", top1=72.3),
        "emov2_1m.dist_in1k": _cfg("EMOv2_1M_224_KD.pth", top1=73.5),
        "emov2_1m.cifar10": _cfg(
            **CIFAR10,
            file=shipped("emov2_1m.cifar10"),
            input_size=(3, 64, 64),
            pool_size=(2, 2),
            model_args=dict(window_size=(7, 7, 4, 2)),
        ),
        "emov2_1m.imagenette": _cfg(
            **IMAGENETTE,
            file=shipped("emov2_1m.imagenette"),
            input_size=(3, 128, 128),
            pool_size=(4, 4),
            model_args=dict(window_size=(8, 8, 8, 4)),
            interpolation="bilinear",
            temperature=0.749,
            threshold=0.958,
        ),
        "emov2_2m.in1k": _cfg("EMOv2_2M_224.pth", top1=75.8),
        "emov2_2m.dist_in1k": _cfg("EMOv2_2M_224_KD.pth", top1=76.7),
        "emov2_5m.in1k": _cfg("EMOv2_5M_224.pth", top1=79.4),
        "emov2_5m.dist_in1k": _cfg("EMOv2_5M_224_KD.pth", top1=80.9),
        "emov2_5m.dist_in1k_512": _cfg(
            "EMOv2_5M_512_KD.pth",
            "The authors' README calls this file EMOv2_5M_512.pth.",
            input_size=(3, 512, 512),
            pool_size=(16, 16),
            model_args=dict(window_size=8),
            top1=82.9,
        ),
        "emov2_20m.untrained": _cfg(None, _UNPUBLISHED),
        "emov2_50m.untrained": _cfg(None, _UNPUBLISHED),
        **{
            f"{name}.untrained": _cfg(None, "The authors published no weights of EMO v1 with this block.")
            for name in _VARIANTS
            if "emo1" in name
        },
    }
)


def _create_emov2(variant: str, pretrained: bool = False, **kwargs: Any) -> EMOv2:
    return build_model(
        EMOv2,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        **kwargs,
    )


@register_model
def emov2_1m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMOv2-1M: 1.46 M parameters, 1.45 M merged; 0.28 GMACs at 224."""
    return _create_emov2("emov2_1m", pretrained, **kwargs)


@register_model
def emov2_2m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMOv2-2M: 2.38 M parameters, 2.38 M merged; 0.48 GMACs at 224."""
    return _create_emov2("emov2_2m", pretrained, **kwargs)


@register_model
def emov2_5m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMOv2-5M: 5.13 M parameters, 5.11 M merged; 1.02 GMACs at 224."""
    return _create_emov2("emov2_5m", pretrained, **kwargs)


@register_model
def emov2_20m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMOv2-20M: 20.2 M parameters, 20.2 M merged; 3.99 GMACs at 224."""
    return _create_emov2("emov2_20m", pretrained, **kwargs)


@register_model
def emov2_50m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMOv2-50M: 49.8 M parameters, 49.8 M merged; 8.73 GMACs at 224."""
    return _create_emov2("emov2_50m", pretrained, **kwargs)


@register_model
def emov2_emo1_1m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMO-1M with the EMOv2 block, strided windows only: 1.45 M parameters, 1.45 M merged; 0.24 GMACs at 224."""
    return _create_emov2("emov2_emo1_1m", pretrained, **kwargs)


@register_model
def emov2_emo1_2m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMO-2M with the EMOv2 block, strided windows only: 2.37 M parameters, 2.37 M merged; 0.42 GMACs at 224."""
    return _create_emov2("emov2_emo1_2m", pretrained, **kwargs)


@register_model
def emov2_emo1_5m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMO-5M with the EMOv2 block, strided windows only: 5.11 M parameters, 5.10 M merged; 0.93 GMACs at 224."""
    return _create_emov2("emov2_emo1_5m", pretrained, **kwargs)


@register_model
def emov2_emo1_20m(pretrained: bool = False, **kwargs: Any) -> EMOv2:
    """EMO-20M with the EMOv2 block, strided windows only: 20.2 M parameters, 20.1 M merged; 3.77 GMACs at 224."""
    return _create_emov2("emov2_emo1_20m", pretrained, **kwargs)
