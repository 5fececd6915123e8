from __future__ import annotations

import json

import pytest
from conftest import blend
from hypothesis import given
from hypothesis import strategies as st

from ouroboros_llm import MemoryPool
from ouroboros_llm.decoding.decoder import prefill_cost
from ouroboros_llm.decoding.draft_tree import DraftTree
from ouroboros_llm.decoding.drafter import Budget, Drafter, NoDrafts, Round
from ouroboros_llm.drafting.calibration import Calibration, Estimate
from ouroboros_llm.drafting.cost_gate import CostGatedDrafter, CostTracker
from ouroboros_llm.drafting.learned_state import LearnedState, sources
from ouroboros_llm.drafting.phrases import rejected_but_right
from ouroboros_llm.drafting.token_recycling import Recycling, SuccessorTable, decode, encode
from ouroboros_llm.drafting.tree_drafter import TreeDrafter, WidthChoice

pytestmark = pytest.mark.clock

WIDE = Budget(width=64, depth=100)


def drafter(*runs: list[int]) -> TreeDrafter:
    pool = MemoryPool()
    for run in runs:
        pool.add(run)
    return blend(pool)


def paths(draft: DraftTree) -> set[tuple[int, ...]]:
    """Token paths from the root to every leaf, without the root."""
    inner = set(draft.parents)
    leaves = [node for node in range(draft.width) if node not in inner]
    return {tuple(draft.token_ids[node] for node in draft.path_to(leaf)[1:]) for leaf in leaves}


def test_drafters_meet_the_protocol() -> None:
    assert isinstance(NoDrafts(), Drafter) and isinstance(TreeDrafter([]), Drafter)


def test_a_known_run_is_drafted_to_its_end() -> None:
    assert paths(drafter([1, 2, 3, 4, 5, 6]).draft([9, 1, 2], WIDE)) == {(3, 4, 5, 6)}


def test_alternatives_are_verified_side_by_side() -> None:
    assert paths(drafter([1, 2, 3, 4], [1, 2, 7, 8]).draft([1, 2], WIDE)) == {(3, 4), (7, 8)}


def test_the_running_text_is_a_pool() -> None:
    drafter = blend()
    drafter.open([1, 2, 3, 4, 9, 2])
    draft = drafter.draft([1, 2, 3, 4, 9, 2], WIDE)
    assert (3, 4, 9, 2) in paths(draft) and set(draft.sources[1:]) == {"text"}
    drafter.learn(Round(DraftTree.root(2), (3, 8, 2), (0, 0, 0), (3,)))
    assert {path[0] for path in paths(drafter.draft([1, 2, 3, 4, 9, 2, 3, 8, 2], WIDE))} == {3}


def test_longer_matches_come_first() -> None:
    draft = drafter([5, 1, 2, 3], [6, 1, 2, 4], [1, 2, 4]).draft([6, 1, 2], Budget(width=2, depth=10))
    assert draft.token_ids == (2, 4)


def test_nothing_known_is_no_draft() -> None:
    assert drafter([1, 2, 3]).draft([7, 8], WIDE) == DraftTree.root(8)


def test_a_warm_scope_drafts_how_answers_begin() -> None:
    pool = MemoryPool()
    pool.add([30, 31, 32])
    pool.add([40, 41, 42], answer=False)
    drafter = blend(write=pool)
    drafter.open([1, 2])
    assert paths(drafter.draft([1, 2], WIDE)) == {(30, 31, 32)}


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


@given(st.lists(st.floats(0, 1), max_size=63), st.floats(0, 1), st.floats(0, 0.1))
def test_the_best_width_is_the_best(chances: list[float], slope: float, curve: float) -> None:
    chances = sorted(chances, reverse=True)
    budget = Budget(64, 64, cost=lambda width: 1 + slope * (width - 1) + curve * (width > 16) * (width - 16))
    rates = [(1 + sum(chances[: width - 1])) / budget.cost(width) for width in range(1, len(chances) + 2)]
    choice = WidthChoice(budget)
    for chance in chances:
        if not choice.add(chance):
            break
    assert rates[choice.best - 1] == pytest.approx(max(rates))


