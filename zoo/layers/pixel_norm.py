"""Layer norm over the channels of each pixel, as Restormer has it: with or without taking the mean away."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PixelNorm"]


class PixelNorm(nn.Module):
    """Normalise the channels of each pixel by their standard deviation, with or without taking their mean away.

    Args:
        dim: Channels C.
        bias_free: Leave the mean in, and add no bias; the deviation is about the mean all the same.

    Shape:
        (..., C) -> the same.
    """

    def __init__(
        self, dim: int, bias_free: bool, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.bias_free, self.eps = bias_free, 1e-5
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(dim, **dd))
        self.bias = None if bias_free else nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        if not self.bias_free:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        variance = (wide - wide.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        out = (wide * (variance + self.eps).rsqrt()).to(x.dtype)
        return out if self.weight is None else out * self.weight

    def fold_into(self, linear: nn.Linear) -> None:
        """Move weight and bias into the linear layer behind."""
        if self.bias is not None:
            linear.bias = nn.Parameter(linear.weight @ self.bias, requires_grad=linear.weight.requires_grad)
        linear.weight.mul_(cast(Tensor, self.weight))
        self.weight = self.bias = None
