"""New phrases from the target itself: a Jacobi window rides in every pass (lookahead decoding, arXiv 2402.02057).

The window has `window` columns of `length - 1` rows. Row 0 guesses the tokens after the root, one a column; below it,
each column goes on by itself. The token in row j of column i stands 1 + i + j tokens after the root and sees row 0 up
to its own column, and its own column down to itself. That *is* a draft tree: row 0 hangs off the root as a chain, each
column hangs off its token of row 0. What the target finds likeliest after the last row is the next token of every
column, so each pass yields `window` n-grams of `length` tokens, whether or not the text repeats anything.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from ..decoding.draft_tree import DraftTree, TreeBuilder
from ..decoding.drafter import Budget, Drafter, Round
from ..errors import OptionError
from ..phrase_pool.base import PhrasePool
from .calibration import Estimate

NAME = "lookahead"

_CHANCE = 0.05
"""Of every cell: a window looks ahead of what is known, so hardly any cell is right where it stands."""


class LookaheadDrafter:
    """A `Drafter`: the drafts of another one, with a window in the room that they leave.

    Every n-gram that the window yields goes to `pool`, which the inner drafter reads as a source named "lookahead". A
    round that emits m tokens moves the root by m; the columns have moved by one themselves, so the window goes m - 1
    columns to the left, and runs of the text come in at the right.
    """

    def __init__(
        self, inner: Drafter, pool: PhrasePool, *, window: int, length: int, worth: WindowCostTracker | None = None
    ) -> None:
        """`pool`: small, bounded, and nobody else's; `window`: columns; `length`: tokens of an n-gram; `worth`: what
        windows have cost and brought so far, in earlier texts too.

        Raises:
            OptionError: a window without columns or without rows.
        """
        if window < 1 or length < 2:
            raise OptionError(
                f"window must be at least 1 and length at least 2, but got window={window}, length={length}"
            )
        self._inner, self._pool, self._worth = inner, pool, worth or WindowCostTracker()
        self._window, self._rows = window, length - 1
        self._columns: list[tuple[int, ...]] = []
        self._fresh = 0
        self._drafted = 0
        self._extra: float | None = None

    def open(self, context: Sequence[int]) -> None:
        self._inner.open(context)
        self._columns, self._fresh = [], 0
        self._drafted, self._extra = 0, None

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        alone = self._inner.draft(context, budget)
        self._drafted, self._extra = 0, None
        if budget.cost is not None and not self._worth.pays():
            return alone
        self._refill(context)
        builder = rebuilt(alone, budget.width)
        self._drafted = self._grow(builder, budget)
        if not self._drafted:
            return alone
        draft = builder.build()
        if budget.cost is not None:
            self._extra = budget.cost(draft.width) / budget.cost(alone.width) - 1
        return draft

    def learn(self, round: Round) -> None:
        self._inner.learn(round)
        if self._extra is not None:
            self._worth.learn(self._extra, gained(round))
        self._move(self._harvest(round), len(round.token_ids))
        self._drafted, self._extra = 0, None

    def _refill(self, context: Sequence[int]) -> None:
        """Runs of the text, the latest first, until the window is full; they go round where the text is short."""
        runs = max(1, len(context) // self._rows)
        while len(self._columns) < self._window:
            start = len(context) - self._rows * (1 + self._fresh % runs)
            self._columns.append(tuple(context[(start + row) % len(context)] for row in range(self._rows)))
            self._fresh += 1

    def _grow(self, builder: TreeBuilder, budget: Budget) -> int:
        """Add the window column by column; how many columns there was room for."""
        row_0 = 0
        for number, column in enumerate(self._columns):
            # A column that is cut short would cost nodes and yield nothing.
            if number + self._rows > budget.depth or builder.room < self._rows:
                return number
            row_0 = node = _added(builder, row_0, column[0])
            for token_id in column[1:]:
                node = _added(builder, node, token_id)
        return len(self._columns)

    def _harvest(self, round: Round) -> list[tuple[int, ...]]:
        """Give the n-grams to the pool; the columns as they go on, each by one row."""
        advanced = []
        for column, node in zip(self._columns, self._last_row(round.draft), strict=False):
            run = (*column, round.likeliest[node])
            self._pool.add(run, answer=False)
            advanced.append(run[1:])
        return advanced

    def _last_row(self, draft: DraftTree) -> Iterator[int]:
        """The nodes of the last row. Looked up by their tokens, as whoever verifies a draft may have cut it."""
        row_0: int | None = 0
        for column in self._columns[: self._drafted]:
            row_0 = node = draft.child(row_0, column[0]) if row_0 is not None else None
            for token_id in column[1:]:
                node = draft.child(node, token_id) if node is not None else None
            if node is None:
                return
            yield node

    def _move(self, advanced: list[tuple[int, ...]], emitted: int) -> None:
        """Keep the columns that still stand where their tokens belong, now that the root is `emitted` tokens further.

        Those that were not drafted have not moved themselves, so the first of them is where the last one drafted is.
        """
        if emitted:
            behind = max(emitted, len(advanced) + 1 if advanced else 0)
            self._columns = [*advanced[emitted - 1 :], *self._columns[behind:]]


class WindowCostTracker:
    """Whether a window pays: judged after every few rounds with one, and tried again rarely where it did not."""

    _TRIAL = 64
    """Rounds before a judgement: n-grams pay some time after they were found."""
    _RETRY = 1024
    """Rounds after which a window that did not pay gets another chance."""
    _SAVED = 0.75
    """Passes saved by a token that only windows guessed. A pass would have ended with it, but the next one would have
    begun with new guesses of everybody's. Measured: 0.7 and 0.8 (SmolLM2-135M; 5 and 10 columns, 4-grams)."""

    def __init__(self) -> None:
        self._declined = 0
        self._begin()

    def pays(self) -> bool:
        """Whether the next round should carry a window."""
        if self._declined:
            self._declined -= 1
        return not self._declined

    def learn(self, extra: float, gained: int) -> None:
        """Take note of a round with a window.

        `extra`: what the window added to the pass, in units of the pass without it; `gained`: accepted tokens that only
        windows guessed.
        """
        self._rounds += 1
        self._saved += gained * self._SAVED - extra
        if self._rounds == self._TRIAL:
            self._declined = 0 if self._saved > 0 else self._RETRY
            self._begin()

    def _begin(self) -> None:
        self._rounds, self._saved = 0, 0.0


