"""Tiny models of every kind that can be exported."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from registered import BACKBONES, RESTORERS, build, randomize
from torch import nn


def _denoiser() -> nn.Module:
    from zoo.diffusion import PixelDiT

    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, patch_size=2, num_classes=4)
    return randomize(PixelDiT(**sizes)).eval()


class MultipleOfFour(nn.Module):
    """A restorer that halves twice and doubles twice, and so wants sides that are a multiple of four."""

    scale = 1
    multiple_of = 4
    in_chans = 3

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 48, 4, stride=4)
        self.up = nn.PixelShuffle(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.up(self.down(x))


EXPORTED: dict[str, Callable[[], nn.Module]] = {
    **{family: (lambda family=family: build(family)) for family in (*BACKBONES, *RESTORERS)},
    "affnet": lambda: build("affnet", depths=(1, 1, 1)),  # a node of its open sizes takes 30 ms to trace
    "pixel_dit": _denoiser,
    "multiple_of_four": lambda: MultipleOfFour().eval(),
}
"""One model of each registered family, a denoiser, and a restorer whose sides must be a multiple of four."""


def size_of(name: str) -> int | None:
    """Return the side at which a classifier of any size is exported here; the published one would take long."""
    if name not in BACKBONES:
        return None
    model = timm.create_model(BACKBONES[name][0], device="meta")
    return None if model.pretrained_cfg["fixed_input_size"] else 64
