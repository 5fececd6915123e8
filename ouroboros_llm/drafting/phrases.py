"""Guesses from phrases: what followed the text's own ending before, here or in earlier texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from ..draft_tree import DraftTree, TreeBuilder
from ..phrases import MATCH_LIMIT, MemoryPool, Phrase, PhrasePool
from .base import Budget, Round
from .budget import best_width
from .calibration import Calibration

SOURCE = "phrases"

_MIN_REJECTED_RUN = 3
"""Shorter runs of a rejected draft say little: one token and the target's next."""

_MIN_CHANCE = 0.003
"""Paths less likely than this are never worth a node."""


@dataclass(slots=True)
class _Branch:
    """The phrases that agree so far, merged into one node."""

    weight: float = 0.0
    match_length: int = 0
    children: dict[int, _Branch] = field(default_factory=dict)


class PhraseDrafter:
    """Grows the likeliest continuations, best first, from the running text and the pools of a session."""

    def __init__(
        self,
        read: Sequence[PhrasePool] = (),
        *,
        write: PhrasePool | None = None,
        running_text: MemoryPool | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """`read`: pools to look in; `write`: where rejected-but-right runs go; a `running_text` given is only read."""
        self._owns_text = running_text is None
        self.running_text = running_text or MemoryPool()
        self._pools = (self.running_text, *read)
        self._write = write
        self._calibration = calibration or Calibration()

    def open(self, context: Sequence[int]) -> None:
        if self._owns_text:
            self.running_text.extend(context)

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        builder = TreeBuilder(context[-1], budget.width)
        self.grow(builder, 0, context, budget)
        return builder.build()

    def learn(self, round: Round) -> None:
        self._calibration.learn(round, SOURCE)
        if self._owns_text:
            self.running_text.extend(round.token_ids)
        if self._write is not None:
            for run in rejected_but_right(round):
                self._write.add(run)

    def grow(self, builder: TreeBuilder, node: int, context: Sequence[int], budget: Budget) -> None:
        """Add what may follow `context`, which ends at `node` of the tree, as far as it pays."""
        guesses = list(self._guesses(context, builder.path_chances[node], min(builder.room, budget.depth)))
        wanted = best_width([*builder.path_chances[1:], *(guess[0] for guess in guesses)], budget)
        nodes = [node]
        for _, parent, token_id, chance, evidence in guesses[: max(0, wanted - len(builder.token_ids))]:
            added = builder.add(nodes[parent], token_id, chance, SOURCE, evidence)
            if added is None:
                return
            nodes.append(added)

    def _guesses(
        self, context: Sequence[int], path_chance: float, limit: int
    ) -> Iterator[tuple[float, int, int, float, tuple[int, int]]]:
        """(path chance, parent's number, token, chance, evidence) of at most `limit` guesses, likeliest path first.

        Guesses are numbered from 1 in the order they come; 0 is where they start.
        """
        tail = context[-MATCH_LIMIT:]
        root = self._merge((phrase for pool in self._pools for phrase in pool.match(tail)), limit)
        heap: list[tuple[float, int, int, int, float, tuple[int, int], _Branch]] = []
        pushed = number = 0
        branch, parent = root, 0
        while number < limit:
            for token_id, child in branch.children.items():
                chance, evidence = self._chance(child, branch)
                pushed += 1
                if path_chance * chance > _MIN_CHANCE:
                    heappush(heap, (-path_chance * chance, pushed, parent, token_id, chance, evidence, child))
            if not heap:
                return
            negative, _, origin, token_id, chance, evidence, branch = heappop(heap)
            path_chance, number = -negative, number + 1
            parent = number
            yield path_chance, origin, token_id, chance, evidence

    def _merge(self, phrases: Iterable[Phrase], limit: int) -> _Branch:
        """One tree of all phrases, cut after `limit` tokens."""
        root = _Branch()
        for phrase in phrases:
            # A longer match is rarer and says more; weights grow as fast as matches of that length get rarer.
            weight = phrase.count * 4.0 ** min(phrase.match_length, 8)
            branch = root
            for depth, token_id in enumerate(phrase.token_ids[:limit]):
                branch = branch.children.setdefault(token_id, _Branch())
                branch.weight += weight
                branch.match_length = max(branch.match_length, phrase.match_length + depth)
        return root

    def _chance(self, child: _Branch, parent: _Branch) -> tuple[float, tuple[int, int]]:
        """The chance of a branch from its share among its siblings and the length of the match behind it."""
        share = child.weight / sum(sibling.weight for sibling in parent.children.values())
        length = min(child.match_length, 12)
        evidence = (length, round_share(share))
        return self._calibration.chance(evidence, prior=share * (1 - 0.6**length)), evidence


def round_share(share: float) -> int:
    """Shares in five classes: the only continuation, most, about half, few, hardly any."""
    return sum(share >= bound for bound in (0.02, 0.2, 0.5, 0.95))


def rejected_but_right(round: Round) -> list[tuple[int, ...]]:
    """What the target says after rejected nodes: each rejected guess, the target's own choices as far as the draft
    happens to hold them, and one more. Maximal runs of at least three tokens (after Ouroboros, arXiv 2402.13720).
    """
    draft, rejected = round.draft, set(range(1, round.draft.width)) - set(round.path)
    runs = []
    for node in sorted(rejected):
        if round.likeliest[draft.parents[node]] == draft.token_ids[node] and draft.parents[node] in rejected:
            continue  # the run that started above goes through here
        run, at = [draft.token_ids[node]], node
        while (child := draft.child(at, round.likeliest[at])) is not None:
            run.append(draft.token_ids[child])
            at = child
        run.append(round.likeliest[at])
        if len(run) >= _MIN_REJECTED_RUN:
            runs.append(tuple(run))
    return runs
