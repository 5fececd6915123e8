"""What a reply consists of: as a whole, and as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: dict[str, Any]
    id: str


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """A call that cannot be made: malformed, or cut off."""

    name: str | None
    """None where the text does not get as far as the name."""
    arguments: str
    """What the model wrote for the arguments, and after; all of the call if it does not get that far."""
    error: str
    id: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a model, taken apart."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; its arguments follow, then its end."""

    index: int
    """Counts the calls of this reply, invalid ones included."""
    id: str
    name: str | None


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments, as text of a JSON object; whatever the model wrote where the call is invalid."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete, or will never be."""

    index: int
    error: str | None = None
    """Why the call is invalid."""


Delta: TypeAlias = ContentDelta | ReasoningDelta | CallStart | ArgumentsDelta | CallEnd


def reply_of(deltas: Iterable[Delta]) -> Reply:
    """The reply that deltas add up to."""
    content, reasoning = "", ""
    starts: dict[int, CallStart] = {}
    texts: dict[int, list[str]] = {}
    valid, invalid = [], []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif isinstance(delta, ReasoningDelta):
            reasoning += delta.text
        elif isinstance(delta, CallStart):
            starts[delta.index], texts[delta.index] = delta, []
        elif isinstance(delta, ArgumentsDelta):
            texts[delta.index].append(delta.text)
        else:
            start, text = starts[delta.index], "".join(texts[delta.index])
            if delta.error is None:
                valid.append(ToolCall(start.name or "", json.loads(text), start.id))
            else:
                invalid.append(InvalidToolCall(start.name, text, delta.error, start.id))
    return Reply(content, reasoning, tuple(valid), tuple(invalid))


def offered(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    """Parameter schemas by the names of tools, given as `{"type": "function", "function": {...}}` or as the latter."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
            parameters = function.get("parameters")
            schemas[name] = parameters if isinstance(parameters, Mapping) else {}
    return schemas
