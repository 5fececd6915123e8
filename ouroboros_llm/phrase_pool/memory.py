"""Pools in memory: what a store keeps open, and all there is without a store."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from .base import ANSWER, ANSWERS, KEPT_ANSWERS, MATCH_LIMIT, PHRASE_LENGTH, Phrase, PhrasePool, PoolStats, run_key
from .suffix_index import ORDERS, Segment, suffix_hashes

_MIDDLE = -2
"""The border before a run that does not begin where an answer begins."""

_MATCHES = 24
"""Phrases returned at most."""

_RECENT = 512
"""A run added again stays where it is while no more tokens than this came after it."""

_FIRST_SEGMENT = 1024
"""Tokens of a pool's first segment."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that go into a pool together."""

    token_ids: Sequence[int]
    count: int = 1
    """How often they were added."""
    answer: bool = True
    """Whether they begin where an answer begins."""


class MemoryPool:
    """A bounded pool in memory: the oldest runs go first. Safe to use from several threads.

    Runs lie one after the other on a few shelves, each larger than the one before: adding never rebuilds an index, and
    making room drops the oldest shelf whole.
    """

    def __init__(self, capacity: int = 1_000_000) -> None:
        """`capacity`: tokens kept at most."""
        self.capacity = capacity
        self._lock = threading.RLock()
        self._shelves: list[_Shelf] = []
        self._runs: dict[bytes, tuple[_Shelf, int]] = {}
        self._tokens = 0
        self._notes: dict[str, bytes] = {}
        self._answers: dict[str, bytes] = {}
        """Those notes that say which answer a prompt got, the last ones last."""
        self._inbox: deque[list[Run]] = deque()
        self._adding = False

    def add(self, token_ids: Sequence[int], *, answer: bool = True) -> None:
        self.add_all([Run(token_ids, answer=answer)])

    def add_all(self, runs: Iterable[Run]) -> None:
        """Remember many runs at once, the oldest first. A run already there counts up, and becomes recent."""
        self._inbox.append([run for run in runs if len(run.token_ids) > 1])
        with self._lock:
            # A finalizer may add in the middle of an addition, in the same thread: that one takes it in.
            if not self._adding:
                self._adding = True
                try:
                    while self._inbox:
                        self._take_in(self._inbox.popleft())
                finally:
                    self._adding = False

    def extend(self, token_ids: Sequence[int]) -> None:
        """Lengthen the running text: one run that grows, neither counted nor evicted."""
        with self._lock:
            while len(token_ids):
                if not self._shelves or not self._shelves[-1].room:
                    # The new shelf begins with what a match needs of the text before.
                    before = self._shelves[-1].tail(MATCH_LIMIT) if self._shelves else []
                    self._open_shelf(len(token_ids) + MATCH_LIMIT + 1).begin(Run(before, answer=False), b"")
                shelf = self._shelves[-1]
                part, token_ids = token_ids[: shelf.room], token_ids[shelf.room :]
                shelf.extend(part)
                shelf.write()
                self._tokens += len(part)

    def match(self, tail: Sequence[int]) -> list[Phrase]:
        tail = tuple(tail[-MATCH_LIMIT:])
        found: dict[tuple[int, int], Phrase] = {}
        with self._lock:
            for order, key in reversed(list(zip(ORDERS, suffix_hashes(tail), strict=False))):
                for number in reversed(range(len(self._shelves))):
                    if len(found) < _MATCHES:
                        self._match(number, order, key, tail, found)
        return sorted(found.values(), key=lambda phrase: -phrase.match_length)

    @property
    def stats(self) -> PoolStats:
        return PoolStats(runs=len(self._runs), tokens=self._tokens)

    def holds(self, token_ids: Sequence[int]) -> bool:
        """Whether this run is in the pool, as it was added."""
        with self._lock:
            return run_key(token_ids[-self.capacity :]) in self._runs

    def noted_run(self, name: str) -> tuple[int, ...]:
        with self._lock:
            notes = self._answers if name.startswith(ANSWERS) else self._notes
            shelf, number = self._runs.get(notes.get(name, b""), (None, 0))
            return () if shelf is None else tuple(shelf.run(number).token_ids)

    def holds_all(self, keys: Collection[bytes]) -> bool:
        """Whether all runs with these keys (`run_key`) are in the pool."""
        with self._lock:
            return all(key in self._runs for key in keys)

    def take_out(self, runs: Collection[bytes], notes: Collection[str]) -> int:
        """Drop the runs with these keys, tokens and all, and the notes of these names; returns the number of runs."""
        with self._lock:
            gone = [key for key in runs if key in self._runs]
            for name in notes:
                self._notes.pop(name, None)
                self._answers.pop(name, None)
            if gone:
                kept = [run for shelf in self._shelves for run in shelf.runs(without=set(gone))]
                self._shelves, self._runs, self._tokens = [], {}, 0
                self.add_all(kept)
            return len(gone)

    @property
    def is_locked(self) -> bool:
        """Whether another thread is in here, or was when this process was forked: then it stays so."""
        if not self._lock.acquire(blocking=False):
            return True
        self._lock.release()
        return False

    @property
    def nbytes(self) -> int:
        """Memory of tokens and index; what is kept per run comes to a few hundred bytes each beside it."""
        return sum(shelf.segment.nbytes for shelf in self._shelves)

    @property
    def _length(self) -> int:
        """Tokens on the shelves, those that moved on and borders included."""
        return sum(shelf.segment.length for shelf in self._shelves)

    def remember(self, notes: Mapping[str, bytes]) -> None:
        with self._lock:
            for name, note in notes.items():
                if name.startswith(ANSWERS):
                    self._answers.pop(name, None)
                    self._answers[name] = note
                else:
                    self._notes[name] = note
            for name in list(islice(self._answers, max(0, len(self._answers) - KEPT_ANSWERS))):
                del self._answers[name]

    def recall(self, prefix: str) -> Mapping[str, bytes]:
        with self._lock:
            known = chain(self._notes.items(), self._answers.items())
            return {name: note for name, note in known if name.startswith(prefix)}

    def _match(
        self, number: int, order: int, key: int, tail: tuple[int, ...], found: dict[tuple[int, int], Phrase]
    ) -> None:
        shelf = self._shelves[number]
        for place in shelf.segment.places(order, key):
            if len(found) >= _MATCHES:
                return
            length = 0 if (number, place) in found else shelf.segment.agreement(place, tail)
            # Different tokens may share a bucket: what agrees less than was asked for is no match.
            if length >= order and (phrase := shelf.read(place, length)):
                found[number, place] = phrase

    def _take_in(self, runs: Sequence[Run]) -> None:
        room = sum(len(run.token_ids) + 1 for run in runs)
        for run in runs:
            self._add(run, room)
            room -= len(run.token_ids) + 1
        for shelf in self._shelves:
            shelf.write()
        while len(self._shelves) > 1 and (self._tokens > self.capacity or self._length > 2 * self.capacity):
            self._drop(self._shelves.pop(0))
            self._answers = {name: key for name, key in self._answers.items() if key in self._runs}

    def _add(self, run: Run, room: int) -> None:
        """`room`: what this run and those behind it will take."""
        token_ids = run.token_ids[-self.capacity :]
        key = run_key(token_ids)
        count, answer = run.count, run.answer
        if key in self._runs:
            shelf, number = self._runs[key]
            if shelf is self._shelves[-1] and shelf.is_recent(number) and (shelf.answers[number] or not answer):
                shelf.counts[number] += count
                return
            # It moves to the end. Its old place stays in the index and is passed over.
            count, answer = count + shelf.counts[number], answer or shelf.answers[number]
            self._tokens -= len(token_ids)
            shelf.counts[number] = 0
        if not self._shelves or self._shelves[-1].room <= len(token_ids):
            self._open_shelf(room, at_least=len(token_ids) + 1)
        shelf = self._shelves[-1]
        self._runs[key] = shelf, shelf.begin(Run(token_ids, count, answer), key)
        self._tokens += len(token_ids)

    def _open_shelf(self, room: int, at_least: int = 1) -> _Shelf:
        """A new shelf: twice as large as the last, or with the room that is needed, but a quarter of all at most."""
        last = self._shelves[-1].segment.capacity if self._shelves else _FIRST_SEGMENT // 2
        self._shelves.append(_Shelf(max(min(max(room, 2 * last), self.capacity // 4), at_least)))
        return self._shelves[-1]

    def _drop(self, shelf: _Shelf) -> None:
        for number, key in enumerate(shelf.keys):
            if shelf.counts[number]:
                self._tokens -= shelf.lengths[number]
                self._runs.pop(key, None)


class _Shelf:
    """A segment, and the runs that lie in it."""

    def __init__(self, capacity: int) -> None:
        self.segment = Segment(capacity)
        self.counts: list[int] = []
        """Per run: how often it was added; 0 where it lies on another shelf by now."""
        self.answers: list[bool] = []
        self.lengths: list[int] = []
        self.keys: list[bytes] = []
        self._starts: list[int] = []
        self._queue: list[int] = []

    @property
    def room(self) -> int:
        return self.segment.room - len(self._queue)

    def begin(self, run: Run, key: bytes) -> int:
        """Put a run on the shelf; its number."""
        self._queue.append(ANSWER if run.answer else _MIDDLE)
        self._starts.append(self.segment.length + len(self._queue))
        self._queue.extend(run.token_ids)
        self.counts.append(run.count)
        self.answers.append(run.answer)
        self.lengths.append(len(run.token_ids))
        self.keys.append(key)
        return len(self.counts) - 1

    def extend(self, token_ids: Sequence[int]) -> None:
        """Lengthen the last run."""
        self._queue.extend(token_ids)

    def write(self) -> None:
        """Index what was put on the shelf since, all at once."""
        self.segment.append(self._queue)
        self._queue.clear()

    def runs(self, without: Collection[bytes]) -> Iterator[Run]:
        """The runs that lie here still, but those with these keys."""
        for number, key in enumerate(self.keys):
            if self.counts[number] and key not in without:
                yield self.run(number)

    def run(self, number: int) -> Run:
        """The run of this number."""
        start = self._starts[number]
        token_ids = self.segment.token_ids[start : start + self.lengths[number]].tolist()
        return Run(token_ids, self.counts[number], self.answers[number])

    def tail(self, length: int) -> list[int]:
        """The last tokens of the last run."""
        return self.segment.token_ids[
            max(self._starts[-1], self.segment.length - length) : self.segment.length
        ].tolist()

    def is_recent(self, number: int) -> bool:
        """Whether little was added after a run."""
        return self.segment.length + len(self._queue) - self._starts[number] - self.lengths[number] < _RECENT

    def read(self, place: int, match_length: int) -> Phrase | None:
        """What follows `place` in its run; None at its end, and where the run lies on another shelf by now."""
        number = bisect_right(self._starts, place)
        # A border stands before the run that begins at a start.
        end = self._starts[number] - 1 if number < len(self._starts) else self.segment.length
        token_ids = tuple(self.segment.token_ids[place : min(place + PHRASE_LENGTH, end)])
        count = self.counts[number - 1]
        return Phrase(token_ids, match_length, count) if token_ids and count else None


class MemorySource:
    """Pools of named scopes that live as long as this object; the least recently opened scope goes first."""

    def __init__(self, scopes: int = 64, capacity: int = 200_000) -> None:
        """`scopes`: pools kept at most, beside those that are to stay; `capacity`: tokens per pool."""
        self._scopes, self._capacity = scopes, capacity
        self._pools: OrderedDict[tuple[str, str], MemoryPool] = OrderedDict()
        self._staying: dict[tuple[str, str], MemoryPool] = {}
        self._lock = threading.RLock()

    def open(self, scope: str, *, fingerprint: str) -> PhrasePool:
        key = scope, fingerprint
        with self._lock:
            if key in self._staying:
                return self._staying[key]
            pool = self._pools.setdefault(key, MemoryPool(self._capacity))
            self._pools.move_to_end(key)
            while len(self._pools) > self._scopes:
                self._pools.popitem(last=False)
            return pool

    def stay(self, scope: str, *, fingerprint: str, capacity: int) -> None:
        """Let a scope stay, however many others are opened, with room for `capacity` tokens."""
        key = scope, fingerprint
        with self._lock:
            if key not in self._staying:
                self._staying[key] = self._pools.pop(key) if key in self._pools else MemoryPool()
            self._staying[key].capacity = capacity

    def notes(self, scope: str, prefix: str) -> Mapping[str, Mapping[str, bytes]]:
        with self._lock:
            pools = {**self._pools, **self._staying}
            return {key[1]: pool.recall(prefix) for key, pool in pools.items() if key[0] == scope}

    def take_out(self, scope: str, *, fingerprint: str, runs: Collection[bytes], notes: Collection[str]) -> int:
        key = scope, fingerprint
        with self._lock:
            pool = self._staying.get(key) or self._pools.get(key)
            return 0 if pool is None else pool.take_out(runs, notes)

    def flush(self) -> None:
        """Nothing is ever written."""

    def close(self) -> None:
        with self._lock:
            self._pools.clear()
            self._staying.clear()
