"""Restormer: Efficient Transformer for High-Resolution Image Restoration (Zamir et al., CVPR 2022),
https://arxiv.org/abs/2111.09881. Authors' code: https://github.com/swz30/Restormer (academic public licence)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.cfg import RestorationCfg
from zoo.kernels.dispatch import no_autocast
from zoo.layers.conv_norm import require_eval
from zoo.layers.gated_ffn import GatedFFN, aligned_hidden
from zoo.layers.pixel_norm import PixelNorm
from zoo.layers.transposed_attention import TransposedAttention
from zoo.restoration.restormer_strips import MULTIPLE, StripRun, aligned, padding_mode, strip_rows
from zoo.restoration.streaming import FeatureMap, Workspace
from zoo.weights import build_model, shipped

__all__ = ["PLAIN", "Restormer", "RestormerBlock", "checkpoint_filter_fn", "detect", "plain_restormer_block"]

_LIBRARY_BYTES = 8 * 2**20  # of convolutions and matrix products, beside two copies of the largest kernel
_STRIP_BYTES = 8 * 2**20  # of the widest map of a strip
_FEWEST_ROWS = 4  # of a strip: at 6000 pixels a row, one row takes 1.2 times as long

Tell = Callable[[int], object]
"""Told how many rows of a map are done."""


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

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, bias_free: bool, **dd: Any) -> None:
        super().__init__()
        self.norm1 = PixelNorm(dim, bias_free, **dd)
        self.attn = TransposedAttention(dim, num_heads, **dd)
        self.norm2 = PixelNorm(dim, bias_free, **dd)
        self.ffn = GatedFFN(dim, hidden_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))

    def update(self, x: FeatureMap, values: FeatureMap | None, rows: int, tell: Tell) -> None:
        """Run on a channels-first map in place, strip by strip; with room for the values they are computed once."""
        height, width, _ = x.shape
        matrix = self.attn.matrix_of(self.norm1, x, values, rows, tell)
        mixed = self.attn.mixed_strips(self.norm1, x, values, matrix, rows)
        done = 0
        for strip in self.ffn.fed_strips(self.norm2, mixed, height, width, rows):
            x.write(done, strip)  # its rows have been read: strips come late
            done += strip.shape[1]
            tell(strip.shape[1])

    def strip_numbers(self, rows: int) -> int:
        """Return how many numbers `update` holds beside the map, for strips of so many rows of one pixel."""
        dim, hidden = self.attn.dim, self.ffn.hidden_dim
        return (rows + 2) * (2 * hidden + 5 * dim) + rows * (2 * hidden + 2 * dim)

    def example_input(self) -> Tensor:
        """Return a random map (1, 16, 16, C) on which the block can be compared before and after folding."""
        weight = self.attn.project_out.weight
        return torch.randn(1, 16, 16, weight.shape[0], device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> list[str]:
        """Fold the affine norms into the linear layers and align the hidden channels; exact, in place.

        Returns:
            What was done, in words; nothing the second time.

        Raises:
            RuntimeError: The block is in training mode.
        """
        require_eval(self)
        done = []
        if self.norm1.weight is not None:
            self.norm1.fold_into(self.attn.qkv)
            self.norm2.fold_into(self.ffn.project_in)
            done.append("affine norms")
        if self.ffn.pad_hidden():
            done.append("hidden channels aligned")
        return done


def plain_restormer_block(block: RestormerBlock, x: Tensor) -> Tensor:
    """Run a block as the authors write it: 1x1 convolutions, normalised queries and keys, norms on turned maps.

    Test oracle and benchmark rival of `RestormerBlock`, in both forms.

    Args:
        block: Its weights are used.
        x: (B, C, H, W).

    Returns:
        (B, C, H, W)
    """
    batch, dim, height, width = x.shape

    def norm(x: Tensor, layer: PixelNorm) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        deviation = torch.sqrt(y.var(-1, keepdim=True, correction=0) + layer.eps)
        y = y / deviation if layer.bias_free else (y - y.mean(-1, keepdim=True)) / deviation
        if layer.weight is not None:
            y = y * layer.weight
        if layer.bias is not None:
            y = y + layer.bias
        return y.transpose(1, 2).unflatten(2, (height, width))

    def pointwise(x: Tensor, linear: nn.Linear) -> Tensor:
        return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)

    attn, ffn = block.attn, block.ffn
    q, k, v = attn.qkv_dwconv(pointwise(norm(x, block.norm1), attn.qkv)).chunk(3, 1)
    q, k, v = (part.reshape(batch, attn.num_heads, dim // attn.num_heads, height * width) for part in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = ((q @ k.transpose(-2, -1)) * attn.temperature).softmax(-1)
    x = x + pointwise((weights @ v).reshape(x.shape), attn.project_out)
    a, b = ffn.dwconv(pointwise(norm(x, block.norm2), ffn.project_in)).chunk(2, 1)
    return x + pointwise(F.gelu(a) * b, ffn.project_out)


def _plain_restormer(model: Restormer, x: Tensor) -> Tensor:
    """Run the network as the authors write it, on whole channels-first maps."""

    def level(blocks: nn.Module, x: Tensor) -> Tensor:
        for block in blocks.children():
            x = plain_restormer_block(cast(RestormerBlock, block), x)
        return x

    def down(x: Tensor, conv: nn.Conv2d) -> Tensor:
        return F.pixel_unshuffle(conv(x), 2)

    def up(x: Tensor, conv: nn.Conv2d, skip: Tensor) -> Tensor:
        return torch.cat([F.pixel_shuffle(conv(x), 2), skip], 1)

    def reduce(x: Tensor, linear: nn.Linear) -> Tensor:
        return F.conv2d(x, linear.weight[:, :, None, None])

    padded = _pad(x)
    embedded = model.patch_embed(padded)
    skip1 = level(model.encoder_level1, embedded)
    skip2 = level(model.encoder_level2, down(skip1, model.down1_2))
    skip3 = level(model.encoder_level3, down(skip2, model.down2_3))
    latent = level(model.latent, down(skip3, model.down3_4))
    decoded3 = level(model.decoder_level3, reduce(up(latent, model.up4_3, skip3), model.reduce_chan_level3))
    decoded2 = level(model.decoder_level2, reduce(up(decoded3, model.up3_2, skip2), model.reduce_chan_level2))
    decoded1 = level(model.refinement, level(model.decoder_level1, up(decoded2, model.up2_1, skip1)))
    if model.skip_conv is None:
        restored = model.output(decoded1) + padded
    else:
        restored = model.output(decoded1 + reduce(embedded, model.skip_conv))
    return restored[..., : x.shape[2], : x.shape[3]]


class Restormer(nn.Module):
    """Restore an image with Restormer (Zamir et al., CVPR 2022, arXiv 2111.09881).

    Inference on a CPU runs strip by strip on maps that are updated in place: the attention matrices are made of sums
    over all strips, so the result is that of the whole map up to rounding. `stream` does the same within a given
    memory, on any device. Everything else (training, compilers, exporters, other devices) sees whole maps.

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
        dual_pixel: bool = False,
        merged: bool = False,
        num_classes: int = 0,
        device: Any = None,
        dtype: Any = None,
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
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.out_chans, self.num_classes = in_chans, out_chans, num_classes
        self.dim, self.grad_checkpointing = dim, False
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
        if self.patch_embed.weight.device.type == "cpu":
            return 4 * 7 * self.dim
        return 4 * 28 * self.dim

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        if self._runs_by_strips(x):
            out = x.new_empty(len(x), self.out_chans, *x.shape[2:])
            for image, restored in zip(x, out, strict=True):
                with Workspace(None, x.device, x.dtype) as workspace:
                    strip_bytes = self._strip_bytes(x.shape[3])
                    StripRun(self, image, restored, workspace, strip_bytes, keep_values=True).run()
            return out
        padded = _pad(x).contiguous(memory_format=torch.channels_last)
        embedded = self.patch_embed(padded).permute(0, 2, 3, 1)  # (B, H, W, C)
        skip1 = self._level(self.encoder_level1, embedded)
        skip2 = self._level(self.encoder_level2, _down(self.down1_2, skip1))
        skip3 = self._level(self.encoder_level3, _down(self.down2_3, skip2))
        y = self._level(self.latent, _down(self.down3_4, skip3))
        y = self._level(self.decoder_level3, self.reduce_chan_level3(_up(self.up4_3, y, skip3)))
        y = self._level(self.decoder_level2, self.reduce_chan_level2(_up(self.up3_2, y, skip2)))
        y = self._level(self.decoder_level1, _up(self.up2_1, y, skip1))
        y = self._level(self.refinement, y)
        if self.skip_conv is None:
            restored = self.output(y.permute(0, 3, 1, 2)) + padded
        else:
            restored = self.output((y + self.skip_conv(embedded)).permute(0, 3, 1, 2))
        return restored[..., : x.shape[2], : x.shape[3]]

    def _level(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_tracing():
            return checkpoint_seq(blocks, x)
        return blocks(x)

    def _runs_by_strips(self, x: Tensor) -> bool:
        """Whether strips pay: on a CPU without gradients; compilers and exporters get whole maps of any size."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return False
        return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def stream_bytes(self, height: int, width: int) -> int:
        """Return the least `memory` in which `stream` restores an image of this size, in bytes."""
        return self._strip_work(width, 0)

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
            OSError: The temporary files do not fit the disk.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.in_chans}, H, W) and not empty, got {tuple(x.shape)}.")
        batch, _, height, width = x.shape
        needed = self.stream_bytes(height, width)
        if memory is not None and memory < needed:
            raise ValueError(f"memory must be at least {needed} bytes for {width}x{height} pixels, got {memory}.")
        strip_bytes, maps = self._strip_bytes(width), None
        if memory is not None:
            while strip_bytes and self._strip_work(width, strip_bytes) > max(memory // 2, needed):
                strip_bytes //= 2
            maps = memory - self._strip_work(width, strip_bytes)
        weight = self.patch_embed.weight
        out = torch.empty(batch, self.out_chans, height, width, dtype=x.dtype, device=x.device)
        done, total = 0, batch * sum(2 * run * len(blocks) for blocks, run in self._levels(aligned(height)))

        def tell(units: int) -> None:
            nonlocal done
            done += units
            if progress is not None:
                progress(done, total)

        with no_autocast(weight):
            for image, restored in zip(x, out, strict=True):
                with Workspace(maps, weight.device, weight.dtype) as workspace:
                    StripRun(self, image, restored, workspace, strip_bytes, tell=tell).run()
        return out

    def _levels(self, height: int) -> list[tuple[nn.Sequential, int]]:
        """Return the blocks of each level, and the work of one of them: rows, times the cost of a row there."""
        names = ("encoder_level1", "encoder_level2", "encoder_level3", "latent", "decoder_level3", "decoder_level2")
        full = [(self.decoder_level1, 4 * height), (self.refinement, 4 * height)]  # twice the channels of the first
        return [*((cast(nn.Sequential, getattr(self, name)), height) for name in names), *full]

    def _strip_bytes(self, width: int) -> int:
        """Return how large the widest map of a strip should be, where memory does not matter."""
        block = cast(RestormerBlock, self.refinement[0])
        return max(_STRIP_BYTES, _FEWEST_ROWS * aligned(width) * 2 * block.ffn.hidden_dim * self._itemsize)

    @property
    def _itemsize(self) -> int:
        return self.patch_embed.weight.element_size()

    def _strip_work(self, width: int, strip_bytes: int) -> int:
        """Return the memory of the work on one strip, at the level that takes most, in bytes."""
        itemsize, width, most = self._itemsize, aligned(width), 0
        levels = (self.encoder_level1, self.encoder_level2, self.encoder_level3, self.latent, self.refinement)
        for blocks in levels:
            for block in cast(list[RestormerBlock], list(blocks)):
                hidden, dim = block.ffn.hidden_dim, block.attn.dim
                level = 0 if blocks is self.refinement else (dim // self.dim).bit_length() - 1
                rows = strip_rows(width >> level, 2 * hidden, itemsize, strip_bytes)
                most = max(most, (width >> level) * block.strip_numbers(rows))
        return itemsize * (most + 2 * self.up4_3.weight.numel()) + _LIBRARY_BYTES

    @torch.no_grad()
    def reparameterize(self) -> list[str]:
        """Fold every block, see `RestormerBlock.reparameterize`; exact, in place, idempotent.

        Raises:
            RuntimeError: The model is in training mode.
        """
        blocks = [module for module in self.modules() if isinstance(module, RestormerBlock)]
        return sorted({folded for block in blocks for folded in block.reparameterize()})


PLAIN: dict[type[nn.Module], Callable[..., Tensor]] = {Restormer: _plain_restormer}


def _pad(x: Tensor) -> Tensor:
    """Continue (B, C, H, W) to the right and below up to multiples of 8."""
    below, right = (aligned(side) - side for side in x.shape[2:])
    always = torch.compiler.is_compiling()  # one graph for all sizes, even where there is nothing to pad
    if always or below:
        x = F.pad(x, (0, 0, 0, below), padding_mode(x.shape[2], below))
    if always or right:
        x = F.pad(x, (0, right, 0, 0), padding_mode(x.shape[3], right))
    return x


def _down(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Halve the sides and double the channels of (B, H, W, C)."""
    return F.pixel_unshuffle(conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)


def _up(conv: nn.Conv2d, x: Tensor, skip: Tensor) -> Tensor:
    """Double the sides and halve the channels of (B, H, W, C), and append the encoder's map."""
    return torch.cat([F.pixel_shuffle(conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1), skip], -1)


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


_LEVELS = (
    "encoder_level1",
    "encoder_level2",
    "encoder_level3",
    "latent",
    "decoder_level3",
    "decoder_level2",
    "decoder_level1",
    "refinement",
)
_PARTS = {
    *_LEVELS,
    *("patch_embed", "output", "skip_conv", "reduce_chan_level3", "reduce_chan_level2"),
    *("down1_2", "down2_3", "down3_4", "up4_3", "up3_2", "up2_1"),
}


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise a Restormer state dict, the authors' or ours: (registered name, constructor arguments), or None.

    Some tasks share one network, and the tensors do not tell which it is: a colour denoiser may be the one for real
    noise, and "restormer_deblur" may be deraining, motion or defocus deblurring. The result is the same.
    """
    sizes = {key: tuple(value.shape) for key, value in checkpoint_filter_fn(state_dict, nn.Module()).items()}
    embed, output = sizes.get("patch_embed.weight"), sizes.get("output.weight")
    if embed is None or output is None or not {key.partition(".")[0] for key in sizes} <= _PARTS:
        return None
    depths, heads = [], []
    for level in _LEVELS:
        depths.append(len({key.split(".")[1] for key in sizes if key.startswith(f"{level}.")}))
        heads.append(sizes.get(f"{level}.0.attn.temperature", (0,))[0])
    hidden = [sizes.get(f"{level}.0.ffn.project_in.weight", (0,))[0] // 2 for level in _LEVELS[:4]]
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
        "restormer_tiny_restore_color": _cfg("restore"),
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
