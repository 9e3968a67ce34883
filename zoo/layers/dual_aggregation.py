"""Blocks of DAT: attention over space or over channels beside a convolution, and a feed-forward network with a gate.

Dual Aggregation Transformer for Image Super-Resolution (ICCV 2023), https://arxiv.org/abs/2308.03364. Maps are
channels-last.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.layers.conv_norm import fold_layer_norm, merged_kernel
from zoo.layers.own import require_mergeable
from zoo.layers.rectangular_window import WindowAttention
from zoo.layers.transposed_attention import channel_attention, gram

__all__ = [
    "ChannelAttention",
    "DualAggregationBlock",
    "GatedFFN",
    "SpatialAttention",
]


class _AdaptiveInteraction(nn.Module):
    """What spatial and channel attention of DAT share: projections, convolution of the values, the two gates."""

    def __init__(
        self, dim: int, num_heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
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

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the three BatchNorms into the convolutions before them, in place.

        Raises:
            RuntimeError: The module is in training mode.
        """
        if isinstance(self.dwconv[1], nn.Identity):
            return ()
        require_mergeable(self)
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
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


class ChannelAttention(_AdaptiveInteraction):
    """Attention between channels, over all pixels; gated convolution.

    Args:
        dim: Channels C.
        num_heads: Heads h; channels of a head attend to each other.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self, dim: int, num_heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
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
        by_head_v = v.reshape(batch, -1, self.num_heads, dim // self.num_heads).transpose(1, 2)
        a = (by_head_v @ attn.mT).transpose(1, 2).reshape(batch, height, width, dim)
        channels = self.channel_interaction(a.permute(0, 3, 1, 2)).sigmoid().permute(0, 2, 3, 1)
        pixels = self.spatial_interaction(c.permute(0, 3, 1, 2)).sigmoid().permute(0, 2, 3, 1)
        return self.proj(a * pixels + c * channels)


class SpatialGate(nn.Module):
    """Multiply one half of the channels by the normed, convolved other half."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
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

    def __init__(
        self, dim: int, hidden_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.sg = SpatialGate(hidden_dim // 2, **dd)
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
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
        require_mergeable(self)
        fold_layer_norm(self.norm1, self.attn.qkv)
        fold_layer_norm(self.norm2, self.ffn.fc1)
        return ("affine norms",)
