"""Phrases and the protocols of the pools that keep them.

A *phrase* is a run of token ids that followed the text before. A pool stores whole token runs and finds in
them what came after the longest suffix of the current text (suffix matching with back-off, as in prompt lookup
and SuffixDecoding), so every n-gram statistic is derived from the runs and never stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .errors import OptionError

MAX_SCOPE_LENGTH = 255

PHRASE_LENGTH = 64
"""Longest phrase that `match` returns, in tokens: as many as a round verifies at most."""

MATCH_LIMIT = 32
"""A match longer than this counts as this long."""

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
class Notebook(Protocol):
    """A pool that also keeps what drafting learned in its scope: opaque notes by name, the last one of a name."""

    def remember(self, notes: Mapping[str, bytes]) -> None:
        """Keep notes. Does not block on input or output."""

    def recall(self, prefix: str) -> Mapping[str, bytes]:
        """The notes whose names begin with `prefix`."""


@runtime_checkable
class PoolSource(Protocol):
    """Where the pools of named scopes come from: a store, or memory."""

    def open(self, scope: str, *, fingerprint: str) -> PhrasePool:
        """The pool of `scope` for the tokenizer `fingerprint`; creates it where there is none."""

    def flush(self) -> None:
        """Make what was added durable. When it returns, it is so, or a warning was given."""

    def close(self) -> None:
        """Flush and release; idempotent."""
