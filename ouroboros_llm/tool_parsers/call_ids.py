"""Gives the calls of a reply their ids, and writes down what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from .deltas import ArgumentsDelta, CallEnd, CallStart, Delta
from .partial_json import ControlCharacters

_SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"
_LENGTH = 9
"""Of an id: Mistral's templates want nine letters or digits."""


def call_id(about: str, number: int) -> str:
    """Deterministic tool-call id, derived from the request.

    It does not count calls: agents that see the end of their conversation only would begin to count anew, and a call
    whose id was answered before is one that LangGraph does not make.

    Args:
        about: the question, or whatever tells it from others.
        number: of the call in the reply.
    """
    rest = int.from_bytes(sha256(f"{number} {about}".encode(errors="surrogatepass")).digest())
    signs = []
    for _ in range(_LENGTH):
        rest, sign = divmod(rest, len(_SIGNS))
        signs.append(_SIGNS[sign])
    return "".join(signs)


class CallWriter:
    """Makes the deltas of calls, one call after another.

    A call gets the id that the model gave it, unless another one has it already; else one of its own (`call_id`).
    """

    def __init__(self, ids: Iterable[str | None] = (), about: str = "") -> None:
        """`ids`: of the calls in the conversation so far; `about`: see `call_id`."""
        self._taken, self._about = set(ids), about
        self._number, self._index = 0, -1
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
            id, self._number = call_id(self._about, self._number), self._number + 1
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
