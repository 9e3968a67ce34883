"""Small kernel aggregation: a depthwise convolution whose kernels differ from pixel to pixel; and LSNet's use of it.

LSNet: See Large, Focus Small (CVPR 2025), https://arxiv.org/abs/2503.23135.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.layers.conv_norm import ConvNorm, require_eval

__all__ = ["KernelPredictor", "LSConv", "aggregate", "plain_ls_conv", "plain_ska", "ska"]


def ska(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve every pixel with kernels of its own; channel c takes kernel c mod G.

    out[b, c, p] = sum_k weight[b, c mod G, k, p] * x[b, c, p + o_k], zeros outside of the map, taps k row by row
    (LSNet, section 3.3). Computed as K shifted multiply-adds on views of the input: neighbourhoods are not copied.
    In training only `x` and `weight` are kept for the backward pass, which is made of shifted multiply-adds too.

    Args:
        x: (B, C, H, W), in any memory format, which the output keeps.
        weight: (B, G, K, H, W), one kernel of K = side * side taps (odd side) for each of G sets; G divides C. It
            is fastest where the same dimension as in `x` is contiguous.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: G does not divide C, or K is not the square of an odd number.
    """
    if x.shape[1] % weight.shape[1] != 0:
        raise ValueError(f"weight must have sets that divide the channels, got {weight.shape[1]} for {x.shape[1]}.")
    side = int(math.sqrt(weight.shape[2]) + 0.5)
    if side * side != weight.shape[2] or side % 2 == 0:
        raise ValueError(f"weight must have the taps of a square kernel of odd side, got {weight.shape[2]}.")
    if not torch.jit.is_scripting():
        recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if recorded and not torch.compiler.is_compiling():
            return _Ska.apply(x, weight, side)
    return aggregate(x, weight, side)


def aggregate(x: Tensor, weight: Tensor, side: int, start: Tensor | None = None) -> Tensor:
    """Compute `ska` from operations that autograd, compilers and exporters know.

    Args:
        x: (B, C, H, W).
        weight: (B, G, side * side, H, W).
        side: Side of the kernels, pixels.
        start: (B, C, H, W), overwritten with its sum with the result; None starts from zero.
    """
    height, width, pad = x.shape[2], x.shape[3], side // 2
    sets = weight.shape[1]
    padded = _by_set(F.pad(x, (pad, pad, pad, pad)), sets)  # (B, C / G, G, H + 2 pad, W + 2 pad)
    if start is None:
        out, first = padded[:, :, :, :height, :width] * weight[:, None, :, 0], 1
    else:
        out, first = _by_set(start, sets), 0
    for tap in range(first, side * side):
        row, column = tap // side, tap % side
        shifted = padded[:, :, :, row : row + height, column : column + width]
        out.addcmul_(shifted, weight[:, None, :, tap])
    return out.flatten(1, 2)


