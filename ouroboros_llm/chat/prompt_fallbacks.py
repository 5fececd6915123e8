"""Prompt fallbacks for chat templates without tools, tool results or system role."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..tool_parsers.deltas import ToolCall
from ..tool_parsers.reply_format import ReplyFormat

_TOOLS = """You can call these functions, given as JSON Schemas:
{tools}
To call one, answer with nothing but a JSON object: {{"name": "<function>", "arguments": {{<its arguments>}}}}"""
_MUST = "Answer by calling {names}."
_SCHEMA = "Answer with nothing but a JSON value of this JSON Schema:\n{schema}"


def with_tools(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`messages` that tell of tools, for a chat template that does not."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    told = _TOOLS.format(tools=listed)
    first = messages[0]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *messages[1:]]
    if first["role"] == "user":
        return [{**first, "content": f"{told}\n\n{first['content']}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def with_system_in_words(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` whose system messages are the users', for a chat template that refuses them or leaves them out."""
    return merged_turns({**message, "role": "user"} if message["role"] == "system" else message for message in messages)


def with_calls_in_words(messages: list[dict[str, Any]], format: ReplyFormat) -> list[dict[str, Any]]:
    """`messages` whose calls and results of tools are text, for a chat template that leaves them out."""
    spoken: list[dict[str, Any]] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            written = [_written(call["function"], format) for call in calls]
            content = "\n".join(filter(None, (message["content"], *written)))
            current = {"role": "assistant", "content": content}
        elif message["role"] == "tool":
            name = f" of {message['name']}" if message.get("name") else ""
            current = {"role": "user", "content": f"Result{name}:\n{message['content']}"}
        else:
            current = dict(message)
        if spoken and spoken[-1]["role"] == current["role"]:
            current["content"] = f"{spoken.pop()['content']}\n{current['content']}"
        spoken.append(current)
    return spoken


def _written(function: Mapping[str, Any], format: ReplyFormat) -> str:
    arguments = function["arguments"]
    if isinstance(arguments, str):  # a call that was no call
        return arguments
    return format.render([ToolCall(function["name"], dict(arguments), "")])


def with_choice(messages: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """`messages` that end by asking for a call of one of these tools."""
    return _instructed(messages, _MUST.format(names=" or ".join(names)))


def with_schema(messages: list[dict[str, Any]], schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`messages` that end by asking for JSON of a schema."""
    return _instructed(messages, _SCHEMA.format(schema=json.dumps(schema, ensure_ascii=False)))


def _instructed(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    # At the end: what stands before stays the same, and so do its keys and values.
    last = messages[-1]
    if last["role"] == "user":
        return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{text}"}]
    return [*messages, {"role": "user", "content": text}]


def merged_turns(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with those in a row by the same speaker as one, a line break between them.

    Many chat templates insist that speakers alternate. Answers of tools stay apart: each belongs to a call of its own,
    and gets the name of the tool, which some templates want.
    """
    merged: list[dict[str, Any]] = []
    names: dict[Any, str] = {}
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and names.get(message.get("tool_call_id")):
            message = {"name": names[message["tool_call_id"]], **message}
        if merged and message["role"] == merged[-1]["role"] != "tool":
            merged[-1] = _merge(merged[-1], message)
        else:
            merged.append(message)
    return merged


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    merged = {**left, "content": "\n".join(filter(None, (left["content"], right["content"])))}
    if left.get("name") != right.get("name"):
        merged.pop("name", None)  # the text is no longer one speaker's
    if calls := [*left.get("tool_calls", ()), *right.get("tool_calls", ())]:
        merged["tool_calls"] = calls
    return merged
