"""Reads the calls of one marked section while it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .call_ids import CallWriter
from .call_syntaxes import read_whole
from .deltas import Delta
from .partial_json import JsonObject, Member, object_of
from .section import Section, first_marker, unfinished_marker

_FENCE = re.compile(r"```(?:json|tool_call|tool_code|python)?(?!\w)")
_FENCE_WORD = re.compile(r"```\w*")
_CUT_OFF = "the call is cut off"


class CallsReader:
    """Reads a section of calls. `rest` is None while it goes on, then the text that follows it.

    What cannot be read becomes an invalid call, up to the marker that ends the section, or to a marker that begins
    another one where nothing ends this kind.
    """

    def __init__(
        self,
        section: Section,
        writer: CallWriter,
        schemas: Mapping[str, Mapping[str, Any]],
        begins: tuple[str, ...] = (),
    ) -> None:
        """`begins`: the markers that begin other sections."""
        self._section, self._writer, self._schemas = section, writer, schemas
        self._ends = section.closes or begins
        self._text = ""
        self._phase = self._between
        self._read = self._depth = 0
        self._doubled = False
        self._object = CallObject()
        self._shown = 0  # characters of the object that were given out
        self._unmarked = 0  # before this place no end marker begins inside a string
        self._search = 0  # where in the text an end may stand
        self._error = ""
        self._deltas: list[Delta] = []
        self.rest: str | None = None
        self.closed = False
        """Whether the section ended with one of its own markers."""
        self.doubtful = False
        """Whether an object may be something else: without arguments, or beginning with what no call has."""

    def push(self, text: str) -> list[Delta]:
        self._text += text
        return self._run(final=False)

    def end(self) -> list[Delta]:
        """No more text comes."""
        deltas = self._run(final=True)
        self.rest = self.rest or ""
        return deltas

    def _run(self, final: bool) -> list[Delta]:
        while self.rest is None and self._phase(final):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each phase reads on and says whether another step can be taken; `final`: nothing more comes.

    def _between(self, final: bool) -> bool:
        """Before a call, or after one."""
        text = self._text.lstrip()
        if not text:
            return final and self._note_empty()
        if marker := next((close for close in self._section.closes if text.startswith(close)), None):
            self.closed = True
            self._note_empty()
            return self._finish(text[len(marker) :])
        if not final and self._undecided(text):
            return False
        if separator := self._separator(text):
            self._text = text[separator:]
            return True
        if text[0] == "{":
            return self._begin_object(text)
        if not self._read and self._section.style:
            self._phase, self._search = (self._head if self._section.style == "headed" else self._whole), 0
            self._text = text
            return True
        if not self._read and self._ends:
            return self._break("a call must begin with {", 0)
        return self._finish(self._text)

    def _note_empty(self) -> bool:
        """A section without any call is an invalid one, so that nothing of the reply is lost."""
        if not self._read and self._section.open:
            self._deltas += self._writer.whole(None, "", error="no call follows where one is announced")
            self._read += 1
        return False

    def _undecided(self, text: str) -> bool:
        """Whether what `text` begins with depends on what follows."""
        markers = (*self._section.closes, *self._section.inner, "```")
        if any(marker.startswith(text) and marker != text for marker in markers):
            return True
        if fence := _FENCE_WORD.match(text):
            return fence.end() == len(text)
        return not text.strip("[{,; \t\r\n")

    def _separator(self, text: str) -> int:
        """Characters at the beginning that only separate calls."""
        if fence := _FENCE.match(text):
            return fence.end()
        if marker := next((inner for inner in self._section.inner if text.startswith(inner)), None):
            return len(marker)
        following = text[1:].lstrip()[:1]
        if text[0] == following == "{" and not self._read:
            # Qwen2.5-Coder's chat template shows its format in doubled braces, and the model may copy them.
            self._doubled = True
            return 1
        if text[0] == "}" and self._doubled:
            return 1
        if text[0] == "[" and following in ("{", "[") and not self._read:
            self._depth += 1
            return 1
        if text[0] == "]" and self._depth:
            self._depth -= 1
            return 1
        return int(text[0] in ",;" and self._read > 0 and following in ("{", "["))

    def _begin_object(self, text: str, headed: bool = False) -> bool:
        self._object, self._shown, self._unmarked = CallObject(headed), 0, 0
        self._text, self._phase = text, self._json
        return True

    def _head(self, final: bool) -> bool:
        """What names a call, up to its arguments."""
        end = first_marker(self._text, ("{", *self._ends))
        if end is None:
            return final and self._break(_CUT_OFF, 0)
        head = self._section.head.fullmatch(self._text[: end[0]]) if self._section.head else None
        if end[1] != "{" or head is None:
            return self._break("a call must be a name and its arguments", 0)
        groups = head.groupdict()
        self._deltas += self._writer.start(groups["name"], groups.get("id"))
        return self._begin_object(self._text[end[0] :], headed=True)

    def _json(self, final: bool) -> bool:
        """Inside an object."""
        read = self._object.json
        read.push(self._text)
        self._text = ""
        self.doubtful |= self._object.doubtful
        self._show()
        if read.done:
            self._text, self._phase = read.text[read.at :], self._between
            self._read += 1
            return self._complete()
        if read.error is None and not final:
            return False
        # A string that swallowed the end of the section is the likeliest mistake.
        search = read.at if read.doubtful is None else read.doubtful
        self._text = read.text
        return self._break(read.error or _CUT_OFF, search)

    def _show(self) -> None:
        """Give out what is certain of the arguments."""
        read, arguments = self._object.json, self._object.arguments
        if arguments is None or not read.text.startswith("{", arguments.start):
            return
        if not self._writer.open:
            if self._section.own_ids or not (name := self._object.name):
                return
            self._deltas += self._writer.start(name, self._object.id)
        limit = read.at if arguments.end is None else arguments.end
        if read.doubtful is not None:
            # An end marker inside a string may be the section's own, if the string turns out to have no end.
            begin = max(read.doubtful, self._unmarked)
            found = first_marker(read.text, self._ends, begin)
            self._unmarked = found[0] if found else unfinished_marker(read.text, self._ends, begin)
            limit = min(limit, self._unmarked)
        start = max(arguments.start, self._shown)
        if limit > start:
            self._deltas += self._writer.arguments(read.text[start:limit])
            self._shown = limit

    def _complete(self) -> bool:
        """The object is whole: give out what is left of the call, and whether it is one."""
        name, text, error = self._object.verdict()
        if not self._writer.open:
            self._deltas += self._writer.whole(name, text, self._object.id, error)
            return True
        read = self._object.json
        unread = read.text[self._shown : read.at] if self._object.repeats else ""
        self._deltas += self._writer.end(error, unread)
        return True

    def _whole(self, final: bool) -> bool:
        """Inside a call in another style than JSON: it ends at the first end marker before which it can be read."""
        while found := first_marker(self._text, self._section.closes, self._search):
            if self._take_whole(self._text[: found[0]]):
                self.closed = True
                return self._finish(self._text[found[0] + len(found[1]) :])
            self._search = found[0] + 1
        self._search = max(self._search, unfinished_marker(self._text, self._section.closes, self._search))
        if not final:
            return False
        return self._finish("") if self._take_whole(self._text) else self._break(self._error or _CUT_OFF, 0)

    def _take_whole(self, body: str) -> bool:
        assert self._section.style is not None
        try:
            calls = read_whole(self._section.style, body, self._schemas)
        except ValueError as error:
            self._error = self._error or str(error)  # the first is of the part that most likely was meant
            return False
        for name, arguments in calls:
            self._deltas += self._writer.whole(name, arguments)
        return True

    def _break(self, error: str, search: int) -> bool:
        """Give up on a call; `search`: where in its text its end may stand."""
        self._error, self._search, self._phase = error, search, self._broken
        return True

    def _broken(self, final: bool) -> bool:
        end = first_marker(self._text, self._ends, self._search)
        if end is None and not final:
            self._search = max(self._search, unfinished_marker(self._text, self._ends, self._search))
            return False
        body = self._text if end is None else self._text[: end[0]]
        shown = self._shown
        if not self._writer.open:
            arguments, name = self._object.arguments, self._object.name
            shown = arguments.start if arguments and name else 0
            self._deltas += self._writer.start(name, self._object.id)
        self._deltas += self._writer.end(self._error, body[shown:].rstrip())
        if end is None:
            return self._finish("")
        self.closed = end[1] in self._section.closes
        return self._finish(self._text[end[0] + (len(end[1]) if self.closed else 0) :])

    def _finish(self, rest: str) -> bool:
        self.rest = rest
        return False


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
