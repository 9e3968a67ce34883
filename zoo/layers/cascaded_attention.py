"""Cascaded group attention within windows (EfficientViT, CVPR 2023, https://arxiv.org/abs/2305.07027)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.layers.attention_bias import BiasedAttention
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.kept import Kept, can_keep
from zoo.layers.own import is_own, require_mergeable
from zoo.layers.tracing import require_leaf

__all__ = ["CascadedGroupAttention", "WindowAttention"]

_DENSE_TOKENS = 1024  # measured: a convolution call costs 35 us for any number of tokens below


class CascadedGroupAttention(BiasedAttention):
    """Attend within a window; every head has channels of its own, plus the output of the head before it.

    Paper, section 3.2. Queries pass a depthwise convolution, which sees the window and zeros around it.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        key_dim: Channels of a head's queries and keys.
        num_heads: Heads h.
        resolution: Side r of the window, tokens.
        kernels: Side of each head's query convolution, tokens; at least h entries.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, r, r) -> the same.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int,
        resolution: int,
        kernels: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, resolution, device=device, dtype=dtype)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        value_dim = dim // num_heads
        self.dim, self.key_dim, self.value_dim = dim, key_dim, value_dim
        self.num_heads, self.scale = num_heads, key_dim**-0.5
        self.merged = False
        self._dense = [Kept() for _ in range(num_heads)]  # the query convolutions as matrices
        self.qkvs = nn.ModuleList(ConvNorm(value_dim, 2 * key_dim + value_dim, **dd) for _ in range(num_heads))
        self.dws = nn.ModuleList(
            ConvNorm(key_dim, key_dim, kernel, groups=key_dim, **dd) for kernel in kernels[:num_heads]
        )
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, bn_weight_init=0.0, **dd))

    def forward(self, x: Tensor) -> Tensor:
        in_tokens = self.merged
        if not torch.jit.is_scripting():
            in_tokens = in_tokens and self._owns_parts()
        if in_tokens:
            return self._attend_in_tokens(x)
        return self._attend_in_maps(x)

    @torch.jit.unused
    def _owns_parts(self) -> bool:
        layers = cast(list[ConvNorm], [*self.qkvs, *self.dws])
        return all(is_own(layer, ConvNorm) and is_own(layer.conv, nn.Conv2d) for layer in layers)

    def _attend_in_maps(self, x: Tensor) -> Tensor:
        """Attend through the modules, (B, C, r, r) throughout."""
        batch, _, height, width = x.shape
        bias, scale = self.attention_bias(), 1.0 if self.merged else self.scale
        groups = x.chunk(self.num_heads, 1)
        out, outs = groups[0], []
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws)):  # noqa: B905  # TorchScript has no strict
            if i > 0:
                out = out + groups[i]
            q, k, v = qkv(out).split([self.key_dim, self.key_dim, self.value_dim], 1)
            q = dw(q).flatten(2).transpose(1, 2)
            attn = torch.baddbmm(bias[i], q, k.flatten(2), alpha=scale).softmax(-1)
            out = (v.flatten(2) @ attn.transpose(1, 2)).view(batch, self.value_dim, height, width)
            outs.append(out)
        return self.proj(torch.cat(outs, 1))

    def _attend_in_tokens(self, x: Tensor) -> Tensor:
        """Attend in merged form: channels-last, so that every product reads and writes tokens without a copy."""
        batch, dim, height, width = x.shape
        bias = self.attention_bias()
        x = x.permute(0, 2, 3, 1).reshape(-1, dim)  # (B * N, C)
        groups = x.chunk(self.num_heads, 1)
        out, outs = groups[0], []
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws)):  # noqa: B905  # TorchScript has no strict
            if i > 0:
                out = out + groups[i]
            tokens = F.linear(out, qkv.conv.weight.flatten(1), qkv.conv.bias)  # type: ignore
            q, k, v = tokens.view(batch, height * width, -1).split([self.key_dim, self.key_dim, self.value_dim], 2)
            if torch.jit.is_scripting():
                q = _convolve(q, dw.conv.weight, dw.conv.bias, height)  # type: ignore
            else:
                q = self._queries(q, i)
            attn = torch.baddbmm(bias[i], q, k.transpose(1, 2)).softmax(-1)
            out = torch.bmm(attn, v).view(-1, self.value_dim)
            outs.append(out)
        x = torch.cat(outs, 1).view(batch, height, width, dim).permute(0, 3, 1, 2)
        return self.proj(x)

    def _queries(self, q: Tensor, head: int) -> Tensor:
        """Convolve queries (B, N, E); with few tokens as a product with a matrix for each channel, which is cheaper."""
        conv = cast(ConvNorm, self.dws[head]).conv
        if not can_keep(conv.weight) or q.shape[0] * q.shape[1] > _DENSE_TOKENS:
            return _convolve(q, conv.weight, conv.bias, self.resolution)
        matrix = self._dense[head](conv.weight, self._dense_kernel)
        assert conv.bias is not None
        return torch.baddbmm(conv.bias.view(-1, 1, 1), q.permute(2, 0, 1), matrix).permute(1, 2, 0)

    def _dense_kernel(self, kernel: Tensor) -> Tensor:
        """Return the matrix that a depthwise kernel (E, 1, k, k) is within a window, (E, N in, N out)."""
        side, channels = self.resolution, kernel.shape[0]
        units = torch.eye(side * side, dtype=kernel.dtype).view(-1, 1, side, side).expand(-1, channels, -1, -1)
        moved = F.conv2d(units, kernel, padding=kernel.shape[-1] // 2, groups=channels)
        return moved.flatten(2).transpose(0, 1).contiguous()

    def example_input(self) -> Tensor:
        """Return a random input, (2, C, r, r)."""
        table = self.attention_biases
        return torch.randn(2, self.dim, self.resolution, self.resolution, device=table.device, dtype=table.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the norms, and the scale of the scores into the query convolutions, in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.merged:
            return ()
        require_mergeable(self)
        for layer in (*self.qkvs, *self.dws, self.proj[1]):
            layer.reparameterize()
        for layer in self.dws:
            layer.conv.weight *= self.scale  # type: ignore[union-attr]
            layer.conv.bias *= self.scale  # type: ignore[union-attr]
        self.merged = True
        return ("query scale",)


@register_notrace_module  # its branch depends on the input's size, which torch.fx cannot follow
class WindowAttention(nn.Module):
    """Cut a map into windows of the attention's size, attend in each, and put them together.

    A map that windows do not divide is padded at the bottom and right with zeros, which take part in the attention.

    Args:
        attn: Attention within a window.
        window_size: Side of the window, tokens, where the map is large enough.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(self, attn: CascadedGroupAttention, window_size: int) -> None:
        super().__init__()
        self.attn = attn
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            require_leaf(self, x)
        batch, dim, height, width = x.shape
        side = self.attn.resolution
        if height == side and width == side:
            return self.attn(x)
        bottom, right = -height % side, -width % side
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, right, 0, bottom))  # (B, H, W, C)
        rows, columns = (height + bottom) // side, (width + right) // side
        x = x.reshape(batch, rows, side, columns, side, dim).transpose(2, 3)
        x = self.attn(x.reshape(-1, side, side, dim).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x.reshape(batch, rows, columns, side, side, dim).transpose(2, 3)
        x = x.reshape(batch, height + bottom, width + right, dim)
        return x[:, :height, :width].permute(0, 3, 1, 2)


def _convolve(q: Tensor, weight: Tensor, bias: Tensor | None, side: int) -> Tensor:
    """Convolve each channel of tokens (B, N, E) within a window."""
    x = q.reshape(-1, side, side, q.shape[2]).permute(0, 3, 1, 2)
    x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return x.permute(0, 2, 3, 1).reshape(q.shape)
