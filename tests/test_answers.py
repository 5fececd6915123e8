"""The same prompt again: its answer is drafted whole, by those who may know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, plain, tiny_model

from ouroboros_llm import DecodingOptions, GenerationResult, Grammar, MemoryPool, Ouroboros, custom_generate
from ouroboros_llm.decoding.draft_tree import DraftTree
from ouroboros_llm.decoding.drafter import Budget, Round
from ouroboros_llm.drafting.cached_answer import NAME, CachedAnswerSource, KnownAnswer, index_answer, lookup_answer
from ouroboros_llm.drafting.cost_gate import CostTracker
from ouroboros_llm.drafting.learned_state import LearnedState, sources
from ouroboros_llm.drafting.tree_drafter import TreeDrafter
from ouroboros_llm.phrase_pool import memory as memory_pool
from ouroboros_llm.phrase_pool.base import ANSWERS, AnswerIndex, Phrase, PhrasePool, PoolStats, run_key
from ouroboros_storage import PhraseStore, upkeep
from ouroboros_storage.pool import LayeredPool

PROMPT = "the cat sat on the mat, the dog"
LONG = "Of many things that were said before, this is the last: " * 2
TOKENS = 40


def ask(ouroboros: Ouroboros, prompt: Any = PROMPT, **settings: Any) -> GenerationResult:
    options = DecodingOptions(**{"max_new_tokens": TOKENS, **settings.pop("options", {})})
    result = ouroboros.generate(prompt, options=options, **settings)
    if options.greedy:
        ids = ouroboros.encode(prompt) if isinstance(prompt, str) else prompt
        assert list(result.token_ids) == plain(ouroboros.model, ids, options.max_new_tokens or TOKENS)
    return result


def known(result: GenerationResult) -> int:
    return result.statistics.accepted_by_source.get(NAME, 0)


def pool_of(ouroboros: Ouroboros, scope: str) -> Any:
    return ouroboros.store.open(scope, fingerprint=ouroboros.fingerprint)


def told(pool: PhrasePool, model: str, prompt: list[int]) -> tuple[tuple[int, ...], bool] | None:
    found = lookup_answer([pool], model, prompt)
    return None if found is None else (found.token_ids, found.whole)


def test_the_same_prompt_again_is_a_pass_or_two(tiny_ouroboros: Ouroboros) -> None:
    first, again = (ask(tiny_ouroboros) for _ in range(2))
    assert known(first) == 0 and first.statistics.rounds > 2
    assert again.statistics.rounds <= 2 and known(again) >= TOKENS - 2
    assert again.token_ids == first.token_ids


def test_it_is_kept_with_the_scope(url: str) -> None:
    for number in range(3):
        with Ouroboros(tiny_model(), byte_tokenizer(), store=url) as ouroboros:
            assert bool(known(ask(ouroboros, scope="a"))) == (number == 1)
            if number == 1:
                ouroboros.store.delete("a")  # type: ignore[attr-defined]


def test_nobody_else_knows_of_it(tiny_ouroboros: Ouroboros) -> None:
    ask(tiny_ouroboros, scope="a")
    assert known(ask(tiny_ouroboros, scope="b")) == 0
    assert known(ask(tiny_ouroboros, scope="c", read_scopes=["b"])) > 0
    assert known(ask(tiny_ouroboros, scope="d", write_scopes=["agent:x"])) == 0
    assert known(ask(tiny_ouroboros, scope="e", read_scopes=["agent:x"])) > 0


def test_it_can_be_switched_off(tiny_ouroboros: Ouroboros) -> None:
    for drafters in (("recycling",), ()):
        assert [known(ask(tiny_ouroboros, options={"drafters": drafters})) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("kind", ["known", "wrong", "switched off"])
def test_drafts_of_other_answers_say_nothing_of_a_known_one_while_it_holds(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pool, prompt = pool_of(tiny_ouroboros, "a"), tiny_ouroboros.encode(PROMPT)
    options = {"max_new_tokens": 200, **({"drafters": ("recycling",)} if kind == "switched off" else {})}
    ask(tiny_ouroboros, scope="a", options=options)
    if kind == "wrong":
        pool.add([250] * 200)
        index_answer(pool, tiny_ouroboros._prepared.fingerprint, prompt, [250] * 200)
    asked: list[float] = []

    def pays(*_: Any) -> bool:
        asked.append(1)
        return False

    monkeypatch.setattr(CostTracker, "pays", pays)
    again = ask(tiny_ouroboros, scope="a", options=options)
    if kind == "known":
        assert not asked and again.statistics.rounds <= 6
    else:
        assert len(asked) == again.statistics.rounds - 1 > 100, "after the first draft, which is always made"


def test_what_was_broken_off_is_no_longer_answer(tiny_ouroboros: Ouroboros) -> None:
    for tokens in (5, TOKENS, 5, TOKENS):
        result = ask(tiny_ouroboros, options={"max_new_tokens": tokens})
    assert known(result) >= TOKENS - 2


def test_a_prompt_that_ends_alike_is_told_from_the_same_one() -> None:
    prompt, answer = list(range(100)), (7, 8, 9)
    pool = MemoryPool()
    pool.add(answer)
    index_answer(pool, "model", prompt, answer)
    assert told(pool, "model", prompt) == (answer, True)
    assert told(pool, "model", [200, *prompt[1:]]) == (answer, False)
    others = [("another", prompt), ("model", prompt[:-1]), ("model", [*prompt[:-1], 200]), ("model", [])]
    for model, other in [*others, ("model", prompt[-64:])]:
        assert told(pool, model, other) is None
    index_answer(pool, "model", prompt[:64], answer)
    assert told(pool, "model", prompt[:64]) == (answer, True)
    assert told(pool, "model", [5, *prompt[:64]]) is None, "its end is all of it"


def test_the_scope_of_the_turn_is_asked_before_others() -> None:
    own, read = MemoryPool(), MemoryPool()
    for pool, answer in ((own, [1, 2]), (read, [3, 4])):
        pool.add(answer)
        index_answer(pool, "model", [9], answer)
    found = lookup_answer([own, read], "model", [9])
    assert found is not None and found.token_ids == (1, 2)


def test_a_question_after_another_history_is_drafted(tiny_ouroboros: Ouroboros) -> None:
    """Whether the answer is the same again is the model's to say."""
    first = ask(tiny_ouroboros, "A: " + LONG)
    drafted: list[str] = []
    learn = TreeDrafter.learn

    def noted(blend: TreeDrafter, round: Round) -> None:
        drafted.extend(round.draft.sources)
        learn(blend, round)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeDrafter, "learn", noted)
        ask(tiny_ouroboros, "B: " + LONG)
    assert NAME in drafted and NAME not in first.statistics.origins


