"""Phrases and the protocols of the pools that keep them.

A *phrase* is a run of token ids that followed the text before. A pool stores whole token runs and finds in
them what came after the longest suffix of the current text (suffix matching with back-off, as in prompt lookup
and SuffixDecoding), so every n-gram statistic is derived from the runs and never stored.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, runtime_checkable

from ..errors import OptionError

MAX_SCOPE_LENGTH = 255

PHRASE_LENGTH = 64
"""Longest phrase that `match` returns, in tokens: as many as a round verifies at most."""

MATCH_LIMIT = 32
"""A match longer than this counts as this long."""

ANSWERS = "answers/"
"""What the names of notes begin with that say which answer a prompt got."""

KEPT_ANSWERS = 16_384
"""Such notes per scope at most."""

ANSWER = -1
"""Stands for all that went before an answer: a tail that begins with it matches what answers began with."""


def check_scope(scope: object, name: str = "scope") -> str:
    """`scope` itself where it is a name; raises OptionError where it is not. Nothing in a name has a meaning."""
    if not isinstance(scope, str) or not scope or len(scope) > MAX_SCOPE_LENGTH or not scope.isprintable():
        raise OptionError(
            f"{name} must be 1 to {MAX_SCOPE_LENGTH} printable characters, for example 'conversation:42', "
            f"but got {scope!r:.80}"
        )
    return scope


def check_scopes(scopes: Sequence[str], name: str = "read_scopes") -> list[str]:
    """`scopes` as a list; raises OptionError where it is no sequence of names."""
    if isinstance(scopes, str):
        raise OptionError(
            f"{name} must be a sequence of scopes, but got the string {scopes!r:.80}; write [{scopes!r:.80}]"
        )
    return [check_scope(scope, f"{name}[{number}]") for number, scope in enumerate(scopes)]


@dataclass(frozen=True, slots=True)
class Phrase:
    """What once followed the text that was matched."""

    token_ids: tuple[int, ...]
    match_length: int
    """How many tokens before the phrase agree with the tail that was asked for, at most `MATCH_LIMIT`. The beginning of
    an answer counts as one."""
    count: int = 1
    """How often the run that holds the phrase was added."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    runs: int
    tokens: int


@runtime_checkable
class PhrasePool(Protocol):
    """The phrases of one scope."""

    def add(self, token_ids: Sequence[int], *, answer: bool = True) -> None:
        """Remember a run of tokens; `answer`: whether it begins where an answer begins.

        Does not block on input or output; runs shorter than two tokens hold no phrase.
        """

    def match(self, tail: Sequence[int]) -> list[Phrase]:
        """What followed the longest suffixes of `tail`, best first: longer matches first, then more recent ones.

        `tail` may begin with `ANSWER`. Does not modify the pool. An empty list where nothing matches.
        """

    @property
    def stats(self) -> PoolStats:
        """How much the pool holds, without reading it."""


@runtime_checkable
class NoteStore(Protocol):
    """A pool that also keeps what drafting learned in its scope: opaque notes by name, the last one of a name."""

    def remember(self, notes: Mapping[str, bytes]) -> None:
        """Keep notes. Does not block on input or output."""

    def recall(self, prefix: str) -> Mapping[str, bytes]:
        """The notes whose names begin with `prefix`."""


@runtime_checkable
class AnswerIndex(NoteStore, Protocol):
    """A notebook whose notes may point to runs. Of those whose names begin with `ANSWERS` it keeps `KEPT_ANSWERS`, the
    last ones, as long as it has the runs."""

    def noted_run(self, name: str) -> tuple[int, ...]:
        """The run whose key (`run_key`) is the note of this name; nothing where there is no such note or run."""


@runtime_checkable
class DocumentNoteStore(NoteStore, Protocol):
    """A notebook that can tell whether the runs of a document are still there."""

    def holds_all(self, keys: Collection[bytes]) -> bool:
        """Whether all runs with these keys (`run_key`) are in the pool."""


@runtime_checkable
class PoolSource(Protocol):
    """Where the pools of named scopes come from: a store, or memory."""

    def open(self, scope: str, *, fingerprint: str) -> PhrasePool:
        """The pool of `scope` for the tokenizer `fingerprint`; creates it where there is none."""

    def flush(self) -> None:
        """Make what was added durable. When it returns, it is so, or a warning was given."""

    def close(self) -> None:
        """Flush and release; idempotent."""


@runtime_checkable
class DeletablePoolSource(Protocol):
    """A source that knows what it keeps, and from whose pools runs can be taken out again, as documents are that nobody
    wants any longer."""

    def notes(self, scope: str, prefix: str) -> Mapping[str, Mapping[str, bytes]]:
        """The notes of a scope whose names begin with `prefix`, of each tokenizer, by its fingerprint.

        They are as they are now, those included that others wrote since the pools were opened. Raises StoreError.
        """

    def take_out(self, scope: str, *, fingerprint: str, runs: Collection[bytes], notes: Collection[str]) -> int:
        """Erase the runs with these keys (`run_key`) and the notes of these names; returns the number of runs.

        When it returns, it is so, or StoreError was raised. A pool that is open may have to be opened again.
        """


def run_key(token_ids: Sequence[int]) -> bytes:
    """What a run is known by: the hash of its tokens as unsigned 32-bit little-endian integers."""
    try:
        data = array("I", token_ids)
    except OverflowError:
        data = array("q", token_ids)
    if sys.byteorder == "big":
        data.byteswap()
    return blake2b(data.tobytes(), digest_size=16).digest()
