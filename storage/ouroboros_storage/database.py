"""From a URL or an engine to a database that is ready: checked, migrated, and patient with other writers."""

from __future__ import annotations

import os
import random
import sqlite3
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from ouroboros_llm.errors import MissingExtraError, StoreError

from . import sqlite_file
from .migrations import BACKENDS, MIGRATIONS, migrate, schema_version
from .sqlite_file import CorruptFileError, SqliteFile

Result = TypeVar("Result")

# A driver's own errors come bare from a new connection's pragmas, and a full or vanished disk may say so itself.
DATABASE_ERRORS = (SQLAlchemyError, sqlite3.Error, OSError)

_CONNECT_SECONDS = 5
"""How long a server may take to answer, unless the URL says otherwise."""

_PAUSES = (0.1, 0.2, 0.4)
"""Seconds between attempts, on top of the database's own waiting."""


class Database:
    """An engine and what is different between backends. Calls are not thread-safe where an in-memory SQLite is used."""

    def __init__(self, engine: Engine, *, owned: bool, file: SqliteFile | None = None) -> None:
        """`owned`: whether `close` disposes the engine; `file`: what is behind it, where that is ours to look after."""
        self.engine, self.file, self._owned = engine, file, owned
        self.name = engine.url.render_as_string(hide_password=True)
        self._sqlite = engine.dialect.name == "sqlite"
        self._process = os.getpid()

    def read(self, action: Callable[[Connection], Result], *, patient: bool = True) -> Result:
        return self._attempt(action, patient)

    def write(self, action: Callable[[Connection], Result], *, patient: bool = True) -> Result:
        """Run `action` in one transaction, again from the start where another writer is in the way.

        With `patient` off there is one attempt.
        """

        def transaction(connection: Connection) -> Result:
            if self._sqlite:
                sqlite_file.begin(connection)
            return action(connection)

        return self._attempt(transaction, patient)

    def autocommit(self, action: Callable[[Connection], Result]) -> Result:
        """Run `action` outside of any transaction."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return action(connection)

    def prepare(self, create: bool) -> None:
        """Check the database and bring its tables up to date.

        Raises:
            CorruptFileError: a damaged file.
            StoreError: a schema of a later version, or one to create with `create` off.
        """
        version = self.read(self._checked_version)
        if version > len(MIGRATIONS):
            raise StoreError(
                f"store {self.name} has schema version {version}, but this ouroboros-llm knows versions up to "
                f"{len(MIGRATIONS)}; upgrade ouroboros-llm or choose another database"
            )
        if version < len(MIGRATIONS) and not create:
            raise StoreError(
                f"store {self.name} needs tables of schema version {len(MIGRATIONS)}, but has version {version} "
                "(0: none), and create=False; open it once with create=True"
            )
        if self.file is not None:
            self._use_wal()
        if version < len(MIGRATIONS):
            self.write(migrate)

    def checkpoint(self) -> bool:
        """Let nothing deleted linger in a write-ahead log; False where another connection is in the way."""
        return not self._sqlite or self.autocommit(sqlite_file.checkpoint)

    def close(self) -> None:
        if self._owned:
            self.engine.dispose()

    def _attempt(self, action: Callable[[Connection], Result], patient: bool) -> Result:
        self._leave_parent()
        for pause in _PAUSES if patient else ():
            try:
                with self.engine.begin() as connection:
                    return action(connection)
            except DBAPIError as error:
                if not self._may_pass(error):
                    raise
            # Writers that collided once would collide again if they all waited equally long.
            time.sleep(pause * random.uniform(0.5, 1.5))
        with self.engine.begin() as connection:
            return action(connection)

    def _may_pass(self, error: DBAPIError) -> bool:
        """Whether another attempt makes sense: a lock, a lost connection, or a deadlock that another writer won."""
        if isinstance(error.orig, sqlite3.Error):
            return sqlite_file.is_busy(error.orig)
        return error.connection_invalidated or isinstance(error, OperationalError)

    def _leave_parent(self) -> None:
        """A forked child must not use its parent's connections."""
        if self._process != os.getpid() and self._owned and not isinstance(self.engine.pool, StaticPool):
            self.engine.dispose(close=False)
            self._process = os.getpid()

    def _checked_version(self, connection: Connection) -> int:
        if self._sqlite:
            sqlite_file.check(connection)
        return schema_version(connection)

    def _use_wal(self) -> None:
        try:
            self.autocommit(sqlite_file.use_wal)
        except DBAPIError:
            pass  # a read-only file, or another process that is doing just this; both work without


