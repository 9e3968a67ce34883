"""Restormer: Efficient Transformer for High-Resolution Image Restoration (Zamir et al., CVPR 2022),
https://arxiv.org/abs/2111.09881. Authors' code: https://github.com/swz30/Restormer (academic public licence)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.fx import Proxy

from zoo.cfg import RestorationCfg
from zoo.kernels.dispatch import no_autocast
from zoo.layers.gated_ffn import GatedFFN, aligned_hidden
from zoo.layers.own import first_foreign, require_mergeable
from zoo.layers.pixel_norm import PixelNorm
from zoo.layers.transposed_attention import TransposedAttention
from zoo.streaming.maps import Workspace
from zoo.streaming.restormer import MULTIPLE, MapSizes, StripRun, aligned, padding_mode
from zoo.weights import build_model, shipped

__all__ = ["Restormer", "RestormerBlock", "Route", "WholeMaps", "checkpoint_filter_fn", "detect", "pad"]

_LIBRARY_BYTES = 8 * 2**20  # of convolutions and matrix products, beside two copies of the largest kernel
_STRIP_BYTES = 8 * 2**20  # of the widest map of a strip
_FEWEST_ROWS = 4  # of a strip: at 6000 pixels a row, one row takes 1.2 times as long


class RestormerBlock(nn.Module):
    """One Transformer block: transposed attention, then the gated feed-forward network, both with residuals.

    Args:
        dim: Channels C.
        num_heads: Of the attention.
        hidden_dim: Channels of each half of the feed-forward network.
        bias_free: Kind of the norms, see `PixelNorm`.

    Shape:
        (B, H, W, C) -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        bias_free: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.norm1 = PixelNorm(dim, bias_free, **dd)
        self.attn = TransposedAttention(dim, num_heads, **dd)
        self.norm2 = PixelNorm(dim, bias_free, **dd)
        self.ffn = GatedFFN(dim, hidden_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))

    def example_input(self) -> Tensor:
        """Return a random map (1, 16, 16, C) on which the block can be compared before and after folding."""
        weight = self.attn.project_out.weight
        return torch.randn(1, 16, 16, weight.shape[0], device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the affine norms into the linear layers and align the hidden channels; exact, in place.

        Returns:
            What was done, in words; nothing the second time.

        Raises:
            RuntimeError: The block is in training mode.
        """
        if self.attn.merged:
            return ()
        require_mergeable(self)
        self.norm1.fold_into(self.attn.qkv)
        self.norm2.fold_into(self.ffn.project_in)
        self.attn.merged = self.ffn.merged = True
        return ("affine norms", *(("hidden channels aligned",) if self.ffn.pad_hidden() else ()))


Map = TypeVar("Map")


class Route(Protocol[Map]):
    """What is done with the maps on their way through the network; `StripRun`, `MapSizes` and others in bench."""

    def embed(self, conv: nn.Conv2d) -> Map: ...
    def level(self, blocks: nn.Sequential, x: Map) -> Map: ...
    def down(self, conv: nn.Conv2d, x: Map) -> Map: ...
    def up(self, conv: nn.Conv2d, x: Map, skip: Map, reduce: nn.Linear | None) -> Map: ...
    def finish(self, conv: nn.Conv2d, x: Map, skip: nn.Linear | None) -> Any: ...


class WholeMaps:
    """Steps on whole maps (B, H, W, C).

    Args:
        x: Images (B, in_chans, H, W).
        grad_checkpointing: Keep only the blocks' inputs for the backward pass.
    """

    def __init__(self, x: Tensor, grad_checkpointing: bool) -> None:
        self.x, self.grad_checkpointing = x, grad_checkpointing
        self.padded = pad(x).contiguous(memory_format=torch.channels_last)

    def embed(self, conv: nn.Conv2d) -> Tensor:
        self.embedded = conv(self.padded).permute(0, 2, 3, 1)
        return self.embedded

    def level(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_tracing():
            return checkpoint_seq(blocks, x)
        return blocks(x)

    def down(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Halve the sides and double the channels."""
        return F.pixel_unshuffle(conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)

    def up(self, conv: nn.Conv2d, x: Tensor, skip: Tensor, reduce: nn.Linear | None) -> Tensor:
        """Double the sides and halve the channels, append the encoder's map, and mix both."""
        joined = torch.cat([F.pixel_shuffle(conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1), skip], -1)
        return joined if reduce is None else reduce(joined)

    def finish(self, conv: nn.Conv2d, x: Tensor, skip: nn.Linear | None) -> Tensor:
        """Return the restored image: the last convolution plus the image, or after the projected first map."""
        if skip is None:
            restored = conv(x.permute(0, 3, 1, 2)) + self.padded
        else:
            restored = conv((x + skip(self.embedded)).permute(0, 3, 1, 2))
        return restored[..., : self.x.shape[2], : self.x.shape[3]]


class Restormer(nn.Module):
    """Restore an image with Restormer (Zamir et al., CVPR 2022, arXiv 2111.09881).

    Merged, inference on a CPU runs strip by strip on maps that are updated in place: the attention matrices are made of
    sums over all strips, so the result is that of the whole map up to rounding. `stream` does the same within a given
    memory, in both forms and on any device. Everything else (training form, compilers, exporters, other devices, parts
    that were replaced) sees whole maps and calls every module.

    Args:
        in_chans: Channels of the input.
        out_chans: Channels of the output.
        dim: Channels C of the first level; the others have 2, 4 and 8 C, the decoder's full size 2 C.
        num_blocks: Blocks of the three encoder levels, which the decoder levels repeat, and of the latent level.
        num_refinement_blocks: Blocks behind the decoder.
        num_heads: Heads of the four levels.
        mlp_ratio: Hidden channels of the feed-forward networks over their channels, rounded down.
        bias_free: Norms leave the mean in and have no bias (the denoisers).
        dual_pixel: The two views of a dual-pixel sensor in, one image out, no residual image.
        merged: Build the form that `reparameterize()` leaves, to load weights saved after it.
        num_classes: Accepted because timm passes it; must be 0.

    Shape:
        (B, in_chans, H, W) in [0, 1] -> (B, out_chans, H, W), not clamped; any H and W, mirrored inside to multiples
        of 8 as the authors do (sides that are too short for that repeat their last pixels).

    Raises:
        ValueError: An argument does not fit the others.
    """

    scale, multiple_of = 1, MULTIPLE

    def __init__(
        self,
        in_chans: int = 3,
        out_chans: int | None = None,
        dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        mlp_ratio: float = 2.66,
        bias_free: bool = False,
        *,
        dual_pixel: bool = False,
        merged: bool = False,
        num_classes: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_chans = (3 if dual_pixel else in_chans) if out_chans is None else out_chans
        if num_classes:
            raise ValueError(f"Restormer restores images and has no classes: num_classes must be 0, got {num_classes}.")
        if len(num_blocks) != 4 or len(num_heads) != 4:
            raise ValueError(f"num_blocks and num_heads must have four numbers, got {num_blocks} and {num_heads}.")
        if min(*num_blocks, num_refinement_blocks) < 1:
            raise ValueError(
                f"num_blocks and num_refinement_blocks must be at least 1, got {num_blocks}, {num_refinement_blocks}."
            )
        if dim % 2 or any(dim * 2**level % heads for level, heads in enumerate(num_heads)):
            raise ValueError(
                f"dim must be even and divisible by the heads {tuple(num_heads)} of its levels, got {dim}."
            )
        if not dual_pixel and in_chans != out_chans:
            raise ValueError(f"out_chans must be in_chans, which is added to it, got {out_chans} and {in_chans}.")
        if int(mlp_ratio * dim) < 1:
            raise ValueError(f"mlp_ratio must leave at least one hidden channel, got {mlp_ratio} for dim {dim}.")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.out_chans, self.num_classes = in_chans, out_chans, num_classes
        self.dim, self.grad_checkpointing, self.merged = dim, False, False
        wide1, wide2, wide3, wide4 = (dim * 2**level for level in range(4))
        heads1, heads2, heads3, heads4 = num_heads
        depth1, depth2, depth3, depth4 = num_blocks

        def level(dim: int, heads: int, depth: int) -> nn.Sequential:
            hidden = int(mlp_ratio * dim)
            return nn.Sequential(*(RestormerBlock(dim, heads, hidden, bias_free, **dd) for _ in range(depth)))

        def conv(before: int, after: int) -> nn.Conv2d:
            return nn.Conv2d(before, after, 3, padding=1, bias=False, **dd)

        self.patch_embed = conv(in_chans, dim)
        self.encoder_level1 = level(wide1, heads1, depth1)
        self.down1_2 = conv(wide1, wide1 // 2)
        self.encoder_level2 = level(wide2, heads2, depth2)
        self.down2_3 = conv(wide2, wide2 // 2)
        self.encoder_level3 = level(wide3, heads3, depth3)
        self.down3_4 = conv(wide3, wide3 // 2)
        self.latent = level(wide4, heads4, depth4)
        self.up4_3 = conv(wide4, 2 * wide4)
        self.reduce_chan_level3 = nn.Linear(wide4, wide3, bias=False, **dd)
        self.decoder_level3 = level(wide3, heads3, depth3)
        self.up3_2 = conv(wide3, 2 * wide3)
        self.reduce_chan_level2 = nn.Linear(wide3, wide2, bias=False, **dd)
        self.decoder_level2 = level(wide2, heads2, depth2)
        self.up2_1 = conv(wide2, 2 * wide2)
        self.decoder_level1 = level(wide2, heads1, depth1)
        self.refinement = level(wide2, heads1, num_refinement_blocks)
        self.skip_conv = nn.Linear(dim, wide2, bias=False, **dd) if dual_pixel else None
        self.output = conv(wide2, out_chans)
        if merged:
            self.eval().reparameterize()

    @property
    def bytes_per_pixel(self) -> int:
        """Working memory of the forward pass without gradients, in bytes per input pixel in float32."""
        if self.merged and self.patch_embed.weight.device.type == "cpu":
            return 4 * 7 * self.dim
        return 4 * 28 * self.dim

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def route(self, run: Route[Map]) -> Any:
        """Lead an image through the network.

        Args:
            run: Does the steps, on maps of its kind.

        Returns:
            What its last step returns.
        """
        skip1 = run.level(self.encoder_level1, run.embed(self.patch_embed))
        skip2 = run.level(self.encoder_level2, run.down(self.down1_2, skip1))
        skip3 = run.level(self.encoder_level3, run.down(self.down2_3, skip2))
        y = run.level(self.latent, run.down(self.down3_4, skip3))
        y = run.level(self.decoder_level3, run.up(self.up4_3, y, skip3, self.reduce_chan_level3))
        y = run.level(self.decoder_level2, run.up(self.up3_2, y, skip2, self.reduce_chan_level2))
        y = run.level(self.decoder_level1, run.up(self.up2_1, y, skip1, None))
        return run.finish(self.output, run.level(self.refinement, y), self.skip_conv)

    def forward(self, x: Tensor) -> Tensor:
        if not self._runs_by_strips(x):
            return self.route(WholeMaps(x, self.grad_checkpointing))
        out = x.new_empty(len(x), self.out_chans, *x.shape[2:])
        strip_bytes = self._strip_bytes(x.shape[3])
        for image, restored in zip(x, out, strict=True):
            with Workspace(None, x.device, x.dtype) as workspace:
                self.route(StripRun(image, restored, self.dim, workspace, strip_bytes, keep_values=True))
        return out

    def _runs_by_strips(self, x: Tensor) -> bool:
        """Whether strips pay: merged, on a CPU, no gradients; compilers and exporters get whole maps of any size."""
        if isinstance(x, Proxy):
            raise TypeError("torch.fx cannot trace Restormer, whose padding depends on the size: use torch.export.")
        if not self.merged or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return False
        return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and self.foreign_part() is None

    def foreign_part(self) -> str | None:
        """Return name and class of the first part whose weights are not all that it computes with, or None.

        With such a part, an adapter for instance, the network runs on whole maps only.
        """
        foreign = first_foreign(self, _OWN)
        if foreign is not None:
            return foreign
        biased = ("qkv", "project_in")  # of which merging gives a bias
        for name, part in self.named_modules():
            has_bias = isinstance(part, (nn.Linear, nn.Conv2d)) and part.bias is not None
            if has_bias and name.rpartition(".")[2] not in biased:
                return f"{name} ({type(part).__name__} with a bias)"
        return None

    def stream_bytes(self, height: int, width: int) -> int:
        """Return the least `memory` in which `stream` restores an image of this size, in bytes."""
        return self._strip_work(height, width, 0)

    @torch.no_grad()
    def stream(
        self, x: Tensor, *, memory: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Restore by strips of rows, within a given memory: without seams and up to rounding what `forward` returns.

        Each block reads its map twice, for the attention matrix and to update the map; values are computed twice.

        Args:
            x: (B, in_chans, H, W) in [0, 1], on any device; strips of it go to the network's device.
            memory: Most bytes to be held there beside `x` and the result: what does not fit lies in temporary files.
                None holds all maps in memory, at dim 48 about 700 bytes per pixel.
            progress: Called with (done, all), in units of equal work.

        Returns:
            (B, out_chans, H, W) on the device and in the type of `x`.

        Raises:
            ValueError: `memory` is less than `stream_bytes`, or `x` has another rank or other channels.
            RuntimeError: A part is an adapter, quantised, or has hooks.
            OSError: The temporary files do not fit the disk.
        """
        foreign = self.foreign_part()
        if foreign is not None:
            raise RuntimeError(f"Restormer streams with the weights of its own layers, not with {foreign}: call it.")
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.in_chans}, H, W) and not empty, got {tuple(x.shape)}.")
        batch, _, height, width = x.shape
        needed = self.stream_bytes(height, width)
        if memory is not None and memory < needed:
            raise ValueError(f"memory must be at least {needed} bytes for {width}x{height} pixels, got {memory}.")
        strip_bytes, maps = self._strip_bytes(width), None
        if memory is not None:
            while strip_bytes and self._strip_work(height, width, strip_bytes) > max(memory // 2, needed):
                strip_bytes //= 2
            maps = memory - self._strip_work(height, width, strip_bytes)
        weight = self.patch_embed.weight
        out = torch.empty(batch, self.out_chans, height, width, dtype=x.dtype, device=x.device)
        done, total = 0, batch * self._sizes(height, width).work

        def tell(units: int) -> None:
            nonlocal done
            done += units
            if progress is not None:
                progress(done, total)

        with no_autocast(weight):
            for image, restored in zip(x, out, strict=True):
                with Workspace(maps, weight.device, weight.dtype) as workspace:
                    self.route(StripRun(image, restored, self.dim, workspace, strip_bytes, tell=tell))
        return out

    def _sizes(self, height: int, width: int) -> MapSizes:
        sizes = MapSizes(height, width, self.dim)
        self.route(sizes)
        return sizes

    def _strip_bytes(self, width: int) -> int:
        """Return how large the widest map of a strip should be, where memory does not matter."""
        block = cast(RestormerBlock, self.refinement[0])
        return max(_STRIP_BYTES, _FEWEST_ROWS * aligned(width) * 2 * block.ffn.hidden_dim * self._itemsize)

    @property
    def _itemsize(self) -> int:
        return self.patch_embed.weight.element_size()

    def _strip_work(self, height: int, width: int, strip_bytes: int) -> int:
        """Return the memory of the work on one strip, at the level that takes most, in bytes."""
        numbers = self._sizes(height, width).strip_numbers(self._itemsize, strip_bytes)
        return self._itemsize * (numbers + 2 * self.up4_3.weight.numel()) + _LIBRARY_BYTES

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold every block, see `RestormerBlock.reparameterize`; exact, in place, idempotent.

        Raises:
            RuntimeError: The model is in training mode.
        """
        blocks = [module for module in self.modules() if isinstance(module, RestormerBlock)]
        folded = tuple(sorted({folded for block in blocks for folded in block.reparameterize()}))
        self.merged = True
        return folded


_OWN = (nn.Linear, nn.Conv2d, nn.Sequential, PixelNorm, TransposedAttention, GatedFFN, RestormerBlock)


def pad(x: Tensor) -> Tensor:
    """Continue (B, C, H, W) to the right and below up to multiples of 8."""
    below, right = (aligned(side) - side for side in x.shape[2:])
    always = torch.compiler.is_compiling()  # one graph for all sizes, even where there is nothing to pad
    if always or below:
        x = F.pad(x, (0, 0, 0, below), padding_mode(x.shape[2], below))
    if always or right:
        x = F.pad(x, (0, right, 0, 0), padding_mode(x.shape[3], right))
    return x


_RENAMED = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed."),
    (re.compile(r"\.body\.0\.weight$"), ".weight"),
    (re.compile(r"\.(norm[12])\.body\."), r".\1."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the authors' wrapped modules, and make matrices of their 1x1 convolutions."""
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        for pattern, replacement in _RENAMED:
            key = pattern.sub(replacement, key)
        out[key] = value.flatten(1) if value.shape[2:] == (1, 1) else value
    return out


@cache
def _names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the network's parts, and of its levels among them, in order."""
    small = Restormer(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, dual_pixel=True, device="meta")
    parts = dict(small.named_children())
    return tuple(parts), tuple(name for name, part in parts.items() if isinstance(part, nn.Sequential))


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise a Restormer state dict, the authors' or ours: (registered name, constructor arguments), or None.

    Some tasks share one network, and the tensors do not tell which it is: a colour denoiser may be the one for real
    noise, and "restormer_deblur" may be deraining, motion or defocus deblurring. The result is the same.
    """
    sizes = {key: tuple(value.shape) for key, value in checkpoint_filter_fn(state_dict, nn.Module()).items()}
    embed, output = sizes.get("patch_embed.weight"), sizes.get("output.weight")
    parts, levels = _names()
    if embed is None or output is None or not {key.partition(".")[0] for key in sizes} <= set(parts):
        return None
    depths, heads = [], []
    for level in levels:
        depths.append(len({key.split(".")[1] for key in sizes if key.startswith(f"{level}.")}))
        heads.append(sizes.get(f"{level}.0.attn.temperature", (0,))[0])
    hidden = [sizes.get(f"{level}.0.ffn.project_in.weight", (0,))[0] // 2 for level in levels[:4]]
    repeated = (depths[:3], heads[:3]) == (depths[6:3:-1], heads[6:3:-1])
    if not all((*depths, *heads, *hidden)) or not repeated or len(embed) != 4:
        return None
    dim, merged = embed[0], "encoder_level1.0.norm1.weight" not in sizes
    ratio = _mlp_ratio(dim, hidden, merged)
    if ratio is None:
        return None
    found: dict[str, Any] = dict(
        in_chans=embed[1],
        dim=dim,
        num_blocks=tuple(depths[:4]),
        num_refinement_blocks=depths[7],
        num_heads=tuple(heads[:4]),
        mlp_ratio=ratio,
        bias_free=not ("encoder_level1.0.norm1.bias" in sizes or "encoder_level1.0.attn.qkv.bias" in sizes),
        dual_pixel="skip_conv.weight" in sizes,
    )
    if output[0] != (3 if found["dual_pixel"] else embed[1]):
        return None
    if found["dual_pixel"]:
        name = "restormer_defocus_dual"
    elif not found["bias_free"]:
        name = "restormer_deblur"
    elif embed[1] == 1:
        name = "restormer_denoise_gray"
    else:
        is_tiny = all(found[key] == value for key, value in _TINY.items())
        name = "restormer_tiny_denoise_color" if is_tiny else "restormer_denoise_color"
    usual = {**_USUAL, **_VARIANTS[name]}
    kwargs = {key: value for key, value in found.items() if value != usual[key]}
    return name, {**kwargs, **({"merged": True} if merged else {})}


def _mlp_ratio(dim: int, hidden: list[int], merged: bool) -> float | None:
    """Return a ratio that gives these hidden channels: a published one, or the plainest decimal number."""
    finest = hidden[3] / (8 * dim)
    for ratio in (2.66, *(round(finest, digits) for digits in range(1, 6)), (hidden[3] + 0.5) / (8 * dim)):
        made = [int(ratio * dim * 2**level) for level in range(4)]
        if hidden == ([aligned_hidden(number) for number in made] if merged else made):
            return ratio
    return None


_AUTHORS = "https://github.com/swz30/Restormer/releases/download/v1.0/"
_LICENSE = "The authors' repository had an academic, non-commercial licence at commit df766d5; see there for today's."


def _cfg(task: str, in_chans: int = 3, **kwargs: Any) -> RestorationCfg:
    return RestorationCfg(
        task=task,
        multiple_of=MULTIPLE,
        input_size=(in_chans, 64, 64),
        min_input_size=(in_chans, 1, 1),
        paper_ids="arXiv:2111.09881",
        paper_name="Restormer: Efficient Transformer for High-Resolution Image Restoration",
        origin_url="https://github.com/swz30/Restormer",
        parity="Meets the authors' outputs to 1.5e-14 (relative, float64): whole maps, strips and the merged form.",
        **kwargs,
    )


def _authors(
    task: str, file: str, in_chans: int = 3, sigma: float | tuple[float, float] | None = None
) -> RestorationCfg:
    """The authors' published weights."""
    return _cfg(task, in_chans, url=f"{_AUTHORS}{file}.pth", sigma=sigma, notes=(_LICENSE,))


def _gaussian(kind: str, in_chans: int) -> dict[str, RestorationCfg]:
    """The authors' weights for Gaussian noise: any, or of one standard deviation."""
    stem, name = f"gaussian_{kind}_denoising", f"restormer_denoise_{kind}"
    one = {f"{name}.sigma{s}": _authors("denoise", f"{stem}_sigma{s}", in_chans, float(s)) for s in (15, 25, 50)}
    return {f"{name}.blind": _authors("denoise", f"{stem}_blind", in_chans, (0.0, 50.0)), **one}


default_cfgs = generate_default_cfgs(
    {
        **_gaussian("color", 3),
        **_gaussian("gray", 1),
        "restormer_denoise_real.sidd": _authors("denoise", "real_denoising"),
        "restormer_derain.rain13k": _authors("derain", "deraining"),
        "restormer_deblur.gopro": _authors("deblur", "motion_deblurring"),
        "restormer_defocus.dpdd": _authors("defocus", "single_image_defocus_deblurring"),
        "restormer_defocus_dual.dpdd": _authors("defocus", "dual_pixel_defocus_deblurring", 6),
        "restormer_tiny_denoise_color.bsds": _cfg(
            "denoise", file=shipped("restormer_tiny_denoise_color.bsds"), sigma=(0.0, 50.0), license="apache-2.0"
        ),
        "restormer_tiny_restore_color.real": _cfg(
            "restore", file=shipped("restormer_tiny_restore_color.real"), license="apache-2.0"
        ),
    }
)

_USUAL: dict[str, Any] = dict(
    in_chans=3,
    dim=48,
    num_blocks=(4, 6, 6, 8),
    num_refinement_blocks=4,
    num_heads=(1, 2, 4, 8),
    mlp_ratio=2.66,
    bias_free=False,
    dual_pixel=False,
)
_TINY: dict[str, Any] = dict(
    dim=16, num_blocks=(2, 2, 2, 1), num_refinement_blocks=2, num_heads=(1, 2, 4, 8), mlp_ratio=2.5, bias_free=True
)
_VARIANTS: dict[str, dict[str, Any]] = {
    "restormer_denoise_color": dict(bias_free=True),
    "restormer_denoise_gray": dict(bias_free=True, in_chans=1),
    "restormer_denoise_real": dict(bias_free=True),
    "restormer_derain": {},
    "restormer_deblur": {},
    "restormer_defocus": {},
    "restormer_defocus_dual": dict(in_chans=6, dual_pixel=True),
    "restormer_tiny_denoise_color": _TINY,
    "restormer_tiny_restore_color": _TINY,
}


def _create_restormer(variant: str, pretrained: bool = False, **kwargs: Any) -> Restormer:
    defaults = _VARIANTS[variant]
    return build_model(Restormer, variant, pretrained, filter_fn=checkpoint_filter_fn, defaults=defaults, **kwargs)


@register_model
def restormer_denoise_color(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """Restormer for Gaussian noise in colour: 26 111 668 parameters, 154.9 GMACs at 256x256."""
    return _create_restormer("restormer_denoise_color", pretrained, **kwargs)


@register_model
def restormer_denoise_gray(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """Restormer for Gaussian noise in gray: 26 109 076 parameters, 154.7 GMACs at 256x256."""
    return _create_restormer("restormer_denoise_gray", pretrained, **kwargs)


@register_model
def restormer_denoise_real(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """Restormer for the noise of smartphone cameras (SIDD): 26 111 668 parameters, 154.9 GMACs at 256x256."""
    return _create_restormer("restormer_denoise_real", pretrained, **kwargs)


@register_model
def restormer_derain(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """Restormer for rain: 26 126 644 parameters, 154.9 GMACs at 256x256."""
    return _create_restormer("restormer_derain", pretrained, **kwargs)


@register_model
def restormer_deblur(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """Restormer for motion blur (GoPro): 26 126 644 parameters, 154.9 GMACs at 256x256."""
    return _create_restormer("restormer_deblur", pretrained, **kwargs)


@register_model
def restormer_defocus(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """Restormer for defocus blur in a single image (DPDD): 26 126 644 parameters, 154.9 GMACs at 256x256."""
    return _create_restormer("restormer_defocus", pretrained, **kwargs)


@register_model
def restormer_defocus_dual(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """Restormer for defocus blur in two dual-pixel views (6 channels in, 3 out): 26 132 548 parameters, 155.3 GMACs
    at 256x256."""
    return _create_restormer("restormer_defocus_dual", pretrained, **kwargs)


@register_model
def restormer_tiny_denoise_color(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """A small Restormer for Gaussian noise in colour, trained on a CPU."""
    return _create_restormer("restormer_tiny_denoise_color", pretrained, **kwargs)


@register_model
def restormer_tiny_restore_color(pretrained: bool = False, **kwargs: Any) -> Restormer:
    """The small Restormer for photos as they are: JPEG compression, camera noise, slight blur; trained on a CPU."""
    return _create_restormer("restormer_tiny_restore_color", pretrained, **kwargs)
