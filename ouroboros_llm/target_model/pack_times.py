"""How long a pass over several texts takes, learned from such passes."""

from __future__ import annotations

from math import exp, log

from .pass_times import PassTimes

_RATE, _STEP, _PACE_RATE = 0.3, 1.0, 0.1
_FORGET = 0.99

Kind = tuple[bool, int, int]
"""Passes whose surplus is the same: whether for several texts, and the sizes of tokens and keys in powers of two."""


class PackTimes:
    """What passes cost that `PassTimes` does not know: over several texts, or over more tokens than a draft has.

    Such a pass takes what one over as many tokens of a single text would, and a surplus: for keys and values that are
    laid side by side, and for scores of texts that do not see each other. The surplus is measured for each kind.
    """

    def __init__(self, times: PassTimes) -> None:
        self._times = times
        self._surplus: dict[Kind, float] = {}

    @property
    def one(self) -> float | None:
        """Seconds of a pass over one token."""
        return self._times.one

    def alone(self, tokens: int) -> float:
        """Cost of a pass over so many tokens of one text, in units of a pass over one; deduced beyond a draft's."""
        return self._times.cost(tokens)

    def cost(self, passes: int, tokens: int, keys: int) -> float:
        """Cost of making so many passes in one: over `tokens` in all, which see `keys` in all."""
        return self.alone(tokens) * exp(self._surplus_of(_kind(passes, tokens, keys)))

    def add(self, passes: int, tokens: int, keys: int, seconds: float) -> None:
        """Take note of such a pass."""
        one, kind = self.one, _kind(passes, tokens, keys)
        if one is None:
            return
        surprise = log(seconds / one / self.cost(passes, tokens, keys))
        self._surplus[kind] = self._surplus_of(kind) + _RATE * max(-_STEP, min(surprise, _STEP))
        # Where no other passes are made, these alone tell whether the machine is slow at the moment.
        self._times.follow(_PACE_RATE * surprise)

    def failed(self, passes: int, tokens: int, keys: int) -> None:
        """Such a pass raised: better none like it for a while."""
        kind = _kind(passes, tokens, keys)
        self._surplus[kind] = max(self._surplus_of(kind), 2 * _STEP)

    def declined(self, passes: int, tokens: int, keys: int) -> None:
        """Such a pass seemed not to pay: each time it looks a little better, so that it is tried again."""
        kind = _kind(passes, tokens, keys)
        self._surplus[kind] = self._surplus_of(kind) * _FORGET

    def _surplus_of(self, kind: Kind) -> float:
        """In logarithms; of kinds that have not been seen, that of the most similar one that has."""
        if kind not in self._surplus:
            similar = [known for known in list(self._surplus) if known[0] == kind[0]]
            distances = [abs(known[1] - kind[1]) + abs(known[2] - kind[2]) for known in similar]
            return self._surplus[similar[distances.index(min(distances))]] if similar else 0.0
        return self._surplus[kind]


def _kind(passes: int, tokens: int, keys: int) -> Kind:
    return passes > 1, tokens.bit_length(), keys.bit_length()
