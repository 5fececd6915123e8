"""What a generation returned and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .decoding.drafter import Round

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
    """In the steps of this answer: drafting, forward passes, sampling, text."""
    prefill_seconds: float = 0.0
    """Of the forward passes that read the prompt, until the first token."""
    model_seconds: float = 0.0
    """Of all forward passes of the target model and of reading their logits, the prefill's included."""
    wait_seconds: float = 0.0
    """Spent behind other requests, before the first step and between two; not while the caller was behind."""
    load_seconds: float = 0.0
    """Taken to load and probe the model, where this is the first answer of it; 0 in all others."""

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens per second of this answer's steps, the prefill's included."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

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
class StreamChunk:
    """A part of a streamed answer: one round's worth of text."""

    text: str
    token_ids: tuple[int, ...]
    result: GenerationResult | None = None
    """The whole answer, on the last piece only."""


class RoundCounter:
    """Counts while rounds go by."""

    def __init__(self) -> None:
        self._forwards = self._drafted = 0
        self._accepted: Counter[str] = Counter()
        self._origins: list[str] = []
        self.seconds = self.model_seconds = self.prefill_seconds = 0.0

    @property
    def rounds(self) -> int:
        """Cycles so far; the prefill is none."""
        return max(0, self._forwards - 1)

    def add(self, round: Round) -> None:
        """Count one round; the first is the prefill."""
        self._forwards += 1
        self.add_pass(round.seconds)
        self._drafted += round.draft.width - 1
        self._origins += round.origins
        self._accepted.update(round.draft.sources[node] for node in round.accepted)

    def add_pass(self, seconds: float) -> None:
        """Count the time of a pass; until the first round is over it is the prefill's."""
        self.model_seconds += seconds
        if self._forwards <= 1:
            self.prefill_seconds += seconds

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
            prefill_seconds=self.prefill_seconds,
            model_seconds=self.model_seconds,
        )
