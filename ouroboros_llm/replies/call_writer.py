"""Numbers the calls of a reply, and writes down what becomes of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .json_text import ControlCharacters
from .reply import ArgumentsDelta, CallEnd, CallStart, Delta

_ID = re.compile(r"call(\d{5,})")


class CallWriter:
    """Makes the deltas of calls, one call after another.

    A call gets the id that the model gave it, unless another one has it already; else one that counts on from those
    in the conversation. So ids are unique there, and the same whenever the conversation is repeated.
    """

    def __init__(self, ids: Iterable[str | None] = ()) -> None:
        """`ids`: of the calls in the conversation so far."""
        self._taken = set(ids)
        numbers = [int(match[1]) for id in self._taken if id and (match := _ID.fullmatch(id))]
        self._number = max(numbers, default=-1) + 1
        self._index = -1
        self._controls = ControlCharacters()
        self.open = False
        """Whether a call has begun and not ended."""

    def start(self, name: str | None, id: str | None = None) -> list[Delta]:
        if not id or id in self._taken:
            id = self._next_id()
        self._taken.add(id)
        self._index += 1
        self.open, self._controls = True, ControlCharacters()
        return [CallStart(self._index, id, name)]

    def _next_id(self) -> str:
        while True:
            # Mistral's templates want nine letters or digits.
            id, self._number = f"call{self._number:05d}", self._number + 1
            if id not in self._taken:
                return id

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
