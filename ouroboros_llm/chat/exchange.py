"""A question to a chat model and its reply, whatever the framework's messages look like."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..errors import PromptError
from ..results import StreamChunk
from ..tool_parsers.deltas import Delta, Reply, reply_of
from ..tool_parsers.reply_format import ReplyFormat
from . import reply_grammar as forms
from .prompt_fallbacks import with_calls_in_words, with_choice, with_schema, with_system_in_words, with_tools
from .reply_spec import Asked
from .template_support import ArgumentsForm, TemplateSupport, detect_template_support

_PROMPT_END = 256
"""Tokens at the end of a prompt in which a chat template may begin the reply."""

ToDicts = Callable[[ArgumentsForm | None], list[dict[str, Any]]]
"""Messages as `{"role", "content"}` dictionaries, given how the chat template wants the arguments of calls."""


def prompt_of(to_dicts: ToDicts, asked: Asked, habits: TemplateSupport) -> list[dict[str, Any]]:
    """The messages as the chat template gets them, with what it has no place for in words."""
    dicts = to_dicts(habits.form)
    if not dicts:
        raise PromptError("prompt is empty; it must hold at least one message")
    if habits.form is None:
        dicts = with_calls_in_words(dicts, habits.format)
    if asked.tools and not habits.takes_tools:
        dicts = with_tools(dicts, asked.tools)
    if not habits.takes_system:
        dicts = with_system_in_words(dicts)
    if asked.forced and not forms.connected():
        dicts = with_choice(dicts, asked.forced_names)
    if asked.schema is not None and asked.told:
        dicts = with_schema(dicts, asked.schema)
    return dicts


def template_tools(asked: Asked, habits: TemplateSupport) -> list[dict[str, Any]] | None:
    """The tools as the chat template gets them, if it takes any."""
    if not asked.tools or not habits.takes_tools:
        return None
    functions = ({key: value for key, value in tool["function"].items() if key != "strict"} for tool in asked.tools)
    return [{"type": "function", "function": function} for function in functions]


class Exchange:
    """A question and its answer. `start` needs the loaded model; `push` reads what it says.

    Attributes, once started:
        prompt: the messages for the chat template, or the text that `written` made of them.
        tools: those that the chat template gets.
        kept_tokens: special tokens that the reply is read by.
        form: `DecodingOptions` that keep the reply to what was asked, if to anything.
    """

    prompt: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    kept_tokens: Mapping[int, str]
    form: dict[str, Any]

    def __init__(
        self,
        to_dicts: ToDicts,
        asked: Asked,
        *,
        ids: Iterable[str | None] = (),
        about: str = "",
        written: Callable[[list[dict[str, Any]]], str] | None = None,
    ) -> None:
        """`ids`: of the calls in the conversation so far; `about`: what tells this question from another one of the
        same words, for the ids of its calls; `written`: makes text of the messages, in place of the chat template,
        which then sees neither them nor the tools."""
        self._to_dicts, self.asked, self._written = to_dicts, asked, written
        self._ids, self._about = tuple(ids), about
        self._deltas: list[Delta] = []
        self._reading: Any = None

    def start(self, ouroboros: Any) -> None:
        asked, habits = self.asked, detect_template_support(ouroboros)
        if self._written is not None:
            habits = replace(habits, form=None, takes_tools=False, takes_system=True)
        messages = prompt_of(self._to_dicts, asked, habits)
        self.prompt = messages if self._written is None else self._written(messages)
        self.tools = template_tools(asked, habits)
        format, end = habits.format, ""
        if asked.tools and (asked.forced or asked.schema is not None or not habits.takes_tools):
            # Whatever the model is used to, here it was told, or is made, to answer with nothing but calls or JSON.
            format = replace(format, bare=True)
        if habits.begins_replies:
            end = str(ouroboros.tokenizer.decode(ouroboros.encode(self.prompt, tools=self.tools)[-_PROMPT_END:]))
        form = self._form(format, end)
        # A reply that is kept to a form ends by itself; a stop string in its middle would break it.
        self.kept_tokens, self.form = format.kept_tokens, {"stop": (), **form} if form else {}
        self._reading = format.stream(asked.tools, prompt=end, ids=self._ids, about=self._place())

    def _place(self) -> str:
        """What ids of calls come from, where there may be any."""
        return json.dumps([self._about, self.prompt, self.tools], default=str) if self.asked.tools else ""

    def _form(self, format: ReplyFormat, prompt_end: str) -> dict[str, Any]:
        thinking = (s for s in format.sections if s.kind == "reasoning" and prompt_end.rstrip().endswith(s.open))
        begun = next((f"{section.closes[0]}\n\n" for section in thinking), "")
        if self.asked.forced:
            return forms.call_options(format, self.asked.forced, begun=begun)
        if self.asked.schema is None:
            return {}
        if not self.asked.tools:
            return forms.json_options(self.asked.schema, before=begun)
        parallel = self.asked.parallel
        return forms.call_or_json_options(format, self.asked.tools, self.asked.schema, parallel=parallel, begun=begun)

    def push(self, piece: StreamChunk) -> list[Delta]:
        """What a piece adds to the reply; with the last piece, the rest."""
        deltas: list[Delta] = self._reading.push(piece.text)
        if piece.result is not None:
            deltas = [*deltas, *self._reading.end()]
        if not self.asked.parallel:
            deltas = [delta for delta in deltas if getattr(delta, "index", 0) == 0]
        self._deltas += deltas
        return deltas

    @cached_property
    def reply(self) -> Reply:
        """The whole reply, once it is over."""
        return reply_of(self._deltas)

    @property
    def missed(self) -> list[str]:
        """The tools of which the reply, which is over, had to call one and did not."""
        names = self.asked.forced_names
        return [] if any(call.name in names for call in self.reply.tool_calls) else names
