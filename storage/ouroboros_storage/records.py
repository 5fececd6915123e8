"""What the database holds, as Python sees it, and how token ids become bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import NamedTuple

from ouroboros_llm.errors import OptionError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ScopeKey(NamedTuple):
    """Phrases of one scope are token ids, so each tokenizer has its own."""

    scope: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class PendingRun:
    """A run that is not in the database yet. Times in microseconds since 1970."""

    count: int
    created: int
    last_used: int
    answer: bool = True
    """Whether it begins where an answer begins."""


@dataclass(frozen=True, slots=True)
class ReadRun:
    """A run on its way into a pool."""

    hash: bytes
    token_ids: tuple[int, ...]
    count: int
    answer: bool


@dataclass(frozen=True, slots=True)
class StoredScope:
    """A scope as the database holds it, one for each tokenizer that wrote to it."""

    scope: str
    fingerprint: str
    runs: int
    tokens: int
    created: datetime
    last_used: datetime


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run of tokens as the database holds it, and how often it was added."""

    scope: str
    fingerprint: str
    token_ids: tuple[int, ...]
    count: int
    created: datetime
    last_used: datetime
    answer: bool = True
    """Whether it begins where an answer begins, as outputs do and runs of rejected drafts do not."""


@dataclass(frozen=True, slots=True)
class StoredNote:
    """What drafting learned beside the phrases: opaque bytes under a name."""

    scope: str
    fingerprint: str
    name: str
    data: bytes
    last_used: datetime


@dataclass(frozen=True, slots=True)
class StoreStats:
    """How much a store, or one scope of it, holds."""

    scopes: int
    """Scopes by name, however many tokenizers wrote to them."""
    runs: int
    tokens: int
    uses: int
    """How often runs were added, repetitions included."""
    notes: int
    nbytes: int
    """Bytes of token ids and notes, without what the database needs around them."""
    oldest: datetime | None
    """When the run unused for longest was used last; None where there is none."""
    newest: datetime | None
    file_bytes: int | None
    """Size of the SQLite file and its companions, whatever the scope; None where there is no file."""
    waiting: int
    """Runs that wait for the next flush."""


def encode(token_ids: Sequence[int]) -> bytes:
    """Token ids as unsigned 32-bit little-endian integers. OptionError where one does not fit."""
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except (struct.error, TypeError):
        wrong = next((t for t in token_ids if not isinstance(t, int) or not 0 <= t < 1 << 32), token_ids)
        raise OptionError(f"token_ids must be whole numbers from 0 to {(1 << 32) - 1}, but got {wrong!r:.80}") from None


def decode(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)


def content_hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def to_time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)


def to_microseconds(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)
