"""Attention with a learned bias for every offset between two tokens of a square window (LeViT, EfficientViT, LSNet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.derived import derive_after_loading
from zoo.layers.kept import Kept

__all__ = ["BiasedAttention", "resize_attention_biases"]


class BiasedAttention(nn.Module):
    """Base class: holds the table of biases and spreads it over the pairs of tokens.

    In evaluation on a CPU the spread bias is kept as long as the table is the same (`Kept`).

    Args:
        num_heads: Heads h.
        resolution: Side r of the window, tokens.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        resolution: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2, device=device, dtype=dtype))
        self._kept = Kept()
        self.resolution = resolution
        self.derive_buffers()
        derive_after_loading(self)

    @torch.jit.unused
    def derive_buffers(self) -> None:
        """Number the offsets of all pairs of tokens, |dy| * r + |dx|, flat (r ** 4)."""
        resolution = self.resolution
        side = torch.arange(resolution, device=self.attention_biases.device)
        y, x = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
        offsets = (y[:, None] - y).abs() * resolution + (x[:, None] - x).abs()
        self.register_buffer("attention_bias_idxs", offsets.flatten(), persistent=False)

    def set_resolution(self, resolution: int) -> None:
        """Change the side of the window, in place; the table is interpolated (`resize_attention_biases`).

        Args:
            resolution: Side of the new window, tokens.
        """
        if resolution == self.resolution:
            return
        table = self.attention_biases
        resized = resize_attention_biases(table.detach(), resolution)
        self.attention_biases = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.resolution = resolution
        self.derive_buffers()

    def attention_bias(self) -> Tensor:
        """Return the bias of every pair of tokens, (h, r * r, r * r)."""
        if not torch.jit.is_scripting():
            return self._bias()
        return self._spread(self.attention_biases)

    @torch.jit.ignore
    def _bias(self) -> Tensor:
        return self._kept(self.attention_biases, self._spread)

    def _spread(self, table: Tensor) -> Tensor:
        tokens = self.resolution * self.resolution  # TorchScript takes ** for a float
        return table.index_select(1, self.attention_bias_idxs).view(-1, tokens, tokens)  # type: ignore[arg-type]


def resize_attention_biases(table: Tensor, resolution: int) -> Tensor:
    """Interpolate a table of biases, bicubic, for another window.

    Args:
        table: (h, r * r), biases by offset, |dy| * r + |dx|.
        resolution: Side of the new window, tokens.

    Returns:
        (h, resolution ** 2).
    """
    side = round(table.shape[1] ** 0.5)
    if side == resolution:
        return table
    grid = F.interpolate(
        table.float().view(1, -1, side, side), size=(resolution, resolution), mode="bicubic", align_corners=False
    )
    return grid.view(-1, resolution**2).to(table.dtype)
