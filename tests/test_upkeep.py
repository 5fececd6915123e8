"""Keeping a store in order: copies, names, bounds, exports, checks, and scopes that stay in memory."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from databases import path_of, recall, remember
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from ouroboros_llm.errors import OptionError, StoreError, StoreUnavailableError
from ouroboros_llm.phrase_pool.base import Phrase
from ouroboros_storage import AsyncPhraseStore, PhraseStore, StoredNote, StoredRun
from ouroboros_storage.exchange import from_line, to_line

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning that a test does not expect fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def counts(url: str, scope: str) -> dict[tuple[int, ...], int]:
    with PhraseStore(url) as store:
        return {run.token_ids: run.count for run in store.export(scope)}


# Copies and names


def test_a_copy_is_a_scope_of_its_own(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3], [1, 2, 3], [4, 5, 6])
    remember(any_url, "a", [7, 8, 9], fingerprint="g")
    with PhraseStore(any_url) as store:
        store.open("a", fingerprint="f").remember({"m/1": b"x"})
        assert store.copy("a", "b") == 3
        assert store.delete("a") == 3
        assert {run.token_ids: run.count for run in store.export("b")} == {(1, 2, 3): 2, (4, 5, 6): 1, (7, 8, 9): 1}
        assert {scope.fingerprint: scope.runs for scope in store.list()} == {"f": 2, "g": 1}
        assert store.open("b", fingerprint="f").recall("") == {"m/1": b"x"}


def test_a_copy_keeps_order_and_times(any_url: str) -> None:
    remember(any_url, "a", [1, 10], [1, 20], [1, 30])
    remember(any_url, "a", [1, 20])
    with PhraseStore(any_url) as store:
        store.copy("a", "b")
        original = {run.token_ids: run for run in store.export("a")}
        assert [replace(run, scope="a") for run in store.export("b")] == list(original.values())
    assert recall(any_url, "b", [1]) == [(20,), (30,), (10,)]


def test_merging_adds_counts_and_keeps_the_sources(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3], [1, 2, 3], [4, 5, 6])
    remember(any_url, "b", [1, 2, 3], [7, 8, 9])
    remember(any_url, "c", [7, 8, 9], fingerprint="g")
    with PhraseStore(any_url) as store:
        pool = store.open("b", fingerprint="f")
        pool.remember({"m/1": b"kept"})
        store.open("a", fingerprint="f").remember({"m/1": b"other", "m/2": b"new"})
        assert store.merge(["a", "c"], "b") == 3
        found = {(run.fingerprint, run.token_ids): run.count for run in store.export("b")}
        assert found == {("f", (1, 2, 3)): 3, ("f", (7, 8, 9)): 1, ("f", (4, 5, 6)): 1, ("g", (7, 8, 9)): 1}
        assert store.open("b", fingerprint="f").match([4]) == [Phrase((5, 6), 1)]
        assert store.open("b", fingerprint="f").recall("") == {"m/1": b"kept", "m/2": b"new"}
    assert counts(any_url, "a") == {(1, 2, 3): 2, (4, 5, 6): 1}


def test_merging_into_nothing_makes_the_target(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    with PhraseStore(any_url) as store:
        assert store.merge("a", "b") == 1
        assert [scope.scope for scope in store.list()] == ["a", "b"]


def test_a_renamed_scope_is_found_by_its_new_name_alone(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    remember(any_url, "z", [9, 9, 9])
    with PhraseStore(any_url) as ours, PhraseStore(any_url) as theirs:
        held, waiting = ours.open("a", fingerprint="f"), theirs.open("b", fingerprint="f")
        held.add([4, 5, 6])  # not flushed yet: it goes along
        assert ours.rename("a", "b") == 2
        assert held.match([1]) == [] and ours.open("a", fingerprint="f").match([1]) == []
        assert ours.open("b", fingerprint="f").match([4]) == [Phrase((5, 6), 1)]
        # A pool that was open before under that name finds rows older than what it had read.
        assert theirs.open("b", fingerprint="f") is waiting
        assert waiting.match([1]) == [Phrase((2, 3), 1)]


@pytest.mark.parametrize("change", ["copy", "rename", "merge"])
def test_changes_of_scopes_that_are_not_there(any_url: str, change: str) -> None:
    remember(any_url, "b", [1, 2, 3])
    with PhraseStore(any_url) as store:
        for source in ("a", "%", "B"):
            with pytest.raises(StoreError, match=f"scope '{source}' is not in the store"):
                getattr(store, change)(source, "c")
        assert [scope.scope for scope in store.list()] == ["b"]


def test_copies_and_new_names_replace_nothing(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    remember(any_url, "b", [4, 5, 6], fingerprint="g")
    with PhraseStore(any_url) as store:
        for change in (store.copy, store.rename):
            with pytest.raises(StoreError, match="scope 'b' exists already; choose another name, or merge"):
                change("a", "b")
        with pytest.raises(OptionError, match="target must be another scope"):
            store.merge(["b", "a"], "a")
    assert counts(any_url, "a") == {(1, 2, 3): 1}


def test_a_merge_of_which_one_source_is_missing_does_nothing(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3])
    with PhraseStore(any_url) as store:
        with pytest.raises(StoreError, match="'nothing' is not in the store"):
            store.merge(["a", "nothing"], "b")
        assert [scope.scope for scope in store.list()] == ["a"]


# Bounds


def test_pruning_drops_what_was_used_least_recently(any_url: str) -> None:
    remember(any_url, "a", *([number] * 10 for number in range(10)))
    remember(any_url, "a", [3] * 10)
    with PhraseStore(any_url) as store:
        assert store.prune("a", max_tokens=45) == 6
        assert set(counts(any_url, "a")) == {(number,) * 10 for number in (3, 9, 8, 7)}
        assert store.prune("a", max_runs=2) == 2
        assert set(counts(any_url, "a")) == {(3,) * 10, (9,) * 10}
        assert store.prune("a", max_runs=2, max_tokens=20) == 0
        assert store.prune("a", max_tokens=0) == 2


def test_bounds_without_a_scope_hold_for_the_whole_store(any_url: str) -> None:
    for number, scope in enumerate("abab"):
        remember(any_url, scope, [number] * 10)
    with PhraseStore(any_url) as store:
        assert store.prune(max_runs=3) == 1
        assert store.prune("b", max_runs=1) == 1
        assert [(scope.scope, scope.runs) for scope in store.list()] == [("a", 1), ("b", 1)]


def test_pruning_by_age(any_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    for days, scope in ((40, "old"), (40, "mixed"), (10, "mixed")):
        monkeypatch.setattr(time, "time_ns", lambda days=days: now - days * 86_400 * 10**9)
        remember(any_url, scope, [days, 1, 2])
    monkeypatch.undo()
    with PhraseStore(any_url) as store:
        assert store.prune(max_age=timedelta(days=50)) == 0
        assert store.prune("nothing", max_age=0) == 0
        assert store.prune(max_age=30 * 86_400) == 2
        assert [(scope.scope, scope.runs) for scope in store.list()] == [("mixed", 1)]
        assert store.prune(max_age=0) == 1
        assert store.list() == []


def test_what_is_dated_into_the_future_grows_old_too(any_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**9 * 86_400 * 365)
    remember(any_url, "a", [1, 2, 3])
    monkeypatch.undo()
    with PhraseStore(any_url) as store:
        assert store.prune(max_age=3600) == 0
        assert store.prune(max_age=0) == 1


def test_a_clock_that_is_put_back_changes_no_order(any_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        monkeypatch.setattr(time, "time_ns", lambda number=number: 10**18 - number * 3600 * 10**9)
        remember(any_url, "a", [1, number])
    assert recall(any_url, "a", [1]) == [(2,), (1,), (0,)]
    with PhraseStore(any_url) as store:
        assert store.prune(max_runs=1) == 2
    assert counts(any_url, "a") == {(1, 2): 1}


def test_pruned_phrases_are_forgotten_by_open_pools(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3], [4, 5, 6])
    with PhraseStore(any_url) as ours, PhraseStore(any_url) as theirs:
        pool, other = ours.open("a", fingerprint="f"), theirs.open("a", fingerprint="f")
        generation = pool.generation
        assert ours.prune("a", max_runs=1) == 1
        assert pool.generation is not generation
        assert ours.open("a", fingerprint="f").match([1]) == []
        assert pool.match([4]) == [Phrase((5, 6), 1)]
        assert theirs.open("a", fingerprint="f") is other
        assert other.match([1]) == [] and other.match([4])


def test_pruned_tokens_are_in_no_byte_of_the_file(url: str) -> None:
    remember(url, "a", [0x5EC2E7] * 500, [1, 2, 3])
    needle = (0x5EC2E7).to_bytes(4, "little") * 2
    with PhraseStore(url) as store:
        store.open("a", fingerprint="f")
        assert needle in path_of(url).read_bytes()
        store.prune("a", max_runs=1)
        assert not any(needle in path.read_bytes() for path in path_of(url).parent.iterdir())


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({}, "prune needs a bound"),
        ({"max_tokens": -1}, "max_tokens must be a whole number of at least 0, but got -1"),
        ({"max_runs": 1.5}, "max_runs must be a whole number"),
        ({"max_age": -1}, "max_age must be a timedelta or seconds, at least 0, but got -1"),
        ({"max_age": "30d"}, "max_age must be a timedelta or seconds"),
        ({"max_age": float("nan")}, "max_age must be"),
        ({"scope": "", "max_runs": 1}, "scope"),
    ],
)
def test_bounds_are_checked(url: str, bounds: dict[str, object], said: str) -> None:
    remember(url, "a", [1, 2, 3])
    with PhraseStore(url) as store, pytest.raises(OptionError, match=said):
        store.prune(**bounds)  # type: ignore[arg-type]
    assert counts(url, "a") == {(1, 2, 3): 1}


def test_a_scope_never_exceeds_its_quota(any_url: str) -> None:
    with PhraseStore(any_url, scope_quota=100) as store:
        pool, other = store.open("a", fingerprint="f"), store.open("b", fingerprint="f")
        other.add([7] * 60)
        for number in range(40):
            pool.add([number] * 10)
            store.flush()
            assert store.stats("a").tokens <= 100
        runs = [run.token_ids[0] for run in store.export("a")]
        assert 7 <= len(runs) <= 10 and runs == list(range(40 - len(runs), 40))
        assert store.stats("b").tokens == 60
        # What is in memory goes on, within the pool's capacity.
        assert pool.match([1])


def test_a_store_never_exceeds_its_quota(any_url: str) -> None:
    with PhraseStore(any_url, quota=100) as store:
        for number in range(40):
            store.open(f"scope:{number}", fingerprint="f").add([number] * 10)
            store.flush()
            assert store.stats().tokens <= 100
        kept = [scope.scope for scope in store.list() if scope.runs]
        assert sorted(kept) == sorted(f"scope:{number}" for number in range(40 - len(kept), 40))
        store.open("large", fingerprint="f").add(list(range(200)))
        store.flush()
        assert store.stats().tokens == 0


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12),
    max_tokens=st.none() | st.integers(0, 120),
    max_runs=st.none() | st.integers(0, 12),
)
def test_pruning_keeps_the_longest_recent_part(
    tmp_path: Path, lengths: list[int], max_tokens: int | None, max_runs: int | None
) -> None:
    with PhraseStore("sqlite://") as store:
        pool = store.open("a", fingerprint="f")
        runs = [(number, *range(1, length)) for number, length in enumerate(lengths)]
        for run in runs:
            pool.add(run)
        if max_tokens is None and max_runs is None:
            return
        store.prune("a", max_tokens=max_tokens, max_runs=max_runs)
        kept = [run.token_ids for run in store.export("a")]
        fitting = [
            runs[start:]
            for start in range(len(runs) + 1)
            if sum(map(len, runs[start:])) <= (10**9 if max_tokens is None else max_tokens)
            and len(runs) - start <= (10**9 if max_runs is None else max_runs)
        ]
        assert set(kept) == set(fitting[0])


# Counting and checking


def test_stats_count_one_scope_or_all(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 3], [1, 2, 3], [4, 5])
    remember(any_url, "a", [6, 7], fingerprint="g")
    remember(any_url, "b", [1, 2, 3])
    with PhraseStore(any_url) as store:
        store.open("b", fingerprint="f").remember({"m/1": b"12345678"})
        store.flush()
        store.open("b", fingerprint="f").add([8, 9])
        one, every = store.stats("a"), store.stats()
        assert (one.scopes, one.runs, one.tokens, one.uses, one.notes, one.nbytes, one.waiting) == (
            1,
            3,
            7,
            4,
            0,
            28,
            0,
        )
        assert (every.scopes, every.runs, every.tokens, every.uses, every.notes) == (2, 4, 10, 5, 1)
        assert (every.nbytes, every.waiting) == (48, 1)
        assert every.oldest == min(run.last_used for run in store.export("a")) and every.newest >= every.oldest
        assert (every.file_bytes is None) == any_url.startswith("postgresql")
        nothing = store.stats("nothing")
        assert (nothing.scopes, nothing.runs, nothing.oldest) == (0, 0, None)


def test_a_sound_database_has_no_problems(any_url: str) -> None:
    remember(any_url, "a", *([number, number] for number in range(2500)))
    seen: list[int] = []
    with PhraseStore(any_url) as store:
        assert store.check(seen.append) == []
    assert sum(seen) == 2500 and len(seen) > 1


def test_problems_are_named(url: str) -> None:
    remember(url, "a", [1, 2, 3], [4, 5, 6])
    connection = sqlite3.connect(path_of(url))
    connection.execute("UPDATE ouroboros_runs SET token_ids = x'0102030405060708' WHERE id = 1")
    connection.execute("UPDATE ouroboros_runs SET scope_id = 77 WHERE id = 2")
    connection.commit()
    connection.close()
    with PhraseStore(url) as store:
        found = store.check()
    assert len(found) == 2
    assert "1 rows of ouroboros_runs belong to no scope" in found
    assert any(problem.startswith("run 1 is not what was written") for problem in found)


# Between databases


def test_what_is_exported_can_be_imported(any_url: str, tmp_path: Path) -> None:
    remember(any_url, "a", [1, 2, 3], [1, 2, 3], [4, 5, 6])
    remember(any_url, "a", [7, 8], fingerprint="g")
    with PhraseStore(any_url) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 9], answer=False)
        pool.remember({"m/2": b"\0\xff", "m/1": b""})
        lines = [to_line(record) for record in (*store.export("a"), *store.export_notes("a"))]
        originals = list(store.export("a"))
    assert all("\n" not in line for line in lines)
    other = f"sqlite:///{tmp_path}/other.db"
    for _ in range(2):  # twice is as good as once
        with PhraseStore(other) as store:
            assert store.import_(map(from_line, lines)) == 4
            assert sorted(store.export("a"), key=lambda run: run.token_ids) == sorted(
                originals, key=lambda run: run.token_ids
            )
            assert {note.name: note.data for note in store.export_notes("a")} == {"m/1": b"", "m/2": b"\0\xff"}
            assert store.open("a", fingerprint="f").match([4]) == [Phrase((5, 6), 1)]


def test_importing_raises_counts_but_never_lowers_them(any_url: str) -> None:
    remember(any_url, "a", *[[1, 2]] * 5)
    record = StoredRun("a", "f", (1, 2), 3, NOW, NOW)
    with PhraseStore(any_url) as store:
        store.open("a", fingerprint="f")
        assert store.import_([record, replace(record, count=2)]) == 1
        assert counts(any_url, "a") == {(1, 2): 5}
        store.import_([replace(record, count=9), StoredNote("a", "f", "m/1", b"x", NOW)])
        assert counts(any_url, "a") == {(1, 2): 9}
        assert store.open("a", fingerprint="f").recall("") == {"m/1": b"x"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "no json",
        "[]",
        '"text"',
        "{}",
        to_line(StoredRun("a", "f", (1, 2), 1, NOW, NOW)).replace('"count": 1', '"count": 0'),
        to_line(StoredRun("a", "f", (1, 2), 1, NOW, NOW)).replace("[1, 2]", "[1, -2]"),
        to_line(StoredRun("a", "f", (1, 2), 1, NOW, NOW)).replace("[1, 2]", '"12"'),
        to_line(StoredRun("a\nb", "f", (1, 2), 1, NOW, NOW)),
        to_line(StoredRun("a", "f", (1, 2), 1, NOW, NOW)).replace("2026-01", "2026-13"),
        to_line(StoredNote("a", "f", "m/1", b"x", NOW)).replace("eA==", "e"),
    ],
)
def test_lines_are_checked(line: str) -> None:
    with pytest.raises(StoreError, match="line of an export"):
        from_line(line)


@given(
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=5),
    scope=st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20),
    count=st.integers(1, 2**40),
    answer=st.booleans(),
    data=st.binary(max_size=20),
)
def test_lines_lose_nothing(token_ids: list[int], scope: str, count: int, answer: bool, data: bytes) -> None:
    for record in (
        StoredRun(scope, "f", tuple(token_ids), count, NOW, NOW, answer),
        StoredNote(scope, "f", "m/1", data, NOW),
    ):
        assert from_line(to_line(record)) == record


def test_records_are_checked(url: str) -> None:
    with PhraseStore(url) as store:
        for wrong in ("text", StoredRun("", "f", (1, 2), 1, NOW, NOW), StoredRun("a", "f", (1, 2), 0, NOW, NOW)):
            with pytest.raises(OptionError):
                store.import_([StoredRun("a", "f", (1, 2), 1, NOW, NOW), wrong])  # type: ignore[list-item]
        assert store.list() == []


# Reading


def test_refresh_reads_what_others_flushed(any_url: str) -> None:
    with PhraseStore(any_url) as ours, PhraseStore(any_url) as theirs:
        first, second = ours.open("a", fingerprint="f"), ours.open("b", fingerprint="f")
        remember(any_url, "a", [1, 2, 3])
        remember(any_url, "b", [1, 2, 4])
        assert first.match([1]) == second.match([1]) == []
        first.refresh()
        assert first.match([1]) == [Phrase((2, 3), 1)] and second.match([1]) == []
        ours.refresh()
        assert second.match([1]) == [Phrase((2, 4), 1)]
        theirs.close()
        for refresh in (theirs.refresh, theirs.setup):
            with pytest.raises(StoreError, match="closed"):
                refresh()


def test_several_scopes_are_read_in_order_and_one_is_written(any_url: str) -> None:
    remember(any_url, "a", [1, 2, 30])
    remember(any_url, "b", [1, 2, 40], [9, 1, 2, 41])
    remember(any_url, "c", [1, 2, 50])
    with PhraseStore(any_url) as store:
        pool = store.open("a", fingerprint="f", read_scopes=["c", "b"])
        pool.add([5, 6, 7])
        pool.remember({"m/1": b"x"})
        assert [phrase.token_ids for phrase in pool.match([9, 1, 2])] == [(41,), (30,), (50,), (40,)]
        assert pool.stats.runs == 5 and pool.recall("") == {"m/1": b"x"}
        store.flush()
        assert {scope.scope: scope.runs for scope in store.list()} == {"a": 2, "b": 2, "c": 1}
        remember(any_url, "c", [5, 6, 8])
        pool.refresh()
        assert [phrase.token_ids for phrase in pool.match([5, 6])] == [(7,), (8,)]


# Scopes in memory only


@pytest.mark.parametrize("said", ["at the start", "when opened"])
def test_an_ephemeral_scope_leaves_no_trace(url: str, said: str) -> None:
    secret = [0x5EC2E700 + number for number in range(20)]
    with PhraseStore(url, ephemeral=["secret:42"] if said == "at the start" else ()) as store:
        pool = store.open("secret:42", fingerprint="f", ephemeral=said == "when opened")
        other = store.open("other", fingerprint="f")
        for at in (pool, other):
            at.add([1, 2, 3])
        pool.add(secret)
        pool.remember({"m/1": b"secret"})
        store.flush()
        assert store.open("secret:42", fingerprint="f") is pool
        assert pool.match(secret[:1]) == [Phrase(tuple(secret[1:]), 1)] and pool.recall("") == {"m/1": b"secret"}
        assert [scope.scope for scope in store.list()] == ["other"]
    written = b"".join(path.read_bytes() for path in path_of(url).parent.iterdir())
    assert b"secret" not in written and secret[0].to_bytes(4, "little") not in written


def test_a_scope_becomes_ephemeral_while_it_is_used(url: str) -> None:
    remember(url, "a", [1, 2, 3])
    with PhraseStore(url) as store:
        before = store.open("a", fingerprint="f")
        before.add([4, 5, 6])
        pool = store.open("a", fingerprint="f", ephemeral=True)
        assert pool.match([1]) == pool.match([4]) == []
        before.add([7, 8, 9])  # a turn that was running
        pool.add([10, 11, 12])
        store.flush()
        store.refresh()
        assert pool.match([1]) == [] and pool.match([10])
    assert counts(url, "a") == {(1, 2, 3): 1}


def test_deleting_an_ephemeral_scope_empties_its_pool(url: str) -> None:
    with PhraseStore(url, ephemeral=["a"]) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 2, 3])
        store.delete("a")
        assert pool.match([1]) == []


# Opening


def test_a_store_touches_nothing_before_its_first_use(tmp_path: Path) -> None:
    store = PhraseStore(f"sqlite:///{tmp_path}/new/phrases.db")
    assert list(tmp_path.iterdir()) == []
    store.setup()
    store.setup()
    assert store.list() == [] and (tmp_path / "new" / "phrases.db").exists()
    store.close()


def test_a_server_that_does_not_answer_is_waited_for(impatient: None) -> None:
    with PhraseStore("postgresql+psycopg://nobody@127.0.0.1:1/phrases") as store:
        with pytest.raises(StoreUnavailableError, match="cannot be used"):
            store.setup()
        with pytest.warns(RuntimeWarning, match="cannot be read.*generation goes on") as caught:
            pool = store.open("a", fingerprint="f")
            pool.add([1, 2, 3])
            store.flush()
        assert len(caught) == 1 and pool.match([1]) == [Phrase((2, 3), 1)]
        assert store._writer.runs.waiting() == 1
        with pytest.raises(StoreUnavailableError):
            store.list()


# On an event loop


async def test_all_there_is_can_be_awaited(any_url: str) -> None:
    async with AsyncPhraseStore(any_url) as store:
        await store.setup()
        pool = await store.open("a", fingerprint="f")
        for number in range(1200):
            pool.add([1, number])
        pool.remember({"m/1": b"x"})
        await store.flush()
        await store.refresh()
        assert await store.copy("a", "b") == await store.merge("b", "c") == await store.rename("c", "d") == 1200
        runs = [run async for run in store.export("a")]
        assert sorted(run.token_ids for run in runs) == [(1, number) for number in range(1200)]
        assert [note.name async for note in store.export_notes("a")] == ["m/1"]
        assert await store.delete("a") == 1200 and await store.import_(runs) == 1200
        assert await store.prune("a", max_runs=7) == 1193
        assert (await store.stats("a")).runs == 7 and len(await store.list()) == 3
        assert await store.check() == []


async def test_a_locked_database_does_not_hold_up_the_loop(url: str, impatient: None) -> None:
    remember(url, "a", [1, 2, 3])
    async with AsyncPhraseStore(url) as store:
        pool = await store.open("a", fingerprint="f")
        lock = sqlite3.connect(path_of(url), isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        pool.add([4, 5, 6])
        with pytest.warns(RuntimeWarning, match="locked"):
            flushed = asyncio.create_task(store.flush())
            turns = 0
            while not flushed.done():
                turns += 1
                await asyncio.sleep(0)
        assert turns > 10
        lock.close()


# What a review found


def test_deleted_scopes_leave_nothing_between_the_rows_of_others(url: str) -> None:
    """Many small flushes to scopes side by side split pages, whose unused parts keep copies of rows."""
    random = Random(0)
    with PhraseStore(url, scope_quota=3000) as store:
        for turn in range(250):
            number = random.randrange(12)
            pool = store.open(f"scope:{number}", fingerprint="f")
            pool.add([(0xA0 + number) << 24 | random.randrange(1 << 20) for _ in range(random.randrange(3, 160))])
            pool.remember({f"m/{turn}/{part}": bytes([200 + number]) * 64 for part in range(5)})
            store.flush()
        for number in range(6):
            store.delete(f"scope:{number}")
        data = b"".join(path.read_bytes() for path in path_of(url).parent.iterdir())
    for number in range(12):
        tokens = re.compile(rb"(?:..[\x00-\x0f]%c){3}" % (0xA0 + number), re.DOTALL)
        noted = bytes([200 + number]) * 16 in data
        assert (noted, bool(tokens.search(data))) == (number >= 6, number >= 6), number


@pytest.mark.parametrize("url", ["postgresql+psycopg://h/db?user=u&password=SECRET", "postgresql://u:SECRET@h/db"])
def test_passwords_are_not_shown(url: str) -> None:
    with PhraseStore(url) as store:
        assert "SECRET" not in repr(store) and re.search("hidden|[*]{3}", repr(store))


def test_nothing_is_written_to_an_ephemeral_scope_by_other_ways(url: str) -> None:
    remember(url, "a", [1, 2, 3])
    with PhraseStore(url, ephemeral=["secret"]) as store:
        record = StoredRun("secret", "f", (1, 2), 1, NOW, NOW)
        for change in (
            lambda: store.copy("a", "secret"),
            lambda: store.merge("a", "secret"),
            lambda: store.rename("a", "secret"),
            lambda: store.import_([record]),
        ):
            with pytest.raises(OptionError, match="'secret' is in memory only"):
                change()
        assert [scope.scope for scope in store.list()] == ["a"]


def test_quotas_hold_for_merged_and_imported_scopes_too(any_url: str) -> None:
    remember(any_url, "a", *([number] * 10 for number in range(9)))
    remember(any_url, "b", *([100 + number] * 10 for number in range(9)))
    with PhraseStore(any_url, scope_quota=100) as store:
        store.merge("a", "b")
        assert 0 < store.stats("b").tokens <= 100 and store.stats("a").tokens == 90
        store.import_(replace(run, scope="c") for scope in "ab" for run in store.export(scope))
        assert 0 < store.stats("c").tokens <= 100


def test_a_write_that_takes_long_is_read_when_it_is_done(any_url: str) -> None:
    """On PostgreSQL ids are given before rows can be seen, so that later ids may be seen earlier."""
    with PhraseStore(any_url) as ours, PhraseStore(any_url) as theirs:
        pool, late = ours.open("a", fingerprint="f"), theirs.open("a", fingerprint="f")
        late.add([1, 2, 3])
        put = theirs._writer.put

        def slow(*arguments: Any, **named: Any) -> Any:
            found = put(*arguments, **named)
            if any_url.startswith("postgresql"):
                remember(any_url, "b", [7, 8, 9])
                ours.open("a", fingerprint="f")
            return found

        theirs._writer.put = slow  # type: ignore[method-assign]
        theirs.flush()
        assert ours.open("a", fingerprint="f") is pool and pool.match([1]) == [Phrase((2, 3), 1)]


def test_a_server_that_never_answers_is_not_asked_every_turn(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    class ConnectionTimeout(Exception):
        pass

    attempts = []

    def connect(*_: object) -> None:
        attempts.append(1)
        raise OperationalError("connect", {}, ConnectionTimeout("timeout expired"))

    with PhraseStore("postgresql+psycopg://u@localhost/db") as store:
        monkeypatch.setattr(store._database, "_once", connect)
        with pytest.warns(RuntimeWarning, match="timeout expired") as caught:
            for number in range(5):
                store.open("a", fingerprint="f").add([1, 2, number])
                store.flush()
        assert (len(caught), len(attempts)) == (1, 1)
        assert store.open("a", fingerprint="f").stats.runs == 5 and store._writer.runs.waiting() == 5
        monkeypatch.setattr("ouroboros_storage.outage.monotonic", lambda: 10**9)
        store.flush()
        assert len(attempts) == 2
        monkeypatch.undo()
        store._closed = True


async def test_a_store_for_an_event_loop_opens_nothing_at_once(url: str) -> None:
    remember(url, "a", [1, 2, 3])
    lock = sqlite3.connect(path_of(url), isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    store = AsyncPhraseStore(url)
    lock.close()
    assert (await store.open("a", fingerprint="f")).match([1]) == [Phrase((2, 3), 1)]
    await store.close()


def test_a_flush_within_another_use_of_the_database_is_left_for_later(url: str) -> None:
    """As when the garbage collector ends an abandoned stream there."""
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        pool.add([1, 2, 3])

        def collected(connection: object) -> int:
            store.flush()
            return store._writer.runs.waiting()

        assert store._ask(collected, write=True) == 1
        store.flush()
        assert store.stats().waiting == 0 and counts(url, "a") == {(1, 2, 3): 1}


def test_a_lone_name_is_no_collection_of_names(url: str) -> None:
    with pytest.raises(OptionError, match=r"ephemeral must be a sequence of scopes.* write \['conversation:42'\]"):
        PhraseStore(url, ephemeral="conversation:42")


def test_odd_values_are_errors_of_ours(url: str) -> None:
    remember(url, "a", [1, 2, 3])
    with PhraseStore(url) as store:
        with pytest.raises(OptionError, match="sources must name at least one scope"):
            store.merge([], "b")
        with pytest.raises(OptionError, match="token_ids must be whole numbers"):
            store.open("a", fingerprint="f").add([[1, 2, 3]])  # type: ignore[list-item]
        assert store.prune(max_age=timedelta.max) == 0
