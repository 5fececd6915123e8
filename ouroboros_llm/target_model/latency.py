"""How long a pass over so many tokens takes, learned from the passes themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import exp, log
from time import perf_counter
from typing import Any

import numpy as np
import torch

WIDTHS = (1, 2, 4, 8, 16, 32, 64)


def padded(width: int) -> int:
    """The width of the pass of fixed shape that a draft of `width` nodes takes."""
    return next(wide for wide in WIDTHS if wide >= width)


PRIOR_COSTS = {
    # Qwen2.5-Coder 0.5B and 1.5B, bfloat16, two CPU cores: arithmetic soon outweighs reading the weights.
    "cpu": (1.0, 1.0, 1.01, 1.07, 1.38, 2.0, 2.95),
    # SmolLM2-135M, float32, two CPU cores: the first token more already takes another, slower matrix kernel.
    "cpu float32": (1.0, 1.5, 1.5, 1.5, 1.9, 2.3, 3.0),
    # A step bound by memory: reading the weights once outweighs everything else.
    "cuda": (1.0, 1.0, 1.0, 1.02, 1.05, 1.1, 1.25),
}

_PACE_RATE, _PACE_STEP = 0.4, 1.0
_COST_RATE, _COST_STEP = 0.15, 0.1
"""How far an estimate follows one pass, and the largest surprise that it takes seriously, in logarithms."""


class LatencyModel:
    """What passes of each width cost, and how fast the machine is at the moment; a prior until passes have been seen.

    The time of a pass is the pace of the moment times the cost of its width. Other work can slow a machine down for a
    while, so the pace follows quickly, and the costs, which belong to the model, slowly: wide passes of a slow stretch
    do not look dear beside narrow ones of a fast stretch, and single slow passes hardly count.
    """

    def __init__(self, kind: str, *, padded: bool = False, costs: Sequence[float] | None = None) -> None:
        """`kind`: a key of `PRIOR_COSTS`; anything else is taken for an accelerator. `padded`: drafts are filled up to
        the next of `WIDTHS`, so that all up to there take as long. `costs`: those that an earlier process learned."""
        self._padded = padded
        prior = [log(cost) for cost in PRIOR_COSTS.get(kind, PRIOR_COSTS["cuda"])]
        self._knots = prior if costs is None else list(costs)
        self._pace: float | None = None
        self._costs = self._table()

    def add(self, width: int, seconds: float) -> None:
        """Take note of one pass."""
        expected = log(self.cost(width))
        if self._pace is None:
            self._pace = log(seconds) - self._knots[0] - expected
        surprise = log(seconds) - self._pace - self._knots[0] - expected
        knot = self._knot(width)
        self._pace += _PACE_RATE * _clipped(surprise, _PACE_STEP)
        self._knots[knot] += _COST_RATE * _clipped(surprise, _COST_STEP)
        self._costs = self._table()

    def cost(self, width: int) -> float:
        """Time of a pass over `width` tokens in units of a pass over one; between knots linear, or that of the next
        one where passes are padded; linear beyond the last; never falling."""
        if width <= WIDTHS[-1]:
            return self._costs[width]
        slope = (self._costs[WIDTHS[-1]] - self._costs[WIDTHS[-2]]) / (WIDTHS[-1] - WIDTHS[-2])
        return self._costs[WIDTHS[-1]] + slope * (width - WIDTHS[-1])

    def follow(self, surprise: float) -> None:
        """Let the pace follow a pass of another kind that took `exp(surprise)` times what was expected."""
        if self._pace is not None:
            self._pace += _clipped(surprise, _PACE_STEP)

    @property
    def costs(self) -> tuple[float, ...]:
        """Logarithm of the cost of each of `WIDTHS`, as learned until now."""
        return tuple(self._knots)

    @property
    def one(self) -> float | None:
        """Seconds of a pass over one token at the moment, deduced from other widths too; None before any pass."""
        return None if self._pace is None else exp(self._pace + self._knots[0])

    def _knot(self, width: int) -> int:
        """The knot that a pass over so many tokens says most of."""
        if self._padded:
            return int(np.searchsorted(WIDTHS[:-1], width))
        return min(range(len(WIDTHS)), key=lambda knot: abs(WIDTHS[knot] - width))

    def _table(self) -> list[float]:
        costs = np.maximum.accumulate(np.exp(np.subtract(self._knots, self._knots[0])))
        if self._padded:
            return [float(costs[self._knot(width)]) for width in range(WIDTHS[-1] + 1)]
        return [float(cost) for cost in np.interp(range(WIDTHS[-1] + 1), WIDTHS, costs)]


def _clipped(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


def on(device: torch.device) -> AbstractContextManager[None]:
    """Kernels are started on the device that is current, whichever their arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class PassTimer:
    """Takes note of passes: on a CPU at once, on an accelerator when they are over and somebody asks again."""

    def __init__(self, times: LatencyModel) -> None:
        self.times = times
        self._running: list[tuple[int, Any, Any]] = []

    @contextmanager
    def over(self, width: int, device: torch.device) -> Iterator[None]:
        """Around a pass over so many tokens. What raises is not counted."""
        if device.type != "cuda":
            start = perf_counter()
            yield
            self.times.add(width, perf_counter() - start)
            return
        self.settle()
        with on(device):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            yield
            ended.record()
        self._running.append((width, began, ended))

    def settle(self) -> None:
        """Count the passes that are over."""
        while self._running and self._running[0][2].query():
            width, began, ended = self._running.pop(0)
            self.times.add(width, began.elapsed_time(ended) / 1000)
