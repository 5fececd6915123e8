"""The same prompt again: its answer is drafted whole, by those who may know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, plain, tiny_model

from ouroboros_llm import DecodingOptions, GenerationResult, MemoryPool, Ouroboros, custom_generate
from ouroboros_llm.draft_tree import DraftTree
from ouroboros_llm.drafting.answers import NAME, AnswerSource, KnownAnswer, known_answer, note_answer
from ouroboros_llm.drafting.base import Budget
from ouroboros_llm.drafting.blend import Blend
from ouroboros_llm.drafting.worth import Worth
from ouroboros_llm.phrases import AnswerBook, Phrase, PhrasePool, PoolStats, run_key
from ouroboros_storage import PhraseStore
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


def test_other_answers_drafts_that_did_not_pay_say_nothing(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = tiny_ouroboros._sessions.open("a").worth
    monkeypatch.setattr(Worth, "pays", lambda worth, *_: worth is not paused)
    first, again = (ask(tiny_ouroboros, scope="a", options={"max_new_tokens": 200}) for _ in range(2))
    assert first.statistics.rounds > 100 and again.statistics.rounds <= 6


def test_what_was_broken_off_is_no_longer_answer(tiny_ouroboros: Ouroboros) -> None:
    for tokens in (5, TOKENS, 5, TOKENS):
        result = ask(tiny_ouroboros, options={"max_new_tokens": tokens})
    assert known(result) >= TOKENS - 2


def test_a_prompt_that_ends_alike_is_told_from_the_same_one() -> None:
    prompt, answer = list(range(100)), [7, 8, 9]
    pool = MemoryPool()
    pool.add(answer)
    note_answer(pool, "model", prompt, answer)
    assert known_answer([pool], "model", prompt) == KnownAnswer((7, 8, 9), whole=True)
    assert known_answer([pool], "model", [200, *prompt[1:]]) == KnownAnswer((7, 8, 9), whole=False)
    for model, other in (("another", prompt), ("model", prompt[:-1]), ("model", [*prompt[:-1], 200]), ("model", [])):
        assert known_answer([pool], model, other) is None
    short = prompt[:64]
    note_answer(pool, "model", short, answer)
    assert known_answer([pool], "model", short) == KnownAnswer((7, 8, 9), whole=True)


def test_a_question_after_another_history_is_answered_faster(tiny_ouroboros: Ouroboros) -> None:
    """Whether the answer is the same again is the model's to say."""
    ask(tiny_ouroboros, "A: " + LONG)
    drafted = ask(tiny_ouroboros, "B: " + LONG)
    assert NAME in drafted.statistics.origins or drafted.statistics.origins[0] == "recovered"


@pytest.mark.parametrize("whole", [True, False])
def test_a_known_answer_is_followed_as_long_as_the_text_does(whole: bool) -> None:
    drafter = Blend([AnswerSource(KnownAnswer((5, 6, 7, 8), whole))])
    drafter.open([1])

    def after(*said: int) -> tuple[int, ...]:
        return drafter.draft([1, *said], Budget(width=16, depth=10)).token_ids[1:]

    assert after() == (5, 6, 7, 8) and after(5) == (6, 7, 8) and after(5, 6, 7, 8) == () == after(5, 6, 7, 8, 9)
    drafter.open([1, 2])
    assert drafter.draft([1, 2], Budget(width=16, depth=2)) != DraftTree.root(2)
    assert drafter.draft([1, 2, 5, 9], Budget(width=16, depth=10)) == DraftTree.root(9)
    assert drafter.draft([1, 2, 5, 9, 7], Budget(width=16, depth=10)) == DraftTree.root(7), "it is over for good"


def test_a_lie_changes_no_token(tiny_ouroboros: Ouroboros) -> None:
    pool = tiny_ouroboros.store.open("a", fingerprint=tiny_ouroboros.fingerprint)
    lie = [number * 37 % 300 for number in range(30)]
    pool.add(lie)
    note_answer(pool, tiny_ouroboros._prepared.fingerprint, tiny_ouroboros.encode(PROMPT), lie)
    assert known(ask(tiny_ouroboros, scope="a")) < len(lie) / 2
    assert known(ask(tiny_ouroboros, scope="a")) >= TOKENS - 2, "and is forgotten for the truth"


def test_samples_are_the_same_too(tiny_ouroboros: Ouroboros) -> None:
    samples = [ask(tiny_ouroboros, options=dict(temperature=0.7, seed=seed)).token_ids for seed in (3, 3, 4, 3)]
    assert samples[0] == samples[1] == samples[3] != samples[2]


@pytest.mark.parametrize("layered", [False, True])
def test_a_note_whose_run_is_gone_says_nothing(url: str, layered: bool) -> None:
    with PhraseStore(url) as store:
        pool: PhrasePool = store.open("a", fingerprint="f")
        if layered:
            pool = LayeredPool([pool, MemoryPool()])
        assert isinstance(pool, AnswerBook)
        pool.remember({f"model/{NAME}/{run_key([1, 2]).hex()}": run_key([5, 6])})
        assert known_answer([pool], "model", [1, 2]) is None
        pool.add([5, 6])
        assert known_answer([pool], "model", [1, 2]) == KnownAnswer((5, 6), whole=True)


def test_pools_that_keep_no_notes_know_no_answers() -> None:
    class Bare:
        """A `PhrasePool` and nothing more."""

        stats = PoolStats(0, 0)

        def add(self, token_ids: Sequence[int], *, answer: bool = True) -> None: ...
        def match(self, tail: Sequence[int]) -> list[Phrase]:
            return []

    bare = Bare()
    assert isinstance(bare, PhrasePool)
    note_answer(bare, "model", [1, 2], [3, 4])
    assert known_answer([bare], "model", [1, 2]) is None


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
