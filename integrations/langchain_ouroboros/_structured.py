"""Replies as objects of a schema."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Literal

from langchain_core.language_models.base import LanguageModelInput
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from ouroboros_llm import OptionError

from ._tools import name_of, schema_of

Method = Literal["json_schema", "function_calling", "json_mode"]


def structured(
    model: Any, schema: Any, method: Method, *, include_raw: bool, strict: bool | None
) -> Runnable[LanguageModelInput, Any]:
    """See `ChatOuroboros.with_structured_output`."""
    if method not in ("json_schema", "function_calling", "json_mode"):
        raise OptionError(f"method must be 'json_schema', 'function_calling' or 'json_mode', but got {method!r}")
    if schema is None and method != "json_mode":
        raise OptionError(f"schema must be given for method={method!r}; only 'json_mode' goes without")
    traced = {"ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}}
    if method == "function_calling":
        name = convert_to_openai_tool(schema)["function"]["name"]
        asking = model.bind_tools([schema], tool_choice=name, strict=strict, parallel_tool_calls=False, **traced)
        return _with_raw(asking, _call_parser(schema, name), include_raw)
    if method == "json_mode":
        asking = model.bind(response_format={"type": "json_object"}, **(traced if schema is not None else {}))
    else:
        named: dict[str, Any] = {"name": name_of(schema)}
        named |= {"schema": schema_of(schema)} | ({} if strict is None else {"strict": strict})
        asking = model.bind(response_format={"type": "json_schema", "json_schema": named}, **traced)
    return _with_raw(asking, _text_parser(schema), include_raw)


def _is_pydantic(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _call_parser(schema: Any, name: str) -> BaseOutputParser[Any]:
    if _is_pydantic(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _text_parser(schema: Any) -> BaseOutputParser[Any]:
    return PydanticOutputParser(pydantic_object=schema) if _is_pydantic(schema) else JsonOutputParser()


def _with_raw(asking: Any, parser: BaseOutputParser[Any], include_raw: bool) -> Runnable[LanguageModelInput, Any]:
    """The parsed reply; with `include_raw`, `raw`, `parsed` and `parsing_error`, none of which is raised."""
    if not include_raw:
        chain: Runnable[LanguageModelInput, Any] = asking | parser
        return chain
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=asking) | parsed.with_fallbacks([failed], exception_key="parsing_error")