def open_database(url_or_engine: object, *, create: bool) -> Database:
    """Open, check and migrate. A corrupt SQLite file is set aside, with a warning, and a new one started.

    Raises:
        StoreError: not a URL or engine, nothing there that can be used, or a schema of a later version.
        MissingExtraError: PostgreSQL without its driver.
    """
    if isinstance(url_or_engine, Engine):
        _check_backend(url_or_engine.url, url_or_engine.dialect.is_async)
        return _prepared(Database(url_or_engine, owned=False), create)
    url = _parse(url_or_engine)
    engine = _engine(url)
    if engine.dialect.name != "sqlite" or sqlite_file.in_memory(url):
        return _prepared(Database(engine, owned=True), create)
    file = SqliteFile(url)
    file.prepare(create)
    try:
        return _prepared(Database(engine, owned=True, file=file), create)
    except CorruptFileError as error:
        if not create or file.read_only:
            raise
        warnings.warn(f"{error}; it is kept as {file.set_aside()} and a new one started", RuntimeWarning, stacklevel=4)
    except StoreError:
        if not file.is_frozen():
            raise
        return _prepared(Database(_engine(file.immutable_url()), owned=True, file=file), create=False)
    file.prepare(create)
    return _prepared(Database(engine, owned=True, file=file), create)


def reason(error: BaseException) -> str:
    """What went wrong, without the statement and its parameters: they are pieces of what users said."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


def _prepared(database: Database, create: bool) -> Database:
    try:
        database.prepare(create)
    except StoreError:
        database.close()
        raise
    except DATABASE_ERRORS as error:
        database.close()
        cause = getattr(error, "orig", error)
        kind = CorruptFileError if isinstance(cause, sqlite3.Error) and sqlite_file.is_corrupt(cause) else StoreError
        raise kind(f"store {database.name} cannot be used: {reason(error)}") from error
    return database


def _parse(url: object) -> URL:
    if isinstance(url, URL):
        return url
    if not isinstance(url, str):
        raise StoreError(f"store must be a database URL or a SQLAlchemy engine, but got {type(url).__name__}")
    if "://" not in url:
        raise StoreError(f"store must be a database URL, but got {url!r}; for a SQLite file write 'sqlite:///{url}'")
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"store must be a database URL such as 'sqlite:///phrases.db': {error}") from error


def _engine(url: URL) -> Engine:
    """An engine of our own, configured for its backend. Connects to nothing yet."""
    _check_backend(url)
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(url, hide_parameters=True, **_engine_options(url))
    except (ArgumentError, NoSuchModuleError) as error:
        raise StoreError(f"store {url.render_as_string()} cannot be used: {reason(error)}") from error
    except ImportError as error:
        if url.get_driver_name() == "psycopg":
            raise MissingExtraError("psycopg", "postgres") from error
        raise StoreError(f"store {url.render_as_string()} needs a driver that is not installed: {error}") from error
    _check_backend(url, engine.dialect.is_async)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", sqlite_file.set_pragmas)
    return engine


def _engine_options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() != "sqlite":
        timeout = {} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT_SECONDS}
        return {"pool_pre_ping": True, "connect_args": timeout}
    if sqlite_file.in_memory(url):
        # One connection for all threads; with SQLAlchemy's default each would have an empty database of its own.
        return {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    return {}


def _check_backend(url: URL, is_async: bool = False) -> None:
    if url.get_backend_name() not in (*BACKENDS, "postgres") or is_async:
        raise StoreError(
            f"store must be {' or '.join(BACKENDS)} with a synchronous driver, but got {url.drivername!r}; "
            "write 'sqlite:///PATH' or 'postgresql+psycopg://USER@HOST/DATABASE'"
        )
