"""Phrases and the pools that keep them.

A *phrase* is a run of token ids that followed the text before. A pool stores whole token runs and finds in
them what came after the longest suffix of the current text (suffix matching with back-off, as in prompt lookup
and SuffixDecoding), so every n-gram statistic is derived from the runs and never stored.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .errors import OptionError

MAX_SCOPE_LENGTH = 255

PHRASE_LENGTH = 48
"""Longest phrase that `match` returns, in tokens: a round verifies at most 64."""

MATCH_LIMIT = 16
"""A match longer than this counts as this long."""


def check_scope(scope: object, name: str = "scope") -> str:
    """`scope` itself where it is a name; raises OptionError where it is not. Nothing in a name has a meaning."""
    if not isinstance(scope, str) or not scope or len(scope) > MAX_SCOPE_LENGTH or not scope.isprintable():
        raise OptionError(
            f"{name} must be 1 to {MAX_SCOPE_LENGTH} printable characters, for example 'conversation:42', "
            f"but got {scope!r:.80}"
        )
    return scope


def check_scopes(scopes: Sequence[str], name: str = "read_scopes") -> list[str]:
    """`scopes` as a list; raises OptionError where it is no sequence of names."""
    if isinstance(scopes, str):
        raise OptionError(
            f"{name} must be a sequence of scopes, but got the string {scopes!r:.80}; write [{scopes!r:.80}]"
        )
    return [check_scope(scope, f"{name}[{number}]") for number, scope in enumerate(scopes)]


@dataclass(frozen=True, slots=True)
class Phrase:
    """What once followed the text that was matched."""

    token_ids: tuple[int, ...]
    match_length: int
    """How many tokens before the phrase agree with the tail that was asked for, at most `MATCH_LIMIT`."""
    count: int = 1
    """How often the run that holds the phrase was added."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    runs: int
    tokens: int


@runtime_checkable
class PhrasePool(Protocol):
    """The phrases of one scope."""

    def add(self, token_ids: Sequence[int]) -> None:
        """Remember a run of tokens. Does not block on input or output; runs shorter than two tokens hold no phrase."""

    def match(self, tail: Sequence[int]) -> list[Phrase]:
        """What followed the longest suffixes of `tail`, best first: longer matches first, then more recent ones.

        Does not modify the pool. An empty list where nothing matches.
        """

    @property
    def stats(self) -> PoolStats:
        """How much the pool holds, without reading it."""


@runtime_checkable
class PoolSource(Protocol):
    """Where the pools of named scopes come from: a store, or memory."""

    def open(self, scope: str, *, fingerprint: str) -> PhrasePool:
        """The pool of `scope` for the tokenizer `fingerprint`; creates it where there is none."""

    def flush(self) -> None:
        """Make what was added durable. When it returns, it is so, or a warning was given."""

    def close(self) -> None:
        """Flush and release; idempotent."""


