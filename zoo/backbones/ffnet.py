"""FFNet: convolutions in the places of attention's queries, keys and values.

FFNet: MetaMixer-based Efficient Convolutional Mixer Design, https://arxiv.org/abs/2406.02021 (first version: MetaMixer
Is All You Need). Authors' code: https://github.com/ysj9909/FFNet (Apache-2.0). Their segmentation backbone FFNet-seg is
another network and is not here.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.cfg import IMAGENETTE, ModelCfg
from zoo.ffn.reparam import reparameterize
from zoo.layers.cache_blocking import run_in_parts
from zoo.layers.conv_norm import ConvNorm, RepConv, fold_norm_into_linear
from zoo.layers.own import require_mergeable
from zoo.weights import build_model, shipped

__all__ = [
    "ChannelMixer",
    "Downsample",
    "FFBlock",
    "FFNet",
    "FFStage",
    "NormConvResidual",
    "TokenMixer",
    "checkpoint_filter_fn",
    "detect",
]


def _depthwise(
    dim: int,
    kernel_size: int,
    *,
    norm: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return a depthwise convolution: 7x7 with a 3x3 beside it, others alone, those with a norm or with a bias."""
    dd: dict[str, Any] = dict(device=device, dtype=dtype)
    if kernel_size == 7:
        return RepConv(dim, dim, (7, 3), **dd)
    if norm:
        return ConvNorm(dim, dim, kernel_size, groups=dim, **dd)
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)


def _last_conv(module: nn.Module) -> nn.Conv2d:
    """Return the convolution that a merged `RepConv` or `ConvNorm` has become, or a convolution itself."""
    conv = module if isinstance(module, nn.Conv2d) else module.conv
    assert isinstance(conv, nn.Conv2d)
    return conv


class TokenMixer(nn.Module):
    """Mix pixels: 1x1 projection, depthwise "keys", GELU, depthwise "values" (FFNified attention; paper, section 3).

    Args:
        dim: Channels C.
        kernel_size: Side of both depthwise kernels, pixels.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self, dim: int, kernel_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.fc = ConvNorm(dim, dim, **dd)
        self.conv1 = _depthwise(dim, kernel_size, norm=False, **dd)
        self.act = nn.GELU()
        self.conv2 = _depthwise(dim, kernel_size, norm=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(self.fc(x))))


class ChannelMixer(nn.Module):
    """Mix channels: depthwise convolution with a norm, then two 1x1 convolutions with GELU between them.

    Args:
        dim: Channels C.
        kernel_size: Side of the depthwise kernel, pixels.
        mlp_ratio: Hidden channels, over C.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        hidden_dim = int(mlp_ratio * dim)
        self.conv = _depthwise(dim, kernel_size, norm=True, **dd)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


