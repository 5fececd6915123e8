"""Guesses from a small model, itself a decoder that the same phrases accelerate: the snake that bites its tail."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat.text import vocabulary_hash
from ..decoding.decoder import Decoder
from ..decoding.draft_tree import DraftTree
from ..decoding.drafter import Budget, Round, Successors
from ..decoding.sampling import Sampler
from ..errors import ModelError, OptionError, TokenizerMismatchError
from ..target_model.eager import vocabulary_size
from ..target_model.prepared import Kind, PreparedModel, prepare
from .base import Guess, Guesses
from .calibration import Calibration
from .cost_gate import CostTracker
from .tree_drafter import TreeDrafter

NAME = "draft_model"

ALTERNATIVES = 4
"""Tokens of the draft model's that are guesses at each place, the likeliest first."""

_PROBABILITIES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
"""Bounds of the classes in which guesses are equally good."""

_OTHERWISE = Guess((NAME, "other"), prior=0.05)


class DraftModel:
    """A `Source`: what a draft model would say next, and beside it what else it thinks likely.

    It chooses greedily whatever the target does, and stops where the target is no longer likely to follow (a threshold
    on the estimated acceptance of the whole path, as in SpecDec++, arXiv 2405.19715).
    """

    name = NAME

    def __init__(
        self,
        decoder: Decoder,
        calibration: Calibration,
        *,
        length: int = 8,
        min_chance: float = 0.3,
        end_token_ids: Collection[int] = (),
        context_length: int | None = None,
    ) -> None:
        """`decoder`: over the draft model, with `ALTERNATIVES` successors; `length`: tokens drafted at most;
        `min_chance`: of a path, to go on; `context_length`: tokens that the draft model can read."""
        self._decoder, self._calibration = decoder, calibration
        self.length, self._min_chance = length, min_chance
        self._end_token_ids, self._context_length = end_token_ids, context_length or sys.maxsize
        self._path: list[tuple[int, Successors]] = []
        self._begins_at = -1
        self.forwards = 0
        """Passes of the draft model so far."""

    def open(self, context: Sequence[int]) -> None:
        """The decoder opens its own text, every time it is asked."""

    def can_read(self, context: Sequence[int]) -> bool:
        return len(context) + self.length < self._context_length

    def ask(self, context: Sequence[int], limit: int) -> None:
        """Let the draft model go on from `context`; what it says holds for the next draft there."""
        self._path, self._begins_at = [], len(context)
        path_chance, limit = 1.0, min(self.length, limit)
        # It is asked a chunk at a time, and abandoned as soon as the path gets unlikely.
        for round in self._decoder.rounds(context, Sampler(), limit=limit, end_token_ids=self._end_token_ids):
            self.forwards += 1
            for node, token_id in zip(round.path, round.token_ids, strict=True):
                successors = round.successors[node]
                self._path.append((token_id, successors))
                guess = _guess(0, dict(successors).get(token_id, 0.0))
                path_chance *= self._calibration.chance(guess.evidence, guess.prior)
            if path_chance < self._min_chance:
                return

    def start(self, context: Sequence[int]) -> int | None:
        return 0 if self._path and self._begins_at == len(context) else None

    def follow(self, state: int, token_id: int) -> int | None:
        goes_on = self._path[state][0] == token_id and state + 1 < len(self._path)
        return state + 1 if goes_on else None

    def guesses(self, state: int) -> Guesses | None:
        successors = self._path[state][1]
        by_token = {token_id: _guess(rank, probability) for rank, (token_id, probability) in enumerate(successors)}
        return Guesses(by_token, _OTHERWISE)

    def learn(self, round: Round) -> None:
        """The text has grown: what was said of it is used up."""
        self._path = []


