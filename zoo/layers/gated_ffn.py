"""Feed-forward network whose two depthwise-convolved halves gate each other (Restormer, Zamir et al., CVPR 2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import dwconv_gate
from zoo.layers.own import is_own

__all__ = ["GatedFFN", "aligned_hidden"]

_ALIGNED = 8  # hidden channels are padded to a multiple: a depthwise convolution of 510 takes twice the time of 512


def aligned_hidden(hidden_dim: int) -> int:
    """Return the number of hidden channels that `GatedFFN.pad_hidden` leaves."""
    return -(-hidden_dim // _ALIGNED) * _ALIGNED


class GatedFFN(nn.Module):
    """Gated-Dconv feed-forward network (GDFN): gelu(a) * b of two depthwise-convolved halves.

    With the attribute `merged` the convolution and the gate are one operator of `zoo.kernels`.

    Args:
        dim: Channels C.
        hidden_dim: Channels of each half.

    Shape:
        (B, H, W, C) -> the same.
    """

    kernel_operators = ("dwconv_gate",)

    def __init__(
        self, dim: int, hidden_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.merged = False
        self.project_in = nn.Linear(dim, 2 * hidden_dim, bias=False, **dd)
        self.dwconv = nn.Conv2d(2 * hidden_dim, 2 * hidden_dim, 3, padding=1, groups=2 * hidden_dim, bias=False, **dd)
        self.project_out = nn.Linear(hidden_dim, dim, bias=False, **dd)

    @property
    def hidden_dim(self) -> int:
        """Channels of each half."""
        return self.project_out.in_features

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.project_in(x).permute(0, 3, 1, 2)
        if self.merged and is_own(self.dwconv, nn.Conv2d) and self.dwconv.bias is None:
            gated = dwconv_gate(hidden, self.dwconv.weight)
        else:
            a, b = self.dwconv(hidden).chunk(2, 1)
            gated = F.gelu(a) * b
        return self.project_out(gated.permute(0, 2, 3, 1))

    def pad_hidden(self) -> bool:
        """Add hidden channels of zeros up to an aligned number; they change nothing, since gelu(0) * 0 = 0."""
        hidden, extra = self.hidden_dim, aligned_hidden(self.hidden_dim) - self.hidden_dim
        if extra == 0:
            return False
        for layer in (self.project_in, self.dwconv):
            halves = layer.weight.unflatten(0, (2, hidden))
            padded = torch.cat([halves, halves.new_zeros(2, extra, *halves.shape[2:])], 1).flatten(0, 1)
            layer.weight = nn.Parameter(padded, requires_grad=layer.weight.requires_grad)
        if self.project_in.bias is not None:
            bias = F.pad(self.project_in.bias.unflatten(0, (2, hidden)), (0, extra)).flatten()
            self.project_in.bias = nn.Parameter(bias, requires_grad=self.project_in.weight.requires_grad)
        last = self.project_out.weight
        self.project_out.weight = nn.Parameter(F.pad(last, (0, extra)), requires_grad=last.requires_grad)
        self.project_in.out_features = self.dwconv.in_channels = self.dwconv.out_channels = 2 * (hidden + extra)
        self.dwconv.groups, self.project_out.in_features = 2 * (hidden + extra), hidden + extra
        return True
