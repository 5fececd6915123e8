"""The JSON object of one call."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .json_text import JsonObject, Member, object_of

_FUNCTION = "function"
_NAMES = ("name", "tool_name", _FUNCTION)
_ARGUMENTS = ("arguments", "parameters")
_IDS = ("id", "tool_call_id")
_KEYS = frozenset({*_NAMES, *_ARGUMENTS, *_IDS, "type"})


class CallObject:
    """An object with name and arguments; or, `headed`, one that is the arguments, as the name stood before it."""

    def __init__(self, headed: bool = False) -> None:
        self.json = JsonObject()
        self._headed = headed

    @property
    def arguments(self) -> Member | None:
        """Where the arguments stand in the text, as far as they have come."""
        if self._headed:
            return Member("", 0, self.json.at if self.json.done else None)
        return self._member(_ARGUMENTS)

    @property
    def name(self) -> str | None:
        return None if self._headed else self._string(_NAMES)

    @property
    def id(self) -> str | None:
        return None if self._headed else self._string(_IDS)

    @property
    def doubtful(self) -> bool:
        """Whether it may be something else than a call: it begins with another key, or is whole without arguments."""
        members = self.json.members
        strange = bool(members) and members[0].key not in _KEYS
        return strange or (self.json.done and self._member((*_ARGUMENTS, _FUNCTION)) is None)

    @property
    def repeats(self) -> bool:
        """Whether it names its tool or its arguments twice."""
        keys = [member.key for member in self.json.members]
        return not self._headed and any(keys.count(key) > 1 for key in (*_NAMES, *_ARGUMENTS))

    def verdict(self) -> tuple[str | None, str, str | None]:
        """Name and arguments of the whole object, and what is wrong with them."""
        if self.repeats:
            return self.name, self._text, "the call names its tool or its arguments twice"
        try:
            name, text = self._parts()
        except RecursionError:
            return self.name, self._text, "the call is nested too deeply"
        if name is None and not self._headed:
            return None, self._text, "the call does not name its tool"
        try:
            object_of(text)
        except ValueError as error:
            return name, text, f"the arguments are no JSON object that can be used: {error}"
        return name, text, None

    @property
    def _text(self) -> str:
        return self.json.text[: self.json.at]

    def _parts(self) -> tuple[str | None, str]:
        if self._headed:
            return None, self._text
        if (arguments := self.arguments) is not None:
            value = self._value(arguments)
            # Some models write JSON inside a JSON string, as in OpenAI's interface.
            text = value if isinstance(value, str) else self.json.text[arguments.start : arguments.end]
            return self.name, "{}" if text in ("null", "") else text
        function = self._value(self._member((_FUNCTION,)))
        return _openai(function) if isinstance(function, dict) else (self.name, "{}")

    def _member(self, keys: Iterable[str]) -> Member | None:
        return next((member for member in self.json.members if member.key in keys), None)

    def _value(self, member: Member | None) -> Any:
        if member is None or member.end is None:
            return None
        try:
            return json.loads(self.json.text[member.start : member.end], strict=False)
        except (ValueError, RecursionError):
            return None

    def _string(self, keys: tuple[str, ...]) -> str | None:
        values = (self._value(member) for member in self.json.members if member.key in keys)
        return next((value for value in values if value and isinstance(value, str)), None)


def _openai(function: dict[str, Any]) -> tuple[str | None, str]:
    """Name and arguments of `"function": {"name": ..., "arguments": ...}`."""
    name, arguments = function.get("name"), next((function[key] for key in _ARGUMENTS if key in function), None)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return name if name and isinstance(name, str) else None, text
