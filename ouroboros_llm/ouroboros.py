"""The object that users hold: messages or text in, text out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .draft_pair import load_draft
from .drafting.memory import Memory
from .errors import ContextLengthError, OptionError, PromptError
from .options import DecodingOptions
from .phrases import PhrasePool, PoolSource, check_scope, check_scopes
from .session import Session, Sessions, Workspace
from .sources import flush, open_pool, open_source
from .statistics import GenerationResult, Piece
from .target.eager import vocabulary_size
from .target.prepared import prepare
from .text import Prompt, encode, vocabulary_hash
from .turn import Turn

DEFAULT_SCOPE = "conversation:default"
"""Where phrases go when no scope is named: one user's own. Never read once a scope is named."""

DEFAULT_MAX_NEW_TOKENS = 512


class Ouroboros:
    """A local model that drafts phrases it has written before and verifies them in one pass.

    Output is what the model alone would say, token for token. Calls may come from any thread: rounds of concurrent
    calls take turns.

    Attributes:
        model, tokenizer: what it wraps; the model's own `forward` and `generate` stay as they were.
        store: where phrases are kept.
        name: registry name, path or hub id of the model.
        fingerprint: hash of the tokenizer's vocabulary; pools of another are never read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        draft_model: Any = None,
        store: Any = None,
        target: str = "auto",
        documents: PhrasePool | None = None,
    ) -> None:
        """Wrap a model that you loaded yourself.

        Args:
            model: a causal language model, float32 or half precision, on any device.
            draft_model: a smaller model of the same vocabulary: a registry name, path or hub id, a pair
                (model, tokenizer), or a model whose tokenizer is known to be the same.
            store: None keeps phrases in memory; a URL (`sqlite:///phrases.db`), a SQLAlchemy engine or a `PhraseStore`
                keeps them for later processes.
            target: "auto" or "eager", the library's own forward.
            documents: texts that answers may quote, whoever asks (`documents_pool`); only read.

        Raises:
            ModelError: not a causal language model. TokenizerMismatchError: draft and target vocabularies differ.
        """
        if target not in ("auto", "eager"):
            raise OptionError(f"target must be 'auto' or 'eager', but got {target!r}")
        if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise OptionError(
                f"model and tokenizer must be loaded ones, but got {type(model).__name__} and "
                f"{type(tokenizer).__name__}; to load a model by name, use Ouroboros.from_pretrained"
            )
        self.model, self.tokenizer = model, tokenizer
        self.name = str(model.config._name_or_path or type(model).__name__)
        self.fingerprint = vocabulary_hash(tokenizer)
        self._prepared = prepare(model)
        self._draft = None if draft_model is None else load_draft(draft_model, model, tokenizer, self.name)
        self._owns_store = not isinstance(store, PoolSource)
        self.store: PoolSource = open_source(store)
        if documents is not None and not isinstance(documents, PhrasePool):
            raise OptionError(f"documents must be a pool, as documents_pool makes them, but got {documents!r:.80}")
        self.documents = documents
        self._sessions = Sessions()
        if self._prepared.probe.branching == "none":
            warnings.warn(
                f"{self.name} keeps states that cannot be rewound, so it decodes without drafts, one token a pass",
                RuntimeWarning,
                stacklevel=2,
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        draft_model: Any = None,
        device: str = "auto",
        dtype: Any = "auto",
        store: Any = None,
        target: str = "auto",
        documents: PhrasePool | None = None,
    ) -> Ouroboros:
        """Load a model by registry name, local path or hub id. See `Ouroboros` and `models.load` for the arguments."""
        from . import models

        loaded = models.load(name, device=device, dtype=dtype)
        ouroboros = cls(
            loaded.model, loaded.tokenizer, draft_model=draft_model, store=store, target=target, documents=documents
        )
        ouroboros.name = loaded.name
        return ouroboros

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and output together at most; None where the model names no limit."""
        return self._prepared.context_length

    def encode(self, prompt: Prompt, *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a prompt: text as it is, messages through the chat template. Raises PromptError."""
        return encode(self.tokenizer, prompt, tools)

    def generate(
        self,
        prompt: Prompt,
        *,
        scope: str | None = None,
        read_scopes: Sequence[str] = (),
        options: DecodingOptions | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> GenerationResult:
        """Answer a prompt. See `stream` for the arguments and errors."""
        pieces = self.stream(prompt, scope=scope, read_scopes=read_scopes, options=options, tools=tools)
        *_, last = pieces
        assert last.result is not None  # the last piece always carries it
        return last.result

    def stream(
        self,
        prompt: Prompt,
        *,
        scope: str | None = None,
        read_scopes: Sequence[str] = (),
        options: DecodingOptions | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Iterator[Piece]:
        """Answer a prompt in pieces: together their texts are `generate(...).text`; the last carries the result.

        Args:
            prompt: text (taken as it is), chat messages (through the chat template) or token ids.
            scope: whose phrases to use and to add to; None: `conversation:default`.
            read_scopes: further scopes to read, in order. Nothing else is ever read.
            options: sampling, lengths and stop strings; None: greedy.
            tools: function schemas for the chat template.

        Raises:
            PromptError, ContextLengthError, OptionError: before anything is decoded.
        """
        options = DecodingOptions() if options is None else options
        if not isinstance(options, DecodingOptions):
            raise OptionError(f"options must be DecodingOptions or None, but got {type(options).__name__}")
        prompt_ids = self.encode(prompt, tools=tools)
        if max(prompt_ids) >= vocabulary_size(self.model):
            raise PromptError(
                f"prompt holds the token id {max(prompt_ids)}, but {self.name} knows ids below "
                f"{vocabulary_size(self.model)}; use the tokenizer that belongs to the model"
            )
        limit = self._limit(len(prompt_ids), options)
        session = self._sessions.open(check_scope(DEFAULT_SCOPE if scope is None else scope))
        return self._stream(prompt_ids, limit, session, check_scopes(read_scopes), options)

    def flush(self) -> None:
        """Make all phrases durable."""
        self.store.flush()

    def close(self) -> None:
        """Flush, close a store that was opened from a URL, and free kept keys and values. Idempotent."""
        self.store.flush()
        if self._owns_store:
            self.store.close()
        self._sessions.clear()

    def __enter__(self) -> Ouroboros:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream(
        self, prompt_ids: list[int], limit: int, session: Session, read_scopes: list[str], options: DecodingOptions
    ) -> Iterator[Piece]:
        write = open_pool(self.store, session.scope, self.fingerprint)
        session = self._current(session, write)
        self._recall(session, write)
        workspace = self._sessions.take(session) or Workspace(
            self._prepared.start(), self._draft.start() if self._draft else None
        )
        try:
            turn = Turn(
                self._prepared,
                self._draft,
                self.tokenizer,
                session,
                workspace,
                write=write,
                read=[open_pool(self.store, scope, self.fingerprint) for scope in read_scopes],
                documents=self.documents,
                prompt_ids=prompt_ids,
                limit=limit,
                options=options,
            )
            yield from turn.pieces()
        finally:
            self._sessions.give_back(session, workspace)
            flush(self.store)

    def _current(self, session: Session, pool: PhrasePool) -> Session:
        """The session, or a new one if its scope was deleted since."""
        generation = getattr(pool, "generation", None)
        if session.generation is not None and session.generation != generation:
            self._sessions.forget(session)
            session = self._sessions.open(session.scope)
        session.generation = generation
        return session

    def _recall(self, session: Session, pool: PhrasePool) -> None:
        """Go on from what was learned in the scope before this process."""
        if not session.recalled:
            session.recalled = True
            session.memory = Memory.recall(pool, self._prepared.fingerprint)
            if self._draft is not None:
                session.draft_memory = Memory.recall(pool, self._draft.fingerprint)

    def _limit(self, prompt_length: int, options: DecodingOptions) -> int:
        """Tokens to generate at most: what was asked for, as far as the context reaches."""
        room = (self.context_length or sys.maxsize) - prompt_length
        if room < 1:
            raise ContextLengthError(
                f"prompt has {prompt_length} tokens, but the context of {self.name} holds {self.context_length}, "
                "output included; shorten the prompt"
            )
        wanted = options.max_new_tokens or self.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        return int(min(wanted, room))
