"""Attention by kernels that find a text's keys and values by their addresses.

A layer keeps nothing of a text: the numbers in `Nodes` say whose buffers they are, how long the text is and how many
slots there are. So one recorded pass serves every text, however long it is or grows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers.cache_utils import CacheLayerMixin

from .attention import Nodes, Sees
from .cache import SlotLayer

Reach = Literal["all", "window", "chunk"]
"""What of the text before them nodes see: everything, the last so many positions, or those of their own chunk."""


class InPlace:
    """Attention whose layers keep nothing of a text."""

    in_place = True

    def __init__(self, kernel: Any = None) -> None:
        """`kernel`: what computes `kernels.attend_in_place`; None: that itself, which needs Triton."""
        if kernel is None:
            from .kernels import attend_in_place as kernel
        self._kernel = kernel
        self.layer_number: int | None = None
        """Of the layer whose nodes' keys and values were handed out last."""
        self._reaches: dict[int | None, Reach] = {}

    def layer(self, number: int, own: SlotLayer, nodes: Nodes, counts: bool) -> CacheLayerMixin:
        return PlacedLayer(self, number, nodes, counts)

    def seen(self, nodes: Nodes, sees: Sees, slots: int, local_size: int | None) -> torch.Tensor:
        """[width], the first position that each node sees."""
        if local_size not in self._reaches:
            self._reaches[local_size] = reach_of(sees, local_size, nodes.ids.device)
        return first_seen(nodes.positions[0], self._reaches[local_size], local_size)

    def attend(
        self,
        nodes: Nodes,
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
        found: torch.Tensor = self._kernel(query, key, value, seen, nodes.placed, layer, scaling, softcap, sinks)
        return found


class PlacedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # the library's hook is not typed
    """Hands out the nodes' own keys and values; the kernel writes them behind the text."""

    is_compileable, is_sliding, is_croppable = True, False, False

    def __init__(self, attention: InPlace, number: int, nodes: Nodes, counts: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._attention, self._number, self._nodes, self._counts = attention, number, nodes, counts
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The text was begun by a pass of the library's own."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._attention.layer_number = self._number
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> Any:
        return self._nodes.length if self._counts else 0

    def get_max_length(self) -> int:
        return -1


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
