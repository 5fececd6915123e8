"""The one writer of a store: gathers what turns add, and writes it when they end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from sqlalchemy import Connection

from ouroboros_llm.errors import StoreError

from .buffer import Buffer, NoteBuffer
from .database import DATABASE_ERRORS, Database
from .outage import Outage
from .records import PendingRun, ScopeKey
from .rows import Mark, upsert
from .upkeep import Quotas, marks_of

Pending = TypeVar("Pending")
PendingRuns = Mapping[ScopeKey, Mapping[bytes, PendingRun]]
PendingNotes = Mapping[ScopeKey, Mapping[str, bytes]]


class Writer:
    """Buffers, and the transaction that empties them. `write` is called under the store's lock; `runs.add` and
    `notes.add` may be called at any time."""

    def __init__(self, database: Database, outage: Outage, quotas: Quotas, ephemeral: Collection[str]) -> None:
        self.runs, self.notes = Buffer(), NoteBuffer()
        self.ephemeral = set(ephemeral)
        """Scopes of which nothing is written."""
        self._database, self._outage, self._quotas = database, outage, quotas
        self._writing = False

    def write(self, written: Callable[[PendingRuns, Mapping[ScopeKey, Mark]], None], *, patient: bool) -> None:
        """Write all there is in one transaction, then call `written`. Where that fails it waits, with a warning.

        With `patient` a locked database is tried again a few times.
        """
        # Writing already: a stream that the garbage collector closes meanwhile waits for the next time.
        if self._writing:
            return
        runs, notes = self._kept(self.runs.take()), self._kept(self.notes.take())
        if not runs and not notes:
            return
        self._writing = True
        try:
            marks = self._database.write(lambda connection: self.put(connection, runs, notes), patient=patient)
        except BaseException as error:
            self.runs.put_back(runs)
            self.notes.put_back(notes)
            if not isinstance(error, (StoreError, *DATABASE_ERRORS)):
                raise
            self._outage.begin("written", error)
            return
        finally:
            self._writing = False
        self._outage.end()
        written(runs, marks)

    def put(
        self, connection: Connection, runs: PendingRuns, notes: PendingNotes, *, add_counts: bool = True
    ) -> dict[ScopeKey, Mark]:
        """Write rows and hold the quotas."""
        marks = upsert(connection, runs, notes, add_counts=add_counts)
        tokens = sum(len(data) // 4 for found in runs.values() for data in found)
        self._quotas.enforce(connection, marks.values(), tokens)
        return marks

    def enforce_quotas(self, connection: Connection, scope: str) -> None:
        """After a scope was made, or grew, by other means."""
        self._quotas.enforce(connection, marks_of(connection, scope), 0)

    def _kept(self, taken: dict[ScopeKey, Pending]) -> dict[ScopeKey, Pending]:
        """Without what a turn added that was running when its scope became ephemeral."""
        return {key: pending for key, pending in taken.items() if key.scope not in self.ephemeral}

    def forget(self, scope: str) -> None:
        """Drop what was added to a scope, for every tokenizer."""
        self.runs.forget(scope)
        self.notes.forget(scope)

    def leave_parent(self) -> None:
        """In a forked child: what was gathered before is the parent's to write."""
        self.runs.clear()
        self.notes.clear()
        self._writing = False
