"""Triton kernel of `zoo.kernels.narrow_ffn`: a program takes some rows through both products, block by block.

Inputs and the sum of the outputs stay in registers and shared memory; hidden channels are activated, rounded to the
type of the inputs and used at once. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.dispatch import exceeds_int32
from zoo.kernels.launch import block, choose, precision, rows_of
from zoo.kernels.triton_experts import activate

__all__ = ["forward"]


@triton.jit
def _ffn_kernel(
    x_ptr,
    fc1_ptr,
    fc1_bias_ptr,
    fc2_ptr,
    fc2_bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    inputs,
    hidden,
    outputs,
    x_row,
    fc1_row,
    fc2_row,
    residual_row,
    activation: tl.constexpr,
    has_residual: tl.constexpr,
    block_rows: tl.constexpr,
    block_inputs: tl.constexpr,
    block_hidden: tl.constexpr,
    block_outputs: tl.constexpr,
    wide: tl.constexpr,
    upcast: tl.constexpr,
    precision: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    if wide:
        row = row.to(tl.int64)
    exists = (row < rows)[:, None]
    depth, column, unit = tl.arange(0, block_inputs), tl.arange(0, block_outputs), tl.arange(0, block_hidden)
    x = tl.load(x_ptr + row[:, None] * x_row + depth[None, :], mask=exists & (depth < inputs)[None, :], other=0.0)
    if upcast:
        x = x.to(tl.float32)
    out = tl.zeros([block_rows, block_outputs], dtype=tl.float32)
    for start in range(0, hidden, block_hidden):
        place = start + unit
        known = place < hidden
        first = fc1_ptr + place[None, :] * fc1_row + depth[:, None]
        fc1 = tl.load(first, mask=known[None, :] & (depth < inputs)[:, None], other=0.0)
        second = fc2_ptr + column[None, :] * fc2_row + place[:, None]
        fc2 = tl.load(second, mask=known[:, None] & (column < outputs)[None, :], other=0.0)
        if upcast:
            fc1, fc2 = fc1.to(tl.float32), fc2.to(tl.float32)
        active = tl.dot(x, fc1, input_precision=precision)
        active += tl.load(fc1_bias_ptr + place, mask=known, other=0.0).to(tl.float32)[None, :]
        active = activate(active, activation).to(x.dtype)
        out = tl.dot(active, fc2, out, input_precision=precision)  # beyond the last channel fc2 is zero
    stored = exists & (column < outputs)[None, :]
    out += tl.load(fc2_bias_ptr + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    if has_residual:
        source = residual_ptr + row[:, None] * residual_row + column[None, :]
        out += tl.load(source, mask=stored, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * outputs + column[None, :], out.to(out_ptr.dtype.element_ty), mask=stored)


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """Launch the kernel.

    Args:
        x: (M, C).
        fc1_weight: (K, C).
        fc1_bias: (K,).
        fc2_weight: (O, K).
        fc2_bias: (O,).
        residual: (M, O) or None.
        activation: Its name.

    Returns:
        (M, O).
    """
    (rows, inputs), (outputs, hidden) = x.shape, fc2_weight.shape
    out = x.new_empty(rows, outputs)
    if out.numel() == 0:
        return out
    x, fc1_weight, fc2_weight = rows_of(x), rows_of(fc1_weight), rows_of(fc2_weight)
    added = out if residual is None else rows_of(residual)  # not read where there is no residual
    tiles = choose(
        "narrow_ffn",
        x,
        outputs=max(inputs, outputs),
        inner=hidden,
        rows=rows,
        default={
            "block_rows": 128 if rows >= 16384 and x.element_size() == 2 else 64,  # shared memory holds no more
            "block_hidden": 128 // x.element_size(),
            "num_warps": 8,
            "num_stages": 2,
        },
    )
    block_rows = block(rows, tiles["block_rows"])
    with torch.cuda.device_of(x):
        _ffn_kernel[(triton.cdiv(rows, block_rows),)](
            *(x, fc1_weight, fc1_bias.contiguous(), fc2_weight, fc2_bias.contiguous(), added, out),
            *(rows, inputs, hidden, outputs),
            *(x.stride(0), fc1_weight.stride(0), fc2_weight.stride(0), added.stride(0)),
            activation=activation,
            has_residual=residual is not None,
            block_rows=block_rows,
            block_inputs=block(inputs, 256),
            block_hidden=block(hidden, tiles["block_hidden"]),
            block_outputs=block(outputs, 256),
            wide=exceeds_int32(x, added, out),
            upcast=triton.knobs.runtime.interpret,  # the interpreter's products of bfloat16 are wrong
            precision=precision(x),
            num_warps=tiles["num_warps"],
            num_stages=tiles["num_stages"],
        )
    return out
