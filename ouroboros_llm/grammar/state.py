"""Places in a grammar."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .compiled import Matcher

_TRIES = 8
"""Ways to the end that are compared before a token is turned down for leading too far."""


class GrammarState:
    """Grammar state after a token sequence, with `left` tokens of budget.

    Places are computed from the run of tokens alone, whether they were drafted or chosen, so what may come next never
    depends on drafts. Each remembers what was found out; drafting and choosing walk the same places.
    """

    def __init__(self, matcher: Matcher, state: Any, left: int, before: tuple[GrammarState, int] | None = None) -> None:
        """`before`: the place one token earlier, and that token; None at the beginning."""
        self._matcher, self._state, self.left = matcher, state, left
        self._before = before
        self._next: dict[int, GrammarState | None] = {}

    def follow(self, token_id: int) -> GrammarState | None:
        """The place one token on; None where the grammar does not take the token."""
        if token_id not in self._next:
            self._next[token_id] = self._after(token_id)
        return self._next[token_id]

    @cached_property
    def allowed(self) -> npt.NDArray[np.bool_]:
        """[vocabulary]: the tokens that may come."""
        vocabulary = self._matcher.vocabulary
        mask = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(mask, bitorder="little", count=vocabulary.size).astype(np.bool_)
        text = self._state.compute_ff_bytes()
        if text and allowed.sum() == 1 and not self._takes(token_id := int(allowed.argmax())):
            # The library takes text for a special token where the tokenizer has one for it.
            allowed[token_id] = False
            allowed[vocabulary.shortest[text[0]]] = True
        return allowed

    def allows(self, token_id: int) -> bool:
        """Whether a token may come; any id may be asked for."""
        if self._tight:
            return token_id == self.forced
        return 0 <= token_id < len(self.allowed) and bool(self.allowed[token_id])

    @cached_property
    def forced(self) -> int | None:
        """The token that must come, if there is only one: by the grammar, or because it is time to end."""
        if self._tight:
            return self.way[0] if self.way else self._matcher.vocabulary.end_token_ids[0]
        return int(self.allowed.argmax()) if self.allowed.sum() == 1 else None

    @cached_property
    def likely(self) -> int | None:
        """The token that most likely comes, where the text is forced and only its division into tokens is not."""
        text = self._state.compute_ff_bytes() if self.forced is None else b""
        token_ids = self._matcher.vocabulary.tokenizer.tokenize_bytes(text) if text else []
        return int(token_ids[0]) if token_ids and self.allowed[token_ids[0]] else None

    @cached_property
    def way(self) -> tuple[int, ...] | None:
        """Tokens that lead from here to an end, the end token not among them; None where none were found."""
        if self._before is None:
            return self._matcher.shortest(self.left)
        place, token_id = self._before
        way = place.way
        if way and way[0] == token_id:
            return way[1:]
        # Inside of strings and numbers, what ended the text before still does.
        if way is not None and self._ends(way):
            return way
        return self._matcher.ending.way(self._state, self.left - 1, _TRIES)

    @property
    def can_end(self) -> bool:
        """Whether there is a way from here to an end and the end token, with the tokens that are left."""
        return self.way is not None and len(self.way) < self.left

    def settle(self) -> None:
        """The text has come here: forget the places before."""
        _ = self.way
        self._before = None

    @property
    def _tight(self) -> bool:
        return self.way is not None and len(self.way) + 1 == self.left

    def _after(self, token_id: int) -> GrammarState | None:
        if token_id in self._matcher.vocabulary.end_token_ids or not self._takes(token_id):
            return None
        state = self._state.deep_copy()
        state.consume_token(token_id)
        return GrammarState(self._matcher, state, self.left - 1, (self, token_id))

    def _takes(self, token_id: int) -> bool:
        return bool(self._state.validate_tokens([token_id]) == 1)

    def _ends(self, way: tuple[int, ...]) -> bool:
        there = self._state.deep_copy()
        return bool(there.try_consume_tokens(list(way)) == len(way) and there.is_accepting())
