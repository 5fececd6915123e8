"""Messages in an order that chat templates accept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
