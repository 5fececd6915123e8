"""Runs and notes on their way between databases: as lines of JSON, and in batches to be written."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from ouroboros_llm.errors import OptionError, OuroborosError, StoreError
from ouroboros_llm.phrase_pool.base import check_scope

from .records import PendingRun, ScopeKey, StoredNote, StoredRun, encode, to_microseconds

Batch = tuple[dict[ScopeKey, dict[bytes, PendingRun]], dict[ScopeKey, dict[str, bytes]]]

_BATCH = 2000
"""Records written in one transaction."""


def to_line(record: StoredRun | StoredNote) -> str:
    """A record as one JSON object in ASCII, times in ISO 8601, notes in base64; no line end."""
    fields: dict[str, Any] = {"scope": record.scope, "fingerprint": record.fingerprint}
    if isinstance(record, StoredNote):
        fields |= {"note": record.name, "data": b64encode(record.data).decode()}
    else:
        fields |= {"token_ids": record.token_ids, "count": record.count, "answer": record.answer}
        fields["created"] = record.created.isoformat()
    return json.dumps(fields | {"last_used": record.last_used.isoformat()})


def from_line(line: str) -> StoredRun | StoredNote:
    """What `to_line` made. StoreError says what is wrong with a line."""
    try:
        fields = json.loads(line)
        found = _note(fields) if "note" in fields else _run(fields)
        check_record(found)
        return found
    except KeyError as error:
        raise StoreError(f"a line of an export must have {error.args[0]!r}") from error
    # Deep nesting is a RecursionError, a time before the year 1 an OverflowError.
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError, OuroborosError) as error:
        raise StoreError(f"this is no line of an export: {error}") from error


def check_record(record: object) -> None:
    """OptionError where it is no record, or one that cannot be in a database."""
    if not isinstance(record, StoredRun | StoredNote):
        raise OptionError(f"records must be StoredRun or StoredNote, but got {type(record).__name__}")
    check_scope(record.scope)
    check_scope(record.fingerprint, "fingerprint")
    if record.last_used.tzinfo is None:
        raise OptionError(f"last_used must have a time zone, but got {record.last_used}")
    if isinstance(record, StoredNote):
        check_scope(record.name, "note")
        return
    encode(record.token_ids)
    if isinstance(record.count, bool) or not isinstance(record.count, int) or not 0 < record.count < 1 << 62:
        raise OptionError(f"count must be a whole number of at least 1, but got {record.count!r}")
    if record.created.tzinfo is None:
        raise OptionError(f"created must have a time zone, but got {record.created}")


def batches(records: Iterable[StoredRun | StoredNote]) -> Iterator[Batch]:
    """Records as they are written: runs by their encoded token ids, notes by name. Raises OptionError."""
    left = iter(records)
    while found := list(islice(left, _BATCH)):
        runs: dict[ScopeKey, dict[bytes, PendingRun]] = {}
        notes: dict[ScopeKey, dict[str, bytes]] = {}
        for record in found:
            check_record(record)
            key = ScopeKey(record.scope, record.fingerprint)
            if isinstance(record, StoredNote):
                notes.setdefault(key, {})[record.name] = record.data
            else:
                _put(runs.setdefault(key, {}), record)
        yield runs, notes


def _put(runs: dict[bytes, PendingRun], record: StoredRun) -> None:
    data = encode(record.token_ids)
    created, last_used = to_microseconds(record.created), to_microseconds(record.last_used)
    run = PendingRun(record.count, created, last_used, record.answer)
    known = runs.get(data, run)
    runs[data] = PendingRun(
        max(run.count, known.count),
        min(run.created, known.created),
        max(run.last_used, known.last_used),
        run.answer or known.answer,
    )


def _run(fields: dict[str, Any]) -> StoredRun:
    return StoredRun(
        fields["scope"],
        fields["fingerprint"],
        tuple(fields["token_ids"]),
        fields["count"],
        _time(fields["created"]),
        _time(fields["last_used"]),
        bool(fields.get("answer", True)),
    )


def _note(fields: dict[str, Any]) -> StoredNote:
    data = b64decode(fields["data"], validate=True)
    return StoredNote(fields["scope"], fields["fingerprint"], fields["note"], data, _time(fields["last_used"]))


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
