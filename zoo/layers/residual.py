"""Residual branches, and the depthwise convolution whose residual folds into its kernel."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.layers.conv_norm import ConvNorm
from zoo.layers.own import require_mergeable

__all__ = ["Residual", "ResidualConv"]


class Residual(nn.Module):
    """Add a branch to its input.

    With the attribute `inplace` the sum is written over the branch's output, which then must be a tensor of its own.

    Args:
        m: The branch.
        drop_path: Rate at which a sample skips the branch in training.

    Shape:
        Any -> the same.
    """

    def __init__(self, m: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop_path(self.m(x))
        return out.add_(x) if self.inplace else x + out


class ResidualConv(nn.Module):
    """Add a depthwise 3x3 `ConvNorm` to its input; `reparameterize()` leaves one convolution.

    Args:
        dim: Channels C.
        bn_weight_init: Start value of the norm's weight.
        drop_path: Rate at which a sample skips the branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    def __init__(
        self,
        dim: int,
        *,
        bn_weight_init: float = 1.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.m = ConvNorm(dim, dim, 3, groups=dim, bn_weight_init=bn_weight_init, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x) if self.merged else x + self.drop_path(self.m(x))

    def example_input(self) -> Tensor:
        """Return a random input, (1, C, 9, 9)."""
        return self.m.example_input()

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the norm and the residual, a one at the kernel's centre, into the convolution in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.merged:
            return ()
        require_mergeable(self)
        folded = self.m.reparameterize()
        self.m.conv.weight[:, :, 1, 1] += 1
        self.merged = True
        return (*folded, "residual")
