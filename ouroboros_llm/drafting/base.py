"""Where guesses come from, and what their sources get to know."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..decoding.drafter import Round


class Guess(NamedTuple):
    """What a source says of one token."""

    evidence: Hashable
    """The kind of evidence it rests on: guesses of one kind are right equally often. Made of strings and numbers,
    the source's name first."""
    prior: float
    """How often such guesses are right, as long as nothing is known of them."""


class Guesses(NamedTuple):
    """What a source says of the next token."""

    by_token: Mapping[int, Guess]
    otherwise: Guess
    """What it says of every other token."""
    match_length: int = 0
    """Tokens of context that the guesses rest on, where that can be said."""


class Source(Protocol):
    """Guesses one token at a time, for `TreeDrafter` to grow a tree of. States belong to one draft and are opaque."""

    name: str

    def open(self, context: Sequence[int]) -> None:
        """A new text begins with `context`."""

    def start(self, context: Sequence[int]) -> Any:
        """The state after `context`; None where the source has nothing to say."""

    def follow(self, state: Any, token_id: int) -> Any:
        """The state one token on; None where the source has nothing to say there."""

    def guesses(self, state: Any) -> Guesses | None:
        """What may come next."""

    def learn(self, round: Round) -> None:
        """Take note of a round, the prefill's included."""


@runtime_checkable
class Rule(Source, Protocol):
    """A source that knows what may come at all; `TreeDrafter` drafts nothing else."""

    def forced(self, state: Any) -> int | None:
        """The only token that may come, if there is only one."""

    def allows(self, state: Any, token_id: int) -> bool:
        """Whether a token may come."""
