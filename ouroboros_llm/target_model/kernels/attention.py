"""Triton kernels: attention of a draft's nodes over a text whose length and place only the device knows.

One grid serves every length. The text's slots are split among programs, each of which finds out for itself where its
part begins and ends; one more takes the nodes themselves. Then the parts are merged by their log-sum-exp. What this
computes is `attention.attend`. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...decoding.draft_tree import MAX_WIDTH
from ..latency import on
from ..static.tree_attention import CachePointers

_ROWS, _BLOCK = 64, 64
"""Queries and slots of a tile at most."""

_BLOCK_BYTES = 1 << 14
"""Of a tile of keys at most: two of them and as many of values have to fit beside each other on every device."""

_PROGRAMS = 264
"""Programs that a device works on at once, about: two for each multiprocessor of those we know."""


def attend_in_place(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor,
    placed: CachePointers,
    layer: int,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of nodes over a text and over each other; their keys and values are written behind the text.

    Args:
        query: [1, heads, width, size].
        key, value: [1, key heads, width, size], of the nodes.
        first: [width], the first position that each node sees.
        layer: whose buffers.
        scaling, softcap, sinks: as for `attention.attend`.

    Returns:
        [1, width, heads, value size].
    """
    query, key, value = (states if states.stride(-1) == 1 else states.contiguous() for states in (query, key, value))
    _, heads, width, size = query.shape
    key_heads, value_size = key.shape[1], value.shape[3]
    groups = heads // key_heads
    rows = min(_ROWS, max(16, triton.next_power_of_2(groups * width)))
    blocks = triton.cdiv(groups * width, rows)
    splits = max(1, min(32, _PROGRAMS // (key_heads * blocks)))
    parts = query.new_empty(heads, width, splits + 1, value_size, dtype=torch.float32)
    most, total = parts.new_empty(2, heads, width, splits + 1)
    _attend_parts[key_heads, splits + 1, blocks](
        query, key, value, first, *placed, parts, most, total, layer,
        size**-0.5 if scaling is None else scaling, softcap or 1.0,
        *query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3],
        WIDTH=width, GROUPS=groups, SIZE=size, VALUE_SIZE=value_size, SPLITS=splits, ROWS=rows,
        BLOCK=_block(size * query.itemsize), NODES=max(16, triton.next_power_of_2(width)),
        SIZES=max(16, triton.next_power_of_2(size)), VALUE_SIZES=max(16, triton.next_power_of_2(value_size)),
        CAPPED=softcap is not None,
    )  # fmt: skip
    found = value.new_empty(1, width, heads, value_size)
    _merge_parts[heads, width](
        parts, most, total, most if sinks is None else sinks, found,
        HEADS=heads, WIDTH=width, VALUE_SIZE=value_size, PARTS=splits + 1,
        ALL_PARTS=triton.next_power_of_2(splits + 1), VALUE_SIZES=triton.next_power_of_2(value_size),
        SINKS=sinks is not None,
    )  # fmt: skip
    return found


def _block(slot_bytes: int) -> int:
    return max(16, min(_BLOCK, _BLOCK_BYTES // int(triton.next_power_of_2(slot_bytes))))


def move_slots(buffers: Sequence[torch.Tensor], start: int, slots: Sequence[int]) -> None:
    """Copy `slots`, no more than a draft has nodes, of every buffer [1, heads, capacity, size] to where `start` is,
    though source and destination overlap; one launch for all buffers of a shape, and nothing is waited for."""
    order = [slot - start for slot in slots]
    order += range(len(order), MAX_WIDTH)
    alike: dict[tuple[torch.device, torch.Size], list[torch.Tensor]] = {}
    for buffer in buffers:
        alike.setdefault((buffer.device, buffer.shape), []).append(buffer)
    for (device, (_, heads, capacity, size)), group in alike.items():
        addresses = [buffer.data_ptr() for buffer in group]
        told = [*range(len(group)), *order, start, capacity, *addresses]
        numbers = torch.tensor(told, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        places, nodes = numbers[: len(group)], numbers[len(group) : len(group) + MAX_WIDTH]
        length, room = numbers[len(group) + MAX_WIDTH :][:2].unbind()
        table = numbers[-len(group) :]
        with on(device):
            _move_nodes[len(group), heads](
                table, places, nodes, length, room, group[0],
                SIZE=size, SIZES=triton.next_power_of_2(size), WIDTH=MAX_WIDTH,
            )  # fmt: skip


def move_nodes(
    placed: CachePointers, order: torch.Tensor, places: torch.Tensor, like: torch.Tensor, heads: int
) -> None:
    """Put keys and values of the nodes `order` [width] behind the text, though source and destination overlap.

    Args:
        places: of buffers among the addresses of `placed`, all of `heads` and of rows as `like` [size] is.
    """
    with on(order.device):
        _move_nodes[len(places), heads](
            placed.buffers, places, order, placed.length, placed.capacity, like,
            SIZE=len(like), SIZES=triton.next_power_of_2(len(like)), WIDTH=len(order),
        )  # fmt: skip


@triton.jit
def _seen_part(query, keys, values, seen, most, total, found, scaling, softcap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is known after [rows] queries have seen one more tile: their greatest score, the sum of shares, what they
    found."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scaling
    if CAPPED:
        scores = (2 * tl.sigmoid(2 * scores / softcap) - 1) * softcap
    scores = tl.where(seen, scores, float("-inf"))
    greatest = tl.maximum(most, tl.max(scores, 1))
    # A row that has seen nothing yet has no greatest score to compare with.
    anchor = tl.where(greatest == float("-inf"), 0.0, greatest)
    shares = tl.exp(scores - anchor[:, None])
    kept = tl.exp(most - anchor)
    found = found * kept[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
    return greatest, total * kept + tl.sum(shares, 1), found


@triton.jit(do_not_specialize=["layer"])
def _attend_parts(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, value_ptr, first_ptr, length_ptr, capacity_ptr, buffers_ptr, positions_ptr, lineage_ptr,
    parts_ptr, most_ptr, total_ptr, layer, scaling, softcap,
    query_head, query_node, key_head, key_node, value_head, value_node,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NODES: tl.constexpr, SIZES: tl.constexpr, VALUE_SIZES: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Program (key head, part, rows): rows are the nodes of the heads that share the key head, one head after the
    other; the last part is the nodes themselves, the others are of the text."""
    head, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block * ROWS + tl.arange(0, ROWS)
    real = row < GROUPS * WIDTH
    node, own_head = row % WIDTH, head * GROUPS + row // WIDTH
    size, value_size = tl.arange(0, SIZES), tl.arange(0, VALUE_SIZES)
    sized, value_sized = (size < SIZE)[None, :], (value_size < VALUE_SIZE)[None, :]
    query = tl.load(
        query_ptr + own_head[:, None] * query_head + node[:, None] * query_node + size[None, :],
        mask=real[:, None] & sized, other=0.0,
    )  # fmt: skip
    length, capacity = tl.load(length_ptr), tl.load(capacity_ptr)
    first = tl.load(first_ptr + node)
    keys_ptr = tl.load(buffers_ptr + 2 * layer).to(tl.pointer_type(key_ptr.dtype.element_ty))
    values_ptr = tl.load(buffers_ptr + 2 * layer + 1).to(tl.pointer_type(value_ptr.dtype.element_ty))
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, VALUE_SIZES], tl.float32)
    if split < SPLITS:
        begin = tl.minimum(tl.min(first), length) // BLOCK * BLOCK
        each = tl.cdiv(tl.cdiv(length - begin, BLOCK), SPLITS) * BLOCK
        low = begin + split * each
        high = tl.minimum(low + each, length)
        for start in range(low, high, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            there = (slot < high)[:, None]
            place = (head * capacity + slot)[:, None]
            keys = tl.load(keys_ptr + place * SIZE + size[None, :], mask=there & sized, other=0.0)
            values = tl.load(values_ptr + place * VALUE_SIZE + value_size[None, :], mask=there & value_sized, other=0.0)
            seen = (slot < high)[None, :] & (slot[None, :] >= first[:, None])
            most, total, found = _seen_part(query, keys, values, seen, most, total, found, scaling, softcap, CAPPED)
    else:
        other = tl.arange(0, NODES)
        there = (other < WIDTH)[:, None]
        keys = tl.load(
            key_ptr + head * key_head + other[:, None] * key_node + size[None, :], mask=there & sized, other=0.0
        )
        values = tl.load(
            value_ptr + head * value_head + other[:, None] * value_node + value_size[None, :],
            mask=there & value_sized, other=0.0,
        )  # fmt: skip
        if block == 0:
            place = (head * capacity + length + other)[:, None]
            tl.store(keys_ptr + place * SIZE + size[None, :], keys, mask=there & sized)
            tl.store(values_ptr + place * VALUE_SIZE + value_size[None, :], values, mask=there & value_sized)
        lineage = tl.load(lineage_ptr + node)
        position = tl.load(positions_ptr + other, mask=other < WIDTH, other=0)
        seen = ((lineage[:, None] >> other[None, :]) & 1) == 1
        seen = seen & (other < WIDTH)[None, :] & (position[None, :] >= first[:, None])
        most, total, found = _seen_part(query, keys, values, seen, most, total, found, scaling, softcap, CAPPED)
    part = (own_head * WIDTH + node) * (SPLITS + 1) + split
    tl.store(most_ptr + part, most, mask=real)
    tl.store(total_ptr + part, total, mask=real)
    tl.store(parts_ptr + part[:, None] * VALUE_SIZE + value_size[None, :], found, mask=real[:, None] & value_sized)


@triton.jit
def _merge_parts(  # type: ignore[no-untyped-def]
    parts_ptr, most_ptr, total_ptr, sinks_ptr, found_ptr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_SIZE: tl.constexpr, PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr, VALUE_SIZES: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Program (head, node)."""
    head, node = tl.program_id(0), tl.program_id(1)
    part, size = tl.arange(0, ALL_PARTS), tl.arange(0, VALUE_SIZES)
    place = (head * WIDTH + node) * PARTS + part
    most = tl.load(most_ptr + place, mask=part < PARTS, other=float("-inf"))
    total = tl.load(total_ptr + place, mask=part < PARTS, other=0.0)
    greatest = tl.max(most)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        greatest = tl.maximum(greatest, sink)
    share = tl.exp(most - greatest)
    everything = tl.sum(share * total)
    if SINKS:
        everything += tl.exp(sink - greatest)
    there = (part < PARTS)[:, None] & (size < VALUE_SIZE)[None, :]
    parts = tl.load(parts_ptr + place[:, None] * VALUE_SIZE + size[None, :], mask=there, other=0.0)
    found = tl.sum(parts * share[:, None], 0) / everything
    tl.store(
        found_ptr + (node * HEADS + head) * VALUE_SIZE + size,
        found.to(found_ptr.dtype.element_ty), mask=size < VALUE_SIZE,
    )  # fmt: skip


@triton.jit
def _move_nodes(  # type: ignore[no-untyped-def]
    buffers_ptr, places_ptr, order_ptr, length_ptr, capacity_ptr, like_ptr,
    SIZE: tl.constexpr, SIZES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (buffer, head)."""
    place = tl.load(places_ptr + tl.program_id(0))
    buffer_ptr = tl.load(buffers_ptr + place).to(tl.pointer_type(like_ptr.dtype.element_ty))
    slot, size = tl.arange(0, WIDTH), tl.arange(0, SIZES)
    node = tl.load(order_ptr + slot)
    # Most nodes stay where they are.
    there = (node != slot)[:, None] & (size < SIZE)[None, :]
    row = tl.program_id(1) * tl.load(capacity_ptr) + tl.load(length_ptr)
    moved = tl.load(buffer_ptr + (row + node)[:, None] * SIZE + size[None, :], mask=there)
    # One thread's destination is another's source: all have read before any writes.
    tl.debug_barrier()
    tl.store(buffer_ptr + (row + slot)[:, None] * SIZE + size[None, :], moved, mask=there)
