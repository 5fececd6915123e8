"""Phrases in a SQL database: SQLite where nothing is set up, PostgreSQL where several machines share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_store import AsyncPhraseStore
    from .records import StoredNote, StoredRun, StoredScope, StoreStats
    from .store import PhraseStore

__all__ = ["AsyncPhraseStore", "PhraseStore", "StoreStats", "StoredNote", "StoredRun", "StoredScope"]

# Imported on first use, so that `ouroboros --help`, which lists our commands, does not wait for sqlalchemy.
_MODULES = {
    "AsyncPhraseStore": "async_store",
    "PhraseStore": "store",
    "StoreStats": "records",
    "StoredNote": "records",
    "StoredRun": "records",
    "StoredScope": "records",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
