"""Takes a reply apart while it comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .call_ids import CallWriter
from .call_section import CallsReader
from .deltas import CallStart, ContentDelta, Delta, ReasoningDelta, offered
from .section import Section, first_marker, unfinished_marker

# Qwen2.5-Coder wraps calls in the tag that its prompt wraps tools in, or forgets the tag that begins a call.
_BARE = Section("calls", "", inner=("<tools>", "</tools>", "</tool_call>"))
_HEADER = re.compile(
    r"(?:assistant)?\s*(?:to=(?:functions\.)?(?P<to>[^\s<]+))?\s*(?:<\|channel\|>)?\s*"
    r"(?P<channel>analysis|commentary|final)?\s*(?:to=(?:functions\.)?(?P<then>[^\s<]+))?\s*(?:<\|constrain\|>)?\s*(?:json)?"
)
_HARMONY_CALL = Section(
    "calls", "", ("<|call|>", "<|end|>", "<|return|>"), "headed", re.compile(r"\s*(?P<name>\S+)\s*")
)
_HARMONY_REASONING = Section("reasoning", "", ("<|end|>", "<|return|>"))


class Flow:
    """Text between markers. White space beside a marker belongs to the marker, unless it separates two parts."""

    def __init__(self, delta: Callable[[str], Delta]) -> None:
        self._delta = delta
        self._space = ""
        self._marked = self.begun = False

    def push(self, text: str) -> list[Delta]:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if not shown:
            return []
        if self._marked and not self.begun:
            shown = shown.lstrip()
        self.begun, self._marked = True, False
        return [self._delta(shown)]

    def mark(self) -> None:
        """A marker stands here."""
        self._marked = True

    def end(self) -> list[Delta]:
        space, self._space = self._space, ""
        return [self._delta(space)] if space and not self._marked else []


class BareCalls:
    """Text that may turn out to be nothing but calls, held back until that is known."""

    def __init__(self, writer: CallWriter, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._reader = CallsReader(_BARE, writer, schemas)
        self._schemas = schemas
        self._deltas: list[Delta] = []
        self.text = ""
        self.refuted = False

    def push(self, text: str) -> None:
        self.text += text
        self._take(self._reader.push(text))

    def end(self) -> list[Delta]:
        """The calls; none if the text is something else."""
        self._take(self._reader.end())
        return [] if self.refuted else self._deltas

    def _take(self, deltas: list[Delta]) -> None:
        self._deltas += deltas
        strange = any(isinstance(delta, CallStart) and delta.name not in self._schemas for delta in deltas)
        self.refuted |= strange or self._reader.doubtful or bool(self._reader.rest)


class ReplyStream:
    """One reply, by the markers of its format.

    Deltas add up to the same reply however the text is cut into pieces. No text raises, and none is lost: what is
    neither reasoning nor a call is content, and what cannot be read of a call is in the invalid call.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        bare: bool = False,
        prompt: str = "",
        ids: Iterable[str | None] = (),
        about: str = "",
    ) -> None:
        """See `ReplyFormat` and its `stream` for the arguments."""
        self._schemas, ids = offered(tools), tuple(ids)
        self._sections = {section.open: section for section in sections if self._schemas or section.kind != "calls"}
        self._calls = CallWriter(ids, about)
        self._content, self._reasoning = Flow(ContentDelta), Flow(ReasoningDelta)
        self._bare = BareCalls(CallWriter(ids, about), self._schemas) if bare and self._schemas else None
        self._text = ""
        self._line = ""  # what was said since the last line break or marker
        self._stray: tuple[str, ...] = ()  # markers that end a section which is over already
        self._section = _BARE
        self._reader: CallsReader | None = None
        self._phase = self._outside
        self._deltas: list[Delta] = []
        self._follow(prompt.rstrip())

    def _follow(self, prompt: str) -> None:
        """Go on where the prompt ends."""
        for section in self._sections.values():
            if section.kind == "reasoning" and prompt.endswith(section.open):
                self._open(section)
            if section.kind == "header" and prompt.endswith(f"{section.open}assistant"):
                self._open(section)

    def push(self, text: str) -> list[Delta]:
        """What is certain now. A text's end that may be the beginning of a marker is held back."""
        self._text += text
        return self._run(final=False)

    def end(self) -> list[Delta]:
        """The rest, when no more text comes."""
        deltas = self._run(final=True)
        if self._bare is not None:
            if calls := self._bare.end():
                return [*deltas, *calls]
            deltas += self._release()
        return [*deltas, *self._reasoning.end(), *self._content.end()]

    def _run(self, final: bool) -> list[Delta]:
        while self._phase(final):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each phase reads on and says whether another step can be taken; `final`: nothing more comes.

    def _outside(self, final: bool) -> bool:
        markers = (*self._sections, *self._stray)
        found = first_marker(self._text, markers)
        if found is None:
            shown = len(self._text) if final else unfinished_marker(self._text, markers)
            self._say(self._text[:shown])
            self._text = self._text[shown:]
            return False
        place, marker = found
        section = self._sections.get(marker)
        self._say(self._text[:place])
        if section and section.kind == "reasoning" and self._line.strip():
            # Thoughts begin on a line of their own; in the middle of one, the answer speaks of the marker.
            self._say(marker)
            self._text = self._text[place + len(marker) :]
            return True
        self._text = self._text[place if section and section.inclusive else place + len(marker) :]
        self._mark()
        self._stray = ()
        if section is not None:
            self._open(section)
        return True

    def _say(self, text: str) -> None:
        self._line = (self._line + text).rpartition("\n")[2]
        if self._bare is None:
            self._deltas += self._content.push(text) if text else []
            return
        self._bare.push(text)
        if self._bare.refuted:
            self._deltas += self._release()

    def _release(self) -> list[Delta]:
        held, self._bare = self._bare, None
        return self._content.push(held.text) if held and held.text else []

    def _mark(self) -> None:
        if self._bare is not None and self._bare.text.strip():
            self._deltas += self._release()
        self._content.mark()
        self._line = ""

    def _open(self, section: Section) -> None:
        self._section = section
        if section.kind == "reasoning":
            self._reasoning.mark()
            self._phase = self._think
        elif section.kind == "header":
            self._phase = self._header
        elif section.kind == "calls":
            if self._bare is not None:
                self._deltas += self._release()
            self._reader = CallsReader(section, self._calls, self._schemas, tuple(self._sections))
            self._phase = self._call

    def _think(self, final: bool) -> bool:
        closes = self._section.closes
        found = first_marker(self._text, closes)
        shown = len(self._text) if final else unfinished_marker(self._text, closes)
        self._deltas += self._reasoning.push(self._text[: found[0] if found else shown])
        if found is None:
            self._text = self._text[shown:]
            return False
        self._text = self._text[found[0] + len(found[1]) :]
        self._reasoning.mark()
        self._content.mark()
        self._phase = self._outside
        return True

    def _call(self, final: bool) -> bool:
        assert self._reader is not None  # opened with the section
        self._deltas += self._reader.push(self._text)
        self._text = ""
        if final:
            self._deltas += self._reader.end()
        if self._reader.rest is None:
            return False
        self._text = self._reader.rest
        self._stray = self._ends_to_come(self._reader.closed)
        self._phase = self._outside
        return bool(self._text) or final

    def _ends_to_come(self, closed: bool) -> tuple[str, ...]:
        """End markers that are no text: the section's own if it is over without, or of one that was not begun."""
        sections = [section for section in self._sections.values() if section.kind == "calls"]
        return tuple({end for section in sections for end in section.closes if not closed or section != self._section})

    def _header(self, final: bool) -> bool:
        """What kind of message follows: `analysis`, `commentary to=functions.f`, `final`."""
        found = first_marker(self._text, self._section.closes)
        if found is None:
            if final:
                self._phase = self._outside_text
            return final
        header = self._text[: found[0]]
        self._text = self._text[found[0] + len(found[1]) :]
        parts = _HEADER.fullmatch(header.strip())
        self._phase = self._outside
        if parts is None:
            self._say(header)
        elif (name := parts["to"] or parts["then"]) and self._schemas:
            self._text = f"{name} {self._text}"
            self._open(_HARMONY_CALL)
        elif parts["channel"] == "analysis":
            self._open(_HARMONY_REASONING)
        return True

    def _outside_text(self, final: bool) -> bool:
        """A header that never ended is text."""
        self._say(self._text)
        self._text = ""
        return False
