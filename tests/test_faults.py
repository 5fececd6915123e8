"""What the phrase store survives: each of these tests really does it. `make test-faults` runs them."""

from __future__ import annotations

import itertools
import os
import random
import shlex
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from conftest import byte_tokenizer, plain, tiny_model
from databases import path_of, remember
from processes import Process, Report, together
from sqlalchemy import Connection, create_engine, event, make_url, text

from ouroboros_llm import DecodingOptions, Ouroboros, StoreError
from ouroboros_storage import PhraseStore, sqlite_file
from ouroboros_storage.migrations import MIGRATIONS

resource = pytest.importorskip("resource", reason="these tests fork, and bound what a process may write")
pytestmark = pytest.mark.faults
CONTROL = shlex.split(os.environ.get("OUROBOROS_TEST_POSTGRES_CTL", ""))
Turn = tuple[int, int]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning that a test does not expect fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def server() -> Iterator[Callable[[str], None]]:
    """Stops and starts PostgreSQL; it runs again afterwards."""

    yield lambda action: subprocess.run([*CONTROL, action], check=True) and None
    subprocess.run([*CONTROL, "start"], capture_output=True)


def counts(url: str, scope: str = "a") -> dict[tuple[int, ...], int]:
    """The runs of a scope in a database that is whole, and how often each was added."""
    if make_url(url).get_backend_name() == "sqlite":
        with closing(sqlite3.connect(path_of(url))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with PhraseStore(url) as store:
        assert list(store.check()) == []
        return {run.token_ids: run.count for run in store.export(scope)}


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What users are told meanwhile."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Python hides it too: psycopg says it of cursors whose server went away.
        warnings.simplefilter("ignore", ResourceWarning)
        yield messages
        messages += [str(warning.message) for warning in caught]


# kill -9

SCOPES = ("a", "b", "c")
NOTES = [f"n/{number}" for number in range(40)]


def speak(url: str, number: int, report: Report) -> None:
    """Turn after turn in several scopes, each flushed, until somebody puts an end to it."""
    store = PhraseStore(url)
    pools = [store.open(scope, fingerprint="f") for scope in SCOPES]
    report("ready")
    for turn in itertools.count():
        for place, pool in enumerate(pools):
            pool.add([number, turn, place, *range(100, 250)])
            pool.add([1, 2, 3])
            pool.remember(dict.fromkeys(NOTES, struct.pack("<2I", number, turn)))
        report(f"begin {turn}")
        store.flush()
        report(f"end {turn}")


def killed(url: str, number: int) -> tuple[list[Turn], bool]:
    """The turns that a process killed at some moment said were flushed, and whether it was flushing just then."""
    with Process(partial(speak, url, number)) as process:
        assert process.line() == "ready"
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        lines = process.rest()
        assert process.wait() == -signal.SIGKILL
    flushed = [(number, int(line.split()[1])) for line in lines if line.startswith("end")]
    return flushed, bool(lines) and lines[-1].startswith("begin")


def await_backends(url: str) -> None:
    """Until PostgreSQL has seen that its client is gone: it may be writing the last transaction still."""
    if make_url(url).get_backend_name() == "sqlite":
        return
    engine = create_engine(url)
    with engine.connect() as connection:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        while connection.scalar(text(others)):
            connection.rollback()
            time.sleep(0.001)
    engine.dispose()


def stored_turns(url: str) -> set[Turn]:
    """The turns in the database, each of them whole: in every scope, counted, and noted to the last."""
    with PhraseStore(url) as store:
        assert list(store.check()) == []
        turns = []
        for place, scope in enumerate(SCOPES):
            runs = {run.token_ids: run.count for run in store.export(scope)}
            common = runs.pop((1, 2, 3), 0)
            assert all(run[2:] == (place, *range(100, 250)) and count == 1 for run, count in runs.items())
            assert common == len(runs)
            turns.append({run[:2] for run in runs})
            notes = store.open(scope, fingerprint="f").recall("n/")
            last = max(turns[-1], default=None)
            assert notes == ({} if last is None else dict.fromkeys(NOTES, struct.pack("<2I", *last)))
        assert turns[0] == turns[1] == turns[2]
        return turns[0]


def test_a_process_killed_while_it_flushes_leaves_whole_turns(any_url: str) -> None:
    flushed, interrupted = set[Turn](), 0
    for number in range(100):
        said, flushing = killed(any_url, number)
        await_backends(any_url)
        if make_url(any_url).get_backend_name() == "sqlite":
            with closing(sqlite3.connect(path_of(any_url))) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        flushed.update(said)
        interrupted += flushing
        found = stored_turns(any_url)
        assert flushed <= found
        # Besides, at most the turn in whose flush the process was killed.
        assert len(found - flushed) <= interrupted
    assert interrupted > 20, "the moments were not random enough"


@pytest.mark.parametrize("version", [None, 1])
def test_a_process_killed_while_it_makes_or_migrates_a_file_leaves_a_usable_one(
    version: int | None, tmp_path: Path
) -> None:
    kept, unfinished = Path(__file__).parent / "schemas" / f"version-{version}.db", 0

    def begin(url: str, report: Report) -> None:
        report("ready")
        with PhraseStore(url) as store:
            store.setup()
        report("end")

    for number in range(40):
        url = f"sqlite:///{tmp_path}/{number}.db"
        if version:
            shutil.copy(kept, path_of(url))
        with Process(partial(begin, url)) as process:
            process.line()
            time.sleep(random.uniform(0, 0.03))
            process.kill()
            unfinished += process.rest() != ["end"]
        remember(url, "a", [1, 2, 3])
        assert counts(url) == {(1, 2, 3): 1}
        assert len(counts(url, "conversation:42")) == (2 if version else 0)
    assert unfinished > 5, "the moments were not random enough"


# No room


def test_a_full_database_keeps_what_waits_until_there_is_room(url: str) -> None:
    pages, engine = 2**30, create_engine(url)
    event.listen(engine, "connect", lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}"))
    with PhraseStore(engine) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 2, 3])
        store.flush()
        pages = 1  # as many as there are
        engine.dispose()
        with pytest.warns(RuntimeWarning, match="cannot be written: database or disk is full; generation") as caught:
            for number in range(5):
                pool.add([number, *range(5000)])
                pool.remember({f"n/{number}": bytes(5000)})
                store.flush()
                assert store.open("a", fingerprint="f").match([number, 0, 1])
        assert len(caught) == 1
        pages = 2**30
        engine.dispose()
        store.flush()
        assert store.stats().waiting == 0
    engine.dispose()
    assert counts(url) == {(1, 2, 3): 1} | {(number, *range(5000)): 1 for number in range(5)}
    with PhraseStore(url) as store:
        assert len(store.open("a", fingerprint="f").recall("n/")) == 5


