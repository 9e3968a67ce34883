"""CFSR: Transforming Image Super-Resolution: A ConvFormer-based Efficient Approach (Wu et al., IEEE TIP 33, 2024),
https://arxiv.org/abs/2401.05633. Authors' code: https://github.com/Aitical/CFSR (no licence stated)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.fx import Proxy

from zoo.cfg import RestorationCfg
from zoo.layers.conv_norm import fold_layer_norm
from zoo.layers.derived import derive_after_loading
from zoo.layers.own import first_foreign, require_mergeable
from zoo.streaming.cfsr import BranchRows, even_strips, line_numbers, run_branches, stream
from zoo.weights import build_model, shipped

__all__ = ["CFSR", "detect"]

# Sobel x, Sobel y and Laplacian as the authors' code builds them: two entries sit beside their textbook place.
_EDGE_MASKS = (
    ((0.0, 1.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0)),
    ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0)),
    ((1.0, 0.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0)),
)
_EDGES = ("sobel_x", "sobel_y", "laplacian")
_STRIP_PIXELS = 16384  # calls cost as much as 500 pixels each; maps of larger strips get new pages each time
_SCALES = (2, 3, 4)
_RGB_MEAN = (0.4488, 0.4371, 0.4040)


class _DepthwiseConv(torch.autograd.Function):
    """Depthwise convolution whose weight gradient is computed in strips of three kernel columns.

    oneDNN has a fast weight gradient for kernels up to three wide only: at 9x9, batch 16, 48 channels, 32x32 and one
    thread of a Zen 4 core, 18 ms become 5 ms (float32) and 25 ms become 2 ms (bfloat16).
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = (saved.to(grad.dtype) for saved in ctx.saved_tensors)  # autocast may have lowered the output
        channels, _, size, _ = weight.shape
        half, width = size // 2, x.shape[-1]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=half, groups=channels)
        if ctx.needs_input_grad[1]:
            padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, half, half, half, half)).permute(0, 3, 1, 2)
            strips = []
            for column in range(0, size, 3):
                columns = min(3, size - column)
                strips.append(
                    torch.ops.aten.convolution_backward(
                        grad,
                        padded[..., column : column + width + columns - 1],
                        weight[..., column : column + columns],
                        None,
                        [1, 1],
                        [0, 0],
                        [1, 1],
                        False,
                        [0, 0],
                        channels,
                        [False, True, False],
                    )[1]
                )
            grad_weight = torch.cat(strips, 3)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of odd kernel size on channels-last maps, with bias and zero padding.

    Args:
        dim: Channels.
        kernel_size: Odd, in pixels.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)
    """

    bias: nn.Parameter

    def __init__(
        self, dim: int, kernel_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, more: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Convolve with the module's kernel and bias; with `more`, the sum of these and another kernel and bias."""
        weight: Tensor = self.weight
        bias: Any = self.bias
        if more is not None:
            weight, bias = weight + more[0], bias + more[1]
        x = x.permute(0, 3, 1, 2)
        strips = self.training and not isinstance(x, Proxy) and x.device.type == "cpu" and weight.shape[-1] > 3
        if strips:
            return _DepthwiseConv.apply(x, weight, bias).permute(0, 2, 3, 1)
        return self._conv_forward(x, weight, bias).permute(0, 2, 3, 1)

    def inner_rows(self, x: Tensor) -> Tensor:
        """Convolve without padding above and below: (B, H + kernel_size - 1, W, dim) -> (B, H, W, dim)."""
        padding, groups = (0, self.weight.shape[-1] // 2), len(self.weight)
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=padding, groups=groups).permute(
            0, 2, 3, 1
        )


