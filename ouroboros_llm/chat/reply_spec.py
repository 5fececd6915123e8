"""The requested reply: text, tool calls, or JSON for a schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import OptionError

REPLY_SETTINGS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format"})
"""What a call may say of its reply, in OpenAI's words, which agents use."""

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


def parse_reply_spec(
    settings: Mapping[str, Any], tools: Sequence[dict[str, Any]], schema_of: Callable[[Any], Mapping[str, Any]]
) -> Asked:
    """What `REPLY_SETTINGS` say of a reply.

    Args:
        tools: those of the settings, in OpenAI's form.
        schema_of: the JSON Schema of a type that is the `response_format`.

    Raises:
        OptionError: a choice or a format that is none, or a choice among no tools.
    """
    kind, name = choice_of(settings.get("tool_choice"), tools)
    forced = tuple(tool for tool in tools if name in (None, tool["function"]["name"])) if kind == "required" else ()
    schema, told = _schema_of(settings.get("response_format"), schema_of)
    return Asked(
        tools=() if kind == "none" else tuple(tools),
        forced=forced,
        parallel=settings.get("parallel_tool_calls") is not False,
        schema=None if forced else schema,
        told=told,
    )


def distinct(tools: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Tools in OpenAI's form; of several with one name the first counts. Raises OptionError where one has no name."""
    by_name: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise OptionError(f"tools must be functions with names, but got {tool!r:.80}")
        parameters = tool["function"].get("parameters")
        if not isinstance(parameters or {}, Mapping):
            raise OptionError(
                f"parameters of tool {name!r} must be a JSON Schema, a mapping, but got {parameters!r:.80}"
            )
        by_name.setdefault(name, tool)
    return tuple(by_name.values())


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


def _schema_of(
    response_format: Any, schema_of: Callable[[Any], Mapping[str, Any]]
) -> tuple[Mapping[str, Any] | None, bool]:
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