class DraftModelDrafter:
    """A `Drafter` that asks a draft model where its guesses pay, and blends them with what the other sources say."""

    def __init__(
        self,
        model: DraftModel,
        blend: TreeDrafter,
        *,
        pass_seconds: Callable[[], float | None] = lambda: None,
        worth: CostTracker | None = None,
    ) -> None:
        """`blend`: has `model` among its sources; `pass_seconds`: what a pass of the target takes; `worth`: what
        drafting has cost and brought so far."""
        self.model, self._blend, self._pass_seconds, self._worth = model, blend, pass_seconds, worth or CostTracker()
        self._asked = False

    def open(self, context: Sequence[int]) -> None:
        self._asked = False
        self._blend.open(context)

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        alone = self._blend.draft(context, budget)
        tokens = sum(_path_chances(alone))
        # Where the other sources are sure of as much as it could say, it need not be asked.
        sure = tokens > 1 + self.model.length / 2
        if sure or not self.model.can_read(context) or not self._worth.pays(tokens, self._pass_seconds()):
            return alone
        began = perf_counter()
        self.model.ask(context, min(budget.depth, budget.width - 1))
        if self._asked:
            # The first time it reads the whole prompt, which says nothing of the times to come.
            self._worth.spent(perf_counter() - began)
        self._asked = True
        return self._blend.draft(context, budget)

    def learn(self, round: Round) -> None:
        if NAME in round.draft.sources:
            self._worth.gained(len(round.token_ids))
        self._blend.learn(round)


def _guess(rank: int, probability: float) -> Guess:
    # The likeliest token is the target's choice more often than its probability says: both are a little alike.
    prior = 0.3 + 0.7 * probability if rank == 0 else probability / 2
    return Guess((NAME, rank, bisect_right(_PROBABILITIES, probability)), prior)


def _path_chances(draft: DraftTree) -> list[float]:
    chances = [1.0]
    for node in range(1, draft.width):
        chances.append(chances[draft.parents[node]] * draft.chances[node])
    return chances


def load_draft(
    draft_model: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, kind: Kind = "auto"
) -> PreparedModel:
    """The draft model, loaded where it is a name.

    Args:
        model, tokenizer, name: the target's.
        kind: how its passes are made.

    Raises:
        TokenizerMismatchError: another vocabulary. ModelError: its states cannot be rewound. OptionError: no model.
    """
    draft, other = _draft_pair(draft_model, model)
    fingerprint = vocabulary_hash(tokenizer)
    if other is not None and vocabulary_hash(other) != fingerprint:
        raise TokenizerMismatchError(
            f"draft_model must share the target's vocabulary ({name}: {fingerprint[:12]}, {len(tokenizer)} tokens), "
            f"but {draft.config._name_or_path or type(draft).__name__} has {vocabulary_hash(other)[:12]}, "
            f"{len(other)} tokens; choose a smaller model of the same family"
        )
    if vocabulary_size(draft) < len(tokenizer):
        raise TokenizerMismatchError(
            f"draft_model must embed all {len(tokenizer)} tokens of the target's tokenizer, "
            f"but it has {vocabulary_size(draft)}; choose a smaller model of the same family"
        )
    prepared = prepare(draft, kind)
    if not prepared.start().can_rewind:
        raise ModelError(
            "draft_model must be able to drop tokens it has read, but "
            f"{draft.config._name_or_path or type(draft).__name__} keeps states that cannot be rewound; "
            "choose a model with attention layers only"
        )
    return prepared


def _draft_pair(draft_model: Any, model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The draft model, and its tokenizer where there is one to compare."""
    if isinstance(draft_model, (str, Path)):
        from ..models import loading as models

        loaded = models.load(draft_model, device=str(model.device), dtype=model.dtype)
        return loaded.model, loaded.tokenizer
    if isinstance(draft_model, tuple) and len(draft_model) == 2:
        return draft_model
    if isinstance(draft_model, PreTrainedModel):
        return draft_model, None
    raise OptionError(
        "draft_model must be a registry name, a path, a hub id, a model or a pair (model, tokenizer), "
        f"but got {type(draft_model).__name__}"
    )
