"""JSON that comes in pieces."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ATOM = re.compile(r"[-+.\w]*")
_LITERAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_CONTROL = re.compile(r'\\.|["\x00-\x1f]', re.DOTALL)
_ESCAPE_LENGTH = 6


@dataclass(slots=True)
class Member:
    """A member of the outermost object: where its value stands in the text."""

    key: str
    start: int
    end: int | None = None


class JsonObject:
    """Reads one JSON object as far as it has come.

    Stricter than `json.loads` in nothing but NaN and Infinity, and milder only towards line breaks and other control
    characters inside strings, which small models do not always escape.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        """Characters of `text` that were read; what follows is no part of the object."""
        self.done = False
        self.error: str | None = None
        self.members: list[Member] = []
        self.doubtful: int | None = None
        """Where the last string began, as long as nothing that must follow a string has confirmed its end."""
        self._stack: list[str] = []
        self._expects = "value"
        self._in_string = self._is_key = False
        self._key = ""

    def push(self, text: str) -> None:
        self.text += text
        while not self.done and self.error is None and self._step():
            pass

    def _step(self) -> bool:
        """Read a token; False where it needs more text."""
        if self._in_string:
            return self._read_string()
        space = _SPACE.match(self.text, self.at)
        assert space is not None  # it may be empty
        self.at = space.end()
        if self.at == len(self.text):
            return False
        char = self.text[self.at]
        if self._expects in ("value", "value or ]"):
            return self._begin_value(char)
        if char == '"' and self._expects in ("key", "key or }"):
            return self._begin_string(is_key=True)
        if char == "}" and self._expects == "key or }":
            return self._close()
        if char == ":" and self._expects == "colon":
            return self._advance("value")
        if char == "," and self._expects == "more":
            return self._advance("key" if self._stack[-1] == "{" else "value")
        if self._expects == "more" and char == {"{": "}", "[": "]"}[self._stack[-1]]:
            return self._close()
        return self._fail(f"unexpected {char!r}")

    def _begin_value(self, char: str) -> bool:
        if char == "]" and self._expects == "value or ]":
            return self._close()
        if len(self._stack) == 1:
            self.members.append(Member(self._key, self.at))
        if char == "{" or (char == "[" and self._stack):
            self._stack.append(char)
            return self._advance("key or }" if char == "{" else "value or ]")
        if char == '"':
            return self._begin_string(is_key=False)
        return self._read_atom()

    def _read_atom(self) -> bool:
        atom = _ATOM.match(self.text, self.at)
        assert atom is not None  # it may be empty
        if atom.end() == len(self.text) and atom.group():
            if len(self._stack) == 1:
                self.members.pop()  # it is read again when more has come
            return False
        if not _LITERAL.fullmatch(atom.group()):
            return self._fail(f"unexpected {(atom.group() or self.text[self.at])[:20]!r}")
        self.at = atom.end()
        return self._finish_value()

    def _begin_string(self, is_key: bool) -> bool:
        self.doubtful, self._in_string, self._is_key = self.at, True, is_key
        self.at += 1
        return True

    def _read_string(self) -> bool:
        plain = _PLAIN.match(self.text, self.at)
        assert plain is not None  # it may be empty
        self.at = plain.end()
        if self.at == len(self.text):
            return False
        if self.text[self.at] == "\\":
            return self._read_escape()
        self.at += 1
        self._in_string = False
        if not self._is_key:
            return self._finish_value()
        self._key = json.loads(self.text[self.doubtful : self.at], strict=False)
        self._expects = "colon"
        return True

    def _read_escape(self) -> bool:
        if escape := _ESCAPE.match(self.text, self.at):
            self.at = escape.end()
            return True
        if len(self.text) - self.at < _ESCAPE_LENGTH and re.fullmatch(r"\\(u[0-9a-fA-F]*)?", self.text[self.at :]):
            return False
        return self._fail(f"unexpected escape {self.text[self.at : self.at + 2]!r}")

    def _advance(self, expects: str) -> bool:
        self.at += 1
        self._expects, self.doubtful = expects, None
        return True

    def _close(self) -> bool:
        self._stack.pop()
        self.at += 1
        self.doubtful = None
        self.done = not self._stack
        return self._finish_value()

    def _finish_value(self) -> bool:
        self._expects = "more"
        if len(self._stack) == 1:
            self.members[-1].end = self.at
        return True

    def _fail(self, error: str) -> bool:
        self.error = f"{error} at character {self.at}, which is no JSON there"
        return False


class ControlCharacters:
    """Escapes control characters that stand raw inside strings, so that any JSON parser reads the text."""

    def __init__(self) -> None:
        self._in_string = False
        self._held = ""

    def push(self, text: str) -> str:
        text = self._held + text
        escapes = len(text) - len(text.rstrip("\\"))
        text, self._held = (text[:-1], "\\") if escapes % 2 else (text, "")
        return _CONTROL.sub(self._replace, text)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _replace(self, match: re.Match[str]) -> str:
        found = match.group()
        if found == '"':
            self._in_string = not self._in_string
        elif len(found) == 1 and self._in_string:
            return json.dumps(found)[1:-1]
        return found


def object_of(text: str) -> dict[str, Any]:
    """The object that `text` is.

    Raises:
        ValueError: it is no object, or one that cannot be written again: lone surrogates, too deep, numbers too large.
    """
    try:
        value = json.loads(text, strict=False)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("the arguments are nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"the arguments must be a JSON object, but are {text[:40]}")
    return value


def spoiled(arguments: str) -> str:
    """`arguments`, lengthened so that no tolerant parser makes an object of them by closing what is open.

    Frameworks that complete partial JSON would otherwise turn the arguments of a call that was cut off into a valid
    call with half an argument.
    """
    brackets, in_string, escaped = [], False, False
    for char in arguments:
        if in_string:
            in_string, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "{[":
            brackets.append(char)
        elif char in "}]" and brackets:
            brackets.pop()
    quote = ("\\" if escaped else "") + '"' if in_string else ""
    return arguments + quote + ("]" if brackets and brackets[-1] == "{" else "}")
