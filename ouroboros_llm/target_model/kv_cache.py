"""Keys and values that can be written as a tree and kept as a path.

`SlotCache` keeps every layer at full length in a buffer that grows by doubling, so a pass writes its nodes in place
(the library's dynamic cache copies itself every pass) and dropping tokens is forgetting a number. Sliding layers keep
their full length too; the mask hides what they must not see. `LibraryCache` holds what such buffers cannot:
convolution states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from ..transformers_api import Cache, CacheLayer, DynamicCache, attention_layers, complete_layer, crop, is_croppable
from .recurrent_state import RecurrentState


class RewindableCache(Protocol):
    """A transformers cache and what a round does with it."""

    @property
    def states(self) -> Cache:
        """What the model's forward is handed."""

    @property
    def can_drop(self) -> bool:
        """Whether tokens of the last pass can be dropped."""

    @property
    def can_rewind(self) -> bool:
        """Whether tokens of earlier passes can be dropped too, however many."""

    def keep(self, start: int, path: Sequence[int], width: int) -> None:
        """Of the `width` tokens written from position `start` on, keep those of `path`, in that order."""

    def reach(self, length: int) -> int:
        """The longest text of at most `length` tokens that `rewind` can go back to; 0 is always one."""

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens, to which `reach` must reach."""

    def mark(self) -> None:
        """Make sure that this length can be gone back to. Costs a copy where states are not kept by position."""

    def copy(self, length: int) -> RewindableCache:
        """A cache of the first `length` tokens, to which `reach` must reach, in storage of its own."""

    def shrink(self) -> None:
        """Free buffers that hold no token."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""

    @property
    def token_bytes(self) -> int | None:
        """Bytes of one token's keys and values, in all layers that have read something; None where states are not kept
        by position."""


_ROOM = 256
"""Slots that buffers grow by at least."""


def roomy(slots: int) -> int:
    """The number of slots of a buffer that is to hold so many: one of a few, each at most half as many again as the
    one before."""
    capacity = _ROOM
    while capacity < slots:
        capacity = capacity * 3 // 2 if capacity & (capacity - 1) == 0 else capacity * 4 // 3
    return capacity