def test_nodes_beside_a_prompt_cost_what_the_last_ones_of_a_wide_draft_do() -> None:
    """A decoding pass waits for memory, so its first nodes are nearly free; a prefill does not wait."""
    cost = prefill_cost(lambda width: 1.0 if width <= 32 else 1.0 + (width - 32) / 32)
    assert [cost(width) for width in (1, 2, 33)] == [1.0, 1 + 1 / 32, 2.0]


def judged(estimate: Estimate, hit: bool) -> Round:
    draft = DraftTree((1, 5), (-1, 0), (1.0, 0.5), ("", "a"), (None, estimate))
    return Round(draft, (5, 9) if hit else (2,), (0, 1) if hit else (0,), (5 if hit else 2, 9))


def estimate(calibration: Calibration, kind: str = "x") -> Estimate:
    value = calibration.log_odds(("a", kind), prior=0.5)
    calibration.weights(("a", 0))
    return Estimate(0.5, (("a", kind),), (value,), ("a", 0))


def test_calibration_learns_how_often_guesses_hold() -> None:
    calibration = Calibration()
    drafter = TreeDrafter([], calibration)
    assert calibration.chance(("a", "x"), prior=0.5) == 0.5
    for _ in range(2000):
        drafter.learn(judged(estimate(calibration), hit=True))
    assert calibration.chance(("a", "x"), prior=0.5) > 0.95
    for _ in range(4000):
        drafter.learn(judged(estimate(calibration), hit=False))
    assert calibration.chance(("a", "x"), prior=0.5) < 0.05, "old observations fade"


def test_opinions_are_weighed_by_what_they_were_worth() -> None:
    """Of two sources that contradict each other, the one that is right is believed."""
    calibration = Calibration()
    situation = ("liar+seer", 3)
    before = list(calibration.weights(situation))
    for number in range(400):
        right = number % 3 == 0
        inputs = (1.0, 2.0 if right else -2.0)
        calibration.learn(Estimate(0.5, (("liar",), ("seer",)), inputs, situation), right)
    after = calibration.weights(situation)
    assert after[1] > before[1] and after[0] < before[0]


def test_guesses_behind_a_rejected_one_are_not_counted() -> None:
    calibration = Calibration()
    first, second = estimate(calibration, "first"), estimate(calibration, "second")
    draft = DraftTree((1, 5, 6), (-1, 0, 1), (1.0, 0.5, 0.5), ("", "a", "a"), (None, first, second))
    TreeDrafter([], calibration).learn(Round(draft, (2,), (0,), (2, 6, 7)))
    assert calibration.chance(("a", "first"), 0.5) < 0.5
    assert calibration.chance(("a", "second"), 0.5) == 0.5


def test_calibration_can_be_kept() -> None:
    calibration = Calibration()
    for number in range(50):
        TreeDrafter([], calibration).learn(judged(estimate(calibration), hit=number % 5 > 0))
    kept = Calibration.from_bytes(calibration.to_bytes())
    assert kept.chance(("a", "x"), 0.1) == pytest.approx(calibration.chance(("a", "x"), 0.1), abs=1e-3)
    assert list(kept.weights(("a", 0))) == pytest.approx(list(calibration.weights(("a", 0))), abs=1e-3)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[]", b"{}", json.dumps({"version": 1, "counts": [[1]], "weights": []}).encode()]
)
def test_calibration_that_cannot_be_read_is_begun_anew(data: bytes) -> None:
    assert Calibration.from_bytes(data).chance(("a",), 0.25) == 0.25


def test_weights_of_another_number_of_sources_are_left_out() -> None:
    data = json.dumps({"version": 1, "counts": [], "weights": [[["a+b", 1], [1.0]], [["a", 1], [0.5, 0.1]]]}).encode()
    kept = Calibration.from_bytes(data)
    assert len(kept.weights(("a+b", 1))) == 3 and list(kept.weights(("a", 1))) == [0.5, 0.1]


