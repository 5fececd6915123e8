"""One generation, from token ids to pieces of text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from transformers import PreTrainedTokenizerBase

from .chat.text import Transcript
from .decoding.decoder import Decoder
from .decoding.draft_tree import MAX_WIDTH, DraftTree
from .decoding.drafter import Drafter, NoDrafts, Round
from .decoding.sampling import sampler_for
from .decoding.target import Pass, TargetModel, ask
from .drafting import lookahead
from .drafting.base import Source
from .drafting.cached_answer import answer_source, index_answer
from .drafting.cost_gate import CostGatedDrafter
from .drafting.draft_model import ALTERNATIVES, DraftModel, DraftModelDrafter
from .drafting.forced_tokens import GrammarSource
from .drafting.learned_state import sources
from .drafting.phrases import PhraseSource, RunningText
from .drafting.token_recycling import KEPT
from .drafting.tree_drafter import TreeDrafter
from .errors import MemoryLimitError
from .grammar.constraint import Constraint
from .model_config import end_token_ids
from .options import DEFAULT_DRAFTERS, DecodingOptions
from .phrase_pool.base import PhrasePool
from .results import FinishReason, GenerationResult, RoundCounter, StreamChunk, Usage
from .serving.request import Steps
from .sessions.prefix_cache import CachedSequence, chunk_ends
from .sessions.session import Session
from .target_model.failures import out_of_memory
from .target_model.prepared import PreparedModel, locked

Rounds = Generator[Pass | Round | None, torch.Tensor | None, None]


class Generation:
    """Answers one prompt with one workspace, a step at a time. Steps run under the model's lock."""

    def __init__(
        self,
        prepared: PreparedModel,
        draft: PreparedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        session: Session,
        workspace: CachedSequence,
        *,
        write: PhrasePool,
        read: Sequence[PhrasePool],
        also: Sequence[PhrasePool] = (),
        documents: PhrasePool | None = None,
        corpora: Sequence[PhrasePool] = (),
        prompt_ids: list[int],
        limit: int,
        options: DecodingOptions,
        constraint: Constraint | None = None,
        dropped: int = 0,
        cancelled: Callable[[], bool] = lambda: False,
        spare: Callable[[], None] = lambda: None,
        kept_tokens: Mapping[int, str] | None = None,
    ) -> None:
        """`write`: the pool of the session's scope; `read`: further pools; `also`: pools that the answer is added to,
        besides; `documents`, `corpora`: texts that answers may quote; `limit`: tokens to generate at most;
        `constraint`: what the options' grammar makes of this text; `dropped`: tokens left out of the prompt;
        `cancelled`: asked before every step; `spare`: gives memory back that others can do without; `kept_tokens`:
        special tokens that the text shows."""
        self._prepared, self._draft = prepared, draft
        self._session, self._workspace, self._write, self._also = session, workspace, write, also
        self._prompt_ids, self._limit, self._options, self._dropped = prompt_ids, limit, options, dropped
        self._constraint = constraint
        self._cancelled, self._spare = cancelled, spare
        self._end_token_ids = end_token_ids(prepared.model.generation_config)
        self._transcript = Transcript(tokenizer, options.stop, self._end_token_ids, kept_tokens)
        self._drafter, self._draft_model = self._blend(read, documents, corpora)
        self._sampler = sampler_for(prepared.model, options, len(prompt_ids), limit, prepared.probe.margin, constraint)
        self._tally = RoundCounter()
        self._lean, self._draft_forwards = False, 0

    def steps(self) -> Steps[StreamChunk]:
        """Text as it comes, None after a step that brought none, before that the pass that a step wants if others may
        share it; returns the last piece, which carries the result.

        What was said is learned even if nobody listens on.

        Raises:
            MemoryLimitError: the device's memory does not even suffice without drafts and without idle caches.
        """
        cached = self._workspace.target.common_prefix(self._prompt_ids)
        rounds = self._rounds()
        try:
            while (reason := self._reason()) is None:
                found = next(rounds)
                while isinstance(found, Pass):
                    found = rounds.send((yield found))
                yield None if found is None else StreamChunk(*self._transcript.push(found.token_ids))
            tail = self._transcript.flush()
        finally:
            for pool in (self._write, *self._also):
                pool.add(self._transcript.token_ids)
            self._remember()
        return StreamChunk(tail, (), self._result(cached, reason))

    def _reason(self) -> FinishReason | None:
        """Why the answer ends here, if it does."""
        if self._transcript.ended:
            return "stop"
        said, rounds = len(self._transcript.token_ids), self._tally.rounds
        if said >= self._limit or (said and rounds >= (self._options.max_rounds or sys.maxsize)):
            return "length"
        return "cancelled" if self._cancelled() else None

    def _remember(self) -> None:
        """Keep what was learned with the scope, unless that was deleted meanwhile."""
        session = self._session
        if getattr(self._write, "generation", None) != session.generation:
            return
        model, answer = self._prepared.fingerprint, self._transcript.token_ids
        session.memory.remember(self._write, model, self._also)
        for pool in (self._write, *self._also):
            index_answer(pool, model, self._prompt_ids, answer, ending=pool is self._write)
        if self._draft is not None:
            session.draft_memory.remember(self._write, self._draft.fingerprint, self._also)

    def _rounds(self) -> Rounds:
        """The rounds, and None after a step that only read; before each the pass that it wants, if others may share
        it. What runs out of memory is tried again with less."""
        remedies: tuple[Callable[[], None], ...] = (lambda: None, self._drop_drafts, self._drop_caches)
        for remedy in remedies:
            remedy()
            decoding, logits = self._decoding(), None
            while True:
                mark = self._sampler.mark()
                try:
                    with self._timed():
                        found = decoding.send(logits)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    reason = str(error)
                    break  # out of the handler, which keeps the tensors of the failed pass alive
                logits = None
                if isinstance(found, Round):
                    self._tally.add(found)
                if not isinstance(found, Pass):
                    yield found
                # In a pass made with others, near-ties could go the other way.
                elif found.packer is not None and not self._options.exact:
                    logits = yield found
                    self._tally.seconds += found.seconds
            # The choices of a round that failed are made again.
            self._sampler.back_to(mark)
        raise MemoryLimitError(
            f"the device ran out of memory after {len(self._prompt_ids)} tokens of prompt and "
            f"{len(self._transcript.token_ids)} of output, without drafts and idle caches too; shorten the prompt, "
            f"lower max_new_tokens or max_active, or load the model in a smaller dtype ({reason.splitlines()[0]})"
        )

    def _decoding(self) -> Rounds:
        """From the text so far to its end."""
        context = [*self._prompt_ids, *self._transcript.token_ids]
        target = self._workspace.target
        # Long prompts are read in chunks, a step each; what is left fits into the first round.
        for end in chunk_ends(target, context):
            chunk = Pass(target, DraftTree.root(context[end - 1]), context[:end])
            yield from ask(chunk)
            self._tally.add_pass(chunk.seconds)
            yield None
        width = 1 if self._lean else self._width
        decoder = Decoder(
            target,
            self._drafter,
            width=width,
            successors=KEPT if "recycling" in self._names and width != 1 else 0,
            # A pass with a draft reads the prompt through another kernel, which rounds it differently.
            prefill_drafts=not self._options.exact,
        )
        limit = self._limit - len(self._transcript.token_ids)
        yield from decoder.steps(context, self._sampler, limit=limit, end_token_ids=self._end_token_ids)

    @property
    def _width(self) -> int | None:
        options = self._options
        if options.exact and not options.greedy:
            # Rounding moves more than near-ties: probabilities, and which tokens survive a cut-off.
            return 1
        return None if options.max_draft_tokens is None else min(1 + options.max_draft_tokens, MAX_WIDTH)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        with locked(self._prepared, self._draft):
            began = perf_counter()
            try:
                yield
            finally:
                self._tally.seconds += perf_counter() - began

    def _drop_drafts(self) -> None:
        """From here on a token a pass, after what was committed before the pass that failed."""
        self._lean = True
        target = self._workspace.target
        if target.can_rewind:
            target.rewind(len(target.token_ids))
        else:
            self._workspace.target = self._prepared.start(marks=True)

    def _drop_caches(self) -> None:
        """Let go of all keys and values that nobody is using, and of this turn's own, which are read anew."""
        if self._draft_model is not None:
            self._draft_forwards = self._draft_model.forwards
        self._drafter, self._draft_model = NoDrafts(), None
        self._workspace.target = self._prepared.start(marks=True)
        self._workspace.draft_target = self._draft.start() if self._draft else None
        self._spare()

    @property
    def _names(self) -> Sequence[str]:
        return DEFAULT_DRAFTERS if self._options.drafters is None else self._options.drafters

    def _blend(
        self, read: Sequence[PhrasePool], documents: PhrasePool | None, corpora: Sequence[PhrasePool]
    ) -> tuple[Drafter, DraftModel | None]:
        names = self._names
        memory, text = self._session.memory, RunningText()
        sampling = not self._options.greedy
        books = (self._write, *read) if "phrases" in names else ()
        answer = answer_source(books, self._prepared.fingerprint, self._prompt_ids, sampling=sampling)
        found = sources(
            names,
            memory,
            text=text,
            answer=answer,
            write=self._write,
            read=read,
            documents=documents,
            corpora=corpora,
            sampling=sampling,
        )
        found = [*self._window_phrases(names), *found]
        if self._constraint is not None:
            found.insert(0, GrammarSource(self._constraint.place))
        if self._workspace.draft_target is None or "draft_model" not in names:
            blend, sure = TreeDrafter(found, memory.calibration), None if answer is None else answer.goes_on
            paying = CostGatedDrafter(blend, self._pass_seconds(), self._session.worth, sure=sure)
            return self._with_window(names, paying), None
        model = self._draft_model_of(self._workspace.draft_target, names, text, read)
        drafter = DraftModelDrafter(
            model,
            TreeDrafter([model, *found], memory.calibration),
            pass_seconds=self._pass_seconds(),
            worth=self._session.draft_worth,
        )
        return drafter, model

    def _pass_seconds(self) -> Callable[[], float | None]:
        # Not through `self`: a turn in a cycle would hold on to keys and values until the garbage collector comes.
        times, packer = self._prepared.pass_times, self._prepared.packer
        return lambda: times.one if packer is None else packer.seconds

    def _draft_model_of(
        self, target: TargetModel, names: Sequence[str], text: RunningText, read: Sequence[PhrasePool]
    ) -> DraftModel:
        """The draft model reads the same phrases; what the target makes of its drafts flows back through them."""
        memory = self._session.draft_memory
        shared = PhraseSource("text", text.pool, after="prompt")
        own = sources(names, memory, text=shared, write=self._write, read=read, learns=False, after="prompt")
        drafter = self._with_window(names, TreeDrafter([*self._window_phrases(names), *own], memory.calibration))
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

    def _result(self, cached: int, reason: FinishReason) -> GenerationResult:
        token_ids = tuple(self._transcript.token_ids)
        reason = "stop" if self._transcript.ended else reason  # the text held back may have completed a stop string
        draft_forwards = self._draft_model.forwards if self._draft_model else self._draft_forwards
        usage = Usage(len(self._prompt_ids), len(token_ids), cached, self._dropped)
        statistics = self._tally.statistics(len(token_ids), draft_forwards)
        return GenerationResult(self._transcript.text, token_ids, reason, usage, statistics)
