"""The one writer of a store: gathers what turns add, and writes it when they end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sqlalchemy import Connection

from ouroboros_llm.errors import StoreError

from .buffer import Buffer, NoteBuffer
from .database import DATABASE_ERRORS, Database
from .outage import Outage
from .records import PendingRun, ScopeKey
from .rows import Identity, upsert
from .upkeep import Quotas

PendingRuns = Mapping[ScopeKey, Mapping[bytes, PendingRun]]
PendingNotes = Mapping[ScopeKey, Mapping[str, bytes]]


class Writer:
    """Buffers, and the transaction that empties them. `write` is called under the store's lock; `runs.add` and
    `notes.add` may be called at any time."""

    def __init__(self, database: Database, outage: Outage, quotas: Quotas) -> None:
        self.runs, self.notes = Buffer(), NoteBuffer()
        self._database, self._outage, self._quotas = database, outage, quotas
        self._writing = False

    def write(self, written: Callable[[PendingRuns, Mapping[ScopeKey, Identity]], None], *, patient: bool) -> None:
        """Write all there is in one transaction, then call `written`. Where that fails it waits, with a warning.

        With `patient` a locked database is tried again a few times.
        """
        # Writing already: a stream that the garbage collector closes meanwhile waits for the next time.
        if self._writing:
            return
        runs, notes = self.runs.take(), self.notes.take()
        if not runs and not notes:
            return
        self._writing = True
        try:
            identities = self._database.write(lambda connection: self.put(connection, runs, notes), patient=patient)
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
        written(runs, identities)

    def put(
        self, connection: Connection, runs: PendingRuns, notes: PendingNotes, *, add_counts: bool = True
    ) -> dict[ScopeKey, Identity]:
        """Write rows and hold the quotas."""
        identities = upsert(connection, runs, notes, add_counts=add_counts)
        tokens = sum(len(data) // 4 for found in runs.values() for data in found)
        self._quotas.enforce(connection, [scope_id for scope_id, _ in identities.values()], tokens)
        return identities

    def forget(self, scope: str) -> None:
        """Drop what was added to a scope, for every tokenizer."""
        self.runs.forget(scope)
        self.notes.forget(scope)

    def leave_parent(self) -> None:
        """In a forked child: what was gathered before is the parent's to write."""
        self.runs.clear()
        self.notes.clear()
        self._writing = False