class ConvMixer(nn.Module):
    """Mix pixels by a large depthwise convolution and gate the result: `proj(conv(gelu(a)) * v)`.

    Args:
        dim: Channels.
        kernel_size: Of the depthwise convolution, pixels.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)
    """

    def __init__(
        self, dim: int, kernel_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.expand = nn.Linear(dim, 2 * dim, **dd)  # a and v in one product
        self.conv = DepthwiseConv(dim, kernel_size, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.halo = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        a, v = self.expand(x).chunk(2, dim=-1)
        return self.proj(self.conv(F.gelu(a)) * v)

    def ahead(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what is computed of each pixel by itself: both gates, each in memory of its own."""
        dim, weight, bias = x.shape[-1], self.expand.weight, cast(Tensor, self.expand.bias)
        a, v = F.linear(x, weight[:dim], bias[:dim]), F.linear(x, weight[dim:], bias[dim:])
        return torch.ops.aten.gelu_(a), v

    def mix(self, gate: Tensor, v: Tensor) -> Tensor:
        """Return the mixed map of both gates, of which the first has `halo` more rows above and below."""
        return self.proj(self.conv.inner_rows(gate).mul_(v))


def _mask_table(channels: int) -> Tensor:
    """The authors' masks: (edges * channels, 1, 3, 3)."""
    return torch.tensor(_EDGE_MASKS)[:, None].repeat(1, channels, 1, 1).flatten(0, 1).unsqueeze(1)


def _edge_sum(scale: Tensor, bias: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of scaled edge filters, (channels, 1, 3, 3), and of their biases."""
    return (scale.view(-1, 1, 1, 1) * masks).view(scale.shape[0], scale.shape[1], 1, 3, 3).sum(0), bias.sum(0)


class EdgeFFN(nn.Module):
    """Feed-forward network with a depthwise 3x3 that is the sum of a free kernel and of scaled edge filters.

    The four kernels are added before the convolution, in training too: the same sum for a quarter of the work.

    Args:
        dim: Channels.
        hidden_dim: Channels between the two linear layers.
        edge_branches: Have the edge filters; False is the merged form.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)
    """

    halo = 1
    edge_scale: nn.Parameter | None
    edge_bias: nn.Parameter | None
    edge_masks: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        edge_branches: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.pos = DepthwiseConv(hidden_dim, 3, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        if edge_branches:
            edges = len(_EDGES)
            self.edge_scale = nn.Parameter(torch.empty(edges, hidden_dim, **dd))
            self.edge_bias = nn.Parameter(torch.empty(edges, hidden_dim, **dd))
            self.register_buffer("edge_masks", torch.empty(edges * hidden_dim, 1, 3, 3, **dd))  # rank 4: channels_last
            self.reset_edges()
        else:
            self.drop_edges()

    def reset_edges(self) -> None:
        """Draw scales and biases anew, as small random numbers, and set the masks."""
        if self.edge_scale is None or self.edge_bias is None or self.edge_masks is None:
            return
        nn.init.normal_(self.edge_scale, std=1e-3)
        nn.init.normal_(self.edge_bias, std=1e-3)
        if not self.edge_masks.is_meta:
            self.edge_masks.copy_(_mask_table(self.edge_scale.shape[1]))

    def drop_edges(self) -> None:
        """Turn the edge branches off."""
        self.register_parameter("edge_scale", None)
        self.register_parameter("edge_bias", None)
        self.register_buffer("edge_masks", None)

    def edges(self) -> tuple[Tensor, Tensor] | None:
        """Return kernel (hidden_dim, 1, 3, 3) and bias (hidden_dim,) of all edge filters; None in the merged form."""
        if self.edge_scale is None or self.edge_bias is None or self.edge_masks is None:
            return None
        return _edge_sum(self.edge_scale, self.edge_bias, self.edge_masks)

    def forward(self, x: Tensor) -> Tensor:
        h, edges = F.gelu(self.fc1(x)), self.edges()
        if edges is None:
            edge = self.pos(h)
        elif isinstance(self.pos, DepthwiseConv):
            edge = self.pos(h, edges)
        else:  # an adapter around it, which knows of one input only
            more = F.conv2d(h.permute(0, 3, 1, 2), *edges, padding=1, groups=h.shape[3])
            edge = self.pos(h) + more.permute(0, 2, 3, 1)
        return self.fc2(h + F.gelu(edge))

    def ahead(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what is computed of each pixel by itself: the widened map."""
        return (torch.ops.aten.gelu_(self.fc1(x)),)

    def mix(self, h: Tensor) -> Tensor:
        """Return the result of the widened map of as many rows and `halo` more above and below."""
        edge = torch.ops.aten.gelu_(self.pos.inner_rows(h))
        return self.fc2(edge.add_(h[:, 1:-1]))


def _by_strips(x: Tensor) -> bool:
    """Whether a merged block should run strip by strip: CPU inference, where its wide maps then stay in the cache.

    At 256x256 and one thread that is 1.4 times as fast as whole maps, and needs half the memory. Compilers and
    exporters get the whole map, which leaves the height free.
    """
    eager = not (isinstance(x, Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing())
    return eager and x.device.type == "cpu" and not torch.is_grad_enabled()


class CFSRBlock(nn.Module):
    """One ConvFormer block: gated large-kernel mixing, then the edge-preserving feed-forward network.

    Args:
        dim: Channels.
        kernel_size: Of the mixer's depthwise convolution, pixels.
        mlp_ratio: Hidden channels of the feed-forward network over `dim`.
        edge_branches: Training form with edge filters, or merged form.
        layer_scale_init: First value of the two layer scales.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float,
        edge_branches: bool,
        layer_scale_init: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.merged = False
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = ConvMixer(dim, kernel_size, **dd)
        self.scale1: nn.Module = LayerScale(dim, layer_scale_init, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.ffn = EdgeFFN(dim, int(dim * mlp_ratio), edge_branches, **dd)
        self.scale2: nn.Module = LayerScale(dim, layer_scale_init, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and _by_strips(x) and first_foreign(self, _OWN) is None:
            return run_branches(x, self.rows(), max(_STRIP_PIXELS // x.shape[2], self.mixer.halo))
        x = x + self.scale1(self.mixer(self.norm1(x)))
        return x + self.scale2(self.ffn(self.norm2(x)))

    def rows(self) -> list[BranchRows]:
        """Return what takes a map through the merged block by strips of rows."""
        return [BranchRows(self.norm1, self.mixer), BranchRows(self.norm2, self.ffn)]

    def example_input(self) -> Tensor:
        """Return a random map (1, 16, 16, dim) on which the block can be compared before and after merging."""
        weight = self.mixer.proj.weight
        return torch.randn(1, 16, 16, weight.shape[0], device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Merge the edge filters and fold layer scales and affine norms into the linear layers; exact, in place.

        Returns:
            What was folded, in words; nothing the second time.

        Raises:
            RuntimeError: The block is in training mode.
        """
        if self.merged:
            return ()
        require_mergeable(self)
        edges = self.ffn.edges()
        if edges is not None:
            position: Any = self.ffn.pos
            position.weight += edges[0]
            position.bias += edges[1]
            self.ffn.drop_edges()
        fold_layer_norm(self.norm1, self.mixer.expand)
        fold_layer_norm(self.norm2, self.ffn.fc1)
        _fold_scale(cast(LayerScale, self.scale1), self.mixer.proj)
        _fold_scale(cast(LayerScale, self.scale2), self.ffn.fc2)
        self.scale1, self.scale2, self.merged = nn.Identity(), nn.Identity(), True
        return (*(("edge branches",) if edges is not None else ()), "affine norms", "layer scales")


_OWN = (nn.Linear, DepthwiseConv, nn.LayerNorm, nn.Identity, ConvMixer, EdgeFFN)


def _fold_scale(scale: LayerScale, linear: nn.Linear) -> None:
    """Move a layer scale into the linear layer before it."""
    linear.weight.mul_(scale.gamma[:, None])
    cast(Tensor, linear.bias).mul_(scale.gamma)


class CFSRStage(nn.Module):
    """Blocks, then a 1x1 convolution with a residual connection around it.

    Args:
        dim: Channels.
        depth: Blocks.
        block_args: Further arguments of `CFSRBlock`.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)
    """

    def __init__(self, dim: int, depth: int, block_args: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(CFSRBlock(dim, **block_args) for _ in range(depth)))
        dd = {"device": block_args["device"], "dtype": block_args["dtype"]}
        self.conv = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x + self.conv(x)


class CFSR(nn.Module):
    """Upscale an image with a ConvFormer (Wu et al., IEEE TIP 2024, arXiv 2401.05633).

    Maps are channels-last inside and the two gates of the mixer come from one linear layer; the result is the
    authors' up to rounding. `reparameterize()` makes the form for inference.

    Args:
        scale: Integer factor, 2, 3 or 4.
        in_chans: Channels of input and output.
        embed_dim: Channels of the body.
        depths: Blocks of each stage.
        kernel_size: Of the large depthwise convolutions, pixels.
        mlp_ratio: Hidden channels of the feed-forward networks over `embed_dim`.
        edge_branches: Training form with Sobel and Laplacian branches; False is the merged form that the authors
            publish, with the same functions and fewer parameters.
        layer_scale_init: First value of the layer scales. The authors' 1e-6 needs a long training.
        interpolation_init: Let the untrained network interpolate: the image passes through the first channels of the
            outer residual path, and the body adds nothing yet. For short trainings.
        merged: Build the form that `reparameterize()` leaves, to load weights saved after it.
        num_classes: Accepted because timm passes it; must be 0.

    Shape:
        (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale * H, scale * W), not clamped; any H and W.

    Raises:
        ValueError: `scale` is not 2, 3 or 4, `kernel_size` is even, or `num_classes` is not 0.
    """

    multiple_of = 1
    streams_rows = True  # `stream` takes `write`, and is as fast as whole maps
    mean: Tensor

    @property
    def bytes_per_pixel(self) -> int:
        """Working memory of the forward pass on a CPU, in bytes per input pixel in float32."""
        merged = all(block.merged for block in self.modules() if isinstance(block, CFSRBlock))
        return 4 * ((6 if merged else 12) * self.conv_first.out_channels + 2 * self.upsample.out_channels)

    def __init__(
        self,
        scale: int = 2,
        in_chans: int = 3,
        embed_dim: int = 48,
        depths: tuple[int, ...] = (6, 6),
        kernel_size: int = 9,
        mlp_ratio: float = 2.0,
        edge_branches: bool = True,
        layer_scale_init: float = 1e-6,
        *,
        interpolation_init: bool = False,
        merged: bool = False,
        num_classes: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale not in _SCALES:
            raise ValueError(f"scale must be 2, 3 or 4, got {scale}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        if num_classes:
            raise ValueError(f"CFSR restores images and has no classes: num_classes must be 0, got {num_classes}.")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.scale, self.in_chans, self.num_classes = scale, in_chans, num_classes
        self.kernel_size, self.depths = kernel_size, tuple(depths)
        block_args = dict(
            kernel_size=kernel_size,
            mlp_ratio=mlp_ratio,
            edge_branches=edge_branches,
            layer_scale_init=layer_scale_init,
            **dd,
        )
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1, **dd)
        self.layers = nn.Sequential(*(CFSRStage(embed_dim, depth, block_args) for depth in depths))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, **dd)
        self.upsample = nn.Conv2d(embed_dim, in_chans * scale**2, 3, padding=1, **dd)
        self.shuffle = nn.PixelShuffle(scale)
        if interpolation_init:
            self._init_interpolation()
        self.derive_buffers()
        derive_after_loading(self)
        if merged:
            self.eval().reparameterize()

    def derive_buffers(self) -> None:
        """Make the mean of the authors' training pictures, on the device of the weights."""
        weight = self.conv_first.weight
        mean = torch.tensor(_RGB_MEAN) if self.in_chans == 3 else torch.zeros(self.in_chans)
        self.register_buffer("mean", mean.view(1, -1, 1, 1).to(weight), persistent=False)

    @torch.no_grad()
    def _init_interpolation(self) -> None:
        """Route the image through the first channels; each output phase is a quadratic through three pixels."""
        chans, scale = self.in_chans, self.scale
        self.conv_after_body.weight.zero_()
        nn.init.dirac_(self.conv_first.weight[:chans])
        for conv in (self.conv_first, self.conv_after_body, self.upsample):
            cast(Tensor, conv.bias).zero_()
        offset = (torch.arange(scale) + 0.5) / scale - 0.5  # of the output pixels, in input pixels
        taps = torch.stack([offset * (offset - 1) / 2, 1 - offset**2, offset * (offset + 1) / 2], 1)
        kernels = (taps[:, None, :, None] * taps[None, :, None, :]).flatten(0, 1)  # (scale^2, 3, 3)
        self.upsample.weight.mul_(0.1)
        for chan, weight in enumerate(self.upsample.weight.unflatten(0, (chans, -1))):
            weight[:, chan] = kernels.to(weight)

    @property
    def receptive_field(self) -> int:
        """How far an output pixel looks, as a radius in input pixels."""
        return sum(self.depths) * (self.kernel_size // 2 + 1) + 3

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before upsampling: (B, in_chans, H, W) -> (B, embed_dim, H, W)."""
        shallow = self.conv_first((x - self.mean).contiguous(memory_format=torch.channels_last))
        deep = self.norm(self.layers(shallow.permute(0, 2, 3, 1)))  # (B, H, W, C)
        return self.conv_after_body(deep.permute(0, 3, 1, 2)) + shallow

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.shuffle(self.upsample(x)) + self.mean

    @torch.no_grad()
    def stream(
        self,
        x: Tensor,
        *,
        memory: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        write: Callable[[int, int, Tensor], object] | None = None,
    ) -> Tensor | None:
        """Return what `forward` returns in the merged form, up to rounding, within a bound of memory.

        Strips of rows pass through all blocks one after the other, on as many threads as torch has; memory depends on
        the width of the image and not on its height.

        Args:
            x: (B, in_chans, H, W), in [0, 1] or whole numbers up to the largest of their type.
            memory: Bytes to hold beside `x` and the result; None is no limit.
            progress: Called with (strips done, strips in all); other threads may call it.
            write: Takes the result instead: called in order with the index of an image, the first row of a strip and
                its result (in_chans, n, scale * W).

        Returns:
            (B, in_chans, scale * H, scale * W) on the device of `x`; None where `write` has taken it.

        Raises:
            RuntimeError: The model is in training mode or not merged, or a part is an adapter, quantised, or has hooks.
            ValueError: `memory` is less than `stream_bytes`.
        """
        foreign = self.foreign_part()
        if self.training or foreign is not None:
            why = "in training mode: call model.eval() first" if self.training else f"with {foreign}: call it"
            raise RuntimeError(f"CFSR cannot be streamed {why}.")
        batch, _, height, width = x.shape
        least, workers = self.kernel_size // 2, self._workers
        rows = max(_STRIP_PIXELS // width, least)
        while rows > least and memory is not None and self._line_bytes(height, width, rows) > memory:
            rows = max(rows * 3 // 4, least)
        if memory is not None and self._line_bytes(height, width, rows) > memory:
            raise ValueError(
                f"memory must be at least {self.stream_bytes(height, width)} bytes for {width}x{height} pixels, "
                f"got {memory}."
            )
        out: Tensor | None = None
        if write is None:
            shape = (batch, self.in_chans, self.scale * height, self.scale * width)
            out = torch.empty(shape, dtype=self.mean.dtype, device=x.device)
        for image in range(batch):

            def keep(first: int, result: Tensor, image: int = image) -> None:
                if write is not None:
                    write(image, first, result)
                elif out is not None:
                    out[image, :, first : first + result.shape[1]] = result

            def tell(done: int, total: int, image: int = image) -> None:
                if progress is not None:
                    progress(image * total + done, batch * total)

            stream(self, x[image], rows, workers, keep, tell)
        return out

    def foreign_part(self) -> str | None:
        """Return name and class of the first part whose weights are not all that it computes with, or None."""
        for name, part in self.named_modules():
            if isinstance(part, CFSRBlock) and not part.merged:
                return f"{name} (not merged)"
        return first_foreign(self, (*_OWN, nn.Conv2d, nn.Sequential, nn.PixelShuffle, CFSRBlock, CFSRStage))

    def stream_bytes(self, height: int, width: int) -> int:
        """Return the least `memory` with which `stream` restores one image of this size."""
        return self._line_bytes(height, width, self.kernel_size // 2)

    @property
    def _workers(self) -> int:
        """Threads of a stream: no more than there are parts of about equal work."""
        return min(torch.get_num_threads(), 2 * sum(self.depths)) if self.mean.device.type == "cpu" else 1

    def _line_bytes(self, height: int, width: int, rows: int) -> int:
        """Return the memory of a stream by strips of at least `rows` rows."""
        first, end = even_strips(height, rows)[-1]  # none is larger
        hidden = max(part.fc1.out_features for part in self.modules() if isinstance(part, EdgeFFN))
        dim, halo = self.conv_first.out_channels, self.kernel_size // 2
        numbers = line_numbers(sum(self.depths), dim, hidden, halo, end - first, self._workers)
        return width * numbers * self.mean.element_size() + 2**20

    def reparameterize(self) -> tuple[str, ...]:
        """Merge and fold every block, see `CFSRBlock.reparameterize`; exact, in place, idempotent.

        Raises:
            RuntimeError: The model is in training mode.
        """
        blocks = [module for module in self.modules() if isinstance(module, CFSRBlock)]
        return tuple(sorted({folded for block in blocks for folded in block.reparameterize()}))


_RENAMED = (
    (r"\.layer_scale_([12])$", r".scale\1.gamma"),
    (r"\.attn\.norm\.", ".norm1."),
    (r"\.attn\.a\.0\.", ".mixer.expand."),
    (r"\.attn\.a\.2\.lkb_reparam\.", ".mixer.conv."),
    (r"\.attn\.proj\.", ".mixer.proj."),
    (r"\.mlp\.norm\.", ".norm2."),
    (r"\.mlp\.", ".ffn."),
    (r"^upsample\.0\.", "upsample."),
)
_AUTHORS_EDGE = re.compile(r"\.mlp\.((scale|mask)_\w+|\w+_bias)$")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the authors' keys, join gates and edge branches, and fit the edges to the form of `model`.

    Merged weights get silent edge branches for a training form, and a training form's are merged for a merged form.
    Masks of a training checkpoint are kept; the authors' masks stand in where it has none.
    """
    if any(".attn.a.0." in key for key in state_dict):
        state_dict = _from_authors(state_dict)
    return _fit_edges(state_dict, model)


def _from_authors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if ".attn.v." in key or _AUTHORS_EDGE.search(key):
            continue  # joined with others below
        if ".attn.a.0." in key:
            value = torch.cat([value, state_dict[key.replace(".a.0.", ".v.")]])
        name = key
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        out[name] = value.flatten(1) if value.shape[2:] == (1, 1) else value
    for key in [key for key in state_dict if key.endswith(".mlp.scale_sobel_x")]:
        old = key.removesuffix("scale_sobel_x")
        new = old.replace(".mlp.", ".ffn.")
        out[new + "edge_scale"] = torch.stack([state_dict[f"{old}scale_{edge}"].flatten() for edge in _EDGES])
        out[new + "edge_bias"] = torch.stack([state_dict[f"{old}{edge}_bias"] for edge in _EDGES])
        if old + "mask_sobel_x" in state_dict:
            out[new + "edge_masks"] = torch.cat([state_dict[f"{old}mask_{edge}"] for edge in _EDGES])
    return out


def _fit_edges(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit edge branches to the model's form; a single one that is missing stays missing, for strict loading to name."""
    out = dict(state_dict)
    trained = any(key.endswith((".edge_scale", ".edge_bias")) for key in out)  # no branches at all: merged weights
    masked = any(key.endswith(".edge_masks") for key in out)  # no masks at all: as the authors publish them
    for name, module in model.named_modules():
        if not isinstance(module, EdgeFFN) or f"{name}.pos.weight" not in out:
            continue
        needed = [f"{name}.pos.bias"]
        needed += [f"{name}.edge_scale", f"{name}.edge_bias"] if trained else []
        needed += [f"{name}.edge_masks"] if masked else []
        if any(key not in out for key in needed):
            continue
        weight, pos_bias = out[f"{name}.pos.weight"], out[f"{name}.pos.bias"]
        scale = out.pop(f"{name}.edge_scale", weight.new_zeros(len(_EDGES), len(weight)))
        bias = out.pop(f"{name}.edge_bias", torch.zeros_like(scale))
        masks = out.pop(f"{name}.edge_masks", _mask_table(len(weight)).to(weight))
        if module.edge_masks is not None:
            out |= {f"{name}.edge_scale": scale, f"{name}.edge_bias": bias, f"{name}.edge_masks": masks}
        else:
            more = _edge_sum(scale, bias, masks)
            out[f"{name}.pos.weight"], out[f"{name}.pos.bias"] = weight + more[0], pos_bias + more[1]
    return out


_PUBLISHED: dict[str, Any] = dict(
    in_chans=3, embed_dim=48, depths=(6, 6), kernel_size=9, mlp_ratio=2.0, edge_branches=True
)


def detect(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Recognise a CFSR state dict, the authors' or ours: (registered name, constructor arguments), or None."""
    keys = state_dict.keys()
    authors = "layers.0.blocks.0.attn.a.2.lkb_reparam.weight" in keys
    if not authors and "layers.0.blocks.0.ffn.pos.weight" not in keys:
        return None
    last = state_dict.get("upsample.0.weight" if authors else "upsample.weight")
    first = state_dict.get("conv_first.weight")
    mixing = state_dict.get("layers.0.blocks.0." + ("attn.a.2.lkb_reparam.weight" if authors else "mixer.conv.weight"))
    widening = state_dict.get("layers.0.blocks.0." + ("mlp.fc1.weight" if authors else "ffn.fc1.weight"))
    if last is None or first is None or mixing is None or widening is None:
        return None
    dim, in_chans = first.shape[:2]
    scale = math.isqrt(last.shape[0] // in_chans)
    if scale not in _SCALES or scale**2 * in_chans != last.shape[0]:
        return None
    blocks = {match[0] for key in keys if (match := re.match(r"layers\.\d+\.blocks\.\d+\.", key))}
    stages = [int(block.split(".")[1]) for block in blocks]
    found: dict[str, Any] = dict(
        in_chans=in_chans,
        embed_dim=dim,
        depths=tuple(stages.count(stage) for stage in range(max(stages) + 1)),
        kernel_size=mixing.shape[-1],
        mlp_ratio=widening.shape[0] / dim,
        edge_branches=any(key.endswith((".scale_sobel_x", ".edge_scale")) for key in keys),
    )
    kwargs = {key: value for key, value in found.items() if value != _PUBLISHED[key]}
    if not authors and "layers.0.blocks.0.norm1.weight" not in keys:
        kwargs["merged"] = True
    return f"cfsr_x{scale}", kwargs


_AUTHORS = "https://raw.githubusercontent.com/Aitical/CFSR/main/model_zoo/"


def _cfg(scale: int, **kwargs: Any) -> RestorationCfg:
    return RestorationCfg(
        task="sr",
        scale=scale,
        input_size=(3, 64, 64),
        min_input_size=(3, 1, 1),
        interpolation="bicubic",
        paper_ids="arXiv:2401.05633",
        paper_name="Transforming Image Super-Resolution: A ConvFormer-based Efficient Approach",
        origin_url="https://github.com/Aitical/CFSR",
        parity="Meets the authors' outputs to 1e-15 (relative, float64): training and merged form. Their x4 weights "
        "give 32.328 dB and SSIM 0.8964 on Set5, 28.734 and 0.7842 on Set14 (protocol y-crop), where the paper has "
        "32.33 and 0.8964, 28.73 and 0.7842; their x2 weights 38.070 and 0.9607, 33.744 and 0.9192.",
        **kwargs,
    )


def _authors(scale: int, sha256: str | None = None) -> RestorationCfg:
    """The authors' published weights: merged form, no licence stated."""
    return _cfg(
        scale,
        url=f"{_AUTHORS}CFSR_x{scale}.pth",
        sha256=sha256,
        notes=("The authors' repository states no licence; mirror: huggingface.co/GWu/CFSR.",),
    )


def _ours(scale: int, tag: str) -> RestorationCfg:
    return _cfg(scale, file=shipped(f"cfsr_x{scale}.{tag}"), license="apache-2.0")


default_cfgs = generate_default_cfgs(
    {
        "cfsr_x2.bsds": _ours(2, "bsds"),
        "cfsr_x2.real": _ours(2, "real"),
        "cfsr_x2.authors": _authors(2, "e6440c1a70af2cfa16c51287593f681438c8f307a81f90367a24e42086522f2c"),
        "cfsr_x3.bsds": _ours(3, "bsds"),
        "cfsr_x3.authors": _authors(3),
        "cfsr_x4.bsds": _ours(4, "bsds"),
        "cfsr_x4.real": _ours(4, "real"),
        "cfsr_x4.authors": _authors(4, "59c779a61c72238aed87683a908248d6e9e3cdb78a29a71da196d20092b6f2f6"),
    }
)


def _create_cfsr(variant: str, pretrained: bool = False, defaults: dict[str, Any] | None = None, **kwargs: Any) -> CFSR:
    return build_model(CFSR, variant, pretrained, filter_fn=checkpoint_filter_fn, defaults=defaults, **kwargs)


@register_model
def cfsr_x2(pretrained: bool = False, **kwargs: Any) -> CFSR:
    """CFSR x2: 298 236 parameters (merged 291 324, folded 287 868), 65.1 GMACs for 1280x720 output."""
    return _create_cfsr("cfsr_x2", pretrained, {"scale": 2}, **kwargs)


@register_model
def cfsr_x3(pretrained: bool = False, **kwargs: Any) -> CFSR:
    """CFSR x3: 304 731 parameters (merged 297 819, folded 294 363), 29.5 GMACs for 1280x720 output."""
    return _create_cfsr("cfsr_x3", pretrained, {"scale": 3}, **kwargs)


@register_model
def cfsr_x4(pretrained: bool = False, **kwargs: Any) -> CFSR:
    """CFSR x4: 313 824 parameters (merged 306 912, folded 303 456), 17.2 GMACs for 1280x720 output."""
    return _create_cfsr("cfsr_x4", pretrained, {"scale": 4}, **kwargs)
