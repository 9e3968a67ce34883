"""Blocks of DAT: attention over space or over channels beside a convolution, and a feed-forward network with a gate.

Dual Aggregation Transformer for Image Super-Resolution (ICCV 2023), https://arxiv.org/abs/2308.03364. Maps are
channels-last. Beside `forward`, blocks have `run`: the same on a map that is read and written by strips of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.layers.conv_norm import require_eval
from zoo.layers.rectangular_window import WindowAttention, plain_mask, plain_window_attention
from zoo.layers.sliding_rows import RowQueue, SlidingRows, depthwise_rows, linear_rows, merged_kernel
from zoo.layers.strips import RowMap
from zoo.layers.transposed_attention import Gram, channel_attention, fold_projection, gram

__all__ = [
    "ChannelAttention",
    "DualAggregationBlock",
    "GatedFFN",
    "ScratchMap",
    "SpatialAttention",
    "Strips",
    "plain_dual_aggregation_block",
]


class ScratchMap(RowMap, Protocol):
    """A map that can be given back; its strips are (rows, width, channels)."""

    def release(self) -> None:
        """Give the map's memory back."""


@dataclass(frozen=True)
class Strips:
    """How one map is computed piece by piece.

    Args:
        height: Of the map, pixels.
        width: Of the map, pixels.
        pixels: About how many are computed at a time.
        new: Makes an empty map of as many channels, and the height and width of this one.
    """

    height: int
    width: int
    pixels: int
    new: Callable[[int], ScratchMap]

    @property
    def rows(self) -> int:
        """Rows of a strip."""
        return max(2, self.pixels // self.width)

    def __iter__(self) -> Any:
        """Yield (first, end) of each strip."""
        for first in range(0, self.height, self.rows):
            yield first, min(first + self.rows, self.height)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _interact(branch: nn.Sequential, at: int, x: Tensor) -> Tensor:
    """Run convolution `at`, BatchNorm, GELU and convolution of 1x1 of an interaction on channels-last vectors."""
    weight, bias = merged_kernel(cast(nn.Conv2d, branch[at]), branch[at + 1])
    last = cast(nn.Conv2d, branch[at + 3])
    return F.linear(F.gelu(F.linear(x, weight.flatten(1), bias)), last.weight.flatten(1), last.bias)


class _AdaptiveInteraction(nn.Module):
    """What spatial and channel attention of DAT share: projections, convolution of the values, the two gates."""

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dwconv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd), nn.BatchNorm2d(dim, **dd), nn.GELU()
        )
        self.channel_interaction = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, dim // 8, 1, **dd),
            nn.BatchNorm2d(dim // 8, **dd),
            nn.GELU(),
            nn.Conv2d(dim // 8, dim, 1, **dd),
        )
        self.spatial_interaction = nn.Sequential(
            nn.Conv2d(dim, dim // 16, 1, **dd),
            nn.BatchNorm2d(dim // 16, **dd),
            nn.GELU(),
            nn.Conv2d(dim // 16, 1, 1, **dd),
        )

    def _convolve(self, v: Tensor) -> Tensor:
        """Convolve the values, (B, H, W, C) -> the same."""
        return self.dwconv(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _values(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the projection to values."""
        return self.qkv.weight[2 * self.dim :], self.qkv.bias[2 * self.dim :]

    def _channel_gate(self, mean: Tensor) -> Tensor:
        """Return the gate of channels from their means (C); in evaluation mode."""
        return torch.sigmoid(_interact(self.channel_interaction, 1, mean))

    def _pixel_gate(self, x: Tensor) -> Tensor:
        """Return the gate of pixels, (n, W, C) -> (n, W, 1); in evaluation mode."""
        return torch.sigmoid(_interact(self.spatial_interaction, 0, x))

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the three BatchNorms into the convolutions before them, in place.

        Raises:
            RuntimeError: The module is in training mode.
        """
        if isinstance(self.dwconv[1], nn.Identity):
            return ()
        require_eval(self)
        for branch, at in ((self.dwconv, 0), (self.channel_interaction, 1), (self.spatial_interaction, 0)):
            conv = cast(nn.Conv2d, branch[at])
            weight, bias = merged_kernel(conv, branch[at + 1])
            conv.weight.copy_(weight)
            cast(Tensor, conv.bias).copy_(bias)
            branch[at + 1] = nn.Identity()
        return ("batch norms",)


class SpatialAttention(_AdaptiveInteraction):
    """Attention within lying windows for one half of the channels and standing ones for the other; gated convolution.

    Args:
        dim: Channels C.
        num_heads: Heads, half of them for each kind of window.
        split_size: Height and width of the first half's windows, those of the second are turned; pixels.
        shift: Roll the map by half a window.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: tuple[int, int],
        *,
        shift: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, **dd)
        self.multiple_of = max(split_size)
        self.attns = nn.ModuleList(
            WindowAttention(dim // 2, num_heads // 2, window, shift=shift, bias_dim=max(1, dim // 32), **dd)
            for window in (split_size, split_size[::-1])
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[1:]
        qkv = self.qkv(x)
        c = self._convolve(qkv[..., 2 * dim :])
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        step = self.multiple_of
        padded = ((height + step - 1) // step * step, (width + step - 1) // step * step)
        if tracing or padded != (height, width):  # in a traced program the size is open
            qkv = F.pad(qkv, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        qkv = qkv.unflatten(-1, (3, 2, dim // 2))
        a = torch.cat([attn(qkv[..., i, :]) for i, attn in enumerate(self.attns)], -1)
        if tracing:
            a = a.index_select(1, torch.arange(height, device=x.device))
            a = a.index_select(2, torch.arange(width, device=x.device))
        else:
            a = a[:, :height, :width]
        channels = self.channel_interaction(c.permute(0, 3, 1, 2)).sigmoid().permute(0, 2, 3, 1)
        pixels = self.spatial_interaction(a.permute(0, 3, 1, 2)).sigmoid().permute(0, 2, 3, 1)
        return self.proj(a * channels + c * pixels)

    def run(self, read: Callable[[int, int], Tensor], strips: Strips, emit: Callable[[int, Tensor], None]) -> None:
        """Compute by strips; for inference.

        Args:
            read: Returns rows [first, end) of the input, (end - first, W, C).
            strips: The cut.
            emit: Takes the first row and (n, W, C) of the result, from top to bottom.
        """
        half, size = self.dim // 2, (strips.height, strips.width)
        padded = (size[0] + -size[0] % self.multiple_of, size[1] + -size[1] % self.multiple_of)
        weight, bias = self.qkv.weight.view(3, 2, half, -1), self.qkv.bias.view(3, 2, half)
        kernel, offset = merged_kernel(cast(nn.Conv2d, self.dwconv[0]), self.dwconv[1])
        attended, convolved, means = [], [], []
        for index, attn in enumerate(self.attns):
            a, c = strips.new(half), strips.new(half)
            projection = weight[:, index].flatten(0, 1), bias[:, index].flatten()
            cast(WindowAttention, attn).by_spans(read, a.write, c.write, size, padded, *projection, strips.pixels)
            part = slice(index * half, (index + 1) * half)
            means.append(self._convolve_rows(c, strips, kernel[part], offset[part]))
            attended.append(a)
            convolved.append(c)
        gate = self._channel_gate(torch.cat(means))
        for first, end in strips:
            mixed = torch.cat([part.read(first, end) for part in attended], -1)
            pixels = self._pixel_gate(mixed)
            gated = torch.cat([part.read(first, end) for part in convolved], -1).mul_(pixels)
            mixed = gated.addcmul_(mixed, gate)
            emit(first, linear_rows(mixed, self.proj.weight, self.proj.bias))
        for done in (*attended, *convolved):
            done.release()

    def _convolve_rows(self, values: RowMap, strips: Strips, weight: Tensor, bias: Tensor) -> Tensor:
        """Convolve a map of values in place, and return the means of its channels."""
        total = weight.new_zeros(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))
        sliding, done = SlidingRows(strips.height), 0
        for first, end in strips:
            rows = sliding.push(values.read(first, end))
            if rows is None:
                continue
            c = F.gelu(depthwise_rows(rows, weight, bias))
            total += c.sum((0, 1), dtype=total.dtype)
            values.write(done, c)
            done += c.shape[0]
        return (total / (strips.height * strips.width)).to(weight.dtype)


class ChannelAttention(_AdaptiveInteraction):
    """Attention between channels, over all pixels; gated convolution.

    The attention's product with the values and the output projection are one matrix, which is small.

    Args:
        dim: Channels C.
        num_heads: Heads h; channels of a head attend to each other.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        c = self._convolve(v)
        by_head = (
            part.reshape(batch, -1, self.num_heads, dim // self.num_heads).permute(0, 2, 3, 1) for part in (q, k)
        )
        attn = channel_attention(gram(*by_head), self.temperature).to(v.dtype)
        mean = torch.matmul(attn, v.mean((1, 2)).view(batch, self.num_heads, -1, 1)).reshape(batch, dim, 1, 1)
        channels = self.channel_interaction(mean).sigmoid().view(batch, 1, dim)
        pixels = self.spatial_interaction(c.permute(0, 3, 1, 2)).sigmoid().view(batch, -1, 1)
        attended = v.reshape(batch, -1, dim) @ fold_projection(attn, self.proj.weight).to(v.dtype).mT
        convolved = F.linear(c.reshape(batch, -1, dim) * channels, self.proj.weight, self.proj.bias)
        return (attended * pixels + convolved).view(batch, height, width, dim)

    def run(self, read: Callable[[int, int], Tensor], strips: Strips, emit: Callable[[int, Tensor], None]) -> None:
        """Compute by strips, as `SpatialAttention.run`: one pass for the products, one for the result."""
        dim, heads, count = self.dim, self.num_heads, strips.height * strips.width
        exact = torch.promote_types(self.proj.weight.dtype, torch.float32)
        sums: Gram | None = None
        total = self.proj.weight.new_zeros(dim, dtype=exact)
        for first, end in strips:
            x = read(first, end).reshape(-1, dim)
            qk = F.linear(x, self.qkv.weight[: 2 * dim], self.qkv.bias[: 2 * dim]).view(-1, 2, heads, dim // heads)
            part = gram(*qk.permute(1, 2, 3, 0))
            sums = part if sums is None else sums + part
            total += x.sum(0, dtype=exact)
        attn = channel_attention(cast(Gram, sums), self.temperature).to(self.proj.weight.dtype)
        weight, bias = self._values()
        mean = F.linear((total / count).to(weight.dtype), weight, bias).view(heads, -1, 1)
        gated = self.proj.weight * self._channel_gate((attn @ mean).flatten())
        attended = fold_projection(attn, self.proj.weight)
        kernel = merged_kernel(cast(nn.Conv2d, self.dwconv[0]), self.dwconv[1])
        sliding, done = SlidingRows(strips.height), 0
        for first, end in strips:
            v = sliding.push(linear_rows(read(first, end), weight, bias))
            if v is None:
                continue
            c = F.gelu(depthwise_rows(v, *kernel))
            out = linear_rows(v[1:-1], attended).mul_(self._pixel_gate(c))
            emit(done, out.add_(linear_rows(c, gated, self.proj.bias)))
            done += c.shape[0]


class _SpatialGate(nn.Module):
    """Multiply one half of the channels by the normed, convolved other half."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, -1)
        return x * self.conv(self.norm(gate).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GatedFFN(nn.Module):
    """Feed-forward network whose hidden half gates the other half by its surroundings (SGFN of DAT).

    Args:
        dim: Channels C.
        hidden_dim: Channels after the first linear layer, even; the second one gets half of them.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, hidden_dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.sg = _SpatialGate(hidden_dim // 2, **dd)
        self.fc2 = nn.Linear(hidden_dim // 2, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.sg(F.gelu(self.fc1(x))))


class DualAggregationBlock(nn.Module):
    """Attention over space or channels, then the feed-forward network, each with a norm before and a residual around.

    Args:
        dim: Channels C.
        num_heads: Heads.
        split_size: Windows of spatial attention, pixels; None is attention between channels.
        shift: Roll the windows.
        expansion: Hidden channels of the feed-forward network, over C.
        drop_path: Rate at which a sample skips a branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: tuple[int, int] | None,
        *,
        shift: bool = False,
        expansion: float = 2.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn: SpatialAttention | ChannelAttention = (
            ChannelAttention(dim, num_heads, **dd)
            if split_size is None
            else SpatialAttention(dim, num_heads, split_size, shift=shift, **dd)
        )
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.ffn = GatedFFN(dim, int(dim * expansion), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))

    def run(self, source: RowMap, target: RowMap, strips: Strips) -> None:
        """Read a map and write the result by strips; for inference.

        Args:
            source: The input.
            target: Takes the result; may be `source`.
            strips: The cut.
        """
        ffn, gates, hidden_rows, residual = self.ffn, SlidingRows(strips.height), RowQueue(), RowQueue()
        conv, half, done = (ffn.sg.conv.weight, cast(Tensor, ffn.sg.conv.bias)), self.ffn.fc2.in_features, 0

        def feed(first: int, rows: Tensor) -> None:
            """Add the attention's residual to the next rows, run the other half on them, write what is complete."""
            nonlocal done
            x = rows.add_(source.read(first, first + rows.shape[0]))  # not yet overwritten: `done` is behind
            hidden = F.gelu(linear_rows(_norm(self.norm2, x), ffn.fc1.weight, ffn.fc1.bias))
            hidden_rows.push(hidden[..., :half])
            residual.push(x)
            gate = gates.push(_norm(ffn.sg.norm, hidden[..., half:]))
            if gate is None:
                return
            gate = depthwise_rows(gate, *conv)
            count = gate.shape[0]
            gated = gate.mul_(hidden_rows.pop(count))
            target.write(done, linear_rows(gated, ffn.fc2.weight, ffn.fc2.bias).add_(residual.pop(count)))
            done += count

        self.attn.run(lambda first, end: _norm(self.norm1, source.read(first, end)), strips, feed)

    def example_input(self) -> Tensor:
        """Return a random map (1, 16, 16, C)."""
        weight = self.ffn.fc1.weight
        return torch.randn(1, 16, 16, self.ffn.fc1.in_features, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the affine norms into the linear layers behind them, in place.

        Raises:
            RuntimeError: The block is in training mode.
        """
        if not self.norm1.elementwise_affine:
            return ()
        require_eval(self)
        fold_layer_norm(self.norm1, self.attn.qkv)
        fold_layer_norm(self.norm2, self.ffn.fc1)
        return ("affine norms",)


@torch.no_grad()
def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """Move a LayerNorm's weight and bias into the linear layer behind it, in place."""
    linear.bias.add_(linear.weight @ norm.bias)
    linear.weight.mul_(norm.weight)
    norm.elementwise_affine = False
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)


_stored_mask = lru_cache(plain_mask)


def _plain_spatial(attn: SpatialAttention, x: Tensor, height: int, width: int) -> Tensor:
    """Run spatial attention on tokens (B, H * W, C)."""
    batch, tokens, dim = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, dim).permute(2, 0, 1, 3)
    v = qkv[2].transpose(-2, -1).contiguous().view(batch, dim, height, width)
    padded = qkv.reshape(3 * batch, height, width, dim).permute(0, 3, 1, 2)
    padded = F.pad(padded, (0, -width % attn.multiple_of, 0, -height % attn.multiple_of))
    tall, wide = padded.shape[2:]
    padded = padded.reshape(3, batch, dim, -1).transpose(-2, -1).reshape(3, batch, tall, wide, dim)
    halves = []
    for branch, half in zip(cast(list[WindowAttention], list(attn.attns)), padded.chunk(2, -1), strict=True):
        mask = None
        if any(branch.shift):
            half = torch.roll(half, (-branch.shift[0], -branch.shift[1]), (2, 3))
            build = _stored_mask if (tall, wide) == (64, 64) else plain_mask  # a checkpoint has those of 64x64
            mask = build(tall, wide, branch.size, branch.shift).to(x)
        out = plain_window_attention(branch, half, mask)
        halves.append(torch.roll(out, branch.shift, (1, 2))[:, :height, :width].reshape(batch, tokens, -1))
    a = torch.cat(halves, 2)
    c = attn.dwconv(v)
    channels = attn.channel_interaction(c).permute(0, 2, 3, 1).contiguous().view(batch, 1, dim)
    a_map = a.transpose(-2, -1).contiguous().view(batch, dim, height, width)
    c = c * torch.sigmoid(attn.spatial_interaction(a_map))
    a = a * torch.sigmoid(channels)
    return attn.proj(a + c.permute(0, 2, 3, 1).contiguous().view(batch, tokens, dim))


def _plain_channel(attn: ChannelAttention, x: Tensor, height: int, width: int) -> Tensor:
    """Run channel attention on tokens (B, H * W, C)."""
    batch, tokens, dim = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = (part.transpose(-2, -1) for part in qkv)
    v_map = v.reshape(batch, dim, tokens).contiguous().view(batch, dim, height, width)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = ((q @ k.transpose(-2, -1)) * attn.temperature).softmax(-1)
    a = (weights @ v).permute(0, 3, 1, 2).reshape(batch, tokens, dim)
    c = attn.dwconv(v_map)
    a_map = a.transpose(-2, -1).contiguous().view(batch, dim, height, width)
    channels = attn.channel_interaction(a_map)
    pixels = attn.spatial_interaction(c).permute(0, 2, 3, 1).contiguous().view(batch, tokens, 1)
    c = (c * torch.sigmoid(channels)).permute(0, 2, 3, 1).contiguous().view(batch, tokens, dim)
    return attn.proj(a * torch.sigmoid(pixels) + c)


def plain_dual_aggregation_block(block: DualAggregationBlock, x: Tensor, height: int, width: int) -> Tensor:
    """Run a block as the authors write it: tokens, maps copied to channels first, every window with a mask of its own.

    Args:
        block: Its weights are used.
        x: (B, H * W, C).
        height: H.
        width: W.

    Returns:
        (B, H * W, C).
    """
    normed = block.norm1(x)
    if isinstance(block.attn, SpatialAttention):
        x = x + _plain_spatial(block.attn, normed, height, width)
    else:
        x = x + _plain_channel(block.attn, normed, height, width)
    hidden, gate = F.gelu(block.ffn.fc1(block.norm2(x))).chunk(2, -1)
    gate = block.ffn.sg.norm(gate).transpose(1, 2).contiguous().view(x.shape[0], -1, height, width)
    gate = block.ffn.sg.conv(gate).flatten(2).transpose(-1, -2).contiguous()
    return x + block.ffn.fc2(hidden * gate)
