"""Which tools a call offers, and what form its reply must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel

from ouroboros_llm import OptionError

AnyTool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool

REPLY_SETTINGS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format"})
"""What a call may say of its reply, in OpenAI's words, which LangChain's agents use."""

_CHOICES: dict[Any, Literal["auto", "none", "required"]] = {
    None: "auto",
    "auto": "auto",
    "none": "none",
    False: "none",
    "any": "required",
    "required": "required",
    True: "required",
}
_CHOICE_TYPES = frozenset({"function", "tool"})


@dataclass(frozen=True)
class Asked:
    """What a reply is to be.

    Attributes:
        tools: what the model is told of, in OpenAI's form.
        forced: the tools of which it must call one; none where it need not.
        parallel: whether it may make several calls.
        schema: of the JSON that its text must be; None: any text.
        told: whether the model is told of `schema`; else the prompt is the caller's business.
    """

    tools: tuple[dict[str, Any], ...] = ()
    forced: tuple[dict[str, Any], ...] = ()
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    told: bool = False

    @property
    def forced_names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.forced]


def asked(settings: Mapping[str, Any]) -> Asked:
    """What the settings of a call say of its reply. Raises OptionError."""
    tools = openai_tools(settings.get("tools") or ())
    kind, name = choice_of(settings.get("tool_choice"), tools)
    forced = tuple(tool for tool in tools if name in (None, tool["function"]["name"])) if kind == "required" else ()
    schema, told = _schema_of(settings.get("response_format"))
    return Asked(
        tools=() if kind == "none" else tools,
        forced=forced,
        parallel=settings.get("parallel_tool_calls") is not False,
        schema=None if forced else schema,
        told=told,
    )


def openai_tools(tools: Sequence[AnyTool], strict: bool | None = None) -> tuple[dict[str, Any], ...]:
    """Tools in OpenAI's form; of several with one name the first counts. Raises OptionError where one has no name."""
    by_name: dict[str, dict[str, Any]] = {}
    for tool in tools:
        converted = _with_recursion(tool, convert_to_openai_tool(tool, strict=strict))
        name = converted.get("function", {}).get("name")
        if not isinstance(name, str):
            raise OptionError(f"tools must be functions with names, but got {converted!r:.80}")
        by_name.setdefault(name, converted)
    return tuple(by_name.values())


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a Pydantic class, TypedDict, tool or schema."""
    return _recursive_schema(kind) or convert_to_json_schema(kind)


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


def choice_of(
    choice: Any, tools: Sequence[Mapping[str, Any]]
) -> tuple[Literal["auto", "none", "required"], str | None]:
    """Whether a tool must be called, and which. Raises OptionError for anything but a known form."""
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        named = choice.get("type", "function") in _CHOICE_TYPES and isinstance(function, Mapping)
        choice = function.get("name") if named else choice.get("type")
        choice = "" if choice is None else choice
    if isinstance(choice, (str, bool, type(None))) and choice in _CHOICES:
        kind = _CHOICES[choice]
        if kind == "required" and not names:
            raise OptionError(f"tool_choice={choice!r} needs tools, but there are none")
        return kind, None
    if choice not in names:
        raise OptionError(
            f"tool_choice must be 'auto', 'none', 'any', 'required', True, False, None or the name of a tool "
            f"({', '.join(names) or 'there are none'}), but got {choice!r}"
        )
    return "required", choice


def _schema_of(response_format: Any) -> tuple[Mapping[str, Any] | None, bool]:
    """The schema that a `response_format` asks for, and whether the model is told of it."""
    if response_format is None:
        return None, False
    if not isinstance(response_format, Mapping):
        return schema_of(response_format), True
    kind = response_format.get("type")
    if kind == "text":
        return None, False
    if kind == "json_object":
        return {"type": "object"}, False
    schema = response_format.get("json_schema", {}).get("schema") if kind == "json_schema" else None
    if not isinstance(schema, Mapping):
        raise OptionError(
            "response_format must be a type, or have the type 'text', 'json_object' or 'json_schema', the last with "
            f"json_schema={{'name': ..., 'schema': ...}}, but got {response_format!r:.200}"
        )
    return schema, True
