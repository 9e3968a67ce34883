"""What `zoo bench kernels` measures on a GPU: every operator on shapes of real models, blocks, and rivals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import kernels
from zoo.bench.plain_backbones import plain_filter
from zoo.layers.frequency_filter import AdaptiveFrequencyFilter
from zoo.moe.experts import MoEFFN, sorted_experts

__all__ = ["Row", "block_rows", "operator_rows"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        name: Operator and shape.
        function: Calls functions of `zoo.kernels`.
        inputs: Its tensors.
        library: The same computed by the best library call, where there is one.
        checked: The library call computes the same numbers.
        train: The backward pass is timed too.
        wanted: How many times as fast as the best rival; None where no number is to be reached.
        share: Per cent of the roofline to reach.
        over_library: How many times as fast as the library call.
    """

    name: str
    function: Callable[..., Any]
    inputs: list[Tensor]
    library: Callable[..., Any] | None = None
    checked: bool = True
    train: bool = False
    wanted: float | None = None
    share: float | None = None
    over_library: float | None = None


Numbers = Callable[..., Tensor]
"""Returns random numbers of a shape, times `scale`."""


def _source(device: str | torch.device, dtype: torch.dtype) -> Numbers:
    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    return numbers


def operator_rows(device: str | torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Yield the rows of all operators; the tensors of each are made when it is its turn.

    Args:
        device: Of the tensors; on "meta" the rows only have names.
        dtype: Of the tensors.
    """
    numbers = _source(device, dtype)
    yield from _repa_rows(numbers)
    yield _experts_row(numbers, device, dtype)
    yield from _ska_rows(numbers)
    yield from _gate_rows(numbers)
    yield from _adaln_rows(numbers)
    yield from _frequency_rows(numbers, device)


def _repa_rows(numbers: Numbers) -> Iterator[Row]:
    for rows, dim in ((12608, 1024), (16448, 1280), (4096, 3072)):
        up, down, weight = (numbers(dim, dim, scale=dim**-0.5) for _ in range(3))
        x, bias = numbers(rows, dim), numbers(dim)
        vit = dim < 3072
        yield Row(
            name=f"repa_ffn {rows} x {dim}",
            function=kernels.repa_ffn,
            inputs=[x, up, bias, down, weight, bias],
            library=partial(_joined_repa, joined=torch.cat([weight, down], 1).t()),
            wanted=1.15 if vit else None,
            share=60.0 if vit else None,
        )


def _joined_repa(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, weight: Tensor, bias: Tensor, *, joined: Tensor
) -> Tensor:
    """Compute `repa_ffn` as one library product over inputs and activated channels side by side."""
    both = x.new_empty(x.shape[0], x.shape[1] + up.shape[0])
    both[:, : x.shape[1]] = x
    hidden = both[:, x.shape[1] :]
    torch.addmm(up_bias, x, up.t(), out=hidden)
    torch.ops.aten.gelu_(hidden)
    return torch.addmm(bias, both, joined)


def _experts_row(numbers: Numbers, device: str | torch.device, dtype: torch.dtype) -> Row:
    """Return the mixture of experts; its rivals are the layer's grouped products: the formula computes all experts."""
    with warnings.catch_warnings():  # PyTorch's, about the shared expert of no channels
        warnings.simplefilter("ignore")
        layer = MoEFFN(3072, 3072, shared_dim=0, expert_dim=768, experts=12, top_k=2, activation="gelu_tanh")
    layer = layer.to(device, dtype).requires_grad_(False)
    index = torch.rand(4096, 12, device=device).topk(2).indices
    assert layer.experts_up_bias is not None

    def experts(x: Tensor, gates: Tensor, index: Tensor, *weights: Tensor) -> Tensor:
        if kernels.get_backend() == "torch":
            return sorted_experts(layer, x, gates, index, torch.zeros_like(x))
        return kernels.routed_experts(x, gates, index, *weights, activation="gelu_tanh")

    return Row(
        name="routed_experts 4096 x 3072, 2 of 12",
        function=experts,
        inputs=[
            *(numbers(4096, 3072), numbers(4096, 2).abs(), index),
            *(layer.experts_up, layer.experts_up_bias, layer.experts_down),
        ],
        wanted=1.2,
    )


def _ska_rows(numbers: Numbers) -> Iterator[Row]:
    for channels, size in ((64, 28), (128, 14), (256, 7)):
        x, weight = numbers(128, channels, size, size), numbers(128, channels // 8, 9, size, size)
        name = f"ska 128 x {channels} x {size} x {size}"
        yield Row(
            name=name,
            function=kernels.ska,
            inputs=[x, weight],
            library=_published_ska,
            wanted=1.2,
            over_library=2.0,
        )
        last = weight.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)  # tap by tap, as merged layers do
        x_last = x.contiguous(memory_format=torch.channels_last)
        yield Row(name=f"{name} channels last", function=kernels.ska, inputs=[x_last, last], wanted=1.2)
        yield Row(name=f"{name} training", function=kernels.ska, inputs=[x, weight], train=True)


def _published_ska(x: Tensor, weight: Tensor) -> Tensor:
    from zoo.bench.published_ska import published_ska  # Triton

    return published_ska(x, weight)


def _gate_rows(numbers: Numbers) -> Iterator[Row]:
    for hidden, size in ((128, 256), (256, 128), (512, 64), (1024, 32)):
        x = numbers(1, 2 * hidden, size, size).contiguous(memory_format=torch.channels_last)
        inputs, name = [x, numbers(2 * hidden, 1, 3, 3)], f"dwconv_gate 1 x {2 * hidden} x {size} x {size}"
        yield Row(name=name, function=kernels.dwconv_gate, inputs=inputs, wanted=1.4)
        if hidden == 128:
            yield Row(name=f"{name} training", function=kernels.dwconv_gate, inputs=inputs, train=True)


def _adaln_rows(numbers: Numbers) -> Iterator[Row]:
    for batch, tokens, dim in ((1, 4096, 3072), (128, 256, 384)):
        x, y = numbers(batch, tokens, dim), numbers(batch, tokens, dim)
        gate, scale, shift = numbers(batch, 3 * dim).chunk(3, 1)
        name, inputs = f"{batch} x {tokens} x {dim}", [x, y, gate, scale, shift]
        yield Row(name=f"modulate {name}", function=kernels.modulate, inputs=[x, scale, shift], wanted=1.0)
        yield Row(name=f"gate_modulate {name}", function=kernels.gate_modulate, inputs=inputs, wanted=1.0)
        yield Row(name=f"gate_modulate {name} training", function=kernels.gate_modulate, inputs=inputs, train=True)


def _frequency_rows(numbers: Numbers, device: str | torch.device) -> Iterator[Row]:
    for dim, size in ((96, 32), (192, 16), (320, 8)):
        layer = AdaptiveFrequencyFilter(dim, device=device).requires_grad_(False)
        yield Row(
            name=f"frequency_filter 128 x {dim} x {size} x {size}",
            function=_filter,
            inputs=[numbers(128, dim, size, size), layer.w1, layer.b1, layer.w2, layer.b2],
            library=lambda x, *weights, layer=layer: plain_filter(layer, x),
            checked=False,  # libraries differ in what they make of a spectrum that is not Hermitian
        )


def _filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return kernels.frequency_filter(x, w1, b1, w2, b2, 0.0)


def block_rows(device: str | torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Yield transformer blocks, whose functions are to be compiled; arguments as of `operator_rows`."""
    numbers = _source(device, dtype)
    for name, batch, tokens, dim, hidden in (
        ("merged RePaViT-L block, batch 64", 64, 197, 1024, 1024),
        ("FLUX-size DiT block, 4096 tokens", 1, 4096, 3072, 12288),
        ("DiT-S/2 block, batch 128", 128, 256, 384, 1536),
    ):
        shapes = {"qkv": (3 * dim, dim), "out": (dim, dim), "fc1": (hidden, dim), "fc2": (dim, hidden)}
        weights = {key: numbers(*shape, scale=shape[1] ** -0.5) for key, shape in shapes.items()}
        weights |= {"linear": numbers(dim, dim, scale=dim**-0.5), "bias": numbers(dim)}
        x = numbers(batch, tokens, dim)
        if "DiT" in name:
            yield Row(name=name, function=partial(_dit_block, weights=weights), inputs=[x, numbers(batch, 6 * dim)])
        else:
            yield Row(name=name, function=partial(_vit_block, weights=weights), inputs=[x])


def _attention(x: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    q, k, v = F.linear(x, weights["qkv"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), weights["out"])


def _vit_block(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    x = x + _attention(F.layer_norm(x, x.shape[-1:]), weights, 16)
    keys = ("fc1", "bias", "fc2", "linear", "bias")
    return kernels.repa_ffn(x.flatten(0, 1), *(weights[key] for key in keys)).view(x.shape)


def _dit_block(x: Tensor, condition: Tensor, weights: dict[str, Tensor]) -> Tensor:
    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = condition.chunk(6, 1)
    branch = _attention(kernels.modulate(x, scale, shift), weights, x.shape[-1] // 64)
    x, out = kernels.gate_modulate(x, branch, gate, scale_ffn, shift_ffn)
    out = F.linear(F.gelu(F.linear(out, weights["fc1"]), approximate="tanh"), weights["fc2"])
    return x + gate_ffn[:, None] * out
