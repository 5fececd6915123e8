"""Tools as LlamaIndex has them, in OpenAI's form and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatResponse, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.utils import parse_partial_json
from llama_index.core.tools.types import BaseTool, ToolMetadata
from pydantic import BaseModel

from ouroboros_llm import OptionError
from ouroboros_llm.chat.reply_spec import Asked, distinct, parse_reply_spec


def asked(settings: Mapping[str, Any]) -> Asked:
    """What the keywords of a call say of its reply. Raises OptionError."""
    return parse_reply_spec(settings, openai_tools(settings.get("tools") or ()), schema_of)


def openai_tools(tools: Sequence[BaseTool | Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Tools in OpenAI's form. Raises OptionError where one has no name."""
    return distinct([_openai_tool(tool.metadata) if isinstance(tool, BaseTool) else dict(tool) for tool in tools])


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a Pydantic class."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        raise OptionError(f"response_format must be a Pydantic class or a dictionary, but got {kind!r:.80}")
    return kind.model_json_schema()


def selections(response: ChatResponse) -> list[ToolSelection]:
    """The calls in a response; in the middle of a stream, with the arguments as far as they were said."""
    blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
    return [
        ToolSelection(
            tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=_arguments(block.tool_kwargs)
        )
        for block in blocks
    ]


def _openai_tool(metadata: ToolMetadata) -> dict[str, Any]:
    # Not `to_openai_tool`: it changes the name, by which the tool is looked up again.
    parameters = metadata.get_parameters_dict()
    if metadata.fn_schema is not None and "properties" not in parameters:
        # A class that holds itself is a reference, which LlamaIndex drops.
        parameters = metadata.fn_schema.model_json_schema()
    function = {"name": metadata.name, "description": metadata.description or "", "parameters": parameters}
    return {"type": "function", "function": function}


def _arguments(given: dict[str, Any] | str) -> dict[str, Any]:
    if not isinstance(given, str):
        return given
    try:
        found = parse_partial_json(given)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
