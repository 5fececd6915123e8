"""Finds a short completion from a grammar state, so that constrained output ends within its budget."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from .vocabulary import Vocabulary

_CLOSERS = b'}]"'
_FREE = frozenset(b"abcdghijklmopqrsuvwxyz ")
"""Bytes that stand in strings of JSON only: where they may come, a quotation mark is the only closer."""

_AWKWARD = frozenset(b"-+.eE\\")
"""Bytes after which more must come."""

_SAMPLED = 12
"""Options looked at first where there are many: inside of strings most are alike."""

_BYTES_PER_TOKEN = 8

_PATIENCE = 8
"""Times that the same way of closing is taken before another one is tried."""


class Ending:
    """Finds ways to the end by always taking what closes soonest, one byte at a time.

    A way that was found is one: every step was taken in the grammar itself. That none is shorter is likely, not proven.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        shortest = vocabulary.shortest
        self._bytes = np.flatnonzero(shortest >= 0)
        self._tokens = np.concatenate([shortest[self._bytes], vocabulary.special])
        self._awkward = {int(shortest[byte]) for byte in _AWKWARD}
        self._closers = [int(shortest[byte]) for byte in _CLOSERS if shortest[byte] >= 0]

    def way(self, state: Any, limit: int, tries: int = 0) -> tuple[int, ...] | None:
        """Tokens from `state` to an end, at most `limit`; None where no such way was found.

        `tries`: how many other ways to look at, each different from the first in one step, while that is too long.
        """
        best, counts = self._walk(state, limit)
        turns = [(step, option) for step, count in enumerate(counts) for option in range(1, count)]
        # Where even what closes soonest leads too far, one other step seldom helps.
        for turn in turns[: tries if best is not None else tries // 8]:
            if best is not None and len(best) <= limit:
                break
            way, _ = self._walk(state, limit, turn)
            if way is not None and (best is None or len(way) < len(best)):
                best = way
        return best

    def _walk(
        self, state: Any, limit: int, turn: tuple[int, int] = (-1, 0)
    ) -> tuple[tuple[int, ...] | None, list[int]]:
        """A way, however long, and how many options there were at each of its steps. `turn`: at which step to take
        another option than the first."""
        here, taken, counts = state.deep_copy(), list[int](), list[int]()
        seen: Counter[bytes] = Counter()
        while len(taken) <= limit * _BYTES_PER_TOKEN:
            if here.is_accepting():
                return self._shorter(state, taken), counts
            if self._forced(here, taken):
                continue
            mask = here.compute_bitmask()
            options, closes = self._options(here, mask, whole=seen[mask] >= _SAMPLED)
            if not options:
                break
            # Where the same is asked again, the first answer may lead round in circles.
            number = turn[1] if turn[0] == len(counts) else seen[mask] // (_PATIENCE if closes else 1)
            if number == seen[mask] == 1 and not closes and (new := self._news(here, mask, seen)):
                options, number = new, 0
            seen[mask] += 1
            counts.append(min(len(options), _SAMPLED))
            token_id = options[number % len(options)]
            if not here.consume_token(token_id):
                break
            taken.append(token_id)
            if closes:
                seen.clear()
        return None, counts

    def _forced(self, here: Any, taken: list[int]) -> bool:
        """Go along what the grammar forces, if it forces anything."""
        forced = here.compute_ff_tokens()
        count = here.try_consume_tokens(forced) if forced else 0
        taken += forced[:count]
        if forced and not count:
            # The library takes text for a special token where the tokenizer has one for it.
            token_id = next((int(self._vocabulary.shortest[byte]) for byte in here.compute_ff_bytes()), -1)
            count = int(token_id >= 0 and here.consume_token(token_id))
            taken += [token_id] * count
        return count > 0

    def _options(self, here: Any, mask: bytes, *, whole: bool) -> tuple[list[int], bool]:
        """Tokens of one byte that may come, those that close soonest first; whether the first one closes something.

        `whole`: all of them, where a sample has led nowhere, as in an address, which may hold braces but needs an @.
        """
        bits = np.frombuffer(mask, dtype=np.uint8)
        allowed = (bits[self._tokens >> 3] >> (self._tokens & 7)) & 1
        texts = self._bytes[allowed[: len(self._bytes)] > 0]
        closers = b'"' if not _FREE.isdisjoint(texts.tolist()) else b"}]"
        shortest = self._vocabulary.shortest
        first = [int(shortest[byte]) for byte in closers if byte in texts]
        special = self._tokens[len(self._bytes) :][allowed[len(self._bytes) :] > 0]
        others = [int(i) for i in (*special, *shortest[texts]) if i not in first]
        if first:
            return [*first, *others], True
        few = others if whole else others[:: max(1, len(others) // _SAMPLED)]
        found = sorted((self._distance(here, token_id), token_id) for token_id in few)
        if len(few) < len(others) and found[0][0][0] > 1:
            found = sorted((self._distance(here, token_id), token_id) for token_id in others)
        return [token_id for _, token_id in found], False

    def _news(self, here: Any, mask: bytes, seen: Counter[bytes]) -> list[int]:
        """Tokens of one byte that lead out of a circle, as the @ of an address does: to where what may come next is not
        what it was anywhere before."""
        found = []
        for token_id in self._options(here, mask, whole=True)[0]:
            there = here.deep_copy()
            if there.consume_token(token_id):
                self._forced(there, [])
                if there.is_accepting() or there.compute_bitmask() not in seen:
                    found.append(token_id)
        return found

    def _distance(self, here: Any, token_id: int) -> tuple[int, int, bool]:
        """How far from an end a token leads: whether it ends the text or a part of it, or else forces something; then
        how much it forces."""
        there = here.deep_copy()
        if not there.consume_token(token_id):
            return 4, 0, True
        forced = len(there.compute_ff_bytes())
        self._forced(there, [])
        awkward = token_id in self._awkward
        if there.is_accepting():
            return 0, forced, awkward
        mask = there.compute_bitmask()
        closes = any(mask[i >> 3] >> (i & 7) & 1 for i in self._closers)
        return (1 if closes else 2 if forced else 3), forced, awkward

    def _shorter(self, state: Any, taken: list[int]) -> tuple[int, ...]:
        """The same text in fewer tokens, where the grammar takes these."""
        compressed = self._vocabulary.compressed(taken)
        usable = len(compressed) < len(taken) and state.validate_tokens(compressed) == len(compressed)
        return tuple(compressed if usable else taken)
