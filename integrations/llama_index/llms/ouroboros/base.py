"""`OuroborosLLM` for LlamaIndex."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from llama_index.core.base.llms.generic_utils import messages_to_prompt as default_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt

from ouroboros_llm import DecodingOptions, Piece
from ouroboros_llm.stream import off_the_loop

from .configuration import ConfiguredLLM
from .prompts import Prompt, chat_messages
from .responses import chat_response, completion_response
from .streams import AsyncPieces, Pieces, aclosed_with, acumulative, ain_full, closed_with, cumulative, in_full


class OuroborosLLM(ConfiguredLLM):
    """Ouroboros LLM: a local Hugging Face model that answers several times faster without changing a token.

    It remembers what it wrote, per conversation and across restarts, guesses that it comes again, and lets the model
    verify many guesses in one pass. Constructing it loads nothing; the first call does, or `load()`.

    Every call takes the generation options as keywords (`temperature`, `max_tokens`, `stop`, `seed`, `scope` ...); None
    keeps what the constructor was given. Unknown keywords fail. Async methods never block the event loop. Closing a
    stream, or cancelling a task, stops decoding within a round. `raw` and `additional_kwargs` of the response, in a
    stream of the last one, hold the token usage, the finish reason and the decoding statistics.

    Examples:
        `pip install "ouroboros-llm[llama-index]"`

        ```python
        from llama_index.core.llms import ChatMessage
        from llama_index.llms.ouroboros import OuroborosLLM

        llm = OuroborosLLM(model="smollm2-135m-instruct", max_tokens=128, scope="conversation:42")
        print(llm.complete("The ouroboros is"))

        for response in llm.stream_chat([ChatMessage("Why does a snake eat its tail?")]):
            print(response.delta, end="", flush=True)
        print(response.raw["statistics"]["mean_acceptance_length"])
        ```

        A model that is already loaded:

        ```python
        from ouroboros_llm import Ouroboros

        llm = OuroborosLLM(ouroboros=Ouroboros(model, tokenizer, store="sqlite:///phrases.db"))
        ```
    """

    @classmethod
    def class_name(cls) -> str:
        return "OuroborosLLM"

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return in_full(self._pieces(self._completion_prompt(prompt, formatted), kwargs), completion_response)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return in_full(self._pieces(self._chat_prompt(messages), kwargs), chat_response)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        pieces = self._pieces(self._completion_prompt(prompt, formatted), kwargs)

        @llm_completion_callback()
        def respond(llm: OuroborosLLM, prompt: str, **kwargs: Any) -> CompletionResponseGen:
            return cumulative(pieces, completion_response)

        return closed_with(respond(self, prompt, formatted=formatted, **kwargs), pieces)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        pieces = self._pieces(self._chat_prompt(messages), kwargs)

        @llm_chat_callback()
        def respond(llm: OuroborosLLM, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
            return cumulative(pieces, chat_response)

        return closed_with(respond(self, messages, **kwargs), pieces)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        pieces = self._apieces(self._completion_prompt(prompt, formatted), kwargs)
        return await ain_full(pieces, completion_response)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await ain_full(self._apieces(self._chat_prompt(messages), kwargs), chat_response)

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        pieces = self._apieces(self._completion_prompt(prompt, formatted), kwargs)

        @llm_completion_callback()
        async def respond(llm: OuroborosLLM, prompt: str, **kwargs: Any) -> CompletionResponseAsyncGen:
            return acumulative(pieces, completion_response)

        return aclosed_with(await respond(self, prompt, formatted=formatted, **kwargs), pieces)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        pieces = self._apieces(self._chat_prompt(messages), kwargs)

        @llm_chat_callback()
        async def respond(llm: OuroborosLLM, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
            return acumulative(pieces, chat_response)

        return aclosed_with(await respond(self, messages, **kwargs), pieces)

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        assert self.messages_to_prompt is not None  # a validator sets it
        text = self.messages_to_prompt(messages)
        if self.messages_to_prompt is not default_messages_to_prompt:
            return Prompt(text)
        return Prompt(text, chat_messages(messages))

    def _completion_prompt(self, prompt: str, formatted: bool) -> Prompt:
        """The system prompt goes where `predict` puts it: a message of its own, or in front of the text."""
        assert self.completion_to_prompt is not None  # a validator sets it
        if formatted:
            return Prompt(prompt)
        text = self._extend_prompt(self.completion_to_prompt(prompt))
        if self.completion_to_prompt is not default_completion_to_prompt:
            return Prompt(text)
        return Prompt(text, chat_messages(self._extend_messages([ChatMessage(content=prompt)])))

    def _pieces(self, prompt: Prompt, call: dict[str, Any]) -> Pieces:
        """Checks the call's keywords now; loads the model and decodes when iterated."""
        return _begun(self._start(prompt, call))

    def _apieces(self, prompt: Prompt, call: dict[str, Any]) -> AsyncPieces:
        """As `_pieces`; what takes time happens in other threads."""
        return off_the_loop(self._start(prompt, call))

    def _start(self, prompt: Prompt, call: dict[str, Any]) -> Callable[[], Iterator[Piece]]:
        scope, read_scopes = (
            getattr(self, name) if call.get(name) is None else call[name] for name in ("scope", "read_scopes")
        )
        return partial(self._stream, prompt, self.options(call), scope, read_scopes)

    def _stream(
        self, prompt: Prompt, options: DecodingOptions, scope: str | None, read_scopes: Sequence[str]
    ) -> Iterator[Piece]:
        ouroboros = self.load()
        form = prompt.form(bool(ouroboros.tokenizer.chat_template))
        return ouroboros.stream(form, scope=scope, read_scopes=read_scopes, options=options)


def _begun(start: Callable[[], Iterator[Piece]]) -> Pieces:
    pieces = cast("Pieces", start())
    try:
        yield from pieces
    finally:
        pieces.close()
