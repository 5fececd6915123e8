"""Lookahead windows: the shape of the window, what it finds, that it changes no token, and that it must pay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from conftest import byte_tokenizer, plain, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from ouroboros_llm import MemoryPool, OptionError
from ouroboros_llm.decoding.decoder import Decoder
from ouroboros_llm.decoding.draft_tree import DraftTree, TreeBuilder
from ouroboros_llm.decoding.drafter import Budget, Drafter, NoDrafts, Round
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.drafting.calibration import Estimate
from ouroboros_llm.drafting.lookahead import NAME, LookaheadDrafter, WindowCostTracker, gained
from ouroboros_llm.drafting.phrases import PhraseSource, RunningText
from ouroboros_llm.drafting.tree_drafter import TreeDrafter
from ouroboros_llm.target_model.prepared import prepare
from ouroboros_llm.target_model.scripted import ScriptedTarget

PROMPTS = ("the cat sat on the mat, the cat sat on", "abcabcabcabc", "x", "def f(a):\n    return a\n\ndef f(a):\n" * 4)
TOKENS = 40
WIDE = Budget(width=64, depth=100)
CYCLE = 1009
AHEAD = [7 * number % CYCLE for number in (600, 450, 300, 200, 140, 100, 60, 30, 15, 7, 3, 0)]
"""Tokens that the target's walk comes by in reverse order, long after the prompt."""


class NotedPool:
    """A pool that keeps what was added in order."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, ...]] = []
        self._pool = MemoryPool(2000)
        self.match = self._pool.match

    def add(self, token_ids: Sequence[int], *, answer: bool = True) -> None:
        assert not answer, "an n-gram begins anywhere"
        self.runs.append(tuple(token_ids))
        self._pool.add(token_ids, answer=answer)

    @property
    def stats(self) -> object:
        return self._pool.stats


class Fixed:
    """Always drafts the same tree, cut to the budget."""

    def __init__(self, *paths: Sequence[int]) -> None:
        self._paths = paths

    def open(self, context: Sequence[int]) -> None:
        pass

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        builder = TreeBuilder(context[-1], budget.width)
        for path in self._paths:
            node: int | None = 0
            for token_id in path[: budget.depth]:
                node = builder.add(node, token_id, 0.5, "fixed", "evidence") if node is not None else None
        return builder.build()

    def learn(self, round: Round) -> None:
        pass


def lookahead(pool: NotedPool, window: int, length: int, worth: WindowCostTracker | None = None) -> LookaheadDrafter:
    """A window beside what a real drafter finds in the running text and in the window's own n-grams."""
    sources = [RunningText(), PhraseSource(NAME, pool, after="prompt")]
    return LookaheadDrafter(TreeDrafter(sources), pool, window=window, length=length, worth=worth)


def ids(prompt: str) -> list[int]:
    return list(byte_tokenizer()(prompt)["input_ids"])


def one_hot(token_id: int, vocabulary: int = CYCLE) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token_id), vocabulary).float()


def step(token_id: int) -> int:
    """A walk through all tokens that comes back only after `CYCLE` of them."""
    return (token_id + 7) % CYCLE


def rounds_of(drafter: Drafter, prompt: list[int], limit: int, **options: object) -> list[Round]:
    target = ScriptedTarget(lambda text: one_hot(step(text[-1])), **options)
    return list(
        Decoder(target, drafter, width=None if "costs" in options else 64).rounds(prompt, Sampler(), limit=limit)
    )


def test_the_protocol_and_the_options() -> None:
    assert isinstance(LookaheadDrafter(NoDrafts(), MemoryPool(), window=1, length=2), Drafter)
    for window, length in ((0, 4), (4, 1), (-1, 3)):
        with pytest.raises(OptionError, match="window must be at least 1 and length at least 2"):
            LookaheadDrafter(NoDrafts(), MemoryPool(), window=window, length=length)


