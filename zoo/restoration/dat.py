"""DAT: Dual Aggregation Transformer for Image Super-Resolution (Chen et al., ICCV 2023),
https://arxiv.org/abs/2308.03364. Authors' code: https://github.com/zhengchen1999/DAT (Apache 2.0)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.fx import Proxy

from zoo.cfg import RestorationCfg
from zoo.layers.derived import derive_after_loading
from zoo.layers.dual_aggregation import (
    ChannelAttention,
    DualAggregationBlock,
    GatedFFN,
    SpatialAttention,
    SpatialGate,
)
from zoo.layers.own import first_foreign
from zoo.layers.rectangular_window import DynamicPositionBias, WindowAttention
from zoo.streaming.dat import FEWEST_PIXELS, TILE_PIXELS, StripRun, Strips
from zoo.streaming.maps import Workspace
from zoo.weights import build_model, shipped

__all__ = ["DAT", "ResidualGroup", "checkpoint_filter_fn", "detect", "untold"]

_SCALES = (1, 2, 3, 4, 8)
_RGB_MEAN = (0.4488, 0.4371, 0.4040)
_FEATURES = 64  # channels of the larger upsampler
_STRIP = 3 * 2**17  # numbers in a map of the body's channels that is computed at a time on a CPU: 1.5 MB in float32
_STRIP_CUDA = 2**24


def _residual_conv(
    dim: int, kind: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """One 3x3 convolution, or three that are narrow in between."""
    dd: dict[str, Any] = dict(device=device, dtype=dtype)
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1, **dd)
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, padding=1, **dd),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim // 4, 1, **dd),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim, 3, padding=1, **dd),
    )


class ResidualGroup(nn.Module):
    """Blocks with spatial and with channel attention in turn, a convolution, and a residual connection around them.

    Args:
        dim: Channels C.
        depth: Blocks.
        kind: Of the convolution, "1conv" or "3conv".
        shifted: Remainder by 4 of the numbers of the blocks with shifted windows.
        drop_path: Rates of the blocks.
        split_size: Of the windows, pixels.
        block_args: Further arguments of `DualAggregationBlock`.

    Shape:
        (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kind: str,
        shifted: int,
        drop_path: list[float],
        split_size: tuple[int, int],
        block_args: dict[str, Any],
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(
            *(
                DualAggregationBlock(
                    dim,
                    split_size=split_size if index % 2 == 0 else None,
                    shift=index % 4 == shifted,
                    drop_path=drop_path[index],
                    **block_args,
                )
                for index in range(depth)
            )
        )
        self.conv = _residual_conv(dim, kind, device=block_args["device"], dtype=block_args["dtype"])

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            features = checkpoint_seq(self.blocks, x)
        else:
            features = self.blocks(x)
        return x + self.conv(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DAT(nn.Module):
    """Upscale an image with attention over space and over channels in turn (Chen et al., ICCV 2023, arXiv 2308.03364).

    Maps are channels-last inside; the result is the authors' up to rounding. Merged, in inference on a CPU, the network
    runs by strips (`stream`); everything else, or with parts that were replaced, on whole maps.
    `reparameterize()` makes the form for inference.

    Args:
        scale: Integer factor, 1, 2, 3, 4 or 8.
        in_chans: Channels of input and output.
        embed_dim: Channels of the body.
        depths: Blocks of each residual group.
        num_heads: Heads of each attention, even.
        split_size: Height and width of the windows of one half of the channels (turned for the other half), pixels.
        expansion: Hidden channels of the feed-forward networks over `embed_dim`.
        resi_connection: Convolution at the end of a group, "1conv" or the smaller "3conv".
        upsampler: "pixelshuffle" or the smaller "pixelshuffledirect".
        drop_path_rate: Stochastic depth of the last block; the paper trains with 0.1.
        merged: Build the form that `reparameterize()` leaves, to load weights saved after it.
        num_classes: Accepted because timm passes it; must be 0.

    Shape:
        (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale * H, scale * W), not clamped; any H and W.

    Raises:
        ValueError: An argument is none of the allowed ones, or `num_classes` is not 0.
    """

    multiple_of = 1
    graph_depends_on_size = True  # how windows are cut and masked: an exported graph holds for one size
    mean: Tensor

    def __init__(
        self,
        scale: int = 2,
        in_chans: int = 3,
        embed_dim: int = 180,
        depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6),
        num_heads: int = 6,
        split_size: tuple[int, int] = (8, 32),
        expansion: float = 4.0,
        resi_connection: str = "1conv",
        *,
        upsampler: str = "pixelshuffle",
        drop_path_rate: float = 0.0,
        merged: bool = False,
        num_classes: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale not in _SCALES:
            raise ValueError(f"scale must be 1, 2, 3, 4 or 8, got {scale}.")
        if num_heads % 2 or embed_dim % num_heads:
            raise ValueError(f"num_heads must be even and divide embed_dim, got {num_heads} for {embed_dim} channels.")
        if max(split_size) % min(split_size) or any(side % 2 for side in split_size):
            raise ValueError(f"split_size must be two even sides, one a multiple of the other, got {split_size}.")
        if resi_connection not in ("1conv", "3conv"):
            raise ValueError(f"resi_connection must be '1conv' or '3conv', got {resi_connection!r}.")
        if upsampler not in ("pixelshuffle", "pixelshuffledirect"):
            raise ValueError(f"upsampler must be 'pixelshuffle' or 'pixelshuffledirect', got {upsampler!r}.")
        if int(embed_dim * expansion) % 2:
            raise ValueError(f"expansion must give an even number of channels, got {embed_dim} * {expansion}.")
        if num_classes:
            raise ValueError(f"DAT restores images and has no classes: num_classes must be 0, got {num_classes}.")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.scale, self.in_chans, self.num_classes, self.embed_dim = scale, in_chans, num_classes, embed_dim
        self.expansion, self.merged = expansion, False
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1, **dd)
        self.before_RG = nn.Sequential(nn.Identity(), nn.LayerNorm(embed_dim, **dd))
        rates = [drop_path_rate * index / max(1, sum(depths) - 1) for index in range(sum(depths))]
        block_args = dict(num_heads=num_heads, expansion=expansion, **dd)
        self.layers = nn.Sequential(
            *(
                ResidualGroup(
                    embed_dim,
                    depth,
                    resi_connection,
                    2 if index % 2 == 0 else 0,
                    rates[sum(depths[:index]) :],
                    tuple(split_size),  # type: ignore[arg-type]  # a list in configs
                    block_args,
                )
                for index, depth in enumerate(depths)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.conv_after_body = _residual_conv(embed_dim, resi_connection, **dd)
        self.body_halo = 1 if resi_connection == "1conv" else 2
        if upsampler == "pixelshuffle":
            self.conv_before_upsample: nn.Module = nn.Sequential(
                nn.Conv2d(embed_dim, _FEATURES, 3, padding=1, **dd), nn.LeakyReLU()
            )
            steps = [3] if scale == 3 else [2] * int(math.log2(scale))
            parts = (
                part
                for step in steps
                for part in (nn.Conv2d(_FEATURES, step**2 * _FEATURES, 3, padding=1, **dd), nn.PixelShuffle(step))
            )
            self.upsample = nn.Sequential(*parts)
            self.conv_last: nn.Module = nn.Conv2d(_FEATURES, in_chans, 3, padding=1, **dd)
            self.tail_halo, self._tail_width = self.body_halo + 3, 2 * _FEATURES * scale**2
        else:
            self.conv_before_upsample = nn.Identity()
            self.upsample = nn.Sequential(
                nn.Conv2d(embed_dim, in_chans * scale**2, 3, padding=1, **dd), nn.PixelShuffle(scale)
            )
            self.conv_last = nn.Identity()
            self.tail_halo, self._tail_width = self.body_halo + 1, 2 * in_chans * scale**2
        self.derive_buffers()
        derive_after_loading(self)
        if merged:
            self.eval().reparameterize()

    def derive_buffers(self) -> None:
        """Make the mean of the authors' training pictures, on the device of the weights."""
        weight = self.conv_first.weight
        mean = torch.tensor(_RGB_MEAN) if self.in_chans == 3 else torch.zeros(self.in_chans)
        self.register_buffer("mean", mean.view(1, -1, 1, 1).to(weight), persistent=False)

    @property
    def bytes_per_pixel(self) -> int:
        """Working memory of the forward pass on a CPU, in bytes per input pixel in float32."""
        if self.merged:
            return 4 * (5 * self.embed_dim + 2 * self.in_chans * self.scale**2)
        widest = max(13, 2 + 3 * self.expansion)  # in the attention, in the feed-forward network
        return int(4 * ((3 + widest) * self.embed_dim + self._tail_width))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what they computed."""
        for group in cast(list[ResidualGroup], list(self.layers)):
            group.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before upsampling: (B, in_chans, H, W) -> (B, embed_dim, H, W)."""
        shallow = self.conv_first((x - self.mean).contiguous(memory_format=torch.channels_last))
        deep = self.layers(self.before_RG(shallow.permute(0, 2, 3, 1)))
        return self.conv_after_body(self.norm(deep).permute(0, 3, 1, 2)) + shallow

    def forward(self, x: Tensor) -> Tensor:
        if self._runs_by_strips(x):
            return self._stream(x, None, None)
        return self.upscale(self.forward_features(x))

    def upscale(self, features: Tensor) -> Tensor:
        """Return the image of features: (B, embed_dim, H, W) -> (B, in_chans, scale * H, scale * W)."""
        return self.conv_last(self.upsample(self.conv_before_upsample(features))) + self.mean

    def _runs_by_strips(self, x: Tensor) -> bool:
        """Whether to compute piece by piece: merged, in CPU inference, where the pieces stay in the cache."""
        if isinstance(x, Proxy):
            raise TypeError("torch.fx cannot trace DAT, whose windows depend on the size: use torch.export.")
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not self.merged or traced or self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        return x.device.type == "cpu" and self.foreign_part() is None

    def foreign_part(self) -> str | None:
        """Return name and class of the first part whose weights are not all that it computes with, or None.

        With such a part, an adapter for instance, the network runs on whole maps only.
        """
        return first_foreign(self, _OWN)

    @torch.no_grad()
    def stream(
        self, x: Tensor, *, memory: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Return what `forward` returns in evaluation mode, up to rounding, within a bound of memory.

        Windows are computed a few at a time, and attention between channels sums its products strip by strip; features
        that do not fit in `memory` lie in temporary files.

        Args:
            x: (B, in_chans, H, W) in [0, 1].
            memory: Bytes to hold beside `x` and the result; None is no limit.
            progress: Called with (blocks done, blocks in all).

        Returns:
            (B, in_chans, scale * H, scale * W) on the device of `x`.

        Raises:
            RuntimeError: The model is in training mode, or a part is an adapter, quantised, or has hooks.
            ValueError: `memory` is less than `stream_bytes`.
        """
        if self.training:
            raise RuntimeError("DAT cannot be streamed in training mode: call model.eval() first.")
        foreign = self.foreign_part()
        if foreign is not None:
            raise RuntimeError(f"DAT streams with the weights of its own layers, not with {foreign}: call it.")
        return self._stream(x, memory, progress)

    def stream_bytes(self, height: int, width: int) -> int:
        """Return the least `memory` with which `stream` restores an image of this size."""
        return self._strip_bytes(height, width, FEWEST_PIXELS)

    def _strip_bytes(self, height: int, width: int, pixels: int) -> int:
        """Return the memory of the widest step that computes about `pixels` at a time."""
        group = cast(ResidualGroup, self.layers[0])
        attention = cast(SpatialAttention, group.blocks[0].attn)
        tall, dim = attention.multiple_of, self.embed_dim
        wide = width + -width % tall
        area = min(max(pixels, 2 * width), height * width)
        mixing = (area + 2 * width) * dim * (10 + 4 * self.expansion)
        rows = min(max(pixels, tall * wide), (height + -height % tall) * wide)  # of windows
        windows = rows * 4 * dim + max(pixels, tall * tall) * 12 * dim
        halo, tile = self.tail_halo, max(pixels, TILE_PIXELS)
        convolution = 3 * dim * (tile + 8 * width)
        rows = max(tile // width, 4 * halo)
        columns = min(max(tile // rows, 4 * halo), width)
        tail = rows + 2 * halo
        tail = tail * width * dim + tail * (columns + 2 * halo) * (3 * dim + 2 * self._tail_width)
        size = self.norm.weight.element_size()
        return int(size * max(mixing, windows, convolution, tail)) + 2**20

    def _stream(self, x: Tensor, memory: int | None, progress: Callable[[int, int], None] | None) -> Tensor:
        batch, _, height, width = x.shape
        weight = self.norm.weight
        pixels = max(FEWEST_PIXELS, (_STRIP if weight.device.type == "cpu" else _STRIP_CUDA) // self.embed_dim)
        room: int | None = None
        if memory is not None:
            while pixels > FEWEST_PIXELS and 2 * self._strip_bytes(height, width, pixels) > memory:
                pixels //= 2
            room = memory - self._strip_bytes(height, width, pixels)
            if room < 0:
                raise ValueError(
                    f"memory must be at least {self.stream_bytes(height, width)} bytes for {width}x{height} pixels, "
                    f"got {memory}."
                )
        out = x.new_empty(batch, self.in_chans, self.scale * height, self.scale * width)
        steps = batch * (sum(len(cast(ResidualGroup, group).blocks) for group in self.layers) + 1)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, steps)

        for image, result in zip(x, out, strict=True):
            with Workspace(room, weight.device, weight.dtype) as space:
                strips = Strips(height, width, pixels, partial(space.new, height, width))
                StripRun(self, image, result, space, strips, step).run()
        return out

    def reparameterize(self) -> tuple[str, ...]:
        """Fold norms and position biases of every block; exact, in place, idempotent.

        Raises:
            RuntimeError: The model is in training mode.
        """
        folded: set[str] = set()
        for module in list(self.modules()):
            fold = getattr(module, "reparameterize", None)
            if module is not self and fold is not None:
                folded |= set(fold())
        self.merged = True
        return tuple(sorted(folded))


_OWN = (
    *(nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.Identity, nn.GELU, nn.ReLU, nn.LeakyReLU),
    *(nn.AdaptiveAvgPool2d, nn.PixelShuffle, nn.Sequential, nn.ModuleList, DropPath),
    *(ResidualGroup, DualAggregationBlock, SpatialAttention, ChannelAttention, GatedFFN, SpatialGate),
    *(WindowAttention, DynamicPositionBias),
)


_DERIVED = re.compile(r"\.(relative_position_index|attn_mask_[01])$")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Drop the authors' tables and masks, which are derived, and keep the shape of the windows that they tell.

    Files without these tables, as some trainers write them, are taken to have the model's windows. Projections without
    bias get one of zeros.

    Raises:
        ValueError: The weights are for windows of another shape, which no other tensor would show.
    """
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key.endswith(".rpe_biases"):
            out[key.removesuffix("rpe_biases") + "window"] = value[-1].round().to(torch.int64) + 1
        elif not _DERIVED.search(key):
            out[key] = value
    own = {key: value for key, value in model.state_dict().items() if key.endswith(".window")}
    if not any(key.endswith(".window") for key in out) and "before_RG.1.weight" in out:
        out |= own
    if not any(key.endswith(".attn.qkv.bias") for key in out) and "layers.0.blocks.0.attn.qkv.weight" in out:
        weights = {key: value for key, value in out.items() if key.endswith(".attn.qkv.weight")}
        out |= {key.removesuffix("weight") + "bias": value.new_zeros(len(value)) for key, value in weights.items()}
    for key, value in own.items():
        found = out.get(key, value)
        if found.shape == value.shape and not (value.is_meta or torch.equal(found.cpu(), value.cpu())):
            raise ValueError(
                f"The weights are for windows of {_sides(found)} ({key}), the model has {_sides(value)}: "
                "build it with that split_size."
            )
    return out


def _sides(window: Tensor) -> str:
    return "x".join(str(side) for side in window.tolist())


_SIZES: dict[str, dict[str, Any]] = {  # as in the paper's table of variants; the first that fits a file is taken
    "light": dict(
        embed_dim=60,
        depths=(18,),
        split_size=(8, 32),
        expansion=2.0,
        resi_connection="3conv",
        upsampler="pixelshuffledirect",
    ),
    "2": dict(embed_dim=180, depths=(6,) * 6, split_size=(8, 32), expansion=2.0),
    "s": dict(embed_dim=180, depths=(6,) * 6, split_size=(8, 16), expansion=2.0),
    "": dict(embed_dim=180, depths=(6,) * 6, split_size=(8, 32), expansion=4.0),
}
_COMMON: dict[str, Any] = dict(num_heads=6, resi_connection="1conv", upsampler="pixelshuffle", in_chans=3)


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise a DAT state dict, the authors' or ours: (registered name, constructor arguments), or None.

    The shape of the windows is in the authors' offset tables; files without them are taken for 8x32 (DAT-2, not DAT-S).
    """
    first = state_dict.get("conv_first.weight")
    temperature = state_dict.get("layers.0.blocks.1.attn.temperature")
    positions = state_dict.get("layers.0.blocks.0.attn.attns.0.pos.pos3.2.bias")  # one number for each two heads
    hidden = state_dict.get("layers.0.blocks.0.ffn.fc1.weight")
    last = state_dict.get("upsample.0.weight")
    if first is None or hidden is None or "before_RG.1.weight" not in state_dict:
        return None
    if temperature is None and positions is None:
        return None
    blocks = {match[0] for key in state_dict if (match := re.match(r"layers\.\d+\.blocks\.\d+\.", key))}
    groups = [int(block.split(".")[1]) for block in blocks]
    dim, in_chans = first.shape[:2]
    found: dict[str, Any] = dict(
        embed_dim=dim,
        depths=tuple(groups.count(group) for group in range(max(groups) + 1)),
        num_heads=2 * len(cast(Tensor, positions)) if temperature is None else len(temperature),
        split_size=_split_size(state_dict),
        expansion=hidden.shape[0] / dim,
        resi_connection="1conv" if "layers.0.conv.weight" in state_dict else "3conv",
        upsampler="pixelshuffle" if "conv_last.weight" in state_dict else "pixelshuffledirect",
        in_chans=in_chans,
    )
    if found["upsampler"] == "pixelshuffledirect":
        scale = 0 if last is None else math.isqrt(last.shape[0] // in_chans)
    elif last is not None and last.shape[0] == 9 * last.shape[1]:
        scale = 3
    else:
        scale = 2 ** sum(f"upsample.{index}.weight" in state_dict for index in range(0, 8, 2))
    if scale not in _SCALES:
        return None
    fits = [
        size for size, fixed in _SIZES.items() if all(found[key] == fixed[key] for key in ("embed_dim", "expansion"))
    ]
    exact = [size for size in fits if _SIZES[size]["split_size"] == found["split_size"]]
    size = (exact or fits or [""])[0]
    known = {**_COMMON, **_SIZES[size]}
    kwargs = {key: value for key, value in found.items() if known[key] != value}
    if scale not in (2, 3, 4):
        kwargs["scale"] = scale
    if "layers.0.blocks.0.norm1.weight" not in state_dict:
        kwargs["merged"] = True
    return "_".join(part for part in ("dat", size, f"x{scale if scale in (2, 3, 4) else 2}") if part), kwargs


def untold(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Return the arguments that change the outputs and that no tensor tells, with what they may be.

    Only files without the authors' offset tables, and of the sizes that differ in their windows alone.
    """
    prefix = "layers.0.blocks.0.attn.attns.0."
    if prefix + "window" in state_dict or prefix + "rpe_biases" in state_dict:
        return {}
    first, hidden = state_dict["conv_first.weight"], state_dict["layers.0.blocks.0.ffn.fc1.weight"]
    size = dict(embed_dim=first.shape[0], expansion=hidden.shape[0] / first.shape[0])
    windows = {fixed["split_size"] for fixed in _SIZES.values() if size.items() <= fixed.items()}
    return {} if len(windows) == 1 else dict(split_size="(8, 32) for DAT-2, (8, 16) for DAT-S")


def _split_size(state_dict: dict[str, Tensor]) -> tuple[int, int]:
    prefix = "layers.0.blocks.0.attn.attns.0."
    window = state_dict.get(prefix + "window")
    offsets = state_dict.get(prefix + "rpe_biases")
    if window is None and offsets is not None:
        window = offsets[-1].round() + 1
    return (8, 32) if window is None else (int(window[0]), int(window[1]))


_MIRROR = "https://github.com/OpenModelDB/model-hub/releases/download/dat/"
_FOLDERS = {  # of the authors, on Google Drive
    "light": "105JRMN5VJbJ7EMQJdqmhDVMAFCaKYDl8",
    "s": "1hM0v3fUg5u6GjkI7dduxShyGgGfEwQXO",
    "2": "1yV9LMhr2tYM_eHEIVY4Jw9X3bWGgorbD",
    "": "14VG5mw5ie8RrR4jjypeHynXDZYWL8w-r",
}
_MIRRORED = {("s", 4): "4x-DAT_S.pth", ("s", 3): "3x-DAT_S.pth", ("", 4): "4x-DAT.pth", ("2", 4): "4x-DAT_2.pth"}


def _cfg(scale: int, **kwargs: Any) -> RestorationCfg:
    return RestorationCfg(
        task="sr",
        scale=scale,
        input_size=(3, 64, 64),
        min_input_size=(3, 1, 1),
        interpolation="bicubic",
        paper_ids="arXiv:2308.03364",
        paper_name="Dual Aggregation Transformer for Image Super-Resolution",
        origin_url="https://github.com/zhengchen1999/DAT",
        parity="Meets the authors' outputs to 4.1e-15 (relative, float64): whole maps, strips and the merged form.",
        license="apache-2.0",
        **kwargs,
    )


def _authors(size: str, scale: int) -> RestorationCfg:
    mirrored = _MIRRORED.get((size, scale))
    file = "_".join(part for part in ("DAT", size if size == "light" else size.upper(), f"x{scale}.pth") if part)
    return _cfg(
        scale,
        url=None if mirrored is None else _MIRROR + mirrored,
        notes=(f"The authors publish {file} at https://drive.google.com/drive/folders/{_FOLDERS[size]}.",),
    )


default_cfgs = generate_default_cfgs(
    {
        **{
            f"{'_'.join(part for part in ('dat', size) if part)}_x{scale}.df2k": _authors(size, scale)
            for size in _FOLDERS
            for scale in (2, 3, 4)
        },
        "dat_light_x2.bsds": _cfg(2, file=shipped("dat_light_x2.bsds")),  # the default, since it has a file
    }
)


def _create_dat(variant: str, size: str, scale: int, pretrained: bool, /, **kwargs: Any) -> DAT:
    defaults = {**_SIZES[size], "scale": scale}
    return build_model(DAT, variant, pretrained, filter_fn=checkpoint_filter_fn, defaults=defaults, **kwargs)


@register_model
def dat_light_x2(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-light x2: 553 290 parameters."""
    return _create_dat("dat_light_x2", "light", 2, pretrained, **kwargs)


@register_model
def dat_light_x3(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-light x3: 561 405 parameters."""
    return _create_dat("dat_light_x3", "light", 3, pretrained, **kwargs)


@register_model
def dat_light_x4(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-light x4: 572 766 parameters."""
    return _create_dat("dat_light_x4", "light", 4, pretrained, **kwargs)


@register_model
def dat_s_x2(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-S x2: 11 064 419 parameters."""
    return _create_dat("dat_s_x2", "s", 2, pretrained, **kwargs)


@register_model
def dat_s_x3(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-S x3: 11 249 059 parameters."""
    return _create_dat("dat_s_x3", "s", 3, pretrained, **kwargs)


@register_model
def dat_s_x4(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-S x4: 11 212 131 parameters."""
    return _create_dat("dat_s_x4", "s", 4, pretrained, **kwargs)


@register_model
def dat_2_x2(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-2 x2: 11 064 419 parameters."""
    return _create_dat("dat_2_x2", "2", 2, pretrained, **kwargs)


@register_model
def dat_2_x3(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-2 x3: 11 249 059 parameters."""
    return _create_dat("dat_2_x3", "2", 3, pretrained, **kwargs)


@register_model
def dat_2_x4(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-2 x4: 11 212 131 parameters."""
    return _create_dat("dat_2_x4", "2", 4, pretrained, **kwargs)


@register_model
def dat_x2(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT x2: 14 654 339 parameters."""
    return _create_dat("dat_x2", "", 2, pretrained, **kwargs)


@register_model
def dat_x3(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT x3: 14 838 979 parameters."""
    return _create_dat("dat_x3", "", 3, pretrained, **kwargs)


@register_model
def dat_x4(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT x4: 14 802 051 parameters."""
    return _create_dat("dat_x4", "", 4, pretrained, **kwargs)
