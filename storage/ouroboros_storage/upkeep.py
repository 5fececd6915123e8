"""What keeps a store in order: bounds, copies, counts and checks of scopes, as statements."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import time_ns
from typing import Any

from sqlalchemy import Connection, Select, delete, distinct, func, literal, or_, select, true, update

from ouroboros_llm.errors import StoreError
from ouroboros_llm.phrase_pool.base import ANSWERS, KEPT_ANSWERS
from ouroboros_llm.phrase_pool.document_notes import NOTES

from .bounds import Bounds
from .records import ScopeKey, StoreStats, content_hash, to_time
from .rows import Mark, insert, on_conflict, upsert_scope
from .tables import notes, runs, scopes

_TRIMMED = 0.9
"""Part of a quota that is left when it was exceeded, so that the next flushes have room."""

_KEPT_NOTES = 65_536
"""Notes per scope at most: successors of twice as many tokens as drafting keeps in memory. Notes on answers have a
bound of their own (`KEPT_ANSWERS`), those on documents none: without them nobody could remove the documents."""

_NOTES_COUNTED = 64
"""A scope's notes are counted when it was written to so often."""

_BATCH = 1000


@dataclass(eq=False)
class Quotas:
    """Bounds in tokens, held at every flush by dropping what was used least recently. None: no bound."""

    scope: int | None
    store: int | None
    _unmeasured: float = float("inf")

    def enforce(self, connection: Connection, marks: Collection[Mark], written: int) -> None:
        """After `written` tokens went to these scopes."""
        for mark in marks:
            of_scope = scopes.c.id == mark.scope_id
            if self.scope is not None and _tokens(connection, of_scope) > self.scope:
                bounds = Bounds(max_tokens=int(self.scope * _TRIMMED))
                _drop(connection, _least_recent(runs.c.scope_id == mark.scope_id, bounds))
                _count_anew(connection, of_scope)
            if mark.writes % _NOTES_COUNTED == 0:
                _drop_notes(connection, mark.scope_id)
        # The store is measured anew when it may have grown by a hundredth, with what other processes wrote.
        self._unmeasured += written
        if self.store is not None and self._unmeasured > self.store / 100:
            if _tokens(connection, true()) > self.store:
                _drop(connection, _least_recent(true(), Bounds(max_tokens=int(self.store * _TRIMMED))))
                _count_anew(connection, true())
            self._unmeasured = 0


def prune(connection: Connection, scope: str | None, bounds: Bounds) -> tuple[int, list[str]]:
    """Drop runs, least recently used first, until the bounds hold: of one scope, or of the whole store.

    Returns the number of runs, and the scopes that lost some.
    """
    before = bounds.before
    chosen = select(scopes.c.id).where(true() if scope is None else scopes.c.name == scope)
    if before is not None:
        _heal_clock(connection, chosen)
    of_chosen = runs.c.scope_id.in_(chosen)
    dropped = _least_recent(of_chosen, bounds)
    touched = list(connection.scalars(select(runs.c.scope_id).where(runs.c.id.in_(dropped)).distinct()))
    count = _drop(connection, dropped)
    if before is not None:
        connection.execute(delete(notes).where(notes.c.scope_id.in_(chosen), notes.c.last_used < before))
    names = list(connection.scalars(select(scopes.c.name).where(scopes.c.id.in_(touched)).distinct()))
    connection.execute(
        update(scopes)
        .where(scopes.c.id.in_(touched))
        .values(generation=scopes.c.generation + 1, last_used=_last_used())
    )
    _count_anew(connection, scopes.c.id.in_(touched))
    if before is not None:
        empty = ~select(runs.c.id).where(runs.c.scope_id == scopes.c.id).exists()
        gone = select(scopes.c.id).where(scopes.c.id.in_(chosen), empty, scopes.c.last_used < before)
        connection.execute(delete(notes).where(notes.c.scope_id.in_(gone)))
        connection.execute(delete(scopes).where(scopes.c.id.in_(gone)))
    return count, names


