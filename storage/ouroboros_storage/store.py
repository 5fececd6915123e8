"""The phrase store: pools of named scopes over one database."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine

from ouroboros_llm.errors import OptionError, StoreError, StoreUnavailableError
from ouroboros_llm.phrase_pool.base import check_scope, check_scopes

from . import rows, upkeep
from .bounds import Bounds, check_bound
from .database import DATABASE_ERRORS, Database, reason
from .examination import StoreReport, examine
from .exchange import batches
from .outage import Outage
from .pool import LayeredPool, StoredPool
from .pools import Pools
from .records import ScopeKey, StoredNote, StoredRun, StoredScope, StoreStats
from .upkeep import Quotas
from .writer import Writer

Result = TypeVar("Result")


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

    def __init__(
        self,
        url_or_engine: str | URL | Engine,
        *,
        create: bool = True,
        check: bool = True,
        capacity: int = 1_000_000,
        scope_quota: int | None = 1_000_000,
        quota: int | None = 100_000_000,
        ephemeral: Collection[str] = (),
    ) -> None:
        """Say where phrases are kept. A file that is there is checked; otherwise nothing happens before the first use.

        Args:
            url_or_engine: `sqlite:///PATH`, `sqlite://` (in memory), `postgresql+psycopg://USER@HOST/DATABASE`, or an
                engine of yours, which keeps its settings and is not disposed.
            create: Make the file, its folders and the tables where there are none.
            check: Look at a file that is there now; off, that too waits for the first use.
            capacity: Tokens kept in memory per pool at most; what was used last is kept.
            scope_quota, quota: Tokens kept in the database at most, per scope and tokenizer, and in all; a flush that
                exceeds them drops what was used least recently. None: no bound.
            ephemeral: Scopes that stay in memory: nothing of them is read from the database or written to it.

        Raises:
            StoreError: the database cannot be used, is not there with `create` off, or was made by a later version.
            MissingExtraError: PostgreSQL without its driver.
        """
        check_bound("capacity", capacity)
        for name, bound in (("scope_quota", scope_quota), ("quota", quota)):
            if bound is not None:
                check_bound(name, bound)
        # Held while the database is used: an in-memory SQLite has one connection, and a deleted scope must stay deleted
        # whatever is being read or written at that moment. Never taken by `add` and `match`.
        self._lock = threading.RLock()
        self._closed = False
        self._database = Database(url_or_engine, create=create, on_loss=self._leave_file)
        self._outage = Outage(self._database.name)
        self._writer = Writer(self._database, self._outage, Quotas(scope_quota, quota), _checked_names(ephemeral))
        self._pools = Pools(
            self._database,
            self._writer,
            self._outage,
            capacity=capacity,
            refresh=self._refresh,
        )
        _stores.add(self)
        if self._database.file is not None:
            self._database.file.check(create)
            if check and self._database.file.path.exists():
                self._setup_if_available()

    @staticmethod
    def examine(url: str) -> StoreReport:
        """Look at the store behind a URL without changing anything: it is not made, migrated or set aside."""
        return examine(url)

    def __repr__(self) -> str:
        return f"PhraseStore({self._database.name!r})"

    def __enter__(self) -> PhraseStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def setup(self) -> None:
        """Connect, check the database and bring its tables up to date now instead of at the first use. Idempotent.

        Raises:
            StoreUnavailableError: it does not answer now. StoreError: it cannot be used.
        """
        with self._lock:
            self._check_open()
            self._database.setup()

    def open(
        self, scope: str, *, fingerprint: str, read_scopes: Sequence[str] = (), ephemeral: bool = False
    ) -> StoredPool | LayeredPool:
        """The pool of `scope` for the tokenizer `fingerprint`, with what was flushed until now, by other processes too.

        Whoever opens the same two gets the same pool. Nothing is written: a scope exists from its first flush after an
        `add`, however short.

        Args:
            read_scopes: Further scopes that the pool reads, in order; it writes to `scope` alone.
            ephemeral: From now on this store keeps the scope in memory only, whoever opens it. What was written before
                stays until it is deleted.

        Raises:
            OptionError: not a name: 1 to 255 printable characters.
            StoreError: the store is closed, or its database cannot be used, now or later. While it merely does not
                answer, there is a warning, and pools begin empty.
        """
        check_scope(fingerprint, "fingerprint")
        names = [check_scope(scope), *check_scopes(read_scopes)]
        with self._lock:
            self._check_open()
            if ephemeral:
                self._pools.make_ephemeral(scope)
            reachable = self._setup_if_available()
            pools = [
                self._pools.open(ScopeKey(name, fingerprint), reachable=reachable) for name in dict.fromkeys(names)
            ]
        return pools[0] if len(pools) == 1 else LayeredPool(pools)

    def flush(self) -> None:
        """Write everything that was added, in one transaction. When it returns, it is durable, or a warning was given.

        A locked database is tried again a few times. What could not be written waits, in a bounded buffer, for the next
        flush.
        """
        with self._lock:
            if not self._closed and not self._outage.resting and not self._database.in_use:
                self._write(patient=not self._outage.failing)

    def refresh(self) -> None:
        """Let all open pools take in what other processes flushed since. Opening a pool does this for that pool."""
        with self._lock:
            self._check_open()
            self._pools.read_all()

    def list(self) -> Sequence[StoredScope]:
        """The scopes in the database, by name; one row per tokenizer. Raises StoreError where it cannot be read."""
        return self._ask(rows.read_scopes)

    def stats(self, scope: str | None = None) -> StoreStats:
        """How much the database holds of one scope, or in all. Raises StoreError."""
        file = self._database.file
        count = partial(
            upkeep.stats,
            scope=None if scope is None else check_scope(scope),
            file_bytes=None if file is None else file.nbytes(),
            waiting=self._writer.runs.waiting(scope),
        )
        return self._ask(count)

    def copy(self, source: str, target: str) -> int:
        """Copy a scope to a name that is free; returns the number of runs.

        Whoever opens the copy can tell by speed what was said in the original: see `docs/privacy.md`.

        Raises:
            StoreError: the source is not in the database, the target is, or the database cannot be used.
        """
        return self._change(upkeep.copy, source, target)

    def merge(self, sources: str | Sequence[str], target: str) -> int:
        """Add one scope, or several, to another, which may exist: counts add up. Returns the number of runs added.

        The sources stay. Raises StoreError where one is not in the database; then nothing was done.
        """
        names = [sources] if isinstance(sources, str) else list(sources)
        if not names:
            raise OptionError("sources must name at least one scope, but there is none")
        if target in names:
            raise OptionError(f"target must be another scope than the sources, but got {target!r} among them")
        return self._change(
            lambda connection, *names: upkeep.merge_all(connection, names[:-1], names[-1]), *names, target
        )

    def rename(self, source: str, target: str) -> int:
        """Give a scope a name that is free; returns the number of runs.

        Raises:
            StoreError: the source is not in the database, the target is, or the database cannot be used.
        """
        return self._change(upkeep.rename, source, target)

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
            self._writer.forget(scope)
            self._pools.forget({scope})
            deleted = self._ask(partial(rows.delete_scope, scope=scope), write=True)
            self._erase("the scope is deleted")
            return deleted

    def prune(
        self,
        scope: str | None = None,
        *,
        max_tokens: int | None = None,
        max_age: timedelta | float | None = None,
        max_runs: int | None = None,
    ) -> int:
        """Erase runs, least recently used first, until the bounds hold; returns their number.

        Open pools of the scopes concerned forget everything, and read what is left when they are opened again.

        Args:
            scope: The scope for which the bounds hold, all its tokenizers together; None: the whole store.
            max_age: How long ago a run may have been used last, in seconds or as a timedelta. Older notes and scopes
                that are empty then go too.

        Raises:
            OptionError: no bound, or a negative one. StoreError: the database cannot be used.
        """
        bounds = Bounds.of(max_tokens=max_tokens, max_age=max_age, max_runs=max_runs)
        if scope is not None:
            check_scope(scope)
        with self._lock:
            self._check_open()
            self._write(patient=True)
            count, names = self._ask(partial(upkeep.prune, scope=scope, bounds=bounds), write=True)
            self._pools.forget(names)
            self._erase(f"{count} runs are pruned")
            return count

    def notes(self, scope: str, prefix: str) -> Mapping[str, Mapping[str, bytes]]:
        """The notes of a scope whose names begin with `prefix`, flushed first, by tokenizer and name.

        Raises StoreError where the database cannot be read.
        """
        check_scope(scope)
        with self._lock:
            self._check_open()
            if self._pools.is_ephemeral(scope):
                return self._pools.notes(scope, prefix)
            self._write(patient=True)
            found = self._ask(partial(rows.read_notes_of, scope=scope, prefix=prefix))
            # What could not be written is there all the same.
            for fingerprint, waiting in self._writer.notes.of_scope(scope).items():
                of_tokenizer = found.setdefault(fingerprint, {})
                of_tokenizer |= {name: data for name, data in waiting.items() if name.startswith(prefix)}
            return found

    def take_out(self, scope: str, *, fingerprint: str, runs: Collection[bytes], notes: Collection[str]) -> int:
        """Erase single runs of a scope, by their keys (`phrase_pool.base.run_key`), and notes by their names.

        Open pools of the scope forget everything, and read what is left when they are opened again. Returns the number
        of runs the database held. Raises StoreError where it cannot be written.
        """
        key = ScopeKey(check_scope(scope), check_scope(fingerprint, "fingerprint"))
        with self._lock:
            self._check_open()
            if self._pools.is_ephemeral(scope):
                return self._pools.open(key, reachable=False).take_out(runs, notes)
            self._write(patient=True)
            count = self._ask(partial(upkeep.take_out, key=key, hashes=list(runs), names=list(notes)), write=True)
            self._pools.forget({scope})
            self._erase(f"{count} runs are erased")
            return count

    def export(self, scope: str) -> Iterator[StoredRun]:
        """All runs of one scope, flushed first, in the order they were first written. Raises StoreError."""
        check_scope(scope)
        self._check_open()
        self.flush()
        return self._export(scope)

    def export_notes(self, scope: str) -> Iterator[StoredNote]:
        """What drafting learned in one scope beside its runs, flushed first. Raises StoreError."""
        check_scope(scope)
        self._check_open()
        self.flush()
        return self._export_notes(scope)

    def import_(self, records: Iterable[StoredRun | StoredNote]) -> int:
        """Write what `export` and `export_notes` gave, of this database or another; returns the number of runs.

        A run that is there keeps the larger count, so that importing twice does no harm; a note is replaced. Written
        batch by batch: what is interrupted can be begun again.

        Raises:
            OptionError: not such a record, or no name, token id or count in it. StoreError: the database fails.
        """
        count = 0
        for runs, notes in batches(records):
            self._check_durable(*{key.scope for key in (*runs, *notes)})
            self._ask(partial(self._writer.put, runs=runs, notes=notes, add_counts=False), write=True)
            self._pools.forget_notes(notes)
            count += sum(len(found) for found in runs.values())
        return count

    def check(self, advance: Callable[[int], None] | None = None) -> Sequence[str]:
        """Look at every page and run of the database; the problems found, none where all is well.

        `advance` is called with the number of runs looked at since the last call. Raises StoreError.
        """
        return self._ask(lambda connection: list(upkeep.problems(connection, advance or (lambda count: None))))

    def close(self) -> None:
        """Flush, and release the database unless the engine is yours. Idempotent; pools go on in memory."""
        with self._lock:
            if self._closed:
                return
            self._write(patient=True)
            self._closed = True
            self._pools.release()
            self._database.close()

    def _write(self, *, patient: bool) -> None:
        self._writer.write(self._pools.mark_flushed, patient=patient)

    def _leave_parent(self) -> None:
        """In a forked child: locks that other threads held stay locked, and what waits is the parent's to write."""
        self._lock = threading.RLock()
        self._writer.leave_parent()
        self._pools.leave_parent()

    def _refresh(self, pool: StoredPool) -> None:
        with self._lock:
            self._check_open()
            self._pools.read(pool)

    def _leave_file(self, erased: bool) -> None:
        self._pools.leave_file(erased)

    def _setup_if_available(self) -> bool:
        """Whether the database may be asked."""
        if self._outage.resting:
            return False
        try:
            self._database.setup(patient=not self._outage.failing)
            return True
        except StoreUnavailableError as error:
            self._outage.begin("read", error)
            return False

    def _change(self, change: Callable[..., int], *names: str) -> int:
        """Flush, change scopes by name, and let their open pools begin anew."""
        for name in names:
            check_scope(name)
        self._check_durable(*names)
        with self._lock:
            self._check_open()
            self._write(patient=True)
            count = self._ask(partial(self._changed, change, names), write=True)
            self._pools.forget(names)
            return count

    def _changed(self, change: Callable[..., int], names: Sequence[str], connection: Connection) -> int:
        count = change(connection, *names)
        self._writer.enforce_quotas(connection, names[-1])
        return count

    def _check_durable(self, *scopes: str) -> None:
        if ephemeral := [scope for scope in scopes if self._pools.is_ephemeral(scope)]:
            raise OptionError(f"scope {ephemeral[0]!r} is in memory only in this store; nothing can be written to it")

    def _ask(self, action: Callable[[Connection], Result], *, write: bool = False) -> Result:
        """What the caller waits for: it works, or it raises StoreError."""
        with self._lock:
            self._check_open()
            try:
                return self._database.write(action) if write else self._database.read(action)
            except DATABASE_ERRORS as error:
                raise StoreError(f"store {self._database.name} failed: {reason(error)}") from error

    def _export(self, scope: str) -> Iterator[StoredRun]:
        batch = self._ask(partial(rows.read_run_batch, scope=scope, after=0))
        while batch:
            yield from (run for _, run in batch)
            batch = self._ask(partial(rows.read_run_batch, scope=scope, after=batch[-1][0]))

    def _export_notes(self, scope: str) -> Iterator[StoredNote]:
        batch = self._ask(partial(rows.read_note_batch, scope=scope, after=(0, "")))
        while batch:
            yield from (note for _, note in batch)
            scope_id, last = batch[-1]
            batch = self._ask(partial(rows.read_note_batch, scope=scope, after=(scope_id, last.name)))

    def _erase(self, done: str) -> None:
        try:
            erased = self._database.erase()
        except DATABASE_ERRORS:
            erased = False
        if not erased:
            warnings.warn(
                f"{done}, but another connection is using {self._database.name}: its pages or its write-ahead log "
                "keep old bytes until the next delete or prune that nobody is in the way of",
                RuntimeWarning,
                stacklevel=3,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"store {self._database.name} is closed; open a new PhraseStore")


def _checked_names(scopes: Collection[str]) -> list[str]:
    return check_scopes(scopes if isinstance(scopes, str) else tuple(scopes), "ephemeral")


_stores: WeakSet[PhraseStore] = WeakSet()


def _leave_parents() -> None:
    for store in _stores:
        store._leave_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parents)
