"""Keys and values that can be written as a tree and kept as a path.

`SlotCache` keeps every layer at full length in a buffer that grows by doubling, so a pass writes its nodes in place
(the library's dynamic cache copies itself every pass) and dropping tokens is forgetting a number. Sliding layers keep
their full length too; the mask hides what they must not see. `LibraryCache` holds what such buffers cannot:
convolution states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


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
        """Whether tokens of earlier passes can be dropped too."""

    def keep(self, start: int, path: Sequence[int], width: int) -> None:
        """Of the `width` tokens written from position `start` on, keep those of `path`, in that order."""

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # the library's hook is not typed
    """One layer's keys and values, [1, heads, capacity, head size], of which the first `length` slots count."""

    keys: torch.Tensor
    values: torch.Tensor
    is_compileable, is_sliding, is_croppable = False, False, True
    _FIRST_CAPACITY = 256

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        if end > self.keys.shape[2]:
            self._grow(end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def move(self, start: int, slots: torch.Tensor) -> None:
        """Copy `slots` to where `start` is; safe though source and destination overlap."""
        end = start + len(slots)
        for states in (self.keys, self.values):
            states[:, :, start:end] = states.index_select(2, slots)

    def _grow(self, length: int) -> None:
        capacity = max(length, 2 * self.keys.shape[2], self._FIRST_CAPACITY)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)


class SlotCache:
    """Full-length buffers for models whose layers are all attention."""

    can_drop = can_rewind = True

    def __init__(self, layers: int) -> None:
        self._layers = [SlotLayer() for _ in range(layers)]
        self.states = Cache(layers=list(self._layers))

    def keep(self, start: int, path: Sequence[int], width: int) -> None:
        if tuple(path) != tuple(range(len(path))):
            slots: dict[torch.device, torch.Tensor] = {}
            for layer in self._used:
                if layer.device not in slots:
                    slots[layer.device] = torch.tensor([start + node for node in path], device=layer.device)
                layer.move(start, slots[layer.device])
        self.rewind(start + len(path))

    def rewind(self, length: int) -> None:
        for layer in self._used:
            layer.length = min(layer.length, length)

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._used)

    @property
    def _used(self) -> list[SlotLayer]:
        # Layers that share another layer's keys never write their own.
        return [layer for layer in self._layers if layer.is_initialized]


class LibraryCache:
    """The library's own cache, for models with states that a buffer of slots cannot hold.

    Convolution states can drop the end of the last pass, recurrent states cannot drop anything.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._recording = False
        self._start()

    @property
    def can_drop(self) -> bool:
        return bool(getattr(self.states, "is_croppable", False))

    can_rewind = False

    def keep(self, start: int, path: Sequence[int], width: int) -> None:
        if not self.can_drop:
            if len(path) != width:
                raise RuntimeError(f"cannot drop {width - len(path)} of {width} tokens from recurrent states")
            return
        # Recording starts with the first round: while it is on, nothing that a prompt wrote is ever forgotten.
        if not self._recording:
            self.states.activate_past_recording()  # type: ignore[no-untyped-call]
            self._recording = True
        self.states.crop(len(path) - width)

    def rewind(self, length: int) -> None:
        if length:
            raise RuntimeError("these states cannot be rewound, only started anew")
        self._start()

    @property
    def nbytes(self) -> int:
        return 0

    def _start(self) -> None:
        self.states = DynamicCache(config=self._config)
        self._recording = False


def cache_for(config: PreTrainedConfig) -> RewindableCache:
    """The cache that can do most with a model of this configuration."""
    layers = DynamicCache(config=config).layers
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return SlotCache(len(layers))
    return LibraryCache(config)
