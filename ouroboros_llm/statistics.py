"""What a generation returned and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .drafting.base import Round

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, counted as the model saw them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were still there from the turn before; part of `prompt_tokens`."""
    dropped_tokens: int = 0
    """Tokens of the prompt that were left out because of `overflow="slide"`; no part of `prompt_tokens`."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class DecodingStatistics:
    """What drafting bought in one generation."""

    rounds: int = 0
    """Draft, verify, accept cycles; the prefill is not one of them."""
    target_forwards: int = 0
    """Forward passes of the target model, the prefill counted as one whatever its chunks."""
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Drafted tokens that the target chose. Each round emits these and one more of its own."""
    accepted_by_source: Mapping[str, int] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    """Per token of the answer: the source that drafted it, or "recovered" (all drafts for it were rejected) or "bonus"
    (there were none to reject)."""
    draft_forwards: int = 0
    """Forward passes of the draft model."""
    seconds: float = 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Completion tokens per target forward, prefill counted as one; 1.0 is plain decoding."""
        return self.completion_tokens / self.target_forwards if self.target_forwards else 0.0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The answer to one prompt.

    `token_ids` include the end-of-sequence token and the token that completed a stop string; `text` has neither.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    statistics: DecodingStatistics


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a streamed answer: one round's worth of text."""

    text: str
    token_ids: tuple[int, ...]
    result: GenerationResult | None = None
    """The whole answer, on the last piece only."""


class Tally:
    """Counts while rounds go by."""

    def __init__(self) -> None:
        self._forwards = self._drafted = 0
        self._accepted: Counter[str] = Counter()
        self._origins: list[str] = []
        self.seconds = 0.0

    @property
    def rounds(self) -> int:
        """Cycles so far; the prefill is none."""
        return max(0, self._forwards - 1)

    def add(self, round: Round) -> None:
        """Count one round; the first is the prefill."""
        self._forwards += 1
        self._drafted += round.draft.width - 1
        self._origins += round.origins
        self._accepted.update(round.draft.sources[node] for node in round.accepted)

    def statistics(self, completion_tokens: int, draft_forwards: int = 0) -> DecodingStatistics:
        return DecodingStatistics(
            rounds=self.rounds,
            target_forwards=self._forwards,
            completion_tokens=completion_tokens,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted.total(),
            accepted_by_source=dict(self._accepted),
            origins=tuple(self._origins[:completion_tokens]),
            draft_forwards=draft_forwards,
            seconds=self.seconds,
        )
