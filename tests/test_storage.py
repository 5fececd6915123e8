"""The phrase store: what it keeps, for whom, and what happens when the database does not cooperate."""

from __future__ import annotations

import os
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from databases import path_of, recall, remember
from sqlalchemy import StaticPool, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import OperationalError

from ouroboros_llm.errors import MissingExtraError, OptionError, StoreError
from ouroboros_llm.phrase_pool.base import ANSWER, Phrase, PoolSource, run_key
from ouroboros_storage import PhraseStore, StoredRun, StoredScope, database, migrations, sqlite_file
from ouroboros_storage.buffer import Buffer
from ouroboros_storage.migrations import MIGRATIONS
from ouroboros_storage.records import ScopeKey, encode
from ouroboros_storage.tables import metadata

HOSTILE = [
    "conversation:42",
    "Conversation:42",
    "conversation:42 ",
    " conversation:42",
    "conversation:4_",
    "conversation:%",
    "%",
    "*",
    "'; DROP TABLE ouroboros_runs; --",
    "../../etc/passwd",
    "C:\\phrases.db",
    "a\\",
    "ünï:☃",
    "u\u0308ni",
    "x" * 255,
]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning that a test does not expect fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def python(code: str, *arguments: str) -> str:
    """What a fresh process prints."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


# What is kept


def test_is_a_pool_source(url: str) -> None:
    with PhraseStore(url) as store:
        assert isinstance(store, PoolSource)


def test_another_store_finds_what_was_flushed(any_url: str) -> None:
    remember(any_url, "conversation:42", [1, 2, 3], [4, 5, 6])
    assert recall(any_url, "conversation:42", [4]) == [(5, 6)]


def test_another_process_finds_what_was_flushed(url: str) -> None:
    code = """