def test_further_scopes_get_no_ends_of_prompts(tiny_ouroboros: Ouroboros) -> None:
    ask(tiny_ouroboros, LONG, scope="a", write_scopes=["agent:x"])
    notes = {scope: pool_of(tiny_ouroboros, scope).recall(ANSWERS) for scope in ("a", "agent:x")}
    assert len(notes["a"]) == 2 and len(notes["agent:x"]) == 1 and notes["agent:x"].items() < notes["a"].items()
    assert known(ask(tiny_ouroboros, LONG, scope="b", read_scopes=["agent:x"])) > 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_known_answer_is_followed_as_long_as_the_text_does(whole: bool) -> None:
    pool = MemoryPool()
    pool.add([5, 6, 7, 8])
    pool.remember({"it": run_key([5, 6, 7, 8])})
    drafter = TreeDrafter([CachedAnswerSource(KnownAnswer((5, 6, 7, 8), whole, pool, "it"))])
    drafter.open([1])

    def after(*said: int) -> tuple[int, ...]:
        return drafter.draft([1, *said], Budget(width=16, depth=10)).token_ids[1:]

    assert after() == (5, 6, 7, 8) and after(5) == (6, 7, 8) and after(5, 6, 7, 8) == () == after(5, 6, 7, 8, 9)
    drafter.open([1, 2])
    assert drafter.draft([1, 2], Budget(width=16, depth=2)).token_ids == (2, 5, 6)
    assert drafter.draft([1, 2, 5, 9], Budget(width=16, depth=10)) == DraftTree.root(9)
    assert drafter.draft([1, 2, 5, 9, 7], Budget(width=16, depth=10)) == DraftTree.root(7), "it is over for good"
    drafter.open([1])
    assert after(5) == (6, 7, 8)
    pool.take_out([run_key([5, 6, 7, 8])], [])
    assert after(5) == ()


def test_other_sources_have_little_say_beside_a_known_answer() -> None:
    answer, pool, others = tuple(range(10, 40)), MemoryPool(), MemoryPool()
    pool.add(answer)
    pool.remember({"it": run_key(answer)})
    for passed in range(len(answer)):
        others.add([*answer[:passed], 99, 98, 97])
    found = sources(
        ["phrases"], LearnedState(), answer=CachedAnswerSource(KnownAnswer(answer, True, pool, "it")), write=others
    )
    drafter = TreeDrafter(found)
    drafter.open([1])
    draft = drafter.draft([1], Budget(width=64, depth=64, cost=lambda width: 1 + 0.1 * (width - 1)))
    assert draft.token_ids[1:] == answer, "all of it, and nothing else"


def test_a_lie_changes_no_token(tiny_ouroboros: Ouroboros) -> None:
    pool, lie = pool_of(tiny_ouroboros, "a"), [number * 37 % 300 for number in range(30)]
    pool.add(lie)
    index_answer(pool, tiny_ouroboros._prepared.fingerprint, tiny_ouroboros.encode(PROMPT), lie)
    assert known(ask(tiny_ouroboros, scope="a")) < len(lie) / 2
    assert known(ask(tiny_ouroboros, scope="a")) >= TOKENS - 2, "and is forgotten for the truth"


def test_samples_are_the_same_too(tiny_ouroboros: Ouroboros) -> None:
    samples = [ask(tiny_ouroboros, options=dict(temperature=0.7, seed=seed)).token_ids for seed in (3, 3, 4, 3)]
    assert samples[0] == samples[1] == samples[3] != samples[2]


