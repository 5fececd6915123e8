"""One call of a chat model: messages to a prompt, and pieces of the reply to LangChain's chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolCall
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk

from ouroboros_llm import GenerationResult, Piece
from ouroboros_llm.replies import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    ContentDelta,
    Delta,
    ReasoningDelta,
    ReplyFormat,
    format_of,
    reply_of,
    spoiled,
)
from ouroboros_llm.replies.templates import ArgumentsForm, arguments_form
from ouroboros_llm.stream import off_the_loop

from . import _grammar
from ._messages import call_ids, to_dicts
from ._pieces import ashown, shown
from ._tools import Asked
from ._wording import with_calls_in_words, with_choice, with_schema, with_tools

if TYPE_CHECKING:
    from .chat_models import ChatOuroboros

_PROMPT_END = 256
"""Tokens at the end of a prompt in which a chat template may begin the reply."""


@dataclass(frozen=True)
class Habits:
    """What a model's chat template takes, and how its replies are read."""

    format: ReplyFormat = ReplyFormat()
    form: ArgumentsForm | None = "object"
    takes_tools: bool = True

    @property
    def begins_replies(self) -> bool:
        """Whether the reply may begin in the prompt."""
        kinds = {section.kind for section in self.format.sections}
        return self.format.response_template is not None or not kinds.isdisjoint({"reasoning", "header"})


_habits: WeakKeyDictionary[Any, tuple[Any, Habits]] = WeakKeyDictionary()


def habits_of(ouroboros: Any) -> Habits:
    """The habits of a loaded model."""
    tokenizer = getattr(ouroboros, "tokenizer", None)
    if tokenizer is None:
        return Habits()
    template = tokenizer.chat_template or ""
    known, habits = _habits.get(tokenizer, (None, Habits()))
    if known != template:
        texts = template if isinstance(template, str) else "\n".join(template.values())
        habits = Habits(format_of(tokenizer), arguments_form(tokenizer), "tools" in texts)
        _habits[tokenizer] = template, habits
    return habits


def prompt_of(messages: Sequence[BaseMessage], asked: Asked, habits: Habits) -> list[dict[str, Any]]:
    """The messages as the chat template gets them."""
    dicts = to_dicts(messages, habits.form)
    if habits.form is None:
        dicts = with_calls_in_words(dicts, habits.format)
    if asked.tools and not habits.takes_tools:
        dicts = with_tools(dicts, asked.tools)
    if asked.forced and not _grammar.connected():
        dicts = with_choice(dicts, asked.forced_names)
    if asked.schema is not None and asked.told:
        dicts = with_schema(dicts, asked.schema)
    return dicts


def template_tools(asked: Asked, habits: Habits) -> list[dict[str, Any]] | None:
    """The tools as the chat template gets them, if it takes any."""
    if not asked.tools or not habits.takes_tools:
        return None
    functions = ({key: value for key, value in tool["function"].items() if key != "strict"} for tool in asked.tools)
    return [{"type": "function", "function": function} for function in functions]