def speak_with_little_room(url: str, limit: int, report: Report) -> None:
    """As `speak`, while no file may grow beyond `limit` bytes; then once more with room."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    with recorded() as messages:
        store = PhraseStore(url)
        for turn in range(10):
            pool = store.open("a", fingerprint="f")
            pool.add([turn, *range(1000)])
            pool.remember({"n": bytes([turn])})
            store.flush()
            assert pool.match([turn, 0, 1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    store.flush()
    assert store.stats().waiting == 0
    store.close()
    for message in messages:
        report(message)


@pytest.mark.parametrize("limit", [0, 100, 5000, 30_000, 40_000, 60_000])
def test_a_file_that_may_not_grow_keeps_what_waits_until_it_may(url: str, limit: int) -> None:
    with Process(partial(speak_with_little_room, url, limit)) as process:
        told = process.rest()
        assert process.wait() == 0, told
    assert len(told) == 1, told
    assert "generation goes on" in told[0]
    assert counts(url) == {(turn, *range(1000)): 1 for turn in range(10)}
    with PhraseStore(url) as store:
        assert store.open("a", fingerprint="f").recall("") == {"n": b"\x09"}


# No permission


@pytest.fixture
def common_folder() -> Iterator[Path]:
    """A folder that an ordinary user may use: those of pytest are closed to all but the one that runs it."""
    folder = Path(tempfile.mkdtemp(prefix="ouroboros-test-"))
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


def as_ordinary_user() -> None:
    """Permissions do not bind root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o400, 0o700), (0o600, 0o500), (0o400, 0o500)])
