"""Scopes, runs and notes as rows: every statement that reads or writes them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from time import time_ns
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, Table, case, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from ouroboros_llm.errors import OptionError

from .tables import notes as kept_notes
from .tables import runs, scopes

_BATCH = 500
"""Rows fetched at a time."""


class ScopeKey(NamedTuple):
    """Phrases of one scope are token ids, so each tokenizer has its own."""

    scope: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class PendingRun:
    """A run that is not in the database yet. Times in microseconds since 1970."""

    count: int
    created: int
    last_used: int
    answer: bool = True
    """Whether it begins where an answer begins."""


@dataclass(frozen=True, slots=True)
class StoredScope:
    """A scope as the database holds it, one for each tokenizer that wrote to it."""

    scope: str
    fingerprint: str
    runs: int
    tokens: int
    created: datetime
    last_used: datetime


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run of tokens as the database holds it, and how often it was added."""

    scope: str
    fingerprint: str
    token_ids: tuple[int, ...]
    count: int
    created: datetime
    last_used: datetime
    answer: bool = True
    """Whether it begins where an answer begins, as outputs do and runs of rejected drafts do not."""


@dataclass(frozen=True, slots=True)
class ReadRun:
    hash: bytes
    token_ids: tuple[int, ...]
    count: int
    answer: bool


def encode(token_ids: Sequence[int]) -> bytes:
    """Token ids as unsigned 32-bit little-endian integers. OptionError where one does not fit."""
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error:
        wrong = next((t for t in token_ids if not isinstance(t, int) or not 0 <= t < 1 << 32), token_ids)
        raise OptionError(f"token_ids must be whole numbers from 0 to {(1 << 32) - 1}, but got {wrong!r:.80}") from None


def decode(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)