import sys
from ouroboros_storage import PhraseStore
store = PhraseStore(sys.argv[1])
store.open("conversation:42", fingerprint="f").add([11, 12, 13])
store.flush()
import os; os._exit(0)  # nothing is written at exit: what was flushed is there
"""
    python(code, url)
    assert recall(url, "conversation:42", [11]) == [(12, 13)]


def test_nothing_is_written_before_the_flush(url: str) -> None:
    with PhraseStore(url) as store, PhraseStore(url) as other:
        store.open("a", fingerprint="f").add([1, 2, 3])
        assert other.list() == []
        store.flush()
        assert [scope.scope for scope in other.list()] == ["a"]


def test_close_flushes_and_may_be_repeated(url: str) -> None:
    store = PhraseStore(url)
    pool = store.open("a", fingerprint="f")
    pool.add([1, 2, 3])
    store.close()
    store.close()
    store.flush()
    pool.add([4, 5, 6])
    assert pool.match([4]) == [Phrase((5, 6), 1)]
    assert recall(url, "a", [1]) == [(2, 3)]
    for use in (lambda: store.open("a", fingerprint="f"), store.list, lambda: store.delete("a")):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_a_repeated_run_is_a_counter(any_url: str) -> None:
    for _ in range(2):
        remember(any_url, "a", [1, 2, 3], [1, 2, 3], [1, 2, 4])
    with PhraseStore(any_url) as store:
        found = store.open("a", fingerprint="f").match([1, 2])
        assert {phrase.token_ids: phrase.count for phrase in found} == {(3,): 4, (4,): 2}
        assert [(scope.runs, scope.tokens) for scope in store.list()] == [(2, 6)]


def test_opening_reads_the_latest_runs_first(any_url: str) -> None:
    remember(any_url, "a", [1, 10, 10], [1, 20, 20], [1, 30, 30], [1, 40, 40])
    remember(any_url, "a", [1, 20, 20])
    assert recall(any_url, "a", [1]) == [(20, 20), (40, 40), (30, 30), (10, 10)]
    with PhraseStore(any_url, capacity=8) as store:
        assert [phrase.token_ids for phrase in store.open("a", fingerprint="f").match([1])] == [(20, 20), (40, 40)]


def test_an_open_scope_learns_what_others_flushed(any_url: str) -> None:
    with PhraseStore(any_url) as ours, PhraseStore(any_url) as theirs:
        pool = ours.open("a", fingerprint="f")
        pool.add([1, 2, 3])
        ours.flush()
        theirs.open("a", fingerprint="f").add([1, 2, 4])
        theirs.flush()
        assert [phrase.token_ids for phrase in pool.match([1, 2])] == [(3,)]
        assert ours.open("a", fingerprint="f").match([1, 2]) == [Phrase((4,), 2), Phrase((3,), 2)]
        theirs.open("a", fingerprint="f").add([1, 2, 5])
        theirs.flush()
        # Nothing is read, and so counted, twice.
        for _ in range(2):
            found = ours.open("a", fingerprint="f").match([1, 2])
            assert found == [Phrase((5,), 2), Phrase((4,), 2), Phrase((3,), 2)]


def test_sessions_of_one_scope_share_a_pool(url: str) -> None:
    with PhraseStore(url) as store:
        first = store.open("a", fingerprint="f")
        second = store.open("a", fingerprint="f")
        first.add([1, 2, 3])
        assert second.match([1]) == [Phrase((2, 3), 1)]


def test_what_waits_for_a_flush_is_there_when_its_pool_is_opened_again(url: str) -> None:
    remember(url, "a", [1, 2, 3])
    with PhraseStore(url, capacity=10) as store:
        store.open("a", fingerprint="f").add([1, 2, 4])
        store.open("b", fingerprint="f").add(
            list(range(100, 110))
        )  # as much as is kept: nobody holds the pool of a now
        assert store.open("a", fingerprint="f").match([1, 2]) == [Phrase((4,), 2), Phrase((3,), 2)]


def test_in_memory_databases_are_seen_by_all_threads() -> None:
    with PhraseStore("sqlite://") as store:

        def turn(number: int) -> None:
            store.open("a", fingerprint="f").add([1, number, number])
            store.flush()

        threads = [threading.Thread(target=turn, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(run.token_ids for run in store.export("a")) == [(1, number, number) for number in range(8)]


def test_adding_and_matching_never_touch_the_database(url: str) -> None:
    with PhraseStore(url) as store:
        pool, done = store.open("a", fingerprint="f"), threading.Event()

        def round() -> None:
            pool.add([1, 2, 3])
            if pool.match([1]):
                done.set()

        with store._lock:  # held for as long as anybody uses the database
            thread = threading.Thread(target=round)
            thread.start()
            thread.join(timeout=30)
            assert done.is_set()


@pytest.mark.parametrize("wrong", [[1, -1], [1, 2**32], [1, 2.5], [1, None]])
def test_token_ids_are_checked(url: str, wrong: list[int]) -> None:
    with PhraseStore(url) as store:
        with pytest.raises(OptionError, match="token_ids must be whole numbers from 0 to 4294967295"):
            store.open("a", fingerprint="f").add(wrong)
        assert store.open("a", fingerprint="f").stats.runs == 0


def test_the_buffer_is_bounded() -> None:
    buffer, key = Buffer(capacity=4000), ScopeKey("a", "f")
    for number in range(100):
        buffer.add(key, encode([number] * 10))
    kept = list(buffer.take()[key])
    assert kept == [encode([number] * 10) for number in range(100 - len(kept), 100)]
    assert 10 < len(kept) < 20
    buffer.put_back({key: {}})
    assert buffer.take() == {}


# Whose it is


def test_scopes_are_isolated_whatever_their_names(any_url: str) -> None:
    with PhraseStore(any_url) as store:
        for number, scope in enumerate(HOSTILE):
            store.open(scope, fingerprint="f").add([1, 100 + number])
    for number, scope in enumerate(HOSTILE):
        assert recall(any_url, scope, [1]) == [(100 + number,)]
    with PhraseStore(any_url) as store:
        assert sorted(scope.scope for scope in store.list()) == sorted(HOSTILE)
        for scope in ("conversation:%", "%", "*", "a\\", "conversation:4_"):
            assert store.delete(scope) == 1
            assert list(store.export(scope)) == []
        assert len(store.list()) == len(HOSTILE) - 5


@pytest.mark.parametrize("scope", ["", "x" * 256, "a\nb", "a\0b", "\ud800", None, 42, b"a"])
def test_names_are_checked(url: str, scope: str) -> None:
    with PhraseStore(url) as store:
        for use in (
            lambda: store.open(scope, fingerprint="f"),
            lambda: store.delete(scope),
            lambda: store.export(scope),
        ):
            with pytest.raises(OptionError, match="scope must be 1 to 255 printable characters.*but got"):
                use()
        with pytest.raises(OptionError, match="fingerprint must be"):
            store.open("a", fingerprint="")


def test_a_pool_of_another_tokenizer_is_not_read(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3], fingerprint="one")
    remember(any_url, "a", [1, 7, 8, 9], fingerprint="two")
    assert recall(any_url, "a", [1], fingerprint="one") == [(2, 3)]
    assert recall(any_url, "a", [1], fingerprint="two") == [(7, 8, 9)]
    assert recall(any_url, "a", [1], fingerprint="One") == []
    with PhraseStore(any_url) as store:
        assert [(scope.fingerprint, scope.tokens) for scope in store.list()] == [("one", 3), ("two", 4)]


@pytest.mark.parametrize("run", [[], [5]])
def test_a_scope_exists_from_its_first_flush_however_short_the_turn(url: str, run: list[int]) -> None:
    with PhraseStore(url) as store:
        store.open("only-read", fingerprint="f").match([1])
        store.open("spoken", fingerprint="f").add(run)
        assert store.list() == []
        store.flush()
        assert [(scope.scope, scope.runs, scope.tokens) for scope in store.list()] == [("spoken", 0, 0)]


def test_rows_say_when(any_url: str) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    remember(any_url, "a", [1, 2, 3])
    remember(any_url, "a", [1, 2, 3])
    with PhraseStore(any_url) as store:
        (scope,), (run,) = store.list(), store.export("a")
    assert scope == StoredScope("a", "f", 1, 3, scope.created, scope.last_used)
    assert run == StoredRun("a", "f", (1, 2, 3), 2, run.created, run.last_used)
    assert before < scope.created < scope.last_used < datetime.now(UTC) + timedelta(seconds=1)
    assert (run.created, run.last_used) == (scope.created, scope.last_used)


def test_export_holds_everything_in_the_order_it_was_written(any_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_storage.rows._BATCH", 7)
    runs = [[1, number, 2] for number in range(30)]
    remember(any_url, "b", [9, 9])
    for run in runs[:20]:
        remember(any_url, "a", run)
    with PhraseStore(any_url) as store:
        pool = store.open("a", fingerprint="g")
        for run in runs[20:]:
            pool.add(run)
        exported = list(store.export("a"))
    assert [list(run.token_ids) for run in exported[:20]] == runs[:20]
    assert sorted(list(run.token_ids) for run in exported[20:]) == runs[20:]
    assert {run.fingerprint for run in exported[20:]} == {"g"}


# Deleting


def test_delete_forgets_rows_buffer_and_open_pools(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    remember(any_url, "a", [1, 2, 3], fingerprint="g")
    remember(any_url, "b", [1, 2, 3])
    with PhraseStore(any_url) as store:
        pool, kept = store.open("a", fingerprint="f"), store.open("b", fingerprint="f")
        pool.add([4, 5, 6])
        assert store.delete("a") == 2
        assert pool.match([1]) == pool.match([4]) == []
        assert kept.match([1])
        store.flush()
        assert [scope.scope for scope in store.list()] == ["b"]
        assert store.delete("a") == 0
        pool.add([7, 8, 9])
        store.flush()
        assert [run.token_ids for run in store.export("a")] == [(7, 8, 9)]
        assert store.open("a", fingerprint="f").match([7]) == [Phrase((8, 9), 1)]


def test_a_scope_deleted_elsewhere_is_forgotten_when_it_is_opened_again(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    with PhraseStore(any_url) as ours, PhraseStore(any_url) as theirs:
        pool = ours.open("a", fingerprint="f")
        pool.add([4, 5, 6])
        ours.flush()
        theirs.delete("a")
        theirs.open("a", fingerprint="f").add([50, 51, 52])
        theirs.flush()
        pool.add([7, 8, 9])
        assert ours.open("a", fingerprint="f") is pool
        assert pool.match([1]) == pool.match([4]) == []
        assert pool.match([7]) == [Phrase((8, 9), 1)]
        assert pool.match([50, 51]) == [Phrase((52,), 2)]
        ours.flush()
        assert [run.token_ids for run in theirs.export("a")] == [(50, 51, 52), (7, 8, 9)]


@pytest.mark.parametrize("how", ["delete", "take_out"])
def test_what_is_deleted_elsewhere_after_the_first_flush_is_forgotten(any_url: str, how: str) -> None:
    run = list(range(20))
    with PhraseStore(any_url) as first, PhraseStore(any_url) as second:
        pool = first.open("corpus:x", fingerprint="f")  # before there is anything to read
        pool.add(run, answer=False)
        pool.remember({"document/1": b"{}"})
        first.flush()
        if how == "delete":
            second.delete("corpus:x")
        else:
            second.take_out("corpus:x", fingerprint="f", runs=[run_key(run)], notes=["document/1"])
        pool = first.open("corpus:x", fingerprint="f")
        assert pool.match(run[:5]) == [] and pool.recall("") == {}


def test_a_scope_deleted_elsewhere_is_forgotten_when_it_is_flushed(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    with PhraseStore(any_url) as ours, PhraseStore(any_url) as theirs:
        pool = ours.open("a", fingerprint="f")
        theirs.delete("a")
        pool.add([7, 8, 9])
        ours.flush()
        assert pool.match([1]) == []
        assert ours.open("a", fingerprint="f").match([7]) == [Phrase((8, 9), 1)]


@pytest.mark.parametrize("own_engine", [False, True])
def test_deleted_tokens_are_in_no_byte_of_the_file(url: str, own_engine: bool) -> None:
    scope, secret = "conversation:secret", [0x5EC2E700 + number for number in range(40)]
    remember(url, "other", [1, 2, 3], list(range(5000)))
    engine = create_engine(url)
    # Some builds of SQLite zero what is deleted by default.
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA secure_delete = OFF"))
    with PhraseStore(engine if own_engine else url) as store:
        pool = store.open(scope, fingerprint="f")
        for length in (2, 5, 40):
            pool.add(secret[:length])
            store.flush()
        pool.add(secret * 50)  # over several pages
        pool.add(secret[:40])  # a row written twice
        store.flush()
        needles = [struct.pack("<2I", *pair) for pair in zip(secret, secret[1:], strict=False)] + [scope.encode()]
        files = [path for path in path_of(url).parent.iterdir() if path.is_file()]
        assert all(any(needle in path.read_bytes() for path in files) for needle in needles)
        store.delete(scope)
        left = b"".join(path.read_bytes() for path in path_of(url).parent.iterdir())
        assert not any(needle in left for needle in needles)
    assert recall(url, "other", [1, 2]) == [tuple(range(3, 67)), (3,)]


def test_delete_says_when_another_connection_keeps_the_old_bytes(url: str, impatient: None) -> None:
    remember(url, "a", [1, 2, 3])
    with PhraseStore(url) as store:
        store.open("a", fingerprint="f").add([4, 5, 6])
        store.flush()
        reader = sqlite3.connect(path_of(url), isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM ouroboros_runs").fetchall()
        with pytest.warns(RuntimeWarning, match="its pages or its write-ahead log keep old bytes"):
            store.delete("a")
        reader.close()
        assert store.list() == []


# Files


def test_the_file_and_its_folders_are_made_for_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "phrases.db"
    with PhraseStore(f"sqlite:///{path}") as store:
        store.open("a", fingerprint="f").add([1, 2, 3])
        store.flush()
        names = {entry.name for entry in path.parent.iterdir()}
        assert names == {"phrases.db", "phrases.db-wal", "phrases.db-shm"}
        assert {stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()} == {0o600}


def test_pragmas(url: str) -> None:
    with PhraseStore(url) as store:
        store.setup()
        connection = store._database.engine.connect()
        names = ("journal_mode", "synchronous", "foreign_keys", "secure_delete", "busy_timeout")
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
        connection.close()
    assert found == ["wal", 1, 1, 1, sqlite_file.BUSY_MILLISECONDS]


@pytest.mark.parametrize("damage", ["text", "header", "truncated", "page"])
def test_a_corrupt_file_is_set_aside_and_a_new_one_started(url: str, damage: str) -> None:
    remember(url, "a", *([1, number, *range(200)] for number in range(200)))
    path = path_of(url)
    data = bytearray(path.read_bytes())
    if damage == "text":
        data[:] = b"these are no phrases at all\n" * 100
    elif damage == "header":
        data[:100] = b"\0" * 100
    elif damage == "truncated":
        del data[len(data) // 2 :]
    else:
        middle = len(data) // 2 // 4096 * 4096
        data[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match=r"phrases\.db\.corrupt-\d{8}T\d{6} and a new one started") as caught:
        store = PhraseStore(url)
    with store:
        assert len(caught) == 1
        assert store.list() == []
        store.open("a", fingerprint="f").add([1, 2, 3])
    (aside,) = path.parent.glob("*.corrupt-????????T??????")
    assert aside.read_bytes() == data
    assert recall(url, "a", [1]) == [(2, 3)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_corrupt_file_stays_where_nothing_may_be_created(url: str) -> None:
    path_of(url).write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        PhraseStore(url, create=False)
    assert [entry.name for entry in path_of(url).parent.iterdir()] == ["phrases.db"]


def test_a_read_only_file_can_be_read(url: str) -> None:
    remember(url, "a", [1, 2, 3])
    before = path_of(url).read_bytes()
    with PhraseStore(f"sqlite:///file:{path_of(url)}?mode=ro&uri=true") as store:
        pool = store.open("a", fingerprint="f")
        assert pool.match([1]) == [Phrase((2, 3), 1)]
        pool.add([4, 5, 6])
        with pytest.warns(RuntimeWarning, match="cannot be written.*readonly.*generation goes on") as caught:
            store.flush()
        store.flush()
        assert len(caught) == 1
        assert pool.match([4]) == [Phrase((5, 6), 1)]
        with pytest.raises(StoreError, match="readonly"):
            store.delete("a")
    assert path_of(url).read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
@pytest.mark.parametrize("folder_mode", [0o700, 0o500])
def test_a_file_without_write_permission_can_be_read(url: str, folder_mode: int) -> None:
    remember(url, "a", [1, 2, 3])
    path_of(url).chmod(0o400)
    path_of(url).parent.chmod(folder_mode)
    try:
        with PhraseStore(url) as store:
            store.open("a", fingerprint="f").add([4, 5, 6])
            assert store.open("a", fingerprint="f").match([1]) == [Phrase((2, 3), 1)]
            with pytest.warns(RuntimeWarning, match="cannot be written"):
                store.flush()
    finally:
        path_of(url).parent.chmod(0o700)


def test_create_off_makes_nothing(url: str) -> None:
    with pytest.raises(StoreError, match="does not exist, and may not be created"):
        PhraseStore(url, create=False)
    assert not path_of(url).exists()
    sqlite3.connect(path_of(url)).close()
    path_of(url).touch()
    with pytest.raises(StoreError, match="needs tables.*create=False"):
        PhraseStore(url, create=False)
    remember(url, "a", [1, 2, 3])
    with PhraseStore(url, create=False) as store:
        assert store.open("a", fingerprint="f").match([1]) == [Phrase((2, 3), 1)]


# Schemas, URLs, engines


def test_migrations_make_the_tables_that_statements_use(any_url: str) -> None:
    with PhraseStore(any_url) as store:
        store.setup()
    engine = create_engine(any_url)
    found = inspect(engine)
    for table in metadata.tables.values():
        assert [column["name"] for column in found.get_columns(table.name)] == [column.name for column in table.columns]
        unique = {tuple(constraint["column_names"]) for constraint in found.get_unique_constraints(table.name)}
        assert unique == {tuple(c.columns.keys()) for c in table.constraints if type(c).__name__ == "UniqueConstraint"}
        assert {index.name for index in table.indexes} <= {index["name"] for index in found.get_indexes(table.name)}
    engine.dispose()


def test_a_migration_that_fails_leaves_nothing(any_url: str) -> None:
    broken = (*MIGRATIONS[0], "CREATE NONSENSE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", (broken,))
        with pytest.raises(StoreError, match="syntax error"):
            PhraseStore(any_url).setup()
    remember(any_url, "a", [1, 2, 3])
    assert recall(any_url, "a", [1]) == [(2, 3)]


def test_a_schema_of_a_later_version_is_left_alone(url: str) -> None:
    later = len(MIGRATIONS) + 1
    connection = sqlite3.connect(path_of(url))
    connection.execute("CREATE TABLE ouroboros_migrations (version INTEGER PRIMARY KEY)")
    connection.execute("INSERT INTO ouroboros_migrations VALUES (?)", (later,))
    connection.commit()
    connection.close()
    before = path_of(url).read_bytes()
    with pytest.raises(StoreError, match=f"schema version {later}.*upgrade ouroboros-llm"):
        PhraseStore(url)
    assert path_of(url).read_bytes() == before
    assert [entry.name for entry in path_of(url).parent.iterdir()] == ["phrases.db"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("phrases.db", r"must be a database URL, but got 'phrases.db'; .* 'sqlite:///phrases.db'"),
        ("/var/lib/phrases.db", "'sqlite:////var/lib/phrases.db'"),
        ("://", "must be a database URL"),
        ("oracle://user:password@host/name", "sqlite or postgresql"),
        ("sqlite+aiosqlite:///phrases.db", "aiosqlite|synchronous"),
        ("sqlite://host/phrases.db", "Invalid SQLite URL"),
        ("sqlite:////dev/null/phrases.db", "cannot be opened or created"),
        (Path("phrases.db"), "URL or a SQLAlchemy engine, but got .*Path"),
        (None, "but got NoneType"),
    ],
)
def test_an_unusable_url_is_a_clear_error(
    wrong: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=said) as caught:
        PhraseStore(wrong)
    assert "password" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open database file"):
        PhraseStore(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("name", ["postgresql", "postgresql+psycopg"])
def test_postgres_without_its_driver_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r'pip install "ouroboros-llm\[postgres\]"'):
        PhraseStore(f"{name}://user@localhost/phrases")


def test_capacity_is_checked(url: str) -> None:
    with pytest.raises(OptionError, match="capacity must be a whole number of at least 1, but got 0"):
        PhraseStore(url, capacity=0)


def test_an_engine_of_the_user_outlives_the_store(url: str) -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    for _ in range(2):
        with PhraseStore(engine) as store:
            store.open("a", fingerprint="f").add([1, 2, 3])
    with engine.connect() as connection:  # an in-memory database is gone with its only connection
        assert connection.execute(text("SELECT count FROM ouroboros_runs")).scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 0
    engine.dispose()


def test_a_url_object_is_a_url(url: str) -> None:
    with PhraseStore(make_url(url)) as store:
        assert repr(store) == f"PhraseStore({url!r})"


# Others at the same database


def test_a_locked_database_delays_but_loses_nothing(url: str, impatient: None) -> None:
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        lock = sqlite3.connect(path_of(url), isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        with pytest.warns(RuntimeWarning, match="cannot be written: database is locked; generation goes on") as caught:
            for number in range(3):
                pool.add([1, 2, number])
                store.flush()
        assert len(caught) == 1
        assert len(pool.match([1, 2])) == 3
        pool.add([1, 2, 0])
        lock.execute("ROLLBACK")
        lock.close()
        store.flush()
        counts = {run.token_ids: run.count for run in store.export("a")}
        assert counts == {(1, 2, 0): 2, (1, 2, 1): 1, (1, 2, 2): 1}


@pytest.mark.parametrize("waits", ["sqlite", "store"])
def test_a_lock_that_goes_in_time_is_not_noticed(url: str, waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_MILLISECONDS", 10_000 if waits == "sqlite" else 0)
    monkeypatch.setattr(database, "_PAUSES", () if waits == "sqlite" else (0.05,) * 200)
    with PhraseStore(url) as store:
        store.open("a", fingerprint="f").add([1, 2, 3])
        lock = sqlite3.connect(path_of(url), isolation_level=None, check_same_thread=False)
        lock.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.1, lock.close)
        timer.start()
        store.flush()
        timer.join()
        assert len(store.list()) == 1


def test_a_locked_database_can_be_closed(url: str, impatient: None) -> None:
    store = PhraseStore(url)
    store.open("a", fingerprint="f").add([1, 2, 3])
    lock = sqlite3.connect(path_of(url), isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        store.close()
    lock.close()


def test_a_database_that_goes_away_leaves_memory(url: str) -> None:
    remember(url, "a", [1, 2, 3])
    store = PhraseStore(url)
    pool = store.open("a", fingerprint="f")
    with sqlite3.connect(path_of(url)) as connection:
        for table in ("ouroboros_runs", "ouroboros_scopes"):
            connection.execute(f"DROP TABLE {table}")
    connection.close()
    with pytest.warns(RuntimeWarning, match="cannot be read: no such table.*generation goes on") as caught:
        for _ in range(2):
            assert store.open("a", fingerprint="f") is pool
            fresh = store.open("b", fingerprint="f")
            fresh.add([4, 5, 6])
            store.flush()
        assert pool.match([1]) == [Phrase((2, 3), 1)]
        assert fresh.match([4]) == [Phrase((5, 6), 1, count=2)]
        store.close()
    assert len(caught) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by forking, to import only once")
def test_four_processes_lose_nothing(any_url: str) -> None:
    code = """
