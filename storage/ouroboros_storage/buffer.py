"""Runs and notes on their way to the database."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping

from .records import PendingRun, ScopeKey

_ENTRY_BYTES = 256
"""What an entry takes beside its token ids, roughly."""


class Buffer:
    """What was added since the last flush, bounded in bytes: the least recently added goes first. Thread-safe.

    Only a database that cannot be written for long, or is never flushed, makes it full; what goes is speed, not text.
    """

    def __init__(self, capacity: int = 64 << 20) -> None:
        """`capacity`: bytes kept at most."""
        self._capacity = capacity
        self._now = 0
        self.clear()

    def clear(self) -> None:
        """Drop everything. Needs no lock: a forked child begins so, where one that another thread held stays locked."""
        # Re-entrant: an abandoned stream may be finalized by the garbage collector at any allocation, in here too.
        self._lock = threading.RLock()
        self._runs: OrderedDict[tuple[ScopeKey, bytes], PendingRun] = OrderedDict()
        self._size = 0

    def add(self, key: ScopeKey, data: bytes, *, answer: bool = True) -> None:
        """Remember a run by its encoded token ids; the empty one only makes its scope exist."""
        with self._lock:
            # Later is later, even where the clock stands still or goes backwards: recency is read from these times.
            self._now = max(self._now + 1, time.time_ns() // 1000)
            self._put(key, data, PendingRun(1, self._now, self._now, answer))
            self._evict()

    def begin_after(self, last_used: int) -> None:
        """What is added from now on is later than this, whatever the clock says: it may have been put back."""
        with self._lock:
            self._now = max(self._now, last_used)

    def take(self) -> dict[ScopeKey, dict[bytes, PendingRun]]:
        """Everything, in the order it was added; the buffer is empty afterwards."""
        with self._lock:
            taken: dict[ScopeKey, dict[bytes, PendingRun]] = {}
            for (key, data), run in self._runs.items():
                taken.setdefault(key, {})[data] = run
            self._runs.clear()
            self._size = 0
            return taken

    def waiting(self, scope: str | None = None) -> int:
        """How many runs there are, of one scope or in all."""
        with self._lock:
            return sum(bool(data) and scope in (None, key.scope) for key, data in self._runs)

    def put_back(self, taken: Mapping[ScopeKey, Mapping[bytes, PendingRun]]) -> None:
        """What `take` gave and the database did not."""
        with self._lock:
            returned = [(key, data, run) for key, found in taken.items() for data, run in found.items()]
            newer = [(key, data, run) for (key, data), run in self._runs.items()]
            self._runs.clear()
            self._size = 0
            for key, data, run in sorted(returned, key=lambda entry: entry[2].last_used) + newer:
                self._put(key, data, run)
            self._evict()

    def runs(self, key: ScopeKey) -> list[tuple[bytes, PendingRun]]:
        """The runs of one scope, in the order they were added."""
        with self._lock:
            return [(data, run) for (other, data), run in self._runs.items() if other == key]

    def forget(self, scope: str) -> None:
        """Drop what was added to a scope, for every tokenizer."""
        with self._lock:
            for key, data in [entry for entry in self._runs if entry[0].scope == scope]:
                self._drop(key, data)

    def _put(self, key: ScopeKey, data: bytes, run: PendingRun) -> None:
        known = self._drop(key, data)
        if known is not None:
            run = PendingRun(known.count + run.count, known.created, run.last_used, known.answer or run.answer)
        self._runs[key, data] = run
        self._size += len(data) + _ENTRY_BYTES

    def _drop(self, key: ScopeKey, data: bytes) -> PendingRun | None:
        run = self._runs.pop((key, data), None)
        if run is not None:
            self._size -= len(data) + _ENTRY_BYTES
        return run

    def _evict(self) -> None:
        while self._size > self._capacity and len(self._runs) > 1:
            (key, data), _ = next(iter(self._runs.items()))
            self._drop(key, data)


class NoteBuffer:
    """The notes of scopes since the last flush, the last one of each name, bounded in number: the notes of whole scopes
    go first. Thread-safe."""

    _CAPACITY = 200_000

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """As for `Buffer`."""
        self._lock = threading.RLock()
        self._notes: dict[ScopeKey, dict[str, bytes]] = {}

    def add(self, key: ScopeKey, notes: Mapping[str, bytes]) -> None:
        with self._lock:
            self._notes.setdefault(key, {}).update(notes)
            self._evict()

    def take(self) -> dict[ScopeKey, dict[str, bytes]]:
        """Everything; the buffer is empty afterwards."""
        with self._lock:
            taken, self._notes = self._notes, {}
            return taken

    def put_back(self, taken: Mapping[ScopeKey, Mapping[str, bytes]]) -> None:
        """What `take` gave and the database did not; what came since is newer."""
        with self._lock:
            for key, notes in taken.items():
                self._notes[key] = {**notes, **self._notes.get(key, {})}
            self._evict()

    def notes(self, key: ScopeKey) -> dict[str, bytes]:
        with self._lock:
            return dict(self._notes.get(key, {}))

    def of_scope(self, scope: str) -> dict[str, dict[str, bytes]]:
        """The notes of a scope, by tokenizer."""
        with self._lock:
            return {key.fingerprint: dict(notes) for key, notes in self._notes.items() if key.scope == scope}

    def forget(self, scope: str) -> None:
        """Drop the notes of a scope, for every tokenizer."""
        with self._lock:
            for key in [key for key in self._notes if key.scope == scope]:
                del self._notes[key]

    def _evict(self) -> None:
        while len(self._notes) > 1 and sum(map(len, self._notes.values())) > self._CAPACITY:
            del self._notes[next(iter(self._notes))]


class Nowhere:
    """Takes what must not be written."""

    def add(self, key: ScopeKey, what: object, *, answer: bool = True) -> None:
        pass
