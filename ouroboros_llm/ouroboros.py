"""The object that users hold: messages or text in, text out."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .chat.context_window import Fitted, fit
from .chat.text import Prompt, encode, vocabulary_hash
from .drafting.draft_model import load_draft
from .errors import OptionError, PromptError
from .generation import Generation
from .grammar.constraint import Constraint, constraint_for
from .options import DecodingOptions, check_whole, spread
from .phrase_pool.base import PhrasePool, PoolSource, check_scope, check_scopes
from .phrase_pool.corpus import Corpora, Indexed, Texts, is_corpus
from .phrase_pool.memory import MemorySource
from .phrase_pool.opening import flush, open_pool, open_source
from .results import GenerationResult, StreamChunk
from .scopes import current_scope
from .serving.request import Request, RequestClock, Steps
from .serving.scheduler import scheduler_for
from .serving.stream import Stream, off_the_loop, results
from .sessions.model_sessions import ModelSessions
from .sessions.prefix_cache import KVUsage
from .sessions.session import Session
from .target_model.eager import vocabulary_size
from .target_model.prepared import KINDS, Kind, keep_measurements, measure, prepare
from .target_model.quantization import Quantization

logger = logging.getLogger(__name__)

DEFAULT_SCOPE = "conversation:default"
"""Where phrases go when no scope is named: one user's own. Never read once a scope is named."""

DEFAULT_MAX_NEW_TOKENS = 512


class Asked(TypedDict, total=False):
    """Keyword arguments of generate, agenerate and astream; `Ouroboros.stream` says what each is."""

    scope: str | None
    read_scopes: Sequence[str]
    corpus_scopes: Sequence[str]
    options: DecodingOptions | None
    tools: Sequence[Mapping[str, Any]] | None
    write_scopes: Sequence[str]
    prefix_scopes: Sequence[str]
    kept_tokens: Mapping[int, str] | None


