"""Grammars for forced tool calls and structured output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from ..grammar.base import Grammar
from ..tool_parsers.reply_format import ReplyFormat

_MOST_CALLS = 8
"""Calls in one reply at most, where it must be calls or JSON."""

_DEFINITIONS = ("$defs", "definitions")
_OBJECT_FRAME = (re.compile(r'(.*)\{"(\w+)": "', re.DOTALL), re.compile(r'", "(\w+)": '))


def connected() -> bool:
    """Whether the decoder can keep to a grammar."""
    return find_spec("llguidance") is not None


def json_options(schema: Mapping[str, Any], *, before: str = "") -> dict[str, Any]:
    """Options of a reply that is one JSON value of `schema` behind a text. Empty without grammars."""
    return {"grammar": Grammar.json_schema(schema, before=before)} if connected() else {}


def call_options(format: ReplyFormat, tools: Sequence[Mapping[str, Any]], *, begun: str = "") -> dict[str, Any]:
    """Options of a reply that is a call of one of `tools`, as a model of this format writes it.

    Args:
        begun: what ends the part of the reply that the prompt has begun, as `</think>` does.

    Empty without grammars.
    """
    return {"grammar": _calls(format, tools, begun)} if connected() else {}


def call_or_json_options(
    format: ReplyFormat, tools: Sequence[Mapping[str, Any]], schema: Mapping[str, Any], *, parallel: bool, begun: str
) -> dict[str, Any]:
    """Options of a reply that either calls some of `tools`, or is one JSON value of `schema`.

    A single call may stand without its frame as well, which many models prefer.

    Args:
        parallel: whether several calls may follow each other, where the format has an end for each.
    """
    if not connected():
        return {}
    functions = [tool["function"] for tool in tools]
    bare = Grammar.json_schema(_one_of([*(_object(function, "name", "arguments") for function in functions), schema]))
    before, _, after = format.frame
    if before.startswith("{"):
        return {"grammar": Grammar.any_of([bare], before=begun)}
    ends = any(
        section.kind == "calls"
        and section.closes
        and before.startswith(section.open)
        and "[" not in before
        and after.endswith(section.closes)
        for section in format.sections
    )
    calls = Grammar.any_of([_calls(format, tools)], between="\n", most=_MOST_CALLS if parallel and ends else 1)
    return {"grammar": Grammar.any_of([calls, bare], before=begun)}


def _calls(format: ReplyFormat, tools: Sequence[Mapping[str, Any]], begun: str = "") -> Grammar:
    """One call of one of `tools`."""
    before, between, after = format.frame
    functions = [tool["function"] for tool in tools]
    start, middle = _OBJECT_FRAME[0].fullmatch(before), _OBJECT_FRAME[1].fullmatch(between)
    if len(functions) > 1 and start is not None and middle is not None and after.startswith("}"):
        # Texts that begin alike are better told apart within one JSON value.
        objects = [_object(function, start[2], middle[1]) for function in functions]
        return Grammar.json_schema(_one_of(objects), before=begun + start[1], after=after[1:])
    calls = [
        Grammar.json_schema(_parameters(function), before=before + function["name"] + between, after=after)
        for function in functions
    ]
    return Grammar.any_of(calls, before=begun) if len(calls) > 1 else replace(calls[0], before=begun + calls[0].before)


def _object(function: Mapping[str, Any], name: str, arguments: str) -> dict[str, Any]:
    """The schema of a call that is an object; definitions of its parameters stay at its root."""
    parameters = _rooted(_parameters(function))
    own = {key: parameters.pop(key) for key in _DEFINITIONS if key in parameters}
    properties = {name: {"const": function["name"]}, arguments: parameters}
    return {
        "type": "object",
        "properties": properties,
        "required": [name, arguments],
        "additionalProperties": False,
        **own,
    }


def _one_of(schemas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A value of any of `schemas`. References count from the root, where the definitions of all of them meet."""
    definitions: dict[str, Any] = {}
    alternatives = []
    for number, schema in enumerate(map(_rooted, schemas)):
        own = {key: schema.get(key, {}) for key in _DEFINITIONS}
        names = {f"#/{key}/{part}": f"#/$defs/{number}_{part}" for key, parts in own.items() for part in parts}
        for parts in own.values():
            definitions |= {f"{number}_{part}": _renamed(parts[part], names) for part in parts}
        root = {key: value for key, value in schema.items() if key not in _DEFINITIONS}
        alternatives.append(_renamed(root, names))
    return {"anyOf": alternatives, **({"$defs": definitions} if definitions else {})}


def _rooted(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same where no reference leads to the root itself, which may come to stand elsewhere."""
    renamed = _renamed(schema, {"#": "#/$defs/#"})
    if renamed == schema:
        return dict(schema)
    definitions = renamed.pop("$defs", {})
    return {"$ref": "#/$defs/#", "$defs": {**definitions, "#": renamed}}


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {}
    # What a class that holds itself is, stands behind the reference; beside it nothing else may.
    return dict(parameters) if "$ref" in parameters else {"type": "object", "properties": {}, **parameters}


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    if isinstance(schema, list):
        return [_renamed(item, names) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: names.get(value, value) if key == "$ref" and isinstance(value, str) else _renamed(value, names)
        for key, value in schema.items()
    }
