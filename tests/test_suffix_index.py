from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouroboros_llm.phrase_pool.base import ANSWER
from ouroboros_llm.phrase_pool.memory import MemoryPool, Run
from ouroboros_llm.phrase_pool.suffix_index import ORDERS, Segment, suffix_hashes

TEXT = st.lists(st.sampled_from([-2, -1, 1, 2, 3, 2**32 - 1]), max_size=260)


def filled(token_ids: Sequence[int], sizes: Sequence[int]) -> Segment:
    """A segment to which `token_ids` were added in pieces of the given sizes."""
    segment, rest = Segment(300), [-1, *token_ids]
    for size in sizes:
        segment.append(rest[:size])
        rest = rest[size:]
    segment.append(rest)
    return segment


def brute_force(token_ids: Sequence[int], tail: Sequence[int]) -> list[int]:
    """The places after `tail`, the most recent first, where no border lies inside."""
    text, order = [-1, *token_ids], len(tail)
    return [
        place
        for place in range(len(text), order - 1, -1)
        if text[place - order : place] == list(tail) and not any(t < 0 for t in text[place - order + 1 : place])
    ]


@settings(max_examples=60)
@given(TEXT, st.lists(st.integers(1, 120), max_size=4))
def test_adding_many_is_adding_one_by_one(token_ids: list[int], sizes: list[int]) -> None:
    many, single = filled(token_ids, sizes), filled(token_ids, [1] * 300)
    assert many.token_ids == single.token_ids and many.length == single.length
    assert many._heads == single._heads and many._links == single._links


@settings(max_examples=60)
@given(TEXT, st.data())
def test_every_place_is_found(token_ids: list[int], data: st.DataObject) -> None:
    segment = filled(token_ids, data.draw(st.lists(st.integers(1, 120), max_size=4)))
    order = data.draw(st.sampled_from(ORDERS))
    tail = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=order, max_size=order))
    key = suffix_hashes(tail)[ORDERS.index(order)]
    agreeing = [place for place in segment.places(order, key) if segment.agreement(place, tail) >= order]
    wanted = brute_force(token_ids, tail)
    assert agreeing == wanted[: len(agreeing)]
    assert len(agreeing) == len(wanted) or len(wanted) > 30, "only a bound on the places looked at may cut the list"


def test_a_full_segment_takes_no_more() -> None:
    with pytest.raises(ValueError, match="at most 4"):
        Segment(4).append([1, 2, 3, 4, 5])


class TestMemoryPool:
    def test_a_million_tokens_stay_below_64_bytes_each(self) -> None:
        pool = MemoryPool(capacity=400_000)
        pool.add_all(Run(list(range(start, start + 200))) for start in range(0, 200_000, 200))
        assert pool.nbytes / pool.stats.tokens < 64
        for start in range(0, 100_000, 200):
            pool.add(list(range(start + 7, start + 207)))
        assert pool.nbytes / pool.stats.tokens < 64

    def test_adding_touches_no_earlier_segment(self) -> None:
        pool = MemoryPool()
        for start in range(0, 20_000, 100):
            pool.add(list(range(start, start + 100)))
        segments = [shelf.segment for shelf in pool._shelves]
        before = [(segment, list(segment.token_ids), [list(links) for links in segment._links]) for segment in segments]
        for start in range(50_000, 90_000, 100):
            pool.add(list(range(start, start + 100)))
        assert len(pool._shelves) > len(segments) > 2
        for segment, token_ids, links in before[:-1]:
            assert (list(segment.token_ids), [list(column) for column in segment._links]) == (token_ids, links)

    def test_the_oldest_runs_go_first(self) -> None:
        pool = MemoryPool(capacity=100)
        for start in range(0, 300, 10):
            pool.add(list(range(start, start + 10)))
        assert pool.stats.tokens <= 100
        assert pool.match([290]) and not pool.match([0])

    def test_a_run_that_comes_again_becomes_recent(self) -> None:
        pool = MemoryPool(capacity=5000)
        pool.add([1, 2, 30])
        for start in range(100, 1300, 10):
            pool.add([*range(start, start + 8), 1, 2, start])
        pool.add([1, 2, 30])
        first = pool.match([1, 2])[0]
        assert first.token_ids == (30,) and first.count == 2
        assert pool.stats.runs == 121

    def test_a_run_that_comes_again_and_again_does_not_fill_the_pool(self) -> None:
        pool = MemoryPool(capacity=2000)
        pool.add(list(range(5000, 5300)))
        for _ in range(3):
            for start in range(0, 1000, 100):
                pool.add(list(range(start, start + 100)))
        assert pool.stats.tokens <= 2000 and len(pool.match([50])) == 1
        assert sum(shelf.segment.length for shelf in pool._shelves) <= 4000

    def test_the_running_text_goes_on_across_segments(self) -> None:
        pool, text = MemoryPool(), [number % 611 for number in range(5000)]
        for start in range(0, 5000, 7):
            pool.extend(text[start : start + 7])
        assert len(pool._shelves) > 1 and pool.stats.tokens == 5000
        for end in (700, 1100, 2400, 4999):
            found = pool.match(text[end - 20 : end])
            assert found and found[0].match_length == 20 and found[0].token_ids[0] == text[end]

    def test_answers_are_found_by_how_they_begin(self) -> None:
        pool = MemoryPool()
        pool.add([5, 6, 7])
        pool.add([5, 9, 9], answer=False)
        assert [phrase.token_ids for phrase in pool.match([ANSWER])] == [(5, 6, 7)]
        assert [(phrase.token_ids, phrase.match_length) for phrase in pool.match([ANSWER, 5])] == [
            ((6, 7), 2),
            ((9, 9), 1),
        ]
        pool.add([5, 9, 9])
        assert {phrase.token_ids for phrase in pool.match([ANSWER])} == {(5, 6, 7), (5, 9, 9)}
