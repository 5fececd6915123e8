"""One generation, from token ids to pieces of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter

from transformers import PreTrainedTokenizerBase

from .decoder import Decoder
from .draft_tree import MAX_WIDTH
from .drafting.base import Drafter, Round
from .drafting.draft_model import DraftModelDrafter
from .drafting.phrases import PhraseDrafter
from .options import DecodingOptions
from .phrases import PhrasePool
from .sampling import end_token_ids, sampler_for
from .session import Session, Workspace
from .statistics import FinishReason, GenerationResult, Piece, Tally, Usage
from .target.eager import EagerTarget
from .target.prepared import PreparedModel, locked
from .text import Transcript


class Turn:
    """Answers one prompt with one workspace. Rounds run under the model's lock, so turns take turns."""

    def __init__(
        self,
        prepared: PreparedModel,
        draft: PreparedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        session: Session,
        workspace: Workspace,
        *,
        write: PhrasePool,
        read: Sequence[PhrasePool],
        prompt_ids: list[int],
        limit: int,
        options: DecodingOptions,
    ) -> None:
        """`write`: the pool of the session's scope; `read`: further pools; `limit`: tokens to generate at most."""
        self._prepared, self._draft = prepared, draft
        self._session, self._workspace, self._write = session, workspace, write
        self._prompt_ids, self._limit, self._options = prompt_ids, limit, options
        self._end_token_ids = end_token_ids(prepared.model.generation_config)
        self._transcript = Transcript(tokenizer, options.stop, self._end_token_ids)
        self._drafter, self._draft_model = self._drafters([write, *read])
        self._tally = Tally()

    def pieces(self) -> Iterator[Piece]:
        """Text as it comes; the last piece carries the result. What was said is learned even if nobody listens on."""
        rounds, cached = self._rounds(), self._cached()
        try:
            while not self._transcript.ended and (round := self._next(rounds)):
                yield Piece(*self._transcript.push(round.token_ids))
            tail = self._transcript.flush()
        finally:
            self._write.add(self._transcript.token_ids)
        yield Piece(tail, (), self._result(cached))

    def _rounds(self) -> Iterator[Round]:
        options = self._options
        width = None if options.max_draft_tokens is None else min(1 + options.max_draft_tokens, MAX_WIDTH)
        if options.exact and not options.greedy:
            # Rounding moves more than near-ties: probabilities, and which tokens survive a cut-off.
            width = 1
        decoder = Decoder(self._workspace.target, self._drafter, width=width)
        sampler = sampler_for(
            self._prepared.model, self._options, len(self._prompt_ids), self._limit, self._prepared.probe.margin
        )
        return decoder.rounds(self._prompt_ids, sampler, limit=self._limit, end_token_ids=self._end_token_ids)

    def _next(self, rounds: Iterator[Round]) -> Round | None:
        with locked(self._prepared, self._draft):
            began = perf_counter()
            round = next(rounds, None)
            self._tally.seconds += perf_counter() - began
        if round is not None:
            self._tally.add(round)
        return round

    def _drafters(self, pools: list[PhrasePool]) -> tuple[Drafter, DraftModelDrafter | None]:
        session = self._session
        phrases = PhraseDrafter(pools, write=self._write, calibration=session.phrase_calibration)
        if self._workspace.draft_target is None:
            return phrases, None
        # The draft model reads the same phrases; what the target makes of its drafts flows back through them.
        own = PhraseDrafter(pools, running_text=phrases.running_text, calibration=session.draft_phrase_calibration)
        drafter = DraftModelDrafter(
            Decoder(self._workspace.draft_target, own),
            phrases,
            end_token_ids=self._end_token_ids,
            context_length=self._draft.context_length if self._draft else None,
            pass_seconds=lambda: self._prepared.pass_times.one,
            calibration=session.draft_calibration,
            worth=session.draft_worth,
        )
        return drafter, drafter

    def _cached(self) -> int:
        target = self._workspace.target
        return target.common_prefix(self._prompt_ids) if isinstance(target, EagerTarget) else 0

    def _result(self, cached: int) -> GenerationResult:
        token_ids = tuple(self._transcript.token_ids)
        reason: FinishReason = "stop" if self._transcript.ended else "length"
        draft_forwards = self._draft_model.forwards if self._draft_model else 0
        usage = Usage(len(self._prompt_ids), len(token_ids), cached)
        statistics = self._tally.statistics(len(token_ids), draft_forwards)
        return GenerationResult(self._transcript.text, token_ids, reason, usage, statistics)