def take_out(connection: Connection, key: ScopeKey, hashes: Sequence[bytes], names: Sequence[str]) -> int:
    """Drop runs of a scope by their hashes, and notes by their names; returns the number of runs."""
    of_key = scopes.c.name == key.scope, scopes.c.fingerprint == key.fingerprint
    scope_id = connection.scalar(select(scopes.c.id).where(*of_key))
    count = 0
    for start in range(0, len(hashes), _BATCH):
        some = runs.c.hash.in_(hashes[start : start + _BATCH])
        count += connection.execute(delete(runs).where(runs.c.scope_id == scope_id, some)).rowcount
    for start in range(0, len(names), _BATCH):
        some = notes.c.name.in_(names[start : start + _BATCH])
        connection.execute(delete(notes).where(notes.c.scope_id == scope_id, some))
    connection.execute(update(scopes).where(scopes.c.id == scope_id).values(generation=scopes.c.generation + 1))
    _count_anew(connection, scopes.c.id == scope_id)
    return count


def merge(connection: Connection, source: str, target: str, *, into_existing: bool = True) -> int:
    """Add the runs and notes of one scope to another: counts add up, notes that are there stay.

    Returns the number of runs. Raises StoreError where the source is unknown, or the target exists and must not.
    """
    found = _rows_of(connection, source)
    if not into_existing:
        _check_free(connection, target)
    for row in found:
        key = ScopeKey(target, row.fingerprint)
        target_id = upsert_scope(connection, key, row.created, row.last_used).scope_id
        for table in (runs, notes):
            columns = [column for column in table.columns if column.name not in ("id", "scope_id")]
            order = runs.c.id if table is runs else notes.c.name
            rows = select(literal(target_id), *columns).where(table.c.scope_id == row.id).order_by(order)
            statement = insert(connection, table).from_select(["scope_id", *(c.name for c in columns)], rows)
            connection.execute(on_conflict(statement, table, keep_data=True))
        _count_anew(connection, scopes.c.id == target_id)
    ids = [row.id for row in found]
    return connection.scalar(select(func.count()).select_from(runs).where(runs.c.scope_id.in_(ids))) or 0


def merge_all(connection: Connection, sources: Sequence[str], target: str) -> int:
    return sum(merge(connection, source, target) for source in sources)


def copy(connection: Connection, source: str, target: str) -> int:
    """Like `merge`, into a scope that does not exist yet."""
    return merge(connection, source, target, into_existing=False)


def rename(connection: Connection, source: str, target: str) -> int:
    """Give a scope another name; returns its number of runs. StoreError where it is unknown or the name is taken."""
    ids = [row.id for row in _rows_of(connection, source)]
    _check_free(connection, target)
    connection.execute(update(scopes).where(scopes.c.id.in_(ids)).values(name=target))
    return connection.scalar(select(func.count()).select_from(runs).where(runs.c.scope_id.in_(ids))) or 0


def stats(connection: Connection, scope: str | None, *, file_bytes: int | None, waiting: int) -> StoreStats:
    chosen = select(scopes.c.id).where(true() if scope is None else scopes.c.name == scope)
    names = select(func.count(distinct(scopes.c.name))).where(scopes.c.id.in_(chosen))
    of_runs = select(
        func.count(runs.c.id),
        func.coalesce(func.sum(runs.c.length), 0),
        func.coalesce(func.sum(runs.c["count"]), 0),
        func.min(runs.c.last_used),
        func.max(runs.c.last_used),
    ).where(runs.c.scope_id.in_(chosen))
    of_notes = select(func.count(), func.coalesce(func.sum(func.length(notes.c.data)), 0)).where(
        notes.c.scope_id.in_(chosen)
    )
    count, tokens, uses, oldest, newest = connection.execute(of_runs).one()
    note_count, note_bytes = connection.execute(of_notes).one()
    return StoreStats(
        scopes=connection.scalar(names) or 0,
        runs=count,
        tokens=int(tokens),
        uses=int(uses),
        notes=note_count,
        nbytes=4 * int(tokens) + int(note_bytes),
        oldest=None if oldest is None else to_time(oldest),
        newest=None if newest is None else to_time(newest),
        file_bytes=file_bytes,
        waiting=waiting,
    )


def problems(connection: Connection, advance: Callable[[int], None]) -> Iterator[str]:
    """What is wrong with the database: damaged pages, rows whose scope is gone, runs that are not what was written.

    `advance` is told how many runs were read.
    """
    if connection.dialect.name == "sqlite":
        found = connection.exec_driver_sql("PRAGMA integrity_check").scalars()
        yield from (f"SQLite finds: {line}" for line in found if line != "ok")
    known = select(scopes.c.id)
    for table in (runs, notes):
        lost = connection.scalar(select(func.count()).select_from(table).where(table.c.scope_id.not_in(known)))
        if lost:
            yield f"{lost} rows of {table.name} belong to no scope"
    last = 0
    columns = (runs.c.id, runs.c.hash, runs.c.token_ids, runs.c.length)
    while batch := connection.execute(select(*columns).where(runs.c.id > last).order_by(runs.c.id).limit(_BATCH)).all():
        for run_id, data_hash, data, length in batch:
            if content_hash(data) != data_hash or len(data) != 4 * length:
                yield f"run {run_id} is not what was written: its token ids do not match their hash or length"
        last = batch[-1].id
        advance(len(batch))


