from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros_llm import MemoryPool
from ouroboros_llm.draft_tree import DraftTree
from ouroboros_llm.drafting.base import Budget, Drafter, NoDrafts, Round
from ouroboros_llm.drafting.budget import best_width
from ouroboros_llm.drafting.calibration import Calibration
from ouroboros_llm.drafting.draft_model import Worth
from ouroboros_llm.drafting.phrases import PhraseDrafter, rejected_but_right

WIDE = Budget(width=64, depth=100)


def drafter(*runs: list[int]) -> PhraseDrafter:
    pool = MemoryPool()
    for run in runs:
        pool.add(run)
    return PhraseDrafter([pool])


def paths(draft: DraftTree) -> set[tuple[int, ...]]:
    """Token paths from the root to every leaf, without the root."""
    inner = set(draft.parents)
    leaves = [node for node in range(draft.width) if node not in inner]
    return {tuple(draft.token_ids[node] for node in draft.path_to(leaf)[1:]) for leaf in leaves}


def test_drafters_meet_the_protocol() -> None:
    assert isinstance(NoDrafts(), Drafter) and isinstance(PhraseDrafter(), Drafter)


def test_a_known_run_is_drafted_to_its_end() -> None:
    assert paths(drafter([1, 2, 3, 4, 5, 6]).draft([9, 1, 2], WIDE)) == {(3, 4, 5, 6)}


def test_alternatives_are_verified_side_by_side() -> None:
    assert paths(drafter([1, 2, 3, 4], [1, 2, 7, 8]).draft([1, 2], WIDE)) == {(3, 4), (7, 8)}


def test_the_running_text_is_a_pool() -> None:
    drafter = PhraseDrafter()
    drafter.open([1, 2, 3, 4, 9, 2])
    assert (3, 4, 9, 2) in paths(drafter.draft([1, 2, 3, 4, 9, 2], WIDE))
    drafter.learn(Round(DraftTree.root(2), (3, 8, 2), (0, 0, 0), (3,)))
    assert {path[0] for path in paths(drafter.draft([1, 2, 3, 4, 9, 2, 3, 8, 2], WIDE))} == {3}


def test_longer_matches_come_first() -> None:
    draft = drafter([5, 1, 2, 3], [6, 1, 2, 4], [1, 2, 4]).draft([6, 1, 2], Budget(width=2, depth=10))
    assert draft.token_ids == (2, 4)


def test_nothing_known_is_no_draft() -> None:
    assert drafter([1, 2, 3]).draft([7, 8], WIDE) == DraftTree.root(8)


def test_budgets_are_kept() -> None:
    known = drafter(list(range(1, 60)), [1, 2, 9, 9, 9], [1, 2, 8, 8])
    for width in (1, 2, 3, 10, 64):
        for depth in (1, 2, 7):
            draft = known.draft([1, 2], Budget(width, depth))
            assert draft.width <= width and max(draft.depths) <= depth


def test_dear_passes_make_narrow_drafts() -> None:
    known = drafter(*[[1, 2, number, number] for number in range(3, 20)])
    cheap = known.draft([1, 2], Budget(64, 50, cost=lambda width: 1.0 + 0.001 * width))
    dear = known.draft([1, 2], Budget(64, 50, cost=lambda width: float(width)))
    assert cheap.width > 10 and dear.width == 1


@given(st.lists(st.floats(0, 1), max_size=63), st.floats(0, 1))
def test_the_best_width_is_the_best(chances: list[float], slope: float) -> None:
    chances = sorted(chances, reverse=True)
    budget = Budget(64, 64, cost=lambda width: 1 + slope * (width - 1))
    rates = [(1 + sum(chances[: width - 1])) / budget.cost(width) for width in range(1, len(chances) + 2)]
    assert rates[best_width(chances, budget) - 1] == pytest.approx(max(rates))


def test_calibration_learns_how_often_guesses_hold() -> None:
    calibration = Calibration()
    assert calibration.chance("x", prior=0.5) == 0.5
    right = DraftTree((1, 2, 3), (-1, 0, 0), (1.0, 0.5, 0.5), ("", "a", "b"), (None, "x", "x"))
    for _ in range(2000):
        calibration.learn(Round(right, (2, 9), (0, 1), (2, 9, 9)), "a")
    assert calibration.chance("x", prior=0.5) > 0.95
    wrong = DraftTree((1, 5), (-1, 0), (1.0, 0.5), ("", "a"), (None, "x"))
    for _ in range(2000):
        calibration.learn(Round(wrong, (2,), (0,), (2, 9)), "a")
    assert calibration.chance("x", prior=0.5) < 0.05, "old observations fade"


def test_guesses_behind_a_rejected_one_are_not_counted() -> None:
    calibration = Calibration()
    draft = DraftTree((1, 5, 6), (-1, 0, 1), (1.0, 0.5, 0.5), ("", "a", "a"), (None, "first", "second"))
    calibration.learn(Round(draft, (2,), (0,), (2, 6, 7)), "a")
    assert calibration.chance("first", 0.5) < 0.5
    assert calibration.chance("second", 0.5) == 0.5


def test_rejected_but_right_runs() -> None:
    """0 -> 10 -> 11 -> 12 is rejected at 10, but the target agrees with what follows it."""
    draft = DraftTree.chain([1, 10, 11, 12, 13])
    round = Round(draft, (7,), (0,), (7, 11, 12, 99, 5))
    assert rejected_but_right(round) == [(10, 11, 12, 99)]


def test_accepted_nodes_and_short_runs_are_no_rejected_runs() -> None:
    draft = DraftTree.chain([1, 10, 11, 12])
    assert rejected_but_right(Round(draft, (10, 11, 12, 4), (0, 1, 2, 3), (10, 11, 12, 4))) == []
    assert rejected_but_right(Round(draft, (7,), (0,), (7, 30, 31, 32))) == []


def test_rejected_runs_are_learned_but_not_prompts() -> None:
    pool = MemoryPool()
    phrases = PhraseDrafter([pool], write=pool)
    phrases.open([1, 2, 3, 4, 5, 6])
    assert pool.stats.tokens == 0
    phrases.learn(Round(DraftTree.chain([1, 10, 11, 12]), (7,), (0,), (7, 11, 12, 99)))
    assert pool.match([10])[0].token_ids == (11, 12, 99)


def test_a_draft_model_is_asked_as_long_as_it_pays() -> None:
    worth = Worth()
    for _ in range(8):
        assert worth.pays(1.0, pass_seconds=1.0), "it gets a few rounds to show what it can"
        worth.spent(0.5)
        worth.gained(3)
    assert worth.pays(1.9, 1.0) and not worth.pays(2.1, 1.0), "3 tokens in 1.5 are as good as 2 in 1"
    asked = [worth.pays(2.5, 1.0) for _ in range(200)]
    assert 0 < sum(asked) < 20, "now and then it gets another chance"
