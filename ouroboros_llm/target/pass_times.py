"""How long a pass over so many tokens takes, learned from the passes themselves."""

from __future__ import annotations

import numpy as np

WIDTHS = (1, 2, 4, 8, 16, 32, 64)

PRIOR_COSTS = {
    # Qwen2.5-Coder 0.5B and 1.5B, bfloat16, two CPU cores: arithmetic soon outweighs reading the weights.
    "cpu": (1.0, 1.0, 1.01, 1.07, 1.38, 2.0, 2.95),
    # A step bound by memory: reading the weights once outweighs everything else.
    "cuda": (1.0, 1.0, 1.0, 1.02, 1.05, 1.1, 1.25),
}


class PassTimes:
    """Moving averages of pass times by width, in seconds; a prior stands in for widths that were not seen."""

    _WEIGHT = 0.2

    def __init__(self, device_type: str) -> None:
        self._prior = dict(zip(WIDTHS, PRIOR_COSTS.get(device_type, PRIOR_COSTS["cuda"]), strict=True))
        self._seconds: dict[int, float] = {}

    def add(self, width: int, seconds: float) -> None:
        """Take note of one pass."""
        knot = min(WIDTHS, key=lambda knot: abs(knot - width))
        # Other work on the machine only ever lengthens a pass, so one slow pass counts for little.
        seconds = min(seconds, 2 * self._seconds.get(knot, seconds))
        self._seconds[knot] = self._seconds.get(knot, seconds) * (1 - self._WEIGHT) + seconds * self._WEIGHT

    def cost(self, width: int) -> float:
        """Time of a pass over `width` tokens in units of a pass over one; linear between knots, never falling."""
        costs = np.maximum.accumulate([self._cost_at(knot) for knot in WIDTHS])
        return float(np.interp(width, WIDTHS, costs))

    def _cost_at(self, knot: int) -> float:
        return max(1.0, self._seconds[knot] / self._one) if knot in self._seconds else self._prior[knot]

    @property
    def _one(self) -> float:
        """Seconds of a pass over one token, deduced from the other widths where none was seen."""
        if 1 in self._seconds:
            return self._seconds[1]
        return float(np.mean([seconds / self._prior[knot] for knot, seconds in self._seconds.items()]))