class FFBlock(nn.Module):
    """Mix pixels, then channels, each with a residual and, in deep networks, a layer scale.

    `reparameterize()` folds the layer scales into the last convolutions of the mixers.

    Args:
        dim: Channels C.
        token_kernel: Side of the token mixer's kernels, pixels.
        channel_kernel: Side of the channel mixer's kernel, pixels.
        mlp_ratio: Hidden channels of the channel mixer, over C.
        layer_scale: Start value of both layer scales; None has none.
        drop_path: Rate at which a sample skips a branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        token_kernel: int,
        channel_kernel: int,
        mlp_ratio: float = 3.0,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim = dim
        self.token_mixer = TokenMixer(dim, token_kernel, **dd)
        self.channel_mixer = ChannelMixer(dim, channel_kernel, mlp_ratio, **dd)
        self.layer_scale1: nn.Parameter | None = None
        self.layer_scale2: nn.Parameter | None = None
        if layer_scale is not None:
            self.layer_scale1 = nn.Parameter(torch.full((dim, 1, 1), layer_scale, **dd))
            self.layer_scale2 = nn.Parameter(torch.full((dim, 1, 1), layer_scale, **dd))
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # no map has a name of its own, which would keep it alive while the widest one is made
        x = x + self.drop_path1(_scaled(self.token_mixer(x), self.layer_scale1))
        return x + self.drop_path2(_scaled(self.channel_mixer(x), self.layer_scale2))

    def example_input(self) -> Tensor:
        """Return a random input, (1, C, 17, 17)."""
        weight = self.channel_mixer.fc1.weight
        return torch.randn(1, self.dim, 17, 17, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the norms and branches, and the layer scales into what comes before them, in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.layer_scale1 is None or self.layer_scale2 is None:
            return ()
        require_mergeable(self)
        if isinstance(self.token_mixer.conv2, RepConv):
            self.token_mixer.conv2.reparameterize()
        for conv, scale in (
            (_last_conv(self.token_mixer.conv2), self.layer_scale1),
            (self.channel_mixer.fc2, self.layer_scale2),
        ):
            assert conv.bias is not None
            conv.weight *= scale.unsqueeze(-1)
            conv.bias *= scale.flatten()
        self.layer_scale1 = self.layer_scale2 = None
        return ("layer scales",)


class NormConvResidual(nn.Module):
    """BatchNorm, then a 1x1 convolution without bias, plus the input; `reparameterize()` leaves one 1x1 convolution.

    Args:
        dim: Channels C.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.conv = nn.Conv2d(dim, dim, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.bn is None else x + self.conv(self.bn(x))

    def example_input(self) -> Tensor:
        """Return a random input, (1, C, 7, 7)."""
        weight = self.conv.weight
        return torch.randn(1, self.conv.in_channels, 7, 7, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the norm, and the residual as a one on the diagonal, into the convolution in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.bn is None:
            return ()
        require_mergeable(self)
        fold_norm_into_linear(self.bn, self.conv)
        self.conv.weight += torch.eye(
            self.conv.in_channels, device=self.conv.weight.device, dtype=self.conv.weight.dtype
        )[..., None, None]
        self.bn = None
        return ("norm", "residual")


class Downsample(nn.Sequential):
    """Halve height and width and double the channels with a depthwise convolution, then mix the channels.

    Args:
        dim: Channels C of the input.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> (B, 2 * C, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(RepConv(dim, 2 * dim, (7, 3), 2, **dd), NormConvResidual(2 * dim, **dd))


class FFStage(nn.Module):
    """Halve height and width, except in the first stage, then run the blocks.

    Args:
        dim: Channels C of the blocks.
        downsample: Halve height and width first.
        token_kernel: Side of the token mixers' kernels, pixels.
        channel_kernel: Side of the channel mixers' kernels, pixels.
        mlp_ratio: Hidden channels of the channel mixers, over C.
        layer_scale: Start value of the layer scales; None has none.
        drop_path: Rate at which a sample skips a branch, for each block.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W), with `downsample` (B, C / 2, 2 * H, 2 * W) -> (B, C, H, W).
    """

    def __init__(
        self,
        dim: int,
        *,
        downsample: bool,
        token_kernel: int,
        channel_kernel: int,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: Sequence[float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.grad_checkpointing = self.merged = False
        self.hidden_dim = int(mlp_ratio * dim)
        self.downsample = Downsample(dim // 2, **dd) if downsample else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                FFBlock(dim, token_kernel, channel_kernel, mlp_ratio, layer_scale=layer_scale, drop_path=rate, **dd)
                for rate in drop_path
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        if self.merged and not torch.jit.is_scripting():
            return run_in_parts(self.blocks, x, self.hidden_dim * x.shape[2] * x.shape[3])
        return self.blocks(x)


class FFNet(nn.Module):
    """Classify images or extract features of strides 4, 8, 16 and 32.

    Built in training form. After training, `zoo.reparameterize(model.eval())` folds norms, branches, layer scales and,
    with average pooling, the last norm into the classifier, so that `forward_features` then ends before that norm; maps
    are channels-last from then on, and large ones are made for a few images at a time, which is faster on a CPU.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the map of the last stage.
        depths: Blocks of each stage.
        dims: Channels of each stage, each twice the one before.
        token_kernels: Side of the token mixers' kernels in each stage, odd, pixels.
        channel_kernels: Side of the channel mixers' kernels in each stage, odd, pixels.
        mlp_ratio: Hidden channels of the channel mixers, over the stage's channels.
        layer_scale: Start value of the layer scales; None has none.
        merged: Build the inference form, for weights that were merged.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate at which a sample skips a branch of the last block; grows linearly from 0.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chans, H, W), normalised, any size -> (B, num_classes).

    Raises:
        ValueError: An argument is not one of the allowed values.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax", "catavgmax"] = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (80, 160, 320, 640),
        token_kernels: Sequence[int] = (3, 3, 7, 7),
        channel_kernels: Sequence[int] = (3, 3, 3, 3),
        mlp_ratio: float = 3.0,
        *,
        layer_scale: float | None = None,
        merged: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len({len(depths), len(dims), len(token_kernels), len(channel_kernels)}) != 1:
            raise ValueError(
                "depths, dims, token_kernels and channel_kernels must have one entry a stage, got"
                f" {tuple(depths)}, {tuple(dims)}, {tuple(token_kernels)} and {tuple(channel_kernels)}."
            )
        if any(dim != dims[0] * 2**i for i, dim in enumerate(dims)):
            raise ValueError(f"dims must double from stage to stage, got {tuple(dims)}.")
        if any(size % 2 == 0 for size in (*token_kernels, *channel_kernels)):
            raise ValueError(
                "token_kernels and channel_kernels must be odd, or the map would grow; got"
                f" {tuple(token_kernels)} and {tuple(channel_kernels)}."
            )
        pools = ("", "avg", "max", "avgmax", "catavgmax")
        if global_pool not in pools:
            raise ValueError(f"global_pool must be one of {pools}, got {global_pool!r}.")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.merged = False
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = nn.Sequential(ConvNorm(in_chans, 64, 3, 2, **dd), nn.GELU(), ConvNorm(64, dims[0], 3, 2, **dd))
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        self.stages = nn.Sequential(
            *(
                FFStage(
                    dims[i],
                    downsample=i > 0,
                    token_kernel=token_kernels[i],
                    channel_kernel=channel_kernels[i],
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    drop_path=rates[i],
                    **dd,
                )
                for i in range(len(dims))
            )
        )
        self.feature_info = [
            dict(num_chs=dim, reduction=2 ** (2 + i), module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.norm: nn.Module = nn.BatchNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        if not next(self.parameters()).is_meta:  # drawing numbers that are not there takes half a second
            self.apply(self._init_weights)
        if merged:
            reparameterize(self.eval(), measure=False)
            self.train()

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the layer scales. The authors do decay them, towards branches that do nothing."""
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
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what is between them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by an untrained one.

        Args:
            num_classes: Classes; 0 leaves the features.
            global_pool: As in the constructor; None keeps the pooling.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the outputs of stages, and the final one.

        Args:
            x: (B, in_chans, H, W).
            indices: Take the last n stages, or these; None takes all.
            norm: Apply the last norm to the output of the last stage.
            stop_early: Do not run stages behind the last one that is asked for.
            output_fmt: "NCHW".
            intermediates_only: Leave out the final output.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take, most = feature_take_indices(len(self.feature_info), indices)
        x = self._forward_stem(x)
        last = len(self.feature_info) - 1
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: most + 1]
        intermediates = []
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take:
                intermediates.append(self.norm(x) if norm and index == last else x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == last + 1 else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove stages behind the last one that is asked for, the norm and the classifier; return the indices."""
        take, most = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: most + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _forward_stem(self, x: Tensor) -> Tensor:
        if not self.merged:
            return self.stem(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if torch.jit.is_scripting():
            return self.stem(x)
        return run_in_parts(self.stem, x, 16 * x.shape[2] * x.shape[3])

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self._forward_stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the last norm into the classifier, where pooling allows it, and go channels-last, in place.

        Raises:
            RuntimeError: The model is in training mode.
        """
        if self.merged:
            return ()
        require_mergeable(self)
        folded = ["channels-last layout"]
        if isinstance(self.norm, nn.BatchNorm2d) and self._norm_folds():
            fold_norm_into_linear(self.norm, self.head.fc)  # means commute with scale and shift
            self.norm = nn.Identity()
            folded.insert(0, "last norm")
        self.merged = True
        for stage in self.stages:
            stage.merged = True  # type: ignore[assignment]
        return tuple(folded)

    def _norm_folds(self) -> bool:
        return isinstance(self.head.fc, nn.Linear) and self.head.global_pool.pool_type == "avg"


_NAMES = (  # the authors' parts of keys, ours
    (r"^patch_embed\.", "stem."),
    (r"^stages\.0\.(\d+)\.(token|channel)_mixer\.", r"stages.0.blocks.\1.\2_mixer."),
    (r"^stages\.([1-9])\.0\.proj\.", r"stages.\1.downsample."),
    (
        r"^stages\.([1-9])\.(\d+)\.(token|channel)_mixer\.",
        lambda found: f"stages.{found[1]}.blocks.{int(found[2]) - 1}.{found[3]}_mixer.",
    ),
    (r"\.token_mixer\.0\.layer_scale$", ".layer_scale1"),
    (r"\.channel_mixer\.layer_scale$", ".layer_scale2"),
    (r"\.token_mixer\.0\.main\.", ".token_mixer."),
    (r"\.channel_mixer\.main\.", ".channel_mixer."),
    (r"\.downsample\.1\.conv\.bn\.", ".downsample.1.bn."),
    (r"\.downsample\.1\.conv\.c\.", ".downsample.1.conv."),
    (r"\.(downsample\.0|token_mixer\.conv[12])\.conv\.(c|bn)\.", r".\1.branches.0.\2."),
    (r"\.(downsample\.0|token_mixer\.conv[12])\.conv1\.(c|bn)\.", r".\1.branches.1.\2."),
    (r"\.channel_mixer\.conv\.conv\.(c|bn)\.", r".channel_mixer.conv.branches.0.\1."),
    (r"\.channel_mixer\.conv\.conv1\.(c|bn)\.", r".channel_mixer.conv.branches.1.\1."),
    (r"\.c\.weight$", ".conv.weight"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys to ours; our own keys, in training or merged form, pass unchanged.

    Args:
        state_dict: Weights in the authors' or our naming.
        model: The `FFNet` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form, or the other way round.
    """
    theirs = "patch_embed.0.c.weight" in state_dict
    converted = {}
    for key, value in state_dict.items():
        for pattern, name in _NAMES if theirs else ():
            key = re.sub(pattern, name, key)
        converted[key] = value
    if "stem.0.conv.weight" in converted and isinstance(model, FFNet):
        given = "stem.0.bn.weight" not in converted and "stem.0.conv.bias" in converted
        if given != model.merged:
            form = {True: "merged", False: "in training form"}
            raise ValueError(
                f"The weights are {form[given]}, the model is {form[model.merged]}: build it with merged={given}."
            )
    return converted


_VARIANTS: dict[str, dict[str, Any]] = {
    "ffnet_1": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    "ffnet_2": dict(depths=(3, 3, 15, 3), dims=(88, 176, 352, 704), channel_kernels=(7, 7, 7, 7)),
    "ffnet_3": dict(depths=(4, 4, 22, 5), dims=(96, 192, 384, 768), channel_kernels=(7, 7, 7, 7), layer_scale=1e-6),
    "ffnet_4": dict(depths=(4, 4, 27, 3), dims=(128, 256, 512, 1024), channel_kernels=(7, 7, 7, 7), layer_scale=1e-6),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise an FFNet of a published size by its weights.

    Args:
        state_dict: Weights in the authors' or our naming, in training or merged form.

    Returns:
        (registered name, constructor arguments), or None for another network.
    """
    theirs = "patch_embed.0.c.weight" in state_dict
    stem = "patch_embed.{}.c.weight" if theirs else "stem.{}.conv.weight"
    first, last = state_dict.get(stem.format(0)), state_dict.get(stem.format(2))
    block = r"stages\.(\d)\.(\d+)\.channel_mixer\." if theirs else r"stages\.(\d)\.blocks\.(\d+)\.channel_mixer\."
    blocks = {(int(found[1]), found[2]) for key in state_dict if (found := re.match(block, key))}
    if first is None or last is None or not blocks:
        return None
    size = (last.shape[0], tuple(sum(stage == i for stage, _ in blocks) for i in range(4)))
    name = next((name for name, args in _VARIANTS.items() if (args["dims"][0], args["depths"]) == size), None)
    if name is None:
        return None
    head = state_dict.get("head.weight" if theirs else "head.fc.weight")
    return name, dict(
        in_chans=first.shape[1],
        num_classes=0 if head is None else head.shape[0],
        merged="stem.0.conv.bias" in state_dict,
    )


def _cfg(**kwargs: Any) -> ModelCfg:
    fields: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 256, 256),
        pool_size=(8, 8),
        interpolation="bicubic",
        crop_pct=0.9,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stem.0.conv",
        classifier="head.fc",
        license="apache-2.0",
        origin_url="https://github.com/ysj9909/FFNet",
        paper_ids="arXiv:2406.02021",
        paper_name="FFNet: MetaMixer-based Efficient Convolutional Mixer Design",
        parity="Meets the authors' outputs to 4.3e-15 (relative, float64): logits, stages and the merged form.",
        notes=(
            "The authors' files are training checkpoints. If one holds more than tensors, it is refused: re-save its"
            " state_dict as safetensors where you trust it. Averaged weights are taken where there are both.",
        ),
    )
    return ModelCfg(**{**fields, **kwargs})


def _authors(file: str, **kwargs: Any) -> ModelCfg:
    """Return the cfg of one of the authors' published files."""
    return _cfg(url=f"https://github.com/ysj9909/FFNet/releases/download/v1.0/{file}.pth.tar", **kwargs)


_AT_384: dict[str, Any] = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=0.95)

default_cfgs = generate_default_cfgs(
    {
        "ffnet_1.imagenette": _cfg(
            **IMAGENETTE,
            file=shipped("ffnet_1.imagenette"),
            input_size=(3, 128, 128),
            pool_size=(4, 4),
            model_args=dict(dims=(36, 72, 144, 288)),  # less than half of the paper's
            interpolation="bilinear",
            temperature=0.698,
            threshold=0.959,
        ),
        # a star makes a tag the default; it must come after a tag that has weights, or timm moves that one to the front
        "ffnet_1.in1k*": _authors("ffnet_1", top1=81.3),
        "ffnet_1.dist_in1k": _authors("ffnet_1_distillation", top1=82.1),
        "ffnet_2.in1k": _authors("ffnet_2", top1=82.9),
        "ffnet_2.dist_in1k": _authors("ffnet_2_distillation", top1=83.7),
        "ffnet_3.in1k": _authors("ffnet_3", top1=83.9, crop_pct=0.95),
        "ffnet_3.dist_in1k": _authors("ffnet_3_distillation", top1=84.5, crop_pct=0.95),
        "ffnet_3.in1k_384": _authors("ffnet_3_384", top1=84.5, **_AT_384),
        "ffnet_4.in1k_384": _authors("ffnet_4_384", top1=85.3, **_AT_384),
    }
)


def _create_ffnet(variant: str, pretrained: bool = False, **kwargs: Any) -> FFNet:
    return build_model(
        FFNet,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def ffnet_1(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """FFNet-1: 13.78 M parameters, 13.66 M merged; 2.9 GMACs at 256 merged."""
    return _create_ffnet("ffnet_1", pretrained, **kwargs)


@register_model
def ffnet_2(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """FFNet-2: 27.21 M parameters, 26.91 M merged; 6.0 GMACs at 256 merged."""
    return _create_ffnet("ffnet_2", pretrained, **kwargs)


@register_model
def ffnet_3(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """FFNet-3: 48.82 M parameters, 48.33 M merged; 10.1 GMACs at 256 merged, 22.8 at 384."""
    return _create_ffnet("ffnet_3", pretrained, **kwargs)


@register_model
def ffnet_4(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """FFNet-4: 79.87 M parameters, 79.20 M merged; 19.2 GMACs at 256 merged, 43.1 at 384."""
    return _create_ffnet("ffnet_4", pretrained, **kwargs)