class MemoryPool:
    """A bounded pool in memory: the oldest runs go first. Safe to use from several threads.

    The index maps every 1-, 2-, 4- and 8-gram to the places that follow it, so adding a token is four dictionary
    entries, while generating too, and a match is four look-ups and a few comparisons.
    """

    _ORDERS = (8, 4, 2, 1)
    _MATCHES = 16
    _PLACES = 64
    _BORDER = -1

    def __init__(self, capacity: int = 1_000_000) -> None:
        """`capacity`: tokens kept at most."""
        self.capacity = capacity
        self._lock = threading.RLock()
        self._clear()

    def add(self, token_ids: Sequence[int], count: int = 1) -> None:
        """Remember a run that was seen `count` times; a run already there only counts up."""
        run = tuple(token_ids)
        with self._lock:
            known = self._numbers.get(run)
            if known is not None:
                self._counts[known] += count
            elif len(run) > 1:
                self._begin(count)
                self._numbers[run] = len(self._counts) - 1
                self._append(run[-self.capacity :])
                self._evict()

    def extend(self, token_ids: Sequence[int]) -> None:
        """Lengthen the running text: one run that grows, neither counted nor evicted."""
        with self._lock:
            if not self._counts:
                self._begin(1)
            self._append(token_ids)

    def match(self, tail: Sequence[int]) -> list[Phrase]:
        tail = tuple(tail[-MATCH_LIMIT:])
        found: dict[int, Phrase] = {}
        with self._lock:
            for order in self._ORDERS:
                if order <= len(tail):
                    self._match_order(tail, order, found)
        return sorted(found.values(), key=lambda phrase: -phrase.match_length)

    @property
    def stats(self) -> PoolStats:
        return PoolStats(runs=len(self._counts), tokens=len(self._token_ids) - len(self._counts))

    def _match_order(self, tail: tuple[int, ...], order: int, found: dict[int, Phrase]) -> None:
        for place in self._places.get(hash(tail[-order:]), ())[: -self._PLACES - 1 : -1]:
            if len(found) >= self._MATCHES:
                return
            length = self._agreement(place, tail) if place not in found else 0
            # The index keeps hashes: a shorter agreement than the order asked for is a collision.
            if length >= order and (token_ids := self._read(place)):
                found[place] = Phrase(token_ids, length, self._counts[bisect_right(self._starts, place) - 1])

    def _agreement(self, place: int, tail: tuple[int, ...]) -> int:
        """How many tokens before `place` agree with the end of `tail`."""
        length = 0
        while length < len(tail) and self._token_ids[place - 1 - length] == tail[-1 - length]:
            length += 1
        return length

    def _read(self, place: int) -> tuple[int, ...]:
        """The phrase that starts at `place`, up to the end of its run."""
        token_ids = self._token_ids[place : place + PHRASE_LENGTH].tolist()
        return tuple(token_ids[: token_ids.index(self._BORDER)] if self._BORDER in token_ids else token_ids)

    def _begin(self, count: int) -> None:
        self._token_ids.append(self._BORDER)
        self._starts.append(len(self._token_ids))
        self._counts.append(count)

    def _append(self, token_ids: Sequence[int]) -> None:
        start, recent = self._starts[-1], self._token_ids
        for token_id in token_ids:
            recent.append(token_id)
            window = tuple(recent[max(start, len(recent) - self._ORDERS[0]) :])
            for order in self._ORDERS:
                if order <= len(window):
                    self._places.setdefault(hash(window[-order:]), []).append(len(recent))

    def _evict(self) -> None:
        if self.stats.tokens <= self.capacity:
            return
        kept: list[tuple[tuple[int, ...], int]] = []
        size = 0
        for run, number in sorted(self._numbers.items(), key=lambda item: -item[1]):
            # A quarter of slack, so that the index is rebuilt once per quarter of the capacity, not per run.
            if kept and size + len(run) > self.capacity * 3 // 4:
                break
            kept.append((run, self._counts[number]))
            size += len(run)
        self._clear()
        for run, count in reversed(kept):
            self.add(run, count)

    def _clear(self) -> None:
        self._token_ids = array("q")
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._places: dict[int, list[int]] = {}


class MemorySource:
    """Pools of named scopes that live as long as this object; the least recently opened scope goes first."""

    def __init__(self, scopes: int = 64, capacity: int = 200_000) -> None:
        """`scopes`: pools kept at most; `capacity`: tokens per pool."""
        self._scopes, self._capacity = scopes, capacity
        self._pools: OrderedDict[tuple[str, str], MemoryPool] = OrderedDict()
        self._lock = threading.RLock()

    def open(self, scope: str, *, fingerprint: str) -> PhrasePool:
        with self._lock:
            pool = self._pools.setdefault((scope, fingerprint), MemoryPool(self._capacity))
            self._pools.move_to_end((scope, fingerprint))
            while len(self._pools) > self._scopes:
                self._pools.popitem(last=False)
            return pool

    def flush(self) -> None:
        """Nothing is ever written."""

    def close(self) -> None:
        self._pools.clear()
