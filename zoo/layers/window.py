"""Attention within windows of a map, in two patterns: patches, and tokens taken with a stride over the whole map."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.layers.own import require_mergeable
from zoo.layers.tracing import require_leaf

__all__ = ["HybridAttention", "Partition"]

Partition = Literal["both", "close", "remote"]


def _to_windows(x: Tensor, num_heads: int, size: tuple[int, int], remote: bool) -> Tensor:
    """Cut a map (B, H, W, h * e) into windows of size (a, b): (B * H/a * W/b, h, a * b, e).

    Close windows are patches; a remote window takes every (H/a)-th row and every (W/b)-th column.
    """
    batch, height, width, channels = x.shape
    rows, cols = height // size[0], width // size[1]
    dim = channels // num_heads
    if remote:
        x = x.reshape(batch, size[0], rows, size[1], cols, num_heads, dim).permute(0, 2, 4, 5, 1, 3, 6)
    else:
        x = x.reshape(batch, rows, size[0], cols, size[1], num_heads, dim).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(-1, num_heads, size[0] * size[1], dim)


def _from_windows(x: Tensor, grid: tuple[int, int], size: tuple[int, int], remote: bool) -> Tensor:
    """Put the windows of `_to_windows` back: (B * n1 * n2, h, a * b, e) -> (B, n1 * a, n2 * b, h * e)."""
    num_heads, dim = x.shape[1], x.shape[3]
    x = x.reshape(-1, grid[0], grid[1], num_heads, size[0], size[1], dim)
    x = x.permute(0, 4, 1, 5, 2, 3, 6) if remote else x.permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(-1, grid[0] * size[0], grid[1] * size[1], num_heads * dim)


@register_notrace_module
class HybridAttention(nn.Module):
    """Expand channels by attention within contiguous and within strided windows, added (EMOv2).

    EMOv2: Pushing 5M Vision Model Frontier (TPAMI 2025), https://arxiv.org/abs/2412.06674. Queries and keys are
    linear; the expanded values go through a GELU before they are averaged. There is no position bias and no output
    projection. Maps that the window does not divide are padded with zeros on the right and at the bottom before the
    projections, and padded tokens take part, as in the authors' code. Where one window covers the map both patterns are
    the same and one is computed.

    Args:
        dim: Channels C.
        hidden_dim: Expanded channels M.
        dim_head: Channels of a query; C / dim_head heads.
        window_size: Side of a window, tokens; 0 is one window of the whole map.
        partition: "both" patterns, or only "close" (contiguous) or "remote" (strided) windows.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> (B, M, H, W), both channels last in memory.

    Raises:
        ValueError: `dim_head` does not divide C, or the number of heads M.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        dim_head: int,
        window_size: int = 7,
        partition: Partition = "both",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % dim_head or hidden_dim % (dim // dim_head):
            raise ValueError(
                f"dim_head must divide the channels, and the number of heads the expanded channels; got dim_head "
                f"{dim_head} for {dim} channels, expanded to {hidden_dim}."
            )
        self.dim, self.hidden_dim, self.num_heads = dim, hidden_dim, dim // dim_head
        self.window_size, self.partition = window_size, partition
        self.scale = dim_head**-0.5
        self.qkv = nn.Linear(dim, 2 * dim + hidden_dim, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            require_leaf(self, x)
        height, width = x.shape[2], x.shape[3]
        size = (self.window_size, self.window_size) if self.window_size > 0 else (height, width)
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C): the projections are plain matrix products
        below, right = (size[0] - height % size[0]) % size[0], (size[1] - width % size[1]) % size[1]
        if below > 0 or right > 0:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        grid = (x.shape[1] // size[0], x.shape[2] // size[1])
        q, k, v = self.qkv(x).split((self.dim, self.dim, self.hidden_dim), dim=-1)
        v = self.act(v)
        if self.partition != "both":
            out = self._attend(q, k, v, grid, size, self.partition == "remote")
        elif grid[0] == 1 and grid[1] == 1:
            out = 2 * self._attend(q, k, v, grid, size, False)
        else:
            close = self._attend(q, k, v, grid, size, False)
            out = close + self._attend(q, k, v, grid, size, True)
        if below > 0 or right > 0:
            out = out[:, :height, :width].contiguous()
        return out.permute(0, 3, 1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], size: tuple[int, int], remote: bool
    ) -> Tensor:
        """Attend within the windows of one pattern: maps (B, H, W, C | C | M) -> (B, H, W, M)."""
        q = _to_windows(q, self.num_heads, size, remote)
        k = _to_windows(k, self.num_heads, size, remote)
        v = _to_windows(v, self.num_heads, size, remote)
        if q.device.type == "cpu":  # values are wider than queries: no fused kernel there, and its fallback is slower
            if self.scale != 1.0:
                q = q * self.scale
            out = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return _from_windows(out, grid, size, remote)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the scale of the scores into the query projection, in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.scale == 1.0:
            return ()
        require_mergeable(self)
        self.qkv.weight[: self.dim] *= self.scale
        self.qkv.bias[: self.dim] *= self.scale
        self.scale = 1.0
        return ("query scale",)
