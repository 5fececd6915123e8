"""Where replies that must have a form meet the decoder's grammars."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..grammar import Grammar
from .formats import ReplyFormat

_OBJECT_FRAME = (re.compile(r'(.*)\{"(\w+)": "', re.DOTALL), re.compile(r'", "(\w+)": '))


def connected() -> bool:
    """Whether the decoder can keep to a grammar."""
    return find_spec("llguidance") is not None


def json_options(schema: Mapping[str, Any], *, before: str = "", after: str = "") -> dict[str, Any]:
    """Options of a reply that is one JSON value of `schema` between two texts. Empty without grammars."""
    if not connected():
        return {}
    return {"grammar": Grammar.json_schema(schema, before=before, after=after)}


def call_options(format: ReplyFormat, tools: Sequence[Mapping[str, Any]], *, begun: str = "") -> dict[str, Any]:
    """Options of a reply that is a call of one of `tools`, as a model of this format writes it.

    Args:
        begun: what ends the part of the reply that the prompt has begun, as `</think>` does.

    Empty without grammars, and where several tools cannot be told apart by JSON alone.
    """
    before, between, after = format.frame
    functions = [tool["function"] for tool in tools]
    if len(functions) == 1:
        name, schema = functions[0]["name"], _parameters(functions[0])
        return json_options(schema, before=begun + before + name + between, after=after)
    start, middle = _OBJECT_FRAME[0].fullmatch(before), _OBJECT_FRAME[1].fullmatch(between)
    if start is None or middle is None or not after.startswith("}"):
        return {}
    return json_options(_one_of(functions, start[2], middle[1]), before=begun + start[1], after=after[1:])


def _one_of(functions: Sequence[Mapping[str, Any]], name: str, arguments: str) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    calls = []
    for number, function in enumerate(functions):
        schema = _parameters(function)
        # References count from the root, where the definitions of all tools meet.
        own = {key: schema.pop(key, {}) for key in ("$defs", "definitions")}
        names = {f"#/{key}/{part}": f"#/$defs/{number}_{part}" for key, parts in own.items() for part in parts}
        for parts in own.values():
            definitions |= {f"{number}_{part}": _renamed(parts[part], names) for part in parts}
        properties = {name: {"const": function["name"]}, arguments: _renamed(schema, names)}
        calls.append(
            {"type": "object", "properties": properties, "required": [name, arguments], "additionalProperties": False}
        )
    return {"anyOf": calls, **({"$defs": definitions} if definitions else {})}


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {}, **(function.get("parameters") or {})}


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    if isinstance(schema, list):
        return [_renamed(item, names) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: names.get(value, value) if key == "$ref" and isinstance(value, str) else _renamed(value, names)
        for key, value in schema.items()
    }
