"""Attention within rectangular, optionally shifted windows of a map, with a position bias that is a small network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.dispatch import no_autocast
from zoo.layers.kept import Kept
from zoo.layers.own import require_mergeable

__all__ = [
    "DynamicPositionBias",
    "WindowAttention",
]

_FAR = -100.0  # what Swin and its heirs add to the score of two tokens that are no neighbours; not minus infinity


class DynamicPositionBias(nn.Module):
    """Attention bias of every pair of tokens of a window, a network of their offset (CrossFormer, used by DAT).

    Of width 1 it is dead: a LayerNorm over one feature returns its own bias whatever comes in, so that every pair of
    tokens gets the same bias, which the softmax cancels. The parameters then only serve to hold an author's weights.

    Args:
        dim: Width of the network's layers.
        num_heads: Heads h.
        window: Height H and width W of the window, tokens.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    table: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.window, self.num_heads, self.dead = window, num_heads, dim == 1
        self.pos_proj: nn.Module = nn.Linear(2, dim, **dd)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, out, **dd))
            for out in (dim, dim, num_heads)
        )
        self.register_buffer("table", None)
        self._kept = Kept()

    def offset_table(self) -> Tensor:
        """Return the bias of every offset of a query from a key, (h, 2 H - 1, 2 W - 1), from (1 - H, 1 - W) on."""
        if self.table is not None:
            return self.table
        like = next(self.parameters())
        with no_autocast(like):
            return self._network(like)

    def _network(self, like: Tensor) -> Tensor:
        y, x = (torch.arange(1 - side, side, device=like.device, dtype=like.dtype) for side in self.window)
        offsets = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
        for stage in (self.pos_proj, self.pos1, self.pos2, self.pos3):
            offsets = stage(offsets)
        return offsets.permute(2, 0, 1)

    def forward(self) -> Tensor | None:
        """Return the bias (h, H * W, H * W) of queries (first) and keys; where it is dead, a zero, merged None.

        Merged and in evaluation on a CPU it is kept as long as the table is the same.
        """
        if not isinstance(self.pos_proj, nn.Identity):
            table = self.offset_table()
            return 0 * table.sum() if self.dead else self._spread(table)
        return None if self.table is None else self._kept(self.table, self._spread)

    def _spread(self, table: Tensor) -> Tensor:
        """Write the bias of each offset to the pairs that have it: each query sees a cut of the reversed table."""
        height, width = self.window
        cuts = table.flip(1, 2).unfold(1, height, 1).unfold(2, width, 1)  # (h, H - 1 - y, W - 1 - x, H, W)
        return cuts.flip(1, 2).reshape(-1, height * width, height * width)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Replace the network by the table of its values, or by nothing where it is dead, in place.

        Raises:
            RuntimeError: The module is in training mode.
        """
        if isinstance(self.pos_proj, nn.Identity):
            return ()
        require_mergeable(self)
        if not self.dead:
            self.register_buffer("table", self.offset_table().contiguous())
        for name in ("pos_proj", "pos1", "pos2", "pos3"):
            setattr(self, name, nn.Identity())
        return ("dead position bias",) if self.dead else ("position bias",)


class WindowAttention(nn.Module):
    """Attention within windows of a map, padded with zeros on the right and at the bottom where they do not fit.

    Padding takes part: its tokens are keys of score 0 plus bias, with values of 0. Windows of a shifted map that hold
    both ends of the map keep them apart by a mask. There are four kinds of masks (none, last column, last row, corner),
    and one is made for each kind instead of one for each window.

    Args:
        dim: Channels C of queries, keys and values.
        num_heads: Heads h.
        window: Height and width of a window, tokens.
        shift: The map is rolled by half a window, up and to the left.
        bias_dim: Width of the network of the position bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    window: Tensor  # persistent: nothing else in a state dict tells the shape of the windows

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        *,
        shift: bool,
        bias_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.size, self.shift = window, (window[0] // 2, window[1] // 2) if shift else (0, 0)
        self.scale = self.head_dim**-0.5
        self.register_buffer("window", torch.tensor(window, device=device))
        self.pos = DynamicPositionBias(bias_dim, num_heads, window, device=device, dtype=dtype)

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend within all windows at once.

        Args:
            qkv: (B, H, W, 3, C), H and W multiples of the window's sides.

        Returns:
            (B, H, W, C).
        """
        batch, height, width = qkv.shape[:3]
        tall, wide = self.size
        rolled = any(self.shift)
        if rolled:
            qkv = torch.roll(qkv, (-self.shift[0], -self.shift[1]), (1, 2))
        rows, columns = height // tall, width // wide
        shape = (3, batch, rows, columns, self.num_heads, tall * wide, self.head_dim)
        qkv = qkv.unflatten(-1, (self.num_heads, self.head_dim))
        qkv = qkv.unflatten(2, (columns, wide)).unflatten(1, (rows, tall))
        q, k, v = _copy(qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)).view(shape)
        bias = self.pos()
        if bias is not None and bias.ndim == 0:  # dead: a gradient of zeros, for who complains of parameters without
            q, bias = q + bias.to(q.dtype), None
        if not rolled:
            out = self._attend(q, k, v, bias)
        elif torch.compiler.is_compiling() or torch.jit.is_tracing():  # whether a kind is empty depends on the size
            out = self._attend(q, k, v, _add(bias, self._every_mask(rows, columns, q)))
        else:
            kinds = [
                [
                    self._attend(q[:, r, c], k[:, r, c], v[:, r, c], self.masked_bias(bias, i == 1, j == 1, q))
                    for j, c in enumerate((slice(0, columns - 1), slice(columns - 1, columns)))
                ]
                for i, r in enumerate((slice(0, rows - 1), slice(rows - 1, rows)))
            ]
            out = torch.cat([torch.cat(row, 2) for row in kinds], 1)
        out = out.view(batch, rows, columns, self.num_heads, tall, wide, self.head_dim)
        out = _copy(out.permute(0, 1, 4, 2, 5, 3, 6)).view(batch, height, width, self.dim)
        return torch.roll(out, self.shift, (1, 2)) if rolled else out

    def bias(self) -> Tensor | None:
        """Return the position bias (h, tokens, tokens), or None where there is none or it is dead."""
        return None if self.pos.dead else self.pos()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows (B, rows, columns, h, tokens, head)."""
        shape = q.shape
        windows = (part.reshape(-1, *shape[3:]) for part in (q, k, v))
        if q.is_cuda and self.head_dim % 8:  # the fused kernels want whole vectors
            windows = (F.pad(part, (0, -self.head_dim % 8)) for part in windows)
        if mask is not None and mask.ndim == 5:  # one for each window: (rows, columns, h or 1, tokens, tokens)
            mask = mask.expand(shape[0], *mask.shape).reshape(-1, *mask.shape[2:])
        elif mask is not None:
            mask = mask[None]  # of rank 4, or a CPU does not take the fused kernel
        q, k, v = windows
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
            scores = (q * self.scale) @ k.transpose(-2, -1)  # the fused kernel takes three times as long forth and back
            out = (scores if mask is None else scores + mask).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out[..., : self.head_dim].reshape(shape)

    def _regions(self, axis: int, like: Tensor) -> Tensor:
        """Tell for each pixel of a last window whether it is from the map's beginning."""
        return torch.arange(self.size[axis], device=like.device) >= self.size[axis] - self.shift[axis]

    def masked_bias(self, bias: Tensor | None, last_row: bool, last_column: bool, like: Tensor) -> Tensor | None:
        """Return the bias with the mask of one kind of window, (h or 1, tokens, tokens), or None for neither."""
        if not (last_row or last_column):
            return None if bias is None else bias.to(like.dtype)
        rows = self._regions(0, like) & last_row
        columns = self._regions(1, like) & last_column
        region = (2 * rows[:, None] + columns[None, :].to(torch.int64)).flatten()
        mask = torch.where(region[:, None] == region, 0.0, _FAR).to(like.dtype)
        return mask[None] if bias is None else bias.to(like.dtype) + mask

    def _every_mask(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return the mask of every window, (rows, columns, 1, tokens, tokens)."""
        regions = []
        for axis, windows in enumerate((rows, columns)):
            last = torch.arange(windows, device=like.device) == windows - 1
            regions.append(last[:, None] & self._regions(axis, like))
        region = 2 * regions[0][:, None, :, None] + regions[1][None, :, None, :].to(torch.int64)
        region = region.flatten(2)  # (rows, columns, tokens)
        far = region[..., :, None] != region[..., None, :]
        return torch.where(far, _FAR, 0.0).to(like.dtype)[:, :, None]


def _copy(x: Tensor) -> Tensor:
    """Return a copy that is contiguous; a program for any size must not ask whether one is needed."""
    return x.clone(memory_format=torch.contiguous_format)


def _add(bias: Tensor | None, mask: Tensor) -> Tensor:
    return mask if bias is None else bias.to(mask.dtype) + mask