import os, sys, warnings
from ouroboros_storage import PhraseStore

def turns(store, number):
    with store:
        for turn in range(25):
            pool = store.open("a", fingerprint="f")
            pool.add([1, 2, 3])
            pool.add([number, 1000 + turn, 7])
            store.flush()

def child(number, inherited):
    status = 1
    try:
        warnings.simplefilter("error")
        turns(inherited or PhraseStore(sys.argv[1]), number)
        status = 0
    finally:
        os._exit(status)

for inherited in (None, "from the parent"):
    inherited = inherited and PhraseStore(sys.argv[1])
    children = [os.fork() or child(number, inherited) for number in range(4)]
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""
    assert python(code, any_url) == "0 0 0 0\n" * 2
    with PhraseStore(any_url) as store:
        counts = {run.token_ids: run.count for run in store.export("a")}
        assert counts == {(1, 2, 3): 200} | {(n, 1000 + turn, 7): 2 for n in range(4) for turn in range(25)}
        assert [(scope.runs, scope.tokens) for scope in store.list()] == [(101, 303)]


# Notes, and where answers begin


def test_notes_and_answers_are_durable(any_url: str) -> None:
    with PhraseStore(any_url) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 2, 3])
        pool.add([1, 7, 8], answer=False)
        pool.remember({"m/calibration": b"old", "m/successors/5": b"12345678"})
        store.flush()
        pool.remember({"m/calibration": b"new"})
        assert store.open("b", fingerprint="f").recall("") == {}
    with PhraseStore(any_url) as store:
        pool = store.open("a", fingerprint="f")
        assert pool.recall("m/") == {"m/calibration": b"new", "m/successors/5": b"12345678"}
        assert [phrase.token_ids for phrase in pool.match([ANSWER])] == [(1, 2, 3)]
        assert {run.token_ids: run.answer for run in store.export("a")} == {(1, 2, 3): True, (1, 7, 8): False}
        pool.add([1, 7, 8])
    with PhraseStore(any_url) as store:
        assert len(store.open("a", fingerprint="f").match([ANSWER])) == 2
        assert store.delete("a") == 2
        assert store.open("a", fingerprint="f").recall("") == {}
    with PhraseStore(any_url) as store:
        assert store.open("a", fingerprint="f").recall("") == {}


