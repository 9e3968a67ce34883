"""EfficientViT (MSRA): sandwiches of convolutions around cascaded group attention, all of it in channels-first maps.

EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (CVPR 2023),
https://arxiv.org/abs/2305.07027. Authors' code: https://github.com/microsoft/Cream, EfficientViT (MIT).
Not MIT's EfficientViT, which timm has as efficientvit_b0 ... l3. State dicts have the keys of timm's
efficientvit_m0 ... m5, so that weights move both ways unchanged.
"""

# no postponed annotations: torch.fx gives TorchScript the annotations of `forward`, which must then be types
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, SqueezeExcite, get_device_dtype, to_2tuple
from timm.models import (
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.cfg import IMAGENETTE, ModelCfg
from zoo.ffn.reparam import reparameterize
from zoo.layers.attention_bias import resize_attention_biases
from zoo.layers.cache_blocking import run_in_parts
from zoo.layers.cascaded_attention import CascadedGroupAttention, WindowAttention
from zoo.layers.conv_norm import ConvNorm, NormLinear, average_heads
from zoo.layers.own import require_mergeable
from zoo.layers.residual import Residual, ResidualConv
from zoo.weights import build_model, shipped

__all__ = [
    "ConvMlp",
    "EfficientViTBlock",
    "EfficientViTMSRA",
    "EfficientViTStage",
    "PatchMerging",
    "checkpoint_filter_fn",
    "detect",
]


class ConvMlp(nn.Module):
    """Widen with a 1x1 convolution, ReLU, narrow with another.

    Args:
        dim: Channels C.
        hidden_dim: Channels between the convolutions.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden_dim, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(hidden_dim, dim, bn_weight_init=0.0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class EfficientViTBlock(nn.Module):
    """Attention between two pairs of depthwise convolution and feed-forward layer, each with a residual.

    Args:
        dim: Channels C.
        key_dim: Channels of a head's queries and keys.
        num_heads: Attention heads.
        resolution: Side of the map that the block is built for, tokens.
        window_size: Side of the windows, tokens; a smaller map is its own window.
        kernels: Side of each head's query convolution, tokens.
        drop_path: Rate at which a sample skips a branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int,
        resolution: int,
        window_size: int,
        kernels: Sequence[int],
        *,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        attn = CascadedGroupAttention(dim, key_dim, num_heads, min(window_size, resolution), kernels, **dd)
        self.dw0 = ResidualConv(dim, bn_weight_init=0.0, drop_path=drop_path, **dd)
        self.ffn0 = Residual(ConvMlp(dim, 2 * dim, **dd), drop_path)
        self.mixer = Residual(WindowAttention(attn, window_size), drop_path)
        self.dw1 = ResidualConv(dim, bn_weight_init=0.0, drop_path=drop_path, **dd)
        self.ffn1 = Residual(ConvMlp(dim, 2 * dim, **dd), drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


class PatchMerging(nn.Module):
    """Halve height and width: widen four times, depthwise convolution of stride 2, squeeze-excite, project.

    Args:
        dim: Channels C.
        out_dim: Channels of the output.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(
        self, dim: int, out_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        hidden_dim = 4 * dim
        self.conv1 = ConvNorm(dim, hidden_dim, **dd)
        self.act = nn.ReLU()
        self.conv2 = ConvNorm(hidden_dim, hidden_dim, 3, 2, groups=hidden_dim, **dd)
        self.se = SqueezeExcite(hidden_dim, 0.25, **dd)
        self.se.act = nn.ReLU()  # timm's writes over what a hook has seen
        self.conv3 = ConvNorm(hidden_dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


class EfficientViTStage(nn.Module):
    """Downsample, except in the first stage, then run the blocks.

    Args:
        in_dim: Channels of the input.
        dim: Channels C of the blocks.
        downsample: Halve height and width first.
        depth: Blocks.
        key_dim: Channels of a head's queries and keys.
        num_heads: Attention heads.
        resolution: Shorter side of the blocks' map, tokens.
        window_size: Side of the windows, tokens.
        kernels: Side of each head's query convolution, tokens.
        drop_path: Rate at which a sample skips a branch, for each block.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_dim, H, W) -> (B, C, H', W').
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        downsample: bool,
        depth: int,
        key_dim: int,
        num_heads: int,
        resolution: int,
        window_size: int,
        kernels: Sequence[int],
        drop_path: Sequence[float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            self.downsample = nn.Sequential(
                OrderedDict(
                    res1=nn.Sequential(ResidualConv(in_dim, **dd), Residual(ConvMlp(in_dim, 2 * in_dim, **dd))),
                    patchmerge=PatchMerging(in_dim, dim, **dd),
                    res2=nn.Sequential(ResidualConv(dim, **dd), Residual(ConvMlp(dim, 2 * dim, **dd))),
                )
            )
        self.blocks = nn.Sequential(
            *(
                EfficientViTBlock(
                    dim, key_dim, num_heads, resolution, window_size, kernels, drop_path=drop_path[i], **dd
                )
                for i in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class EfficientViTMSRA(nn.Module):
    """Classify images or extract features at strides 16, 32 and 64.

    Built in training form. After training, `zoo.reparameterize(model.eval())` folds norms, the residuals of depthwise
    convolutions and the scale of the scores, averages the two heads of distillation, and stores weights channels-last.
    `img_size` only decides how large the windows are: every size runs, padded to whole windows. Tables of biases are
    resized where weights of another window are loaded.

    Args:
        img_size: Height and width that the windows fit, pixels; the shorter side counts.
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the map (without classes).
        embed_dim: Channels of each stage, multiples of 8 and of the stage's heads.
        key_dim: Channels of a head's queries and keys.
        depth: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Largest side of the windows of each stage, tokens. 8 fits inputs of 256 pixels without padding,
            with resized biases.
        kernels: Side of each head's query convolution, tokens; odd.
        distillation: Add a second head for a teacher: in training both outputs are returned, in evaluation their mean.
        merged: Build the inference form, for weights that were merged.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate at which a sample skips a branch of the last block; grows linearly from 0. The paper has
            none.
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
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax", "catavgmax"] = "avg",
        embed_dim: Sequence[int] = (64, 128, 192),
        key_dim: int = 16,
        depth: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        *,
        window_size: int | Sequence[int] = 7,
        kernels: Sequence[int] = (5, 5, 5, 5),
        distillation: bool = False,
        merged: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        windows = (window_size,) * len(embed_dim) if isinstance(window_size, int) else tuple(window_size)
        if not len(embed_dim) == len(depth) == len(num_heads) == len(windows):
            raise ValueError(
                "embed_dim, depth, num_heads and window_size must have one entry a stage, got "
                f"{tuple(embed_dim)}, {tuple(depth)}, {tuple(num_heads)} and {windows}."
            )
        if any(dim % heads or dim % 8 for dim, heads in zip(embed_dim, num_heads, strict=True)):
            raise ValueError(
                f"embed_dim must be multiples of 8 and of num_heads, got {tuple(embed_dim)} and {tuple(num_heads)}."
            )
        if len(kernels) < max(num_heads) or any(kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels must be odd, one for each of {max(num_heads)} heads; got {tuple(kernels)}.")
        if min(windows) < 1:
            raise ValueError(f"window_size must be at least 1, got {windows}.")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.distillation = distillation
        self.merged = False

        first = embed_dim[0]
        dims = (in_chans, first // 8, first // 4, first // 2, first)
        stem: dict[str, nn.Module] = {}
        for i in range(1, 5):
            stem[f"conv{i}"] = ConvNorm(dims[i - 1], dims[i], 3, 2, **dd)
            if i < 4:
                stem[f"relu{i}"] = nn.ReLU()
        self.patch_embed = nn.Sequential(OrderedDict(stem))

        sides = _map_sides(img_size, len(embed_dim))
        total = sum(depth)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        self.feature_info: list[dict[str, Any]] = []
        stages = []
        for i, dim in enumerate(embed_dim):
            begin = sum(depth[:i])
            stages.append(
                EfficientViTStage(
                    embed_dim[max(i - 1, 0)],
                    dim,
                    downsample=i > 0,
                    depth=depth[i],
                    key_dim=key_dim,
                    num_heads=num_heads[i],
                    resolution=sides[i],
                    window_size=windows[i],
                    kernels=kernels,
                    drop_path=rates[begin : begin + depth[i]],
                    **dd,
                )
            )
            self.feature_info.append(dict(num_chs=dim, reduction=16 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.num_features = embed_dim[-1]
        self._build_head(num_classes, global_pool)
        if merged:
            reparameterize(self.eval(), measure=False)
            self.train()

    def _build_head(self, num_classes: int, global_pool: str) -> None:
        """Build the pooling and the classifiers."""
        if num_classes > 0 and not global_pool:
            raise ValueError("global_pool='' gives a map, which has no classes: set num_classes=0 too.")
        self.num_classes = num_classes
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.global_pool = pool.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        dd = get_device_dtype(self)
        self.head: nn.Module = nn.Identity()
        self.head_dist: nn.Module | None = None
        if num_classes > 0:
            size = self.head_hidden_size
            self.head = NormLinear(size, num_classes, self.drop_rate, **dd).train(self.training)
            if self.distillation:
                self.head_dist = NormLinear(size, num_classes, self.drop_rate, **dd).train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Fit the windows to another input size, in place; tables of biases are resized with them.

        Args:
            img_size: Height and width, pixels; the shorter side counts.
        """
        for stage, side in zip(self.stages, _map_sides(img_size, len(self.stages)), strict=True):
            for module in stage.modules():
                if isinstance(module, WindowAttention):
                    module.attn.set_resolution(min(module.window_size, side))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the tables of attention biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^patch_embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's inner tensors in the backward pass, to save memory."""
        for stage in self.stages:
            cast(EfficientViTStage, stage).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier (the labels' one, where a second is distilled); an identity without classes."""
        return self.head.linear if isinstance(self.head, NormLinear) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers, and the pooling if one is given.

        Args:
            num_classes: Classes; 0 leaves the features.
            global_pool: As in the constructor.

        Raises:
            ValueError: Classes were asked for without pooling.
        """
        self._build_head(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final map and the maps of stages.

        Args:
            x: As in `forward`.
            indices: Stages: a list, the last n, or None for all.
            norm: Of no effect: the network has no final norm before the pooling.
            stop_early: Do not run stages behind the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: Return only the list.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self._embed(x)
        for i, stage in enumerate(
            self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: last + 1]
        ):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need, and return their indices.

        Args:
            indices: Stages: a list, or the last n.
            prune_norm: Of no effect: there is no final norm.
            prune_head: Drop the classifier; it goes in any case with the last stage.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(self._embed(x))

    def _embed(self, x: Tensor) -> Tensor:
        if not self.merged:
            return self.patch_embed(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if torch.jit.is_scripting():
            return self.patch_embed(x)
        return run_in_parts(self.patch_embed, x, 3 * x.shape[2] * x.shape[3], 4 * 2**20)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if pre_logits:
            return x
        if self.head_dist is None:
            return self.head(x)
        labels, teacher = self.head(x), self.head_dist(x)
        if self.training and not torch.jit.is_scripting():
            # a pair, although TorchScript wants one type
            return labels, teacher  # type: ignore[return-value]
        return (labels + teacher) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Average the two heads of distillation into one, in place.

        From now on maps are channels-last, and activations and sums overwrite their input.

        Raises:
            RuntimeError: The model is in training mode.
        """
        if self.merged:
            return ()
        require_mergeable(self)
        self.merged = True
        for module in self.modules():
            if isinstance(module, nn.ReLU | Residual):
                module.inplace = True  # on outputs of convolutions that nobody else holds
        if self.head_dist is None:
            return ()
        average_heads(cast(NormLinear, self.head), cast(NormLinear, self.head_dist))
        self.head_dist = None
        return ("second head",)


def _map_sides(img_size: int | tuple[int, int], stages: int) -> list[int]:
    """Return the shorter side of each stage's map, tokens."""
    side = min(to_2tuple(img_size)) // 16
    if side < 1:
        raise ValueError(f"img_size must be at least 16 pixels, got {img_size}.")
    sides = [side]
    for _ in range(stages - 1):
        sides.append((sides[-1] - 1) // 2 + 1)
    return sides


def _rename(key: str) -> str:
    """Translate one of the authors' keys; others pass."""
    key = re.sub(r"\.c\.", ".conv.", key)
    key = re.sub(r"^(head|head_dist)\.l\.", r"\1.linear.", key)
    key = re.sub(r"^patch_embed\.([0246])\.", lambda found: f"patch_embed.conv{int(found[1]) // 2 + 1}.", key)
    found = re.match(r"blocks(\d)\.(\d+)\.(.+)", key)
    if found is None:
        return key
    stage, index, rest = int(found[1]) - 1, int(found[2]), found[3]
    if stage > 0 and index < 3:
        return f"stages.{stage}.downsample.{('res1', 'patchmerge', 'res2')[index]}.{rest}"
    return f"stages.{stage}.blocks.{index - 3 if stage > 0 else index}.{rest}"


def _is_table_of(table: Tensor, shape: torch.Size) -> bool:
    """Tell whether biases have the heads of `shape`, for a square window of any side."""
    return table.ndim == 2 and table.shape[0] == shape[0] and round(table.shape[1] ** 0.5) ** 2 == table.shape[1]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys to ours, which are also timm's; ours pass unchanged.

    Tables of indices are dropped, 1x1 convolutions stored as matrices get their two axes back, tables of biases of
    another window are resized, a detector gives its backbone, and a second head starts as a copy of the first where
    the file has one only.

    Args:
        state_dict: Weights in the authors', timm's or our naming.
        model: The `EfficientViTMSRA` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form.
    """
    own = model.state_dict()
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {key[9:]: value for key, value in state_dict.items() if key.startswith("backbone.")}
    converted = {}
    for key, value in state_dict.items():
        key = _rename(key)
        if key.endswith(".attention_bias_idxs") or (key.startswith("head.") and "head.linear.weight" not in own):
            continue
        shape = own[key].shape if key in own else value.shape
        if value.ndim == 2 and shape == (*value.shape, 1, 1):
            value = value[:, :, None, None]
        if key.endswith(".attention_biases") and _is_table_of(value, shape):
            value = resize_attention_biases(value, round(shape[1] ** 0.5))
        converted[key] = value
    if "patch_embed.conv1.conv.bias" in converted and "patch_embed.conv1.conv.bias" not in own:
        raise ValueError("These weights are merged: build the model with merged=True, or merge it before loading.")
    if not any(key.startswith("head_dist.") for key in converted):
        for key in [key for key in own if key.startswith("head_dist.")]:
            first = converted.get(key.replace("head_dist.", "head."))
            if first is not None:
                converted[key] = first if first.shape == own[key].shape else own[key]
    return converted


_VARIANTS: dict[str, dict[str, Any]] = {
    "efficientvit_msra_m0": dict(embed_dim=(64, 128, 192), depth=(1, 2, 3), num_heads=(4, 4, 4), kernels=(5, 5, 5, 5)),
    "efficientvit_msra_m0_det": dict(
        embed_dim=(64, 128, 192), depth=(1, 2, 3), num_heads=(4, 4, 4), kernels=(7, 5, 3, 3)
    ),
    "efficientvit_msra_m1": dict(embed_dim=(128, 144, 192), depth=(1, 2, 3), num_heads=(2, 3, 3), kernels=(7, 5, 3, 3)),
    "efficientvit_msra_m2": dict(embed_dim=(128, 192, 224), depth=(1, 2, 3), num_heads=(4, 3, 2), kernels=(7, 5, 3, 3)),
    "efficientvit_msra_m3": dict(embed_dim=(128, 240, 320), depth=(1, 2, 3), num_heads=(4, 3, 4), kernels=(5, 5, 5, 5)),
    "efficientvit_msra_m4": dict(embed_dim=(128, 256, 384), depth=(1, 2, 3), num_heads=(4, 4, 4), kernels=(7, 5, 3, 3)),
    "efficientvit_msra_m5": dict(embed_dim=(192, 288, 384), depth=(1, 3, 4), num_heads=(3, 3, 4), kernels=(7, 5, 3, 3)),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise an EfficientViT of a published size by its weights; windows tell the input size.

    Args:
        state_dict: Weights in the authors', timm's or our naming.

    Returns:
        (registered name, constructor arguments), or None for another network.
    """
    shapes = {_rename(key): value.shape for key, value in state_dict.items()}
    first = [shapes.get(f"stages.{i}.blocks.0.mixer.m.attn.attention_biases") for i in range(3)]
    stem = shapes.get("patch_embed.conv1.conv.weight")
    if stem is None:
        return None
    kernels = {}
    embed_dim, depth, num_heads, sides = [], [], [], []
    for i, table in enumerate(first):
        dim = shapes.get(f"stages.{i}.blocks.0.dw0.m.conv.weight")
        if table is None or dim is None:
            return None
        embed_dim.append(dim[0])
        num_heads.append(table[0])
        sides.append(round(table[1] ** 0.5))
        depth.append(sum(bool(re.fullmatch(rf"stages\.{i}\.blocks\.\d+\.dw0\.m\.conv\.weight", key)) for key in shapes))
        for head in range(table[0]):
            dw = shapes.get(f"stages.{i}.blocks.0.mixer.m.attn.dws.{head}.conv.weight")
            kernels[head] = 0 if dw is None else dw[-1]
    found = dict(embed_dim=tuple(embed_dim), depth=tuple(depth), num_heads=tuple(num_heads))
    for name, args in _VARIANTS.items():
        if found.items() <= args.items() and all(args["kernels"][head] == side for head, side in kernels.items()):
            head_shape = shapes.get("head.linear.weight")
            kwargs: dict[str, Any] = dict(
                in_chans=stem[1],
                num_classes=0 if head_shape is None else head_shape[0],
                distillation="head_dist.linear.weight" in shapes,
                merged="patch_embed.conv1.conv.bias" in shapes,
            )
            return name, kwargs | _window_arguments(sides)
    return None


def _window_arguments(sides: list[int]) -> dict[str, Any]:
    """Return the arguments that give the stages windows of these sides; the published 224 pixels first."""
    for window in (7, max(sides)):
        for tokens in (14, *range(1, 4 * window + 1)):
            if [min(window, side) for side in _map_sides(16 * tokens, len(sides))] == sides:
                size = {} if tokens == 14 else dict(img_size=16 * tokens)
                return size if window == 7 else dict(window_size=window, **size)
    return dict(window_size=tuple(sides), img_size=64 * max(sides))


_RELEASE = "https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0/"
_DETECTORS = (
    f"Detectors with this backbone: {_RELEASE}retinanet_efficientvit_m4_fpn_1x_coco.pth and"
    f" {_RELEASE}mask_rcnn_efficientvit_m4_fpn_1x_coco.pth.",
)


def _cfg(**kwargs: Any) -> ModelCfg:
    fields: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        fixed_input_size=True,  # as in timm: windows are built for one size, although every size runs
        pool_size=(4, 4),
        interpolation="bicubic",
        crop_pct=0.875,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.conv1.conv",
        classifier="head.linear",
        license="mit",
        origin_url="https://github.com/microsoft/Cream/tree/main/EfficientViT",
        paper_ids="arXiv:2305.07027",
        paper_name="EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention",
        parity="Meets the authors' outputs to 4e-13 (relative, float64): logits, stages and the merged form.",
    )
    return ModelCfg(**{**fields, **kwargs})


def _published(size: str, top1: float, **kwargs: Any) -> dict[str, ModelCfg]:
    """Return the authors' file of a size and timm's copy of it."""
    kwargs["top1"] = top1
    name = f"efficientvit_msra_{size}"
    return {
        f"{name}.in1k": _cfg(url=f"{_RELEASE}efficientvit_{size}.pth", **kwargs),
        f"{name}.timm_in1k": _cfg(hf_hub_id=f"timm/efficientvit_{size}.r224_in1k", **kwargs),
    }


default_cfgs = generate_default_cfgs(
    {
        **_published("m0", 63.3),
        "efficientvit_msra_m0.imagenette": _cfg(
            **IMAGENETTE,
            file=shipped("efficientvit_msra_m0.imagenette"),
            input_size=(3, 128, 128),
            pool_size=(2, 2),
            model_args=dict(img_size=128, window_size=8),
            interpolation="bilinear",
            temperature=0.816,
            threshold=0.947,
        ),
        "efficientvit_msra_m0_det.untrained": _cfg(
            notes=("The authors published no weights with the query kernels of their detection code.",)
        ),
        **_published("m1", 68.4),
        **_published("m2", 70.8),
        **_published("m3", 73.4),
        **_published("m4", 74.3, notes=_DETECTORS),
        **_published("m5", 77.1),
    }
)


def _create_efficientvit_msra(variant: str, pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    return build_model(
        EfficientViTMSRA,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=(0, 1, 2), feature_cls="getter"),
        **kwargs,
    )


@register_model
def efficientvit_msra_m0(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    """EfficientViT-M0: 2.35 M parameters, 79 MMACs at 224; 63.3 % top-1 on ImageNet-1k."""
    return _create_efficientvit_msra("efficientvit_msra_m0", pretrained, **kwargs)


@register_model
def efficientvit_msra_m0_det(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    """EfficientViT-M0 with the query kernels of the authors' detection code (7, 5, 3, 3): 2.35 M parameters."""
    return _create_efficientvit_msra("efficientvit_msra_m0_det", pretrained, **kwargs)


@register_model
def efficientvit_msra_m1(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    """EfficientViT-M1: 2.98 M parameters, 167 MMACs at 224; 68.4 % top-1 on ImageNet-1k."""
    return _create_efficientvit_msra("efficientvit_msra_m1", pretrained, **kwargs)


@register_model
def efficientvit_msra_m2(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    """EfficientViT-M2: 4.19 M parameters, 201 MMACs at 224; 70.8 % top-1 on ImageNet-1k."""
    return _create_efficientvit_msra("efficientvit_msra_m2", pretrained, **kwargs)


@register_model
def efficientvit_msra_m3(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    """EfficientViT-M3: 6.90 M parameters, 263 MMACs at 224; 73.4 % top-1 on ImageNet-1k."""
    return _create_efficientvit_msra("efficientvit_msra_m3", pretrained, **kwargs)


@register_model
def efficientvit_msra_m4(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    """EfficientViT-M4: 8.80 M parameters, 299 MMACs at 224; 74.3 % top-1 on ImageNet-1k."""
    return _create_efficientvit_msra("efficientvit_msra_m4", pretrained, **kwargs)


@register_model
def efficientvit_msra_m5(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    """EfficientViT-M5: 12.5 M parameters, 522 MMACs at 224; 77.1 % top-1 on ImageNet-1k."""
    return _create_efficientvit_msra("efficientvit_msra_m5", pretrained, **kwargs)