class Ouroboros:
    """A local model that drafts phrases it has written before and verifies them in one pass.

    Output is what the model alone would say, token for token. Calls may come from any thread and any event loop: one
    worker per model runs their rounds in turn, so a long answer does not hold up a short one.

    Attributes:
        model, tokenizer: what it wraps; the model's own `forward` and `generate` stay as they were.
        store: where phrases are kept.
        name: registry name, path or hub id of the model.
        fingerprint: hash of the tokenizer's vocabulary; pools of another are never read.
        load_seconds: taken to load and probe the model and its draft model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        draft_model: Any = None,
        store: Any = None,
        target: Kind = "auto",
        documents: PhrasePool | None = None,
        max_active: int | None = None,
        max_waiting: int | None = None,
    ) -> None:
        """Wrap a model that you loaded yourself.

        Args:
            model: a causal language model, float32 or half precision, on any device.
            draft_model: a smaller model of the same vocabulary: a registry name, path or hub id, a pair
                (model, tokenizer), or a model whose tokenizer is known to be the same.
            store: None keeps phrases in memory; a URL (`sqlite:///phrases.db`), a SQLAlchemy engine or a `PhraseStore`
                keeps them for later processes.
            target: how passes are made, the draft model's too: "eager" by the library's own forward; "static" padded to
                a few widths, with attention of ours; "auto" by whichever won a race on this machine. No race is run on
                accelerators yet, so "auto" is eager there. Where a static pass fails, the library's own forward
                verifies the same draft and all later ones, with one warning in the log.
            documents: texts that answers may quote, whoever asks (`documents_pool`); only read.
            max_active, max_waiting: concurrent requests, and queued requests; beyond that, QueueFullError. They hold
                for the model, whoever wraps it. None: as they are, 16 and 1,024 at first.

        Raises:
            ModelError: not a causal language model. TokenizerMismatchError: draft and target vocabularies differ.
        """
        began = perf_counter()
        _check(model, tokenizer, target, documents)
        check_whole("max_active", max_active, 1)
        check_whole("max_waiting", max_waiting, 1)
        self.model, self.tokenizer = model, tokenizer
        self.name = str(model.config._name_or_path or type(model).__name__)
        self.fingerprint = vocabulary_hash(tokenizer)
        self._prepared = prepare(model, target)
        self._draft = None if draft_model is None else load_draft(draft_model, model, tokenizer, self.name, target)
        self._owns_store = not isinstance(store, PoolSource)
        self.store: PoolSource = open_source(store)
        self.documents = documents
        self._corpora = Corpora(self.store, tokenizer, self.fingerprint)
        self._sessions = ModelSessions(self._prepared, self._draft, self.store, self.fingerprint)
        self._worker = scheduler_for(model)
        self._worker.max_active = max_active or self._worker.max_active
        self._worker.max_waiting = max_waiting or self._worker.max_waiting
        for prepared in filter(None, (self._prepared, self._draft)):
            self._worker.when_idle(partial(_measure, weakref.ref(prepared.model), races=target == "auto"))
        for shortcoming in self._prepared.shortcomings:
            warnings.warn(f"{self.name} {shortcoming}", RuntimeWarning, stacklevel=2)
        self.load_seconds, self._has_answered = perf_counter() - began, False
        logger.info("%s is ready, %.1f s after its weights", self.name, self.load_seconds)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        draft_model: Any = None,
        device: str = "auto",
        dtype: Any = "auto",
        quantization: Quantization | None = None,
        store: Any = None,
        target: Kind = "auto",
        documents: PhrasePool | None = None,
    ) -> Ouroboros:
        """Load a model by registry name, local path or hub id. See `Ouroboros` and `models.load` for the arguments;
        `quantization` is the target model's, a draft model named here stays as it is."""
        from .models import loading as models

        loaded = models.load(name, device=device, dtype=dtype, quantization=quantization)
        ouroboros = cls(
            loaded.model, loaded.tokenizer, draft_model=draft_model, store=store, target=target, documents=documents
        )
        ouroboros.name = loaded.name
        ouroboros.load_seconds += loaded.seconds
        return ouroboros

    @property
    def model_fingerprint(self) -> str:
        """Opaque id; equal only for models that produce the same tokens: a hash of the architecture and of a sample of
        the weights, and their precision."""
        return f"{self._prepared.fingerprint}-{self.model.dtype}".replace("torch.", "")

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and output together at most; None where the model names no limit."""
        return self._prepared.context_length

    def encode(self, prompt: Prompt, *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a prompt: text as it is, messages through the chat template. Raises PromptError."""
        return encode(self.tokenizer, prompt, tools)

    def generate(self, prompt: Prompt, **asked: Unpack[Asked]) -> GenerationResult:
        """Answer a prompt. See `stream` for the arguments and errors."""
        with self.stream(prompt, **asked).whole() as pieces:
            (last,) = pieces
        assert last.result is not None  # the last piece always carries it
        return last.result

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        scope: str | Sequence[str | None] | None = None,
        read_scopes: Sequence[str] = (),
        corpus_scopes: Sequence[str] = (),
        options: DecodingOptions | Sequence[DecodingOptions | None] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[GenerationResult]:
        """Answer many prompts at once; results in their order, the same as `generate` gives for each.

        Where it pays by measured times, their passes are made in one, and the model's weights read once for all. So are
        those of concurrent callers of the other methods.

        Args:
            scope, options: one for all prompts, or a list with one for each.
            read_scopes, corpus_scopes, tools: as for `stream`, for all prompts.

        Raises:
            OptionError: a list of another length. Whatever `stream` and `Stream` raise: before anything is decoded, or
                for the first prompt that fails; the others then end too.
        """
        if isinstance(prompts, str):
            raise OptionError(f"prompts must be a list of prompts, but got the text {prompts!r:.80}")
        each = zip(prompts, spread("scope", scope, len(prompts)), spread("options", options, len(prompts)), strict=True)
        streams = [
            self.stream(
                prompt,
                scope=own,
                read_scopes=read_scopes,
                corpus_scopes=corpus_scopes,
                options=wanted,
                tools=tools,
            ).whole()
            for prompt, own, wanted in each
        ]
        # Start more than max_active so that no slot idles; starting all would only fill the queue.
        places = self._worker.max_active
        return results(streams, ahead=places + min(places, self._worker.max_waiting))

    async def agenerate(self, prompt: Prompt, **asked: Unpack[Asked]) -> GenerationResult:
        """As `generate`, for an event loop. Cancelling the task ends the decoding within one round."""

        async with aclosing(off_the_loop(lambda: self.stream(prompt, **asked).whole())) as pieces:
            last = await anext(pieces)
        assert last.result is not None
        return last.result

    def stream(
        self,
        prompt: Prompt,
        *,
        scope: str | None = None,
        read_scopes: Sequence[str] = (),
        corpus_scopes: Sequence[str] = (),
        options: DecodingOptions | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        write_scopes: Sequence[str] = (),
        prefix_scopes: Sequence[str] = (),
        kept_tokens: Mapping[int, str] | None = None,
    ) -> Stream:
        """Answer a prompt in pieces: together their texts are `generate(...).text`; the last carries the result.

        Args:
            prompt: text (taken as it is), chat messages (through the chat template) or token ids.
            scope: whose phrases to use and to add to; None: that of `ouroboros_scope`, else `conversation:default`.
            read_scopes: further scopes to read, in order. Nothing else is ever read.
            corpus_scopes: scopes of indexed documents (`index_documents`), which answers may quote; only read.
            options: sampling, lengths, limits and stop strings; None: greedy.
            tools: function schemas for the chat template.
            write_scopes: further scopes that the answer is added to; read only where `read_scopes` names them too.
            prefix_scopes: further scopes whose kept prefixes the prompt may go on from (`keep_prefix`).
            kept_tokens: special tokens that the text shows, as a reply's markers (`ReplyFormat.kept_tokens`).

        Raises:
            PromptError, ContextLengthError, OptionError: before anything is decoded. For what may be raised later see
            `Stream`.
        """
        options = DecodingOptions() if options is None else options
        if not isinstance(options, DecodingOptions):
            raise OptionError(f"options must be DecodingOptions or None, but got {type(options).__name__}")
        fitted = self._fit(prompt, tools, options)
        constraint = constraint_for(options.grammar, self.model, self.tokenizer, len(fitted.token_ids), fitted.limit)
        session = self._sessions.sessions.open(_settled(scope))
        # Here and not in a step, which others wait for: a database may take its time.
        write, *read = [
            open_pool(self.store, name, self.fingerprint) for name in (session.scope, *check_scopes(read_scopes))
        ]
        others = [name for name in check_scopes(write_scopes, "write_scopes") if name != session.scope]
        also = [open_pool(self.store, name, self.fingerprint) for name in dict.fromkeys(others)]
        # What the scope's own turns wrote to before holds answers, and gets no documents.
        own = {} if session.recalled else {session.scope: write}
        self._check_writable({**own, **dict(zip(dict.fromkeys(others), also, strict=True))})
        corpora = [self._corpora.open(name) for name in check_scopes(corpus_scopes, "corpus_scopes")]
        cancelled, clock = threading.Event(), RequestClock()
        prefixes = check_scopes(prefix_scopes, "prefix_scopes")
        steps = self._steps(
            fitted, session, write, read, also, corpora, prefixes, options, constraint, cancelled, clock, kept_tokens
        )
        after = None if isinstance(self.store, MemorySource) else partial(flush, self.store)
        request = Request(steps, timeout=options.timeout, after=after, clock=clock)
        return Stream(self._worker, request, cancelled)

    def astream(self, prompt: Prompt, **asked: Unpack[Asked]) -> AsyncGenerator[StreamChunk]:
        """As `stream`, for an event loop, which is not blocked by prompt, store or model; errors come with the first
        piece. Cancelling the task, or closing the generator, ends the decoding within one round."""
        return off_the_loop(partial(self.stream, prompt, **asked))

    def index_documents(
        self, documents: Texts, *, scope: str, advance: Callable[[int], object] | None = None
    ) -> Indexed:
        """Put documents into a scope of their own, from which answers may quote: `corpus_scopes=[scope]`.

        Documents that are there already, and say the same, cost next to nothing; one that says something else now
        replaces what it said. They are kept where phrases are: in the store, for later processes, else in memory.

        Args:
            documents: texts, or texts by the ids of documents, by which they are replaced and removed; several texts
                are the parts of one. `read_documents` reads files.
            scope: of nothing but documents, for example `corpus:manuals`.
            advance: called with 1 after each document.

        Raises:
            OptionError: not texts, or a scope that holds answers. StoreError: the store fails, or keeps no notes.

        Example:
            ```python
            ouro.index_documents(read_documents(["docs/"]), scope="corpus:manuals")
            ouro.generate("How do I ...?", scope="conversation:42", corpus_scopes=["corpus:manuals"])
            ```
        """
        if self._sessions.sessions.has_answers(check_scope(scope)):
            raise OptionError(f"scope {scope!r} holds answers; documents need one of their own, as in 'corpus:manuals'")
        return self._corpora.index(scope, documents, advance)

    def remove_documents(self, ids: Iterable[str], *, scope: str) -> int:
        """Take documents out of a scope again, by their ids: those given, else those in `Indexed.ids`.

        They go for every tokenizer with which they were indexed there. (What replaces a document replaces it for this
        model's tokenizer alone: others read its texts in parts of their own.)

        Returns:
            How many there were.

        Raises:
            StoreError: the store fails.
        """
        return self._corpora.remove(check_scope(scope), ids)

    def keep_prefix(
        self,
        prompt: Prompt,
        *,
        scope: str | None = None,
        name: str = "default",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> int:
        """Read what many prompts of a scope begin with, a system prompt and tools say, and keep it in memory.

        Later turns of the scope, also several at once, go on from copies of it, and so do turns that name the scope in
        `prefix_scopes`. It stays until `drop_prefix`, `close`, or the scope's deletion, whatever room others need.

        Args:
            prompt: as for `stream`; messages are read without the opening of an answer behind them.
            name: of the prefix in its scope; what had that name before is dropped, unless it is the same.

        Returns:
            Its tokens.

        Raises:
            PromptError, ContextLengthError, OptionError: also where it would not fit into the limit of `kv_usage`; what
            had its name is kept then. MemoryLimitError: the device has no room for it.
        """
        prompt_ids = self._checked(encode(self.tokenizer, prompt, tools, answering=False))
        fit(prompt_ids, lambda _: prompt_ids, context_length=self.context_length, wanted=1, name=self.name)
        session = self._sessions.open(_settled(scope))
        if self._sessions.sessions.holds(session, name, prompt_ids):
            return len(prompt_ids)
        return self._worker.run(self._sessions.keeping(session, prompt_ids, name))

    def drop_prefix(self, *, scope: str | None = None, name: str = "default") -> None:
        """Free what `keep_prefix` kept under this name, if anything."""
        self._sessions.sessions.drop(self._sessions.open(_settled(scope)), name)

    def save_session(self, scope: str | None, path: str | Path) -> int:
        """Write the keys and values of a scope to a file, so that another process need not read its prompts again.

        The file is readable to its owner only, as it tells what the prompts were. It is there whole or not at all.

        Returns:
            Tokens written, of all conversations that the scope can go on with.

        Raises:
            SnapshotError: there is nothing to save, or the model's states are not of a kind that can be.
        """
        return self._sessions.save(self._sessions.open(_settled(scope)), path)

    def load_session(self, scope: str | None, path: str | Path) -> int:
        """Go on from what `save_session` wrote, for the same scope, model and tokenizer.

        Returns:
            Tokens read.

        Raises:
            SnapshotError: it was written for another scope, model or tokenizer, or is damaged; nothing was loaded.
        """
        return self._sessions.load(self._sessions.open(_settled(scope)), path)

    @property
    def kv_usage(self) -> KVUsage:
        """Bytes of the keys and values that this object's turns use and left, and the limit for the whole process."""
        return self._sessions.sessions.usage

    def flush(self) -> None:
        """Make all phrases durable, those of answers that were just given up included."""
        self._worker.settle()
        self.store.flush()

    def close(self) -> None:
        """Flush, close a store that was opened from a URL, and free kept keys and values. Idempotent."""
        self.flush()
        self._worker.give_up_idle_work()
        keep_measurements(self.model)
        if self._owns_store:
            self.store.close()
        self._corpora.clear()
        self._sessions.sessions.clear()

    def __enter__(self) -> Ouroboros:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _steps(
        self,
        fitted: Fitted,
        session: Session,
        write: PhrasePool,
        read: list[PhrasePool],
        also: list[PhrasePool],
        corpora: list[PhrasePool],
        prefixes: Sequence[str],
        options: DecodingOptions,
        constraint: Constraint | None,
        cancelled: threading.Event,
        clock: RequestClock,
        kept_tokens: Mapping[int, str] | None,
    ) -> Steps[StreamChunk]:
        """One answer, a step at a time, in the worker's thread. `prefixes`: scopes whose kept prefixes it may copy."""
        session = self._sessions.recalled(session, write, read)
        room = len(fitted.token_ids) + fitted.limit
        with self._sessions.workspace(session, fitted.token_ids, prefixes, room=room) as workspace:
            turn = Generation(
                self._prepared,
                self._draft,
                self.tokenizer,
                session,
                workspace,
                write=write,
                read=read,
                also=also,
                documents=self.documents,
                corpora=corpora,
                prompt_ids=fitted.token_ids,
                limit=fitted.limit,
                options=options,
                dropped=fitted.dropped,
                cancelled=cancelled.is_set,
                spare=self._sessions.spare,
                constraint=constraint,
                kept_tokens=kept_tokens,
            )
            last = yield from turn.steps()
        return self._timed(last, clock)

    def _timed(self, last: StreamChunk | None, clock: RequestClock) -> StreamChunk:
        """The last piece, whose statistics say what was spent outside of its steps too."""
        assert last is not None and last.result is not None  # the last piece always carries it
        load, self._has_answered = 0.0 if self._has_answered else self.load_seconds, True
        statistics = last.result.statistics
        wait = max(0.0, clock.seconds - statistics.seconds)
        statistics = replace(statistics, wait_seconds=wait, load_seconds=load)
        logger.debug("%s answered: %s", self.name, statistics)
        return replace(last, result=replace(last.result, statistics=statistics))

    def _check_writable(self, pools: Mapping[str, PhrasePool]) -> None:
        if documents := next((name for name, pool in pools.items() if is_corpus(pool)), None):
            raise OptionError(f"scope {documents!r} holds documents, which are only read; name it in corpus_scopes")

    def _checked(self, prompt_ids: list[int]) -> list[int]:
        """The ids of a prompt, all of them such as the model can look up."""
        if max(prompt_ids) >= vocabulary_size(self.model):
            raise PromptError(
                f"prompt holds the token id {max(prompt_ids)}, but {self.name} knows ids below "
                f"{vocabulary_size(self.model)}; use the tokenizer that belongs to the model"
            )
        return prompt_ids

    def _fit(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None, options: DecodingOptions) -> Fitted:
        """The prompt's tokens, and how many may follow: what was asked for, as far as the context reaches."""
        wanted = options.max_new_tokens or self.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        fitted = fit(
            prompt,
            partial(self.encode, tools=tools),
            context_length=self.context_length,
            wanted=int(wanted),
            slide=options.overflow == "slide",
            first_token_id=self.tokenizer.bos_token_id,
            name=self.name,
        )
        self._checked(fitted.token_ids)
        return fitted


def _measure(model: weakref.ref[PreTrainedModel], *, races: bool) -> Iterator[None]:
    """Measure a model, if it still exists."""
    held = model()
    return iter(()) if held is None else measure(held, races=races)


def _check(model: object, tokenizer: object, target: object, documents: object) -> None:
    if target not in KINDS:
        raise OptionError(f"target must be 'auto', 'eager' or 'static', but got {target!r}")
    if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OptionError(
            f"model and tokenizer must be loaded ones, but got {type(model).__name__} and "
            f"{type(tokenizer).__name__}; to load a model by name, use Ouroboros.from_pretrained"
        )
    if documents is not None and not isinstance(documents, PhrasePool):
        raise OptionError(f"documents must be a pool, as documents_pool makes them, but got {documents!r:.80}")


def _settled(scope: str | None) -> str:
    """The scope of a call. Raises OptionError where it is no name."""
    return check_scope(scope if scope is not None else current_scope() or DEFAULT_SCOPE)
