"""LSNet's use of small kernel aggregation, a depthwise convolution whose kernels differ from pixel to pixel.

LSNet: See Large, Focus Small (CVPR 2025), https://arxiv.org/abs/2503.23135.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.kernels import ska
from zoo.kernels.dispatch import runs_kernel
from zoo.kernels.ska import ska_formula
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.own import require_mergeable
from zoo.layers.tracing import require_leaf

__all__ = ["KernelPredictor", "LSConv", "swap_axes"]


class KernelPredictor(nn.Module):
    """Predict from a 7x7 surrounding one 3x3 kernel a pixel for each of C / 8 sets of channels, unnormalised.

    Paper, section 3.2 (large-kernel perception, without its last norm).

    Args:
        dim: Channels C, a multiple of 8.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> (B, 9 * C / 8, H, W).
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.sets, self.taps = dim // 8, 9
        self.cv1 = ConvNorm(dim, dim // 2, **dd)
        self.act = nn.ReLU()
        self.cv2 = ConvNorm(dim // 2, dim // 2, 7, groups=dim // 2, **dd)
        self.cv3 = ConvNorm(dim // 2, dim // 2, **dd)
        self.cv4 = nn.Conv2d(dim // 2, self.taps * self.sets, 1, **dd)
        self.norm = nn.GroupNorm(self.sets, self.taps * self.sets, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv4(self.act(self.cv3(self.cv2(self.act(self.cv1(x))))))


@register_notrace_module  # the shifts depend on the map's size, which torch.fx cannot follow
class LSConv(nn.Module):
    """Apply predicted kernels, normalise, add the input: "large-small convolution", paper, section 3.2.

    `reparameterize()` folds the norm into a scale and a shift, and orders the predicted kernels tap by tap, so that in
    channels-last maps the numbers of one tap are neighbours.

    Args:
        dim: Channels C, a multiple of 8.
        drop_path: Rate at which a sample skips the branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, C, H, W) -> the same.
    """

    kernel_operators = ("ska",)

    def __init__(
        self,
        dim: int,
        *,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.lkp = KernelPredictor(dim, device=device, dtype=dtype)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.scale: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            require_leaf(self, x)
        scale, shift = self.scale, self.shift
        kernels = self.lkp(x)
        if self.bn is not None:
            kernels = self.lkp.norm(kernels).unflatten(1, (self.lkp.sets, self.lkp.taps))
            return x + self.drop_path(self.bn(ska(x, kernels)))
        assert scale is not None
        assert shift is not None
        if not torch.jit.is_scripting():
            self._require_own_norm()
        # The group norm, whose groups are not neighbours here.
        kernels = kernels.unflatten(1, (self.lkp.taps, self.lkp.sets))  # (B, 9, G, H, W)
        centred = kernels - kernels.mean((1, 3, 4), keepdim=True)
        variance = centred.square().mean((1, 3, 4), keepdim=True)
        gamma = self.lkp.norm.weight.view(self.lkp.taps, -1, 1, 1) * torch.rsqrt(variance + self.lkp.norm.eps)
        kernels = torch.addcmul(self.lkp.norm.bias.view(self.lkp.taps, -1, 1, 1), centred, gamma).transpose(1, 2)
        if not torch.jit.is_scripting():
            adds_apart = torch.is_grad_enabled() or runs_kernel("ska", x, kernels)
            if adds_apart:
                return x + shift.view(-1, 1, 1) + ska(x * scale.view(-1, 1, 1), kernels)
        return ska_formula(x * scale.view(-1, 1, 1), kernels, x + shift.view(-1, 1, 1))

    @torch.jit.unused
    def _require_own_norm(self) -> None:
        norm = self.lkp.norm
        if type(norm) is not nn.GroupNorm:
            raise RuntimeError(
                f"The kernels of a merged LSConv are ordered tap by tap, and only its own GroupNorm knows of that: its "
                f"lkp.norm is a {type(norm).__name__}. Replace it before merging."
            )

    def example_input(self) -> Tensor:
        """Return a random input, (1, C, 9, 9)."""
        weight = self.lkp.cv4.weight
        return torch.randn(1, self.dim, 9, 9, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the norm behind the aggregation into its scale and shift, and reorder the kernels, in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.bn is None:
            return ()
        require_mergeable(self)
        for layer in (self.lkp.cv1, self.lkp.cv2, self.lkp.cv3):
            layer.reparameterize()
        bn = self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(bn.bias - scale * bn.running_mean)
        self.bn = None
        for parameter in (*self.lkp.cv4.parameters(), *self.lkp.norm.parameters()):
            parameter.copy_(swap_axes(parameter, self.lkp.sets, self.lkp.taps))
        return ("norms", "kernel order")


def swap_axes(values: Tensor, first: int, second: int) -> Tensor:
    """Reorder entries of the first dimension, first * second of them, so that the second index comes first."""
    return values.unflatten(0, (first, second)).transpose(0, 1).flatten(0, 1)
