"""LangChain's messages as the dictionaries that chat templates read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from ouroboros_llm import PromptError
from ouroboros_llm.chat.prompt_fallbacks import merged_turns
from ouroboros_llm.chat.template_support import ArgumentsForm, template_tool_calls
from ouroboros_llm.tool_parsers import InvalidToolCall, ToolCall

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
)
_TOOL_CALL_BLOCKS = frozenset({"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "input_json_delta"})
_UNSAID_BLOCKS = frozenset(
    {
        "reasoning",
        "reasoning_content",
        "thinking",
        "redacted_thinking",
        "server_tool_call",
        "server_tool_call_chunk",
        "server_tool_result",
    }
)
"""What other models thought, and what their providers' servers did meanwhile."""
_TEXT_BLOCKS = {"text": "text", "text-plain": "text", "refusal": "refusal"}
"""Kinds of blocks to where they have their text."""


def to_dicts(messages: Sequence[BaseMessage], form: ArgumentsForm | None = "object") -> list[dict[str, Any]]:
    """Messages as `{"role", "content"}` dictionaries, those in a row by the same speaker merged.

    Args:
        form: how the chat template wants the arguments of calls (`arguments_form`).

    Raises:
        PromptError: a message holds something other than text, or is of a kind that no chat template knows.
    """
    return merged_turns(_to_dict(message, form) for message in messages)


def call_ids(messages: Sequence[BaseMessage]) -> list[str | None]:
    """The ids of all calls in a conversation."""
    answers = (message for message in messages if isinstance(message, AIMessage))
    return [call["id"] for message in answers for call in (*message.tool_calls, *message.invalid_tool_calls)]


def message_ids(messages: Sequence[BaseMessage]) -> list[str]:
    """The ids that a graph gave to messages; two of the same words have different ones."""
    return [message.id for message in messages if message.id]


def _to_dict(message: BaseMessage, form: ArgumentsForm | None) -> dict[str, Any]:
    current: dict[str, Any] = {"role": _role(message), "content": _text(message)}
    if message.name:
        current["name"] = message.name
    if isinstance(message, ToolMessage):
        current["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage):
        if calls := _tool_calls(message):
            current["tool_calls"] = template_tool_calls(calls, form)
        if reasoning := _reasoning(message):
            current["reasoning_content"] = reasoning
    return current


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise PromptError(f"messages must be system, human, AI, tool or chat messages, but got {type(message).__name__}")


def _tool_calls(message: AIMessage) -> list[ToolCall | InvalidToolCall]:
    return [
        *(ToolCall(call["name"], call["args"], call["id"] or "") for call in message.tool_calls),
        *(
            InvalidToolCall(call["name"], call["args"] or "", call["error"] or "", call["id"] or "")
            for call in message.invalid_tool_calls
        ),
    ]


def _reasoning(message: AIMessage) -> str:
    """What a model of ours thought. Templates know how much of it they show, mostly that of the current turn."""
    if reasoning := message.additional_kwargs.get("reasoning_content"):
        return str(reasoning)
    blocks = [block for block in message.content if isinstance(block, dict)]
    return "".join(block.get("reasoning", "") for block in blocks if block.get("type") == "reasoning")


def _text(message: BaseMessage) -> str:
    blocks = [message.content] if isinstance(message.content, str) else message.content
    return "".join(_block_text(message, block) for block in blocks)


def _block_text(message: BaseMessage, block: str | dict[Any, Any]) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind in _TEXT_BLOCKS and isinstance(text := block.get(_TEXT_BLOCKS[kind]), str):
        return text
    if isinstance(message, AIMessage) and kind in _UNSAID_BLOCKS:
        return ""  # no part of what was said
    if isinstance(message, AIMessage) and kind in _TOOL_CALL_BLOCKS and _tool_calls(message):
        return ""  # the message lists its calls beside its content too
    raise PromptError(
        f"messages must hold text, but a {type(message).__name__} holds a content block of type {kind!r}; "
        "leave it out, or describe it in words"
    )
