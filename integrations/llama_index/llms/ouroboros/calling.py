"""Calls of tools, by the model's choice or by force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from .quoting import DocumentQuoting
from .tools import openai_tools, selections

if TYPE_CHECKING:
    from llama_index.core.chat_engine.types import AgentChatResponse


class ToolCalling(DocumentQuoting):
    """What LlamaIndex's agents and programs ask of an LLM that calls tools."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        if tools or tool_required:
            kwargs["tools"] = list(openai_tools(tools))
            kwargs["tool_choice"] = "required" if tool_required and tool_choice is None else tool_choice
            kwargs["parallel_tool_calls"] = allow_parallel_tool_calls
        return {"messages": messages, **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of a response, which may be one of a stream.

        Raises:
            ValueError: there is none, and that is an error.
        """
        found = selections(response)
        if error_on_no_tool_call and not found:
            said = response.message.content or ""
            raise ValueError(f"Expected at least one tool call, but the model said: {said!r:.200}")
        return found

    def predict_and_call(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        error_on_no_tool_call: bool = True,
        error_on_tool_error: bool = False,
        **kwargs: Any,
    ) -> AgentChatResponse:
        """See `FunctionCallingLLM.predict_and_call`. A call is forced where none would be an error."""
        return super().predict_and_call(
            tools,
            user_msg,
            chat_history,
            verbose,
            allow_parallel_tool_calls,
            error_on_no_tool_call,
            error_on_tool_error,
            **_forcing(kwargs, error_on_no_tool_call),
        )

    async def apredict_and_call(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        error_on_no_tool_call: bool = True,
        error_on_tool_error: bool = False,
        **kwargs: Any,
    ) -> AgentChatResponse:
        """As `predict_and_call`."""
        return await super().apredict_and_call(
            tools,
            user_msg,
            chat_history,
            verbose,
            allow_parallel_tool_calls,
            error_on_no_tool_call,
            error_on_tool_error,
            **_forcing(kwargs, error_on_no_tool_call),
        )


def _forcing(settings: dict[str, Any], needed: bool) -> dict[str, Any]:
    chosen = settings.get("tool_choice") is not None or "tool_required" in settings
    return settings if chosen or not needed else {**settings, "tool_required": True}
