"""One tree from every source, likeliest paths first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import Any

from ..decoding.draft_tree import MAX_WIDTH, DraftTree, TreeBuilder
from ..decoding.drafter import Budget, Round
from .base import Guesses, Rule, Source
from .calibration import Calibration, Estimate, Situation, mix

_MIN_PATH_CHANCE = 0.003
"""Paths less likely than this are never worth a node."""

_LONG_MATCH = 6
"""Matches longer than this are one situation."""

_CERTAIN = Estimate(1.0, (), (), ("", 0))
"""Of what a rule forces. It rests on no evidence, and there is nothing to learn from it."""

States = list[Any]
"""Per source: its state, or None."""


class TreeDrafter:
    """A `Drafter` over sources of guesses: all their guesses in one currency, the calibrated chance that the target
    chooses a token given that its parent was chosen; equal tokens are one node; the tree grows best-first by the
    product of chances along the path, as wide as pays.

    That one rule holds dynamic trees (DySpec, arXiv 2410.11744), the fusion and pruning of trees (RASD, arXiv
    2503.03434) and stopping where acceptance gets unlikely (SpecDec++, arXiv 2405.19715).
    """

    def __init__(self, sources: Sequence[Source], calibration: Calibration | None = None) -> None:
        """`sources`: the most telling first, at most one of them a `Rule`; `calibration`: what is known of how often
        they are right."""
        self.sources = tuple(sources)
        self._rule = next(((n, source) for n, source in enumerate(sources) if isinstance(source, Rule)), None)
        self.calibration = calibration or Calibration()
        self._names: dict[tuple[int, ...], str] = {}

    def open(self, context: Sequence[int]) -> None:
        for source in self.sources:
            source.open(context)

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        builder, width = TreeBuilder(context[-1], budget.width), WidthChoice(budget)
        heap: list[tuple[float, int, int, int, str, Estimate, States]] = []
        node, depths = 0, [0]
        states = [source.start(context) for source in self.sources]
        pushed = 0
        while True:
            ends = node > 0 and builder.token_ids[node] in budget.end_token_ids
            if depths[node] < budget.depth and not ends:
                path_chance = builder.path_chances[node]
                for token_id, source, estimate in self._estimates(states):
                    if path_chance * estimate.chance > _MIN_PATH_CHANCE:
                        pushed += 1
                        heappush(
                            heap, (-path_chance * estimate.chance, pushed, node, token_id, source, estimate, states)
                        )
            if not heap or not builder.room:
                break
            negative, _, parent, token_id, source, estimate, before = heappop(heap)
            added = builder.add(parent, token_id, estimate.chance, source, estimate)
            if added is None or not width.add(-negative):
                break
            node = added
            depths.append(depths[parent] + 1)
            states = self._follow(before, token_id)
        return builder.build(width.best)

    def learn(self, round: Round) -> None:
        path = set(round.path)
        for node, parent in enumerate(round.draft.parents):
            # Only guesses whose parents were chosen were judged in their own context.
            estimate = round.draft.evidence[node]
            if parent in path and isinstance(estimate, Estimate) and estimate.evidence:
                self.calibration.learn(estimate, hit=node in path)
        for source in self.sources:
            source.learn(round)

    def _follow(self, states: States, token_id: int) -> States:
        return [
            None if state is None else source.follow(state, token_id)
            for source, state in zip(self.sources, states, strict=True)
        ]

    def _estimates(self, states: States) -> Iterator[tuple[int, str, Estimate]]:
        """(token, the source that is surest of it, estimate) of all guesses at one node."""
        rule, place = (None, None) if self._rule is None else (self._rule[1], states[self._rule[0]])
        if rule is not None and place is not None and (forced := rule.forced(place)) is not None:
            yield forced, rule.name, _CERTAIN
            return
        said: list[tuple[str, Guesses]] = []
        numbers = []
        for number, state in enumerate(states):
            if state is not None and (guesses := self.sources[number].guesses(state)) is not None:
                said.append((self.sources[number].name, guesses))
                numbers.append(number)
        situation = self._situation(tuple(numbers), said)
        weights = self.calibration.weights(situation) if said else ()
        log_odds = self.calibration.log_odds
        for token_id in dict.fromkeys(token_id for _, guesses in said for token_id in guesses.by_token):
            if rule is not None and place is not None and not rule.allows(place, token_id):
                continue
            evidence, inputs, surest, source = [], [], -100.0, ""
            for name, guesses in said:
                guess = guesses.by_token.get(token_id)
                kind, prior = guess or guesses.otherwise
                value = log_odds(kind, prior)
                evidence.append(kind)
                inputs.append(value)
                if guess is not None and value > surest:
                    surest, source = value, name
            chance = mix(weights, inputs)
            yield token_id, source, Estimate(chance, tuple(evidence), tuple(inputs), situation)

    def _situation(self, numbers: tuple[int, ...], said: list[tuple[str, Guesses]]) -> Situation:
        names = self._names.get(numbers)
        if names is None:
            names = self._names[numbers] = "+".join(self.sources[number].name for number in numbers)
        return names, min(max((guesses.match_length for _, guesses in said), default=0), _LONG_MATCH)


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