class TestRecycling:
    def test_what_the_target_said_of_rejected_nodes_is_guessed(self) -> None:
        source = Recycling()
        draft = DraftTree((1, 5, 6), (-1, 0, 0), (1.0, 0.5, 0.5), ("", "a", "a"), (None, None, None))
        source.learn(Round(draft, (5, 8), (0, 1), (5, 8, 7), (((5, 0.9),), ((8, 0.6), (9, 0.3)), ((7, 0.5),))))
        found = TreeDrafter([source]).draft([6], WIDE)
        assert found.token_ids[:2] == (6, 7) and found.sources[1] == "recycling"
        assert source.guesses(source.start([5])).by_token.keys() == {8, 9}

    def test_the_accepted_context_wins_over_rejected_ones(self) -> None:
        source = Recycling()
        draft = DraftTree((1, 4, 5, 5), (-1, 0, 0, 1), (1.0,) * 4, ("", "a", "a", "a"), (None,) * 4)
        successors = (((5, 1.0),), ((5, 1.0),), ((8, 1.0),), ((9, 1.0),))
        source.learn(Round(draft, (5, 8), (0, 2), (5, 5, 8, 9), successors))
        assert source.table.get(5) == ((8, 1.0),)

    def test_observations_are_averaged_where_the_target_samples(self) -> None:
        source = Recycling(sampling=True)
        for successors in (((7, 0.8), (8, 0.2)), ((7, 0.4), (9, 0.6))):
            source.learn(Round(DraftTree.root(1), (7,), (0,), (7,), (successors,)))
        assert dict(source.table.get(1)) == pytest.approx({7: 0.6, 8: 0.1, 9: 0.3})

    def test_averages_go_on_from_what_was_kept(self) -> None:
        table, other = SuccessorTable(), SuccessorTable()
        table.average(1, ((7, 0.8), (8, 0.2)))
        other.load(table.take_changed())
        other.average(1, ((7, 0.4), (9, 0.6)))
        assert dict(other.get(1)) == pytest.approx({7: 0.6, 8: 0.1, 9: 0.3})

    def test_the_table_is_bounded(self) -> None:
        table = SuccessorTable(capacity=3)
        for token_id in (1, 2, 3, 1, 4):
            table.set(token_id, ((9, 0.5),))
        assert [token_id for token_id in range(6) if table.get(token_id)] == [1, 3, 4]

    def test_only_what_changed_is_kept(self) -> None:
        table = SuccessorTable()
        table.set(1, ((2, 0.5), (3, 0.25)))
        table.set(4, ((5, 0.5),))
        first = table.take_changed()
        table.set(4, ((6, 0.5),))
        assert set(first) == {1, 4} and set(table.take_changed()) == {4} and table.take_changed() == {}
        other = SuccessorTable()
        other.load(first)
        assert other.get(1) == ((2, 0.5), (3, 0.25)) and other.take_changed() == {}

    @given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.floats(0, 1, width=32)), max_size=8))
    def test_successors_survive_being_kept(self, successors: list[tuple[int, float]]) -> None:
        assert decode(encode(successors)) == tuple(successors)
        assert decode(encode(successors) + b"x") == ()


class TestMemory:
    def test_what_was_learned_is_kept_with_the_pool_by_model(self) -> None:
        pool = MemoryPool()
        memory = LearnedState()
        memory.successors.set(7, ((8, 0.5),))
        TreeDrafter([], memory.calibration).learn(judged(estimate(memory.calibration), hit=True))
        memory.remember(pool, "model-a")
        again, other = LearnedState.recall(pool, "model-a"), LearnedState.recall(pool, "model-b")
        assert again.successors.get(7) == ((8, 0.5),) and other.successors.get(7) is None
        assert again.calibration.chance(("a", "x"), 0.5) > 0.5 == other.calibration.chance(("a", "x"), 0.5)

    def test_sources_are_those_that_were_named(self) -> None:
        def names(*drafters: str) -> list[str]:
            pool = MemoryPool()
            found = sources(drafters, LearnedState(), write=pool, read=[MemoryPool()], documents=MemoryPool())
            return [source.name for source in found]

        assert names("phrases") == ["text", "phrases", "shared"]
        assert names("recycling") == ["recycling"] and names("retrieval") == ["retrieval"]
        assert names("retrieval", "recycling", "phrases") == ["text", "phrases", "shared", "retrieval", "recycling"]
        assert names() == []


