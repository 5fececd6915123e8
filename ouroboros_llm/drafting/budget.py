"""How wide a draft pays."""

from __future__ import annotations

from ..draft_tree import MAX_WIDTH
from .base import Budget

_WIDTHS = tuple(2**power for power in range(1, MAX_WIDTH.bit_length()))


class WidthChoice:
    """Finds the number of nodes that promises most tokens per second (goodput, arXiv 2406.14066) as a draft grows.

    A pass emits one token and every guess whose whole path is right, so a draft of `width` nodes promises one and the
    sum of its path chances, in the time that a pass over `width` tokens takes.
    """

    def __init__(self, budget: Budget) -> None:
        """`budget`: its `cost` says what a pass takes, linear between powers of two. Without
        one, all guesses are worth it."""
        self.best = 1
        """The width that promises most, root included."""
        self._cost, self._limit = budget.cost, budget.width
        self._width, self._tokens, self._rate = 1, 1.0, 1.0

    def add(self, path_chance: float) -> bool:
        """Count one more node, no likelier than those before. Whether nodes as likely as this one might still pay."""
        self._width += 1
        self._tokens += path_chance
        if self._cost is None:
            self.best = self._width
            return True
        rate = self._tokens / self._cost(self._width)
        if rate > self._rate:
            self.best, self._rate = self._width, rate
        return any(
            self._tokens + path_chance * (width - self._width) > self._rate * self._cost(width)
            for width in _WIDTHS
            if self._width < width <= self._limit
        )
