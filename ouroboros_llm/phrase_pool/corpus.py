"""Documents in a scope of their own, which answers may quote and nobody adds answers to."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import OptionError, StoreError
from .base import DeletablePoolSource, DocumentNoteStore, NoteStore, PhrasePool, PoolSource, run_key
from .document_notes import LEFT, NOTES, CorpusRecords, DocumentRecord, held, notes_of, read_notes, text_hash
from .documents import runs_of
from .memory import MemorySource
from .opening import open_pool

_IN_MEMORY = 1_000_000
"""Tokens of a corpus that is only in memory."""

_FLUSHED = 100_000
"""Tokens after which documents are made durable."""

Texts = Iterable[str] | Mapping[str, str | Sequence[str]]
"""Texts, or texts by the ids of documents; several texts of one document are its parts."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """What `index_documents` did."""

    ids: tuple[str, ...]
    """Of the documents given, in their order. A text without an id has the hash of what it says."""
    added: int
    """Documents whose text was not there."""
    unchanged: int
    """Documents whose text was there, under their id or another's; they cost a look at their hash."""
    tokens: int
    """Of the documents added."""


def is_corpus(pool: PhrasePool) -> bool:
    """Whether documents were indexed in a scope."""
    return isinstance(pool, NoteStore) and bool(pool.recall(NOTES))


class Corpus:
    """The documents of one scope, for one tokenizer, as they are when it is made. Not safe to change from several
    threads at once."""

    def __init__(
        self, source: PoolSource, pool: PhrasePool, tokenizer: PreTrainedTokenizerBase, scope: str, fingerprint: str
    ) -> None:
        """`pool`: that of `scope` in `source`, for the tokenizer that `fingerprint` is of."""
        if not isinstance(source, DeletablePoolSource) or not isinstance(pool, DocumentNoteStore):
            raise StoreError(
                f"documents need a store that keeps notes and lets go of runs, but {type(source).__name__} does not; "
                "use a PhraseStore, or None"
            )
        self._source: Any = source
        self._pool: Any = pool
        self._tokenizer = tokenizer
        self._scope, self._fingerprint = scope, fingerprint
        # Not what the pool has in memory: other processes index, too.
        self._notes: Mapping[str, Mapping[str, bytes]] = self._source.notes(scope, NOTES)

    def entries(self) -> dict[str, DocumentRecord]:
        """The documents by their ids."""
        return self._noted().entries

    def check(self) -> None:
        """Raises OptionError where the scope holds answers."""
        if not self._notes.get(self._fingerprint) and self._pool.stats.runs:
            raise OptionError(
                f"scope {self._scope!r} holds answers; documents need a scope of their own, as in 'corpus:manuals'"
            )

    def index(self, documents: Texts, advance: Callable[[int], object] | None = None) -> Indexed:
        """See `Ouroboros.index_documents`."""
        given = _by_id(documents)
        known = self._settle()
        said = {entry.content: entry for entry in known.values()}
        added, tokens, waiting = 0, 0, 0
        for id, texts in given.items():
            content, before = text_hash(*texts), known.get(id)
            other = before if before is not None and before.content == content else said.get(content)
            if other is None or not self._pool.holds_all(other.keys):
                known[id] = said[content] = entry = self._add(id, content, texts, before)
                added, tokens, waiting = added + 1, tokens + entry.tokens, waiting + entry.tokens
            elif other is not before:
                # The same under another id: a document of its own, of the same runs.
                known[id] = entry = replace(other, id=id)
                self._pool.remember(notes_of(entry, before))
            if waiting >= _FLUSHED:
                self._source.flush()
                waiting = 0
            if advance is not None:
                advance(1)
        self._source.flush()
        self._check_room(known.values())
        self._let_go(read_notes(self._pool.recall(LEFT)).left, known, self._fingerprint)
        return Indexed(tuple(given), added, len(given) - added, tokens)

    def remove(self, ids: Iterable[str]) -> int:
        """See `Ouroboros.remove_documents`."""
        if isinstance(ids, str):
            raise OptionError(f"ids must be several, but got one string; write [{ids!r:.80}]")
        asked, found = dict.fromkeys(ids), set[str]()
        for fingerprint in self._notes:
            noted = self._noted(fingerprint)
            gone = [noted.entries.pop(id) for id in asked if id in noted.entries]
            found.update(entry.id for entry in gone)
            self._let_go({**noted.left, **{entry.name: entry.runs for entry in gone}}, noted.entries, fingerprint)
        return len(found)

    def _noted(self, fingerprint: str | None = None) -> CorpusRecords:
        return read_notes(self._notes.get(fingerprint or self._fingerprint, {}))

    def _settle(self) -> dict[str, DocumentRecord]:
        """The documents, after what an interrupted call left was taken out."""
        noted = self._noted()
        if noted.left:
            self._let_go(noted.left, noted.entries, self._fingerprint)
            self._pool = self._source.open(self._scope, fingerprint=self._fingerprint)
        return noted.entries

    def _add(self, id: str, content: str, texts: Sequence[str], before: DocumentRecord | None) -> DocumentRecord:
        seen = set[int]()
        runs = [run for text in texts for run in runs_of(text, self._tokenizer, seen) if len(run) > 1]
        entry = DocumentRecord(id, content, sum(map(len, runs)), tuple(run_key(run).hex() for run in runs))
        # The notes first: somebody else may flush at any moment, and a run that no note names would never be removed.
        self._pool.remember(notes_of(entry, before))
        for run in runs:
            self._pool.add(run, answer=False)
        return entry

    def _let_go(self, gone: Mapping[str, Sequence[str]], kept: Mapping[str, DocumentRecord], fingerprint: str) -> None:
        """Drop notes with the runs that they name, but for those that a document still holds."""
        if gone:
            runs = {run for runs in gone.values() for run in runs} - held(kept.values())
            keys = [bytes.fromhex(run) for run in runs]
            self._source.take_out(self._scope, fingerprint=fingerprint, runs=keys, notes=list(gone))

    def _check_room(self, entries: Iterable[DocumentRecord]) -> None:
        lost = [entry for entry in entries if not self._pool.holds_all(entry.keys)]
        if lost:
            warnings.warn(
                f"{self._scope} has no room for {len(lost)} of its documents, the first {lost[0].id!r:.80}, and no "
                "answer is drafted from them; raise capacity and scope_quota of the store, or use several corpora",
                RuntimeWarning,
                stacklevel=4,
            )


