"""One generation, from token ids to pieces of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from transformers import PreTrainedTokenizerBase

from .decoder import Decoder
from .draft_tree import MAX_WIDTH
from .drafting import lookahead
from .drafting.base import Drafter, Round, Source
from .drafting.blend import Blend
from .drafting.draft_model import ALTERNATIVES, DraftModel, DraftModelDrafter
from .drafting.memory import sources
from .drafting.names import DEFAULT_DRAFTERS
from .drafting.phrases import PhraseSource, RunningText
from .drafting.recycling import KEPT
from .drafting.worth import PayingDrafter
from .options import DecodingOptions
from .phrases import PhrasePool
from .sampling import end_token_ids, sampler_for
from .session import Session
from .statistics import FinishReason, GenerationResult, Piece, Tally, Usage
from .target.base import TargetModel
from .target.prepared import PreparedModel, locked
from .text import Transcript
from .workspaces import Workspace


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
        documents: PhrasePool | None = None,
        prompt_ids: list[int],
        limit: int,
        options: DecodingOptions,
    ) -> None:
        """`write`: the pool of the session's scope; `read`: further pools; `documents`: texts that answers may
        quote; `limit`: tokens to generate at most."""
        self._prepared, self._draft = prepared, draft
        self._session, self._workspace, self._write = session, workspace, write
        self._prompt_ids, self._limit, self._options = prompt_ids, limit, options
        self._end_token_ids = end_token_ids(prepared.model.generation_config)
        self._transcript = Transcript(tokenizer, options.stop, self._end_token_ids)
        self._drafter, self._draft_model = self._blend(read, documents)
        self._tally = Tally()

    def pieces(self) -> Iterator[Piece]:
        """Text as it comes; the last piece carries the result. What was said is learned even if nobody listens on."""
        rounds, cached = self._rounds(), self._workspace.target.common_prefix(self._prompt_ids)
        try:
            while not self._transcript.ended and (round := self._next(rounds)):
                yield Piece(*self._transcript.push(round.token_ids))
            tail = self._transcript.flush()
        finally:
            self._write.add(self._transcript.token_ids)
            self._remember()
        yield Piece(tail, (), self._result(cached))

    def _remember(self) -> None:
        """Keep what was learned with the scope, unless that was deleted meanwhile."""
        session = self._session
        if getattr(self._write, "generation", None) != session.generation:
            return
        session.memory.remember(self._write, self._prepared.fingerprint)
        if self._draft is not None:
            session.draft_memory.remember(self._write, self._draft.fingerprint)

    def _rounds(self) -> Iterator[Round]:
        options = self._options
        width = None if options.max_draft_tokens is None else min(1 + options.max_draft_tokens, MAX_WIDTH)
        if options.exact and not options.greedy:
            # Rounding moves more than near-ties: probabilities, and which tokens survive a cut-off.
            width = 1
        decoder = Decoder(
            self._workspace.target,
            self._drafter,
            width=width,
            successors=KEPT if "recycling" in self._names and width != 1 else 0,
            # A pass with a draft reads the prompt through another kernel, which rounds it differently.
            prefill_drafts=not options.exact,
        )
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

    @property
    def _names(self) -> Sequence[str]:
        return DEFAULT_DRAFTERS if self._options.drafters is None else self._options.drafters

    def _blend(self, read: Sequence[PhrasePool], documents: PhrasePool | None) -> tuple[Drafter, DraftModel | None]:
        names = self._names
        memory, text = self._session.memory, RunningText()
        sampling = not self._options.greedy
        found = sources(names, memory, text=text, write=self._write, read=read, documents=documents, sampling=sampling)
        found = [*self._window_phrases(names), *found]
        if self._workspace.draft_target is None or "draft_model" not in names:
            return self._with_window(names, self._paying(Blend(found, memory.calibration))), None
        model = self._draft_model_of(self._workspace.draft_target, names, text, read)
        drafter = DraftModelDrafter(
            model,
            Blend([model, *found], memory.calibration),
            pass_seconds=self._pass_seconds(),
            worth=self._session.draft_worth,
        )
        return drafter, model

    def _paying(self, drafter: Drafter) -> Drafter:
        return PayingDrafter(drafter, self._pass_seconds(), self._session.worth)

    def _pass_seconds(self) -> Callable[[], float | None]:
        # Not through `self`: a turn in a cycle would hold on to keys and values until the garbage collector comes.
        times = self._prepared.pass_times
        return lambda: times.one

    def _draft_model_of(
        self, target: TargetModel, names: Sequence[str], text: RunningText, read: Sequence[PhrasePool]
    ) -> DraftModel:
        """The draft model reads the same phrases; what the target makes of its drafts flows back through them."""
        memory = self._session.draft_memory
        shared = PhraseSource("text", text.pool, after="prompt")
        own = sources(names, memory, text=shared, write=self._write, read=read, learns=False, after="prompt")
        drafter = self._with_window(names, Blend([*self._window_phrases(names), *own], memory.calibration))
        return DraftModel(
            Decoder(target, drafter, successors=ALTERNATIVES),
            self._session.memory.calibration,
            end_token_ids=self._end_token_ids,
            context_length=self._draft.context_length if self._draft else None,
        )

    def _window_phrases(self, names: Sequence[str]) -> list[Source]:
        """What lookahead windows found so far."""
        window = self._session.window
        return [PhraseSource(lookahead.NAME, window.pool, after="prompt")] if lookahead.NAME in names else []

    def _with_window(self, names: Sequence[str], drafter: Drafter) -> Drafter:
        """`drafter` with a lookahead window beside its drafts, where that was asked for and as long as it pays."""
        if lookahead.NAME not in names:
            return drafter
        window = self._session.window
        return lookahead.LookaheadDrafter(drafter, window.pool, window=10, length=5, worth=window.worth)

    def _result(self, cached: int) -> GenerationResult:
        token_ids = tuple(self._transcript.token_ids)
        reason: FinishReason = "stop" if self._transcript.ended else "length"
        draft_forwards = self._draft_model.forwards if self._draft_model else 0
        usage = Usage(len(self._prompt_ids), len(token_ids), cached)
        statistics = self._tally.statistics(len(token_ids), draft_forwards)
        return GenerationResult(self._transcript.text, token_ids, reason, usage, statistics)
