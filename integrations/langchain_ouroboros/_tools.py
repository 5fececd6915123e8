"""Tools and schemas of every kind that LangChain knows, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel

from ouroboros_llm import OptionError
from ouroboros_llm.chat.reply_spec import Asked, distinct, parse_reply_spec

AnyTool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool


def asked(settings: Mapping[str, Any]) -> Asked:
    """What the settings of a call say of its reply. Raises OptionError."""
    return parse_reply_spec(settings, openai_tools(settings.get("tools") or ()), schema_of)


_SAYS_SOMETHING = {"type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
"""Keywords of which a schema that says anything has one."""


def openai_tools(tools: Sequence[AnyTool], strict: bool | None = None) -> tuple[dict[str, Any], ...]:
    """Tools in OpenAI's form; of several with one name the first counts. Raises OptionError where one has no name."""
    return distinct([_with_recursion(tool, convert_to_openai_tool(tool, strict=strict)) for tool in tools])


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a Pydantic class, TypedDict, tool or schema, also of one in OpenAI's `{"name", "schema"}`.

    Raises:
        OptionError: a mapping that says nothing of what replies look like.
    """
    if isinstance(kind, Mapping) and isinstance(kind.get("schema"), Mapping):
        kind = kind["schema"]
    if isinstance(kind, Mapping) and _SAYS_SOMETHING & kind.keys() and "name" not in kind and "function" not in kind:
        return dict(kind)
    found = _recursive_schema(kind) or convert_to_json_schema(kind)
    if not _SAYS_SOMETHING & found.keys():
        raise OptionError(f"schema must be a JSON Schema, a class or a tool, but got {kind!r:.200}")
    return found


def name_of(kind: Any) -> str:
    """What a schema calls itself."""
    if isinstance(kind, Mapping):
        named = kind.get("function", kind)
        return str(named.get("name") or named.get("title") or "response")
    return str(convert_to_openai_tool(kind)["function"]["name"])


def _with_recursion(tool: AnyTool, converted: dict[str, Any]) -> dict[str, Any]:
    schema = _recursive_schema(tool)
    if schema is None:
        return converted
    parameters = {key: value for key, value in schema.items() if key not in ("title", "description")}
    return {**converted, "function": {**converted["function"], "parameters": parameters}}


def _recursive_schema(kind: Any) -> dict[str, Any] | None:
    """The schema of a class that holds itself, where LangChain's own converters put `{}` for the part inside; None for
    anything else."""
    kind = kind.tool_call_schema if isinstance(kind, BaseTool) else kind
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return None
    schema = kind.model_json_schema()
    definitions = schema.get("$defs", {})
    reached = {name: _references(part) for name, part in definitions.items()}
    for _ in definitions:  # as far as references lead
        reached = {
            name: found.union(*(reached.get(other, set()) for other in found)) for name, found in reached.items()
        }
    return schema if any(name in found for name, found in reached.items()) else None


def _references(schema: Any) -> set[str]:
    if isinstance(schema, Mapping):
        here = {schema["$ref"].rpartition("/")[2]} if isinstance(schema.get("$ref"), str) else set()
        return here.union(*(_references(value) for value in schema.values()))
    return set().union(*(_references(item) for item in schema)) if isinstance(schema, list) else set()