@pytest.mark.parametrize(("window", "length"), [(1, 2), (1, 4), (3, 2), (3, 4), (5, 4), (7, 6)])
def test_the_window_is_the_papers(window: int, length: int) -> None:
    """Row j of column i sees row 0 of columns 0..i and rows 1..j of its own column, 1 + i + j tokens after the root."""
    drafter = LookaheadDrafter(NoDrafts(), NotedPool(), window=window, length=length)
    context = list(range(1000))  # no two tokens alike, so no two cells are one node
    drafter.open(context)
    draft = drafter.draft(context, WIDE)
    assert draft.width == 1 + window * (length - 1)
    cells = list(itertools.product(range(window), range(length - 1)))
    # Cells are told apart by their tokens: runs of the text, the latest first.
    nodes = {(i, j): draft.token_ids.index(1000 - (length - 1) * (1 + i) + j, 1) for i, j in cells}
    for i, j in cells:
        sees = {nodes[column, 0] for column in range(i + 1)} | {nodes[i, row] for row in range(j + 1)} | {0}
        assert set(draft.ancestor_mask[nodes[i, j]].nonzero()[0]) == sees
        assert draft.depths[nodes[i, j]] == 1 + i + j


@pytest.mark.parametrize("width", [None, 2, 5, 17, 64])
@pytest.mark.parametrize(("window", "length"), [(1, 2), (1, 5), (4, 2), (3, 3), (5, 4), (15, 5)])
def test_windows_change_no_token(window: int, length: int, width: int | None) -> None:
    harvested = 0
    for prompt in PROMPTS:
        wanted = plain(tiny_model(), ids(prompt), TOKENS)
        pool = NotedPool()
        decoder = Decoder(prepare(tiny_model()).start(), lookahead(pool, window, length), width=width)
        rounds = decoder.rounds(ids(prompt), Sampler(), limit=TOKENS, end_token_ids={2})
        assert [token_id for round in rounds for token_id in round.token_ids] == wanted, prompt
        harvested += len(pool.runs)
    assert harvested or (width is not None and width < length)


@pytest.mark.parametrize("architecture", ["gemma3_mixed", "mistral_sliding", "bloom_chains", "mamba_plain"])
def test_windows_change_no_token_of_other_models(architecture: str) -> None:
    for prompt in PROMPTS:
        wanted = plain(tiny_model(architecture), ids(prompt), TOKENS)
        for worth in (WindowCostTracker(), Always()):
            decoder = Decoder(prepare(tiny_model(architecture)).start(), lookahead(NotedPool(), 4, 3, worth))
            rounds = decoder.rounds(ids(prompt), Sampler(), limit=TOKENS, end_token_ids={2})
            assert [token_id for round in rounds for token_id in round.token_ids] == wanted


class Always(WindowCostTracker):
    def pays(self) -> bool:
        return True


def test_one_window_serves_several_texts() -> None:
    pool = NotedPool()
    drafter = lookahead(pool, 4, 3)
    for prompt in PROMPTS:
        rounds = Decoder(prepare(tiny_model()).start(), drafter, width=64).rounds(ids(prompt), Sampler(), limit=TOKENS)
        next(rounds)
        next(rounds)
        rounds.close()  # abandoned: the next text starts with a window of its own
    wanted = plain(tiny_model(), ids(PROMPTS[0]), TOKENS)
    rounds = Decoder(prepare(tiny_model()).start(), drafter, width=64).rounds(ids(PROMPTS[0]), Sampler(), limit=TOKENS)
    assert [token_id for round in rounds for token_id in round.token_ids] == wanted[:TOKENS]


def test_every_n_gram_ends_with_the_targets_own_choice() -> None:
    """The target's choice depends on all of the text, so only the right ancestors give the right token."""

    def choice(text: tuple[int, ...]) -> int:
        return sum(number * token_id for number, token_id in enumerate(text, 1)) * 31 % 101

    pool = NotedPool()
    drafter = LookaheadDrafter(NoDrafts(), pool, window=4, length=3)
    context, seen = [1, 2, 3, 4, 5, 6, 7, 8], 0
    decoder = Decoder(ScriptedTarget(lambda text: one_hot(choice(text))), drafter, width=64)
    for round in decoder.rounds(list(context), Sampler(), limit=30):
        columns = [run[:-1] for run in pool.runs[seen:]]
        for number, run in enumerate(pool.runs[seen:]):
            text = (*context, *(column[0] for column in columns[: number + 1]), *columns[number][1:])
            assert run[-1] == choice(text)
        seen = len(pool.runs)
        context += round.token_ids
    assert seen > 60


