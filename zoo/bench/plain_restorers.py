"""Restorers in the formulations of their authors, with the weights of ours: rivals in benchmarks, oracles of tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.dual_aggregation import ChannelAttention, DualAggregationBlock, SpatialAttention
from zoo.layers.pixel_norm import PixelNorm
from zoo.layers.rectangular_window import WindowAttention
from zoo.restoration.cfsr import CFSRBlock
from zoo.restoration.dat import DAT, ResidualGroup
from zoo.restoration.ffnetsr import FFNetSR, MixerBlock
from zoo.restoration.restormer import Restormer, RestormerBlock, pad

__all__ = ["PLAIN", "plain_cfsr_block", "plain_dat", "plain_ffnetsr", "plain_mask", "plain_restormer_block"]


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


class _PlainMaps:
    """Steps of `Restormer.route` as the authors write them, on whole channels-first maps."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.padded = x, pad(x)

    def embed(self, conv: nn.Conv2d) -> Tensor:
        self.embedded = conv(self.padded)
        return self.embedded

    def level(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        for block in blocks.children():
            x = plain_restormer_block(cast(RestormerBlock, block), x)
        return x

    def down(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(conv(x), 2)

    def up(self, conv: nn.Conv2d, x: Tensor, skip: Tensor, reduce: nn.Linear | None) -> Tensor:
        joined = torch.cat([F.pixel_shuffle(conv(x), 2), skip], 1)
        return joined if reduce is None else F.conv2d(joined, reduce.weight[:, :, None, None])

    def finish(self, conv: nn.Conv2d, x: Tensor, skip: nn.Linear | None) -> Tensor:
        if skip is None:
            restored = conv(x) + self.padded
        else:
            restored = conv(x + F.conv2d(self.embedded, skip.weight[:, :, None, None]))
        return restored[..., : self.x.shape[2], : self.x.shape[3]]


def plain_restormer(model: Restormer, x: Tensor) -> Tensor:
    """Run the network as the authors write it, see `plain_restormer_block`.

    Args:
        model: In training or merged form.
        x: (B, in_chans, H, W).
    """
    return model.route(_PlainMaps(x))


def _plain_windows(x: Tensor, size: tuple[int, int], heads: int) -> Tensor:
    """Cut (B, H, W, C) into windows by way of channels first: (windows, h, tokens, C / h)."""
    batch, height, width, dim = x.shape
    x = x.permute(0, 3, 1, 2).reshape(batch, dim, height // size[0], size[0], width // size[1], size[1])
    x = x.permute(0, 2, 4, 3, 5, 1).contiguous().reshape(-1, size[0] * size[1], dim)
    return x.reshape(-1, size[0] * size[1], heads, dim // heads).permute(0, 2, 1, 3).contiguous()


def plain_mask(height: int, width: int, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Build the mask of every window of a shifted map on the CPU, (windows, tokens, tokens), as Swin's heirs do.

    Args:
        height: Of the map with padding.
        width: Likewise.
        size: Of a window.
        shift: Of the windows.
    """
    regions = torch.zeros(1, height, width, 1)
    number = 0
    for rows in (slice(0, -size[0]), slice(-size[0], -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -size[1]), slice(-size[1], -shift[1]), slice(-shift[1], None)):
            regions[:, rows, columns] = number
            number += 1
    tokens = _plain_windows(regions, size, 1).flatten(1)
    difference = tokens[:, None, :] - tokens[:, :, None]
    return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)


def plain_window_attention(attn: WindowAttention, qkv: Tensor, mask: Tensor | None) -> Tensor:
    """Attend within windows as DAT's authors do: scores, bias and mask in full; oracle of tests, rival in benchmarks.

    Args:
        attn: Its weights are used.
        qkv: (3, B, H, W, C), rolled already.
        mask: From `plain_mask`, for shifted windows.

    Returns:
        (B, H, W, C), not rolled back.
    """
    batch, height, width, dim = qkv.shape[1:]
    (tall, wide), heads = attn.size, attn.num_heads
    q, k, v = (_plain_windows(part, attn.size, heads) for part in qkv)
    scores = (q * attn.scale) @ k.transpose(-2, -1)
    if not (attn.pos.dead and isinstance(attn.pos.pos_proj, nn.Identity)):
        table = attn.pos.offset_table().flatten(1).t()
        y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij"))
        offsets = (y[:, None] - y + tall - 1) * (2 * wide - 1) + x[:, None] - x + wide - 1
        bias = table[offsets.flatten().to(table.device)].view(tall * wide, tall * wide, -1)
        scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
    if mask is not None:
        windows = mask.shape[0]
        scores = scores.view(batch, windows, heads, tall * wide, -1) + mask.to(scores)[None, :, None]
        scores = scores.view(-1, heads, tall * wide, tall * wide)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, tall * wide, dim)
    out = out.view(batch, height // tall, width // wide, tall, wide, dim)
    return out.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, dim)


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


def plain_dat(model: DAT, x: Tensor) -> Tensor:
    """Run the network as the paper writes it, block by block: oracle of tests and rival in benchmarks.

    Args:
        model: In evaluation mode, in training or merged form.
        x: (B, in_chans, H, W).

    Returns:
        (B, in_chans, scale * H, scale * W).
    """
    batch, _, height, width = x.shape

    def as_map(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(batch, -1, height, width)

    shallow = model.conv_first(x - model.mean)
    tokens = model.before_RG(shallow.flatten(2).transpose(1, 2))
    for group in cast(list[ResidualGroup], list(model.layers)):
        features = tokens
        for block in cast(list[DualAggregationBlock], list(group.blocks)):
            features = plain_dual_aggregation_block(block, features, height, width)
        tokens = group.conv(as_map(features)).flatten(2).transpose(1, 2) + tokens
    deep = model.conv_after_body(as_map(model.norm(tokens))) + shallow
    return model.conv_last(model.upsample(model.conv_before_upsample(deep))) + model.mean


def plain_mixer_block(block: MixerBlock, x: Tensor) -> Tensor:
    """Run a block as the paper writes it: one layer after the other, whole maps, channels first.

    Args:
        block: Its weights are used.
        x: (B, C, H, W).

    Returns:
        (B, C, H, W).
    """
    for mixer in (block.token_mixer, block.channel_mixer):
        mixed = x
        for layer in mixer:
            mixed = layer(mixed)
        x = x + mixed
    return x


def plain_ffnetsr(model: FFNetSR, x: Tensor) -> Tensor:
    """Run the network as the paper writes it, see `plain_mixer_block`: oracle of tests and rival in benchmarks.

    Args:
        model: In training or merged form.
        x: (B, in_chans, H, W).

    Returns:
        (B, in_chans, scale * H, scale * W).
    """
    features = model.proj(x.contiguous())
    for block in model.body:
        features = plain_mixer_block(cast(MixerBlock, block), features)
    enlarged = torch.stack([x] * model.scale**2, 2).flatten(1, 2)
    return model.shuffle(model.conv_bef_up(features) + enlarged)


def plain_cfsr_block(block: CFSRBlock, x: Tensor) -> Tensor:
    """Run a block as the paper writes it: channels-first maps, one convolution a branch, the norm written out.

    Test oracle and benchmark rival of `CFSRBlock`; works for the training and the merged form.

    Args:
        block: Its weights are used, before `reparameterize()`.
        x: (B, dim, H, W).

    Returns:
        (B, dim, H, W)
    """

    def pointwise(x: Tensor, linear: nn.Linear, rows: slice = slice(None)) -> Tensor:
        return F.conv2d(x, linear.weight[rows, :, None, None], cast(Tensor, linear.bias)[rows])

    def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-6) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def scale(x: Tensor, layer: nn.Module) -> Tensor:
        return cast(Tensor, layer.gamma)[:, None, None] * x

    mixer, ffn, dim = block.mixer, block.ffn, x.shape[1]
    normed = norm(x, block.norm1)
    a = depthwise(F.gelu(pointwise(normed, mixer.expand, slice(0, dim))), mixer.conv.weight, mixer.conv.bias)
    v = pointwise(normed, mixer.expand, slice(dim, None))
    x = x + scale(pointwise(a * v, mixer.proj), block.scale1)
    h = F.gelu(pointwise(norm(x, block.norm2), ffn.fc1))
    edge = depthwise(h, ffn.pos.weight, ffn.pos.bias)
    if ffn.edge_scale is not None and ffn.edge_bias is not None and ffn.edge_masks is not None:
        masks = ffn.edge_masks.chunk(len(ffn.edge_scale))
        for strength, bias, mask in zip(ffn.edge_scale, ffn.edge_bias, masks, strict=True):
            edge = edge + depthwise(h, strength[:, None, None, None] * mask, bias)
    return x + scale(pointwise(h + F.gelu(edge), ffn.fc2), block.scale2)


PLAIN: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    DAT: plain_dat,
    FFNetSR: plain_ffnetsr,
    Restormer: plain_restormer,
}
"""Network -> the network as its authors compute it, a function of ours and its input."""
