"""AFFNet: inverted residuals, and filters that a network predicts from the spectrum they are applied to.

Adaptive Frequency Filters As Efficient Global Token Mixers (ICCV 2023), https://arxiv.org/abs/2307.14008. Authors'
code: https://github.com/microsoft/TokenMixers, folder "Adaptive Frequency Filters" (MIT; parts under the licence of
Apple's CVNets). The filter itself is in zoo/layers/frequency_filter.py. The sizes "base" and "large" of their code,
without results or weights, are left out.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, GroupNorm1, make_divisible
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.cfg import CIFAR10, ModelCfg
from zoo.ffn.reparam import reparameterize
from zoo.layers.cache_blocking import run_in_parts
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.frequency_filter import AdaptiveFrequencyFilter
from zoo.layers.own import require_mergeable
from zoo.weights import build_model, shipped

__all__ = ["AFFBlock", "AFFLayer", "AFFNet", "InvertedResidual", "checkpoint_filter_fn", "detect", "untold"]


class ConvNormAct(ConvNorm):
    """`ConvNorm`, then SiLU; of the merged form the activation runs in place where no gradients are recorded.

    Args: as of `ConvNorm`.

    Shape:
        (B, in_chs, H, W) -> (B, out_chs, H', W').
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is None:
            return F.silu(x, inplace=not torch.is_grad_enabled())  # the map is ours: less memory to fetch and to fill
        return F.silu(self.bn(x))


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, 3x3 depthwise convolution, project; add the input where shapes allow.

    In its merged form, on a CPU and without gradients, it runs on a few images at a time.

    Args:
        in_dim: Input channels.
        dim: Output channels.
        stride: Stride of the depthwise convolution, pixels.
        expand_ratio: Hidden channels over input channels; the product is rounded to a multiple of 8.
        dilation: Of the depthwise convolution.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_dim, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int = 1,
        expand_ratio: float = 2.0,
        dilation: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        hidden_dim = make_divisible(round(in_dim * expand_ratio), 8)
        self.residual = stride == 1 and in_dim == dim
        self.hidden_dim = hidden_dim
        self.block = nn.Sequential(
            OrderedDict(
                conv_exp=ConvNormAct(in_dim, hidden_dim, **dd),
                conv_dw=ConvNormAct(hidden_dim, hidden_dim, 3, stride, dilation=dilation, groups=hidden_dim, **dd),
                conv_proj=ConvNorm(hidden_dim, dim, **dd),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            out = self.block(x)
        elif self.block.conv_exp.bn is None:  # type: ignore[union-attr]
            out = run_in_parts(self.block, x, self.hidden_dim * x.shape[2] * x.shape[3])
        else:
            out = self.block(x)
        return x + out if self.residual else out


class AFFLayer(nn.Module):
    """Mix channels by an inverted residual, then tokens by an adaptive frequency filter; one residual around both.

    Args:
        dim: Channels C, a multiple of 8.
        sparsity_threshold: Soft shrink of the filter's mask.
        drop_path: Rate at which a sample skips the layer in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        sparsity_threshold: float = 0.0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.norm1 = GroupNorm1(dim, **dd)
        self.mlp = InvertedResidual(dim, dim, expand_ratio=2.0, **dd)
        self.norm2 = GroupNorm1(dim, **dd)
        self.filter = AdaptiveFrequencyFilter(dim, sparsity_threshold=sparsity_threshold, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.filter(self.norm2(self.mlp(self.norm1(x)))))


class AFFBlock(nn.Module):
    """Run layers, norm and project their output, and fuse it with the input by a 1x1 convolution of both.

    The projection has no activation, so `reparameterize()` folds it, its norm and the weights of the norm before it
    into the fusing convolution.

    Args:
        dim: Channels C.
        depth: Layers.
        sparsity_threshold: Soft shrink of the filters' masks.
        drop_path: Rate at which a sample skips a layer, for each of them.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        sparsity_threshold: float = 0.0,
        drop_path: Sequence[float] = (),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim = dim
        self.layers = nn.Sequential(
            *(AFFLayer(dim, sparsity_threshold, drop_path[i] if drop_path else 0.0, **dd) for i in range(depth))
        )
        self.norm = GroupNorm1(dim, **dd)
        self.proj: ConvNorm | None = ConvNorm(dim, dim, **dd)
        self.fusion = ConvNormAct(2 * dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.layers(x))
        if self.proj is not None:
            out = self.proj(out)
        return self.fusion(torch.cat((x, out), 1))

    def example_input(self) -> Tensor:
        """Return a random input, (1, C, 8, 8)."""
        weight = self.fusion.conv.weight
        return torch.randn(1, self.dim, 8, 8, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the projection and the norm's weights into the fusing convolution, in place.

        Raises:
            RuntimeError: The block is in training mode.
        """
        if self.proj is None:
            return ()
        require_mergeable(self)
        self.proj.reparameterize()
        self.fusion.reparameterize()
        fusion, proj, norm = self.fusion.conv, self.proj.conv, self.norm
        assert fusion.bias is not None
        assert proj.bias is not None
        skip, rest = fusion.weight.flatten(1).split(self.dim, 1)
        project = proj.weight.flatten(1)
        weight = torch.cat((skip, rest @ (project * norm.weight)), 1)
        fusion.bias += rest @ (project @ norm.bias + proj.bias)
        fusion.weight.copy_(weight.view_as(fusion.weight))
        norm.weight, norm.bias, norm.affine = None, None, False  # type: ignore[assignment]
        self.proj = None
        return ("projection", "norm weights")


class AFFNet(nn.Module):
    """Classify images or extract features at strides 2, 4, 8, 16 and 32.

    Built in training form. After training, `zoo.reparameterize(model.eval())` folds norms into convolutions and, what
    the authors' code does not do, the projections of the blocks into the convolutions after them; it stores weights
    channels-last. Takes images of any size; filters are global, so outputs depend on the size.

    Differs from the authors' code: drop path can be set (theirs has none).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the map (without classes).
        dims: Channels C1 to C5 of the stages; those of the last three are multiples of 8.
        depths: Layers of the blocks in the last three stages.
        expand_ratio: Hidden channels over input channels of the inverted residuals between the blocks.
        sparsity_threshold: Soft shrink of the filters' masks. The default of the authors' code is 0.01, the option file
            of their segmentation models has 0.
        output_stride: Pixels of the input per pixel of the last map, 32, 16 or 8: strides of the last stages become
            dilations, for dense prediction.
        merged: Build the inference form, for weights that were merged.
        drop_rate: Dropout rate before the classifier; the authors train with 0.1.
        drop_path_rate: Rate at which a sample skips the last layer; grows linearly from 0.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chans, H, W), in [0, 1], not normalised -> (B, num_classes).

    Raises:
        ValueError: An argument is not one of the allowed values.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax", "catavgmax"] = "avg",
        dims: Sequence[int] = (32, 64, 128, 256, 320),
        depths: Sequence[int] = (2, 4, 3),
        expand_ratio: float = 4.0,
        sparsity_threshold: float = 0.0,
        output_stride: Literal[32, 16, 8] = 32,
        *,
        merged: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(dims) != 5 or len(depths) != 3:
            raise ValueError(f"dims must have 5 entries and depths 3, got {tuple(dims)} and {tuple(depths)}.")
        if output_stride not in (32, 16, 8):
            raise ValueError(f"output_stride must be 32, 16 or 8, got {output_stride}.")
        _require_pool(num_classes, global_pool)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = self.merged = False

        stem_dim = 16
        self.stem = ConvNormAct(in_chans, stem_dim, 3, 2, **dd)
        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        self.feature_info: list[dict[str, Any]] = []
        stages, width, reduction, dilation = [], stem_dim, 2, 1
        for i, dim in enumerate(dims):
            stride = 1 if i == 0 else 2
            before = dilation
            if reduction * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            parts: list[nn.Module] = [InvertedResidual(width, dim, stride, expand_ratio, before, **dd)]
            if i == 1:
                parts += [InvertedResidual(dim, dim, 1, expand_ratio, **dd) for _ in range(2)]
            if i >= 2:
                begin = sum(depths[: i - 2])
                parts.append(
                    AFFBlock(dim, depths[i - 2], sparsity_threshold, rates[begin : begin + depths[i - 2]], **dd)
                )
            stages.append(nn.Sequential(*parts))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
            width = dim
        self.stages = nn.Sequential(*stages)
        self.num_features = min(4 * width, 960)
        self.final_conv: nn.Module = ConvNormAct(width, self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self._init_classifier()
        if merged:
            reparameterize(self.eval(), measure=False)
            self.train()

    def _init_classifier(self) -> None:
        """Start the classifier as the authors do."""
        if isinstance(self.head.fc, nn.Linear):
            nn.init.xavier_uniform_(self.head.fc.weight)
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the biases of the mask networks, which have three axes."""
        return {name for name, _ in self.named_parameters() if name.endswith((".filter.b1", ".filter.b2"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.(\d+)\.layers\.(\d+)", None),
                (r"^stages\.(\d+)\.(\d+)\.(?:norm|proj|fusion)", (99999,)),
                (r"^stages\.(\d+)\.(\d+)", None),
                (r"^final_conv", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the inner tensors of blocks and inverted residuals in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier; an identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is given.

        Args:
            num_classes: Classes; 0 leaves the features.
            global_pool: As in the constructor.

        Raises:
            ValueError: Classes were asked for without pooling, or the pooling is unknown.
        """
        _require_pool(num_classes, self.head.global_pool.pool_type if global_pool is None else global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features
        self._init_classifier()

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
            norm: Of no effect: the network has no final norm.
            stop_early: Do not run what is behind the last stage asked for.
            output_fmt: "NCHW".
            intermediates_only: Return only the list.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(self._arrange(x))
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: last + 1]
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if len(stages) == len(self.stages):
            x = self.final_conv(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need, and return their indices.

        Args:
            indices: Stages: a list, or the last n.
            prune_norm: Of no effect: there is no final norm.
            prune_head: Drop the last 1x1 convolution and the classifier; they go in any case with the last stage.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_head or shorter:
            self.final_conv = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return take

    def _arrange(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.merged else x

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(self._arrange(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in self.stages:
                x = checkpoint_seq(stage, x)
        else:
            x = self.stages(x)
        return self.final_conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Keep maps channels-last from now on, which CPUs convolve faster; nothing is folded here.

        Raises:
            RuntimeError: The model is in training mode.
        """
        if not self.merged:
            require_mergeable(self)
            self.merged = True
        return ()


def _require_pool(num_classes: int, global_pool: str) -> None:
    """Raise a ValueError unless there is such a pooling, and one where there are classes."""
    pools = ("", "avg", "max", "avgmax", "catavgmax")
    if global_pool not in pools:
        raise ValueError(f"global_pool must be one of {pools}, got {global_pool!r}.")
    if num_classes > 0 and not global_pool:
        raise ValueError("global_pool='' gives a map, which has no classes: set num_classes=0 too.")


_AUTHORS = re.compile(r"(?:encoder\.)?((?:conv_1|layer_\d|conv_1x1_exp|classifier)\..+)")
_RENAMED = (
    (r"^conv_1\.", "stem."),
    (r"^conv_1x1_exp\.", "final_conv."),
    (r"^classifier\.", "head."),
    (r"\.conv_proj\.", ".proj."),
    (r"\.exp_1x1\.", ".conv_exp."),
    (r"\.conv_3x3\.", ".conv_dw."),
    (r"\.red_1x1\.", ".conv_proj."),
    (r"\.block\.conv\.", ".conv."),
    (r"\.block\.norm\.", ".bn."),
    (r"\.global_rep\.\d+\.(weight|bias)$", r".norm.\1"),
    (r"\.global_rep\.", ".layers."),
)


def _rename(key: str) -> str:
    """Translate one of the authors' keys; others pass."""
    found = _AUTHORS.fullmatch(key)
    if found is None:
        return key
    key = re.sub(r"^layer_(\d)\.", lambda stage: f"stages.{int(stage[1]) - 1}.", found[1])
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys to ours; ours pass unchanged.

    Of a segmentation model the encoder is taken. It has neither the last 1x1 convolution nor a classifier: there the
    model keeps its own values.

    Args:
        state_dict: Weights in the authors' or our naming.
        model: The `AFFNet` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form, or the other way round.
    """
    own = model.state_dict()
    encoder = any(key.startswith("encoder.") for key in state_dict)
    converted = {_rename(key): value for key, value in state_dict.items() if not encoder or key.startswith("encoder.")}
    if encoder:
        for part in ("final_conv.", "head.fc."):
            if not any(key.startswith(part) for key in converted):
                converted |= {key: value for key, value in own.items() if key.startswith(part)}
    if "stem.conv.weight" in converted and ("stem.conv.bias" in converted) != ("stem.conv.bias" in own):
        raise ValueError(
            "These weights are merged: build the model with merged=True, or merge it before loading."
            if "stem.conv.bias" in converted
            else "These weights are not merged: build the model with merged=False, and merge it after loading."
        )
    return converted


_VARIANTS: dict[str, dict[str, Any]] = {
    "affnet_et": dict(dims=(32, 48, 64, 104, 144), expand_ratio=2.0),
    "affnet_t": dict(dims=(32, 48, 96, 160, 192), expand_ratio=4.0),
    "affnet": dict(dims=(32, 64, 128, 256, 320), expand_ratio=4.0),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise an AFFNet of a published size by its weights, which do not tell the sparsity threshold.

    Args:
        state_dict: Weights in the authors' or our naming.

    Returns:
        (registered name, constructor arguments), or None for another network.
    """
    shapes = {_rename(key): value.shape for key, value in state_dict.items()}
    stem = shapes.get("stem.conv.weight")
    widths = [shapes.get(f"stages.{i}.0.block.conv_proj.conv.weight") for i in range(5)]
    if stem is None or any(width is None for width in widths) or "stages.2.1.layers.0.filter.w1" not in shapes:
        return None
    dims = tuple(width[0] for width in widths if width is not None)
    name = next((name for name, args in _VARIANTS.items() if args["dims"] == dims), None)
    if name is None:
        return None
    head = shapes.get("head.fc.weight")
    return name, dict(in_chans=stem[1], num_classes=0 if head is None else head[0], merged="stem.conv.bias" in shapes)


def untold(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Return the arguments that change the outputs and that no tensor tells, with what they may be."""
    return dict(output_stride="32 as published, or 16", sparsity_threshold="0 or 0.01; the authors' files do not say")


def _cfg(**kwargs: Any) -> ModelCfg:
    fields: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 256, 256),
        pool_size=(8, 8),
        interpolation="bicubic",
        crop_pct=256 / 288,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        first_conv="stem.conv",
        classifier="head.fc",
        license="mit",
        origin_url="https://github.com/microsoft/TokenMixers",
        paper_ids="arXiv:2307.14008",
        paper_name="Adaptive Frequency Filters As Efficient Global Token Mixers",
        parity="Meets the authors' outputs to 2e-15 (relative, float64): logits, stages and the merged form.",
    )
    return ModelCfg(**{**fields, **kwargs})


def _authors(folder: str, top1: float) -> ModelCfg:
    """Return the cfg of the authors' weights, which have no address of their own."""
    return _cfg(
        top1=top1,
        notes=(
            f"The authors' weights are in the shared folder {folder} ; file names are not known here. Download one and"
            " pass its path to zoo.create_model.",
            "The files do not hold sparsity_threshold: 0 and 0.01 are possible.",
        ),
    )


default_cfgs = generate_default_cfgs(
    {
        "affnet_et.cifar10": _cfg(
            **CIFAR10,
            file=shipped("affnet_et.cifar10"),
            input_size=(3, 80, 80),  # trained at 64: enlarged crops show objects larger than whole images do
            pool_size=(5, 5),
            model_args=dict(output_stride=16),
        ),
        # a star makes a tag the default; it must come after a tag that has weights, or timm moves that one to the front
        "affnet_et.in1k*": _authors("https://1drv.ms/f/s!AjKVODXuNei2gRohpLEiih31-T24?e=KSOEZ5", 73.0),
        "affnet_t.in1k": _authors("https://1drv.ms/f/s!AjKVODXuNei2gR3bxUACGV1s-NCt?e=WrEVTC", 77.0),
        "affnet.in1k": _authors("https://1drv.ms/f/s!AjKVODXuNei2gRckRc6eJ4kB8dW3?e=7comla", 79.8),
    }
)


def _create_affnet(variant: str, pretrained: bool = False, **kwargs: Any) -> AFFNet:
    return build_model(
        AFFNet,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        **kwargs,
    )


@register_model
def affnet_et(pretrained: bool = False, **kwargs: Any) -> AFFNet:
    """AFFNet-ET: 1.44 M parameters, 0.38 GMACs at 256 without Fourier transforms; 73.0 % top-1 on ImageNet-1k."""
    return _create_affnet("affnet_et", pretrained, **kwargs)


@register_model
def affnet_t(pretrained: bool = False, **kwargs: Any) -> AFFNet:
    """AFFNet-T: 2.65 M parameters, 0.82 GMACs at 256 without Fourier transforms; 77.0 % top-1 on ImageNet-1k."""
    return _create_affnet("affnet_t", pretrained, **kwargs)


@register_model
def affnet(pretrained: bool = False, **kwargs: Any) -> AFFNet:
    """AFFNet: 5.57 M parameters, 1.49 GMACs at 256 without Fourier transforms; 79.8 % top-1 on ImageNet-1k."""
    return _create_affnet("affnet", pretrained, **kwargs)