def test_columns_become_the_targets_own_continuations() -> None:
    pool = NotedPool()
    rounds = rounds_of(LookaheadDrafter(NoDrafts(), pool, window=4, length=4), [5, 90, 33, 60, 2, 9, 41, 77], 12)
    assert all(run[3] == step(run[2]) for run in pool.runs)
    assert all(len(round.token_ids) == 1 for round in rounds), "no column of this prompt is ever where the text is"
    # No column left the window, so after as many rounds as it has rows all of its tokens are the target's.
    settled = pool.runs[2 * 4 :]
    assert len(settled) > 20
    assert all((run[1], run[2], run[3]) == (step(run[0]), step(run[1]), step(run[2])) for run in settled)


def test_a_text_that_never_repeats_is_drafted() -> None:
    """Without a model, no other source can guess what follows here."""
    alone = rounds_of(TreeDrafter([RunningText()]), AHEAD, 200)
    with_window = rounds_of(lookahead(NotedPool(), 6, 4), AHEAD, 200)
    tokens = [token_id for round in with_window for token_id in round.token_ids]
    assert tokens == [token_id for round in alone for token_id in round.token_ids]
    assert len(set(tokens)) == len(tokens) and len(alone) > 190
    assert len(with_window) < 0.9 * len(alone)
    assert sum(map(gained, with_window)) > 0.9 * (len(tokens) - len(with_window))


