"""LSNet: a convolutional network that looks at a large surrounding to decide how to mix a small one.

LSNet: See Large, Focus Small (CVPR 2025), https://arxiv.org/abs/2503.23135.
Authors' code: https://github.com/jameslahm/lsnet; the model cards of its weights say MIT.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SelectAdaptivePool2d, SqueezeExcite, calculate_drop_path_rates, get_device_dtype
from timm.models import (
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.cfg import CIFAR10, IMAGENETTE, ModelCfg
from zoo.ffn.reparam import reparameterize
from zoo.layers.attention_bias import BiasedAttention, resize_attention_biases
from zoo.layers.conv_norm import ConvNorm, NormLinear, RepConv, average_heads
from zoo.layers.own import require_mergeable
from zoo.layers.ska import LSConv
from zoo.layers.tracing import require_leaf
from zoo.weights import build_model, shipped

__all__ = ["ConvAttention", "LSBlock", "LSNet", "LSStage", "checkpoint_filter_fn", "detect"]


@register_notrace_module  # its branch depends on the input's size, which torch.fx cannot follow
class ConvAttention(BiasedAttention):
    """Attend over all pixels, with a depthwise convolution on the queries and learned biases, and add the input.

    On a map of another size than `resolution` the biases are interpolated, bicubic, as when weights are loaded.

    Args:
        dim: Channels C.
        num_heads: Heads h.
        key_dim: Channels of a head's queries and keys.
        resolution: Side of the map, pixels.
        drop_path: Rate at which a sample skips the branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int,
        resolution: int,
        *,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, resolution, device=device, dtype=dtype)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_heads, self.dim, self.keys = num_heads, dim, num_heads * key_dim
        self.scale = key_dim**-0.5
        self.qkv = ConvNorm(dim, 2 * self.keys + dim, **dd)
        self.dw = ConvNorm(self.keys, self.keys, 3, groups=self.keys, **dd)
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim, bn_weight_init=0.0, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """Return the branch alone, (B, C, H, W)."""
        if not torch.jit.is_scripting():
            require_leaf(self, x)
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).split((self.keys, self.keys, self.dim), 1)
        q = self._tokens(self.dw(q))
        k, v = self._tokens(k), self._tokens(v)  # (B, h, N, channels)
        if self.scale != 1.0:
            q = q * self.scale
        scores = q @ k.transpose(-2, -1)
        if height != self.resolution or width != self.resolution:
            bias = self._resized_bias(height, width)
        elif torch.jit.is_scripting():
            bias = self._spread(self.attention_biases)
        else:
            bias = self.attention_bias()
        scores = scores + bias
        out = scores.softmax(-1).to(v.dtype) @ v
        out = out.transpose(1, 2).reshape(batch, height, width, self.dim).permute(0, 3, 1, 2)
        return self.proj(self.act(out))

    def _tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(-2, -1)

    def _resized_bias(self, height: int, width: int) -> Tensor:
        """Return the bias of every pair of tokens of another map, (h, N, N)."""
        side = self.resolution
        grid = self.attention_biases.float().view(1, -1, side, side)
        table = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)[0].flatten(1)
        y = torch.arange(height, device=table.device).repeat_interleave(width)
        x = torch.arange(width, device=table.device).repeat(height)
        offsets = (y[:, None] - y).abs() * width + (x[:, None] - x).abs()
        return table.to(self.attention_biases.dtype)[:, offsets]

    def example_input(self) -> Tensor:
        """Return a random input, (2, C, resolution, resolution)."""
        table = self.attention_biases
        return torch.randn(2, self.dim, self.resolution, self.resolution, device=table.device, dtype=table.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the norms, and the scale of the scores into the queries' convolution, in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.scale == 1.0:
            return ()
        require_mergeable(self)
        for layer in (self.qkv, self.dw, self.proj):
            layer.reparameterize()
        assert self.dw.conv.bias is not None
        self.dw.conv.weight *= self.scale
        self.dw.conv.bias *= self.scale
        self.scale = 1.0
        return ("query scale",)


class ConvMlp(nn.Module):
    """Widen to 2C with a 1x1 convolution, ReLU, narrow with another, add the input.

    Args:
        dim: Channels C.
        drop_path: Rate at which a sample skips the branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        *,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, 2 * dim, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(2 * dim, dim, bn_weight_init=0.0, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.act(self.pw1(x))))


class LSBlock(nn.Module):
    """Mix pixels, re-weight channels, mix channels; every part adds its input itself.

    Args:
        dim: Channels C.
        mixer: Mixes pixels.
        se: Re-weight channels by squeeze-excite after the mixer.
        drop_path: Rate at which a sample skips the channel mixer in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        se: bool,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.se: nn.Module = nn.Identity()
        if se:
            self.se = SqueezeExcite(dim, 0.25, device=device, dtype=dtype)
            self.se.act = nn.ReLU()  # timm's writes over what a hook has seen
        self.ffn = ConvMlp(dim, drop_path=drop_path, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.se(self.mixer(x)))


class LSStage(nn.Module):
    """Halve height and width, except in the first stage, then run the blocks, of which there may be none.

    Args:
        in_dim: Channels of the input.
        dim: Channels C of the blocks.
        downsample: Halve height and width first.
        num_heads: Heads of attention in every second block; 0 has `LSConv` there.
        key_dim: Channels of a head's queries and keys.
        resolution: Side of the blocks' map, pixels.
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
        num_heads: int,
        key_dim: int,
        resolution: int,
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
                ConvNorm(in_dim, in_dim, 3, 2, groups=in_dim, **dd), ConvNorm(in_dim, dim, **dd)
            )
        blocks = []
        for position, rate in enumerate(drop_path):
            mixer: nn.Module
            if position % 2 == 0:
                mixer = RepConv(dim, dim, (3, 1), identity=True, **dd)
            elif num_heads == 0:
                mixer = LSConv(dim, drop_path=rate, **dd)
            else:
                mixer = ConvAttention(dim, num_heads, key_dim, resolution, drop_path=rate, **dd)
            blocks.append(LSBlock(dim, mixer, se=position % 2 == 0, drop_path=rate, **dd))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class LSStem(nn.Sequential):
    """Convolutions with strides; merged, they make the input channels-last, and the copy goes with the first of them.

    Shape:
        (B, in_chans, H, W) -> (B, C, H / 8, W / 8), rounded up.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            x = x.contiguous(memory_format=torch.channels_last)
        for layer in self:
            x = layer(x)
        return x


class LSNet(nn.Module):
    """Classify images or extract features of strides 8, 16, 32 and 64.

    Built in training form. After training, `zoo.reparameterize(model.eval())` folds norms, branches and scales, makes
    one classifier of two, and keeps maps channels-last, which is faster on a CPU.
    With distillation, training gives the outputs of both classifiers only after `set_distilled_training()`, as in timm;
    the authors' code always does. Differs from the paper: `drop_path_rate` and `drop_rate` exist (theirs are 0).

    Args:
        img_size: Input height and width, pixels, that the attention biases of the last stage are for. At another size
            they are interpolated in each forward.
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the features.
        global_pool: "avg", or "" for the map of the last stage.
        dims: Channels of each stage, multiples of 8.
        depths: Blocks of each stage.
        num_heads: Heads of attention in the last stage.
        key_dim: Channels of a head's queries and keys.
        distillation: Add a second classifier that learns from a teacher.
        merged: Build the inference form, for weights that were merged.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate at which a sample skips a branch of the last block; grows linearly from 0.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chans, H, W), normalised -> (B, num_classes).

    Raises:
        ValueError: An argument is not one of the allowed values.
    """

    graph_depends_on_size = True  # whether attention biases are interpolated: an exported graph holds for one size

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg"] = "avg",
        dims: Sequence[int] = (64, 128, 256, 384),
        depths: Sequence[int] = (0, 2, 8, 10),
        num_heads: int = 4,
        key_dim: int = 16,
        *,
        distillation: bool = False,
        merged: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(dims) != len(depths):
            raise ValueError(f"dims and depths must have one entry a stage, got {tuple(dims)} and {tuple(depths)}.")
        if any(dim % 8 for dim in dims) or dims[-1] % num_heads:
            raise ValueError(f"dims must be multiples of 8, the last of num_heads ({num_heads}); got {tuple(dims)}.")
        if isinstance(img_size, Sequence) and len(set(img_size)) != 1:
            raise ValueError(f"img_size must be square, got {tuple(img_size)}; other sizes can be given to forward.")
        side = img_size if isinstance(img_size, int) else img_size[0]
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.drop_rate, self.grad_checkpointing = in_chans, drop_rate, False
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = LSStem(
            ConvNorm(in_chans, dims[0] // 4, 3, 2, **dd),
            nn.ReLU(),
            ConvNorm(dims[0] // 4, dims[0] // 2, 3, 2, **dd),
            nn.ReLU(),
            ConvNorm(dims[0] // 2, dims[0], 3, 2, **dd),
        )
        last = len(dims) - 1
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        self.stages = nn.Sequential(
            *(
                LSStage(
                    dims[max(i - 1, 0)],
                    dims[i],
                    downsample=i > 0,
                    num_heads=num_heads if i == last else 0,
                    key_dim=key_dim,
                    resolution=-(-side // 2 ** (3 + i)),
                    drop_path=rates[i],
                    **dd,
                )
                for i in range(len(dims))
            )
        )
        self.feature_info = [
            dict(num_chs=dim, reduction=2 ** (3 + i), module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.distilled_training = False
        self.distillation = distillation
        self.reset_classifier(num_classes, global_pool)
        if merged:
            reparameterize(self.eval(), measure=False)
            self.train()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the attention biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what is between them."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the outputs of both classifiers in training mode, (B, num_classes) each."""
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, with distillation both of them."""
        if isinstance(self.head, NormLinear) and isinstance(self.head_dist, NormLinear):
            return nn.ModuleList((self.head.linear, self.head_dist.linear))
        return self.head.linear if isinstance(self.head, NormLinear) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by an untrained one.

        Args:
            num_classes: Classes; 0 leaves the features.
            global_pool: "avg" or ""; None keeps the pooling.

        Raises:
            ValueError: The pooling is another word, or "" with classes.
        """
        if global_pool is not None:
            if global_pool not in ("", "avg"):
                raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}.")
            pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            self.global_pool = pool.train(self.training)
        if num_classes > 0 and self.global_pool.is_identity():
            raise ValueError(f"global_pool='' needs num_classes=0, got {num_classes}.")
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head: nn.Module = nn.Identity()
        self.head_dist: nn.Module | None = None
        if num_classes > 0:
            self.head = NormLinear(self.num_features, num_classes, self.drop_rate, **dd).train(self.training)
            if self.distillation:
                self.head_dist = NormLinear(self.num_features, num_classes, self.drop_rate, **dd).train(self.training)

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
            norm: Without effect: there is no norm behind the last stage.
            stop_early: Do not run stages behind the last one that is asked for.
            output_fmt: "NCHW".
            intermediates_only: Leave out the final output.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take, most = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: most + 1]
        intermediates = []
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove stages behind the last one that is asked for, and the classifier; return the stages' indices."""
        take, most = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: most + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if pre_logits or self.num_classes == 0:
            return x
        if self.head_dist is None:
            return self.head(x)
        logits, distilled = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return cast(Tensor, (logits, distilled))  # TorchScript knows no union of the two
        return (logits + distilled) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @property
    def merged(self) -> bool:
        """Whether it is in inference form; its first layers keep it, whose maps that form is about."""
        return self.stem.merged

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Make one classifier of two, in place.

        From now on maps are channels-last, and activations overwrite their input.

        Raises:
            RuntimeError: The model is in training mode.
        """
        if self.merged:
            return ()
        require_mergeable(self)
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True  # on outputs of convolutions and products that nobody else holds
        folded = ["channels-last layout"]
        if isinstance(self.head, NormLinear) and isinstance(self.head_dist, NormLinear):
            average_heads(self.head, self.head_dist)
            self.head_dist, self.distillation = None, False
            folded.insert(0, "two classifiers")
        self.stem.merged = True
        return tuple(folded)


_NAMES = (  # the authors' parts of keys, ours
    (r"^patch_embed\.", "stem."),
    (r"^blocks([234])\.([01])\.", lambda found: f"stages.{int(found[1]) - 1}.downsample.{found[2]}."),
    (r"^blocks1\.(\d+)\.", r"stages.0.blocks.\1."),
    (r"^blocks([234])\.(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.{int(found[2]) - 2}."),
    (r"\.mixer\.conv\.(c|bn)\.", r".mixer.branches.0.\1."),
    (r"\.mixer\.conv1\.(c|bn)\.", r".mixer.branches.1.\1."),
    (r"\.mixer\.m\.", ".mixer."),
    (r"\.mixer\.proj\.1\.", ".mixer.proj."),
    (r"\.ffn\.m\.", ".ffn."),
    (r"\.c\.weight$", ".conv.weight"),
    (r"^(head|head_dist)\.l\.", r"\1.linear."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the authors' keys to ours; our own keys, in training or merged form, pass unchanged.

    Index tables are dropped, attention biases of another resolution are interpolated.

    Args:
        state_dict: Weights in the authors' or our naming.
        model: The `LSNet` that will load them.

    Raises:
        ValueError: The weights are merged and the model is in training form, or the other way round.
    """
    theirs = "patch_embed.0.c.weight" in state_dict
    own = model.state_dict()
    converted = {}
    for key, value in state_dict.items():
        if key.endswith("attention_bias_idxs"):
            continue
        if theirs:
            for pattern, name in _NAMES:
                key = re.sub(pattern, name, key)
        table = own.get(key)
        if key.endswith("attention_biases") and table is not None and value.shape[:1] == table.shape[:1]:
            value = _fit_table(value, table)
        converted[key] = value
    if "stem.0.conv.weight" in converted and isinstance(model, LSNet):
        given = "stem.0.bn.weight" not in converted and "stem.0.conv.bias" in converted
        if given != model.merged:
            form = {True: "merged", False: "in training form"}
            raise ValueError(
                f"The weights are {form[given]}, the model is {form[model.merged]}: build it with merged={given}."
            )
    return converted


def _fit_table(table: Tensor, own: Tensor) -> Tensor:
    """Interpolate attention biases for the model's resolution; what is no table of a square is left as it is."""
    side, own_side = round(table[0].numel() ** 0.5), round(own.shape[1] ** 0.5)
    return resize_attention_biases(table, own_side) if table.ndim == 2 and side**2 == table.shape[1] else table


_VARIANTS: dict[str, dict[str, Any]] = {
    "lsnet_t": dict(dims=(64, 128, 256, 384), depths=(0, 2, 8, 10)),
    "lsnet_s": dict(dims=(96, 192, 320, 448), depths=(1, 2, 8, 10)),
    "lsnet_b": dict(dims=(128, 256, 384, 512), depths=(4, 6, 8, 10)),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise an LSNet of a published size by its weights.

    Args:
        state_dict: Weights in the authors' or our naming, in training or merged form.

    Returns:
        (registered name, constructor arguments), or None for another network. The image size follows from the attention
        biases, to 64 pixels; for the published resolution of 4 it is left at its default.
    """
    theirs = "patch_embed.0.c.weight" in state_dict
    first = state_dict.get("patch_embed.0.c.weight" if theirs else "stem.0.conv.weight")
    final = "blocks4.{}.mixer.{}" if theirs else "stages.3.blocks.{}.mixer.{}"
    table = state_dict.get(final.format(3, "m.attention_biases") if theirs else final.format(1, "attention_biases"))
    block = r"blocks([1234])\.(\d+)\.ffn\." if theirs else r"stages\.([0123])\.blocks\.(\d+)\.ffn\."
    blocks = {(int(found[1]) - theirs, found[2]) for key in state_dict if (found := re.match(block, key))}
    if first is None or table is None or table.ndim != 2 or first.ndim != 4:
        return None
    size = (4 * first.shape[0], tuple(sum(stage == i for stage, _ in blocks) for i in range(4)))
    name = next((name for name, args in _VARIANTS.items() if (args["dims"][0], args["depths"]) == size), None)
    if name is None:
        return None
    head = state_dict.get("head.l.weight" if theirs else "head.linear.weight")
    resolution = round(table.shape[1] ** 0.5)
    kwargs: dict[str, Any] = dict(
        in_chans=first.shape[1],
        num_classes=0 if head is None else head.shape[0],
        distillation=any(key.startswith("head_dist.") for key in state_dict),
        merged="stem.0.conv.bias" in state_dict,
    )
    return name, kwargs if resolution == 4 else {**kwargs, "img_size": 64 * resolution}


def _cfg(**kwargs: Any) -> ModelCfg:
    fields: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(4, 4),
        interpolation="bicubic",
        crop_pct=0.875,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stem.0.conv",
        classifier="head.linear",
        license="mit",
        origin_url="https://github.com/jameslahm/lsnet",
        paper_ids="arXiv:2503.23135",
        paper_name="LSNet: See Large, Focus Small",
        parity="Meets the authors' outputs to 4.4e-13 (relative, float64): logits, stages, merged form, two heads.",
        notes=("The licence is the one that the authors' model cards state.",),
    )
    return ModelCfg(**{**fields, **kwargs})


def _authors(filename: str, **kwargs: Any) -> ModelCfg:
    """Return the cfg of one of the authors' published files."""
    return _cfg(hf_hub_id="jameslahm/lsnet", hf_hub_filename=filename, **kwargs)


_WITH_TEACHER: dict[str, Any] = dict(model_args=dict(distillation=True), classifier=("head.linear", "head_dist.linear"))
_NARROW = (32, 64, 112, 160)  # about half of LSNet-T's

default_cfgs = generate_default_cfgs(
    {
        "lsnet_t.cifar10": _cfg(
            **CIFAR10,
            file=shipped("lsnet_t.cifar10"),
            input_size=(3, 96, 96),
            pool_size=(2, 2),
            model_args=dict(dims=_NARROW, img_size=96),
            interpolation="bilinear",
        ),
        "lsnet_t.imagenette": _cfg(
            **IMAGENETTE,
            file=shipped("lsnet_t.imagenette"),
            input_size=(3, 192, 192),
            pool_size=(3, 3),
            model_args=dict(dims=_NARROW, img_size=192),
            interpolation="bilinear",
            temperature=0.71,
            threshold=0.972,
        ),
        # a star makes a tag the default; it must come after a tag that has weights, or timm moves that one to the front
        "lsnet_t.in1k*": _authors("lsnet_t.pth", top1=74.9),
        "lsnet_t.dist_in1k": _authors("lsnet_t_distill.pth", top1=76.1, **_WITH_TEACHER),
        "lsnet_s.in1k": _authors("lsnet_s.pth", top1=77.8),
        "lsnet_s.dist_in1k": _authors("lsnet_s_distill.pth", top1=79.0, **_WITH_TEACHER),
        "lsnet_b.in1k": _authors("lsnet_b.pth", top1=80.3),
        "lsnet_b.dist_in1k": _authors("lsnet_b_distill.pth", top1=81.6, **_WITH_TEACHER),
    }
)


def _create_lsnet(variant: str, pretrained: bool = False, **kwargs: Any) -> LSNet:
    return build_model(
        LSNet,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=_VARIANTS[variant],
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def lsnet_t(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-T: 11.41 M parameters, 11.37 M merged; 0.32 GMACs at 224 without the aggregation."""
    return _create_lsnet("lsnet_t", pretrained, **kwargs)


@register_model
def lsnet_s(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-S: 16.15 M parameters, 16.10 M merged; 0.54 GMACs at 224 without the aggregation."""
    return _create_lsnet("lsnet_s", pretrained, **kwargs)


@register_model
def lsnet_b(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-B: 23.31 M parameters, 23.25 M merged; 1.24 GMACs at 224 without the aggregation."""
    return _create_lsnet("lsnet_b", pretrained, **kwargs)
