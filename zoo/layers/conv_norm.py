"""Convolutions and linear layers with a BatchNorm, and the branches around them that fold into one convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo.layers.own import is_own, require_mergeable

__all__ = [
    "ConvNorm",
    "NormLinear",
    "RepConv",
    "average_heads",
    "fold_layer_norm",
    "fold_norm_into_linear",
    "merged_kernel",
]


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm, no activation; `reparameterize()` leaves one convolution with bias.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Side of the kernel, pixels.
        stride: Stride, pixels.
        padding: Zeros on each side, pixels; None keeps the size at stride 1.
        dilation: Dilation of the kernel.
        groups: Groups of the convolution.
        bias: Give the convolution a bias too, as some authors do.
        bn_weight_init: Start value of the norm's weight; 0 makes a residual branch start as nothing.
        eps: Of the norm.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chs, H, W) -> (B, out_chs, H', W').
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        bn_weight_init: float = 1.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias=bias, **dd)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(out_chs, eps=eps, **dd)
        nn.init.constant_(self.bn.weight, bn_weight_init)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)

    def example_input(self) -> Tensor:
        """Return a random input of the convolution, (1, in_chs, H, W), a little larger than the kernel."""
        weight, side = self.conv.weight, 2 * self.conv.kernel_size[0] + 3
        return torch.randn(1, self.conv.in_channels, side, side, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the norm into the convolution in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.bn is None:
            return ()
        require_mergeable(self)
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        assert self.conv.bias is not None
        self.conv.bias.requires_grad_(self.conv.weight.requires_grad)  # a bias made of nothing would be frozen
        self.bn = None
        return ("norm",)


class RepConv(nn.Module):
    """Sum of depthwise `ConvNorm`s of several kernel sizes, with or without the input itself; folds into one.

    Args:
        in_chs: Input channels; also the groups.
        out_chs: Output channels, a multiple of `in_chs`.
        kernel_sizes: Odd sides of the kernels, pixels; the largest is that of the merged convolution.
        stride: Stride of every branch, pixels.
        identity: Add the input (only with equal channels and stride 1).
        bn_weight_init: Start value of the norms' weights.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_chs, H, W) -> (B, out_chs, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: A kernel size is even, or `identity` does not fit.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_sizes: Sequence[int],
        stride: int = 1,
        *,
        identity: bool = False,
        bn_weight_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd, or the branches would not align; got {tuple(kernel_sizes)}.")
        if identity and (in_chs != out_chs or stride != 1):
            raise ValueError(f"identity needs equal channels and stride 1, got {in_chs}, {out_chs}, stride {stride}.")
        self.in_chs, self.identity = in_chs, identity
        self.branches: nn.ModuleList | None = nn.ModuleList(
            ConvNorm(
                in_chs,
                out_chs,
                size,
                stride,
                groups=in_chs,
                bn_weight_init=bn_weight_init,
                device=device,
                dtype=dtype,
            )
            for size in kernel_sizes
        )
        self.conv: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.branches is not None:
            outs = [branch(x) for branch in self.branches]
            out = outs[0]
            for other in outs[1:]:
                out = out + other
            return out + x if self.identity else out
        assert self.conv is not None
        if torch.jit.is_scripting():
            return self.conv(x)
        return self._widen(x)

    @torch.jit.unused
    def _widen(self, x: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, self.conv)
        if isinstance(x, Proxy) or not is_own(conv, nn.Conv2d) or conv.out_channels == self.in_chs:
            return conv(x)
        return _widening_depthwise(conv, x)

    def example_input(self) -> Tensor:
        """Return a random input, (1, in_chs, 17, 17)."""
        weight = next(self.parameters())
        return torch.randn(1, self.in_chs, 17, 17, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold norms, smaller kernels and the identity into one depthwise convolution in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.branches is None:
            return ()
        require_mergeable(self)
        branches = cast(list[ConvNorm], list(self.branches))
        for branch in branches:
            branch.reparameterize()
        merged = max((branch.conv for branch in branches), key=lambda conv: conv.kernel_size[0])
        side = merged.kernel_size[0]
        for conv in (branch.conv for branch in branches if branch.conv is not merged):
            assert merged.bias is not None
            assert conv.bias is not None
            merged.weight += F.pad(conv.weight, [(side - conv.kernel_size[0]) // 2] * 4)
            merged.bias += conv.bias
        if self.identity:
            merged.weight[:, :, side // 2, side // 2] += 1
        self.conv, self.branches = merged, None
        return ("norms", "branches", "residual") if self.identity else ("norms", "branches")


def _widening_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Run a convolution with several filters for each channel, in CPU inference one filter of each channel at a time.

    oneDNN has fast kernels for one filter a channel only: with two of 7x7 the parts are 2 to 8 times as fast on one
    Zen 4 core, and it takes a seventeenth of the memory, for it pads every group to 16 channels.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return conv(x)
    filters = conv.out_channels // conv.in_channels
    parts = []
    for index in range(filters):
        bias = None if conv.bias is None else conv.bias[index::filters]
        part = F.conv2d(x, conv.weight[index::filters], bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        parts.append(part.permute(0, 2, 3, 1))
    return torch.stack(parts, -1).flatten(3).permute(0, 3, 1, 2)


class NormLinear(nn.Module):
    """BatchNorm, dropout, linear layer; `reparameterize()` leaves the linear layer.

    Args:
        in_features: Input features.
        out_features: Output features.
        drop: Dropout rate between norm and linear layer.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, in_features) -> (B, out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bn: nn.BatchNorm1d | None = nn.BatchNorm1d(in_features, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)
        self.linear = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.bn is not None:
            x = self.bn(x)
        return self.linear(self.drop(x))

    def example_input(self) -> Tensor:
        """Return a random input, (2, in_features)."""
        weight = self.linear.weight
        return torch.randn(2, self.linear.in_features, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Fold the norm into the linear layer in place.

        Raises:
            RuntimeError: The layer is in training mode.
        """
        if self.bn is None:
            return ()
        require_mergeable(self)
        fold_norm_into_linear(self.bn, self.linear)
        self.bn = None
        return ("norm",)


@torch.no_grad()
def fold_norm_into_linear(norm: nn.BatchNorm1d | nn.BatchNorm2d, linear: nn.Linear | nn.Conv2d) -> None:
    """Fold a BatchNorm into the linear layer or 1x1 convolution (without padding or groups) that follows it, in place.

    W' = W diag(s), b' = b + W (beta - s * mean), with s = gamma / sqrt(var + eps). Only statistics that do not depend
    on the batch can be folded, so the norm has to be in evaluation mode.

    Args:
        norm: Comes first.
        linear: Follows; needs a bias, which is made here if it has none.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - scale * norm.running_mean
    weight = linear.weight.flatten(1)  # (out, in)
    bias = weight @ shift
    bias = bias if linear.bias is None else linear.bias + bias
    linear.bias = nn.Parameter(bias, requires_grad=linear.weight.requires_grad)
    linear.weight.copy_((weight * scale).view_as(linear.weight))


@torch.no_grad()
def average_heads(head: NormLinear, other: NormLinear) -> None:
    """Make a classifier the mean of itself and another one, norms folded, in place.

    Args:
        head: Becomes the mean.
        other: Of the same shape.

    Raises:
        RuntimeError: One of them is in training mode.
    """
    for part in (head, other):
        part.reparameterize()
    head.linear.weight.copy_((head.linear.weight + other.linear.weight) / 2)
    head.linear.bias.copy_((head.linear.bias + other.linear.bias) / 2)


def merged_kernel(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of a convolution with the statistics of the BatchNorm behind it, if there is one."""
    weight, bias = conv.weight, cast(Tensor, conv.bias)
    if not isinstance(norm, nn.BatchNorm2d):
        return weight, bias
    scale = norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
    return weight * scale[:, None, None, None], (bias - cast(Tensor, norm.running_mean)) * scale + norm.bias


@torch.no_grad()
def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """Move a LayerNorm's weight and bias into the linear layer behind it, in place."""
    linear.bias.add_(linear.weight @ norm.bias)
    linear.weight.mul_(norm.weight)
    norm.elementwise_affine = False
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
