"""Chances that mean what they say: how often guesses on like evidence were right."""

from __future__ import annotations

from collections.abc import Hashable

from .base import Round


class Calibration:
    """Per kind of evidence, how many guesses the target chose out of those it got to judge."""

    _PRIOR_WEIGHT = 4.0
    _MEMORY = 256.0

    def __init__(self) -> None:
        self._counts: dict[Hashable, tuple[float, float]] = {}

    def chance(self, evidence: Hashable, prior: float) -> float:
        """The estimated probability that a guess on `evidence` is right; `prior` counts as a few observations."""
        hits, trials = self._counts.get(evidence, (0.0, 0.0))
        return (hits + prior * self._PRIOR_WEIGHT) / (trials + self._PRIOR_WEIGHT)

    def learn(self, round: Round, source: str) -> None:
        """Count the guesses of `source` whose parents were chosen: only those were judged in their own context."""
        path = set(round.path)
        for node in range(1, round.draft.width):
            if round.draft.parents[node] in path and round.draft.sources[node] == source:
                self._count(round.draft.evidence[node], node in path)

    def _count(self, evidence: Hashable, hit: bool) -> None:
        hits, trials = self._counts.get(evidence, (0.0, 0.0))
        # Old observations fade, so that the chances follow the text.
        fade = 0.5 if trials >= self._MEMORY else 1.0
        self._counts[evidence] = (hits * fade + hit, trials * fade + 1)
