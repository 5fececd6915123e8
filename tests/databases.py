"""Databases for tests of the store, and what they put there and find."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from ouroboros_storage import PhraseStore

POSTGRES = os.environ.get("OUROBOROS_TEST_POSTGRES", "")
needs_postgres = pytest.mark.skipif(not POSTGRES, reason="OUROBOROS_TEST_POSTGRES has no URL: make test-postgres")


def administer(statement: str) -> None:
    """In the database for tests. A connection of its own: tests stop the server."""
    engine = create_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def path_of(url: str) -> Path:
    return Path(str(make_url(url).database))


def remember(url: str, scope: str, *runs: list[int], fingerprint: str = "f") -> None:
    with PhraseStore(url) as store:
        pool = store.open(scope, fingerprint=fingerprint)
        for run in runs:
            pool.add(run)


def recall(url: str, scope: str, tail: list[int], fingerprint: str = "f") -> list[tuple[int, ...]]:
    with PhraseStore(url) as store:
        return [phrase.token_ids for phrase in store.open(scope, fingerprint=fingerprint).match(tail)]
