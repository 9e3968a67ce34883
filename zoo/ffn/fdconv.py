"""FDConv: frequency dynamic convolution, for the products and convolutions of convolutional feed-forward layers.

Frequency Dynamic Convolution for Dense Image Prediction (CVPR 2025), https://arxiv.org/abs/2503.18783. The kernel's
spectrum is split into groups of frequencies that cost no parameters and are weighted by the image (FDW); channels,
filters and places are scaled by the image (KSM, its global part); frequency bands of the map are scaled place by
place (FBM). All gates start at one, so that a trained convolution is where training starts. The local part of KSM is
left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.technique import Changes, FFNReport, replace_module

__all__ = ["FDConv2d", "FDConvConfig", "apply", "frequency_groups", "restructure"]


@dataclass(frozen=True, kw_only=True)
class FDConvConfig:
    """How a convolution is made dynamic.

    Args:
        groups: n, groups of frequencies of the kernel.
        reduction: Channels of the gates' hidden layer are those of the input over this.
        bands: Of the map, frequencies below 1 / (2 k) each; empty leaves the map alone.
        pattern: Only convolutions whose name matches this regular expression.

    Raises:
        ValueError: A number is below 1.
    """

    groups: int = 4
    reduction: int = 4
    bands: tuple[int, ...] = (2, 4, 8)
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.groups < 1 or self.reduction < 1 or any(band < 1 for band in self.bands):
            raise ValueError(
                f"groups, reduction and bands are at least 1, got {self.groups}, {self.reduction}, {self.bands}."
            )


def frequency_groups(rows: int, columns: int, groups: int) -> Tensor:
    """Return which group each coefficient of `rfft2` of a (rows, columns) matrix is in, by rising frequency: (R, C)."""
    radius = torch.fft.fftfreq(rows)[:, None].square() + torch.fft.rfftfreq(columns).square()
    order = radius.flatten().argsort(stable=True)
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order)) * groups // len(order)
    return number.view_as(radius)


class FDConv2d(nn.Module):
    """A convolution whose kernel and input bands depend on the image; at the start it equals a plain one.

    Args:
        conv: Convolution with one group and odd kernel, 1x1 or 3x3; its weights are taken over.
        groups: Of frequencies.
        reduction: See `FDConvConfig`.
        bands: Of the map.

    Shape:
        (B, C_in, H, W) -> (B, C_out, H', W').

    Raises:
        ValueError: The convolution has groups, or another kernel.
    """

    group: Tensor

    def __init__(
        self, conv: nn.Conv2d, groups: int = 4, reduction: int = 4, bands: tuple[int, ...] = (2, 4, 8)
    ) -> None:
        super().__init__()
        kernel = conv.kernel_size[0]
        if conv.groups != 1 or conv.kernel_size not in ((1, 1), (3, 3)) or conv.padding_mode != "zeros":
            raise ValueError(f"{conv} cannot be made dynamic: one group, 1x1 or 3x3 and zero padding are needed.")
        self.stride, self.padding, self.dilation, self.kernel = conv.stride, conv.padding, conv.dilation, kernel
        self.in_channels, self.out_channels, self.groups, self.bands = (
            conv.in_channels,
            conv.out_channels,
            groups,
            bands,
        )
        self.weight, self.bias = conv.weight, conv.bias
        kind: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        group = frequency_groups(conv.out_channels * kernel, conv.in_channels * kernel, groups)
        self.register_buffer("group", group.to(kind["device"]), persistent=False)
        hidden = max(4, conv.in_channels // reduction)
        self.squeeze = nn.Linear(conv.in_channels, hidden, **kind)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(hidden, size, **kind)
                for name, size in (
                    ("frequency", groups),
                    ("inputs", conv.in_channels),
                    ("outputs", conv.out_channels),
                    ("places", kernel * kernel),
                )
            }
        )
        self.band_gates = nn.Conv2d(conv.in_channels, max(1, len(bands)), 3, padding=1, **kind) if bands else None
        for layer in (*self.heads.values(), *([self.band_gates] if self.band_gates is not None else [])):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def kernels(self) -> Tensor:
        """Return the kernels of the groups (n, C_out, C_in, k, k), which add up to the kernel."""
        out, inp, k = self.out_channels, self.in_channels, self.kernel
        flat = self.weight.float().permute(0, 2, 1, 3).reshape(out * k, inp * k)
        spectrum = torch.fft.rfft2(flat)
        masks = torch.stack([self.group == number for number in range(self.groups)])
        parts = torch.fft.irfft2(spectrum * masks, s=flat.shape)
        return parts.view(self.groups, out, k, inp, k).permute(0, 1, 3, 2, 4).to(self.weight.dtype)

    def _banded(self, x: Tensor) -> Tensor:
        """Scale each band of the map place by place; bands and rest add up to the map."""
        if self.band_gates is None:
            return x
        gates = 2 * torch.sigmoid(self.band_gates(x))
        spectrum = torch.fft.rfft2(x.float())
        y = torch.fft.fftfreq(x.shape[-2], device=x.device).abs()[:, None]
        z = torch.fft.rfftfreq(x.shape[-1], device=x.device).abs()
        previous, total = x.float(), torch.zeros_like(x, dtype=torch.float32)
        for place, band in enumerate(self.bands):
            low = torch.fft.irfft2(spectrum * (torch.maximum(y, z) < 0.5 / band), s=x.shape[-2:])
            total = total + gates[:, place : place + 1].float() * (previous - low)
            previous = low
        return (total + previous).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        pooled = F.relu(self.squeeze(x.mean((2, 3))))
        gate = {name: 2 * torch.sigmoid(head(pooled)) for name, head in self.heads.items()}
        weight = torch.einsum("bn,noihw->boihw", gate["frequency"], self.kernels())
        weight = weight * gate["inputs"][:, None, :, None, None] * gate["outputs"][:, :, None, None, None]
        weight = weight * gate["places"].view(batch, 1, 1, self.kernel, self.kernel)
        maps = self._banded(x).reshape(1, batch * self.in_channels, *x.shape[2:])  # one group an image
        y = F.conv2d(maps, weight.flatten(0, 1), None, self.stride, self.padding, self.dilation, groups=batch)
        y = y.view(batch, self.out_channels, *y.shape[2:])
        return y if self.bias is None else y + self.bias[:, None, None]


def _convolutions(model: nn.Module, pattern: str | None) -> dict[str, nn.Conv2d]:
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d
        and module.groups == 1
        and module.kernel_size in ((1, 1), (3, 3))
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) > 16
        and (pattern is None or re.search(pattern, name))
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no 1x1 or 3x3 convolution of one group and more than 16 channels"
            + (f" whose name matches {pattern!r}." if pattern else ".")
        )
    return found


def apply(model: nn.Module, config: FDConvConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Make a model's convolutions dynamic, in place: the same output until it is trained.

    Args:
        model: Convolutional, with kernels of 1x1 or 3x3 and more than 16 channels.
        config: How.
        data: Not used.

    Raises:
        ValueError: No convolution is of this kind, or it was done before.
    """
    config = config or FDConvConfig()
    changes = Changes(model, "fdconv")
    convolutions = _convolutions(model, config.pattern)
    for name, conv in convolutions.items():
        new = FDConv2d(conv, config.groups, config.reduction, config.bands)
        changes.replace(name, new, f"{config.groups} groups", (conv.weight.numel(),) * 2)
    return changes.report({name: asdict(config) for name in convolutions})


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Make the same convolutions of a model dynamic; weights are loaded after."""
    for name, facts in layers.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        replace_module(model, name, FDConv2d(conv, facts["groups"], facts["reduction"], tuple(facts["bands"])))
