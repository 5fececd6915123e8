"""The pool of one scope in a store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from ouroboros_llm.phrase_pool.base import AnswerIndex, NoteStore, Phrase, PhrasePool, PoolStats
from ouroboros_llm.phrase_pool.memory import MemoryPool, Run

from .buffer import Buffer, NoteBuffer, Nowhere
from .records import PendingRun, ReadRun, ScopeKey, content_hash, decode, encode
from .rows import Mark


class StoredPool:
    """Matches in memory and remembers what is to be written; reading and writing the database is the store's part.

    Everyone who opens a scope in one store has the same pool, so sessions learn from each other. Thread-safe.
    """

    def __init__(
        self,
        key: ScopeKey,
        buffer: Buffer | Nowhere,
        notes: NoteBuffer | Nowhere,
        capacity: int,
        read: Callable[[StoredPool], object],
    ) -> None:
        """`read` brings a pool up to date with the database."""
        self.key = key
        self.capacity = capacity
        """Tokens kept in memory at most."""
        self.mark: Mark | None = None
        """How far the scope had come when it was read; None where it had no row."""
        self.origin: tuple[int, int] | None = None
        """Of the row that it was read from or flushed to: what is of another one was deleted or pruned meanwhile."""
        self.newest_read = 0
        """The highest id of the scope's runs then."""
        self.notes_read = False
        """Whether the scope's notes are in memory."""
        self.generation = object()
        """Another one after the scope was deleted, so that what was built on its phrases can go too."""
        self._buffer, self._notes, self._bring_up_to_date = buffer, notes, read
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

    def noted_run(self, name: str) -> tuple[int, ...]:
        return self._memory.noted_run(name)

    def holds_all(self, keys: Collection[bytes]) -> bool:
        return self._memory.holds_all(keys)

    def take_out(self, runs: Collection[bytes], notes: Collection[str]) -> int:
        """Drop runs and notes from memory; the database is the store's part."""
        return self._memory.take_out(runs, notes)

    @property
    def stats(self) -> PoolStats:
        return self._memory.stats

    def refresh(self) -> None:
        """Take in what other processes flushed since. Reads the database: between turns, not within one."""
        self._bring_up_to_date(self)

    def is_behind(self, mark: Mark | None) -> bool:
        """Whether there is something to read. Where the scope was deleted or pruned elsewhere, all is forgotten."""
        if self.origin is not None and (mark is None or _origin(mark) != self.origin):
            self.forget()
        return mark is not None and mark != self.mark

    def load(self, found: Sequence[ReadRun], newest: int, mark: Mark) -> None:
        """Take in rows, the latest used first, but not what this pool flushed. `newest` is the highest id there was."""
        news = [run for run in reversed(found) if run.hash not in self._flushed]
        self._memory.add_all(Run(run.token_ids, run.count, run.answer) for run in news)
        self.newest_read, self.mark, self.origin = newest, mark, _origin(mark)
        self._flushed.clear()

    def load_pending(self, found: Iterable[tuple[bytes, PendingRun]]) -> None:
        """Take in what an earlier pool of the scope left in the buffer."""
        self._memory.add_all(Run(decode(data), run.count, run.answer) for data, run in found)

    def load_notes(self, notes: Mapping[str, bytes]) -> None:
        """Take in what the database and the buffer hold, but for what is newer here."""
        self._memory.remember({**notes, **self._memory.recall("")})
        self.notes_read = True

    def mark_flushed(self, found: Iterable[bytes], mark: Mark) -> None:
        """These runs are rows of the scope now, and no news."""
        if self.origin is not None and _origin(mark) != self.origin:
            self.forget()
        self.origin = _origin(mark)
        # What was added before the pool had to start anew is not in memory: to this pool it is news.
        self._flushed.update(content_hash(data) for data in found if self._memory.holds(decode(data)))
        if self.mark is not None and mark.follows(self.mark):
            self.mark = mark  # nobody else has written

    def leave_parent(self) -> None:
        """In a forked child: go on as the process's own. What another thread was changing at the fork is dropped."""
        if self._memory.is_locked:
            self.forget()

    def leave_file(self) -> None:
        """The database is another one now, with nothing of this scope; what is in memory stays."""
        self.mark, self.origin, self.newest_read = None, None, 0
        self._flushed.clear()

    def forget(self) -> None:
        """Drop everything from memory."""
        self._memory = MemoryPool(self.capacity)
        self.generation, self.notes_read = object(), False
        self._flushed.clear()
        self.mark, self.origin, self.newest_read = None, None, 0


def _origin(mark: Mark) -> tuple[int, int]:
    return mark.scope_id, mark.generation


class LayeredPool:
    """Reads several pools in order and writes to the first."""

    def __init__(self, pools: Sequence[PhrasePool]) -> None:
        """`pools`: the one that is written, then those that are only read."""
        self.pools = tuple(pools)

    def add(self, token_ids: Sequence[int], *, answer: bool = True) -> None:
        self.pools[0].add(token_ids, answer=answer)

    def match(self, tail: Sequence[int]) -> list[Phrase]:
        """Longest match first; among equal ones those of earlier pools."""
        found = [phrase for pool in self.pools for phrase in pool.match(tail)]
        return sorted(found, key=lambda phrase: -phrase.match_length)

    @property
    def stats(self) -> PoolStats:
        """Of all the pools together."""
        found = [pool.stats for pool in self.pools]
        return PoolStats(sum(stats.runs for stats in found), sum(stats.tokens for stats in found))

    def remember(self, notes: Mapping[str, bytes]) -> None:
        if isinstance(self.pools[0], NoteStore):
            self.pools[0].remember(notes)

    def recall(self, prefix: str) -> Mapping[str, bytes]:
        return self.pools[0].recall(prefix) if isinstance(self.pools[0], NoteStore) else {}

    def noted_run(self, name: str) -> tuple[int, ...]:
        return self.pools[0].noted_run(name) if isinstance(self.pools[0], AnswerIndex) else ()

    def refresh(self) -> None:
        """Take in what other processes flushed since, in every pool that can."""
        for pool in self.pools:
            if isinstance(pool, StoredPool):
                pool.refresh()
