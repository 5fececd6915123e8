"""Calibrated acceptance probabilities, learned online per evidence bucket."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from math import exp, log
from typing import Any, NamedTuple

_PRIOR_WEIGHT = 8.0
"""A prior counts as this many observations."""

_MEMORY = 1000.0
"""Observations after which half of them are forgotten, so that chances follow the text."""

_LEARNING_RATE = 0.01

_WEIGHTS = {"recycling": 0.3, "retrieval": 0.2}
"""Where weights begin for sources that say little beside others. Of documents the prompt mostly holds what matters, so
what they say beside it is said twice already."""

_BESIDE_ANSWERS = 0.1
"""Where the others' weights begin beside an answer that was given to the same prompt: it has all that they know."""

_CERTAIN = 0.9995
"""No single source is believed more than this."""


Situation = tuple[str, int]
"""Which sources have a say, joined by "+", and how much text stands behind them: opinions are weighed by it."""


class Estimate(NamedTuple):
    """The chance of one guess, and what it was estimated from."""

    chance: float
    evidence: tuple[Hashable, ...]
    """Per source that had a say."""
    inputs: tuple[float, ...]
    """Per source that had a say: the log odds of its own chance."""
    situation: Situation


class Calibration:
    """Per kind of evidence, how often guesses were right that the target got to judge; and how far, in each situation,
    each source's opinion counts.

    The opinions are mixed in the logistic domain, `chance = sigmoid(bias + sum(weight * log odds))`, and the weights
    follow the gradient of coding cost (the mixing of the PAQ compressors, Mahoney 2005), online.
    """

    def __init__(self) -> None:
        self._counts: dict[Hashable, tuple[float, float]] = {}
        self._weights: dict[Situation, list[float]] = {}

    def chance(self, evidence: Hashable, prior: float) -> float:
        """The estimated probability that a guess on `evidence` is right."""
        hits, trials = self._counts.get(evidence, (0.0, 0.0))
        return (hits + prior * _PRIOR_WEIGHT) / (trials + _PRIOR_WEIGHT)

    def log_odds(self, evidence: Hashable, prior: float) -> float:
        chance = min(max(self.chance(evidence, prior), 1 - _CERTAIN), _CERTAIN)
        return log(chance / (1 - chance))

    def weights(self, situation: Situation) -> Sequence[float]:
        """The weight of each source that has a say, and a bias."""
        known = self._weights.get(situation)
        if known is None:
            names = situation[0].split("+")
            known = [_first_weight(name, names) for name in names] + [0.0]
            self._weights[situation] = known
        return known

    def learn(self, estimate: Estimate, hit: bool) -> None:
        """Take note of what became of a guess."""
        for evidence in estimate.evidence:
            hits, trials = self._counts.get(evidence, (0.0, 0.0))
            fade = 0.5 if trials >= _MEMORY else 1.0
            self._counts[evidence] = (hits * fade + hit, trials * fade + 1)
        weights = self._weights[estimate.situation]
        step = _LEARNING_RATE * (hit - estimate.chance)
        for number, value in enumerate(estimate.inputs):
            weights[number] += step * value
        weights[-1] += step

    def to_bytes(self) -> bytes:
        """All that was learned, to be kept."""
        # Copies: another turn of the scope may be in the middle of a round.
        kept, weighed = list(self._counts.items()), list(self._weights.items())
        counts = [[list(key), round(hits, 2), trials] for key, (hits, trials) in kept]  # type: ignore[call-overload]
        weights = [[list(key), [round(weight, 4) for weight in value]] for key, value in weighed]
        return json.dumps({"version": 1, "counts": counts, "weights": weights}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Calibration:
        """What `to_bytes` kept; nothing learned where it cannot be read, which costs speed only."""
        calibration = cls()
        try:
            kept: dict[str, Any] = json.loads(data)
            if kept["version"] == 1:
                calibration._counts = {
                    tuple(key): (max(0.0, float(hits)), max(0.0, float(trials))) for key, hits, trials in kept["counts"]
                }
                for (names, length), weights in kept["weights"]:
                    if len(calibration.weights((names, length))) == len(weights):
                        calibration._weights[names, length] = [float(weight) for weight in weights]
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls()
        return calibration


def _first_weight(name: str, names: Sequence[str]) -> float:
    # Alone, a source is taken at its word; beside others, for a part of what they know together.
    if len(names) == 1 or name == "answers":
        return 1.0
    return _BESIDE_ANSWERS if "answers" in names else _WEIGHTS.get(name, 0.85)


def mix(weights: Sequence[float], inputs: Sequence[float]) -> float:
    """The chance that opinions come to together."""
    total = weights[-1]
    for weight, value in zip(weights, inputs, strict=False):
        total += weight * value
    return 1 / (1 + exp(-total)) if total > -30 else 0.0
