"""From a URL to an engine with the settings of its backend."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from ouroboros_llm.errors import MissingExtraError, StoreError

from . import sqlite_file
from .migrations import BACKENDS

_CONNECT_SECONDS = 5
"""How long a server may take to answer, unless the URL says otherwise."""


def engine_of(url_or_engine: object) -> Engine:
    """The engine itself, or a new one for a URL. Connects to nothing yet.

    Raises:
        StoreError: not a URL or an engine, or no backend of ours. MissingExtraError: PostgreSQL without its driver.
    """
    if isinstance(url_or_engine, Engine):
        _check_backend(url_or_engine.url, url_or_engine.dialect.is_async)
        return url_or_engine
    return _engine(_parse(url_or_engine))


def shown(url: URL) -> str:
    """A URL as it may be printed: PostgreSQL takes passwords in the query, too."""
    secret = {name: "hidden" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(secret).render_as_string(hide_password=True)


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
    _check_backend(url)
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(url, hide_parameters=True, **_engine_options(url))
    except (ArgumentError, NoSuchModuleError) as error:
        raise StoreError(f"store {shown(url)} cannot be used: {error}") from error
    except ImportError as error:
        if url.get_driver_name() == "psycopg":
            raise MissingExtraError("psycopg", "postgres") from error
        raise StoreError(f"store {shown(url)} needs a driver that is not installed: {error}") from error
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
