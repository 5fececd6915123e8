"""How wide a draft pays."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Budget


def best_width(path_chances: Sequence[float], budget: Budget) -> int:
    """The number of nodes, root included, that promises most tokens per second (goodput, arXiv 2406.14066).

    Args:
        path_chances: per guess, best first: the probability that the whole path to it is accepted.
        budget: its `cost` says what a pass over so many tokens takes. Without one, all guesses are worth it.
    """
    if budget.cost is None:
        return min(1 + len(path_chances), budget.width)
    best, best_rate, tokens = 1, 1.0, 1.0
    for width, chance in enumerate(path_chances[: budget.width - 1], start=2):
        tokens += chance
        rate = tokens / budget.cost(width)
        if rate > best_rate:
            best, best_rate = width, rate
    return best