@given(
    st.integers(1, 64),
    st.integers(0, 12),
    st.integers(1, 9),
    st.integers(2, 6),
    st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
)
def test_the_window_takes_the_room_that_is_left(
    width: int, depth: int, window: int, length: int, paths: list[list[int]], context: list[int]
) -> None:
    pool = NotedPool()
    inner, budget = Fixed(*paths), Budget(width, depth)
    drafter = LookaheadDrafter(inner, pool, window=window, length=length)
    drafter.open(context)
    alone, draft = inner.draft(context, budget), drafter.draft(context, budget)
    assert draft.width <= width and max(draft.depths) <= max(depth, 0)
    for column in ("token_ids", "parents", "chances", "sources", "evidence"):
        assert getattr(draft, column)[: alone.width] == getattr(alone, column), "the inner draft comes first, unchanged"
    assert set(draft.sources[alone.width :]) <= {NAME}
    children = list(zip(draft.parents, draft.token_ids, strict=True))
    assert len(set(children)) == len(children), "equal siblings are one node"
    drafter.learn(Round(draft, (1,), (0,), tuple(range(100, 100 + draft.width))))
    assert all(len(run) == length for run in pool.runs)
    room = min((width - alone.width) // (length - 1), depth - length + 2, window)
    assert len(pool.runs) >= room, "as many columns as fit"


@pytest.mark.parametrize(
    ("width", "emitted", "wanted"),
    [
        (64, 1, [(99, 502), (97, 504), (95, 506), (93, 508)]),
        (64, 2, [(97, 504), (95, 506), (93, 508)]),
        (64, 4, [(93, 508)]),
        (64, 9, []),
        (5, 1, [(99, 502), (97, 504), (92, 93)]),
        (5, 2, [(97, 504), (92, 93)]),
        (5, 3, [(92, 93)]),
        (1, 1, [(96, 97), (94, 95), (92, 93)]),
        (1, 3, [(92, 93)]),
    ],
)
def test_columns_stay_where_their_tokens_belong(width: int, emitted: int, wanted: list[tuple[int, int]]) -> None:
    """A round of m tokens moves the window m - 1 columns to the left; what was not drafted has not moved by itself."""
    drafter = LookaheadDrafter(NoDrafts(), NotedPool(), window=4, length=3)
    context = list(range(100))  # so the columns are (98, 99), (96, 97), (94, 95), (92, 93)
    drafter.open(context)
    draft = drafter.draft(context, Budget(width, 100))
    drafter.learn(Round(draft, (0,) * emitted, (0,) * emitted, tuple(range(500, 500 + draft.width))))
    assert drafter._columns == wanted
    drafter.draft([*context, *[0] * emitted], WIDE)
    assert drafter._columns[: len(wanted)] == wanted and len(drafter._columns) == 4


def test_a_round_that_emits_nothing_moves_nothing() -> None:
    drafter = LookaheadDrafter(NoDrafts(), NotedPool(), window=3, length=3)
    context = list(range(50))
    drafter.open(context)
    draft = drafter.draft(context, WIDE)
    drafter.learn(Round(draft, (), (), tuple(range(100, 100 + draft.width))))
    assert drafter.draft(context, WIDE) == draft


def test_a_draft_that_was_cut_is_harvested_as_far_as_it_goes() -> None:
    pool = NotedPool()
    drafter = LookaheadDrafter(NoDrafts(), pool, window=3, length=3)
    context = list(range(50))
    drafter.open(context)
    draft = drafter.draft(context, WIDE)
    cut = draft.subtree(range(5))
    drafter.learn(Round(cut, (7,), (0,), (100, 101, 102, 103, 104)))
    assert pool.runs == [(48, 49, 102), (46, 47, 104)]


def test_windows_are_deterministic_and_leave_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = NotedPool(), NotedPool()
    for pool in (first, second):
        rounds_of(lookahead(pool, 5, 4), [5, 90, 33, 60, 2, 9, 41, 77], 40)
    assert first.runs == second.runs
    assert torch.equal(before, torch.random.get_rng_state())


def windows(rounds: list[Round]) -> list[bool]:
    return [NAME in round.draft.sources for round in rounds]


def test_a_window_that_pays_stays() -> None:
    rounds = rounds_of(lookahead(NotedPool(), 6, 4), AHEAD, 150, costs=lambda width: 1 + width / 1e3)
    assert len(rounds) > 90 and all(windows(rounds[:-4]))


def test_a_window_that_does_not_pay_is_switched_off_and_tried_again() -> None:
    def noise(text: tuple[int, ...]) -> torch.Tensor:
        return one_hot(hash(text) % CYCLE)

    drafter = LookaheadDrafter(NoDrafts(), NotedPool(), window=4, length=3)
    decoder = Decoder(ScriptedTarget(noise, costs=lambda width: 1 + width / 10), drafter)
    tried = windows(list(decoder.rounds([1, 2, 3], Sampler(), limit=1300)))
    assert all(tried[:64]) and sum(tried) < 64 * 3
    assert not any(tried[70:1000]) and any(tried[1000:])


def test_worth_weighs_passes_saved_against_passes_widened() -> None:
    for gained_tokens, pays in ((17, False), (18, True)):
        worth = WindowCostTracker()
        for number in range(64):
            assert worth.pays()
            # 64 passes, each a fifth longer, take 12.8 passes; three of four gained tokens save one.
            worth.learn(0.2, number < gained_tokens)
        assert worth.pays() is pays


def test_only_what_nobody_else_guessed_is_the_windows_merit() -> None:
    def accepted(source: str, *kinds: tuple[object, ...]) -> int:
        evidence = Estimate(0.5, kinds, (0.0,) * len(kinds), ("x", 0)) if kinds else None
        draft = DraftTree((1, 2), (-1, 0), (1.0, 0.5), ("", source), (None, evidence))
        return gained(Round(draft, (2, 3), (0, 1), (2, 3)))

    assert accepted(NAME) == 1, "a cell of the window itself"
    assert accepted(NAME, (NAME, 3)) == accepted(NAME, ("text", "other", 2), (NAME, 3)) == 1
    assert accepted(NAME, ("text", 1), (NAME, 3)) == 0, "the text knew it too"
    assert accepted("text", ("text", 1), (NAME, 3)) == accepted("text", ("text", 1)) == 0
    rejected = DraftTree((1, 2), (-1, 0), (1.0, 0.5), ("", NAME), (None, None))
    assert gained(Round(rejected, (9,), (0,), (9, 3))) == 0
