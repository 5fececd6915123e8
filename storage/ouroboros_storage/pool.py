"""The pool of one scope in a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ouroboros_llm.memory_pool import MemoryPool, Run
from ouroboros_llm.phrases import Phrase, PoolStats

from .buffer import Buffer, NoteBuffer
from .rows import PendingRun, ReadRun, ScopeKey, content_hash, decode, encode


class StoredPool:
    """Matches in memory and remembers what is to be written; reading and writing the database is the store's part.

    Everyone who opens a scope in one store has the same pool, so sessions learn from each other. Thread-safe.
    """

    def __init__(self, key: ScopeKey, buffer: Buffer, notes: NoteBuffer, capacity: int) -> None:
        self.key = key
        self.capacity = capacity
        """Tokens kept in memory at most."""
        self.newest_read = 0
        """The highest id there was when rows were read."""
        self.notes_read = False
        """Whether the scope's notes are in memory."""
        self.generation = object()
        """Another one after the scope was deleted, so that what was built on its phrases can go too."""
        self._scope_id: int | None = None
        self._buffer, self._notes = buffer, notes
        self._memory = MemoryPool(capacity)
        self._flushed: set[bytes] = set()

    def __repr__(self) -> str:
        return f"<StoredPool {self.key.scope!r}: {self.stats.runs} runs, {self.stats.tokens} tokens in memory>"

    def add(self, token_ids: Sequence[int], *, answer: bool = True) -> None:
        """Remember a run, in memory at once and in the database with the next flush. Touches neither file nor network.

        A run of fewer than two tokens holds no phrase, but from its flush on the scope exists.
        """
        data = encode(token_ids)
        self._buffer.add(self.key, data if len(data) > 4 else b"", answer=answer)
        self._memory.add(decode(data), answer=answer)

    def match(self, tail: Sequence[int]) -> list[Phrase]:
        return self._memory.match(tail)

    def remember(self, notes: Mapping[str, bytes]) -> None:
        """Keep notes, in memory at once and in the database with the next flush."""
        self._buffer.add(self.key, b"")
        self._notes.add(self.key, notes)
        self._memory.remember(notes)

    def recall(self, prefix: str) -> Mapping[str, bytes]:
        return self._memory.recall(prefix)

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
        news = [run for run in reversed(found) if run.hash not in self._flushed]
        self._memory.add_all(Run(run.token_ids, run.count, run.answer) for run in news)
        self.newest_read = newest
        self._flushed.clear()

    def load_pending(self, found: Iterable[tuple[bytes, PendingRun]]) -> None:
        """Take in what an earlier pool of the scope left in the buffer."""
        self._memory.add_all(Run(decode(data), run.count, run.answer) for data, run in found)

    def load_notes(self, notes: Mapping[str, bytes]) -> None:
        """Take in what the database and the buffer hold, but for what is newer here."""
        self._memory.remember({**notes, **self._memory.recall("")})
        self.notes_read = True

    def mark_flushed(self, found: Iterable[bytes], scope_id: int) -> None:
        """These runs are rows of the scope now, and no news."""
        if self.belongs_to(scope_id):
            self._flushed.update(content_hash(data) for data in found)

    def forget(self) -> None:
        """Drop everything from memory."""
        self._memory = MemoryPool(self.capacity)
        self.generation, self.notes_read = object(), False
        self._flushed.clear()
        self._scope_id = None