@pytest.mark.parametrize("scheme", ["sqlite:///{}", "sqlite:///file:{}?mode=ro&uri=true"])
def test_a_file_that_may_not_be_written_is_read(
    common_folder: Path, file_mode: int, folder_mode: int, scheme: str
) -> None:
    path = common_folder / "phrases.db"

    def speak(report: Report) -> None:
        as_ordinary_user()
        remember(f"sqlite:///{path}", "a", [1, 2, 3])
        path.chmod(file_mode)
        common_folder.chmod(folder_mode)
        before = path.read_bytes()
        with recorded() as messages, PhraseStore(scheme.format(path)) as store:
            pool = store.open("a", fingerprint="f")
            for turn in range(3):
                pool.add([4, 5, turn])
                store.flush()
            assert pool.match([1]) and len(pool.match([4])) == 3
            with pytest.raises(StoreError, match="readonly"):
                store.delete("a")
        for message in messages:
            report(message)
        assert path.read_bytes() == before

    with Process(speak) as process:
        told = process.rest()
        assert process.wait() == 0, told
    assert len(told) == 1, told
    assert "cannot be written: attempt to write a readonly database; generation goes on" in told[0]


# Files that go, and files that come


@pytest.mark.parametrize("what", ["file", "file and log", "folder"])
def test_a_file_deleted_while_open_is_begun_anew(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "folder"
    url = f"sqlite:///{folder}/phrases.db"
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 2, 3])
        store.flush()
        if what == "file":
            path_of(url).unlink()
        else:
            shutil.rmtree(folder)
        if what == "file and log":
            folder.mkdir()
        pool.add([4, 5, 6])
        with pytest.warns(RuntimeWarning, match="was deleted or replaced while in use") as caught:
            store.flush()
            store.flush()
        assert len(caught) == 1
        assert stat.S_IMODE(path_of(url).stat().st_mode) == 0o600
        pool = store.open("a", fingerprint="f")
        assert (pool.match([1]), len(pool.match([4]))) == ([], 1)
        pool.add([7, 8, 9])
        store.flush()
    assert counts(url) == {(4, 5, 6): 1, (7, 8, 9): 1}


def test_a_file_deleted_while_open_is_forgotten_when_a_scope_is_opened(url: str) -> None:
    with PhraseStore(url) as store:
        store.open("a", fingerprint="f").add([1, 2, 3])
        store.flush()
        path_of(url).unlink()
        with pytest.warns(RuntimeWarning, match="was deleted or replaced while in use") as caught:
            assert store.open("a", fingerprint="f").match([1]) == []
            assert store.open("a", fingerprint="f").recall("") == {}
        assert len(caught) == 1
    assert counts(url) == {}


@pytest.mark.parametrize("logged", [False, True])
def test_a_file_replaced_while_open_is_read(tmp_path: Path, url: str, logged: bool) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    remember(other, "a", *([7, number, 8] for number in range(1000, 1010)))
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        for number in range(1000, 1300):
            pool.add([1, 2, number])
        store.flush()
        if not logged:
            checkpoint(url)
        os.replace(path_of(other), path_of(url))
        pool.add([4, 5, 6])
        with pytest.warns(RuntimeWarning, match="was deleted or replaced while in use") as caught:
            store.flush()
        assert len(caught) == 1
        pool = store.open("a", fingerprint="f")
        assert (pool.match([1]), len(pool.match([4])), len(pool.match([7]))) == ([], 1, 10)
    assert counts(url) == {(4, 5, 6): 1} | {(7, number, 8): 1 for number in range(1000, 1010)}