def test_deleted_notes_are_in_no_byte_of_the_file(url: str) -> None:
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        for secret in (b"a secret note of the first flush", b"a secret note of the second one"):
            pool.remember({"m/calibration": secret})
            store.flush()
        files = [path for path in path_of(url).parent.iterdir() if path.is_file()]
        assert any(b"secret" in path.read_bytes() for path in files)
        store.delete("a")
        assert not any(b"secret" in path.read_bytes() for path in path_of(url).parent.iterdir() if path.is_file())


def test_notes_wait_for_a_database_that_comes_back(url: str, impatient: None) -> None:
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 2, 3])
        store.flush()
        blocker = sqlite3.connect(path_of(url), isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        pool.remember({"m/1": b"x", "m/2": b"x"})
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            store.flush()
        pool.remember({"m/2": b"y"})
        blocker.execute("ROLLBACK")
        blocker.close()
        store.flush()
    with PhraseStore(url) as store:
        assert store.open("a", fingerprint="f").recall("") == {"m/1": b"x", "m/2": b"y"}


def test_notes_without_a_run_beside_them_are_kept(url: str) -> None:
    """As when another thread's flush takes the run between the two."""
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        pool.remember({"m/1": b"x"})
        store._writer.runs.take()
        store.flush()
    with PhraseStore(url) as store:
        assert store.open("a", fingerprint="f").recall("m/") == {"m/1": b"x"}


def test_notes_that_could_not_be_read_come_with_the_next_opening(
    url: str, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    with PhraseStore(url) as store:
        store.open("a", fingerprint="f").remember({"m/1": b"x", "m/2": b"x"})
    with PhraseStore(url) as store:
        with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="cannot be read"):
            patch.setattr("ouroboros_storage.rows.read_notes", broken)
            pool = store.open("a", fingerprint="f")
        assert pool.recall("") == {}
        pool.remember({"m/2": b"newer"})
        assert store.open("a", fingerprint="f") is pool
        assert pool.recall("") == {"m/1": b"x", "m/2": b"newer"}


def broken(connection: object, key: object) -> dict[str, bytes]:
    raise OperationalError("SELECT", {}, Exception("disk I/O error"))


def test_a_database_of_the_first_version_is_brought_up_to_date(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE ouroboros_migrations (version INTEGER PRIMARY KEY)"))
        for statement in migrations.MIGRATIONS[0]:
            connection.exec_driver_sql(statement.format(**migrations._TYPES["sqlite"]))
        connection.execute(text("INSERT INTO ouroboros_migrations VALUES (1)"))
        connection.execute(text("INSERT INTO ouroboros_scopes VALUES (1, 'a', 'f', 1, 1)"))
        row = {"data": struct.pack("<3I", 1, 2, 3), "hash": b"h"}
        connection.execute(text("INSERT INTO ouroboros_runs VALUES (1, 1, :hash, :data, 3, 2, 1, 1)"), row)
    engine.dispose()
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        assert pool.match([ANSWER])[0].token_ids == (1, 2, 3) and pool.match([1])[0].count == 2
        pool.remember({"m/1": b"x"})
    with PhraseStore(url) as store:
        assert store.open("a", fingerprint="f").recall("m/") == {"m/1": b"x"}
