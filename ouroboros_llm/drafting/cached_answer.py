"""Drafts the cached answer of an identical prompt, or of one with the same last 64 tokens.

Agents retry, pipelines run again, users ask twice: then the whole answer is one phrase, and no shorter match says how
sure it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..decoding.drafter import Round
from ..phrase_pool.base import ANSWERS, AnswerIndex, PhrasePool, run_key
from .base import Guess, Guesses

NAME = "answers"

_ENDING = 64
"""Tokens of a prompt's end that mostly hold the question, whatever was said before it."""

_PRIORS = {(True, False): 0.99, (True, True): 0.6, (False, False): 0.9, (False, True): 0.5}
"""How often the next token is the same again, by whether all of the prompt is, and whether the target samples. What the
caller allows may be different, and near-ties go another way."""

_AGREED = (1, 4, 16, 64)
"""Bounds of the classes in which guesses are equally good: tokens of the answer that came again so far."""


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """What was answered before, and where that is known from."""

    token_ids: tuple[int, ...]
    whole: bool
    """Whether it was to this very prompt, and not only to one that ends in the same way."""
    book: AnswerIndex
    name: str

    @property
    def stands(self) -> bool:
        """Whether it is known still: its scope may be deleted in the middle of a turn."""
        return self.book.noted_run(self.name) == self.token_ids


def lookup_answer(pools: Iterable[PhrasePool], model: str, prompt_ids: Sequence[int]) -> KnownAnswer | None:
    """What a model, by its fingerprint, answered to a prompt, as far as one of the pools knows, the first first."""
    books = [pool for pool in pools if isinstance(pool, AnswerIndex)]
    for number, name in enumerate(_names(model, prompt_ids)):
        for book in books:
            if token_ids := book.noted_run(name):
                return KnownAnswer(token_ids, number == 0, book, name)
    return None


def index_answer(
    pool: PhrasePool, model: str, prompt_ids: Sequence[int], answer: Sequence[int], *, ending: bool = True
) -> None:
    """Let a pool that holds an answer know what prompt it was given to. Of the prompt it gets hashes.

    `ending`: of the prompt's end too, which is sooner guessed than all of it.
    """
    if not isinstance(pool, AnswerIndex) or len(answer) < 2:  # which no pool keeps
        return
    for name in _names(model, prompt_ids)[: 2 if ending else 1]:
        known = pool.noted_run(name)
        # What was broken off does not take the place of the answer that it is the beginning of. That is noted again all
        # the same: notes that are not used go first.
        pool.remember({name: run_key(known if known[: len(answer)] == tuple(answer) else answer)})


def _names(model: str, prompt_ids: Sequence[int]) -> list[str]:
    """Of the notes on the answer to a prompt, the most telling first."""
    names = [f"{ANSWERS}{model}/whole/{run_key(prompt_ids).hex()}"]
    if len(prompt_ids) > _ENDING:
        names.append(f"{ANSWERS}{model}/ending/{run_key(prompt_ids[-_ENDING:]).hex()}")
    return names


class CachedAnswerSource:
    """Goes through a known answer as long as the text does; silent from the first token that differs."""

    name = NAME

    def __init__(self, answer: KnownAnswer, *, sampling: bool = False) -> None:
        """`sampling`: whether the target samples."""
        self._known, self._answer, self._kind = answer, answer.token_ids, (answer.whole, sampling)
        self._begins_at, self._agreed, self._silent = 0, 0, False

    def open(self, context: Sequence[int]) -> None:
        self._begins_at, self._agreed, self._silent = len(context), 0, False

    def goes_on(self, context: Sequence[int]) -> bool:
        """Whether the text has followed the answer so far, and the answer says more."""
        return self.start(context) is not None

    def start(self, context: Sequence[int]) -> int | None:
        if not self._silent:
            said, before = len(context) - self._begins_at, self._agreed
            news = tuple(context[self._begins_at + before :])
            self._silent = news != self._answer[before:said] or not self._known.stands
            self._agreed = said
        return None if self._silent else self._place(self._agreed)

    def follow(self, state: int, token_id: int) -> int | None:
        return self._place(state + 1) if self._answer[state] == token_id else None

    def guesses(self, state: int) -> Guesses | None:
        kind, prior = (NAME, *map(int, self._kind)), _PRIORS[self._kind]
        guess = Guess((*kind, bisect_right(_AGREED, state)), prior)
        return Guesses({self._answer[state]: guess}, Guess((*kind, "other"), prior=1 - prior), state)

    def learn(self, round: Round) -> None:
        """What was said stands in the context of the next draft."""

    def _place(self, passed: int) -> int | None:
        return passed if passed < len(self._answer) else None


def answer_source(
    pools: Iterable[PhrasePool], model: str, prompt_ids: Sequence[int], *, sampling: bool = False
) -> CachedAnswerSource | None:
    """Guesses from the `lookup_answer`, if there is one."""
    answer = lookup_answer(pools, model, prompt_ids)
    return None if answer is None else CachedAnswerSource(answer, sampling=sampling)
