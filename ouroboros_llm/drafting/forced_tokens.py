"""Guesses from a grammar: what it forces is no guess at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..decoding.drafter import Round
from ..grammar.state import GrammarState
from .base import Guess, Guesses

NAME = "grammar"

_LIKELY = Guess((NAME, "likely"), prior=0.8)
_OTHERWISE = Guess((NAME, "other"), prior=0.1)


class GrammarSource:
    """A `Source`, and the `Rule` of its text: tokens that the grammar forces are drafted with chance 1, tokens that it
    does not allow are not drafted. Where it forces the text but not its tokens, the tokenizer's own are likely."""

    name = NAME

    def __init__(self, place: Callable[[Sequence[int]], GrammarState]) -> None:
        """`place`: where a text stands in the grammar."""
        self._place = place

    def open(self, context: Sequence[int]) -> None:
        """Nothing to reset: `start` recomputes the state from the context."""

    def start(self, context: Sequence[int]) -> GrammarState:
        return self._place(context)

    def follow(self, state: GrammarState, token_id: int) -> GrammarState | None:
        return state.follow(token_id)

    def forced(self, state: GrammarState) -> int | None:
        return state.forced

    def allows(self, state: GrammarState, token_id: int) -> bool:
        return state.allows(token_id)

    def guesses(self, state: GrammarState) -> Guesses | None:
        return None if state.likely is None else Guesses({state.likely: _LIKELY}, _OTHERWISE)

    def learn(self, round: Round) -> None:
        """A grammar is known from the beginning."""
