"""A grammar beside one text: what may be chosen, and what may be drafted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..model_config import end_token_ids
from .base import Grammar
from .compiled import Matcher, matcher_for
from .state import GrammarState

_VETOES = 32
"""Tokens that are turned down at one place before a way to the end is taken."""


class Constraint:
    """Follows one text through a grammar; the text is a prompt and the tokens chosen after it."""

    def __init__(self, matcher: Matcher, prompt_length: int, limit: int) -> None:
        """`limit`: tokens to generate at most. Raises OptionError where no text of the grammar fits."""
        matcher.shortest(limit)
        self._matcher, self._start, self._limit = matcher, prompt_length, limit
        self._place, self._length = self._beginning(), 0

    def place(self, context: Sequence[int], emitted: Sequence[int] = ()) -> GrammarState:
        """The place after `context`, which begins with the prompt, and the tokens emitted since."""
        length = len(context) - self._start + len(emitted)
        if length < self._length:
            self._place, self._length = self._beginning(), 0
        while self._length < length:
            number = self._start + self._length
            token_id = context[number] if number < len(context) else emitted[number - len(context)]
            place = self._place.follow(token_id)
            if place is None:
                raise ValueError(f"token {token_id} is not one that the grammar allows at {number}")
            place.settle()
            self._place, self._length = place, self._length + 1
        return self._place

    @property
    def only(self) -> int | None:
        """The token that must be chosen at the present place, if only one can; it is known without the target."""
        forced, ends = self._place.forced, self._matcher.vocabulary.end_token_ids
        if forced is None or forced in ends:
            return forced
        there = self._place.follow(forced)
        # The tokenizer's own division of a forced text may take more tokens than there are left.
        return forced if there is not None and there.can_end else self._way_on()

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary] with all tokens ruled out that may not come at the present place."""
        place, size = self._place, scores.shape[-1]
        if place.forced is not None:
            kept = scores.new_full(scores.shape, -torch.inf)
            kept[0, place.forced] = 0.0
            return kept
        allowed = torch.zeros(size, dtype=torch.bool)
        known = torch.from_numpy(place.allowed)[:size]
        allowed[: len(known)] = known
        masked = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        # Where something else has ruled out all that the grammar allows, the grammar prevails.
        return masked if masked.isfinite().any() else masked.masked_fill(allowed.to(scores.device), 0.0)

    def pick(self, preferences: torch.Tensor) -> int:
        """The most preferred token, of preferences [vocabulary], after which the text can still be brought to its end.

        Taking the next best instead is choosing among fewer tokens: greedily, and as well for a sample, which is the
        best of perturbed scores.
        """
        if (only := self.only) is not None:
            return only
        place, ends = self._place, self._matcher.vocabulary.end_token_ids
        for _ in range(_VETOES):
            token_id = int(preferences.argmax())
            if not place.allows(token_id):
                break
            if token_id in ends or ((there := place.follow(token_id)) is not None and there.can_end):
                return token_id
            preferences[token_id] = -torch.inf
        return self._way_on()

    def _way_on(self) -> int:
        """The first token of a way to the end."""
        return self._place.way[0] if self._place.way else self._matcher.vocabulary.end_token_ids[0]

    def _beginning(self) -> GrammarState:
        return GrammarState(self._matcher, self._matcher.state(), self._limit)


def constraint_for(
    grammar: Grammar | None, model: Any, tokenizer: PreTrainedTokenizerBase, prompt_length: int, limit: int
) -> Constraint | None:
    """The constraint of one generation; None without a grammar. Raises OptionError and MissingExtraError."""
    if grammar is None:
        return None
    matcher = matcher_for(grammar, tokenizer, end_token_ids(model.generation_config))
    return Constraint(matcher, prompt_length, limit)
