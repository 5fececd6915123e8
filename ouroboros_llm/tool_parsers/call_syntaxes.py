"""Calls that are written in other ways than JSON, read once they are whole."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from .section import Style

Schemas = Mapping[str, Mapping[str, Any]]
Calls = list[tuple[str, dict[str, Any]]]

_FUNCTION = re.compile(r"\s*<function=\s*([^<>\n]+?)\s*>")
_PARAMETER = re.compile(r"\s*<parameter=\s*([^<>\n]+?)\s*>\n?")
_FUNCTION_END = re.compile(r"\s*(?:</function>\s*|\Z)")
_NAME = re.compile(r"\s*([^\s<>{}]+)\s*")
_PAIR = re.compile(r"<arg_key>\s*([^<>]+?)\s*</arg_key>\s*<arg_value>")
_GEMMA = re.compile(r"\s*call:([\w.-]+)\s*(\{.*\})\s*", re.DOTALL)
_GEMMA_STRING = re.compile(r'<\|"\|>(.*?)<\|"\|>|"(?:[^"\\]|\\.)*"', re.DOTALL)
_GEMMA_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w.-]*)\s*:")

_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def _read_tagged(body: str, schemas: Schemas) -> Calls:
    if not _FUNCTION.match(body):
        return _read_pairs(body, schemas)
    calls: Calls = []
    at = 0
    while function := _FUNCTION.match(body, at):
        name, at, arguments = function[1], function.end(), dict[str, Any]()
        while parameter := _PARAMETER.match(body, at):
            end = body.find("</parameter>", parameter.end())
            value = body[parameter.end() : end]
            if end < 0 or "<parameter=" in value:
                raise ValueError(f"the parameter {parameter[1]} has no end")
            arguments[parameter[1]] = typed(value.removesuffix("\n"), schema_of(schemas, name, parameter[1]))
            at = end + len("</parameter>")
        if not (closed := _FUNCTION_END.match(body, at)):
            raise ValueError(f"the function {name} has no end")
        calls.append((name, arguments))
        at = closed.end()
    if at < len(body):
        raise ValueError(f"unexpected {body[at : at + 20]!r} after a function")
    return calls


def _read_pairs(body: str, schemas: Schemas) -> Calls:
    named = _NAME.match(body)
    if not named:
        raise ValueError("no name where a call begins")
    name, at, arguments = named[1], named.end(), dict[str, Any]()
    while pair := _PAIR.match(body, at):
        end = body.find("</arg_value>", pair.end())
        if end < 0:
            raise ValueError(f"the argument {pair[1]} has no end")
        arguments[pair[1]] = typed(body[pair.end() : end], schema_of(schemas, name, pair[1]))
        at = end + len("</arg_value>")
        at += len(body[at:]) - len(body[at:].lstrip())
    if at < len(body):
        raise ValueError(f"unexpected {body[at : at + 20]!r} in a call")
    if not arguments and name not in schemas:
        raise ValueError(f"{name[:20]!r} is no tool that was offered")
    return [(name, arguments)]


def schema_of(schemas: Schemas, name: str, parameter: str) -> Any:
    """What the schema of a tool says of one of its parameters; None if nothing."""
    properties = schemas.get(name, {}).get("properties")
    return properties.get(parameter) if isinstance(properties, Mapping) else None


def _types(schema: Any) -> list[str]:
    """Types that a JSON schema allows, as far as they are written on its surface."""
    if not isinstance(schema, Mapping):
        return []
    declared = schema.get("type", [])
    types = [declared] if isinstance(declared, str) else [name for name in declared if isinstance(name, str)]
    for key in ("anyOf", "oneOf"):
        types += [name for choice in schema.get(key) or () for name in _types(choice)]
    return [*types, *(["null"] if schema.get("nullable") else [])]


def typed(text: str, schema: Any) -> Any:
    """The value that stands as `text` in a tag: text itself, unless the schema allows other types that it is."""
    for name in _types(schema):
        if name not in _TYPES:
            continue
        word = text.strip()
        try:
            value = json.loads(_PYTHON_WORDS.get(word, word), strict=False)
        except (ValueError, RecursionError):
            continue
        if name == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool)):
            return value
    return text


def _read_python(body: str, schemas: Schemas) -> Calls:
    tree = ast.parse(body.strip(), mode="eval").body
    nodes = tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]
    if not nodes:
        raise ValueError("no call")
    return [_python_call(node, schemas) for node in nodes]


def _python_call(node: ast.expr, schemas: Schemas) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and node.args:
        node = node.args[0]
    if not isinstance(node, ast.Call):
        raise ValueError(f"{ast.unparse(node)[:40]} is no call")
    name = ast.unparse(node.func).removesuffix(".call")
    names = list(schemas.get(name, {}).get("properties") or ())
    if len(node.args) > len(names):
        raise ValueError(f"{name} is called with values that have no names")
    arguments = {key: ast.literal_eval(value) for key, value in zip(names, node.args, strict=False)}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"{name} is called with ** arguments")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return name, arguments


def _read_gemma(body: str, schemas: Schemas) -> Calls:
    match = _GEMMA.fullmatch(body)
    if not match:
        raise ValueError("a call is written call:name{...}")
    strings: list[str] = []

    def take(string: re.Match[str]) -> str:
        strings.append(string[0] if string[1] is None else json.dumps(string[1]))
        return f'"{len(strings) - 1}"'

    # Strings are numbers while keys get their quotation marks: what looks like a key inside a string is none.
    quoted = _GEMMA_KEY.sub(r'\1"\2":', _GEMMA_STRING.sub(take, match[2]))
    return [(match[1], json.loads(re.sub(r'"(\d+)"', lambda number: strings[int(number[1])], quoted)))]


READERS: dict[Style, Callable[[str, Schemas], Calls]] = {
    "tagged": _read_tagged,
    "python": _read_python,
    "gemma": _read_gemma,
}


def read_whole(style: Style, body: str, schemas: Schemas) -> list[tuple[str, str]]:
    """Names of the calls that `body` holds, and their arguments as JSON.

    Raises:
        ValueError: it holds anything else.
    """
    try:
        calls = READERS[style](body, schemas)
        texts = [(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)) for name, arguments in calls]
        "".join(text for _, text in texts).encode()
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"the call cannot be read: {error}") from error
    return texts
