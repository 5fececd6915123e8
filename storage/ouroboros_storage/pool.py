"""The pool of one scope in a store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ouroboros_llm.phrases import MemoryPool, Phrase, PoolStats

from .buffer import Buffer
from .rows import PendingRun, ReadRun, ScopeKey, content_hash, decode, encode


class StoredPool:
    """Matches in memory and remembers what is to be written; reading and writing the database is the store's part.

    Everyone who opens a scope in one store has the same pool, so sessions learn from each other. Thread-safe.
    """

    def __init__(self, key: ScopeKey, buffer: Buffer, capacity: int) -> None:
        self.key = key
        self.capacity = capacity
        """Tokens kept in memory at most."""
        self.newest_read = 0
        """The highest id there was when rows were read."""
        self.generation = object()
        """Another one after the scope was deleted, so that what was built on its phrases can go too."""
        self._scope_id: int | None = None
        self._buffer = buffer
        self._memory = MemoryPool(capacity)
        self._flushed: set[bytes] = set()

    def __repr__(self) -> str:
        return f"<StoredPool {self.key.scope!r}: {self.stats.runs} runs, {self.stats.tokens} tokens in memory>"

    def add(self, token_ids: Sequence[int]) -> None:
        """Remember a run, in memory at once and in the database with the next flush. Touches neither file nor network.

        A run of fewer than two tokens holds no phrase, but from its flush on the scope exists.
        """
        data = encode(token_ids)
        self._buffer.add(self.key, data if len(data) > 4 else b"")
        self._memory.add(decode(data))

    def match(self, tail: Sequence[int]) -> list[Phrase]:
        return self._memory.match(tail)

    @property
    def stats(self) -> PoolStats:
        return self._memory.stats

    def belongs_to(self, scope_id: int | None) -> bool:
        """Note the id of the scope's row. If it was another, the scope was deleted elsewhere: forget it and say no."""
        changed = self._scope_id is not None and self._scope_id != scope_id
        if changed:
            self.forget()
        self._scope_id = scope_id
        return not changed

    def load(self, found: Sequence[ReadRun], newest: int) -> None:
        """Take in rows, the latest used first, but not what this pool flushed. `newest` is the highest id there was."""
        for run in reversed(found):
            if run.hash not in self._flushed:
                self._memory.add(run.token_ids, run.count)
        self.newest_read = newest
        self._flushed.clear()

    def load_pending(self, found: Iterable[tuple[bytes, PendingRun]]) -> None:
        """Take in what an earlier pool of the scope left in the buffer."""
        for data, run in found:
            self._memory.add(decode(data), run.count)

    def mark_flushed(self, found: Iterable[bytes], scope_id: int) -> None:
        """These runs are rows of the scope now, and no news."""
        if self.belongs_to(scope_id):
            self._flushed.update(content_hash(data) for data in found)

    def forget(self) -> None:
        """Drop everything from memory."""
        self._memory = MemoryPool(self.capacity)
        self.generation = object()
        self._flushed.clear()
        self._scope_id = None
