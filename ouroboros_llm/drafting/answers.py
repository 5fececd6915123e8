"""Guesses from the answer that was given to this very prompt before, or to one that ends alike.

Agents retry, pipelines run again, users ask twice: then the whole answer is one phrase, and no shorter match says how
sure it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..phrases import AnswerBook, PhrasePool, run_key
from .base import Guess, Guesses, Round

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
    """What was answered before."""

    token_ids: tuple[int, ...]
    whole: bool
    """Whether it was to this very prompt, and not only to one that ends in the same way."""


def known_answer(pools: Iterable[PhrasePool], model: str, prompt_ids: Sequence[int]) -> KnownAnswer | None:
    """What a model, by its fingerprint, answered to a prompt, as far as one of the pools knows, the first first."""
    books = [pool for pool in pools if isinstance(pool, AnswerBook)]
    for part in _parts(prompt_ids):
        for book in books:
            if token_ids := book.read(_name(model, part)):
                return KnownAnswer(token_ids, whole=part is prompt_ids)
    return None


def note_answer(pool: PhrasePool, model: str, prompt_ids: Sequence[int], answer: Sequence[int]) -> None:
    """Let a pool that holds an answer know what prompt it was given to. Of the prompt it gets hashes.

    What was broken off does not take the place of the longer answer that it is the beginning of.
    """
    if not isinstance(pool, AnswerBook) or len(answer) < 2:  # which no pool keeps
        return
    for name in (_name(model, part) for part in _parts(prompt_ids)):
        if pool.read(name)[: len(answer)] != tuple(answer):
            pool.remember({name: run_key(answer)})


def _parts(prompt_ids: Sequence[int]) -> list[Sequence[int]]:
    """What of a prompt an answer is known by, the most telling first."""
    return [prompt_ids] if len(prompt_ids) <= _ENDING else [prompt_ids, prompt_ids[-_ENDING:]]


def _name(model: str, token_ids: Sequence[int]) -> str:
    return f"{model}/{NAME}/{run_key(token_ids).hex()}"


class AnswerSource:
    """Goes through a known answer as long as the text does; silent from the first token that differs."""

    name = NAME

    def __init__(self, answer: KnownAnswer, *, sampling: bool = False) -> None:
        """`sampling`: whether the target samples."""
        self._answer, self._kind = answer.token_ids, (answer.whole, sampling)
        self._begins_at, self._agreed, self._differs = 0, 0, False

    def open(self, context: Sequence[int]) -> None:
        self._begins_at, self._agreed, self._differs = len(context), 0, False

    def start(self, context: Sequence[int]) -> int | None:
        said = len(context) - self._begins_at
        news = list(context[self._begins_at + self._agreed :])
        self._differs = self._differs or news != list(self._answer[self._agreed : said])
        self._agreed = said
        return self._place(said)

    def follow(self, state: int, token_id: int) -> int | None:
        return self._place(state + 1) if self._answer[state] == token_id else None

    def guesses(self, state: int) -> Guesses | None:
        (whole, sampling), prior = self._kind, _PRIORS[self._kind]
        guess = Guess((NAME, int(whole), int(sampling), bisect_right(_AGREED, state)), prior)
        return Guesses({self._answer[state]: guess}, Guess((NAME, "other"), prior=1 - prior), state)

    def learn(self, round: Round) -> None:
        """What was said stands in the context of the next draft."""

    def _place(self, passed: int) -> int | None:
        return None if self._differs or passed >= len(self._answer) else passed
