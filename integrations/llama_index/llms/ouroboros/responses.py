"""What LlamaIndex gets back: plain text and plain numbers, never tensors, which traces would keep alive."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from ouroboros_llm import GenerationResult
from ouroboros_llm.tool_parsers import ArgumentsDelta, CallEnd, CallStart, ContentDelta, Delta, ReasoningDelta

R_co = TypeVar("R_co", covariant=True)


@dataclass
class Call:
    """A call of a tool, as far as it was said."""

    id: str
    name: str | None
    arguments: str = ""
    """Text of a JSON object; the beginning of one as long as the call is not `whole`."""
    whole: bool = False

    @property
    def block(self) -> ToolCallBlock:
        arguments = json.loads(self.arguments) if self.whole else self.arguments
        return ToolCallBlock(tool_call_id=self.id, tool_name=self.name or "", tool_kwargs=arguments)

    @property
    def legacy(self) -> dict[str, Any]:
        """In OpenAI's form, which LlamaIndex's own programs look for."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Said:
    """A reply as far as it was said."""

    text: str = ""
    thoughts: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    delta: str | None = ""
    """Text that is new; None where the reply comes whole."""
    thoughts_delta: str = ""
    result: GenerationResult | None = None
    """At the end."""

    def add(self, deltas: Iterable[Delta], result: GenerationResult | None) -> bool:
        """Go on; returns whether anything is new."""
        self.delta = self.thoughts_delta = ""
        self.result, news = result, False
        for delta in deltas:
            self._add(delta)
            news = True
        self.text += self.delta
        self.thoughts += self.thoughts_delta
        return news or result is not None

    def _add(self, delta: Delta) -> None:
        assert self.delta is not None  # `add` has set it
        if isinstance(delta, ContentDelta):
            self.delta += delta.text
        elif isinstance(delta, ReasoningDelta):
            self.thoughts_delta += delta.text
        elif isinstance(delta, CallStart):
            self.calls[delta.index] = Call(delta.id, delta.name)
        elif isinstance(delta, ArgumentsDelta):
            self.calls[delta.index].arguments += delta.text
        elif isinstance(delta, CallEnd) and delta.error is None:
            self.calls[delta.index].whole = True
        elif isinstance(delta, CallEnd):
            # LlamaIndex would complete what was cut off, and call it. So it is text, as which the user may read it.
            call = self.calls.pop(delta.index)
            self.delta += f"{call.name}: {call.arguments}" if call.name else call.arguments


class Respond(Protocol[R_co]):
    """Makes a response of what was said."""

    def __call__(self, said: Said) -> R_co: ...


def chat_response(said: Said) -> ChatResponse:
    calls = [said.calls[index] for index in sorted(said.calls)]
    blocks: list[ContentBlock] = [ThinkingBlock(content=said.thoughts)] if said.thoughts else []
    if said.text or not calls:
        blocks.append(TextBlock(text=said.text))
    blocks += [call.block for call in calls]
    legacy = {"tool_calls": [call.legacy for call in calls]} if calls else {}
    message = ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=legacy)
    return ChatResponse(message=message, delta=said.delta, **_report(said))


def completion_response(said: Said) -> CompletionResponse:
    return CompletionResponse(text=said.text, delta=said.delta, **_report(said))


def _report(said: Said) -> dict[str, Any]:
    """`raw` and `additional_kwargs` of a response; in a stream the last one has usage and statistics."""
    thoughts = {"thinking_delta": said.thoughts_delta} if said.thoughts_delta and said.delta is not None else {}
    if said.result is None:
        return {"additional_kwargs": thoughts}
    result = said.result
    usage = {
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": result.usage.completion_tokens,
        "total_tokens": result.usage.total_tokens,
        "cached_tokens": result.usage.cached_tokens,
    }
    reason = "tool_calls" if said.calls and result.finish_reason == "stop" else result.finish_reason
    rest = {"finish_reason": reason, "statistics": _statistics(result)}
    return {"raw": {"usage": usage, **rest}, "additional_kwargs": {**usage, **rest, **thoughts}}


def _statistics(result: GenerationResult) -> dict[str, Any]:
    """The statistics as plain data, without what is said of every single token."""
    names = [field.name for field in fields(result.statistics) if field.name != "origins"]
    numbers = {name: getattr(result.statistics, name) for name in names}
    numbers["accepted_by_source"] = dict(result.statistics.accepted_by_source)
    for name in ("mean_acceptance_length", "tokens_per_second"):
        numbers[name] = getattr(result.statistics, name)
    return numbers
