"""Takes a reply apart by the response template of a tokenizer (transformers 5)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..transformers_api import response_field, response_template
from .call_ids import CallWriter
from .call_syntaxes import schema_of, typed
from .deltas import ContentDelta, Delta, ReasoningDelta, offered
from .partial_json import object_of
from .streaming import Flow

_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
_CALLS = "tool_calls"


def is_usable(template: Any) -> bool:
    """Whether this version of transformers takes the template."""
    try:
        response_template(template)
    except (ImportError, TypeError, ValueError):
        return False
    return True


class TemplateStream:
    """Like `ReplyStream`, by a response template; calls come whole.

    transformers' own parser raises at a call that cannot be read, which loses the reply, and overwrites what was said
    before a call with what is said after it. So it only reads the template, and the fields of a call.
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: str = "",
        ids: Iterable[str | None] = (),
        about: str = "",
    ) -> None:
        """See `ReplyFormat.stream`."""
        self._template, self._schemas = response_template(template), offered(tools)
        self._calls = CallWriter(ids, about)
        self._content, self._reasoning = Flow(ContentDelta), Flow(ReasoningDelta)
        self._text, self._at = "", 0
        self._field: Any = None  # the region that is open; None: the one that no marker opens
        self._body, self._captures = "", dict[str, str]()
        self._deltas: list[Delta] = []
        self._follow(prompt)

    def _follow(self, prompt: str) -> None:
        """Go on where the prompt ends."""
        anchors = list(self._template.start_anchor_re.finditer(prompt))
        if anchors and anchors[-1].end() < len(prompt):
            self.push(prompt[anchors[-1].end() :])

    def push(self, text: str) -> list[Delta]:
        """What is certain now."""
        self._text += text
        return self._run(final=False)

    def end(self) -> list[Delta]:
        """The rest, when no more text comes."""
        deltas = self._run(final=True)
        return [*deltas, *self._reasoning.end(), *self._content.end()]

    def _run(self, final: bool) -> list[Delta]:
        while self._step(final):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def _step(self, final: bool) -> bool:
        """Read up to the next marker; False where that takes more text."""
        match, opens, certain = self._next_marker(final)
        if match is None:
            self._take(self._text[self._at : certain])
            self._at = certain
            if final and self._field is not None:
                self._close(cut_off=self._field.close_re is not None)
            return False
        self._take(self._text[self._at : match.start()])
        empty = match.end() == self._at
        self._at = match.end()
        if self._field is not None:
            self._close(cut_off=False)
        elif opens is not None:
            self._field, self._body = opens, ""
            self._captures = {name: text for name, text in match.groupdict().items() if text is not None}
        self._content.mark()
        self._reasoning.mark()
        # A marker of no width in front of nothing would be found again and again.
        return not (empty and self._field is None) or self._skip(final)

    def _skip(self, final: bool) -> bool:
        self._take(self._text[self._at : self._at + 1])
        self._at = min(self._at + 1, len(self._text))
        return self._at < len(self._text)

    def _next_marker(self, final: bool) -> tuple[Any, Any, int]:
        """The next marker, the field that it opens if it opens one, and how far text is certain if there is none."""
        certain, best = len(self._text), None
        for kind, pattern, literals, grows, field in self._watched():
            match = pattern.search(self._text, self._at, **({} if final else {"partial": True}))
            if match is None:
                continue
            at_edge = match.end() == len(self._text)
            if not final and (
                match.partial or (at_edge and (match.start() == match.end() or literals is None or grows))
            ):
                certain = min(certain, match.start())
                continue
            key = (match.start(), match.start() - match.end(), kind)
            if best is None or key < best[0]:
                best = key, match, field
        if best is None or (not final and best[1].start() >= certain):
            return None, None, certain
        return best[1], best[2], certain

    def _watched(self) -> list[tuple[int, Any, Any, bool, Any]]:
        if self._field is not None:
            field = self._field
            if field.close_re is None:
                return []
            return [(1, field.close_re, field.close_literals, field.close_literal_can_extend, None)]
        watched: list[tuple[int, Any, Any, bool, Any]] = []
        for name, field in self._template.fields.items():
            if field.open_re is not None and (name != _CALLS or self._schemas):
                watched.append((0, field.open_re, field.open_literals, field.open_literal_can_extend, field))
            elif field.open_re is None and field.close_re is not None:
                watched.append((1, field.close_re, field.close_literals, field.close_literal_can_extend, None))
        return watched

    def _take(self, text: str) -> None:
        """Text of the region that is open."""
        name = self._field.name if self._field is not None else self._template.implicit
        if name == _CALLS and self._schemas:
            self._body += text
        elif text:
            self._deltas += (self._reasoning if name in _REASONING else self._content).push(text)

    def _close(self, cut_off: bool) -> None:
        field, self._field = self._field, None
        if field.name == _CALLS:
            self._write(field, cut_off)

    def _write(self, field: Any, cut_off: bool) -> None:
        try:
            # Only JSON shows whether it is whole.
            if cut_off and field.content != "json":
                raise ValueError("the call is cut off")
            calls = [self._call(value, field) for value in self._values(field)]
        except Exception as error:  # a template's transform may raise anything
            name = self._captures.get("name")
            self._deltas += [*self._calls.start(name), *self._calls.end(str(error) or "no call", self._body.strip())]
            return
        for name, id, arguments in calls:
            self._deltas += self._calls.whole(name, arguments, id)

    def _values(self, field: Any) -> list[Any]:
        value = response_field(self._body, field, self._captures)
        return value if isinstance(value, list) else [value]

    def _call(self, value: Any, field: Any) -> tuple[str, str | None, str]:
        """Name, id and arguments as JSON. Raises ValueError for anything that is no call."""
        function = value.get("function", value) if isinstance(value, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments") or {}
        if not isinstance(name, str) or not name:
            raise ValueError("the call does not name its tool")
        if isinstance(arguments, Mapping) and field.content != "json":
            arguments = {
                key: typed(text, schema_of(self._schemas, name, key)) if isinstance(text, str) else text
                for key, text in arguments.items()
            }
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        object_of(text)
        id = value.get("id")
        return name, id if isinstance(id, str) else None, text