class Exchange:
    """A question and its answer. Nothing is loaded or decoded before the first piece is asked for."""

    def __init__(self, model: ChatOuroboros, messages: list[BaseMessage], stop: list[str] | None, asked: Asked) -> None:
        """`model`: with the settings of the call."""
        self._model, self._messages, self._stop, self._asked = model, messages, stop, asked
        self._deltas: list[Delta] = []
        self._arguments: dict[int, str] = {}
        self._reply: Any = None

    def pieces(self) -> Generator[Piece]:
        yield from shown(self._start())

    def apieces(self) -> AsyncGenerator[Piece]:
        return ashown(off_the_loop(self._start))

    def _start(self) -> Iterator[Piece]:
        ouroboros = self._model._loaded()
        asked, habits = self._asked, habits_of(ouroboros)
        prompt, tools = prompt_of(self._messages, asked, habits), template_tools(asked, habits)
        format, end = habits.format, ""
        if asked.tools and (asked.forced or not habits.takes_tools):
            # Whatever the model is used to, here it was told, or is made, to answer with nothing but calls.
            format = replace(format, bare=True)
        if habits.begins_replies:
            end = str(ouroboros.tokenizer.decode(ouroboros.encode(prompt, tools=tools)[-_PROMPT_END:]))
        self._reply = format.stream(asked.tools, prompt=end, ids=call_ids(self._messages))
        return self._model._stream_of(
            prompt,
            self._stop,
            ouroboros=ouroboros,
            tools=tools,
            kept_tokens=format.kept_tokens,
            **self._form(format, end),
        )

    def _form(self, format: ReplyFormat, prompt_end: str) -> dict[str, Any]:
        """Options that keep the reply to what was asked. Text beside tools is left free, as it may be a call."""
        thinking = (s for s in format.sections if s.kind == "reasoning" and prompt_end.rstrip().endswith(s.open))
        begun = next((f"{section.closes[0]}\n\n" for section in thinking), "")
        if self._asked.forced:
            return _grammar.call_options(format, self._asked.forced, begun=begun)
        if self._asked.schema is not None and not self._asked.tools:
            return _grammar.json_options(self._asked.schema, before=begun)
        return {}

    def message(self, piece: Piece) -> AIMessageChunk | None:
        """What a piece adds to the message, the last one without usage and metadata; None if nothing yet.

        Raises:
            OutputParserException: the reply is over, and is not the call that it had to be.
        """
        deltas = self._reply.push(piece.text)
        if piece.result is not None:
            deltas += self._reply.end()
        if not self._asked.parallel:
            deltas = [delta for delta in deltas if getattr(delta, "index", 0) == 0]
        self._deltas += deltas
        if piece.result is not None:
            self._check(piece.result)
        content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
        calls = self._call_chunks(deltas)
        if not (content or reasoning or calls or piece.result):
            return None
        return AIMessageChunk(
            content=content,
            additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
            tool_call_chunks=calls,
        )

    def _call_chunks(self, deltas: Iterable[Delta]) -> list[ToolCallChunk]:
        chunks: dict[int, ToolCallChunk] = {}
        for delta in deltas:
            if isinstance(delta, CallStart):
                chunks[delta.index] = tool_call_chunk(name=delta.name, args="", id=delta.id, index=delta.index)
                self._arguments[delta.index] = ""
            elif isinstance(delta, ArgumentsDelta):
                self._add(chunks, delta.index, delta.text)
            elif isinstance(delta, CallEnd) and delta.error is not None:
                # LangChain completes partial JSON, and would make a call of one that was cut off.
                so_far = self._arguments[delta.index]
                self._add(chunks, delta.index, spoiled(so_far)[len(so_far) :])
        return list(chunks.values())

    def _add(self, chunks: dict[int, ToolCallChunk], index: int, text: str) -> None:
        chunk = chunks.setdefault(index, tool_call_chunk(name=None, args="", id=None, index=index))
        chunk["args"] = (chunk["args"] or "") + text
        self._arguments[index] += text

    @cached_property
    def _whole(self) -> Any:
        return reply_of(self._deltas)

    @property
    def called(self) -> bool:
        """Whether the reply, which is over, calls a tool."""
        return bool(self._whole.tool_calls)

    def settle(self, message: AIMessage) -> None:
        """Give the whole message its calls as they were read, the invalid ones with their errors."""
        message.tool_calls = [_call(call) for call in self._whole.tool_calls]
        message.invalid_tool_calls = [
            invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=call.error)
            for call in self._whole.invalid_tool_calls
        ]

    def _check(self, result: GenerationResult) -> None:
        names = self._asked.forced_names
        if names and not any(call.name in names for call in self._whole.tool_calls):
            cut = "; it was cut off, raise max_tokens" if result.finish_reason == "length" else ""
            raise OutputParserException(
                f"the model had to call {' or '.join(names)}, but its reply is no such call{cut}: {result.text!r:.500}",
                llm_output=result.text,
            )


def _call(call: Any) -> ToolCall:
    return tool_call(name=call.name, args=call.arguments, id=call.id)
