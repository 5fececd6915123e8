"""What SQLite needs that a server does not: a file of the right mode, pragmas, and a way out of corruption."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from sqlalchemy import URL, Connection

from ouroboros_llm.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows, which does not let an open file be renamed anyway
    fcntl = None  # type: ignore[assignment]

BUSY_MILLISECONDS = 1000
"""How long SQLite itself waits for another writer."""

HURRIED_MILLISECONDS = 50
"""The same, where it failed the last time: turns should not wait a second each until it works again."""

_CHECKED_BYTES = 256 << 20
"""Larger files are not read through when they are opened: a second per gigabyte or more would be noticed."""

_LOCK_SECONDS = 2.0

_COMPANIONS = ("", "-wal", "-shm", "-journal")


class CorruptFileError(StoreError):
    """The file is damaged, or no SQLite database at all."""


def in_memory(url: URL) -> bool:
    database = url.database or ":memory:"
    in_uri = url.query.get("mode") == "memory" or "mode=memory" in database
    return database in (":memory:", "file::memory:") or (database.startswith("file:") and in_uri)


class SqliteFile:
    """The file behind a SQLite URL."""

    def __init__(self, url: URL) -> None:
        database = str(url.database)
        uri = database.startswith("file:")
        self.path = Path(unquote(urlsplit(database).path) if uri else database).absolute()
        self.read_only = uri and url.query.get("mode") == "ro" or "mode=ro" in database
        self._identity: tuple[int, int] | None = None
        self._log: tuple[int, int] | None = None

    def check(self, create: bool) -> None:
        """Raise StoreError where there is neither a file nor a place for one. Makes nothing."""
        try:
            if _identify(self.path) is not None:
                return
            if not create or self.read_only:
                raise StoreError(f"store file {self.path} does not exist, and may not be created; correct the path")
            folder = next(parent for parent in self.path.parents if parent.exists())
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def prepare(self, create: bool) -> None:
        """Make the folder and an empty file that only its owner can read, where there is none."""
        self.check(create)
        try:
            if create and not self.read_only:
                self._create()
            self._identity = _identify(self.path)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def set_aside(self) -> Path:
        """Rename the file and its companions to `*.corrupt-<time>` and leave an empty file; returns the new name."""
        try:
            with _locked(self.path.parent, exclusively=True):
                moved = self._free_name()
                # Another process may have found the damage first and put a sound file here.
                if self.is_same():
                    self._exchange(moved)
                return moved
        except OSError as error:
            raise StoreError(f"damaged store file {self.path} cannot be set aside: {error.strerror}") from error

    def opening(self) -> AbstractContextManager[None]:
        """While this lasts, no process exchanges the file: what is opened is the one that was prepared."""
        return _locked(self.path.parent, exclusively=False)

    def is_same(self) -> bool:
        """Whether the file is still the one that was prepared, not deleted, moved or replaced since."""
        log = _identify(self._companion("-wal"))
        same = _identify(self.path) == self._identity
        if same:
            self._log = log
        return same

    def drop_log(self) -> None:
        """After the file was exchanged, while ours is still open: SQLite must not read its log into the new one."""
        log = self._companion("-wal")
        with _locked(self.path.parent, exclusively=True):
            if self._log is not None and _identify(log) == self._log:
                for path in (log, self._companion("-shm")):
                    with suppress(OSError):
                        path.unlink()

    def nbytes(self) -> int:
        """Size of the file and its companions."""
        paths = (self._companion(companion) for companion in _COMPANIONS)
        return sum(path.stat().st_size for path in paths if path.exists())

    def is_frozen(self) -> bool:
        """Whether nothing can be written beside the file, not even what SQLite needs for reading next to a writer."""
        wal = self._companion("-wal")
        return self.path.is_file() and not os.access(self.path.parent, os.W_OK) and not wal.exists()

    def immutable_url(self) -> URL:
        """Reads the file as it lies there, without locks and companions."""
        return URL.create("sqlite", database=f"file:{quote(str(self.path))}", query={"immutable": "1", "uri": "true"})

    def _unusable(self, error: Exception) -> StoreError:
        reason = getattr(error, "strerror", None) or error  # a null byte in a path is a ValueError
        return StoreError(f"store file {str(self.path)!r} cannot be opened or created: {reason}")

    def _create(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            # SQLite gives its companion files the mode of this one.
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))

    def _exchange(self, moved: Path) -> None:
        # There is a file at all times, or another process would have SQLite make one, which everybody could read.
        for companion in _COMPANIONS[1:]:
            with suppress(FileNotFoundError):
                os.replace(self._companion(companion), moved.with_name(moved.name + companion))
        empty = moved.with_name(f"{moved.name}-new")
        os.close(os.open(empty, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
        try:
            os.link(self.path, moved)
        except OSError:  # a file system without links
            os.replace(self.path, moved)
        os.replace(empty, self.path)

    def _free_name(self) -> Path:
        now = datetime.now()
        while (name := self.path.with_name(f"{self.path.name}.corrupt-{now:%Y%m%dT%H%M%S}")).exists():
            now += timedelta(seconds=1)
        return name

    def _companion(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)


@contextmanager
def _locked(folder: Path, *, exclusively: bool) -> Iterator[None]:
    """Share a folder with other processes of ours, or have it alone.

    Who exchanges a file must be alone: a log and its index that somebody opens just then would belong to both files.
    """
    with ExitStack() as cleanup:
        # Where there is no folder yet, or one that may not be listed, or Windows: nobody else is to be expected.
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            cleanup.callback(os.close, descriptor)
            if fcntl is not None:
                _lock(descriptor, fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH)
                # Closing alone would not do: a child that was forked meanwhile has the same lock open.
                cleanup.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
        yield


def _lock(descriptor: int, kind: int) -> None:
    """Wait for a lock, but not for ever: somebody else may have locked the folder for reasons of their own."""
    until = monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() > until:
                return
        sleep(0.005)


def _identify(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def set_pragmas(connection: sqlite3.Connection, _: Any) -> None:
    """For each new connection. None of these writes to the file."""
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")


def check(connection: Connection) -> None:
    """Raise CorruptFileError where SQLite finds damage; a file that is no database at all makes SQLite raise itself."""
    pages, page_bytes = (connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("page_count", "page_size"))
    if (pages or 0) * (page_bytes or 0) > _CHECKED_BYTES:
        return
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise CorruptFileError(f"damaged SQLite file: {found}")


def wait(connection: Connection, patient: bool) -> None:
    """How long this connection waits for others from now on."""
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS if patient else HURRIED_MILLISECONDS}")


def begin(connection: Connection) -> None:
    """Start a transaction that writes: a deferred one may read first and then find the database changed."""
    driver: Any = connection.connection.dbapi_connection
    # Deleted and overwritten rows become zeros, also through an engine that the user configured.
    connection.exec_driver_sql("PRAGMA secure_delete = ON")
    if not driver.in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def use_wal(connection: Connection) -> None:
    """Readers and one writer side by side. The file remembers it."""
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")


def vacuum(connection: Connection) -> None:
    """Write the file anew: pages that were split keep copies of rows in their unused part, where nothing overwrites
    them."""
    connection.exec_driver_sql("VACUUM")


def checkpoint(connection: Connection) -> bool:
    """Copy the write-ahead log into the file and empty it; False where another connection is in the way."""
    return bool(connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0] == 0)


def is_corrupt(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def may_pass(error: sqlite3.Error) -> bool:
    """Whether the file may be usable later: locked, no room on the disk, or a disk that fails."""
    return is_busy(error) or _code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: sqlite3.Error) -> int:
    """The primary part of SQLite's result code; 0 where there is none."""
    return int(getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
