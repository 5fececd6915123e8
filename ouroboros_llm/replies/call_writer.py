"""Numbers the calls of a reply, and writes down what becomes of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .json_text import ControlCharacters
from .reply import ArgumentsDelta, CallEnd, CallStart, Delta

_ID = re.compile(r"call(\d{5,})")


def call_id(number: int) -> str:
    """The id of a call to which the model gave none. Mistral's templates want nine letters or digits."""
    return f"call{number:05d}"


def next_call(ids: Iterable[str | None]) -> int:
    """The number after the highest that one of `ids` is made of.

    Of the ids in a conversation this makes ids that are new in it, and the same whenever it is repeated.
    """
    numbers = [int(match[1]) for id in ids if id and (match := _ID.fullmatch(id))]
    return max(numbers, default=-1) + 1


class CallWriter:
    """Makes the deltas of calls, one call after another."""

    def __init__(self, first_call: int = 0) -> None:
        """`first_call`: the number that the first id is made of."""
        self._first = first_call
        self._count = 0
        self._controls = ControlCharacters()
        self.open = False
        """Whether a call has begun and not ended."""

    def start(self, name: str | None, id: str | None = None) -> list[Delta]:
        self._count += 1
        self.open, self._controls = True, ControlCharacters()
        return [CallStart(self._index, id or call_id(self._first + self._index), name)]

    def arguments(self, text: str) -> list[Delta]:
        text = self._controls.push(text)
        return [ArgumentsDelta(self._index, text)] if text else []

    def end(self, error: str | None = None, unread: str = "") -> list[Delta]:
        """`unread`: what else stands in an invalid call; it goes where its arguments are, as it is."""
        self.open = False
        tail = self._controls.flush() + unread
        rest: list[Delta] = [ArgumentsDelta(self._index, tail)] if tail else []
        return [*rest, CallEnd(self._index, error)]

    def whole(self, name: str | None, arguments: str, id: str | None = None, error: str | None = None) -> list[Delta]:
        """All deltas of a call."""
        return [*self.start(name, id), *self.arguments(arguments), *self.end(error)]

    @property
    def _index(self) -> int:
        return self._count - 1
