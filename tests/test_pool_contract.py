"""What every phrase pool promises, wherever it keeps its phrases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from databases import POSTGRES, needs_postgres
from hypothesis import given, settings
from hypothesis import strategies as st

from ouroboros_llm.phrase_pool import memory as memory_pool
from ouroboros_llm.phrase_pool.base import (
    ANSWER,
    ANSWERS,
    MATCH_LIMIT,
    PHRASE_LENGTH,
    AnswerIndex,
    NoteStore,
    Phrase,
    PhrasePool,
    PoolStats,
    run_key,
)
from ouroboros_llm.phrase_pool.memory import MemoryPool
from ouroboros_storage import PhraseStore

BACKENDS = [
    "memory",
    "sqlite-memory",
    "sqlite-file",
    "sqlite-reread",
    pytest.param("postgres", marks=needs_postgres),
]

Runs = Sequence[Sequence[int]]
Fill = Callable[[Runs], PhrasePool]


@pytest.fixture(params=BACKENDS)
def fill(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fill]:
    """Makes pools that hold the given runs; those of `sqlite-reread` and `postgres` come back from the database."""
    urls = {"sqlite-memory": "sqlite://", "postgres": POSTGRES}
    url = urls.get(request.param, f"sqlite:///{tmp_path}/phrases.db")

    def filled(runs: Runs) -> PhrasePool:
        if request.param == "memory":
            return add_all(MemoryPool(), runs)
        scope = f"test:{uuid4()}"
        pool = add_all(store.open(scope, fingerprint="f"), runs)
        if request.param not in ("sqlite-reread", "postgres"):
            return pool
        cleanup.callback(store.delete, scope)
        store.flush()
        with closing(PhraseStore(url)) as other:
            return other.open(scope, fingerprint="f")

    with ExitStack() as cleanup:
        if request.param != "memory":
            store = cleanup.enter_context(PhraseStore(url))
        yield filled


def add_all(pool: PhrasePool, runs: Runs) -> PhrasePool:
    for run in runs:
        pool.add(run)
    return pool


def follows(phrase: Phrase, tail: Sequence[int], run: Sequence[int]) -> bool:
    """Whether `run` really goes on with `phrase` after the part of `tail` that is said to match."""
    before = tuple(tail[len(tail) - phrase.match_length :])
    size = len(before) + len(phrase.token_ids)
    starts = [i for i in range(len(run) - size + 1) if tuple(run[i : i + size]) == before + phrase.token_ids]
    # Only the end of its run, or the bound, may cut a phrase short.
    return any(i + size == len(run) or len(phrase.token_ids) == PHRASE_LENGTH for i in starts)


def test_is_a_phrase_pool(fill: Fill) -> None:
    assert isinstance(fill([]), PhrasePool)


def test_an_empty_pool_matches_nothing(fill: Fill) -> None:
    pool = fill([])
    assert pool.match([1, 2, 3]) == []
    assert pool.match([]) == []
    assert pool.stats == PoolStats(runs=0, tokens=0)


@pytest.mark.parametrize("run", [[], [7]])
def test_runs_of_fewer_than_two_tokens_hold_no_phrase(fill: Fill, run: list[int]) -> None:
    pool = fill([run])
    assert pool.match([7]) == []
    assert pool.stats == PoolStats(runs=0, tokens=0)


def test_an_unknown_tail_matches_nothing(fill: Fill) -> None:
    pool = fill([[1, 2, 3], [4, 5, 6]])
    assert pool.match([9]) == []
    assert pool.match([1, 2, 9]) == []
    assert pool.match([]) == []


def test_the_last_token_of_a_run_is_followed_by_nothing(fill: Fill) -> None:
    assert fill([[1, 2, 3]]).match([1, 2, 3]) == []


@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_suffix_wins(fill: Fill, order: int) -> None:
    runs = [[1, 2, 3, 4, 50], [9, 2, 3, 4, 60], [8, 8, 3, 4, 70], [8, 8, 8, 4, 80]]
    found = fill(runs[::order]).match([1, 2, 3, 4])
    assert [(phrase.token_ids, phrase.match_length) for phrase in found] == [
        ((50,), 4),
        ((60,), 3),
        ((70,), 2),
        ((80,), 1),
    ]


def test_backs_off_to_shorter_suffixes(fill: Fill) -> None:
    pool = fill([[1, 2, 3, 4, 5]])
    assert pool.match([9, 9, 3]) == [Phrase((4, 5), match_length=1)]
    assert pool.match([9, 2, 3]) == [Phrase((4, 5), match_length=2)]
    assert pool.match([1, 2, 3]) == [Phrase((4, 5), match_length=3)]


def test_a_match_counts_up_to_its_limit(fill: Fill) -> None:
    run = list(range(100, 100 + 3 * MATCH_LIMIT))
    (phrase,) = fill([run]).match(run[:-2])
    assert phrase == Phrase(tuple(run[-2:]), match_length=MATCH_LIMIT)


def test_among_equal_matches_the_recent_one_is_first(fill: Fill) -> None:
    found = fill([[1, 2, 30], [1, 2, 40], [1, 2, 50]]).match([1, 2])
    assert [phrase.token_ids for phrase in found] == [(50,), (40,), (30,)]


def test_counts_how_often_a_run_was_added(fill: Fill) -> None:
    pool = fill([[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2, 3]])
    assert {phrase.token_ids: phrase.count for phrase in pool.match([1, 2])} == {(3,): 3, (4,): 1}
    assert pool.stats == PoolStats(runs=2, tokens=6)


def test_a_phrase_does_not_cross_the_border_of_its_run(fill: Fill) -> None:
    pool = fill([[1, 2, 3], [4, 5, 6]])
    assert [phrase.token_ids for phrase in pool.match([2])] == [(3,)]
    assert pool.match([2, 3]) == []
    assert pool.match([3, 4]) == [Phrase((5, 6), match_length=1)]


def test_a_phrase_has_a_bounded_length(fill: Fill) -> None:
    run = list(range(3 * PHRASE_LENGTH))
    assert fill([run]).match([0]) == [Phrase(tuple(run[1 : 1 + PHRASE_LENGTH]), match_length=1)]


def test_match_does_not_modify(fill: Fill) -> None:
    pool, tail = fill([[1, 2, 3], [1, 2, 4]]), [7, 1, 2]
    before, stats = pool.match(tail), pool.stats
    assert before
    for other in ([1, 2], [2], [9], []):
        pool.match(other)
    assert (pool.match(tail), pool.stats, tail) == (before, stats, [7, 1, 2])


def test_adding_keeps_no_reference_to_the_run(fill: Fill) -> None:
    run = [1, 2, 3]
    pool = fill([])
    pool.add(run)
    run[:] = [7, 8, 9]
    assert pool.match([1]) == [Phrase((2, 3), match_length=1)]


def test_answers_are_found_by_how_they_begin(fill: Fill) -> None:
    pool = fill([[5, 6, 7], [8, 6, 9]])
    assert [phrase.token_ids for phrase in pool.match([ANSWER])] == [(8, 6, 9), (5, 6, 7)]
    assert [(phrase.token_ids, phrase.match_length) for phrase in pool.match([ANSWER, 5, 6])] == [((7,), 3), ((9,), 1)]


def test_runs_of_the_middle_are_no_beginnings(fill: Fill) -> None:
    pool = fill([[5, 6, 7]])
    pool.add([5, 8, 9], answer=False)
    assert [phrase.token_ids for phrase in pool.match([ANSWER])] == [(5, 6, 7)]
    pool.add([5, 8, 9])
    assert {phrase.token_ids for phrase in pool.match([ANSWER])} == {(5, 6, 7), (5, 8, 9)}


def test_notes_are_kept_by_name(fill: Fill) -> None:
    pool = fill([[1, 2]])
    assert isinstance(pool, NoteStore) and pool.recall("") == {}
    pool.remember({"a/1": b"x", "a/2": b"y", "b/1": b"z"})
    pool.remember({"a/2": b""})
    assert pool.recall("a/") == {"a/1": b"x", "a/2": b""} and pool.recall("c") == {}


def test_notes_may_point_to_runs(fill: Fill) -> None:
    runs = [[5, 6, 7], [5, 6], [2**32 - 1, 2**31], [7] * 3000]
    pool = fill([*runs, [5, 6]])
    assert isinstance(pool, AnswerIndex)
    for prefix in ("x/", ANSWERS):
        assert pool.noted_run(prefix + "0") == ()
        notes = {f"{prefix}{number}": run_key(run) for number, run in enumerate([*runs, [6, 7]])}
        pool.remember(notes | {prefix + "empty": b""})
        assert pool.recall(prefix) == notes | {prefix + "empty": b""}
        assert [pool.noted_run(name) for name in notes] == [*map(tuple, runs), ()]
        assert pool.noted_run(prefix + "empty") == pool.noted_run(prefix + "5") == ()


def test_stats_count_runs_and_tokens(fill: Fill) -> None:
    assert fill([[1, 2, 3], [4, 5], [4, 5], [6]]).stats == PoolStats(runs=2, tokens=5)


def test_token_ids_may_be_large(fill: Fill) -> None:
    run = [0, 2**31 - 1, 2**31, 2**32 - 1, 5]
    pool = fill([run])
    assert pool.match([2**31]) == [Phrase((2**32 - 1, 5), match_length=1)]
    assert pool.match(run[:-1]) == [Phrase((5,), match_length=4)]


@settings(max_examples=60)
@given(
    runs=st.lists(st.lists(st.integers(0, 3), max_size=2 * MATCH_LIMIT), max_size=6),
    tail=st.lists(st.integers(0, 3), max_size=2 * MATCH_LIMIT),
)
def test_every_phrase_continues_a_run(fill: Fill, runs: list[list[int]], tail: list[int]) -> None:
    found = fill(runs).match(tail)
    for phrase in found:
        assert 1 <= phrase.match_length <= MATCH_LIMIT
        assert 1 <= len(phrase.token_ids) <= PHRASE_LENGTH
        sources = [run for run in runs if follows(phrase, tail, run)]
        assert phrase.count in {runs.count(run) for run in sources}
    lengths = [phrase.match_length for phrase in found]
    assert lengths == sorted(lengths, reverse=True)
    assert bool(found) == any(tail[-1:] == [token] for run in runs for token in run[:-1])


def test_an_addition_in_the_middle_of_an_addition_is_taken_in_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the garbage collector ends an abandoned stream there."""
    pool, begin, nested = MemoryPool(), memory_pool._Shelf.begin, [[7, 8, 9], [4, 5, 6]]

    def interrupted(self: Any, run: Any, key: bytes) -> int:
        if nested:
            pool.add(nested.pop())
        return begin(self, run, key)

    monkeypatch.setattr(memory_pool._Shelf, "begin", interrupted)
    pool.add([1, 2, 3])
    assert pool.stats == PoolStats(runs=3, tokens=9)
    assert [pool.match([first])[0].token_ids for first in (1, 4, 7)] == [(2, 3), (5, 6), (8, 9)]
