"""LangChain's messages as the dictionaries that chat templates read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from ouroboros_llm import PromptError

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
)
_TOOL_CALL_BLOCKS = frozenset({"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "input_json_delta"})
_REASONING_BLOCKS = frozenset({"reasoning", "reasoning_content", "thinking", "redacted_thinking"})


def to_dicts(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as `{"role", "content"}` dictionaries, those in a row by the same speaker merged.

    Many chat templates insist that speakers alternate. Answers of tools stay apart: each belongs to a call of its own.

    Raises:
        PromptError: a message holds something other than text, or is of a kind that no chat template knows.
    """
    merged: list[dict[str, Any]] = []
    for message in messages:
        current = _to_dict(message)
        if merged and current["role"] == merged[-1]["role"] != "tool":
            merged[-1] = _merge(merged[-1], current)
        else:
            merged.append(current)
    return merged


def _to_dict(message: BaseMessage) -> dict[str, Any]:
    current: dict[str, Any] = {"role": _role(message), "content": _text(message)}
    if message.name:
        current["name"] = message.name
    if isinstance(message, ToolMessage):
        current["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage) and (calls := _tool_calls(message)):
        current["tool_calls"] = calls
    return current


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    merged = {**left, "content": "\n".join(filter(None, (left["content"], right["content"])))}
    if left.get("name") != right.get("name"):
        merged.pop("name", None)  # the text is no longer one speaker's
    if calls := [*left.get("tool_calls", ()), *right.get("tool_calls", ())]:
        merged["tool_calls"] = calls
    return merged


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise PromptError(f"messages must be system, human, AI, tool or chat messages, but got {type(message).__name__}")


def _tool_calls(message: AIMessage) -> list[dict[str, Any]]:
    # Arguments stay a dictionary, unlike OpenAI's: templates write them as JSON, and would quote a string again.
    return [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
        for call in (*message.tool_calls, *message.invalid_tool_calls)
    ]


def _text(message: BaseMessage) -> str:
    blocks = [message.content] if isinstance(message.content, str) else message.content
    return "".join(_block_text(message, block) for block in blocks)


def _block_text(message: BaseMessage, block: str | dict[Any, Any]) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind == "text":
        return str(block["text"])
    if isinstance(message, AIMessage) and kind in _REASONING_BLOCKS:
        return ""  # chat templates leave out what the model thought in earlier turns
    if isinstance(message, AIMessage) and kind in _TOOL_CALL_BLOCKS and _tool_calls(message):
        return ""  # the message lists its calls beside its content too
    raise PromptError(
        f"messages must hold text, but a {type(message).__name__} holds a content block of type {kind!r}; "
        "leave it out, or describe it in words"
    )
