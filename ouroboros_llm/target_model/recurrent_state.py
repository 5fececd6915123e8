"""States that only go forward: convolutions and recurrences, which forget what they have read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


class RecurrentState:
    """States of a text that can be lengthened, but taken back only to where they were marked, or to nothing."""

    def __init__(self, new: Callable[[], Any]) -> None:
        """`new` makes the states of an empty text."""
        self._new, self.now, self.length = new, new(), 0
        self._marked: tuple[int, Any] = (0, None)

    def mark(self) -> None:
        """Remember the states as they are; the mark before is forgotten. Costs a copy of them."""
        self._marked = self.length, copy.deepcopy(self.now)

    def reach(self, length: int) -> int:
        """The longest text of at most `length` tokens that there are states of."""
        return max(known for known in (0, self._marked[0], self.length) if known <= length)

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens. Raises RuntimeError where `reach` does not say so."""
        if length and length == self.length:
            return
        if length not in (0, self._marked[0]):
            raise RuntimeError(f"these states cannot be rewound to {length} tokens, only to {self.reach(length)}")
        # The mark itself is used up: the next prompt leaves another one.
        self.length, self.now = length, self._marked[1] if length else self._new()
        self._marked = (0, None)

    def copy(self, length: int) -> RecurrentState:
        """A copy of the first `length` tokens' states that shares nothing; raises like `rewind`."""
        other = RecurrentState(self._new)
        if length and length == self._marked[0]:
            other.length, other.now = length, copy.deepcopy(self._marked[1])
        elif length:
            other.length, other.now = self.length, copy.deepcopy(self.now)
            other.rewind(length)
        return other

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for states in _tensors((self.now, self._marked[1]), set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that the library keeps somewhere in `value`: in layers, lists and dictionaries."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in list(value.values()):
            yield from _tensors(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), seen)
