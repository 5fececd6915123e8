"""Objects of a Pydantic class in place of text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, TypeVar

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel

from ouroboros_llm import Grammar
from ouroboros_llm.chat.reply_grammar import connected

from .configuration import ConfiguredLLM

Model = TypeVar("Model", bound=BaseModel)

_dispatcher = get_dispatcher(__name__)


class StructuredPrediction(ConfiguredLLM):
    """`structured_predict` and its kin: the reply is JSON of the class's schema, of which the model is told at the end
    of the prompt and to which the decoder keeps it. Other program modes are LlamaIndex's own, over the same grammar."""

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An object of `output_cls`, by its JSON Schema.

        Raises:
            ValueError: the reply is no such object: without the extra `structured`, or where a validator of the class
                asks for what a schema cannot say.
        """
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            llm_kwargs = self._program_kwargs(output_cls, llm_kwargs)
            found: Model = super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return found
        _begin(output_cls, prompt, prompt_args)
        messages = self._structured_messages(prompt, prompt_args)
        response = self.chat(messages, **{**(llm_kwargs or {}), "response_format": output_cls})
        return _end(output_cls, response)

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """As `structured_predict`."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            llm_kwargs = self._program_kwargs(output_cls, llm_kwargs)
            found: Model = await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return found
        _begin(output_cls, prompt, prompt_args)
        messages = self._structured_messages(prompt, prompt_args)
        response = await self.achat(messages, **{**(llm_kwargs or {}), "response_format": output_cls})
        return _end(output_cls, response)

    # What `stream_structured_predict` and `astream_structured_predict` are made of.

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        messages, objects = self._structured_messages(prompt, prompt_args), Objects(output_cls, self)
        for response in self.stream_chat(messages, **{**(llm_kwargs or {}), "response_format": output_cls}):
            yield objects.next(response)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        messages, objects = self._structured_messages(prompt, prompt_args), Objects(output_cls, self)
        stream = await self.astream_chat(messages, **{**(llm_kwargs or {}), "response_format": output_cls})
        return (objects.next(response) async for response in stream)

    def _structured_messages(self, prompt: BasePromptTemplate, arguments: dict[str, Any]) -> list[ChatMessage]:
        return self._extend_messages(prompt.format_messages(llm=None, **arguments))

    def _program_kwargs(self, output_cls: type[Model], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """What keeps the text of a program that asks for JSON in words to it. Function calls are kept to it anyway."""
        kwargs = dict(llm_kwargs or {})
        if self.pydantic_program_mode == PydanticProgramMode.LLM and connected():
            kwargs.setdefault("grammar", Grammar.json_schema(output_cls.model_json_schema()))
        return kwargs


class Objects:
    """Objects of a class as far as they were said; the last one is whole."""

    def __init__(self, output_cls: type[BaseModel], llm: ConfiguredLLM) -> None:
        self._output_cls, self._llm = output_cls, llm
        self._found: list[BaseModel] | None = None

    def next(self, response: ChatResponse) -> Any:
        if response.raw is not None:  # the last response
            return _object(self._output_cls, response)
        found: Any = process_streaming_objects(
            response, self._output_cls, cur_objects=self._found, flexible_mode=True, llm=self._llm
        )
        self._found = [found]
        return found


def _begin(output_cls: type[BaseModel], prompt: BasePromptTemplate, arguments: dict[str, Any]) -> None:
    _dispatcher.event(LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=arguments))


def _end(output_cls: type[Model], response: ChatResponse) -> Model:
    found = _object(output_cls, response)
    _dispatcher.event(LLMStructuredPredictEndEvent(output=found))
    return found


def _object(output_cls: type[Model], response: ChatResponse) -> Model:
    return output_cls.model_validate_json(response.message.content or "")
