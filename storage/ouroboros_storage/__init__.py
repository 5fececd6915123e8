"""Phrases in a SQL database: SQLite where nothing is set up, PostgreSQL where several machines share."""

from .rows import StoredRun, StoredScope
from .store import PhraseStore

__all__ = ["PhraseStore", "StoredRun", "StoredScope"]