def content_hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def upsert(
    connection: Connection,
    pending: Mapping[ScopeKey, Mapping[bytes, PendingRun]],
    notes: Mapping[ScopeKey, Mapping[str, bytes]],
) -> dict[ScopeKey, int]:
    """Write runs by their encoded token ids; a run already there counts up. The empty run makes its scope exist.
    So do notes.

    Returns the id of each scope.

    Rows go in the order of their keys, so that two writers wait for each other instead of deadlocking.
    """
    scope_ids: dict[ScopeKey, int] = {}
    for key in sorted({*pending, *notes}):
        found = pending.get(key) or {b"": PendingRun(1, now := time_ns() // 1000, now)}
        scope_ids[key] = scope_id = _upsert_scope(connection, key, list(found.values()))
        rows = [_row(scope_id, data, run) for data, run in found.items() if data]
        if rows:
            statement = _upsert(connection, runs, ["scope_id", "hash"], counted=True)
            connection.execute(statement, sorted(rows, key=lambda row: row["hash"]))
        if key in notes:
            _upsert_notes(connection, scope_id, notes[key])
    return scope_ids


def position(connection: Connection, key: ScopeKey) -> tuple[int | None, int]:
    """The id of a scope, None where there is none, and the highest id of any run, of whatever scope."""
    scope_id = connection.scalar(_scope_id(key))
    return scope_id, connection.scalar(select(func.max(runs.c.id))) or 0


def read_runs(connection: Connection, key: ScopeKey, after: int, up_to: int, capacity: int) -> list[ReadRun]:
    """The runs of a scope with `after` < id <= `up_to`, the latest used first, until they are `capacity` tokens."""
    statement = (
        _of_scope(key.scope, runs.c.hash, runs.c.token_ids, runs.c.length, runs.c["count"], runs.c.answer)
        .where(scopes.c.fingerprint == key.fingerprint, runs.c.id > after, runs.c.id <= up_to)
        .order_by(runs.c.last_used.desc(), runs.c.id.desc())
    )
    found: list[ReadRun] = []
    with connection.execution_options(yield_per=_BATCH).execute(statement) as result:
        for row in result:
            capacity -= row.length
            if capacity < 0:
                break
            found.append(ReadRun(bytes(row.hash), decode(row.token_ids), row[3], bool(row.answer)))
    return found


def read_batch(connection: Connection, scope: str, after: int) -> list[tuple[int, StoredRun]]:
    """The next runs of a scope with id > `after`, with their ids, in the order in which they were first written."""
    of_run = (runs.c.token_ids, runs.c["count"], runs.c.created, runs.c.last_used, runs.c.answer, runs.c.id)
    columns = (scopes.c.fingerprint, *of_run)
    statement = _of_scope(scope, *columns).where(runs.c.id > after).order_by(runs.c.id).limit(_BATCH)
    return [
        (run_id, StoredRun(scope, fingerprint, decode(data), count, _time(created), _time(last_used), bool(answer)))
        for fingerprint, data, count, created, last_used, answer, run_id in connection.execute(statement)
    ]


def read_scopes(connection: Connection) -> list[StoredScope]:
    size = (func.count(runs.c.id), func.coalesce(func.sum(runs.c.length), 0))
    statement = (
        select(scopes.c.name, scopes.c.fingerprint, *size, scopes.c.created, scopes.c.last_used)
        .outerjoin(runs, runs.c.scope_id == scopes.c.id)
        .group_by(scopes.c.id)
        .order_by(scopes.c.name, scopes.c.fingerprint)
    )
    return [
        StoredScope(name, fingerprint, count, int(tokens), _time(created), _time(last_used))
        for name, fingerprint, count, tokens, created, last_used in connection.execute(statement)
    ]


def delete_scope(connection: Connection, scope: str) -> int:
    """Delete a scope with the runs of all tokenizers; returns how many runs there were."""
    # The runs first: foreign keys cascade only where the connection has them switched on.
    ids = select(scopes.c.id).where(scopes.c.name == scope)
    deleted = connection.execute(delete(runs).where(runs.c.scope_id.in_(ids))).rowcount
    connection.execute(delete(kept_notes).where(kept_notes.c.scope_id.in_(ids)))
    connection.execute(delete(scopes).where(scopes.c.name == scope))
    return deleted


def read_notes(connection: Connection, key: ScopeKey) -> dict[str, bytes]:
    """The notes of a scope by name."""
    statement = select(kept_notes.c.name, kept_notes.c.data).where(
        kept_notes.c.scope_id == _scope_id(key).scalar_subquery()
    )
    return {name: bytes(data) for name, data in connection.execute(statement)}


def _of_scope(scope: str, *columns: Any) -> Select[Any]:
    return select(*columns).join_from(runs, scopes, runs.c.scope_id == scopes.c.id).where(scopes.c.name == scope)


def _scope_id(key: ScopeKey) -> Select[Any]:
    return select(scopes.c.id).where(scopes.c.name == key.scope, scopes.c.fingerprint == key.fingerprint)


def _upsert_scope(connection: Connection, key: ScopeKey, found: Sequence[PendingRun]) -> int:
    row = {
        "name": key.scope,
        "fingerprint": key.fingerprint,
        "created": min(run.created for run in found),
        "last_used": max(run.last_used for run in found),
    }
    connection.execute(_upsert(connection, scopes, ["name", "fingerprint"]), row)
    scope_id: int = connection.execute(_scope_id(key)).scalar_one()
    return scope_id


def _upsert_notes(connection: Connection, scope_id: int, pending: Mapping[str, bytes]) -> None:
    """Write notes by name; one already there is replaced."""
    now = time_ns() // 1000
    rows = [{"scope_id": scope_id, "name": name, "data": data, "last_used": now} for name, data in pending.items()]
    statement = _upsert(connection, kept_notes, ["scope_id", "name"], replaced="data")
    connection.execute(statement, sorted(rows, key=lambda row: str(row["name"])))


def _upsert(
    connection: Connection, table: Table, keys: list[str], *, counted: bool = False, replaced: str | None = None
) -> Any:
    backend: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = backend.insert(table)
    later, there = statement.excluded.last_used, table.c.last_used
    changes = {"last_used": case((later > there, later), else_=there)}
    if counted:
        changes["count"] = table.c["count"] + statement.excluded["count"]
        changes["answer"] = case((statement.excluded.answer > 0, 1), else_=table.c.answer)
    if replaced:
        changes[replaced] = statement.excluded[replaced]
    return statement.on_conflict_do_update(index_elements=keys, set_=changes)


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


def _time(microseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
