"""Restormer on one image strip by strip: each block updates its map in place, and holds little beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.strips import RowWindow, add_product, strips
from zoo.restoration.streaming import FeatureMap, Workspace

if TYPE_CHECKING:
    from zoo.restoration.restormer import Restormer, RestormerBlock

__all__ = ["MULTIPLE", "StripRun", "aligned", "padding_mode", "strip_rows"]

MULTIPLE = 8  # of height and width inside the network


def aligned(side: int) -> int:
    """Return a side of the image inside the network."""
    return -(-side // MULTIPLE) * MULTIPLE


def padding_mode(side: int, pad: int) -> str:
    """Mirroring needs more pixels than it makes."""
    return "reflect" if pad < side else "replicate"


def strip_rows(width: int, channels: int, itemsize: int, strip_bytes: int) -> int:
    """Return how many rows of a map make a strip."""
    return max(strip_bytes // (width * channels * itemsize), 1)


class StripRun:
    """One image on its way through the network by strips, in maps that the blocks update in place.

    Args:
        model: The network.
        image: (in_chans, H, W).
        restored: Receives the result, (out_chans, H, W).
        workspace: Makes the maps.
        strip_bytes: Size of the widest map of a strip, as far as one row is not larger.
        keep_values: Store the values of an attention for its second pass over the map.
        tell: Told how much work is done.
    """

    def __init__(
        self,
        model: Restormer,
        image: Tensor,
        restored: Tensor,
        workspace: Workspace,
        strip_bytes: int,
        *,
        keep_values: bool = False,
        tell: Callable[[int], object] = lambda units: None,
    ) -> None:
        self.model, self.image, self.restored, self.workspace = model, image, restored, workspace
        self.strip_bytes, self.keep_values, self.tell = strip_bytes, keep_values, tell

    def run(self) -> None:
        """Restore the image."""
        model = self.model
        height, width = (aligned(side) for side in self.image.shape[1:])
        skip1 = self._new(height, width, model.dim)
        self._fill(skip1, self._embedded())
        self._level(model.encoder_level1, skip1)
        skip2 = self._down(model.down1_2, skip1)
        self._level(model.encoder_level2, skip2, 2)
        skip3 = self._down(model.down2_3, skip2)
        self._level(model.encoder_level3, skip3, 4)
        y = self._down(model.down3_4, skip3)
        self._level(model.latent, y, 8)
        y = self._up(model.up4_3, y, skip3, model.reduce_chan_level3)
        self._level(model.decoder_level3, y, 4)
        y = self._up(model.up3_2, y, skip2, model.reduce_chan_level2)
        self._level(model.decoder_level2, y, 2)
        y = self._up(model.up2_1, y, skip1, None)
        self._level(model.decoder_level1, y, 4)
        self._level(model.refinement, y, 4)
        if model.skip_conv is not None:
            self._add_embedded(y, model.skip_conv.weight)
        self._finish(y)

    def _new(self, height: int, width: int, channels: int) -> FeatureMap:
        return self.workspace.new(height, width, channels, channels_first=True)

    def _rows(self, width: int, channels: int) -> int:
        return strip_rows(width, channels, self.workspace.dtype.itemsize, self.strip_bytes)

    def _level(self, blocks: nn.Sequential, x: FeatureMap, cost: int = 1) -> None:
        """Run blocks in place; `cost` is that of a row, where one of the first level costs 1."""
        values = self._new(*x.shape) if self.keep_values else None
        for block in cast("list[RestormerBlock]", list(blocks)):
            rows = self._rows(x.shape[1], 2 * block.ffn.hidden_dim)
            block.update(x, values, rows, lambda done: self.tell(done * cost))
        if values is not None:
            values.release()

    def _fill(self, target: FeatureMap, parts: Iterator[Tensor]) -> None:
        done = 0
        for strip in parts:
            target.write(done, strip)
            done += strip.shape[1]

    def _strips(self, x: FeatureMap, rows: int) -> Iterator[Tensor]:
        return (x.read(first, end) for first, end in strips(x.shape[0], rows))

    def _convolved(
        self, conv: nn.Conv2d, parts: Iterator[Tensor], height: int, width: int, rows: int
    ) -> Iterator[Tensor]:
        """Yield strips of a 3x3 convolution, one row behind the given ones."""
        window = RowWindow(conv.in_channels, height, rows, width, self.workspace.device, self.workspace.dtype)
        for strip in parts:
            window.open(strip.shape[1]).copy_(strip)
            if window.fresh:
                yield F.conv2d(window.seen.unsqueeze(0), conv.weight, padding=(0, 1))[0]
            window.advance()

    def _embedded(self) -> Iterator[Tensor]:
        """Yield strips of the first convolution, of the image continued to multiples of 8."""
        height, width = self.image.shape[1:]
        below, right = -height % MULTIPLE, -width % MULTIPLE
        last = range(height - 2, height - 2 - below, -1) if below < height else [height - 1] * below
        order = torch.tensor([*range(height), *last], device=self.image.device)
        rows = self._rows(width + right, 2 * self.model.dim)

        def parts() -> Iterator[Tensor]:
            for first, end in strips(height + below, rows):
                strip = self.image.index_select(1, order[first:end]) if end > height else self.image[:, first:end]
                strip = strip.to(self.workspace.device, self.workspace.dtype)
                yield F.pad(strip, (0, right), padding_mode(width, right)) if right else strip

        return self._convolved(self.model.patch_embed, parts(), height + below, width + right, rows)

    def _down(self, conv: nn.Conv2d, x: FeatureMap) -> FeatureMap:
        """Return a new map of half the sides and twice the channels."""
        height, width, channels = x.shape
        target, rows = self._new(height // 2, width // 2, 2 * channels), self._rows(width, 2 * channels)

        def parts() -> Iterator[Tensor]:
            waiting: Tensor | None = None
            for strip in self._convolved(conv, self._strips(x, rows), height, width, rows):
                strip = strip if waiting is None else torch.cat([waiting, strip], 1)
                even = strip.shape[1] // 2 * 2
                if even:
                    yield F.pixel_unshuffle(strip[:, :even].unsqueeze(0), 2)[0]
                waiting = strip[:, even:]

        self._fill(target, parts())
        return target

    def _up(self, conv: nn.Conv2d, x: FeatureMap, skip: FeatureMap, reduce: nn.Linear | None) -> FeatureMap:
        """Return a new map of twice the sides: half the channels, joined with the encoder's map; gives both back."""
        height, width, channels = x.shape
        target = self._new(2 * height, 2 * width, channels if reduce is None else channels // 2)
        rows, done = self._rows(width, 4 * channels), 0
        for strip in self._convolved(conv, self._strips(x, rows), height, width, rows):
            larger = F.pixel_shuffle(strip.unsqueeze(0), 2)[0]
            other = skip.read(done, done + larger.shape[1])
            if reduce is None:
                target.write(done, torch.cat([larger, other]))
            else:
                own, others = reduce.weight.chunk(2, 1)
                joined = torch.mm(own, larger.flatten(1)).addmm_(others, other.flatten(1))
                target.write(done, joined.view_as(larger))
            done += larger.shape[1]
        x.release()
        skip.release()
        return target

    def _add_embedded(self, x: FeatureMap, weight: Tensor) -> None:
        """Add the projected first convolution, made anew."""
        done = 0
        for strip in self._embedded():
            x.write(done, add_product(x.read(done, done + strip.shape[1]), weight, strip))
            done += strip.shape[1]

    def _finish(self, x: FeatureMap) -> None:
        """Write the last convolution, and the image on top, to the result."""
        (height, width), done = self.restored.shape[1:], 0
        rows = self._rows(x.shape[1], 2 * x.shape[2])
        for strip in self._convolved(self.model.output, self._strips(x, rows), x.shape[0], x.shape[1], rows):
            end = min(done + strip.shape[1], height)
            strip = strip[:, : max(end - done, 0), :width]
            if self.model.skip_conv is None:
                strip = strip + self.image[:, done:end].to(strip)
            self.restored[:, done:end] = strip
            done += strip.shape[1]
