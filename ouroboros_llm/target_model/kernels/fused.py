"""Triton kernels: the forms of `operations`, each in one launch. Steps are in single precision and rounded where the
library's modules round. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from ..latency import on

Activation = Literal["silu", "gelu", "gelu tanh"]

_BLOCK = 1024
"""Numbers that a program gates."""


def norm(states: torch.Tensor, weight: torch.Tensor, eps: float, added: float, late: bool) -> torch.Tensor:
    """As `operations.Operations.norm`."""
    states = states.contiguous()
    size = states.shape[-1]
    found = torch.empty_like(states)
    with on(states.device):
        _norm[states.numel() // size,](
            states, weight, found, eps, added, SIZE=size, SIZES=triton.next_power_of_2(size), LATE=late
        )
    return found


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, between: bool, once: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `operations.Operations.rotate`."""
    query, key = (states if states.stride(-1) == 1 else states.contiguous() for states in (query, key))
    cos, sin = cos.contiguous(), sin.contiguous()
    _, heads, width, size = query.shape
    turned, key_heads = cos.shape[-1], key.shape[1]
    found = query.new_empty(query.shape), key.new_empty(key.shape)
    with on(query.device):
        _rotate[width, heads + key_heads](
            query, key, cos, sin, *found, heads, *query.stride()[1:3], *key.stride()[1:3], width,
            SIZE=size, TURNED=turned, SIZES=triton.next_power_of_2(size), BETWEEN=between, ONCE=once,
        )  # fmt: skip
    return found


def gate(gates: torch.Tensor, ups: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As `operations.Operations.gate`."""
    size = gates.shape[-1]
    rows, others = (states.reshape(-1, size) for states in (gates, ups))
    rows, others = (states if states.stride(-1) == 1 else states.contiguous() for states in (rows, others))
    found = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    with on(gates.device):
        _gate[len(rows), triton.cdiv(size, _BLOCK)](
            rows, others, found, rows.stride(0), others.stride(0), size, BLOCK=_BLOCK, KIND=activation
        )
    return found


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    states_ptr, weight_ptr, found_ptr, eps, added, SIZE: tl.constexpr, SIZES: tl.constexpr, LATE: tl.constexpr
):
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64) * SIZE
    size = tl.arange(0, SIZES)
    there = size < SIZE
    kind = found_ptr.dtype.element_ty
    states = tl.load(states_ptr + row + size, mask=there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + size, mask=there, other=0.0).to(tl.float32)
    exact = states * tl.rsqrt(tl.sum(states * states) / SIZE + eps)
    if LATE:
        found = weight * exact.to(kind).to(tl.float32)
    else:
        found = exact * (added + weight)
    tl.store(found_ptr + row + size, found.to(kind), mask=there)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, cos_ptr, sin_ptr, turned_query_ptr, turned_key_ptr, heads,
    query_head, query_node, key_head, key_node, width,
    SIZE: tl.constexpr, TURNED: tl.constexpr, SIZES: tl.constexpr, BETWEEN: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Program (node, head): those of the query first, then those of the key."""
    node, head = tl.program_id(0), tl.program_id(1)
    if head < heads:
        _turn(
            query_ptr + head * query_head + node * query_node, turned_query_ptr + (head * width + node) * SIZE,
            cos_ptr + node * TURNED, sin_ptr + node * TURNED, SIZE, TURNED, SIZES, BETWEEN, ONCE,
        )  # fmt: skip
    else:
        head -= heads
        _turn(
            key_ptr + head * key_head + node * key_node, turned_key_ptr + (head * width + node) * SIZE,
            cos_ptr + node * TURNED, sin_ptr + node * TURNED, SIZE, TURNED, SIZES, BETWEEN, ONCE,
        )  # fmt: skip


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    states_ptr, found_ptr, cos_ptr, sin_ptr,
    SIZE: tl.constexpr, TURNED: tl.constexpr, SIZES: tl.constexpr, BETWEEN: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """One head of one node."""
    kind = found_ptr.dtype.element_ty
    size = tl.arange(0, SIZES)
    there, turns = size < SIZE, size < TURNED
    if BETWEEN:
        first = size % 2 == 0
        other = tl.where(first, size + 1, size - 1)
    else:
        first = size < TURNED // 2
        other = tl.where(first, size + TURNED // 2, size - TURNED // 2)
    states = tl.load(states_ptr + size, mask=there, other=0.0)
    across = tl.load(states_ptr + other, mask=turns, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + size, mask=turns, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + size, mask=turns, other=0.0).to(tl.float32)
    own, turned = states.to(tl.float32) * cos, tl.where(first, -across, across) * sin
    if not ONCE:
        own, turned = own.to(kind).to(tl.float32), turned.to(kind).to(tl.float32)
    tl.store(found_ptr + size, tl.where(turns, (own + turned).to(kind), states), mask=there)


@triton.jit
def _gate(  # type: ignore[no-untyped-def]
    gates_ptr, ups_ptr, found_ptr, gates_row, ups_row, size, BLOCK: tl.constexpr, KIND: tl.constexpr
):
    """Program (row, block)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    kind = found_ptr.dtype.element_ty
    gates = tl.load(gates_ptr + row * gates_row + column, mask=there, other=0.0).to(tl.float32)
    ups = tl.load(ups_ptr + row * ups_row + column, mask=there, other=0.0).to(tl.float32)
    if KIND == "silu":
        found = gates / (1 + tl.exp(-gates))
    elif KIND == "gelu":
        found = 0.5 * gates * (1 + tl.erf(gates * 0.7071067811865476))
    else:
        # As 0.5 * gates * (1 + tanh(x)), which is gates * sigmoid(2 * x).
        found = gates * tl.sigmoid(1.5957691216057308 * (gates + 0.044715 * gates * gates * gates))
    tl.store(found_ptr + row * size + column, (found.to(kind).to(tl.float32) * ups).to(kind), mask=there)
