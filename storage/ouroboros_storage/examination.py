"""A look at a store that changes nothing of it: no migration, no file set aside, none made."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, func, make_url, select

from .engines import engine_of, shown
from .migrations import MIGRATIONS, schema_version
from .tables import migrations, scopes


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What a store looks like from outside."""

    url: str
    """Without its password."""
    exists: bool
    schema: int | None = None
    """Of the tables that are there; 0: none; None: unknown."""
    scopes: int | None = None
    problem: str | None = None
    """Why it cannot be used, and what to do; None where it can."""

    @property
    def newest_schema(self) -> int:
        """The schema that opening the store would bring it to."""
        return len(MIGRATIONS)


def examine(url: str) -> StoreReport:
    """Look at the store behind a URL. Raises StoreError for a URL that names none."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        engine = engine_of(url)
        try:
            return _server(engine, shown(parsed))
        finally:
            engine.dispose()
    name = parsed.database or ":memory:"
    if name == ":memory:" or name.startswith("file:"):
        return StoreReport(shown(parsed), exists=False)
    return _file(Path(name), shown(parsed))


def _server(engine: Engine, url: str) -> StoreReport:
    with engine.connect() as connection:
        version = schema_version(connection)
        return StoreReport(url, True, version, _scopes(connection) if version else 0, _too_new(version))


def _scopes(connection: Connection) -> int:
    return connection.scalar(select(func.count()).select_from(scopes)) or 0


def _file(path: Path, url: str) -> StoreReport:
    if not path.exists():
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        problem = None if os.access(parent, os.W_OK) else f"{parent} is not writable; name another file"
        return StoreReport(url, False, problem=problem)
    try:
        # Immutable: not even the files of a write-ahead log are made beside it.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            version, count = _counted(connection)
    except sqlite3.DatabaseError as error:
        return StoreReport(url, True, problem=f"{path} is no database that can be read ({error}); move it away")
    problem = _too_new(version)
    if not (os.access(path, os.W_OK) and os.access(path.absolute().parent, os.W_OK)):
        problem = f"{path} or its folder is not writable; make it so, or name another file"
    return StoreReport(url, True, version, count, problem)


def _counted(connection: sqlite3.Connection) -> tuple[int, int]:
    """The schema, and the number of scopes."""
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if migrations.name not in names:
        return 0, 0
    [version] = connection.execute(f"SELECT COALESCE(MAX(version), 0) FROM {migrations.name}").fetchone()
    [count] = connection.execute(f"SELECT COUNT(*) FROM {scopes.name}").fetchone()
    return int(version), int(count)


def _too_new(version: int) -> str | None:
    if version <= len(MIGRATIONS):
        return None
    return f"its schema {version} is of a later version than this one; upgrade ouroboros-llm"
