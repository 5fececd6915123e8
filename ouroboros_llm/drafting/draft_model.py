"""Guesses from a small model, itself a decoder that the same phrases accelerate: the snake that bites its tail."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ..decoder import Decoder
from ..draft_tree import DraftTree, TreeBuilder
from ..verification import Choose
from .base import Budget, Round
from .calibration import Calibration
from .phrases import PhraseDrafter

SOURCE = "draft_model"


class DraftModelDrafter:
    """A path of the draft model's choices, lengthened by phrases, beside what phrases alone suggest.

    The draft model chooses greedily whatever the target does: drafts only say how far one pass may reach. It stops
    where the target is no longer likely to follow (a threshold on the estimated acceptance of the whole path, as in
    SpecDec++, arXiv 2405.19715), and does not start where phrases are already sure of as many tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        phrases: PhraseDrafter,
        *,
        length: int = 8,
        min_chance: float = 0.3,
        end_token_ids: Collection[int] = (),
        calibration: Calibration | None = None,
    ) -> None:
        """`decoder`: over the draft model; `phrases`: of the target; `length`: tokens drafted at most."""
        self._decoder, self._phrases, self._length, self._min_chance = decoder, phrases, length, min_chance
        self._end_token_ids = end_token_ids
        self._calibration = calibration or Calibration()
        self.forwards = 0
        """Passes of the draft model so far."""

    def open(self, context: Sequence[int]) -> None:
        self._phrases.open(context)

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        alone = self._phrases.draft(context, budget)
        if sum(_path_chances(alone)) > 1 + self._length / 2:
            return alone
        builder = TreeBuilder(context[-1], budget.width)
        leaf, path = self._grow(builder, context, budget)
        self._phrases.grow(builder, leaf, [*context, *path], budget)
        self._phrases.grow(builder, 0, context, budget)
        return builder.build()

    def learn(self, round: Round) -> None:
        self._phrases.learn(round)
        self._calibration.learn(round, SOURCE)

    def _grow(self, builder: TreeBuilder, context: Sequence[int], budget: Budget) -> tuple[int, list[int]]:
        """Add the draft model's path; its last node, and its tokens."""
        node, path = 0, list[int]()
        sampler = ConfidentSampler()
        limit = min(self._length, budget.depth, builder.room)
        for round in self._decoder.rounds(context, sampler, limit=limit, end_token_ids=self._end_token_ids):
            self.forwards += 1
            for token_id, probability in zip(round.token_ids, sampler.take(len(round.token_ids)), strict=True):
                evidence = round_probability(probability)
                chance = self._calibration.chance(evidence, prior=probability)
                child = builder.add(node, token_id, chance, SOURCE, evidence)
                if child is None or builder.path_chances[child] < self._min_chance:
                    return child or node, [*path, token_id] if child else path
                node = child
                path.append(token_id)
        return node, path


class ConfidentSampler:
    """A greedy `Chooser` that remembers how probable the draft model found each of its choices."""

    def __init__(self) -> None:
        self._probabilities: list[float] = []

    def chooser(self, logits: torch.Tensor, likeliest: Sequence[int], context: Sequence[int]) -> Choose:
        self._probabilities = []

        def choose(node: int, emitted: list[int]) -> int:
            row = logits[node].float()
            self._probabilities.append(float((row[likeliest[node]] - row.logsumexp(-1)).exp()))
            return likeliest[node]

        return choose

    def take(self, count: int) -> list[float]:
        """The probabilities of the last `count` choices."""
        return self._probabilities[-count:] if count else []


def round_probability(probability: float) -> int:
    """Probabilities in eight classes."""
    return min(int(probability * 8), 7)


def _path_chances(draft: DraftTree) -> list[float]:
    chances = [1.0]
    for node in range(1, draft.width):
        chances.append(chances[draft.parents[node]] * draft.chances[node])
    return chances
