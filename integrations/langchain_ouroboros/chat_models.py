"""Chat messages in, chat messages out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import ModelProfile
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.chat_models import (
    BaseChatModel,
    agenerate_from_stream,
    generate_from_stream,
)
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from typing_extensions import override

from ouroboros_llm.chat.exchange import prompt_of, template_tools
from ouroboros_llm.chat.reply_spec import REPLY_SETTINGS, Asked, choice_of
from ouroboros_llm.chat.template_support import detect_template_support
from ouroboros_llm.serving.stream import place

from ._base import OuroborosModel
from ._exchange import Exchange
from ._fields import SCOPE_SETTINGS, SPEED_SETTINGS
from ._messages import to_dicts
from ._profile import profile_of
from ._scopes import SCOPES
from ._structured import Method, structured
from ._tools import AnyTool, asked, openai_tools

_UNTRACED = SCOPE_SETTINGS | {SCOPES}
_UNCACHED = _UNTRACED | SPEED_SETTINGS | {"stream"}


class ChatOuroboros(OuroborosModel, BaseChatModel):
    """A local Hugging Face chat model that says what it would say anyway, in fewer passes.

    Setup:
        ```bash
        pip install "ouroboros-llm[langchain]"
        ```

        No server and no key. The first call loads the model, and downloads its weights if they are not there yet.

    Key init args, completion:
        model: Registry name, local path or hub id. Unset: `$OUROBOROS_MODEL`, else smollm2-135m-instruct.
        temperature: Unset or 0 is greedy.
        max_tokens: Tokens to generate at most.
        top_p, top_k, min_p: Which tokens to sample from; they need a temperature.
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias: Changes to the logits.
        seed: Makes sampling reproducible.
        stop: Strings that end the text; also accepted as `stop_sequences`.
        exact: Decide near-ties as plain decoding does, in half precision too.

    Key init args, phrases:
        store: Where phrases are kept: a URL, a SQLAlchemy engine or a `PhraseStore`. None keeps nothing on disk.
            Unset: `$OUROBOROS_STORE`, else `phrases.db` in the user's data folder.
        scope: Whose phrases to use and to add to, as in `conversation:42`. Unset: `conversation:` and the `thread_id`,
            `session_id` or `conversation_id` in the run's config, which LangGraph sets.
        read_scopes: Further scopes to read. Behind them, inside of an agent, comes `agent:` and the agent's name.
        learn_agent: Add answers to the agent's scope too, which all its conversations read.
        drafters: Where guesses may come from.
        draft_model: A smaller model of the same vocabulary that drafts too.
        device, dtype: Where and in what precision to run.
        quantization: "int8" or "int4" keeps the weights of linear layers in so many bits.
        ouroboros: An `Ouroboros` that you built yourself, in place of the arguments that load one.

    All of these but store, draft_model, device, dtype, quantization and ouroboros can be given to a call too, or bound:
    `model.bind(scope="conversation:42")`. Scopes appear neither in traces nor in cache keys.

    Instantiate:
        ```python
        from langchain_ouroboros import ChatOuroboros

        model = ChatOuroboros(max_tokens=256, scope="conversation:42")
        ```

    Invoke:
        ```python
        messages = [
            ("system", "You translate English to French."),
            ("human", "I love programming."),
        ]
        model.invoke(messages).content
        ```

    Stream:
        ```python
        for chunk in model.stream(messages):
            print(chunk.text, end="", flush=True)
        ```

        A chunk is what one pass of the model brought: often several tokens.

    Async:
        ```python
        await model.ainvoke(messages)

        async for chunk in model.astream(messages):
            print(chunk.text, end="", flush=True)
        ```

        Cancelling the task ends the decoding within one pass.

    Tool calling:
        ```python
        from langchain_core.tools import tool

        @tool
        def add(a: int, b: int) -> int:
            '''Add two numbers.'''
            return a + b

        model.bind_tools([add], tool_choice="any").invoke("What is 17 + 25?").tool_calls
        # [{'name': 'add', 'args': {'a': 17, 'b': 25}, 'id': '3k9x0a2mq', 'type': 'tool_call'}]
        ```

        Calls are read from the model's own format. What it thought is in `additional_kwargs["reasoning_content"]`.
        Forced calls follow a grammar and always fit (extra `structured`); a model's free choice may be wrong, and
        calls that cannot be read are in `invalid_tool_calls`.

    Structured output:
        ```python
        from pydantic import BaseModel

        class Person(BaseModel):
            name: str
            age: int

        model.with_structured_output(Person).invoke("Anna is 34 years old.")
        # Person(name='Anna', age=34)
        ```

    Response metadata:
        ```python
        message = model.invoke(messages)
        message.usage_metadata
        # {'input_tokens': 34, 'output_tokens': 12, 'total_tokens': 46, 'input_token_details': {'cache_read': 0}}
        message.response_metadata["finish_reason"]
        # 'stop'
        message.response_metadata["ouroboros"]["mean_acceptance_length"]
        # 2.4, tokens per pass of the model; 1.0 is plain decoding
        ```
    """

    @property
    @override
    def _llm_type(self) -> str:
        return "chat-ouroboros"

    # The config of a call says whose phrases it is about, and does not reach `_generate` and `_stream` on every path.

    @override
    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return super().invoke(input, config, stop=stop, **self._scoped(config, kwargs))

    @override
    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return await super().ainvoke(input, config, stop=stop, **self._scoped(config, kwargs))

    @override
    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, stop=stop, **self._scoped(config, kwargs))

    @override
    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, stop=stop, **self._scoped(config, kwargs))

    @override
    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """See `BaseChatModel.stream_events`."""
        return super().stream_events(input, config, **self._scoped_events(config, kwargs))

    @override
    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """See `BaseChatModel.astream_events`."""
        return super().astream_events(input, config, **self._scoped_events(config, kwargs))

    def _scoped_events(self, config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        # Events of older versions come from `astream`.
        return self._scoped(config, kwargs) if kwargs.get("version") == "v3" else kwargs

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        exchange = self._exchange(messages, stop, kwargs)
        return exchange.settled(generate_from_stream(exchange.chunks()))

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        exchange = self._exchange(messages, stop, kwargs)
        async with place(), aclosing(exchange.achunks()) as chunks:
            return exchange.settled(await agenerate_from_stream(chunks))

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._exchange(messages, stop, kwargs).chunks():
            if run_manager:  # only where LangChain streams its protocol events; elsewhere it reports tokens itself
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    @override
    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(self._exchange(messages, stop, kwargs).achunks()) as chunks:
            async for chunk in chunks:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    @override
    def _call_names(self) -> frozenset[str]:
        return super()._call_names() | REPLY_SETTINGS

    def _exchange(self, messages: list[BaseMessage], stop: list[str] | None, settings: dict[str, Any]) -> Exchange:
        """What is asked in a call, with its settings. Raises OptionError."""
        reply = {name: value for name, value in settings.items() if name in REPLY_SETTINGS}
        call = self._for_call({name: value for name, value in settings.items() if name not in reply})
        return Exchange(call, messages, stop, asked(reply))

    @override
    def bind_tools(
        self,
        tools: Sequence[AnyTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools that it may call.

        Args:
            tools: Functions, Pydantic classes, TypedDicts, LangChain's tools, or schemas of any provider's form.
            tool_choice: None or "auto": the model decides. "none" or False: it calls none. "any", "required" or True:
                it calls one. A name, `{"type": "function", "function": {"name": ...}}` or the like: it calls that.
            strict: A forced call fits its schema anyway; taken so that other providers' code runs.
            kwargs: Settings of calls; `parallel_tool_calls=False` for one call per reply at most; `response_format`
                as in OpenAI's interface.

        Raises:
            OptionError: a choice that is none of these, or names no tool.
        """
        offered = openai_tools(tools, strict)
        if tool_choice is not None:
            choice_of(tool_choice, offered)
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=list(offered), **kwargs)

    @override
    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The model with replies that are objects of a schema.

        Args:
            schema: A Pydantic class, whose objects the replies are; a TypedDict, JSON Schema or tool schema, whose
                dictionaries they are.
            method: "json_schema": the reply is JSON of the schema, of which the model is told. "function_calling": it
                is a call of a tool of that schema. "json_mode": it is any JSON object; your prompt says which.
            include_raw: Return `{"raw": message, "parsed": object or None, "parsing_error": error or None}`.
            strict: Replies fit their schema anyway; taken so that other providers' code runs.

        Raises:
            ValueError: further arguments.
        """
        if kwargs:
            raise ValueError(f"Received unsupported arguments {kwargs}")  # LangChain's own words
        return structured(self, schema, method, include_raw=include_raw, strict=strict)

    @override
    def _resolve_model_profile(self) -> ModelProfile | None:
        return profile_of(self._name(), self.ouroboros)  # validators of the base class come first

    @override
    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        traced = {name: value for name, value in kwargs.items() if name not in _UNTRACED}
        return super()._get_invocation_params(stop=self._stop(stop), **traced)

    @override
    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        cached = {name: value for name, value in kwargs.items() if name not in _UNCACHED}
        return super()._get_llm_string(stop=stop, **cached)

    @override
    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of `messages` as a prompt, the chat template's own and those of `tools` included."""
        ouroboros, offered = self._loaded(), Asked(tools=openai_tools(tools or ()))
        habits = detect_template_support(ouroboros)
        prompt = prompt_of(partial(to_dicts, messages), offered, habits)
        return len(ouroboros.encode(prompt, tools=template_tools(offered, habits)))