def checkpoint(url: str) -> None:
    """Bring everything from the log into the file, so that no connection's memory holds it unseen."""
    with closing(sqlite3.connect(path_of(url), isolation_level=None)) as connection:
        connection.execute("UPDATE ouroboros_scopes SET created = created")
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def damage(path: Path, pages: str) -> bytes:
    """Overwrite part of a file in place; returns what it holds then."""
    data = bytearray(path.read_bytes())
    if pages == "first":
        data[:4096] = os.urandom(4096)
    elif pages == "truncated":
        del data[len(data) // 2 :]
    else:
        data[4096:] = b"\xff" * (len(data) - 4096)
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    return bytes(data)


@pytest.mark.parametrize("first", ["flush", "open", "list"])
@pytest.mark.parametrize("pages", ["first", "others", "truncated"])
def test_a_file_damaged_while_open_is_set_aside(url: str, pages: str, first: str) -> None:
    remember(url, "a", *([1, number, *range(200)] for number in range(200)))
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        checkpoint(url)
        damaged = damage(path_of(url), pages)
        pool.add([4, 5, 6])
        pool.remember({"n": b"x"})
        with pytest.warns(RuntimeWarning, match=r"kept as .*phrases\.db\.corrupt-\d{8}T\d{6} and a new") as caught:
            {"flush": store.flush, "open": lambda: store.open("a", fingerprint="f"), "list": store.list}[first]()
            store.flush()
        assert len(caught) == 1
        assert store.open("a", fingerprint="f").match([1, 5])  # it is only the file that is damaged
        assert store.open("a", fingerprint="f").match([4])
    (aside,) = path_of(url).parent.glob("*.corrupt-????????T??????")
    assert aside.read_bytes() == damaged
    assert counts(url) == {(4, 5, 6): 1}
    with PhraseStore(url) as store:
        assert store.open("a", fingerprint="f").recall("") == {"n": b"x"}


# Many at once


def test_eight_processes_lose_nothing(any_url: str) -> None:
    def speak(number: int, report: Report) -> None:
        with PhraseStore(any_url) as store:
            for turn in range(25):
                pool = store.open("a", fingerprint="f")
                pool.add([1, 2, 3])
                pool.add([number, 1000 + turn, 7])
                pool.remember({"shared": b"x", f"own/{number}": bytes([turn])})
                store.flush()

    assert together(*(partial(speak, number) for number in range(8))) == []
    own = {(number, 1000 + turn, 7): 1 for number in range(8) for turn in range(25)}
    assert counts(any_url) == {(1, 2, 3): 200} | own
    with PhraseStore(any_url) as store:
        assert [(scope.runs, scope.tokens) for scope in store.list()] == [(201, 603)]
        noted = {"shared": b"x"} | {f"own/{number}": b"\x18" for number in range(8)}
        assert store.open("a", fingerprint="f").recall("") == noted


def test_eight_processes_that_find_damage_lose_nothing_of_their_own(url: str) -> None:
    remember(url, "a", *([1, number, *range(200)] for number in range(200)))
    damaged = damage(path_of(url), "others")

    def speak(number: int, report: Report) -> None:
        with recorded() as messages, PhraseStore(url) as store:
            for turn in range(10):
                store.open("a", fingerprint="f").add([number, 1000 + turn, 7])
                store.flush()
        report(f"{len(messages)} {messages}")

    told = together(*(partial(speak, number) for number in range(8)))
    assert all(line[0] in "01" for line in told), told
    assert counts(url) == {(number, 1000 + turn, 7): 1 for number in range(8) for turn in range(10)}
    (aside,) = path_of(url).parent.glob("*.corrupt-????????T??????")
    assert aside.read_bytes() == damaged


def test_a_file_deleted_between_the_turns_of_eight_processes_is_begun_anew_once(url: str) -> None:
    gate, gate_handle = os.pipe()

    def speak(number: int, report: Report) -> None:
        os.close(gate_handle)
        with recorded() as messages, PhraseStore(url) as store:
            for turn in range(15):
                if turn == 5:
                    report("ready")
                    os.read(gate, 1)  # until it is closed on the other side
                store.open("a", fingerprint="f").add([number, 1000 + turn, 7])
                store.flush()
        report(str(len(messages)))
        for message in messages:
            report(message)

    with ExitStack() as cleanup:
        processes = [cleanup.enter_context(Process(partial(speak, number))) for number in range(8)]
        assert [process.line() for process in processes] == ["ready"] * 8
        path_of(url).unlink()
        os.close(gate_handle)
        told = [process.rest() for process in processes]
        assert [process.wait() for process in processes] == [0] * 8, told
    os.close(gate)
    assert all(len(lines) == 2 and "was deleted or replaced" in lines[1] for lines in told), told
    assert counts(url) == {(number, 1000 + turn, 7): 1 for number in range(8) for turn in range(5, 15)}


# A parent and its children


def test_what_waits_at_a_fork_is_written_once(any_url: str) -> None:
    with PhraseStore(any_url) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 2, 3])
        store.flush()
        pool.add([4, 5, 6])

        def child(report: Report) -> None:
            pool.add([7, 8, 9])
            store.flush()
            assert len(store.open("a", fingerprint="f").match([7])) == 1
            store.close()

        for _ in range(2):
            with Process(child) as process:
                assert (process.rest(), process.wait()) == ([], 0)
        pool.add([10, 11, 12])
        store.flush()
        assert store.open("a", fingerprint="f").match([7])[0].count == 2
    assert counts(any_url) == {(1, 2, 3): 1, (4, 5, 6): 1, (7, 8, 9): 2, (10, 11, 12): 1}


