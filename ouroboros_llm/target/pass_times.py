"""How long a pass over so many tokens takes, learned from the passes themselves."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

WIDTHS = (1, 2, 4, 8, 16, 32, 64)

PRIOR_COSTS = {
    # Qwen2.5-Coder 0.5B and 1.5B, bfloat16, two CPU cores: arithmetic soon outweighs reading the weights.
    "cpu": (1.0, 1.0, 1.01, 1.07, 1.38, 2.0, 2.95),
    # SmolLM2-135M, float32, two CPU cores: the first token more already takes another, slower matrix kernel.
    "cpu float32": (1.0, 1.5, 1.5, 1.5, 1.9, 2.3, 3.0),
    # A step bound by memory: reading the weights once outweighs everything else.
    "cuda": (1.0, 1.0, 1.0, 1.02, 1.05, 1.1, 1.25),
}


class PassTimes:
    """The median of the last few pass times by width, in seconds; a prior stands in for widths that were not seen."""

    _SAMPLES = 7

    def __init__(self, kind: str) -> None:
        """`kind`: a key of `PRIOR_COSTS`; anything else is taken for an accelerator."""
        self._prior = dict(zip(WIDTHS, PRIOR_COSTS.get(kind, PRIOR_COSTS["cuda"]), strict=True))
        self._samples: dict[int, deque[float]] = {}

    def add(self, width: int, seconds: float) -> None:
        """Take note of one pass."""
        knot = min(WIDTHS, key=lambda knot: abs(knot - width))
        # Other work on the machine makes single passes slow; a median does not follow them.
        self._samples.setdefault(knot, deque(maxlen=self._SAMPLES)).append(seconds)

    def cost(self, width: int) -> float:
        """Time of a pass over `width` tokens in units of a pass over one; linear between knots, never falling."""
        one = self.one
        costs = [self._prior[knot] if one is None else self._cost_at(knot, one) for knot in WIDTHS]
        return float(np.interp(width, WIDTHS, np.maximum.accumulate(costs)))

    @property
    def one(self) -> float | None:
        """Seconds of a pass over one token, deduced from the other widths where none was seen; None before any pass."""
        if 1 in self._samples:
            return median(self._samples[1])
        seen = [median(samples) / self._prior[knot] for knot, samples in self._samples.items()]
        return median(seen) if seen else None

    def _cost_at(self, knot: int, one: float) -> float:
        return max(1.0, median(self._samples[knot]) / one) if knot in self._samples else self._prior[knot]
