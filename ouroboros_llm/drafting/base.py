"""Where guesses come from, and what their sources get to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..draft_tree import DraftTree


@dataclass(frozen=True, slots=True)
class Budget:
    """What a draft may cost."""

    width: int
    """Nodes at most, root included."""
    depth: int
    """Tokens that the text may still grow by drafts: deeper nodes could never be emitted."""
    cost: Callable[[int], float] | None = None
    """Time of a pass by width, in units of a pass over one token; None: fill the width."""


@dataclass(frozen=True, slots=True)
class Round:
    """What became of one draft."""

    draft: DraftTree
    token_ids: tuple[int, ...]
    """Emitted by the target, in order."""
    path: tuple[int, ...]
    """The nodes after which they were emitted, root first; all but the root were accepted."""
    likeliest: tuple[int, ...]
    """Per node, rejected ones included: the token the target finds likeliest after it."""

    @property
    def accepted(self) -> tuple[int, ...]:
        """The accepted nodes."""
        return self.path[1:]


@runtime_checkable
class Drafter(Protocol):
    """A source of drafts. Nothing it answers can change a token of the output."""

    def open(self, context: Sequence[int]) -> None:
        """A new text begins with `context`."""

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        """Guesses for what follows `context`, whose last token is the root. Does not modify `context`."""

    def learn(self, round: Round) -> None:
        """Take note of a round, the prefill's included. The context has grown by `round.token_ids`."""


class NoDrafts:
    """Plain decoding: the second implementation of `Drafter`."""

    def open(self, context: Sequence[int]) -> None:
        """Nothing to prepare."""

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        return DraftTree.root(context[-1])

    def learn(self, round: Round) -> None:
        """Nothing to learn."""
