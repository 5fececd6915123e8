"""Chat messages in, chat messages out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import (
    BaseChatModel,
    agenerate_from_stream,
    generate_from_stream,
)
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.utils.function_calling import convert_to_openai_tool
from typing_extensions import override

from ouroboros_llm import Piece, Usage

from ._base import OuroborosFields
from ._messages import to_dicts

_UNTRACED = frozenset({"scope", "read_scopes"})
_UNCACHED = _UNTRACED | {"max_draft_tokens", "timeout", "stream"}


class ChatOuroboros(OuroborosFields, BaseChatModel):
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
        scope: Whose phrases to use and to add to, as in `conversation:42`.
        read_scopes: Further scopes to read.
        draft_model: A smaller model of the same vocabulary that drafts too.
        device, dtype: Where and in what precision to run.
        ouroboros: An `Ouroboros` that you built yourself, in place of model, draft_model, device, dtype and store.

    All completion arguments, `scope`, `read_scopes`, `timeout` and `model` can be given to a call too, or bound:
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

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, **kwargs))

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, **kwargs))

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._for_call(kwargs)
        for piece in call._pieces(to_dicts(messages), stop):
            chunk = call._chunk(piece)
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
        call = self._for_call(kwargs)
        async with aclosing(call._apieces(to_dicts(messages), stop)) as pieces:
            async for piece in pieces:
                chunk = call._chunk(piece)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _chunk(self, piece: Piece) -> ChatGenerationChunk:
        # Chunks are added up, strings in their metadata joined: what is true of the answer stands on the last one only.
        if piece.result is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=piece.text))
        message = AIMessageChunk(
            content=piece.text,
            usage_metadata=_usage_metadata(piece.result.usage),
            response_metadata=self._response_metadata(piece.result),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message, generation_info={"finish_reason": piece.result.finish_reason})

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
        specifications = [convert_to_openai_tool(tool) for tool in tools] if tools else None
        return len(self._loaded().encode(to_dicts(messages), tools=specifications))


def _usage_metadata(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )
