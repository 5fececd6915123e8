"""Phrases in a SQL database: SQLite where nothing is set up, PostgreSQL where several machines share."""

from .async_store import AsyncPhraseStore
from .records import StoredNote, StoredRun, StoredScope, StoreStats
from .store import PhraseStore

__all__ = ["AsyncPhraseStore", "PhraseStore", "StoreStats", "StoredNote", "StoredRun", "StoredScope"]
