"""Guesses from the target's own alternatives: the tokens it found likeliest after a token before.

Token Recycling (arXiv 2408.08696) keeps the top-k ids per token; here with their probabilities, whose running means
stand in for single ones where the target samples (STAND, arXiv 2506.04708).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from ..decoding.drafter import Round, Successors
from .base import Guess, Guesses

NAME = "recycling"

KEPT = 8
"""Successors per token."""

_MIN_PROBABILITY = 0.01
"""Successors less likely than this are not worth keeping."""

_PROBABILITIES = (0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.93, 0.97, 0.99, 0.997)
"""Bounds of the classes in which guesses are equally good."""

_OTHERWISE = Guess((NAME, "other"), prior=0.1)

_PAIR = struct.Struct("<If")


class SuccessorTable:
    """Per token id: what the target found likeliest after it. Bounded; the least recently seen go first."""

    def __init__(self, capacity: int = 32_768) -> None:
        """`capacity`: tokens whose successors are kept at most."""
        self.capacity = capacity
        self._successors: dict[int, Successors] = {}
        self._seen: dict[int, int] = {}
        self._changed: set[int] = set()

    def __len__(self) -> int:
        return len(self._successors)

    def get(self, token_id: int) -> Successors | None:
        return self._successors.get(token_id)

    def set(self, token_id: int, successors: Successors) -> None:
        """The target found these likeliest after `token_id` just now."""
        self._put(token_id, tuple(pair for pair in successors[:KEPT] if pair[1] >= _MIN_PROBABILITY))
        self._seen[token_id] = 1

    def average(self, token_id: int, successors: Successors) -> None:
        """Let these successors count as one more observation of what follows `token_id`."""
        seen = self._seen.get(token_id, 0) + 1
        means = {other: probability * (seen - 1) / seen for other, probability in self._successors.get(token_id, ())}
        for other, probability in successors[:KEPT]:
            means[other] = means.get(other, 0.0) + probability / seen
        likeliest = sorted(means.items(), key=lambda pair: -pair[1])[:KEPT]
        self._put(token_id, tuple(pair for pair in likeliest if pair[1] >= _MIN_PROBABILITY))
        self._seen[token_id] = seen

    def take_changed(self) -> dict[int, bytes]:
        """What changed since the last call, per token, to be kept."""
        changed, self._changed = self._changed, set()
        # A copy: another turn of the scope may be in the middle of a round.
        return {token_id: encode(self._successors.get(token_id, ())) for token_id in list(changed)}

    def load(self, kept: Mapping[int, bytes]) -> None:
        """Take in what `take_changed` gave before."""
        for token_id, data in kept.items():
            if successors := decode(data):
                self._put(token_id, successors)
                self._seen[token_id] = 1
        self._changed.clear()

    def _put(self, token_id: int, successors: Successors) -> None:
        self._successors.pop(token_id, None)
        self._successors[token_id] = successors
        self._changed.add(token_id)
        if len(self._successors) > self.capacity:
            oldest = next(iter(self._successors))
            del self._successors[oldest]
            self._seen.pop(oldest, None)


class Recycling:
    """What the target found likeliest after the same token the last time."""

    name = NAME

    def __init__(self, table: SuccessorTable | None = None, *, sampling: bool = False) -> None:
        """`sampling`: whether the target samples, so that means say more than the last observation."""
        self.table = SuccessorTable() if table is None else table
        self._take = self.table.average if sampling else self.table.set

    def open(self, context: Sequence[int]) -> None:
        """The table outlives texts."""

    def start(self, context: Sequence[int]) -> int:
        return context[-1]

    def follow(self, state: int, token_id: int) -> int:
        return token_id

    def guesses(self, state: int) -> Guesses | None:
        successors = self.table.get(state)
        if not successors:
            return None
        by_token = {
            token_id: Guess((NAME, rank, bisect_right(_PROBABILITIES, probability)), probability / 2)
            for rank, (token_id, probability) in enumerate(successors)
        }
        return Guesses(by_token, _OTHERWISE)

    def learn(self, round: Round) -> None:
        for token_id, successors in round.read:
            self._take(token_id, successors)
        path = set(round.path)
        nodes = [node for node, successors in enumerate(round.successors) if successors]
        # What was accepted comes last, so that it stays.
        for node in sorted(nodes, key=lambda node: node in path):
            self._take(round.draft.token_ids[node], round.successors[node])


def encode(successors: Iterable[tuple[int, float]]) -> bytes:
    """Token ids and probabilities, eight bytes a pair."""
    return b"".join(_PAIR.pack(token_id, probability) for token_id, probability in successors)


def decode(data: bytes) -> Successors:
    """What `encode` made; nothing where the length is wrong."""
    return tuple(_PAIR.iter_unpack(data)) if len(data) % _PAIR.size == 0 else ()