class Corpora:
    """The corpora of a store. Those that answers quote stay open, so that they are read once. Thread-safe."""

    _KEPT = 8

    def __init__(self, store: PoolSource, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
        self._source = store
        self._tokenizer, self._fingerprint = tokenizer, fingerprint
        self._open: OrderedDict[str, PhrasePool] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, scope: str) -> PhrasePool:
        """The pool of documents for an answer; empty, with a warning, where the store fails."""
        pool = open_pool(self._source, scope, self._fingerprint)
        with self._lock:
            self._open[scope] = pool
            self._open.move_to_end(scope)
            while len(self._open) > self._KEPT:
                self._open.popitem(last=False)
        return pool

    def index(self, scope: str, documents: Texts, advance: Callable[[int], object] | None) -> Indexed:
        with _indexing:
            corpus = self._corpus(scope)
            corpus.check()
            if isinstance(self._source, MemorySource):
                # Conversations that come and go must not push it out.
                self._source.stay(scope, fingerprint=self._fingerprint, capacity=_IN_MEMORY)
            return corpus.index(documents, advance)

    def remove(self, scope: str, ids: Iterable[str]) -> int:
        with _indexing:
            return self._corpus(scope).remove(ids)

    def clear(self) -> None:
        """Hold no pool any longer."""
        with self._lock:
            self._open.clear()

    def _corpus(self, scope: str) -> Corpus:
        pool = self._source.open(scope, fingerprint=self._fingerprint)
        return Corpus(self._source, pool, self._tokenizer, scope, self._fingerprint)


_indexing = threading.Lock()
"""Documents are compared with what is there, and then written: one after the other."""


def _by_id(documents: Texts) -> dict[str, tuple[str, ...]]:
    if isinstance(documents, str):
        raise OptionError("documents must be several texts, but got one string; write [text]")
    if isinstance(documents, Mapping):
        given = {id: (texts,) if isinstance(texts, str) else tuple(texts) for id, texts in documents.items()}
    else:
        given = {text_hash(text) if isinstance(text, str) else "": (text,) for text in documents}
    for id, texts in given.items():
        if not isinstance(id, str) or not all(isinstance(text, str) for text in texts):
            raise OptionError(
                f"documents must be texts, by ids that are strings or without, but got {id!r}: {texts!r:.80}"
            )
    return given