@pytest.mark.parametrize(
    "settings", [dict(exact=True), dict(grammar=Grammar.regex("[ab]{30}")), dict(max_draft_tokens=3)]
)
def test_other_settings_are_kept_to(tiny_ouroboros: Ouroboros, settings: dict[str, Any]) -> None:
    options = DecodingOptions(max_new_tokens=TOKENS, **settings)
    alone = tiny_ouroboros.generate(PROMPT, scope="alone", options=options)
    ask(tiny_ouroboros)
    assert [tiny_ouroboros.generate(PROMPT, options=options).token_ids for _ in range(2)] == [alone.token_ids] * 2


def test_a_draft_model_is_not_asked_for_what_is_known() -> None:
    with Ouroboros(tiny_model(), byte_tokenizer(), draft_model=tiny_model(seed=1)) as ouroboros:
        first, again = (ask(ouroboros) for _ in range(2))
    assert again.statistics.draft_forwards == 0 < first.statistics.draft_forwards and known(again) >= TOKENS - 2


def test_an_answer_that_is_erased_during_a_turn_is_drafted_no_more(url: str) -> None:
    with Ouroboros(tiny_model(), byte_tokenizer(), store=url) as ouroboros:
        options = DecodingOptions(max_new_tokens=300, max_draft_tokens=12)
        ouroboros.generate(PROMPT, scope="a", options=options)
        stream = ouroboros.stream(PROMPT, scope="a", options=options)
        next(stream)
        ouroboros.store.delete("a")  # type: ignore[attr-defined]
        for piece in stream:
            result = piece.result
        assert result is not None and 0 < known(result) < 150 and NAME not in result.statistics.origins[-50:]
        assert pool_of(ouroboros, "a").recall(ANSWERS) == {}


@pytest.mark.parametrize("layered", [False, True])
def test_a_note_whose_run_is_gone_says_nothing(url: str, layered: bool) -> None:
    with PhraseStore(url) as store:
        pool: PhrasePool = store.open("a", fingerprint="f")
        if layered:
            pool = LayeredPool([pool, MemoryPool()])
        assert isinstance(pool, AnswerIndex)
        index_answer(pool, "model", [1, 2], [5, 6])
        assert told(pool, "model", [1, 2]) is None
        pool.add([5, 6])
        assert told(pool, "model", [1, 2]) == ((5, 6), True)


def test_notes_go_with_their_runs_and_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = MemoryPool(capacity=2000)
    for number in range(2000):
        pool.add([number, 5, 6, 7])
        index_answer(pool, "model", [number], [number, 5, 6, 7])
    assert pool.stats.runs <= len(pool.recall(ANSWERS)) < 2 * pool.stats.runs < 1500
    assert told(pool, "model", [0]) is None and told(pool, "model", [1999]) == ((1999, 5, 6, 7), True)
    monkeypatch.setattr(memory_pool, "KEPT_ANSWERS", 3)
    for number in (1, 2, 3, 1, 4):
        index_answer(pool, "model", [number], [1999, 5, 6, 7])
    assert [number for number in range(10) if told(pool, "model", [number])] == [1, 3, 4]


def test_a_store_keeps_the_notes_that_were_used_last(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "KEPT_ANSWERS", 3)
    monkeypatch.setattr(upkeep, "_KEPT_NOTES", 2)
    monkeypatch.setattr(upkeep, "_NOTES_COUNTED", 1)
    with PhraseStore(url) as store:
        for number in (1, 2, 3, 1, 4):
            pool = store.open("a", fingerprint="f")
            pool.add([5, 6])
            index_answer(pool, "model", [number], [5, 6])
            assert isinstance(pool, AnswerIndex)
            pool.remember({f"model/successors/{number}": b""})
            store.flush()
    with PhraseStore(url) as store:
        pool = store.open("a", fingerprint="f")
        assert [number for number in range(10) if told(pool, "model", [number])] == [1, 3, 4]
        assert isinstance(pool, AnswerIndex) and len(pool.recall("model/")) == 2


def test_pools_that_keep_no_notes_know_no_answers() -> None:
    class Bare:
        """A `PhrasePool` and nothing more."""

        stats = PoolStats(0, 0)

        def add(self, token_ids: Sequence[int], *, answer: bool = True) -> None: ...
        def match(self, tail: Sequence[int]) -> list[Phrase]:
            return []

    bare = Bare()
    assert isinstance(bare, PhrasePool)
    index_answer(bare, "model", [1, 2], [3, 4])
    assert lookup_answer([bare], "model", [1, 2]) is None


def test_transformers_generate_knows_it_too() -> None:
    model, pool = tiny_model(), MemoryPool()
    ids = byte_tokenizer()(PROMPT, return_tensors="pt")
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        counts, said = [], []
        for _ in range(2):
            passes.clear()
            said.append(
                model.generate(
                    **ids, max_new_tokens=TOKENS, do_sample=False, custom_generate=custom_generate, phrase_pool=pool
                )
            )
            counts.append(len(passes))
    finally:
        hook.remove()
    assert torch.equal(*said) and counts[1] <= 2 < counts[0]
