"""Triton kernel of `zoo.kernels.repa_ffn`: a matrix product with two sources, summed up in one accumulator.

The partial sum of the linear branch is never written: the second source is added to it in registers, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.dispatch import exceeds_int32
from zoo.kernels.launch import block, choose, precision, rows_of

__all__ = ["forward"]

_GROUP = 8  # row blocks that share the weights of a column block in the cache


@triton.jit
def _add_product(
    out,
    x_ptr,
    weight_ptr,
    row,
    column,
    inner,
    x_row,
    weight_row,
    block_inner: tl.constexpr,
    upcast: tl.constexpr,
    precision: tl.constexpr,
):
    """Add x @ weight^T of a tile to `out`."""
    depth = tl.arange(0, block_inner)
    x_base = x_ptr + row[:, None] * x_row
    weight_base = weight_ptr + column[None, :] * weight_row
    for start in range(0, inner, block_inner):
        place = start + depth
        x = tl.load(x_base + place[None, :], mask=place[None, :] < inner, other=0.0)
        weight = tl.load(weight_base + place[:, None], mask=place[:, None] < inner, other=0.0)
        if upcast:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        out = tl.dot(x, weight, out, input_precision=precision)
    return out


@triton.jit
def _product_kernel(
    x_ptr,
    weight_ptr,
    second_ptr,
    second_weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    inner,
    second_inner,
    x_row,
    weight_row,
    second_row,
    second_weight_row,
    two_sources: tl.constexpr,
    gelu: tl.constexpr,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inner: tl.constexpr,
    group: tl.constexpr,
    wide: tl.constexpr,
    upcast: tl.constexpr,
    precision: tl.constexpr,
):
    """Write bias + x @ weight^T [+ second @ second_weight^T], activated or not."""
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(rows, block_rows), tl.cdiv(outputs, block_outputs)
    first = (program // (group * column_blocks)) * group
    size = min(row_blocks - first, group)
    within = program % (group * column_blocks)
    row = (first + within % size) * block_rows + tl.arange(0, block_rows)
    column = (within // size) * block_outputs + tl.arange(0, block_outputs)
    if wide:
        row, column = row.to(tl.int64), column.to(tl.int64)
    x_at, weight_at = row % rows, column % outputs  # what lies beyond the edge is computed, but not stored
    out = tl.zeros([block_rows, block_outputs], dtype=tl.float32)
    out = _add_product(
        out, x_ptr, weight_ptr, x_at, weight_at, inner, x_row, weight_row, block_inner, upcast, precision
    )
    if two_sources:
        out = _add_product(
            *(out, second_ptr, second_weight_ptr, x_at, weight_at, second_inner, second_row, second_weight_row),
            *(block_inner, upcast, precision),
        )
    out += tl.load(bias_ptr + weight_at).to(tl.float32)[None, :]
    if gelu:
        out = 0.5 * out * (1.0 + tl.erf(out * 0.7071067811865476))
    valid = (row < rows)[:, None] & (column < outputs)[None, :]
    tl.store(out_ptr + row[:, None] * outputs + column[None, :], out.to(out_ptr.dtype.element_ty), mask=valid)


def forward(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Launch the kernel twice: for the activated channels, then for the sum of both branches.

    Args:
        x: (M, C).
        fc1_weight: (K, C).
        fc1_bias: (K,).
        fc2_weight: (O, K).
        weight: (O, C).
        bias: (O,).

    Returns:
        (M, O).
    """
    x, fc1_weight, fc2_weight, weight = (rows_of(tensor) for tensor in (x, fc1_weight, fc2_weight, weight))
    hidden = _product(x, fc1_weight, fc1_bias, gelu=True)
    return _product(x, weight, bias, second=(hidden, fc2_weight))


def _product(
    x: Tensor, weight: Tensor, bias: Tensor, *, second: tuple[Tensor, Tensor] | None = None, gelu: bool = False
) -> Tensor:
    rows, outputs = x.shape[0], weight.shape[0]
    out = x.new_empty(rows, outputs)
    if out.numel() == 0:
        return out
    other, other_weight = second or (x, weight)  # not read where there is no second source
    inner = max(x.shape[1], other.shape[1])
    many = rows >= 4096
    tiles = choose(
        "repa_ffn two sources" if second else "repa_ffn",
        x,
        outputs=outputs,
        inner=inner,
        rows=rows,
        default={
            "block_rows": 128 if many else 64,
            "block_outputs": 128,
            "block_inner": 128 // x.element_size(),
            "num_warps": 8 if many and outputs > 64 else 4,
            "num_stages": 3,
        },
    )
    block_rows, block_outputs = block(rows, tiles["block_rows"]), block(outputs, tiles["block_outputs"])
    with torch.cuda.device_of(x):
        _product_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(outputs, block_outputs),)](
            *(x, weight, other, other_weight, bias.contiguous(), out),
            *(rows, outputs, x.shape[1], other.shape[1]),
            *(x.stride(0), weight.stride(0), other.stride(0), other_weight.stride(0)),
            two_sources=second is not None,
            gelu=gelu,
            block_rows=block_rows,
            block_outputs=block_outputs,
            block_inner=block(inner, tiles["block_inner"]),
            group=_GROUP,
            wide=exceeds_int32(x, weight, other, other_weight, out),
            upcast=triton.knobs.runtime.interpret,  # the interpreter's products of bfloat16 are wrong
            precision=precision(x),
            num_warps=tiles["num_warps"],
            num_stages=tiles["num_stages"],
        )
    return out
