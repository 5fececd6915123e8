"""What opening and flushing say to the database. Upkeep has statements of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import time_ns
from typing import Any

from sqlalchemy import Connection, Row, Select, case, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from .records import (
    PendingRun,
    ReadRun,
    ScopeKey,
    StoredNote,
    StoredRun,
    StoredScope,
    content_hash,
    decode,
    to_time,
)
from .tables import notes, runs, scopes

_BATCH = 500
"""Rows fetched at a time."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a scope has come. Whoever writes to a scope has its row locked until the end, so that everything up to a
    mark is there once the mark is."""

    scope_id: int
    """Never comes again, whatever is deleted."""
    generation: int
    """How often phrases were taken out of the scope by hand."""
    writes: int
    """How often something was written to it."""

    def follows(self, other: Mark) -> bool:
        """Whether there was one write between the two, and nothing else."""
        return self == Mark(other.scope_id, other.generation, other.writes + 1)


@dataclass(frozen=True, slots=True)
class Position:
    """Where the database stands, as seen by one scope."""

    mark: Mark | None
    """None where the scope has no row."""
    last_used: int
    """When the scope, or the run that was written last, was used: what is added now is later, whatever the clock says.
    Microseconds; 0 where there is nothing."""


def position(connection: Connection, key: ScopeKey) -> Position:
    latest = connection.scalar(select(runs.c.last_used).order_by(runs.c.id.desc()).limit(1)) or 0
    row = connection.execute(_scope(key, *_MARK, scopes.c.last_used)).one_or_none()
    return Position(None, latest) if row is None else Position(Mark(*row[:3]), max(row.last_used, latest))


def read_runs(connection: Connection, scope_id: int, after: int, capacity: int) -> tuple[list[ReadRun], int]:
    """The runs of a scope with id > `after`, the latest used first, until they are `capacity` tokens; and the highest
    id there is."""
    of_scope = runs.c.scope_id == scope_id, runs.c.id > after
    statement = (
        select(runs.c.id, runs.c.hash, runs.c.token_ids, runs.c.length, runs.c["count"], runs.c.answer)
        .where(*of_scope)
        .order_by(runs.c.last_used.desc(), runs.c.id.desc())
    )
    found: list[ReadRun] = []
    newest = after
    with connection.execution_options(yield_per=_BATCH).execute(statement) as result:
        for run_id, data_hash, data, length, count, answer in result:
            capacity -= length
            if capacity < 0:
                return found, connection.scalar(select(func.max(runs.c.id)).where(*of_scope)) or newest
            newest = max(newest, run_id)
            found.append(ReadRun(bytes(data_hash), decode(data), count, bool(answer)))
    return found, newest


def read_notes(connection: Connection, key: ScopeKey, prefix: str = "") -> dict[str, bytes]:
    """The notes of a scope, whose names begin with `prefix`, by name."""
    statement = select(notes.c.name, notes.c.data).where(notes.c.scope_id == _scope(key, scopes.c.id).scalar_subquery())
    if prefix:
        statement = statement.where(notes.c.name.startswith(prefix, autoescape=True))
    return {name: bytes(data) for name, data in connection.execute(statement)}


def read_notes_of(connection: Connection, scope: str, prefix: str) -> dict[str, dict[str, bytes]]:
    """The notes of a scope whose names begin with `prefix`, by tokenizer and name."""
    statement = (
        select(scopes.c.fingerprint, notes.c.name, notes.c.data)
        .join_from(notes, scopes)
        .where(scopes.c.name == scope, notes.c.name.startswith(prefix, autoescape=True))
    )
    found: dict[str, dict[str, bytes]] = {}
    for fingerprint, name, data in connection.execute(statement):
        found.setdefault(fingerprint, {})[name] = bytes(data)
    return found


def upsert(
    connection: Connection,
    pending: Mapping[ScopeKey, Mapping[bytes, PendingRun]],
    new_notes: Mapping[ScopeKey, Mapping[str, bytes]],
    *,
    add_counts: bool = True,
) -> dict[ScopeKey, Mark]:
    """Write runs by their encoded token ids, and notes. The empty run, or a note, makes its scope exist.

    A run already there counts up, or with `add_counts` off keeps the larger count; a note already there is replaced.
    Rows go in the order of their keys, so that two writers wait for each other instead of deadlocking.
    """
    found: dict[ScopeKey, Mark] = {}
    for key in sorted({*pending, *new_notes}):
        of_scope = pending.get(key) or {b"": PendingRun(1, now := time_ns() // 1000, now)}
        last_used = max(run.last_used for run in of_scope.values())
        found[key] = mark = upsert_scope(connection, key, min(run.created for run in of_scope.values()), last_used)
        rows = sorted((_row(mark.scope_id, data, run) for data, run in of_scope.items() if data), key=_hash)
        if rows:
            _count_tokens(connection, mark.scope_id, rows)
            connection.execute(on_conflict(insert(connection, runs), runs, add_counts=add_counts), rows)
        if key in new_notes:
            _upsert_notes(connection, mark.scope_id, new_notes[key], last_used)
    return found


def upsert_scope(connection: Connection, key: ScopeKey, created: int, last_used: int) -> Mark:
    """Make a scope, or note that it is written to. Its row is locked from here on."""
    row = {"name": key.scope, "fingerprint": key.fingerprint, "created": created, "last_used": last_used, "writes": 1}
    connection.execute(on_conflict(insert(connection, scopes), scopes), row)
    return Mark(*connection.execute(_scope(key, *_MARK)).one())


def insert(connection: Connection, table: Any) -> Any:
    """An insert of the connection's dialect: `ON CONFLICT` is not in the standard."""
    backend: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    return backend.insert(table)


