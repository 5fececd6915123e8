"""Where in a long list of token ids the same tokens went before.

Hash chains, as compressors of the LZ77 family use them: for each of a few orders, every place is linked to the place
before it whose last `order` tokens fall into the same bucket. So adding a token is one link per order and never
touches what is there, the most recent places come first, and a long text is indexed with a few sorts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ORDERS = (1, 2, 4, 8)
"""Suffix lengths that are looked up; from there on, agreement is counted token by token."""

_SCAN = 64
"""Places of one bucket looked at, most recent first."""

_BULK = 48
"""From this many tokens on, sorting is faster than linking one by one."""

_WORD = (1 << 64) - 1
_FACTORS = tuple((0x9E3779B97F4A7C15 * (2 * i + 1) ** 5 | 1) & _WORD for i in range(1, ORDERS[-1] + 1))
"""An odd 64-bit multiplier per distance from the place (multiply-shift hashing)."""


def suffix_hashes(tail: Sequence[int]) -> list[int]:
    """One hash for each of `ORDERS` that `tail` is long enough for, of its last so many tokens."""
    found, total = [], 0
    for distance, factor in enumerate(_FACTORS[: len(tail)], start=1):
        total += tail[-distance] * factor
        if distance in ORDERS:
            found.append(total & _WORD)
    return found


class Segment:
    """A list of token ids of bounded length, and its index; 32 to 40 bytes per token of its capacity. Not thread-safe.

    Negative ids are borders: a match may begin with one, but does not reach across. A *place* is the number of tokens
    before it, borders included; 0 is none.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity`: tokens and borders that fit."""
        self.capacity, self.length = capacity, 0
        self.token_ids = array("q", bytes(8 * capacity))
        bits = max(4, (capacity // 2).bit_length())
        self._shift = 64 - bits
        self._heads = [array("i", bytes(4 << bits)) for _ in ORDERS]
        self._links = [array("i", bytes(4 * (capacity + 1))) for _ in ORDERS]
        self._run_start = 0

    @property
    def room(self) -> int:
        return self.capacity - self.length

    @property
    def nbytes(self) -> int:
        return sum(column.itemsize * len(column) for column in (self.token_ids, *self._heads, *self._links))

    def append(self, token_ids: Sequence[int]) -> None:
        """Add tokens; a border begins a new run. Raises ValueError where there is no room for all."""
        if len(token_ids) > self.room:
            raise ValueError(f"token_ids must be at most {self.room} for what is left of the segment")
        if len(token_ids) >= _BULK:
            self._append_many(np.asarray(token_ids, dtype=np.int64))
        else:
            for token_id in token_ids:
                self._append_one(token_id)

    def places(self, order: int, key: int) -> list[int]:
        """At most a few places whose last `order` tokens may be those that `key` is the hash of, most recent first."""
        number = ORDERS.index(order)
        links, found = self._links[number], list[int]()
        place = self._heads[number][key >> self._shift]
        while place and len(found) < _SCAN:
            found.append(place)
            place = links[place]
        return found

    def agreement(self, place: int, tail: Sequence[int]) -> int:
        """How many tokens before `place` agree with the end of `tail`."""
        token_ids, limit, length = self.token_ids, min(len(tail), place), 0
        while length < limit and (token_id := token_ids[place - 1 - length]) == tail[-1 - length]:
            length += 1
            if token_id < 0:
                break
        return length

    def _append_one(self, token_id: int) -> None:
        place = self.length
        self.token_ids[place] = token_id
        if token_id < 0:
            self._run_start = place
        self.length = place = place + 1
        keys = suffix_hashes(self.token_ids[max(self._run_start, place - ORDERS[-1]) : place])
        for key, heads, links in zip(keys, self._heads, self._links, strict=False):
            bucket = key >> self._shift
            links[place] = heads[bucket]
            heads[bucket] = place

    def _append_many(self, token_ids: npt.NDArray[np.int64]) -> None:
        first = self.length
        np.frombuffer(self.token_ids, dtype=np.int64)[first : first + len(token_ids)] = token_ids
        self.length += len(token_ids)
        begin = max(self._run_start, first - ORDERS[-1] + 1)
        text = np.frombuffer(self.token_ids, dtype=np.int64)[begin : self.length]
        places = np.arange(begin + 1, self.length + 1, dtype=np.int32)
        starts = np.maximum.accumulate(np.where(text < 0, places - 1, self._run_start))
        reach = places - starts
        total = np.zeros(len(text), dtype=np.uint64)
        for distance, factor in enumerate(_FACTORS[: len(text)]):
            total[distance:] += text[: len(text) - distance].view(np.uint64) * np.uint64(factor)
            if distance + 1 in ORDERS:
                new = (reach > distance) & (places > first)
                buckets = (total[new] >> np.uint64(self._shift)).astype(np.int64)
                self._link(ORDERS.index(distance + 1), places[new], buckets)
        self._run_start = int(starts[-1])

    def _link(self, number: int, places: npt.NDArray[np.int32], buckets: npt.NDArray[np.int64]) -> None:
        """Link ascending places: within a bucket each to the one before, the first to what the bucket held."""
        heads = np.frombuffer(self._heads[number], dtype=np.int32)
        links = np.frombuffer(self._links[number], dtype=np.int32)
        order = np.argsort(buckets, kind="stable")
        places, buckets = places[order], buckets[order]
        same = np.empty(len(places), dtype=np.bool_)
        same[:1], same[1:] = False, buckets[1:] == buckets[:-1]
        before = np.empty_like(places)
        before[1:] = places[:-1]
        before[~same] = heads[buckets[~same]]
        links[places] = before
        last = np.append(~same[1:], True)[: len(places)]
        heads[buckets[last]] = places[last]