def _least_recent(chosen: Any, bounds: Bounds) -> Select[Any]:
    """Ids of the chosen runs that lie beyond a bound, counted from the one used last."""
    order = (runs.c.last_used.desc(), runs.c.id.desc())
    ranked = (
        select(
            runs.c.id,
            runs.c.last_used,
            func.sum(runs.c.length).over(order_by=order).label("tokens"),
            func.row_number().over(order_by=order).label("rank"),
        )
        .where(chosen)
        .subquery()
    )
    largest = ((ranked.c.tokens, bounds.max_tokens), (ranked.c.rank, bounds.max_runs))
    beyond = [column > bound for column, bound in largest if bound is not None]
    if bounds.before is not None:
        beyond.append(ranked.c.last_used < bounds.before)
    return select(ranked.c.id).where(or_(*beyond))


def _drop(connection: Connection, ids: Select[Any]) -> int:
    return connection.execute(delete(runs).where(runs.c.id.in_(ids))).rowcount


def _drop_notes(connection: Connection, scope_id: int) -> None:
    of_answers, of_documents = (notes.c.name.startswith(prefix, autoescape=True) for prefix in (ANSWERS, NOTES))
    for kind, bound in ((of_answers, KEPT_ANSWERS), (~of_answers & ~of_documents, _KEPT_NOTES)):
        chosen = notes.c.scope_id == scope_id, kind
        excess = (connection.scalar(select(func.count()).select_from(notes).where(*chosen)) or 0) - bound
        if excess > 0:
            oldest = select(notes.c.name).where(*chosen).order_by(notes.c.last_used, notes.c.name).limit(excess)
            connection.execute(delete(notes).where(*chosen, notes.c.name.in_(oldest)))


def _heal_clock(connection: Connection, chosen: Select[Any]) -> None:
    """What a wrong clock dated into the future would never grow old: it counts as used now."""
    now = time_ns() // 1000
    for table, of_chosen in (
        (runs, runs.c.scope_id.in_(chosen)),
        (notes, notes.c.scope_id.in_(chosen)),
        (scopes, scopes.c.id.in_(chosen)),
    ):
        connection.execute(update(table).where(of_chosen, table.c.last_used > now).values(last_used=now))
        if "created" in table.c:
            connection.execute(update(table).where(of_chosen, table.c.created > now).values(created=now))


def _last_used() -> Any:
    """Of a scope: when its latest run was used; as before where there is none."""
    latest = select(func.max(runs.c.last_used)).where(runs.c.scope_id == scopes.c.id).scalar_subquery()
    return func.coalesce(latest, scopes.c.last_used)


def _tokens(connection: Connection, chosen: Any) -> int:
    return int(connection.scalar(select(func.coalesce(func.sum(scopes.c.tokens), 0)).where(chosen)) or 0)


def _count_anew(connection: Connection, chosen: Any) -> None:
    """After runs went, or came from elsewhere."""
    tokens = select(func.coalesce(func.sum(runs.c.length), 0)).where(runs.c.scope_id == scopes.c.id).scalar_subquery()
    connection.execute(update(scopes).where(chosen).values(tokens=tokens))


def marks_of(connection: Connection, scope: str) -> list[Mark]:
    """Of all rows of a scope."""
    statement = select(scopes.c.id, scopes.c.generation, scopes.c.writes).where(scopes.c.name == scope)
    return [Mark(*row) for row in connection.execute(statement)]


def _rows_of(connection: Connection, scope: str) -> Sequence[Any]:
    found = connection.execute(select(scopes).where(scopes.c.name == scope)).all()
    if not found:
        raise StoreError(f"scope {scope!r} is not in the store; names are compared exactly, see list()")
    return found


def _check_free(connection: Connection, scope: str) -> None:
    if connection.scalar(select(func.count()).select_from(scopes).where(scopes.c.name == scope)):
        raise StoreError(f"scope {scope!r} exists already; choose another name, or merge into it")
