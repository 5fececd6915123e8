"""LlamaIndex messages and prompts, as the model gets them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from ouroboros_llm import OptionError, PromptError
from ouroboros_llm.chat.exchange import Exchange
from ouroboros_llm.chat.prompt_fallbacks import merged_turns
from ouroboros_llm.chat.reply_spec import Asked
from ouroboros_llm.chat.template_support import ArgumentsForm, template_tool_calls
from ouroboros_llm.tool_parsers import InvalidToolCall, ToolCall

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
    MessageRole.TOOL: "tool",
}

Formatter = Callable[[Sequence[ChatMessage]], str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in all its forms; which of them is sent, only the loaded model can tell."""

    text: str | None = None
    """What is sent to a model without a chat template, and wherever the user formats prompts; None: what `formatter`
    makes of the messages."""
    messages: Sequence[ChatMessage] | None = None
    """For the chat template; None: always the text."""
    formatter: Formatter | None = None
    templated: bool = True
    """Whether the messages go to the chat template, if there is one; else to `formatter`."""

    def form(self, asked: Asked, has_template: bool) -> str | Exchange:
        """Text that goes as it is, or an exchange of messages.

        Raises:
            OptionError: tools or a schema, where the prompt is text.
        """
        if self.messages is None or (self.text is not None and not has_template):
            if asked.tools or asked.schema:
                raise OptionError("tools and response_format need chat messages, but the prompt is text; use chat")
            return self.text or ""
        to_dicts = partial(chat_messages, self.messages)
        written = None if self.templated and has_template else partial(self._written, asked)
        return Exchange(to_dicts, asked, ids=call_ids(self.messages), written=written)

    def _written(self, asked: Asked, dicts: list[dict[str, Any]]) -> str:
        assert self.formatter is not None and self.messages is not None  # messages come with one
        if asked.tools or asked.schema:
            return self.formatter([ChatMessage(role=message["role"], content=message["content"]) for message in dicts])
        return self.formatter(self.messages)


def chat_messages(messages: Sequence[ChatMessage], form: ArgumentsForm | None = "object") -> list[dict[str, Any]]:
    """Messages in an order that chat templates accept: at most one system message, at the front, then turns.

    Messages of one role in a row become one, a line break between them; tool results stay apart, as each answers
    another call. A system message after the first turn is sent as the user's: many templates refuse it where it stands,
    and in front it would lose its place in time (an agent's "stop now" is about what was just said) and change the
    prefix whose keys and values a session keeps.

    Args:
        form: how the chat template wants the arguments of calls (`arguments_form`).

    Raises:
        PromptError: a message holds something other than text, calls and thoughts.
    """
    dicts: list[dict[str, Any]] = []
    for message in messages:
        current = _to_dict(message, form)
        if current["role"] == "system" and dicts and dicts[-1]["role"] != "system":
            current["role"] = "user"
        dicts.append(current)
    return merged_turns(dicts)


def call_ids(messages: Sequence[ChatMessage]) -> list[str | None]:
    """The ids of all calls in a conversation."""
    return [call.id for message in messages for call in _tool_calls(message)]


def _to_dict(message: ChatMessage, form: ArgumentsForm | None) -> dict[str, Any]:
    current: dict[str, Any] = {"role": _ROLES[message.role], "content": _text(message)}
    if current["role"] == "tool":
        given = {name: message.additional_kwargs.get(name) for name in ("name", "tool_call_id")}
        current |= {name: value for name, value in given.items() if value}
    if current["role"] == "assistant":
        if calls := _tool_calls(message):
            current["tool_calls"] = template_tool_calls(calls, form)
        if thoughts := [block.content for block in message.blocks if isinstance(block, ThinkingBlock)]:
            current["reasoning_content"] = "".join(filter(None, thoughts))
    return current


def _text(message: ChatMessage) -> str:
    for block in message.blocks:
        if not isinstance(block, (TextBlock, ThinkingBlock, ToolCallBlock, CachePoint)):
            raise PromptError(
                f"messages must hold text only, but a {message.role.value} message holds a {type(block).__name__}; "
                "pass its text as a TextBlock, or leave it out"
            )
    return message.content or ""


def _tool_calls(message: ChatMessage) -> list[ToolCall | InvalidToolCall]:
    """The calls in a message: its blocks, or where there are none, what older versions of LlamaIndex kept beside."""
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    if blocks:
        return [_call(block.tool_name, block.tool_kwargs, block.tool_call_id) for block in blocks]
    older = message.additional_kwargs.get("tool_calls") or ()
    functions = [(call.get("function"), call.get("id")) for call in older if isinstance(call, Mapping)]
    return [_call(one["name"], one.get("arguments") or "", id) for one, id in functions if isinstance(one, Mapping)]


def _call(name: str, arguments: Mapping[str, Any] | str, id: str | None) -> ToolCall | InvalidToolCall:
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return ToolCall(name, found, id or "")
    return InvalidToolCall(name, str(arguments), "its arguments are no JSON object", id or "")