def plain_ska(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `ska` from all neighbourhoods, side by side in memory: oracle of tests, rival in benchmarks."""
    batch, chans, height, width = x.shape
    sets, taps = weight.shape[1:3]
    side = math.isqrt(taps)
    windows = F.unfold(x, side, padding=side // 2).view(batch, chans // sets, sets, taps, height, width)
    return (windows * weight.unsqueeze(1)).sum(3).view(batch, chans, height, width)


def _by_set(x: Tensor, sets: int) -> Tensor:
    """View (B, C, H, W) as (B, C / G, G, H, W)."""
    return x.unflatten(1, (-1, sets))


class _Ska(torch.autograd.Function):
    """`aggregate` with a backward pass that makes no zero-padded copy per tap; it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, side: int) -> Tensor:
        return aggregate(x, weight, side)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        x, weight, ctx.side = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        side, sets = ctx.side, weight.shape[1]
        height, width, pad = x.shape[2], x.shape[3], side // 2
        grad_sets = _by_set(grad, sets)
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            padded = torch.zeros_like(F.pad(x, (pad, pad, pad, pad)))
            view = _by_set(padded, sets)
            for tap in range(side * side):
                row, column = tap // side, tap % side
                view[:, :, :, row : row + height, column : column + width].addcmul_(grad_sets, weight[:, None, :, tap])
            grad_x = padded[:, :, pad : pad + height, pad : pad + width]
        if ctx.needs_input_grad[1]:
            padded = _by_set(F.pad(x, (pad, pad, pad, pad)), sets)
            taps = []
            for tap in range(side * side):
                row, column = tap // side, tap % side
                taps.append((padded[:, :, :, row : row + height, column : column + width] * grad_sets).sum(1))
            grad_weight = torch.stack(taps, 2)
        return grad_x, grad_weight, None


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

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
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

    def __init__(self, dim: int, *, drop_path: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dim = dim
        self.lkp = KernelPredictor(dim, device=device, dtype=dtype)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.scale: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale, self.shift
        kernels = self.lkp(x)
        if self.bn is not None:
            kernels = self.lkp.norm(kernels).unflatten(1, (self.lkp.sets, self.lkp.taps))
            return x + self.drop_path(self.bn(ska(x, kernels)))
        assert scale is not None
        assert shift is not None
        # The group norm, whose groups are not neighbours here.
        kernels = kernels.unflatten(1, (self.lkp.taps, self.lkp.sets))  # (B, 9, G, H, W)
        centred = kernels - kernels.mean((1, 3, 4), keepdim=True)
        variance = centred.square().mean((1, 3, 4), keepdim=True)
        gamma = self.lkp.norm.weight.view(self.lkp.taps, -1, 1, 1) * torch.rsqrt(variance + self.lkp.norm.eps)
        kernels = torch.addcmul(self.lkp.norm.bias.view(self.lkp.taps, -1, 1, 1), centred, gamma).transpose(1, 2)
        if not torch.jit.is_scripting() and torch.is_grad_enabled():
            return x + shift.view(-1, 1, 1) + ska(x * scale.view(-1, 1, 1), kernels)
        return aggregate(x * scale.view(-1, 1, 1), kernels, 3, x + shift.view(-1, 1, 1))

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
        require_eval(self)
        for layer in (self.lkp.cv1, self.lkp.cv2, self.lkp.cv3):
            layer.reparameterize()
        bn = self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(bn.bias - scale * bn.running_mean)
        self.bn = None
        for parameter in (*self.lkp.cv4.parameters(), *self.lkp.norm.parameters()):
            parameter.copy_(_swap(parameter, self.lkp.sets, self.lkp.taps))
        return ("norms", "kernel order")


def _swap(values: Tensor, first: int, second: int) -> Tensor:
    """Reorder entries of the first dimension, first * second of them, so that the second index comes first."""
    return values.unflatten(0, (first, second)).transpose(0, 1).flatten(0, 1)


def plain_ls_conv(layer: LSConv, x: Tensor) -> Tensor:
    """Compute `LSConv` as a port of the authors' code does: group norm, unfolded neighbourhoods, scale, residual.

    Args:
        layer: In training or merged form.
        x: (B, C, H, W).
    """
    predictor, sets = layer.lkp, layer.lkp.sets
    if layer.bn is not None:
        kernels = predictor.norm(predictor(x))
        return x + layer.bn(plain_ska(x, kernels.unflatten(1, (sets, predictor.taps))))
    assert layer.scale is not None
    assert layer.shift is not None
    hidden = predictor.act(predictor.cv3(predictor.cv2(predictor.act(predictor.cv1(x)))))
    cv4, norm = predictor.cv4, predictor.norm
    assert cv4.bias is not None
    weight, bias, gamma, beta = (_swap(v, predictor.taps, sets) for v in (cv4.weight, cv4.bias, norm.weight, norm.bias))
    kernels = F.group_norm(F.conv2d(hidden, weight, bias), sets, gamma, beta, norm.eps)
    out = plain_ska(x, kernels.unflatten(1, (sets, predictor.taps)))
    return x + (out * layer.scale.view(-1, 1, 1) + layer.shift.view(-1, 1, 1))
