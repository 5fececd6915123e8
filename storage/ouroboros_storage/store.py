"""The phrase store: pools of named scopes over one database."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from sqlalchemy import URL, Connection, Engine

from ouroboros_llm.errors import OptionError, StoreError
from ouroboros_llm.phrases import check_scope

from . import rows
from .buffer import Buffer, NoteBuffer
from .database import DATABASE_ERRORS, open_database, reason
from .pool import StoredPool
from .rows import ScopeKey, StoredRun, StoredScope

Result = TypeVar("Result")

_KEPT_POOLS = 64
"""Pools that stay in memory between turns although nobody holds them."""


class PhraseStore:
    """Keeps the phrases of named scopes in a SQL database.

    A pool is read when it is opened, what is added stays in memory until `flush`, and a database that fails later costs
    speed and one warning, never an answer. Safe to use from several threads; several processes may share a database.

    Example:
        ```python
        with PhraseStore("sqlite:///phrases.db") as store:
            pool = store.open("conversation:42", fingerprint=tokenizer_hash)
            pool.add(token_ids)
            store.flush()
        ```
    """

    def __init__(self, url_or_engine: str | URL | Engine, *, create: bool = True, capacity: int = 1_000_000) -> None:
        """Open the database, and bring its tables up to date.

        Args:
            url_or_engine: `sqlite:///PATH`, `sqlite://` (in memory), `postgresql+psycopg://USER@HOST/DATABASE`, or an
                engine of yours, which keeps its settings and is not disposed.
            create: Make the file, its folders and the tables where there are none.
            capacity: Tokens kept in memory per pool at most; what was used last is kept.

        Raises:
            StoreError: the database cannot be used, is not there with `create` off, or was made by a later version.
            MissingExtraError: PostgreSQL without its driver.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise OptionError(f"capacity must be a whole number of at least 1, but got {capacity!r}")
        self._capacity = capacity
        self._database = open_database(url_or_engine, create=create)
        self._buffer, self._notes = Buffer(), NoteBuffer()
        # Held while the database is used: an in-memory SQLite has one connection, and a deleted scope must stay deleted
        # whatever is being read or written at that moment. Never taken by `add` and `match`.
        self._lock = threading.RLock()
        self._pools: WeakValueDictionary[ScopeKey, StoredPool] = WeakValueDictionary()
        self._kept: OrderedDict[ScopeKey, StoredPool] = OrderedDict()
        self._warned = self._failing = self._closed = self._writing = False

    def __repr__(self) -> str:
        return f"PhraseStore({self._database.name!r})"

    def __enter__(self) -> PhraseStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self, scope: str, *, fingerprint: str) -> StoredPool:
        """The pool of `scope` for the tokenizer `fingerprint`, with what was flushed until now, by other processes too.

        Whoever opens the same two gets the same pool. Nothing is written: a scope exists from its first flush after an
        `add`, however short.

        Raises:
            OptionError: not a name: 1 to 255 printable characters. StoreError: the store is closed.
        """
        key = ScopeKey(check_scope(scope), check_scope(fingerprint, "fingerprint"))
        with self._lock:
            self._check_open()
            pool = self._pools.get(key)
            fresh = pool is None
            if pool is None:
                pool = self._pools[key] = StoredPool(key, self._buffer, self._notes, self._capacity)
            if not self._read(pool) or fresh:
                pool.load_pending(self._buffer.runs(key))
            if not pool.notes_read:
                self._read_notes(pool)
            self._keep(pool)
            return pool

    def flush(self) -> None:
        """Write everything that was added, in one transaction. When it returns, it is durable, or a warning was given.

        A locked database is tried again a few times. What could not be written waits, in a bounded buffer, for the next
        flush.
        """
        with self._lock:
            # Writing already: a stream that the garbage collector closes meanwhile waits for the next flush.
            if not self._closed and not self._writing:
                # While the database fails, every turn would wait for all attempts; one is enough to see it come back.
                self._write(patient=not self._failing)

    def list(self) -> Sequence[StoredScope]:
        """The scopes in the database, by name; one row per tokenizer. Raises StoreError where it cannot be read."""
        return self._ask(rows.read_scopes)

    def export(self, scope: str) -> Iterator[StoredRun]:
        """All runs of one scope, flushed first, in the order they were first written. Raises StoreError."""
        check_scope(scope)
        self._check_open()
        self.flush()
        return self._export(scope)

    def delete(self, scope: str) -> int:
        """Erase one scope: rows, buffer, and what open pools hold; returns the number of runs the database held.

        When it returns, no byte of it is in the database file or its write-ahead log, or a warning says what keeps it
        there. PostgreSQL erases with its next vacuum. Files set aside as corrupt and backups are not touched.

        Raises:
            StoreError: the database cannot be written; the buffer and open pools are empty all the same.
        """
        check_scope(scope)
        with self._lock:
            self._check_open()
            self._buffer.forget(scope)
            self._notes.forget(scope)
            for pool in tuple(self._pools.values()):
                if pool.key.scope == scope:
                    pool.forget()
            deleted = self._ask(partial(rows.delete_scope, scope=scope), write=True)
            self._checkpoint(scope)
            return deleted

    def close(self) -> None:
        """Flush, and release the database unless the engine is yours. Idempotent; pools go on in memory."""
        with self._lock:
            if self._closed:
                return
            self._write(patient=True)
            self._closed = True
            self._kept.clear()
            self._database.close()

    def _read(self, pool: StoredPool) -> bool:
        """Bring a pool up to date with the database; where that fails it stays as it is, until it is opened again.

        False where the pool had to start anew, because its scope was deleted elsewhere.
        """
        known = True
        try:
            scope_id, newest = self._database.read(partial(rows.position, key=pool.key), patient=not self._failing)
            known = pool.belongs_to(scope_id)
            if newest == pool.newest_read:
                return known
            # Ids are bounded on both sides, so that a run written between the two queries is left to the next opening.
            found = self._database.read(
                lambda connection: rows.read_runs(connection, pool.key, pool.newest_read, newest, self._capacity),
                patient=not self._failing,
            )
            pool.load(found, newest)
        except DATABASE_ERRORS as error:
            self._warn("read", error)
        return known

    def _read_notes(self, pool: StoredPool) -> None:
        try:
            found = self._database.read(partial(rows.read_notes, key=pool.key), patient=not self._failing)
            pool.load_notes({**found, **self._notes.notes(pool.key)})
        except DATABASE_ERRORS as error:
            self._warn("read", error)

    def _write(self, *, patient: bool) -> None:
        pending, notes = self._buffer.take(), self._notes.take()
        if not pending and not notes:
            return
        self._writing = True
        try:
            scope_ids = self._database.write(partial(rows.upsert, pending=pending, notes=notes), patient=patient)
        except BaseException as error:
            self._buffer.put_back(pending)
            self._notes.put_back(notes)
            if not isinstance(error, DATABASE_ERRORS):
                raise
            self._failing = True
            self._warn("written", error)
            return
        finally:
            self._writing = False
        self._failing = False
        for key, found in pending.items():
            if pool := self._pools.get(key):
                pool.mark_flushed(found, scope_ids[key])

    def _ask(self, action: Callable[[Connection], Result], *, write: bool = False) -> Result:
        """What the caller waits for: it works, or it raises StoreError."""
        with self._lock:
            self._check_open()
            try:
                return self._database.write(action) if write else self._database.read(action)
            except DATABASE_ERRORS as error:
                raise StoreError(f"store {self._database.name} failed: {reason(error)}") from error

    def _export(self, scope: str) -> Iterator[StoredRun]:
        batch = self._ask(partial(rows.read_batch, scope=scope, after=0))
        while batch:
            yield from (run for _, run in batch)
            batch = self._ask(partial(rows.read_batch, scope=scope, after=batch[-1][0]))

    def _checkpoint(self, scope: str) -> None:
        try:
            done = self._database.checkpoint()
        except DATABASE_ERRORS:
            done = False
        if not done:
            warnings.warn(
                f"{scope!r} is deleted, but another connection is using {self._database.name}: its write-ahead log "
                "keeps the old bytes until the next checkpoint, at the latest until the last connection closes",
                RuntimeWarning,
                stacklevel=3,
            )

    def _keep(self, pool: StoredPool) -> None:
        """Keep the pools opened last for the next turns, as far as they fit into one pool's capacity together."""
        self._kept[pool.key] = pool
        self._kept.move_to_end(pool.key)
        tokens = sum(kept.stats.tokens for kept in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > _KEPT_POOLS or tokens > self._capacity):
            _, dropped = self._kept.popitem(last=False)
            tokens -= dropped.stats.tokens

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"store {self._database.name} is closed; open a new PhraseStore")

    def _warn(self, verb: str, error: BaseException) -> None:
        """Say it once: a warning per turn would drown the answer."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"phrases of {self._database.name} cannot be {verb}: {reason(error)}; generation goes on, and what was "
            "added waits in memory for a flush that succeeds",
            RuntimeWarning,
            stacklevel=4,
        )