@complete_layer
class SlotLayer(CacheLayer):
    """One layer's keys and values, [1, heads, capacity, head size], of which the first `length` slots count."""

    keys: torch.Tensor
    values: torch.Tensor
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], 0, states.shape[-1]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            self._grow(end, key_states.device)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def move(self, start: int, slots: torch.Tensor) -> None:
        """Copy `slots` to where `start` is; safe though source and destination overlap."""
        end = start + len(slots)
        for states in (self.keys, self.values):
            states[:, :, start:end] = states.index_select(2, slots)

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over keys and values of a text, [1, heads, length, head size], in a layer that is empty."""
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.length = keys, values, keys.shape[2]

    def copy(self, length: int) -> SlotLayer:
        """The first `length` slots, in buffers with room to go on: what is copied is about to grow."""
        other = SlotLayer()
        other.fill(self.keys[:, :, :length], self.values[:, :, :length])
        other.resize(length + _ROOM)
        return other

    def resize(self, capacity: int) -> None:
        """Move to buffers of so many slots, at least as many as count."""
        # One after the other: at no time are two old buffers there beside two new ones.
        self.keys = self._resized(self.keys, capacity)
        self.values = self._resized(self.values, capacity)

    def _grow(self, length: int, device: torch.device) -> None:
        # What came from a file lies on one device, whichever the layer computes on.
        self.device = device
        self.resize(max(length, self.capacity + max(self.capacity // 2, _ROOM)))

    @property
    def capacity(self) -> int:
        """Slots that there are."""
        # Where memory ran out, one of the two may have grown alone.
        return min(self.keys.shape[2], self.values.shape[2])

    def _resized(self, old: torch.Tensor, capacity: int) -> torch.Tensor:
        if old.shape[2] == capacity:
            return old
        new = torch.zeros(*old.shape[:2], capacity, old.shape[3], dtype=old.dtype, device=self.device)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new


class SlotCache:
    """Full-length buffers for models whose layers are all attention."""

    can_drop = can_rewind = True

    def __init__(self, layers: Sequence[SlotLayer]) -> None:
        self._layers = layers
        self.states = Cache(layers=list(layers))

    def keep(self, start: int, path: Sequence[int], width: int) -> None:
        if tuple(path) != tuple(range(len(path))):
            self._move(start, [start + node for node in path])
        self.rewind(start + len(path))

    def reach(self, length: int) -> int:
        return length

    def rewind(self, length: int) -> None:
        for layer in self._used:
            layer.length = min(layer.length, length)

    def mark(self) -> None:
        pass  # every length can be gone back to

    @property
    def capacity(self) -> int:
        """Slots that every layer has."""
        return min((layer.capacity for layer in self._used), default=0)

    def reserve(self, slots: int) -> None:
        """Let every layer have as many slots as the others, and so many at least."""
        # Where memory ran out, keys may have grown without their values.
        capacities = {states.shape[2] for layer in self._used for states in (layer.keys, layer.values)}
        if len(capacities) > 1 or min(capacities, default=slots) < slots:
            capacity = roomy(slots)
            for layer in self._used:
                layer.resize(capacity)

    def addresses(self) -> list[int]:
        """Where each layer's keys begin and each layer's values; 0 where a layer has none of its own."""
        return [
            states.data_ptr() if layer.is_initialized else 0
            for layer in self._layers
            for states in (layer.keys, layer.values)
        ]

    def extend(self, width: int) -> None:
        """Count the next `width` slots of every layer, which were written in place."""
        for layer in self._used:
            layer.length += width

    @torch.inference_mode()
    def copy(self, length: int) -> SlotCache:
        return SlotCache([layer.copy(length) if layer.is_initialized else SlotLayer() for layer in self._layers])

    @torch.inference_mode()
    def shrink(self) -> None:
        for layer in self._used:
            if layer.keys.shape[2] > layer.length:
                layer.resize(layer.length)

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._used)

    @property
    def token_bytes(self) -> int:
        # Counted, because configurations have too many ways to say it: grouped queries, layers that share keys, layers
        # of several kinds, latent attention.
        states = [part for layer in self._used for part in (layer.keys, layer.values)]
        return sum(part.nbytes // part.shape[-2] for part in states)

    @torch.inference_mode()
    def unload(self, length: int) -> dict[str, torch.Tensor]:
        """The first `length` slots of every layer that has its own: "NUMBER.keys" and "NUMBER.values", [1, heads,
        length, head size], on the CPU."""
        return {
            f"{number}.{name}": getattr(layer, name)[:, :, :length].contiguous().cpu()
            for number, layer in enumerate(self._layers)
            if layer.is_initialized
            for name in ("keys", "values")
        }

    @torch.inference_mode()
    def load(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Fill an empty cache with what `unload` returned."""
        for number in range(len(self._layers)):
            if f"{number}.keys" in tensors:
                parts = (tensors[f"{number}.{name}"].to(device, copy=True) for name in ("keys", "values"))
                self._layers[number].fill(*parts)

    def _move(self, start: int, slots: list[int]) -> None:
        if self._used[0].keys.is_cuda and find_spec("triton") is not None:
            from .kernels.attention import move_slots

            return move_slots([states for layer in self._used for states in (layer.keys, layer.values)], start, slots)
        there: dict[torch.device, torch.Tensor] = {}
        for layer in self._used:
            if layer.device not in there:
                there[layer.device] = torch.tensor(slots, device=layer.device)
            layer.move(start, there[layer.device])

    @property
    def _used(self) -> list[SlotLayer]:
        # Layers that share another layer's keys never write their own.
        return [layer for layer in self._layers if layer.is_initialized]


class LibraryCache:
    """The library's own cache, for models with states that a buffer of slots cannot hold.

    Convolution states can drop the end of the last pass, recurrent states cannot drop anything; both can be marked.
    """

    can_rewind = False
    token_bytes = None

    def __init__(self, config: PreTrainedConfig, known: RecurrentState | None = None) -> None:
        self._config = config
        self._known = known or RecurrentState(lambda: DynamicCache(config=config))

    @property
    def states(self) -> Cache:
        states: Cache = self._known.now
        return states

    @property
    def can_drop(self) -> bool:
        return is_croppable(self.states)

    def keep(self, start: int, path: Sequence[int], width: int) -> None:
        if self.can_drop:
            crop(self.states, width - len(path))
        elif len(path) != width:
            raise RuntimeError(f"cannot drop {width - len(path)} of {width} tokens from recurrent states")
        self._known.length = start + len(path)

    def reach(self, length: int) -> int:
        return self._known.reach(length)

    def rewind(self, length: int) -> None:
        self._known.rewind(length)

    def mark(self) -> None:
        self._known.mark()

    def copy(self, length: int) -> LibraryCache:
        return LibraryCache(self._config, self._known.copy(length))

    def shrink(self) -> None:
        pass  # the library's tensors hold what counts and no more

    @property
    def nbytes(self) -> int:
        return self._known.nbytes


def cache_for(config: PreTrainedConfig) -> RewindableCache:
    """The cache that can do most with a model of this configuration."""
    layers = attention_layers(config)
    return LibraryCache(config) if layers is None else SlotCache([SlotLayer() for _ in range(layers)])