def gained(round: Round) -> int:
    """Accepted tokens that nobody but the window guessed: its own cells, and phrases of its pool.

    What another source guessed as well, however unsure it was, is not counted.
    """
    return sum(round.draft.sources[node] == NAME and _alone(round.draft.evidence[node]) for node in round.accepted)


def rebuilt(draft: DraftTree, width: int) -> TreeBuilder:
    """A builder that holds `draft` already, as far as `width` reaches."""
    builder = TreeBuilder(draft.token_ids[0], width)
    nodes: list[int | None] = [0]
    for node in range(1, draft.width):
        parent = nodes[draft.parents[node]]
        guess = draft.token_ids[node], draft.chances[node], draft.sources[node], draft.evidence[node]
        nodes.append(None if parent is None else builder.add(parent, *guess))
    return builder


def _alone(evidence: Hashable) -> bool:
    """Whether no source but the window's guessed this token. Cells rest on no evidence."""
    kinds = evidence.evidence if isinstance(evidence, Estimate) else ()
    return all(isinstance(kind, tuple) and (kind[0] == NAME or kind[1] == "other") for kind in kinds)


def _added(builder: TreeBuilder, parent: int, token_id: int) -> int:
    node = builder.add(parent, token_id, _CHANCE, NAME)
    assert node is not None  # columns are begun only where there is room for all of them
    return node
