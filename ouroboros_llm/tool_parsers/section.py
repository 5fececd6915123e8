"""How a model marks the parts of its replies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Style = Literal["tagged", "headed", "python", "gemma"]


@dataclass(frozen=True, slots=True)
class Section:
    """A marked part of a reply.

    Attributes:
        kind: "reasoning", "calls", "header" (a line that says what follows, as in OpenAI's harmony), or "mark" (the
            marker itself is all of it).
        open: the marker that begins it.
        closes: markers of which any ends it. Without any it ends where its JSON does.
        style: how calls are written that are no JSON object with name and arguments: "tagged"
            (`<function=f><parameter=x>1</parameter></function>`, `f<arg_key>x</arg_key><arg_value>1</arg_value>`),
            "headed" (a name, then the arguments as JSON), "python" (`[f(x=1)]`), "gemma" (`call:f{x:1}`).
        head: of a headed call, what stands before the arguments; groups `name` and, where the model gives one, `id`.
        inclusive: the marker is also a part of what it opens.
        own_ids: the model writes an id into the object, after the arguments.
        inner: further markers, inside.
    """

    kind: Literal["reasoning", "calls", "header", "mark"]
    open: str
    closes: tuple[str, ...] = ()
    style: Style | None = None
    head: re.Pattern[str] | None = None
    inclusive: bool = False
    own_ids: bool = False
    inner: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.open, *self.closes, *self.inner)


def first_marker(text: str, markers: Iterable[str], start: int = 0) -> tuple[int, str] | None:
    """The first of `markers` in `text[start:]`, and where it stands in `text`."""
    found = [(place, marker) for marker in markers if (place := text.find(marker, start)) >= 0]
    return min(found, default=None)


def unfinished_marker(text: str, markers: Iterable[str], start: int = 0) -> int:
    """Where the end of `text[start:]` begins that may become one of `markers`; the length of `text` if none may."""
    markers = tuple(markers)
    longest = max((len(marker) for marker in markers), default=1) - 1
    for place in range(max(start, len(text) - longest), len(text)):
        if any(marker.startswith(text[place:]) for marker in markers):
            return place
    return len(text)
