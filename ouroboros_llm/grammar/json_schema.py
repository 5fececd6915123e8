"""JSON Schemas as the grammar library takes them, and what in them it cannot take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Schema = Any
"""A mapping, True or False."""

_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
"""Formats that the library keeps. Others are annotations, as JSON Schema says of all of them."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_COMBINED = ("anyOf", "oneOf", "allOf", "$ref")

_LARGEST = 10**18
"""Numbers without bounds are written with so many digits at most, and without exponents."""

_HARMLESS = {
    "type",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "discriminator",
    "$comment",
    "$schema",
    "$id",
    "$anchor",
    "$defs",
    "definitions",
    "x-guidance",
}
"""Keywords that say nothing about the properties of an object."""

_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"}


def prepared(schema: Schema) -> dict[str, Any]:
    """A copy without unknown formats, its objects closed unless they say that they are open."""
    whole = {} if schema is True else schema
    closing = not any(_meets(part) for _, part in parts(whole))
    return dict(_copied(whole, closing)) if isinstance(whole, Mapping) else {"enum": []}


def parts(schema: Schema, pointer: str = "#") -> Iterator[tuple[str, Schema]]:
    """(JSON pointer, schema) of `schema` and of all schemas within."""
    yield pointer, schema
    for keyword, name, inner in _inner(schema):
        step = keyword if name is None else f"{keyword}/{str(name).replace('~', '~0').replace('/', '~1')}"
        yield from parts(inner, f"{pointer}/{step}")


def faulty_part(schema: Schema, fault: Callable[[Schema], str]) -> tuple[str, str] | None:
    """(JSON pointer, message) of an innermost part in which `fault` finds something wrong."""
    named = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, Mapping) and key in schema}
    found = None
    for pointer, part in parts(schema):
        if found and not pointer.startswith(found[0] + "/"):
            continue
        message = fault({**named, **part} if isinstance(part, Mapping) else part)
        if message:
            found = pointer, message
    return found


def _inner(schema: Schema) -> Iterator[tuple[str, str | int | None, Schema]]:
    if not isinstance(schema, Mapping):
        return
    for keyword in _NAMED:
        if isinstance(schema.get(keyword), Mapping):
            yield from ((keyword, name, inner) for name, inner in schema[keyword].items())
    for keyword in (*_LISTED, "items"):
        if isinstance(schema.get(keyword), (list, tuple)):
            yield from ((keyword, number, inner) for number, inner in enumerate(schema[keyword]))
    for keyword in _SINGLE:
        if isinstance(schema.get(keyword), (Mapping, bool)):
            yield keyword, None, schema[keyword]


def _narrow(schema: dict[str, Any], bound: str, including: str, others: tuple[str, str]) -> None:
    """Move a bound that is itself ruled out a little inwards where the other one is less than one away.

    There the library (llguidance 1.9.1) takes the bound itself, written as a whole number, for allowed.
    """
    edge: Any = schema.get(bound)
    if not _is_number(edge):
        return
    spans = [schema[name] - edge for name in others if _is_number(schema.get(name))]
    span = min(spans, key=abs, default=1)
    if abs(span) < 1 and edge == int(edge) and "integer" != schema.get("type"):
        del schema[bound]
        schema[including] = edge + span / 1024


def _bound(schema: dict[str, Any]) -> None:
    """Keep numbers within what every reader can hold: unbounded ones might be written as 9E+5115, which is infinite."""
    kinds = schema.get("type")
    if "number" not in (kinds if isinstance(kinds, list) else [kinds]) or {"const", "enum"} & set(schema):
        return
    for sign, names in ((-1, ("minimum", "exclusiveMinimum")), (1, ("maximum", "exclusiveMaximum"))):
        if not any(_is_number(schema.get(name)) for name in names):
            schema[names[0]] = sign * _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _meets(schema: Schema) -> bool:
    """Whether several schemas speak of one value: closing one of them would rule out what the others ask for."""
    if not isinstance(schema, Mapping):
        return False
    combined = [keyword for keyword in _COMBINED if keyword in schema]
    several = len(schema.get("allOf", ())) > 1 or len(combined) > 1
    return several or bool(combined and set(schema) - _HARMLESS - set(combined))


def _copied(schema: Schema, closing: bool) -> Schema:
    if not isinstance(schema, Mapping):
        return schema
    copy: dict[str, Any] = dict(schema)
    for keyword, name, inner in _inner(schema):
        if name is None:
            copy[keyword] = _copied(inner, closing)
        else:
            if copy[keyword] is schema[keyword]:
                copy[keyword] = type(schema[keyword])(schema[keyword])
            copy[keyword][name] = _copied(inner, closing)
    if "format" in copy and copy["format"] not in _FORMATS:
        del copy["format"]
    _bound(copy)
    _narrow(copy, "exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"))
    _narrow(copy, "exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"))
    properties = copy.get("properties")
    if closing and isinstance(properties, Mapping) and not _OPEN & set(copy):
        if set(copy.get("required", ())) <= set(properties):
            copy["additionalProperties"] = False
    return copy