def on_conflict(statement: Any, table: Any, *, add_counts: bool = True, keep_data: bool = False) -> Any:
    """What becomes of a row that is there already: it is as recent as the later of the two, and

    a scope or a run is as old as the earlier; a run's counts are added, or the larger stays; a note has the new data,
    unless `keep_data`.
    """
    new, old = statement.excluded, table.c
    changes = {"last_used": _greater(new.last_used, old.last_used)}
    if table is runs:
        count = old["count"] + new["count"] if add_counts else _greater(new["count"], old["count"])
        changes |= {"count": count, "answer": _greater(new.answer, old.answer)}
    if table is scopes:
        changes["writes"] = old.writes + new.writes
    if table is notes:
        changes["data"] = old.data if keep_data else new.data
    else:
        changes["created"] = case((new.created < old.created, new.created), else_=old.created)
    keys = {scopes: ["name", "fingerprint"], runs: ["scope_id", "hash"], notes: ["scope_id", "name"]}[table]
    return statement.on_conflict_do_update(index_elements=keys, set_=changes)


def read_scopes(connection: Connection) -> list[StoredScope]:
    size = (func.count(runs.c.id), func.coalesce(func.sum(runs.c.length), 0))
    statement = (
        select(scopes.c.name, scopes.c.fingerprint, *size, scopes.c.created, scopes.c.last_used)
        .outerjoin(runs, runs.c.scope_id == scopes.c.id)
        .group_by(scopes.c.id)
        .order_by(scopes.c.name, scopes.c.fingerprint)
    )
    return [
        StoredScope(name, fingerprint, count, int(tokens), to_time(created), to_time(last_used))
        for name, fingerprint, count, tokens, created, last_used in connection.execute(statement)
    ]


def read_run_batch(connection: Connection, scope: str, after: int) -> list[tuple[int, StoredRun]]:
    """The next runs of a scope with id > `after`, with their ids, in the order in which they were first written."""
    statement = (
        select(scopes.c.fingerprint, runs)
        .join_from(runs, scopes)
        .where(scopes.c.name == scope, runs.c.id > after)
        .order_by(runs.c.id)
        .limit(_BATCH)
    )
    return [(row.id, _run(scope, row)) for row in connection.execute(statement)]


def read_note_batch(connection: Connection, scope: str, after: tuple[int, str]) -> list[tuple[int, StoredNote]]:
    """The next notes of a scope behind (`scope_id`, `name`), with their scope's id, by name."""
    scope_id, name = after
    statement = (
        select(scopes.c.fingerprint, notes)
        .join_from(notes, scopes)
        .where(scopes.c.name == scope)
        .where((notes.c.scope_id > scope_id) | (notes.c.scope_id == scope_id) & (notes.c.name > name))
        .order_by(notes.c.scope_id, notes.c.name)
        .limit(_BATCH)
    )
    return [
        (row.scope_id, StoredNote(scope, row.fingerprint, row.name, bytes(row.data), to_time(row.last_used)))
        for row in connection.execute(statement)
    ]


def delete_scope(connection: Connection, scope: str) -> int:
    """Delete a scope with the runs of all tokenizers; returns how many runs there were."""
    # The runs first: foreign keys cascade only where the connection has them switched on.
    ids = select(scopes.c.id).where(scopes.c.name == scope)
    deleted = connection.execute(delete(runs).where(runs.c.scope_id.in_(ids))).rowcount
    connection.execute(delete(notes).where(notes.c.scope_id.in_(ids)))
    connection.execute(delete(scopes).where(scopes.c.name == scope))
    return deleted


_MARK = (scopes.c.id, scopes.c.generation, scopes.c.writes)


def _scope(key: ScopeKey, *columns: Any) -> Select[Any]:
    return select(*columns).where(scopes.c.name == key.scope, scopes.c.fingerprint == key.fingerprint)


def _count_tokens(connection: Connection, scope_id: int, rows: Sequence[dict[str, Any]]) -> None:
    """Add to the scope's tokens those of the rows that are not there yet."""
    known: set[bytes] = set()
    for start in range(0, len(rows), _BATCH):
        hashes = [row["hash"] for row in rows[start : start + _BATCH]]
        statement = select(runs.c.hash).where(runs.c.scope_id == scope_id, runs.c.hash.in_(hashes))
        known.update(bytes(data) for data in connection.scalars(statement))
    new = sum(row["length"] for row in rows if row["hash"] not in known)
    connection.execute(update(scopes).where(scopes.c.id == scope_id).values(tokens=scopes.c.tokens + new))


def _upsert_notes(connection: Connection, scope_id: int, pending: Mapping[str, bytes], last_used: int) -> None:
    # The time of the runs beside them, not the clock's: that one may have been put back.
    rows = [
        {"scope_id": scope_id, "name": name, "data": data, "last_used": last_used}
        for name, data in sorted(pending.items())
    ]
    connection.execute(on_conflict(insert(connection, notes), notes), rows)


def _hash(row: Mapping[str, Any]) -> bytes:
    found: bytes = row["hash"]
    return found


def _greater(one: Any, other: Any) -> Any:
    return case((one > other, one), else_=other)


def _run(scope: str, row: Row[Any]) -> StoredRun:
    return StoredRun(
        scope,
        row.fingerprint,
        decode(row.token_ids),
        row._mapping["count"],
        to_time(row.created),
        to_time(row.last_used),
        bool(row.answer),
    )


def _row(scope_id: int, data: bytes, run: PendingRun) -> dict[str, Any]:
    return {
        "scope_id": scope_id,
        "hash": content_hash(data),
        "token_ids": data,
        "length": len(data) // 4,
        "count": run.count,
        "created": run.created,
        "last_used": run.last_used,
        "answer": int(run.answer),
    }
