"""Recorded greedy outputs, to replay drafters on without a model: one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import OptionError

TOP = 8
"""Tokens recorded per generated position."""

_BEGINNING = b'{"id":'
"""How every recorded line begins."""

_DIGITS = 4
"""Decimal places of a recorded probability: finer differences tell a drafter nothing."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a model answered to one prompt, greedily."""

    id: str
    category: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The answer, its end-of-sequence token included."""
    top_ids: tuple[tuple[int, ...], ...] = ()
    """Per position of the answer: the likeliest tokens there, best first. Empty where they were not recorded."""
    top_probs: tuple[tuple[float, ...], ...] = ()
    """Per position of the answer: the probabilities of `top_ids`. Empty where they were not recorded."""

    def to_json(self) -> str:
        """One line without its end; probabilities in four decimal places."""
        row: dict[str, Any] = {
            "id": self.id,
            "category": self.category,
            "prompt_ids": self.prompt_ids,
            "gen": self.token_ids,
        }
        if self.top_ids:
            row["top_ids"] = self.top_ids
        if self.top_probs:
            row["top_p"] = [[round(chance, _DIGITS) for chance in chances] for chances in self.top_probs]
        return json.dumps(row, separators=(",", ":"))


def read_traces(path: str | Path) -> Iterator[Trace]:
    """The traces of a file, in its order, as they are read; empty lines are passed over.

    Raises:
        OptionError: no such file, or something in it is no trace; names the file, the line and the field.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_trace(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"traces {str(path)!r} cannot be read: {error}") from error


def parse_trace(line: str, place: str) -> Trace:
    """The trace that a line holds; `place` names the line in errors. Raises OptionError where it holds none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{place}: a trace is one JSON object a line, but this is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise OptionError(f"{place}: a trace is a JSON object with prompt_ids and gen, but got {_shown(row)}")
    trace = Trace(
        id=_field(row, "id", _is_text, "a text", place),
        category=_field(row, "category", _is_text, "a text", place),
        prompt_ids=tuple(_field(row, "prompt_ids", _are_ids, "a list of token ids, at least one", place)),
        token_ids=tuple(_field(row, "gen", _are_ids, "a list of token ids, at least one", place)),
        top_ids=_rows(row, "top_ids", _are_ids, "token ids", place),
        top_probs=_rows(row, "top_p", _are_probabilities, "probabilities", place),
    )
    _check_rows(trace, place)
    return trace


def write_trace(file: TextIO, trace: Trace) -> None:
    """Append one line and hand it to the operating system, so that an interrupted run keeps it."""
    file.write(trace.to_json() + "\n")
    file.flush()


def recorded_ids(path: str | Path) -> set[str]:
    """The ids in a file that a recording goes on with, none where there is no file yet.

    Mends a last line that was not written to its end. Raises OptionError, and changes nothing, where the file holds
    anything but traces.
    """
    path = Path(path)
    if not path.exists():
        return set()
    lines, cut = _lines(path)
    places = (f"{path}, line {number}" for number in range(1, len(lines) + 1))
    ids = {parse_trace(line, place).id for line, place in zip(lines, places, strict=True) if line.strip()}
    if cut:
        os.truncate(path, path.stat().st_size - cut)
    elif lines and not lines[-1].endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return ids


def _lines(path: Path) -> tuple[list[str], int]:
    """The lines of a file, ends included, and how many bytes of a trace cut short come after them."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        cut = len(lines.pop()) if lines and _is_cut(lines[-1]) else 0
        return [line.decode("utf-8") for line in lines], cut
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"traces {str(path)!r} cannot be read: {error}") from error


def _is_cut(line: bytes) -> bool:
    """Whether `line` is a trace's that was not written to its end."""
    if line.endswith(b"\n") or not line.startswith(_BEGINNING[: len(line)]):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _field(row: dict[str, Any], name: str, fits: Callable[[Any], bool], expected: str, place: str) -> Any:
    if name not in row:
        raise OptionError(f"{place}: field {name!r} is missing; expected {expected}")
    if not fits(row[name]):
        raise OptionError(f"{place}: field {name!r} must be {expected}, but got {_shown(row[name])}")
    return row[name]


def _rows(
    row: dict[str, Any], name: str, fits: Callable[[Any], bool], kind: str, place: str
) -> tuple[tuple[Any, ...], ...]:
    """An optional field: one list of `kind` per generated token."""
    if row.get(name) is None:
        return ()
    lists = _field(row, name, lambda value: isinstance(value, list), f"a list of lists of {kind}", place)
    for position, values in enumerate(lists):
        if not fits(values):
            raise OptionError(f"{place}: field '{name}[{position}]' must be a list of {kind}, but got {_shown(values)}")
    return tuple(tuple(values) for values in lists)


def _check_rows(trace: Trace, place: str) -> None:
    wanted = len(trace.token_ids)
    for name, rows in (("top_ids", trace.top_ids), ("top_p", trace.top_probs)):
        if rows and len(rows) != wanted:
            raise OptionError(
                f"{place}: field {name!r} must have {wanted} lists, one per token of gen, not {len(rows)}"
            )
    if trace.top_ids and trace.top_probs and [*map(len, trace.top_ids)] != [*map(len, trace.top_probs)]:
        raise OptionError(f"{place}: field 'top_p' must have one probability per id of top_ids at every position")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _are_probabilities(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) in (int, float) and 0 <= item <= 1 for item in value)


def _shown(value: Any) -> str:
    return f"{type(value).__name__}: {value!r:.60}"
