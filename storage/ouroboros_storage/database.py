"""A database that is ready: checked, migrated, and patient with other writers."""

from __future__ import annotations

import os
import random
import sqlite3
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Engine, StaticPool
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from ouroboros_llm.errors import StoreError, StoreUnavailableError

from . import sqlite_file
from .engines import engine_of, shown
from .migrations import MIGRATIONS, migrate, schema_version
from .sqlite_file import CorruptFileError, SqliteFile

Result = TypeVar("Result")

# A driver's own errors come bare from a new connection's pragmas, and a full or vanished disk may say so itself.
DATABASE_ERRORS = (SQLAlchemyError, sqlite3.Error, OSError)

_PAUSES = (0.1, 0.2, 0.4)
"""Seconds between attempts, on top of the database's own waiting."""


class Database:
    """An engine, what is different between backends, and a file that may be damaged or vanish at any time.

    Opened by the first use. Calls are not thread-safe where an in-memory SQLite is used.
    """

    def __init__(self, url_or_engine: object, *, create: bool, on_loss: Callable[[bool], None]) -> None:
        """Look at the arguments only.

        Args:
            create: make a file, its folders and the tables where there are none.
            on_loss: called when a file that was open is replaced by a new one: with True where somebody deleted or
                exchanged it, with False where it was damaged.

        Raises:
            StoreError: not a URL or an engine, or no backend of ours. MissingExtraError: PostgreSQL without its driver.
        """
        self._owned = not isinstance(url_or_engine, Engine)
        self.engine = engine_of(url_or_engine)
        self.name = shown(self.engine.url)
        self.file: SqliteFile | None = None
        self._sqlite = self.engine.dialect.name == "sqlite"
        if self._owned and self._sqlite and not sqlite_file.in_memory(self.engine.url):
            self.file = SqliteFile(self.engine.url)
        self._create, self._on_loss = create, on_loss
        self.in_use = False
        """Whether a transaction is under way: a finalizer that wants another one has to wait for a later time."""
        self._ready = False
        self._process = os.getpid()

    def setup(self, *, patient: bool = True) -> None:
        """Open, check and migrate, if that is still to be done. A damaged SQLite file is set aside, with a warning.

        Raises:
            StoreUnavailableError: nothing answers now, but may later.
            StoreError: nothing there that can be used, or a schema of a later version, which is left as it is.
        """
        self._leave_parent()
        if self._ready and self.file is not None and not self.file.is_same():
            self._leave_file(self.file)
        if not self._ready:
            self._open(patient)
            self._ready = True
            if self.file is not None:
                self.file.is_same()  # takes note of its log

    def read(self, action: Callable[[Connection], Result], *, patient: bool = True) -> Result:
        """Run `action`, again from the start where another connection is in the way; with `patient` off, once.

        Raises the driver's errors, and those of `setup`.
        """
        self.setup(patient=patient)
        return self._replacing_damage(lambda: self._attempt(action, patient))

    def write(self, action: Callable[[Connection], Result], *, patient: bool = True) -> Result:
        """Like `read`, in a transaction that writes."""
        return self.read(self._writing(action), patient=patient)

    def erase(self) -> bool:
        """Let nothing deleted linger in unused parts of pages, or in a log; False where a connection is in the way.

        What a server does with deleted rows is the server's affair.
        """
        if not self._sqlite:
            return True
        self._autocommit(sqlite_file.vacuum)
        return self._autocommit(sqlite_file.checkpoint)

    def close(self) -> None:
        if self._owned:
            self.engine.dispose()

    def _open(self, patient: bool) -> None:
        if self.file is None:
            self._prepare(self._create, patient)
            return
        try:
            self._open_file(self.file, patient)
        except CorruptFileError as error:
            if not self._may_replace():
                raise
            self._set_aside(str(error))
            self._open_file(self.file, patient)
        except StoreError:
            if not self.file.is_frozen():
                raise
            self.engine = engine_of(self.file.immutable_url())
            self._prepare(create=False, patient=patient)

    def _open_file(self, file: SqliteFile, patient: bool) -> None:
        with file.opening():
            file.prepare(self._create)
            self._prepare(self._create, patient)

    def _prepare(self, create: bool, patient: bool) -> None:
        """Check the database and bring its tables up to date."""
        try:
            version = self._attempt(self._checked_version, patient)
            _check_version(self.name, version, create)
            if self.file is not None:
                self._use_wal()
            if version < len(MIGRATIONS):
                self._attempt(self._writing(migrate), patient)
        except StoreError:
            self.close()
            raise
        except DATABASE_ERRORS as error:
            self.close()
            raise _kind(error)(f"store {self.name} cannot be used: {reason(error)}") from error

    def _leave_file(self, file: SqliteFile) -> None:
        # Open connections keep the log's inode from being given to a new one meanwhile.
        file.drop_log()
        self.close()
        self._ready = False
        warnings.warn(
            f"{self.name} was deleted or replaced while in use; it is opened anew", RuntimeWarning, stacklevel=5
        )
        self._on_loss(True)

    def _replacing_damage(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except DBAPIError as error:
            if _kind(error) is not CorruptFileError or not self._may_replace():
                raise
            self._ready = False
            self._set_aside(f"store {self.name} is damaged: {reason(error)}")
            self._on_loss(False)
        self.setup()
        return action()

    def _may_replace(self) -> bool:
        return self._create and self.file is not None and not self.file.read_only

    def _set_aside(self, what: str) -> None:
        assert self.file is not None
        self.close()
        warnings.warn(
            f"{what}; it is kept as {self.file.set_aside()} and a new one started", RuntimeWarning, stacklevel=5
        )

    def _writing(self, action: Callable[[Connection], Result]) -> Callable[[Connection], Result]:
        def transaction(connection: Connection) -> Result:
            if self._sqlite:
                sqlite_file.begin(connection)
            return action(connection)

        return transaction

    def _attempt(self, action: Callable[[Connection], Result], patient: bool) -> Result:
        for pause in _PAUSES if patient else ():
            try:
                return self._once(action, patient)
            except DBAPIError as error:
                if not self._may_pass(error):
                    raise
            # Writers that collided once would collide again if they all waited equally long.
            time.sleep(pause * random.uniform(0.5, 1.5))
        return self._once(action, patient)

    def _once(self, action: Callable[[Connection], Result], patient: bool) -> Result:
        self.in_use = True
        try:
            with self.engine.begin() as connection:
                if self._sqlite and self._owned:
                    sqlite_file.wait(connection, patient)
                return action(connection)
        finally:
            self.in_use = False

    def _may_pass(self, error: DBAPIError) -> bool:
        """Whether another attempt makes sense: a lock, a lost connection, or a deadlock that another writer won."""
        if isinstance(error.orig, sqlite3.Error):
            return sqlite_file.is_busy(error.orig)
        # A server that let us wait for seconds would do so again.
        return not timed_out(error) and (error.connection_invalidated or isinstance(error, OperationalError))

    def _autocommit(self, action: Callable[[Connection], Result]) -> Result:
        """Run `action` outside of any transaction."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return action(connection)

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
            self._autocommit(sqlite_file.use_wal)
        except DBAPIError:
            pass  # a read-only file, or another process that is doing just this; both work without


def timed_out(error: BaseException) -> bool:
    """Whether a server did not even answer."""
    while error.__cause__ is not None and not isinstance(error, DBAPIError):
        error = error.__cause__
    return type(getattr(error, "orig", error)).__name__ == "ConnectionTimeout"


def reason(error: BaseException) -> str:
    """What went wrong, without the statement and its parameters: they are pieces of what users said."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


def _kind(error: BaseException) -> type[StoreError]:
    """Which of our errors one of the database's is: damage, something that passes, or something that stays."""
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, sqlite3.Error):
        if sqlite_file.is_corrupt(cause):
            return CorruptFileError
        return StoreUnavailableError if sqlite_file.may_pass(cause) else StoreError
    passing = isinstance(error, OperationalError) or getattr(error, "connection_invalidated", False)
    return StoreUnavailableError if passing else StoreError


def _check_version(name: str, version: int, create: bool) -> None:
    known = len(MIGRATIONS)
    if version > known:
        raise StoreError(
            f"store {name} has schema version {version}, but this ouroboros-llm knows versions up to {known}; "
            "upgrade ouroboros-llm or choose another database"
        )
    if not version and not create:
        raise StoreError(
            f"store {name} needs tables of schema version {known}, but has none, and create=False; choose a database "
            "that a store has used, or open it once with create=True"
        )
