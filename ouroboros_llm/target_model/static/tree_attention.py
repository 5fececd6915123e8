"""Attention of a draft's nodes over slots of fixed number, of which a tensor says how many hold text.

Nothing here depends on a number that only the device knows, so the same operations serve every text and can be recorded
once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from ...decoding.draft_tree import DraftTree

Sees = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The library's index predicate of a kind of layer: (batch, head, query position, key position) -> visible."""


_ROWS = 6
"""Numbers of each node."""


class DraftInputs:
    """The nodes of one pass, in tensors that stay where they are: a pass over other nodes is other numbers in them.

    Attributes:
        ids, positions: [1, width].
        slots: [width], where each node's keys and values are written: behind the text.
        lineage: [width], one bit for the node itself and for each of its ancestors.
        parents: [width], the root's and those of what pads the pass are the root.
        guesses: [width], the token that has to be chosen after a node's parent for a walk to step into the node.
        numbers: [width], of the nodes.
        length, capacity: numbers, the tokens of the text and the slots of its buffers.
        buffers: addresses, of the keys and of the values of each layer.
    """

    def __init__(self, width: int, device: torch.device, layers: int = 0) -> None:
        """`layers`: as many addresses there is room for."""
        self.width = width
        size = _ROWS * width + 2 + 2 * layers
        # One row, so that one copy brings all of it to the device.
        self._row = torch.zeros(size, dtype=torch.long, device=device)
        self._staged = torch.zeros(size, dtype=torch.long, pin_memory=device.type == "cuda")
        # The same memory, to be written from Python.
        self._told = self._staged.numpy()
        rows, rest = self._row[: _ROWS * width].view(_ROWS, width), self._row[_ROWS * width :]
        ids, positions, self.slots, self.lineage, self.parents, self.guesses = rows
        self.ids, self.positions = ids[None], positions[None]
        self.length, self.capacity = rest[:2].unbind()
        self.buffers = rest[2:]
        self.numbers = torch.arange(width, device=device)

    def fill(
        self,
        draft: DraftTree,
        length: int,
        vocabulary: int,
        capacity: int = 0,
        addresses: Sequence[int] = (),
        guesses: Sequence[int] = (),
    ) -> None:
        """Take the nodes of `draft` behind so many tokens. What is left of the width sees nothing but itself.

        Args:
            guesses: as the attribute says; none: nothing is walked down.
        """
        size = _ROWS * self.width
        rows, numbers = self._told[:size].reshape(_ROWS, self.width), self._told[size:]
        # An id outside the vocabulary cannot be looked up. The target never chooses one, so any stand-in is right.
        known = [token_id if token_id < vocabulary else 0 for token_id in draft.token_ids]
        # Filled up with the root: a padding token among the ids would be warned of.
        rows[0, : draft.width], rows[0, draft.width :] = known, known[0]
        rows[1, : draft.width], rows[1, draft.width :] = draft.depths, 0
        rows[1] += length
        rows[2] = np.arange(length, length + self.width)
        rows[3] = _lineage(draft.parents, self.width)
        rows[4, 1 : draft.width], rows[4, draft.width :] = draft.parents[1:], 0
        rows[5, : len(guesses)], rows[5, len(guesses) :] = guesses, -1
        numbers[:2], numbers[2:] = (length, capacity), addresses
        self._row.copy_(self._staged, non_blocking=True)

    @property
    def placed(self) -> CachePointers:
        return CachePointers(self.length, self.capacity, self.buffers, self.positions[0], self.lineage)

    def seen(self, sees: Sees, slots: int) -> torch.Tensor:
        """[1, 1, width, slots]: whether the row's node sees the column's slot in a kind of layer."""
        device = self.ids.device
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        slot = torch.arange(slots, device=device)
        node = (slot - self.length).clamp(0, self.width - 1)
        committed = slot < self.length
        positions = torch.where(committed, slot, self.positions[0, node])
        own = ((self.lineage[:, None] >> node) & 1).bool() & (slot < self.length + self.width)
        allowed = sees(zero, zero, self.positions[:, None, :, None], positions[None, None, None])
        seen: torch.Tensor = allowed & (committed | own)
        return seen


class CachePointers(NamedTuple):
    """Where a pass takes place, in tensors that stay where they are, 64-bit numbers all of them."""

    length: torch.Tensor
    """A number, the tokens of the text."""
    capacity: torch.Tensor
    """A number, the slots of every buffer."""
    buffers: torch.Tensor
    """[2 * layers], the addresses of each layer's keys [1, key heads, capacity, size] and values."""
    positions: torch.Tensor
    """[width]."""
    lineage: torch.Tensor
    """[width], a bit for the node itself and for each of its ancestors."""


def _lineage(parents: Sequence[int], width: int) -> list[int]:
    """Per node the bits of itself and its ancestors, as signed 64-bit numbers."""
    bits = [1 << node for node in range(width)]
    for node, parent in enumerate(parents[1:], start=1):
        bits[node] |= bits[parent]
    return [word - (1 << 64) if word >> 63 else word for word in bits]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of nodes over slots.

    Args:
        query: [1, heads, width, size].
        key, value: [1, key heads, slots, size].
        seen: [1, 1, width, slots], as `DraftInputs.seen` gives it.
        scaling: of the scores; None: 1 / sqrt(size).
        softcap: what scores are squeezed below.
        sinks: [heads], scores that take their share of attention and bring nothing.

    Returns:
        [1, width, heads, value size].
    """
    _, heads, width, size = query.shape
    groups = heads // key.shape[1]
    # Heads that share keys are rows of one product: keys and values are not repeated for them.
    rows = query.reshape(1, key.shape[1], groups * width, size)
    mask = seen.expand(1, groups, width, -1).reshape(1, 1, groups * width, -1)
    if softcap is None and sinks is None:
        found = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = (rows @ key.transpose(2, 3)).float() * (size**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        found = _shares(scores.masked_fill(~mask, float("-inf")), sinks, width).to(value.dtype) @ value
    return found.reshape(1, heads, width, -1).transpose(1, 2).contiguous()


def _shares(scores: torch.Tensor, sinks: torch.Tensor | None, width: int) -> torch.Tensor:
    """Softmax of [1, key heads, groups * width, slots], with what sinks take of it left out."""
    if sinks is None:
        return scores.softmax(-1)
    taken = sinks.float().view(1, scores.shape[1], -1, 1).expand(-1, -1, -1, width).reshape(1, scores.shape[1], -1, 1)
    return torch.cat([scores, taken], -1).softmax(-1)[..., :-1]
