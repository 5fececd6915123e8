"""Text in, text out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.messages import BaseMessage, get_buffer_string
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from typing_extensions import override

from ouroboros_llm import OptionError, StreamChunk, Usage
from ouroboros_llm.serving.stream import ashown, off_the_loop, place, shown

from ._at_once import at_once, join
from ._base import OuroborosModel
from ._scopes import found_scopes

_Manager = TypeVar("_Manager")

_RUN_ARGUMENTS = frozenset({"tags", "metadata", "run_name", "run_id"})


class OuroborosLLM(OuroborosModel, BaseLLM):
    """A local Hugging Face model that continues text as it would anyway, in fewer passes.

    The prompt reaches the model as it is, without a chat template; for conversations there is `ChatOuroboros`.

    Setup:
        ```bash
        pip install "ouroboros-llm[langchain]"
        ```

        No server and no key. The first call loads the model, and downloads its weights if they are not there yet.

    Key init args:
        The same as those of `ChatOuroboros`: model, temperature, max_tokens, stop, seed, store, scope, ouroboros ...

    Instantiate:
        ```python
        from langchain_ouroboros import OuroborosLLM

        llm = OuroborosLLM(max_tokens=64, stop=["\\n\\n"])
        ```

    Invoke:
        ```python
        llm.invoke("The snake that bites its own tail is called")
        llm.batch(["One, two,", "Un, deux,"])
        ```

    Stream:
        ```python
        for text in llm.stream("The snake that bites its own tail is called"):
            print(text, end="", flush=True)
        ```

        Each text is what one pass of the model brought: often several tokens.

    Async:
        ```python
        await llm.ainvoke("One, two,")

        async for text in llm.astream("One, two,"):
            print(text, end="", flush=True)
        ```

        Cancelling the task ends the decoding within one pass.

    Response metadata:
        ```python
        result = llm.generate(["One, two,"])
        result.llm_output["token_usage"]
        # {'prompt_tokens': 4, 'completion_tokens': 64, 'total_tokens': 68, 'cached_tokens': 0}
        result.generations[0][0].generation_info["ouroboros"]["mean_acceptance_length"]
        # 2.4, tokens per pass of the model; 1.0 is plain decoding
        ```
    """

    @property
    @override
    def _llm_type(self) -> str:
        return "ouroboros"

    # The config of a call says whose phrases it is about, and does not reach `_generate` and `_stream`.

    @override
    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> str:
        return super().invoke(input, config, stop=stop, **self._scoped(config, kwargs))

    @override
    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> str:
        return await super().ainvoke(input, config, stop=stop, **self._scoped(config, kwargs))

    # `BaseLLM` gives all inputs of a batch the same settings.

    @override
    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        if self._differ(config, len(inputs)):
            return Runnable.batch(self, inputs, config, return_exceptions=return_exceptions, **kwargs)
        kwargs = self._scoped(_first(config), kwargs)
        return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    @override
    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        if self._differ(config, len(inputs)):
            return await Runnable.abatch(self, inputs, config, return_exceptions=return_exceptions, **kwargs)
        kwargs = self._scoped(_first(config), kwargs)
        return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    def _differ(self, config: RunnableConfig | list[RunnableConfig] | None, number: int) -> bool:
        """Whether the inputs of a batch are not all about the same scopes."""
        return isinstance(config, list) and len({found_scopes(one) for one in get_config_list(config, number)}) > 1

    # `BaseLLM` leaves the settings of a call, and the model's own stop strings, out of its cache keys, and puts all of
    # them into its traces. So they become fields of a copy before it sees them.

    @override
    def generate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """See `BaseLLM.generate`; further keyword arguments are settings of this call."""
        call, run = self._split(kwargs)
        return super(OuroborosLLM, call).generate(prompts, call._stop(stop), callbacks, **run)

    @override
    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """See `BaseLLM.agenerate`; further keyword arguments are settings of this call."""
        call, run = self._split(kwargs)
        return await super(OuroborosLLM, call).agenerate(prompts, call._stop(stop), callbacks, **run)

    @override
    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        call = self._for_call(self._scoped(config, kwargs))
        return super(OuroborosLLM, call).stream(input, config, stop=call._stop(stop))

    @override
    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        call = self._for_call(self._scoped(config, kwargs))
        return super(OuroborosLLM, call).astream(input, config, stop=call._stop(stop))

    def _split(self, kwargs: dict[str, Any]) -> tuple[OuroborosLLM, dict[str, Any]]:
        """The model with the settings of a call, and what LangChain wants to know of its run."""
        run = {name: value for name, value in kwargs.items() if name in _RUN_ARGUMENTS}
        return self._for_call({name: value for name, value in kwargs.items() if name not in run}), run

    @override
    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = self._for_call(kwargs)

        def answer(prompt: str, manager: CallbackManagerForLLMRun | None) -> Iterator[GenerationChunk]:
            return call._stream(prompt, stop, manager)

        listeners = call._listeners(run_manager, len(prompts))
        return call._llm_result(at_once(answer, prompts, listeners))

    @override
    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = self._for_call(kwargs)

        async def answer(prompt: str, manager: AsyncCallbackManagerForLLMRun | None) -> Generation:
            async with place():
                return join([chunk async for chunk in call._astream(prompt, stop, manager)])

        runs = zip(prompts, call._listeners(run_manager, len(prompts)), strict=True)
        answers = [asyncio.ensure_future(answer(*run)) for run in runs]
        try:
            return call._llm_result(await asyncio.gather(*answers))
        finally:
            for task in answers:
                task.cancel()

    @override
    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        call = self._for_call(kwargs)
        for piece in shown(call._stream_of(prompt, stop)):
            chunk = call._chunk(piece)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    @override
    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        call = self._for_call(kwargs)
        start = partial(call._stream_of, prompt, stop)
        async with aclosing(ashown(off_the_loop(start))) as pieces:
            async for piece in pieces:
                chunk = call._chunk(piece)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _listeners(self, run_manager: _Manager | None, number: int) -> list[_Manager | None]:
        """Who hears of tokens while LangChain does not stream itself: the first prompt's run, the only one it names."""
        return [run_manager if self.streaming else None, *[None] * (number - 1)]

    def _chunk(self, piece: StreamChunk) -> GenerationChunk:
        if piece.result is None:
            return GenerationChunk(text=piece.text)
        info = self._response_metadata(piece.result) | {"token_usage": _token_usage(piece.result.usage)}
        return GenerationChunk(text=piece.text, generation_info=info)

    def _llm_result(self, generations: list[Generation]) -> LLMResult:
        usage: Counter[str] = Counter()
        for generation in generations:
            usage.update((generation.generation_info or {})["token_usage"])
        output = {"token_usage": dict(usage), "model_name": self.model}
        return LLMResult(generations=[[generation] for generation in generations], llm_output=output)

    @override
    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of `messages` as a prompt, which is their text with the speakers' names."""
        if tools:
            raise OptionError("tools must be None for a text model; ChatOuroboros counts them")
        return self.get_num_tokens(get_buffer_string(messages))


def _first(config: RunnableConfig | list[RunnableConfig] | None) -> RunnableConfig | None:
    return next(iter(config), None) if isinstance(config, list) else config


def _token_usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "cached_tokens": usage.cached_tokens,
    }
