"""Triton kernels of `zoo.kernels.routed_experts`: rows are gathered and scattered by the matrix products themselves.

Pairs of token and expert are sorted by expert. The grid has as many row blocks as there can be at most, so that nothing
waits for the counts; blocks that are not needed return at once. The results of a token's pairs lie side by side and are
added in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import block, choose, precision, rows_of

__all__ = ["activate", "forward"]


@triton.jit
def activate(x, activation: tl.constexpr):
    if activation == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == "gelu_tanh":  # (1 + tanh(v)) / 2 = sigmoid(2 v)
        out = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif activation == "quick_gelu":
        out = x * tl.sigmoid(1.702 * x)
    elif activation == "silu":
        out = x * tl.sigmoid(x)
    elif activation == "relu":
        out = tl.maximum(x, 0.0)
    else:
        tl.static_assert(activation == "sigmoid")
        out = tl.sigmoid(x)
    return out


@triton.jit
def _up_kernel(
    x_ptr,
    up_ptr,
    bias_ptr,
    hidden_ptr,
    order_ptr,
    expert_ptr,
    start_ptr,
    end_ptr,
    experts,
    top_k,
    inner,
    hidden,
    x_row,
    activation: tl.constexpr,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inner: tl.constexpr,
    upcast: tl.constexpr,
    precision: tl.constexpr,
):
    """Write the activated hidden channels of sorted pairs."""
    program = tl.program_id(0)
    column_blocks = tl.cdiv(hidden, block_outputs)
    block = program // column_blocks
    expert = tl.load(expert_ptr + block)
    if expert >= experts:
        return
    pair = tl.load(start_ptr + block) + tl.arange(0, block_rows)  # 64-bit, like all that is made of it
    exists = pair < tl.load(end_ptr + block)
    token = tl.load(order_ptr + pair, mask=exists, other=0) // top_k
    column = (program % column_blocks) * block_outputs + tl.arange(0, block_outputs)
    column_at = column % hidden
    depth = tl.arange(0, block_inner)
    expert = expert.to(tl.int64)
    width = hidden * 2 if gated else hidden
    x_base = x_ptr + token[:, None] * x_row
    up_base = up_ptr + expert * width * inner + column_at[None, :] * inner
    out = tl.zeros([block_rows, block_outputs], dtype=tl.float32)
    gate = tl.zeros([block_rows, block_outputs], dtype=tl.float32)
    for start in range(0, inner, block_inner):
        place = start + depth
        x = tl.load(x_base + place[None, :], mask=exists[:, None] & (place[None, :] < inner), other=0.0)
        up = tl.load(up_base + place[:, None], mask=place[:, None] < inner, other=0.0)
        if upcast:
            x, up = x.to(tl.float32), up.to(tl.float32)
        out = tl.dot(x, up, out, input_precision=precision)
        if gated:
            other = tl.load(up_base + hidden * inner + place[:, None], mask=place[:, None] < inner, other=0.0)
            if upcast:
                other = other.to(tl.float32)
            gate = tl.dot(x, other, gate, input_precision=precision)
    if has_bias:
        bias = bias_ptr + expert * width + column_at
        out += tl.load(bias).to(tl.float32)[None, :]
        if gated:
            gate += tl.load(bias + hidden).to(tl.float32)[None, :]
    if gated:
        out = out * activate(gate, activation)
    else:
        out = activate(out, activation)
    target = hidden_ptr + pair[:, None] * hidden + column[None, :]
    tl.store(target, out.to(hidden_ptr.dtype.element_ty), mask=exists[:, None] & (column < hidden)[None, :])


@triton.jit
def _down_kernel(
    hidden_ptr,
    down_ptr,
    gates_ptr,
    out_ptr,
    order_ptr,
    expert_ptr,
    start_ptr,
    end_ptr,
    experts,
    inner,
    outputs,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inner: tl.constexpr,
    upcast: tl.constexpr,
    precision: tl.constexpr,
):
    """Write the weighted outputs of sorted pairs to where the pairs came from; zeros for experts without weights."""
    program = tl.program_id(0)
    column_blocks = tl.cdiv(outputs, block_outputs)
    block = program // column_blocks
    expert = tl.load(expert_ptr + block)
    if expert > experts:
        return
    pair = tl.load(start_ptr + block) + tl.arange(0, block_rows)
    exists = pair < tl.load(end_ptr + block)
    origin = tl.load(order_ptr + pair, mask=exists, other=0)
    column = (program % column_blocks) * block_outputs + tl.arange(0, block_outputs)
    column_at = column % outputs
    depth = tl.arange(0, block_inner)
    out = tl.zeros([block_rows, block_outputs], dtype=tl.float32)
    if expert < experts:
        hidden_base = hidden_ptr + pair[:, None] * inner
        down_base = down_ptr + expert.to(tl.int64) * outputs * inner + column_at[None, :] * inner
        for start in range(0, inner, block_inner):
            place = start + depth
            hidden = tl.load(hidden_base + place[None, :], mask=exists[:, None] & (place[None, :] < inner), other=0.0)
            down = tl.load(down_base + place[:, None], mask=place[:, None] < inner, other=0.0)
            if upcast:
                hidden, down = hidden.to(tl.float32), down.to(tl.float32)
            out = tl.dot(hidden, down, out, input_precision=precision)
        out *= tl.load(gates_ptr + origin, mask=exists, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + origin[:, None] * outputs + column[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (column < outputs)[None, :])


def forward(
    x: Tensor,
    gates: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """Launch the kernels and add up the outputs of each token.

    Args:
        x: Tokens (T, D).
        gates: Weights of the chosen experts (T, k).
        index: Chosen experts (T, k), int64; from n on there is nothing to compute.
        up: (n, W or 2 W, D).
        up_bias: (n, W or 2 W).
        down: (n, O, W).
        activation: Its name.
        gated: The first W channels are values, the others their gates.

    Returns:
        (T, O).
    """
    (tokens, top_k), (experts, outputs, hidden) = index.shape, down.shape
    pairs = tokens * top_k
    if pairs == 0 or outputs == 0:
        return x.new_zeros(tokens, outputs)
    x = rows_of(x)
    up, down, gates = up.contiguous(), down.contiguous(), gates.contiguous()
    up_bias = up_bias if up_bias is None else up_bias.contiguous()
    order = index.flatten().argsort(stable=True)
    few = pairs < 512 * experts
    tiles = choose(
        "routed_experts gated" if gated else "routed_experts",
        x,
        outputs=hidden,
        inner=x.shape[1],
        rows=pairs // max(experts, 1),
        default={
            "block_rows": 64 if few else 128,
            "block_outputs": 128,
            "block_inner": 128 // x.element_size(),
            "num_warps": 4 if few else 8,
            "num_stages": 3,
        },
    )
    block_rows = block(pairs, tiles["block_rows"])
    blocks = _row_blocks(index, experts, block_rows)
    activated = x.new_empty(pairs, hidden)
    out = x.new_empty(tokens, top_k, outputs)
    shared = {
        "block_rows": block_rows,
        "upcast": triton.knobs.runtime.interpret,  # the interpreter's products of bfloat16 are wrong
        "precision": precision(x),
        "num_warps": tiles["num_warps"],
        "num_stages": tiles["num_stages"],
    }
    with torch.cuda.device_of(x):
        if hidden > 0:
            width = block(hidden, tiles["block_outputs"] // (2 if gated else 1))  # two accumulators
            _up_kernel[(len(blocks[0]) * triton.cdiv(hidden, width),)](
                *(x, up, up if up_bias is None else up_bias, activated, order, *blocks),
                *(experts, top_k, x.shape[1], hidden, x.stride(0)),
                activation=activation,
                gated=gated,
                has_bias=up_bias is not None,
                block_outputs=width,
                block_inner=block(x.shape[1], tiles["block_inner"]),
                **shared,
            )
        width = block(outputs, tiles["block_outputs"])
        _down_kernel[(len(blocks[0]) * triton.cdiv(outputs, width),)](
            *(activated, down, gates, out, order, *blocks, experts, hidden, outputs),
            block_outputs=width,
            block_inner=block(hidden, tiles["block_inner"]),
            **shared,
        )
    return out.sum(1)


def _row_blocks(index: Tensor, experts: int, block_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return expert, first pair and last pair + 1 of each block of sorted pairs; no value is waited for.

    Pairs of experts without weights are one group more, of number `experts`; blocks that are not needed belong to
    the number after that.
    """
    group = index.flatten().clamp(max=experts)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=index.device)
    counts = counts.scatter_add(0, group, torch.ones_like(group))
    ends = counts.cumsum(0)
    last_block = ((counts + block_rows - 1) // block_rows).cumsum(0)
    most = triton.cdiv(index.numel(), block_rows) + experts + 1
    block = torch.arange(most, device=index.device)
    expert = torch.searchsorted(last_block, block, right=True)
    known = expert.clamp(max=experts)
    first_block = last_block - (counts + block_rows - 1) // block_rows
    start = (ends - counts)[known] + (block - first_block[known]) * block_rows
    return expert, start, torch.minimum(ends[known], start + block_rows)