def test_a_child_of_a_parent_that_flushes_goes_on(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, inside, go_on = sqlite_file.begin, threading.Event(), threading.Event()

    def wait_inside(connection: Connection) -> None:
        # Here, and not in SQLite: a fork while SQLite holds a mutex of its own leaves it held in the child for good.
        inside.set()
        go_on.wait()
        begin(connection)

    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        store.setup()
        with closing(sqlite3.connect(path_of(url), isolation_level=None)) as lock:
            lock.execute("BEGIN IMMEDIATE")
            pool.add([1, 2, 3])
            monkeypatch.setattr(sqlite_file, "begin", wait_inside)
            flush = threading.Thread(target=store.flush)
            flush.start()
            inside.wait()
            assert not store._lock.acquire(blocking=False)

            def child(report: Report) -> None:
                sqlite_file.begin, sqlite_file.BUSY_MILLISECONDS = begin, 20
                pool.add([4, 5, 6])
                # SQLite itself believes that the child holds its parent's locks: it can read, but never write.
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    assert len(store.open("a", fingerprint="f").match([4])) == 1
                    store.flush()
                    store.flush()
                report(str([warning for warning in caught if "locked" not in str(warning.message)]))

            try:
                with Process(child) as process:
                    assert (process.rest(), process.wait()) == (["[]"], 0)
            finally:
                lock.execute("ROLLBACK")
                go_on.set()
                flush.join()
    assert counts(url) == {(1, 2, 3): 1}


# The clock


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the store to so many seconds since 1970; there it stays."""

    def put(seconds: float) -> None:
        def now() -> int:
            return int(seconds * 1_000_000_000)

        monkeypatch.setattr(time, "time_ns", now)
        for name, module in list(sys.modules.items()):
            if name.startswith("ouroboros_storage") and hasattr(module, "time_ns"):
                monkeypatch.setattr(module, "time_ns", now)

    return put


NOON, DAY = 1_800_000_000, 86_400


def test_a_clock_that_goes_backwards_keeps_the_order_of_use(any_url: str, set_clock: Callable[[float], None]) -> None:
    for number in range(6):
        set_clock(NOON - number * DAY)
        with PhraseStore(any_url) as store:
            pool = store.open("a", fingerprint="f")
            for run in ([1, 100 + number, 10], [1, 100 + number, 11]):
                set_clock(NOON - number * DAY - run[-1])
                pool.add(run)
    recent_first = [(100 + number, last) for number in reversed(range(6)) for last in (11, 10)]
    with PhraseStore(any_url) as store:
        found = store.open("a", fingerprint="f").match([1])
        assert [phrase.token_ids for phrase in found] == recent_first
        assert store.prune("a", max_runs=4) == 8
        assert {run.token_ids[1:] for run in store.export("a")} == set(recent_first[:4])
        stats = store.stats()
        assert stats.oldest is not None and stats.newest is not None and stats.oldest <= stats.newest
    with PhraseStore(any_url, scope_quota=6) as store:
        store.open("a", fingerprint="f").add([1, 106, 10])
        store.flush()
        kept = [run.token_ids[1:] for run in store.export("a")]
        assert kept == [(106, 10)]


def test_a_clock_that_goes_backwards_keeps_the_order_of_scopes(
    any_url: str, set_clock: Callable[[float], None]
) -> None:
    for number, scope in enumerate("abcd"):
        set_clock(NOON - number * DAY)
        remember(any_url, scope, [1, number, 10])
    with PhraseStore(any_url, quota=9) as store:
        assert store.prune(max_runs=3) == 1
        assert {scope.scope for scope in store.list() if scope.runs} == {"b", "c", "d"}
        store.open("e", fingerprint="f").add([1, 4, 10])
        store.flush()
        kept = {scope.scope for scope in store.list() if scope.runs}
        assert "e" in kept and "b" not in kept


def test_a_clock_that_goes_backwards_keeps_the_latest_notes(
    any_url: str, set_clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ouroboros_storage.upkeep._KEPT_NOTES", 3)
    monkeypatch.setattr("ouroboros_storage.upkeep._NOTES_COUNTED", 1)
    for number in range(6):
        set_clock(NOON - number * DAY)
        with PhraseStore(any_url) as store:
            store.open("a", fingerprint="f").remember({f"n/{number}": b"x"})
    with PhraseStore(any_url) as store:
        assert set(store.open("a", fingerprint="f").recall("")) == {"n/3", "n/4", "n/5"}


def test_what_was_dated_into_the_future_grows_old(any_url: str, set_clock: Callable[[float], None]) -> None:
    set_clock(NOON + 1000 * DAY)
    remember(any_url, "a", [1, 2, 3])
    set_clock(NOON)
    with PhraseStore(any_url) as store:
        assert store.prune(max_age=DAY) == 0
        (run,) = store.export("a")
        assert run.created <= run.last_used <= datetime.fromtimestamp(NOON, UTC)
    set_clock(NOON + 2 * DAY)
    with PhraseStore(any_url) as store:
        assert store.prune(max_age=DAY) == 1


# A later version


def make_later(url: str) -> int:
    """Write down a schema version that the code does not know."""
    engine, later = create_engine(url), len(MIGRATIONS) + 1
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO ouroboros_migrations VALUES ({later})"))
        connection.execute(text("ALTER TABLE ouroboros_runs ADD COLUMN of_later INTEGER"))
    engine.dispose()
    return later


def contents(url: str) -> object:
    """All there is: the bytes and names of files, or the rows of all tables."""
    if make_url(url).get_backend_name() == "sqlite":
        folder = path_of(url).parent
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    engine, found = create_engine(url), {}
    with engine.connect() as connection:
        of_schema = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
        for table in connection.scalars(text(of_schema)).all():
            # With the transaction that wrote each row, so that not even the same could be written again.
            found[table] = set(connection.execute(text(f"SELECT xmin::text, * FROM {table}")).all())
    engine.dispose()
    return found


def test_a_schema_of_a_later_version_is_left_alone(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    later = make_later(any_url)
    before = contents(any_url)
    said = f"schema version {later}, but this ouroboros-llm knows versions up to {len(MIGRATIONS)}; upgrade"
    for create in (True, False):
        with pytest.raises(StoreError, match=said):
            PhraseStore(any_url, create=create).setup()
    with pytest.raises(StoreError, match=said):
        PhraseStore(any_url).open("a", fingerprint="f")
    assert contents(any_url) == before


def test_answers_beside_a_schema_of_a_later_version_leave_it_alone(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    make_later(any_url)
    before = contents(any_url)
    with pytest.warns(RuntimeWarning, match="upgrade ouroboros-llm") as caught:
        with Ouroboros(tiny_model(), byte_tokenizer(), store=any_url) as ouroboros:
            ouroboros.generate("Hello", options=DecodingOptions(max_new_tokens=4))
    assert len(caught) == 1
    assert contents(any_url) == before


# A server that stops


needs_server = pytest.mark.skipif(not CONTROL, reason="OUROBOROS_TEST_POSTGRES_CTL has no command: make test-postgres")


@needs_server
def test_a_postgres_that_stops_and_starts_loses_nothing(postgres_url: str, server: Callable[[str], None]) -> None:
    with PhraseStore(postgres_url) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 2, 3])
        store.flush()
        server("stop")
        with pytest.warns(RuntimeWarning, match="generation goes on") as caught:
            for number in range(3):
                pool.add([1, 2, number])
                pool.remember({"n": bytes([number])})
                store.flush()
                assert store.open("a", fingerprint="f") is pool
                assert store.open(f"b{number}", fingerprint="f").match([1]) == []
        assert len(caught) == 1
        assert len(pool.match([1, 2])) == 4
        server("start")
        store.flush()
        assert store.stats().waiting == 0
        server("stop")
        with pytest.warns(RuntimeWarning, match="generation goes on"):
            pool.add([1, 2, 9])
            store.flush()
        server("start")
    assert counts(postgres_url) == {(1, 2, 3): 1, (1, 2, 0): 1, (1, 2, 1): 1, (1, 2, 2): 1, (1, 2, 9): 1}
    with PhraseStore(postgres_url) as store:
        assert store.open("a", fingerprint="f").recall("") == {"n": b"\x02"}


@needs_server
def test_a_postgres_that_is_down_at_first_is_used_once_it_is_up(
    postgres_url: str, server: Callable[[str], None]
) -> None:
    remember(postgres_url, "a", [1, 2, 3])
    server("stop")
    with pytest.warns(RuntimeWarning, match="generation goes on") as caught:
        store = PhraseStore(postgres_url)
        pool = store.open("a", fingerprint="f")
        pool.add([4, 5, 6])
        store.flush()
        store.open("b", fingerprint="f").add([7, 8, 9])
        store.flush()
    assert len(caught) == 1
    server("start")
    store.flush()
    assert len(store.open("a", fingerprint="f").match([1])) == 1
    store.close()
    assert counts(postgres_url) == {(1, 2, 3): 1, (4, 5, 6): 1}
    assert counts(postgres_url, "b") == {(7, 8, 9): 1}


def test_a_turn_asks_a_server_that_is_down_once_before_and_once_after(impatient: None) -> None:
    pytest.importorskip("psycopg")
    store, attempts = PhraseStore("postgresql+psycopg://nobody@127.0.0.1:1/nothing"), list[object]()
    event.listen(store._database.engine, "do_connect", lambda *_: attempts.append(None))

    def turn() -> int:
        attempts.clear()
        pool = store.open("a", fingerprint="f", read_scopes=("b", "c"))
        pool.add([1, 2, 3])
        pool.remember({"n": b"x"})
        store.flush()
        return len(attempts)

    with pytest.warns(RuntimeWarning, match="generation goes on") as caught:
        assert turn() > 2  # patient at first: it may be a moment's trouble
        assert [turn(), turn()] == [2, 2]
        store.close()
    assert len(caught) == 1


@needs_server
def test_a_postgres_that_crashes_under_four_processes_loses_nothing(
    postgres_url: str, server: Callable[[str], None]
) -> None:
    """What was being committed just then may be written twice: nobody can know whether it was."""

    def speak(number: int, report: Report) -> None:
        with recorded() as messages, PhraseStore(postgres_url) as store:
            for turn in range(60):
                store.open("a", fingerprint="f").add([number, 1000 + turn, 7])
                store.flush()
                time.sleep(0.01)
        assert all("generation goes on" in message for message in messages), messages

    def crash(report: Report) -> None:
        for _ in range(2):
            time.sleep(0.1)
            server("stop")
            server("start")

    assert together(*(partial(speak, number) for number in range(4)), crash) == []
    found = counts(postgres_url)
    assert set(found) == {(number, 1000 + turn, 7) for number in range(4) for turn in range(60)}
    assert sum(found.values()) <= len(found) + 4 * 2


# Answers


@contextmanager
def locked(url: str) -> Iterator[None]:
    with closing(sqlite3.connect(path_of(url), isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def deleted(url: str) -> Iterator[None]:
    path_of(url).unlink()
    yield


@contextmanager
def replaced(url: str) -> Iterator[None]:
    other = path_of(url).with_name("other.db")
    remember(f"sqlite:///{other}", "conversation:1", [1, 2, 3])
    os.replace(other, path_of(url))
    yield


@contextmanager
def damaged(url: str) -> Iterator[None]:
    checkpoint(url)
    damage(path_of(url), "others")
    yield


@contextmanager
def no_database(url: str) -> Iterator[None]:
    path_of(url).write_bytes(b"these are no phrases at all\n" * 1000)
    yield


@contextmanager
def without_tables(url: str) -> Iterator[None]:
    with closing(sqlite3.connect(path_of(url))) as connection:
        for table in ("ouroboros_notes", "ouroboros_runs", "ouroboros_scopes"):
            connection.execute(f"DROP TABLE {table}")
    yield


@contextmanager
def of_later_version(url: str) -> Iterator[None]:
    make_later(url)
    yield


@contextmanager
def full(url: str) -> Iterator[None]:
    """No file of this process may grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


FAULTS = [locked, deleted, replaced, damaged, no_database, without_tables, of_later_version, full]
PROMPTS = ["Once upon a time", "Once upon a time there was", "A snake that bites its tail"]


def answers(ouroboros: Ouroboros) -> list[list[int]]:
    options = DecodingOptions(max_new_tokens=24)
    return [list(ouroboros.generate(prompt, scope="conversation:1", options=options).token_ids) for prompt in PROMPTS]


def plain_answers() -> list[list[int]]:
    tokenizer = byte_tokenizer()
    return [plain(tiny_model(), tokenizer(prompt)["input_ids"], 24) for prompt in PROMPTS]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("when", ["before", "between"])
def test_answers_are_the_models_own_whatever_happens(
    url: str, impatient: None, when: str, fault: Callable[[str], object]
) -> None:
    remember(url, "conversation:1", [1, 2, 3])
    expected = plain_answers()
    with recorded() as messages:
        ouroboros = Ouroboros(tiny_model(), byte_tokenizer(), store=url) if when == "between" else None
        if ouroboros:
            assert answers(ouroboros) == expected
        with fault(url):
            ouroboros = ouroboros or Ouroboros(tiny_model(), byte_tokenizer(), store=url)
            assert answers(ouroboros) == expected
            assert answers(ouroboros) == expected
        ouroboros.close()
    told = [message for message in messages if "phrases" in message]
    assert len(told) <= 1, told


@needs_server
@pytest.mark.parametrize("when", ["before", "between"])
def test_answers_are_the_models_own_while_postgres_is_down(
    postgres_url: str, server: Callable[[str], None], when: str
) -> None:
    expected = plain_answers()
    with recorded() as messages:
        if when == "before":
            server("stop")
        ouroboros = Ouroboros(tiny_model(), byte_tokenizer(), store=postgres_url)
        if when == "between":
            assert answers(ouroboros) == expected
            server("stop")
        assert answers(ouroboros) == expected
        server("start")
        assert answers(ouroboros) == expected
        ouroboros.close()
    assert len([message for message in messages if "generation goes on" in message]) == 1
    assert len(counts(postgres_url, "conversation:1")) >= len(PROMPTS)
