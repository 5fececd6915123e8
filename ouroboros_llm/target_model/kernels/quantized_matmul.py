"""A Triton kernel: products of few tokens with weights in eight or four bits, which are read as they are.

Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..latency import on

_OUTPUTS, _BLOCK = 32, 128
"""Outputs of a program, and inputs of a tile with eight bits; with four a tile is a group."""

_PROGRAMS = 264
"""Programs that a device works on at once, about."""


def product(
    rows: torch.Tensor,
    numbers: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """[count, outputs] of rows [count, inputs], of which there are few; the rest as `QuantizedLinear` keeps it.

    Sums and scales are in single precision, and the result is rounded once.
    """
    rows = rows.contiguous()
    count, inputs = rows.shape
    outputs, groups = scales.shape
    blocks = triton.cdiv(outputs, _OUTPUTS)
    block = _BLOCK if zeros is None else inputs // groups // 2
    tiles = triton.cdiv(inputs, block) if zeros is None else groups
    splits = max(1, min(tiles, _PROGRAMS // blocks))
    parts = rows.new_empty(splits, count, outputs, dtype=torch.float32)
    found = rows.new_empty(count, outputs)
    with on(rows.device):
        _products[blocks, splits](
            rows, numbers, scales, scales if zeros is None else zeros, parts, count, outputs, inputs, groups, tiles,
            ROWS=max(16, triton.next_power_of_2(count)), OUTPUTS=_OUTPUTS, BLOCK=block, FOUR=zeros is not None,
            SPLITS=splits,
        )  # fmt: skip
        _sums[blocks, count](
            parts, rows if bias is None else bias, found, count, outputs, OUTPUTS=_OUTPUTS, SPLITS=splits,
            BIASED=bias is not None,
        )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["count"])
def _products(  # type: ignore[no-untyped-def]
    rows_ptr, numbers_ptr, scales_ptr, zeros_ptr, parts_ptr, count, outputs, inputs, groups, tiles,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, FOUR: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (outputs, split): every so many-th tile of the inputs."""
    split = tl.program_id(1)
    row, place = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    real, there = (row < count)[:, None], (output < outputs)[:, None]
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for tile in range(split, tiles, SPLITS):
        if FOUR:
            column = tile * BLOCK + place
            numbers = tl.load(numbers_ptr + output[:, None] * (inputs // 2) + column[None, :], mask=there, other=0)
            zero = tl.load(zeros_ptr + output * groups + tile, mask=output < outputs, other=0).to(tl.int32)[:, None]
            first = rows_ptr + row[:, None] * inputs + (2 * tile * BLOCK + place)[None, :]
            one, other = tl.load(first, mask=real, other=0.0), tl.load(first + BLOCK, mask=real, other=0.0)
            low = ((numbers & 15).to(tl.int32) - zero).to(one.dtype)
            high = ((numbers >> 4).to(tl.int32) - zero).to(one.dtype)
            scale = tl.load(scales_ptr + output * groups + tile, mask=output < outputs, other=0.0).to(tl.float32)
            found = tl.dot(one, tl.trans(low), input_precision="ieee")
            found = tl.dot(other, tl.trans(high), found, input_precision="ieee")
            total += found * scale[None, :]
        else:
            column = tile * BLOCK + place
            inside = (column < inputs)[None, :]
            numbers = tl.load(numbers_ptr + output[:, None] * inputs + column[None, :], mask=there & inside, other=0)
            states = tl.load(rows_ptr + row[:, None] * inputs + column[None, :], mask=real & inside, other=0.0)
            total = tl.dot(states, tl.trans(numbers.to(states.dtype)), total, input_precision="ieee")
    if not FOUR:
        scale = tl.load(scales_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
        total = total * scale[None, :]
    part = (split * count + row[:, None]) * outputs + output[None, :]
    tl.store(parts_ptr + part, total, mask=real & (output < outputs)[None, :])


@triton.jit(do_not_specialize=["count"])
def _sums(  # type: ignore[no-untyped-def]
    parts_ptr, bias_ptr, found_ptr, count, outputs, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr
):
    """Program (outputs, row)."""
    row = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = output < outputs
    total = tl.zeros([OUTPUTS], tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts_ptr + (split * count + row) * outputs + output, mask=there, other=0.0)
    if BIASED:
        total += tl.load(bias_ptr + output, mask=there, other=0.0).to(tl.float32)
    tl.store(found_ptr + row * outputs + output, total.to(found_ptr.dtype.element_ty), mask=there)
