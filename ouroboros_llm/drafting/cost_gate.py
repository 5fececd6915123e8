"""Whether drafting pays, by the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from ..decoding.draft_tree import DraftTree
from ..decoding.drafter import Budget, Drafter, Round


class CostTracker:
    """Moving averages of what a kind of draft takes beside a plain pass, and of what its rounds emit."""

    _TRIALS = 8
    """Rounds before judging."""

    def __init__(self, *, memory: int = 16, retry: int = 32) -> None:
        """`memory`: rounds that count; `retry`: rounds after which drafts that did not pay get another chance."""
        self._memory, self._retry = memory, retry
        self._seconds = self._tokens = 0.0
        self._rounds = self._declined = 0

    def pays(self, tokens: float, pass_seconds: float | None) -> bool:
        """Whether a draft promises more tokens per second than the `tokens` that a pass emits without it."""
        if self._rounds < self._TRIALS or pass_seconds is None or self._declined >= self._retry:
            self._declined = 0
            return True
        pays = self._tokens / (pass_seconds + self._seconds) > tokens / pass_seconds
        self._declined = 0 if pays else self._declined + 1
        return pays

    def spent(self, seconds: float) -> None:
        """Record the cost of one draft."""
        self._rounds += 1
        self._seconds += (seconds - self._seconds) / min(self._rounds, self._memory)

    def gained(self, tokens: int) -> None:
        """The round of a draft emitted so many tokens."""
        self._tokens += (tokens - self._tokens) / min(max(self._rounds, 1), self._memory)


class CostGatedDrafter:
    """A `Drafter` that drafts only while its drafts, the time to make them included, pay for themselves.

    Budgets choose widths by what a pass takes; where passes are fast, the drafting itself counts too.
    """

    def __init__(
        self,
        inner: Drafter,
        pass_seconds: Callable[[], float | None],
        worth: CostTracker | None = None,
        *,
        sure: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        """`pass_seconds`: what a pass over one token takes; `worth`: what drafts have cost and brought so far; `sure`:
        whether it is known how this text goes on, of which other texts' drafts say nothing."""
        self._inner, self._pass_seconds = inner, pass_seconds
        self._worth, self._sure = worth or CostTracker(memory=64, retry=8), sure
        self._judged = self._opened = False

    def open(self, context: Sequence[int]) -> None:
        self._opened = True
        self._inner.open(context)

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        seconds, self._judged = self._pass_seconds(), False
        if budget.cost is None or seconds is None:
            return self._inner.draft(context, budget)
        # The first draft of a text, which may be all of a short answer, is always made.
        first, self._opened = self._opened, False
        if self._sure is not None and self._sure(context):
            return self._inner.draft(context, budget)
        if not first and not self._worth.pays(1.0, seconds):
            return DraftTree.root(context[-1])
        began = perf_counter()
        draft = self._inner.draft(context, budget)
        self._worth.spent(perf_counter() - began + seconds * (budget.cost(draft.width) - 1))
        self._judged = True
        return draft

    def learn(self, round: Round) -> None:
        if self._judged:
            self._worth.gained(len(round.token_ids))
        self._inner.learn(round)
