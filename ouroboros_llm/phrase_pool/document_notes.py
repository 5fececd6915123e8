"""What is noted of the documents of a corpus, beside their runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b

NOTES = "document/"
"""What the names of all notes on documents begin with; and the name of one, which says that a scope is a corpus,
whether or not it holds any document now."""

LEFT = NOTES + "left/"
"""What the names of notes on runs begin with that a document does not hold any longer, and that are still there."""


@dataclass(frozen=True, slots=True)
class DocumentRecord:
    """A document in a corpus."""

    id: str
    content: str
    """Hash of its texts."""
    tokens: int
    runs: tuple[str, ...]
    """Keys of its runs, hexadecimal."""

    @property
    def name(self) -> str:
        return NOTES + text_hash(self.id)

    @property
    def keys(self) -> list[bytes]:
        return [bytes.fromhex(run) for run in self.runs]


@dataclass(frozen=True, slots=True)
class CorpusRecords:
    """What the notes of a corpus say."""

    entries: dict[str, DocumentRecord] = field(default_factory=dict)
    """The documents by their ids."""
    left: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Runs that are to be taken out, by the names of the notes that say so."""


def notes_of(entry: DocumentRecord, before: DocumentRecord | None) -> dict[str, bytes]:
    """The notes on a document that is about to be written; what it said `before`, and no longer says, is on one of
    them until it is taken out, so that nobody forgets it whatever happens meanwhile."""
    notes = {NOTES: b"", entry.name: json.dumps(asdict(entry)).encode()}
    if before is not None and (left := sorted({*before.runs} - {*entry.runs})):
        notes[LEFT + text_hash(entry.id)] = json.dumps(left).encode()
    return notes


def read_notes(notes: Mapping[str, bytes]) -> CorpusRecords:
    """What notes say, but for damaged ones: their documents are indexed again."""
    found = CorpusRecords()
    for name, data in notes.items():
        if name.startswith(LEFT):
            found.left[name] = _left(data)
        elif entry := _entry(data):
            found.entries[entry.id] = entry
    return found


def held(entries: Iterable[DocumentRecord]) -> set[str]:
    """The runs of documents."""
    return {run for entry in entries for run in entry.runs}


def text_hash(*texts: str) -> str:
    """Of texts; where one ends and the next begins matters."""
    found = blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def _entry(data: bytes) -> DocumentRecord | None:
    try:
        found = json.loads(data)
        return DocumentRecord(found["id"], found["content"], int(found["tokens"]), tuple(found["runs"]))
    except (ValueError, TypeError, KeyError):
        return None


def _left(data: bytes) -> tuple[str, ...]:
    try:
        return tuple(run for run in json.loads(data) if bytes.fromhex(run))
    except (ValueError, TypeError):
        return ()
