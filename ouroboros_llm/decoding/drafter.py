"""The protocol of drafters, and what a round tells them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from .draft_tree import DraftTree

Successors = tuple[tuple[int, float], ...]
"""(token id, probability) of the tokens that the target found likeliest after a node, likeliest first."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a draft may cost."""

    width: int
    """Nodes at most, root included."""
    depth: int
    """Tokens that the text may still grow by drafts: deeper nodes could never be emitted."""
    cost: Callable[[int], float] | None = None
    """Time of a pass by width, in units of a pass over one token; None: fill the width."""
    end_token_ids: Collection[int] = ()
    """Tokens that end the text: nothing comes after them."""


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
    successors: tuple[Successors, ...] = ()
    """Per node, where the drafter asked for them."""
    read: tuple[tuple[int, Successors], ...] = ()
    """Of a prefill: tokens read before the root, in order, each with its successors."""
    seconds: float = field(default=0.0, compare=False)
    """Of the forward pass, and of reading its logits."""

    @property
    def accepted(self) -> tuple[int, ...]:
        """The accepted nodes."""
        return self.path[1:]

    @property
    def origins(self) -> tuple[str, ...]:
        """Per emitted token: the source that drafted it, or "recovered" (all drafts for it were rejected), or "bonus"
        (there were none to reject)."""
        if not self.token_ids:
            return ()
        drafted = (self.draft.sources[node] for node in self.accepted)
        return (*drafted, "recovered" if self.path[-1] in self.draft.parents else "bonus")


@runtime_checkable
class Drafter(Protocol):
    """Makes drafts. Nothing it answers can change a token of the output."""

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
