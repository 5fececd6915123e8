"""The pools of a store that are in use, or were lately, and how they learn what the database holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from weakref import WeakValueDictionary

from ouroboros_llm.errors import StoreError
from ouroboros_llm.phrase_pool.document_notes import NOTES

from . import rows
from .buffer import Nowhere
from .database import DATABASE_ERRORS, Database
from .outage import Outage
from .pool import StoredPool
from .records import ScopeKey
from .rows import Mark
from .writer import PendingRuns, Writer

_KEPT = 64
"""Pools that stay in memory between turns although nobody holds them."""


class Pools:
    """Pools by scope and tokenizer: whoever opens the same gets the same, as long as anybody holds it.

    The last ones are held for the next turns, as far as they fit into one pool's capacity together. Everything here is
    called under the store's lock.
    """

    def __init__(
        self,
        database: Database,
        writer: Writer,
        outage: Outage,
        *,
        capacity: int,
        refresh: Callable[[StoredPool], None],
    ) -> None:
        """`capacity`: tokens of a pool; `refresh`: `read`, under the lock."""
        self._database, self._writer, self._outage, self._refresh = database, writer, outage, refresh
        self._capacity, self._ephemeral = capacity, writer.ephemeral
        self._pools: WeakValueDictionary[ScopeKey, StoredPool] = WeakValueDictionary()
        self._kept: OrderedDict[ScopeKey, StoredPool] = OrderedDict()

    def open(self, key: ScopeKey, *, reachable: bool) -> StoredPool:
        """The pool, up to date with the database if that is `reachable`."""
        pool = self._pools.get(key)
        began = pool and pool.generation
        if pool is None:
            pool = self._pools[key] = self._new(key)
        if reachable:
            self.read(pool)
        if pool.generation is not began:
            pool.load_pending(self._writer.runs.runs(key))
        if reachable and not pool.notes_read:
            self._read_notes(pool)
        self._keep(pool)
        return pool

    def read(self, pool: StoredPool) -> None:
        """Bring a pool up to date with the database; where that fails it stays as it is, until it is opened again.

        It starts anew where its scope was deleted or pruned elsewhere, or the whole file.
        """
        if pool.key.scope in self._ephemeral:
            return
        patient = not self._outage.failing
        try:
            found = self._database.read(partial(rows.position, key=pool.key), patient=patient)
            self._writer.runs.begin_after(found.last_used)
            if pool.is_behind(found.mark) and (mark := found.mark) is not None:
                read = partial(rows.read_runs, scope_id=mark.scope_id, after=pool.newest_read, capacity=self._capacity)
                pool.load(*self._database.read(read, patient=patient), mark)
                if pool.notes_read:
                    # What others learned meanwhile can wait, but not that they made the scope a corpus.
                    read_notes = partial(rows.read_notes, key=pool.key, prefix=NOTES)
                    pool.load_notes(self._database.read(read_notes, patient=patient))
        except (StoreError, *DATABASE_ERRORS) as error:
            self._outage.begin("read", error)

    def read_all(self) -> None:
        for pool in self._all():
            self.read(pool)

    def mark_flushed(self, runs: PendingRuns, marks: Mapping[ScopeKey, Mark]) -> None:
        """These runs are in the database now."""
        for key, found in runs.items():
            if pool := self._pools.get(key):
                pool.mark_flushed(found, marks[key])

    def make_ephemeral(self, scope: str) -> None:
        """Keep a scope in memory only from now on, in pools that begin empty."""
        if scope not in self._ephemeral:
            self._ephemeral.add(scope)
            self._writer.forget(scope)
            for pool in self._all():
                if pool.key.scope == scope:
                    self._kept.pop(pool.key, None)
                    self._pools.pop(pool.key, None)

    def is_ephemeral(self, scope: str) -> bool:
        return scope in self._ephemeral

    def notes(self, scope: str, prefix: str) -> dict[str, Mapping[str, bytes]]:
        """The notes in memory of a scope whose names begin with `prefix`, by tokenizer."""
        return {pool.key.fingerprint: pool.recall(prefix) for pool in self._all() if pool.key.scope == scope}

    def forget(self, scopes: Collection[str]) -> None:
        """Empty the pools of these scopes, for every tokenizer."""
        for pool in self._all():
            if pool.key.scope in scopes:
                pool.forget()

    def forget_notes(self, keys: Collection[ScopeKey]) -> None:
        """Read notes anew at the next opening: there are others in the database now."""
        for key in keys:
            if pool := self._pools.get(key):
                pool.notes_read = False

    def leave_file(self, erased: bool) -> None:
        """The database file was replaced. What somebody erased is forgotten; what damage took stays in memory."""
        for pool in self._all():
            if not erased:
                pool.leave_file()
            elif pool.key.scope not in self._ephemeral:
                pool.forget()

    def leave_parent(self) -> None:
        """In a forked child."""
        for pool in self._all():
            pool.leave_parent()

    def release(self) -> None:
        """Hold no pool any longer."""
        self._kept.clear()

    def _new(self, key: ScopeKey) -> StoredPool:
        nowhere = Nowhere() if key.scope in self._ephemeral else None
        runs, notes = nowhere or self._writer.runs, nowhere or self._writer.notes
        return StoredPool(key, runs, notes, self._capacity, self._refresh)

    def _read_notes(self, pool: StoredPool) -> None:
        if pool.key.scope in self._ephemeral:
            pool.notes_read = True
            return
        try:
            found = self._database.read(partial(rows.read_notes, key=pool.key), patient=not self._outage.failing)
            pool.load_notes({**found, **self._writer.notes.notes(pool.key)})
        except (StoreError, *DATABASE_ERRORS) as error:
            self._outage.begin("read", error)

    def _keep(self, pool: StoredPool) -> None:
        self._kept[pool.key] = pool
        self._kept.move_to_end(pool.key)
        tokens = sum(kept.stats.tokens for kept in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > _KEPT or tokens > self._capacity):
            _, dropped = self._kept.popitem(last=False)
            tokens -= dropped.stats.tokens

    def _all(self) -> list[StoredPool]:
        return list(self._pools.values())
