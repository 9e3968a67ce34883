"""FFNetSR, of FFNet: MetaMixer-based Efficient Convolutional Mixer Design (Yun et al., 2024; first called "MetaMixer Is
All You Need"), https://arxiv.org/abs/2406.02021. Authors' code: https://github.com/ysj9909/FFNet (Apache 2.0)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.cfg import RestorationCfg
from zoo.layers.conv_norm import merged_kernel
from zoo.layers.own import first_foreign, require_mergeable
from zoo.streaming.ffnetsr import stream
from zoo.weights import build_model, shipped

__all__ = ["FFNetSR", "MixerBlock", "checkpoint_filter_fn", "detect"]

_SCALES = (1, 2, 3, 4, 8)
_PIXELS = 4096  # of a strip on a CPU: 1.6 MB for a map of 96 channels in float32
_PIXELS_CUDA = 2**18


class MixerBlock(nn.Module):
    """Mix pixels by two depthwise 3x3 convolutions, then channels by an inverted bottleneck, each with a residual.

    Args:
        dim: Channels C.
        expansion_ratio: Hidden channels of the channel mixer, over C.
        norm: None; "LN", a LayerNorm before each mixer; or "BN", a BatchNorm after each mixer's first layer.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(
        self,
        dim: int,
        expansion_ratio: float,
        norm: str | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        hidden = int(dim * expansion_ratio)

        def before() -> list[nn.Module]:
            return [LayerNorm2d(dim, eps=1e-6, **dd)] if norm == "LN" else []

        def after() -> list[nn.Module]:
            return [nn.BatchNorm2d(dim, **dd)] if norm == "BN" else []

        def depthwise() -> nn.Module:
            return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

        self.norm = norm
        self.token_mixer = nn.Sequential(
            *before(), nn.Conv2d(dim, dim, 1, **dd), *after(), depthwise(), nn.GELU(), depthwise()
        )
        self.channel_mixer = nn.Sequential(
            *before(),
            depthwise(),
            *after(),
            nn.Conv2d(dim, hidden, 1, **dd),
            nn.GELU(),
            nn.Conv2d(hidden, dim, 1, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mixer(x)
        return x + self.channel_mixer(x)

    def example_input(self) -> Tensor:
        """Return a random map (1, C, 16, 16)."""
        weight = next(self.parameters())
        return torch.randn(1, cast(nn.Conv2d, self.token_mixer[-1]).out_channels, 16, 16).to(weight)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold BatchNorms into the convolutions before them, in place.

        Raises:
            RuntimeError: The block is in training mode.
        """
        if self.norm != "BN":
            return ()
        require_mergeable(self)
        for name in ("token_mixer", "channel_mixer"):
            layers = list(getattr(self, name))
            conv = cast(nn.Conv2d, layers[0])
            weight, bias = merged_kernel(conv, layers[1])
            conv.weight.copy_(weight)
            cast(Tensor, conv.bias).copy_(bias)
            setattr(self, name, nn.Sequential(conv, *layers[2:]))  # as if there never had been a norm
        self.norm = None
        return ("batch norms",)


class FFNetSR(nn.Module):
    """Upscale an image with a convolutional mixer (Yun et al., 2024, arXiv 2406.02021).

    A pixel depends on its surroundings only, so tiles that overlap by the receptive field are exact. `stream` needs no
    overlap: it passes the image through the network by strips of rows, in bounded memory.

    Args:
        scale: Integer factor, 1, 2, 3, 4 or 8; the authors publish 2.
        in_chans: Channels of input and output.
        dim: Channels of the body.
        depth: Blocks.
        expansion_ratio: Hidden channels of the channel mixers, over `dim`.
        norm: None, as published; "LN" or "BN", see `MixerBlock`.
        short_training_init: Start as identities (mixers end in zeros) on features so large that GELUs bend. The default
            start keeps the body nearly linear for thousands of steps, since there are no norms.
        num_classes: Accepted because timm passes it; must be 0.

    Shape:
        (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale * H, scale * W), not clamped; any H and W.

    Raises:
        ValueError: `scale` or `norm` is none of the allowed ones, or `num_classes` is not 0.
    """

    multiple_of = 1

    def __init__(
        self,
        scale: int = 2,
        in_chans: int = 3,
        dim: int = 96,
        depth: int = 48,
        expansion_ratio: float = 2.0,
        norm: str | None = None,
        short_training_init: bool = False,
        num_classes: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale not in _SCALES:
            raise ValueError(f"scale must be 1, 2, 3, 4 or 8, got {scale}.")
        if norm not in (None, "LN", "BN"):
            raise ValueError(f"norm must be None, 'LN' or 'BN', got {norm!r}.")
        if num_classes:
            raise ValueError(f"FFNetSR restores images and has no classes: num_classes must be 0, got {num_classes}.")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.scale, self.in_chans, self.num_classes, self.dim = scale, in_chans, num_classes, dim
        self.hidden_dim = int(dim * expansion_ratio)
        self.grad_checkpointing = False
        self.proj = nn.Conv2d(in_chans, dim, 3, padding=1, **dd)
        self.body = nn.Sequential(*(MixerBlock(dim, expansion_ratio, norm, **dd) for _ in range(depth)))
        self.conv_bef_up = nn.Conv2d(dim, in_chans * scale**2, 3, padding=1, **dd)
        self.shuffle = nn.PixelShuffle(scale)
        if short_training_init:
            self._init_for_short_training()

    @torch.no_grad()
    def _init_for_short_training(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(cast(Tensor, layer.bias))
                if layer is not self.conv_bef_up:
                    nn.init.kaiming_normal_(layer.weight)
        self.proj.weight.mul_(3)
        self.conv_bef_up.weight.mul_(0.1)
        for block in cast(list[MixerBlock], self.body):
            for mixer in (block.token_mixer, block.channel_mixer):
                nn.init.zeros_(cast(nn.Conv2d, mixer[-1]).weight)

    @property
    def receptive_field(self) -> int:
        """How far an output pixel looks, as a radius in input pixels."""
        return 3 * len(self.body) + 2

    @property
    def bytes_per_pixel(self) -> int:
        """Working memory of the forward pass, in bytes per input pixel in float32: most for small images."""
        return 4 * (2 * self.dim + 2 * self.hidden_dim + 2 * self.in_chans * self.scale**2)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what they computed."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before upsampling: (B, in_chans, H, W) -> (B, dim, H, W)."""
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return checkpoint_seq(self.body, x) if self.grad_checkpointing and self.training else self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        enlarged = x.repeat_interleave(self.scale**2, dim=1)
        return self.shuffle(self.conv_bef_up(self.forward_features(x)) + enlarged)

    @torch.no_grad()
    def stream(
        self, x: Tensor, *, memory: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Return what `forward` returns in evaluation mode, up to rounding, within a bound of memory.

        Strips of rows pass through all blocks one after the other; each convolution keeps the two rows that it needs
        again, so that memory depends on the width of the image and not on its height.

        Args:
            x: (B, in_chans, H, W) in [0, 1].
            memory: Bytes to hold beside `x` and the result; None is no limit.
            progress: Called with (strips done, strips in all).

        Returns:
            (B, in_chans, scale * H, scale * W) on the device of `x`.

        Raises:
            RuntimeError: The model is in training mode, or a part is an adapter, quantised, or has hooks.
            ValueError: `memory` is less than `stream_bytes`.
        """
        if self.training:
            raise RuntimeError("FFNetSR cannot be streamed in training mode: call model.eval() first.")
        foreign = self.foreign_part()
        if foreign is not None:
            raise RuntimeError(f"FFNetSR streams with the weights of its own layers, not with {foreign}: call it.")
        height, width = x.shape[2:]
        pixels = _PIXELS if self.proj.weight.device.type == "cpu" else _PIXELS_CUDA
        if memory is not None:
            while pixels > width and self._strip_bytes(width, pixels) > memory:
                pixels //= 2
            if self._strip_bytes(width, pixels) > memory:
                raise ValueError(
                    f"memory must be at least {self.stream_bytes(height, width)} bytes for {width}x{height} pixels, "
                    f"got {memory}."
                )
        return stream(self, x, pixels, progress)

    def foreign_part(self) -> str | None:
        """Return name and class of the first part whose weights are not all that it computes with, or None."""
        return first_foreign(self, _OWN)

    def stream_bytes(self, height: int, width: int) -> int:
        """Return the least `memory` with which `stream` restores an image of this size."""
        return self._strip_bytes(width, 1)

    def _strip_bytes(self, width: int, pixels: int) -> int:
        """Return the memory of strips of about `pixels`: what one block computes, and the rows that all blocks keep."""
        rows, size = max(1, pixels // width), self.proj.weight.element_size()
        kept = len(self.body) * (10 + 2 * min(rows, 3)) * self.dim
        computed = (rows + 4) * (4 * self.dim + 2 * self.hidden_dim + 3 * self.in_chans * self.scale**2)
        return size * width * (kept + computed) + 2**20


_OWN = (nn.Conv2d, nn.BatchNorm2d, LayerNorm2d, nn.GELU, nn.PixelShuffle, nn.Sequential, MixerBlock)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict: the authors' keys are ours."""
    return dict(state_dict)


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise an FFNetSR state dict, the authors' or ours: (registered name, constructor arguments), or None."""
    first, last = state_dict.get("proj.weight"), state_dict.get("conv_bef_up.weight")
    block = "body.0.channel_mixer."
    if first is None or last is None or block + "0.weight" not in state_dict:
        return None
    dim, in_chans = first.shape[:2]
    scale = math.isqrt(last.shape[0] // in_chans)
    if scale not in _SCALES or scale**2 * in_chans != last.shape[0]:
        return None
    norm = "BN" if block + "1.running_var" in state_dict else "LN" if state_dict[block + "0.weight"].ndim == 1 else None
    expand = state_dict.get(block + ("1.weight" if norm is None else "2.weight"))
    if expand is None:
        return None
    depth = len({key.split(".")[1] for key in state_dict if key.startswith("body.")})
    name = "ffnetsr_light" if depth == 36 else "ffnetsr"
    found: dict[str, Any] = dict(
        dim=dim, depth=depth, expansion_ratio=expand.shape[0] / dim, norm=norm, in_chans=in_chans
    )
    known = {**_SIZES[name], "in_chans": 3}
    kwargs = {key: value for key, value in found.items() if known[key] != value}
    registered = scale if (name, scale) in _REGISTERED else 2
    if scale != registered:
        kwargs["scale"] = scale
    return f"{name}_x{registered}", kwargs


_SIZES: dict[str, dict[str, Any]] = {
    "ffnetsr_light": dict(dim=96, depth=36, expansion_ratio=2.0, norm=None),
    "ffnetsr": dict(dim=96, depth=48, expansion_ratio=2.0, norm=None),
}
_REGISTERED = (("ffnetsr_light", 2), ("ffnetsr_light", 4), ("ffnetsr", 2))


def _cfg(scale: int, **kwargs: Any) -> RestorationCfg:
    return RestorationCfg(
        task="sr",
        scale=scale,
        input_size=(3, 64, 64),
        min_input_size=(3, 1, 1),
        interpolation="bicubic",
        paper_ids="arXiv:2406.02021",
        paper_name="FFNet: MetaMixer-based Efficient Convolutional Mixer Design",
        origin_url="https://github.com/ysj9909/FFNet",
        parity="Meets the authors' outputs to 4.7e-15 (relative, float64): whole maps, strips and the merged form.",
        license="apache-2.0",
        **kwargs,
    )


_RELEASE = "https://github.com/ysj9909/FFNet/releases/download/v1.0/"

_X2_ONLY = "The authors publish x2 only."

default_cfgs = generate_default_cfgs(
    {
        "ffnetsr_light_x2.div2k": _cfg(2, url=_RELEASE + "FFNetSR_light_DIV2K_2.pth"),
        "ffnetsr_light_x4.bsds": _cfg(4, file=shipped("ffnetsr_light_x4.bsds"), notes=(_X2_ONLY,)),
        "ffnetsr_x2.df2k": _cfg(2, url=_RELEASE + "FFNetSR_DF2K_2.pth"),
    }
)


def _create_ffnetsr(variant: str, pretrained: bool = False, **kwargs: Any) -> FFNetSR:
    name, _, scale = variant.rpartition("_x")
    defaults = {**_SIZES[name], "scale": int(scale)}
    return build_model(FFNetSR, variant, pretrained, filter_fn=checkpoint_filter_fn, defaults=defaults, **kwargs)


@register_model
def ffnetsr_light_x2(pretrained: bool = False, **kwargs: Any) -> FFNetSR:
    """FFNetSR-light x2: 1 789 452 parameters, 406.7 GMACs for 1280x720 output."""
    return _create_ffnetsr("ffnetsr_light_x2", pretrained, **kwargs)


@register_model
def ffnetsr_light_x4(pretrained: bool = False, **kwargs: Any) -> FFNetSR:
    """FFNetSR-light x4, which the authors do not publish: 1 820 592 parameters."""
    return _create_ffnetsr("ffnetsr_light_x4", pretrained, **kwargs)


@register_model
def ffnetsr_x2(pretrained: bool = False, **kwargs: Any) -> FFNetSR:
    """FFNetSR x2: 2 381 580 parameters, 541.3 GMACs for 1280x720 output."""
    return _create_ffnetsr("ffnetsr_x2", pretrained, **kwargs)
