"""Attention backends registered with transformers for fixed-shape passes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from typing import Any, Protocol

import torch

from ...transformers_api import Cache, CacheLayer, complete_layer, register_attention
from ..kv_cache import SlotLayer
from .tree_attention import DraftInputs, Sees, attend

_numbers = count()


class Attention(Protocol):
    """How nodes attend, and how layers show them keys and values."""

    @property
    def in_place(self) -> bool:
        """Whether layers keep nothing of a text, which is found by the addresses that come with the nodes."""

    def layer(self, number: int, own: SlotLayer, nodes: DraftInputs, counts: bool) -> CacheLayer:
        """A layer for the length of a pass, or for as long as `nodes` are. `counts`: whether it is to say how long the
        text is."""

    def seen(self, nodes: DraftInputs, sees: Sees, slots: int, local_size: int | None) -> torch.Tensor:
        """What nodes see in a kind of layer, in whatever form `attend` takes it."""

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
        """[1, width, heads, value size] of query [1, heads, width, size], and what the layer's `update` returned."""

    def move(self, nodes: DraftInputs, order: torch.Tensor, states: Cache) -> None:
        """Put keys and values of the nodes `order` [width] behind the text, in every layer of `states`."""


def attention_for(device: torch.device) -> Attention:
    """In place where there are kernels for a device, else over all slots."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from .in_place import PointerAttention

        return PointerAttention()
    return MaskedAttention()


class AttentionBackend:
    """Two functions that are registered with the library for one model, and who attends at the moment.

    It holds nothing of the model, so that it can outlive it.
    """

    def __init__(self, attention: Attention) -> None:
        self.name = f"ouroboros_{next(_numbers)}"
        self.attention = attention
        self.nodes: DraftInputs | None = None
        self.calls = 0
        """Layers that attended in this pass."""
        register_attention(self.name, self.attend, self.seen)

    def seen(self, slots: int, sees: Sees, local_size: int | None) -> torch.Tensor:
        """The library asks this once for every kind of layer; what it gets it hands to `attend`."""
        assert self.nodes is not None
        return self.attention.seen(self.nodes, sees, slots, local_size)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """The library's layers call this. Windows come with the mask, so the rest of what they say is not needed."""
        if self.nodes is None or attention_mask is None or position_bias is not None:
            raise NotImplementedError("attention without a mask of ours, or with a bias for positions")
        self.calls += 1
        found = self.attention.attend(self.nodes, query, key, value, attention_mask, scaling, softcap, s_aux)
        return found, None


class MaskedAttention:
    """Plain operations, over all slots that there are."""

    in_place = False

    def layer(self, number: int, own: SlotLayer, nodes: DraftInputs, counts: bool) -> CacheLayer:
        return SlotsLayer(own, nodes, counts)

    def seen(self, nodes: DraftInputs, sees: Sees, slots: int, local_size: int | None) -> torch.Tensor:
        return nodes.seen(sees, slots)

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
        return attend(query, key, value, seen, scaling, softcap, sinks)

    def move(self, nodes: DraftInputs, order: torch.Tensor, states: Cache) -> None:
        layers: Sequence[Any] = states.layers
        for layer in layers:
            layer.move(order)


@complete_layer
class SlotsLayer(CacheLayer):
    """One layer of a text for the length of a pass: writes nodes behind the text, shows all slots."""

    # Windows are for the mask: the library's own sliding layers move their slots, which nodes of a tree cannot share.
    is_compileable = True

    def __init__(self, own: SlotLayer, nodes: DraftInputs, counts: bool) -> None:
        super().__init__()
        self._own, self._nodes, self._counts, self.is_initialized = own, nodes, counts, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for slots, states in ((self._own.keys, key_states), (self._own.values, value_states)):
            slots.index_copy_(2, self._nodes.slots, states)
        return self._own.keys, self._own.values

    def move(self, order: torch.Tensor) -> None:
        """As `Attention.move`."""
        if self._own.is_initialized:
            for slots in (self._own.keys, self._own.values):
                slots.index_copy_(2, self._nodes.slots, slots.index_select(2, self._nodes.length + order))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._own.capacity, 0

    def get_seq_length(self) -> Any:
        return self._nodes.length if self._counts else 0
