"""Attention by kernels that find a text's keys and values by their addresses.

A layer keeps nothing of a text: the numbers in `DraftInputs` say whose buffers they are, how long the text is and how
many slots there are. So one recorded pass serves every text, however long it is or grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from ...transformers_api import Cache, CacheLayer, complete_layer
from ..kv_cache import SlotLayer
from .tree_attention import DraftInputs, Sees

Reach = Literal["all", "window", "chunk"]
"""What of the text before them nodes see: everything, the last so many positions, or those of their own chunk."""

_Kind = tuple[int, int, torch.dtype]
"""Heads, size and precision of a buffer."""


class PointerAttention:
    """Attention whose layers keep nothing of a text."""

    in_place = True

    def __init__(self, kernels: Any = None) -> None:
        """`kernels`: what computes `attend_in_place` and `move_nodes`; None: the module of that name, which needs
        Triton."""
        if kernels is None:
            from ..kernels import attention as kernels
        self._kernels = kernels
        self.layer_number: int | None = None
        """Of the layer whose nodes' keys and values were handed out last."""
        self._reaches: dict[int | None, Reach] = {}
        self._buffers: dict[int, _Kind] = {}
        """By place among the addresses."""
        self._alike: list[tuple[torch.Tensor, torch.Tensor, int]] | None = None

    def layer(self, number: int, own: SlotLayer, nodes: DraftInputs, counts: bool) -> CacheLayer:
        if own.is_initialized:
            for place, states in ((2 * number, own.keys), (2 * number + 1, own.values)):
                kind = (states.shape[1], states.shape[3], states.dtype)
                if self._buffers.get(place) != kind:
                    self._buffers[place], self._alike = kind, None
        return PlacedLayer(self, number, nodes, counts)

    def seen(self, nodes: DraftInputs, sees: Sees, slots: int, local_size: int | None) -> torch.Tensor:
        """[width], the first position that each node sees."""
        if local_size not in self._reaches:
            self._reaches[local_size] = reach_of(sees, local_size, nodes.ids.device)
        return first_seen(nodes.positions[0], self._reaches[local_size], local_size)

    def attend(
        self,
        nodes: DraftInputs,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seen: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        layer, self.layer_number = self.layer_number, None
        if layer is None:
            raise NotImplementedError("layers that attend to the keys of another")
        found: torch.Tensor = self._kernels.attend_in_place(
            query, key, value, seen, nodes.placed, layer, scaling, softcap, sinks
        )
        return found

    def move(self, nodes: DraftInputs, order: torch.Tensor, states: Cache) -> None:
        if self._alike is None:
            # Before anything is recorded: passes are made a few times by then.
            self._alike = [*_alike(self._buffers, order.device)]
        for places, like, heads in self._alike:
            self._kernels.move_nodes(nodes.placed, order, places, like, heads)


def _alike(buffers: dict[int, _Kind], device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Buffers of the same shape and precision: their places among the addresses, a row of such a buffer, heads."""
    for kind in dict.fromkeys(buffers.values()):
        heads, size, dtype = kind
        places = [place for place, other in buffers.items() if other == kind]
        yield torch.tensor(places, device=device), torch.empty(size, dtype=dtype, device=device), heads


@complete_layer
class PlacedLayer(CacheLayer):
    """Hands out the nodes' own keys and values; the kernel writes them behind the text."""

    is_compileable = True

    def __init__(self, attention: PointerAttention, number: int, nodes: DraftInputs, counts: bool) -> None:
        super().__init__()
        self._attention, self._number, self._nodes, self._counts = attention, number, nodes, counts
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._attention.layer_number = self._number
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> Any:
        return self._nodes.length if self._counts else 0


def first_seen(positions: torch.Tensor, reach: Reach, size: int | None) -> torch.Tensor:
    """The first position that is seen from each of `positions` [width]."""
    if reach == "all" or size is None:
        return torch.zeros_like(positions)
    return (positions - size + 1).clamp(min=0) if reach == "window" else positions // size * size


def reach_of(sees: Sees, size: int | None, device: torch.device) -> Reach:
    """Which of the kinds that there are kernels for the library's predicate is, by what it says around the edges.

    Raises:
        NotImplementedError: none of them.
    """
    edges = {edge + near for edge in (1, 64, 1000, size or 1, 2 * (size or 1)) for near in (-1, 0, 1)}
    position = torch.tensor(sorted(edges), device=device)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    told = sees(zero, zero, position[None, None, :, None], position[None, None, None])[0, 0]
    reaches: tuple[Reach, ...] = ("all",) if size is None else ("window", "chunk", "all")
    for reach in reaches:
        first = first_seen(position, reach, size)
        if torch.equal(told, (position <= position[:, None]) & (position >= first[:, None])):
            return reach
    raise NotImplementedError("attention that sees neither all, a window nor a chunk of the text before it")