def test_equal_guesses_are_one_node() -> None:
    pool, memory = MemoryPool(), LearnedState()
    pool.add([1, 2, 3])
    memory.successors.set(2, ((3, 0.9), (4, 0.1)))
    both = TreeDrafter(sources(["phrases", "recycling"], memory, read=[pool]), memory.calibration)
    draft = both.draft([1, 2], WIDE)
    assert sorted(draft.token_ids[1:]) == [3, 4]
    alone = TreeDrafter(sources(["recycling"], memory), memory.calibration).draft([1, 2], WIDE)
    assert draft.chances[draft.token_ids.index(3)] != alone.chances[alone.token_ids.index(3)]


def test_origins_say_who_drafted_every_token() -> None:
    draft = DraftTree((1, 2, 3, 9), (-1, 0, 1, 0), (1.0,) * 4, ("", "text", "recycling", "text"), (None,) * 4)
    likeliest = (2, 3, 4, 0)
    assert Round(draft, (2, 3, 4), (0, 1, 2), likeliest).origins == ("text", "recycling", "bonus")
    assert Round(draft, (2, 7), (0, 1), likeliest).origins == ("text", "recovered")
    assert Round(draft, (5,), (0,), likeliest).origins == ("recovered",)
    assert Round(DraftTree.root(1), (5,), (0,), (5,)).origins == ("bonus",)
    assert Round(draft, (), (), likeliest).origins == ()


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
    drafter = blend(write=pool)
    drafter.open([1, 2, 3, 4, 5, 6])
    assert pool.stats.tokens == 0
    drafter.learn(Round(DraftTree.chain([1, 10, 11, 12]), (7,), (0,), (7, 11, 12, 99)))
    assert pool.match([10])[0].token_ids == (11, 12, 99)


def test_a_draft_model_is_asked_as_long_as_it_pays() -> None:
    worth = CostTracker()
    for _ in range(8):
        assert worth.pays(1.0, pass_seconds=1.0), "it gets a few rounds to show what it can"
        worth.spent(0.5)
        worth.gained(3)
    assert worth.pays(1.9, 1.0) and not worth.pays(2.1, 1.0), "3 tokens in 1.5 are as good as 2 in 1"
    asked = [worth.pays(2.5, 1.0) for _ in range(200)]
    assert 0 < sum(asked) < 20, "now and then it gets another chance"


class Chains:
    """Always drafts the same chain of three."""

    def open(self, context: object) -> None:
        pass

    def draft(self, context: object, budget: Budget) -> DraftTree:
        return DraftTree.chain([1, 2, 3, 4], "chains")

    def learn(self, round: Round) -> None:
        pass


@pytest.mark.parametrize("accepted", [0, 3])
def test_drafts_are_made_while_they_pay(accepted: int) -> None:
    """A pass over four takes as long as one and a half; four tokens are worth that, one is not."""
    drafter, made = CostGatedDrafter(Chains(), pass_seconds=lambda: 1000.0), 0
    budget = Budget(64, 50, cost=lambda width: 1.0 + (width > 1) / 2)
    for _ in range(200):
        draft = drafter.draft([1], budget)
        made += draft.width > 1
        token_ids, path = ((2, 3, 4, 5), (0, 1, 2, 3)) if accepted and draft.width > 1 else ((9,), (0,))
        drafter.learn(Round(draft, token_ids, path, (2,) * draft.width))
    assert made == 200 if accepted else made < 40


def test_drafts_of_a_fixed_width_are_always_made() -> None:
    drafter = CostGatedDrafter(Chains(), pass_seconds=lambda: 1e-9)
    for _ in range(50):
        draft = drafter.draft([1], WIDE)
        drafter.learn(Round(draft, (9,), (0,), (2,) * 4))
        assert draft.width == 4
