"""Databases that earlier versions made, opened with the code of the day.

`scripts/keep_schema.py` made them, with the code of their time.
"""

from __future__ import annotations

import importlib.util
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from databases import needs_postgres
from sqlalchemy import create_engine, inspect, make_url

from ouroboros_storage import PhraseStore
from ouroboros_storage.migrations import MIGRATIONS

KEPT = Path(__file__).parent / "schemas"
EARLIER = range(1, len(MIGRATIONS))
LONG = tuple(range(100, 400))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


keep_schema = load(Path(__file__).parents[1] / "scripts" / "keep_schema.py")


def after(seconds: int) -> datetime:
    return datetime.fromtimestamp(keep_schema.EPOCH, UTC) + timedelta(seconds=seconds)


def expected_runs(version: int) -> list[tuple[object, ...]]:
    """Scope, fingerprint, token ids, count, created, last used, answer."""
    runs: list[tuple[object, ...]] = [
        ("agent:ünï ' %", "f", (0, 2**31, 2**32 - 1), 1, after(5), after(5), True),
        ("agent:ünï ' %", "f", LONG, 1, after(6), after(6), True),
        ("conversation:42", "f", (1, 2, 3), 2, after(1), after(3), True),
        ("conversation:42", "f", (4, 5, 6, 7), 1, after(2), after(2), True),
        ("conversation:42", "g", (1, 2, 3), 1, after(4), after(4), True),
    ]
    if version >= 2:
        runs.insert(4, ("conversation:42", "f", (7, 8, 9), 1, after(8), after(8), False))
    return runs


def expected_scopes(version: int) -> list[tuple[object, ...]]:
    """Scope, fingerprint, runs, tokens, created, last used."""
    last = (3, 10, after(9)) if version >= 2 else (2, 7, after(3))
    return [
        ("agent:silent", "f", 0, 0, after(7), after(7)),
        ("agent:ünï ' %", "f", 2, 303, after(5), after(6)),
        ("conversation:42", "f", *last[:2], after(1), last[2]),
        ("conversation:42", "g", 1, 3, after(4), after(4)),
    ]


def check(url: str, version: int) -> None:
    """Everything that is in the kept database is there, and it can be added to."""
    with PhraseStore(url) as store:
        scopes = [(s.scope, s.fingerprint, s.runs, s.tokens, s.created, s.last_used) for s in store.list()]
        assert sorted(scopes) == expected_scopes(version)
        runs = [run for scope in dict.fromkeys(row[0] for row in scopes) for run in store.export(scope)]
        rows = [(r.scope, r.fingerprint, r.token_ids, r.count, r.created, r.last_used, r.answer) for r in runs]
        assert sorted(rows) == expected_runs(version)
        found = {note.name: (note.data, note.last_used) for note in store.export_notes("conversation:42")}
        wanted = keep_schema.NOTES if version >= 2 else {}
        assert found == {name: (data, after(10)) for name, data in wanted.items()}
        pool = store.open("conversation:42", fingerprint="f")
        assert (pool.match([4])[0].token_ids, pool.match([1])[0].count) == ((5, 6, 7), 2)
        assert pool.recall("") == wanted
        pool.add([1, 2, 3])
        pool.remember({"m/new": b"x"})
    with PhraseStore(url) as store:
        assert list(store.check()) == []
        assert {run.token_ids: run.count for run in store.export("conversation:42") if run.fingerprint == "f"}[
            (1, 2, 3)
        ] == 3
        assert store.open("conversation:42", fingerprint="f").recall("m/new") == {"m/new": b"x"}


def schema(url: str) -> dict[str, object]:
    """Tables, columns and indexes, by name."""
    engine = create_engine(url)
    found = inspect(engine)
    tables: dict[str, object] = {}
    for table in found.get_table_names():
        columns = [(column["name"], str(column["type"]), column["nullable"]) for column in found.get_columns(table)]
        indexes = [(index["name"], index["column_names"]) for index in found.get_indexes(table)]
        tables[table] = (columns, sorted(indexes), found.get_pk_constraint(table)["constrained_columns"])
    engine.dispose()
    return tables


@pytest.mark.parametrize("version", EARLIER)
def test_a_file_of_an_earlier_version_is_brought_up_to_date(version: int, url: str, tmp_path: Path) -> None:
    shutil.copy(KEPT / f"version-{version}.db", str(make_url(url).database))
    check(url, version)
    with PhraseStore(f"sqlite:///{tmp_path}/new.db") as store:
        store.setup()
    assert schema(url) == schema(f"sqlite:///{tmp_path}/new.db")


@needs_postgres
@pytest.mark.parametrize("version", EARLIER)
def test_an_earlier_version_on_postgres_is_brought_up_to_date(version: int, postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        # Past SQLAlchemy, which would take a percent sign for a parameter.
        driver: Any = connection.connection.driver_connection
        driver.execute((KEPT / f"version-{version}.sql").read_text())
    engine.dispose()
    check(postgres_url, version)


@pytest.mark.parametrize("version", EARLIER)
@pytest.mark.parametrize("kind", ["db", "sql"])
def test_every_earlier_version_is_kept(version: int, kind: str) -> None:
    path = KEPT / f"version-{version}.{kind}"
    assert path.is_file(), (
        f"{path.name} is missing: a migration was appended, and nothing shows that databases of version {version} "
        "still open. Make it with the code before that: scripts/keep_schema.py says how"
    )
