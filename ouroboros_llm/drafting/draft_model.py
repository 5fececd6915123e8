"""Guesses from a small model, itself a decoder that the same phrases accelerate: the snake that bites its tail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from time import perf_counter

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
        context_length: int | None = None,
        pass_seconds: Callable[[], float | None] = lambda: None,
        calibration: Calibration | None = None,
        worth: Worth | None = None,
    ) -> None:
        """`decoder`: over the draft model; `phrases`: of the target; `length`: tokens drafted at most.

        `context_length`: tokens that the draft model can read; `pass_seconds`: what a pass of the target takes;
        `worth`: what drafting has cost and brought so far.
        """
        self._decoder, self._phrases, self._length, self._min_chance = decoder, phrases, length, min_chance
        self._end_token_ids, self._pass_seconds = end_token_ids, pass_seconds
        self._context_length = context_length or sys.maxsize
        self._calibration, self._worth = calibration or Calibration(), worth or Worth()
        self.forwards = 0
        """Passes of the draft model so far."""

    def open(self, context: Sequence[int]) -> None:
        self._phrases.open(context)

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        alone = self._phrases.draft(context, budget)
        tokens = sum(_path_chances(alone))
        readable = len(context) + self._length < self._context_length
        if tokens > 1 + self._length / 2 or not readable or not self._worth.pays(tokens, self._pass_seconds()):
            return alone
        builder = TreeBuilder(context[-1], budget.width)
        began = perf_counter()
        leaf, path = self._grow(builder, context, budget)
        self._worth.spent(perf_counter() - began)
        self._phrases.grow(builder, leaf, [*context, *path], budget)
        self._phrases.grow(builder, 0, context, budget)
        return builder.build()

    def learn(self, round: Round) -> None:
        self._phrases.learn(round)
        self._calibration.learn(round, SOURCE)
        if SOURCE in round.draft.sources:
            self._worth.gained(len(round.token_ids))

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


class Worth:
    """Whether asking the draft model pays: moving averages of what a draft takes and what its rounds emit."""

    _TRIALS = 8
    """Rounds before judging."""
    _RETRY = 32
    """Rounds after which a draft model that did not pay gets another chance."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0
        self._rounds = self._declined = 0

    def pays(self, tokens: float, pass_seconds: float | None) -> bool:
        """Whether a draft promises more tokens per second than the `tokens` that a pass emits without it."""
        if self._rounds < self._TRIALS or pass_seconds is None or self._declined >= self._RETRY:
            self._declined = 0
            return True
        pays = self._tokens / (pass_seconds + self._seconds) > tokens / pass_seconds
        self._declined = 0 if pays else self._declined + 1
        return pays

    def spent(self, seconds: float) -> None:
        """A draft took so long."""
        self._rounds += 1
        self._seconds += (seconds - self._seconds) / min(self._rounds, 16)

    def gained(self, tokens: int) -> None:
        """A round with a draft of the draft model emitted so many tokens."""
        self._tokens += (tokens - self._tokens) / min(self._rounds, 16)


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
