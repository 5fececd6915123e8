"""`OuroborosLLM` for LlamaIndex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

from .asking import Asking
from .calling import ToolCalling
from .prompts import Prompt
from .responses import chat_response, completion_response
from .streams import aclosed_with, acumulative, ain_full, closed_with, cumulative, in_full
from .tools import asked


class OuroborosLLM(ToolCalling):
    """Ouroboros LLM: a local Hugging Face model that answers several times faster without changing a token.

    It remembers what it wrote, per conversation and across restarts, guesses that it comes again, and lets the model
    verify many guesses in one pass. Constructing it loads nothing; the first call does, or `load()`.

    Every call takes the generation options as keywords (`temperature`, `max_tokens`, `stop`, `seed`, `scope`,
    `grammar` ...); None keeps what the constructor was given. Unknown keywords fail. Async methods never block the
    event loop. Closing a stream, or cancelling a task, stops decoding within a round. `raw` and `additional_kwargs` of
    the response, in a stream of the last one, hold the token usage (`cached_tokens` are those of the prompt that did
    not have to be read again), the finish reason and the decoding statistics.

    Examples:
        `pip install "ouroboros-llm[llama-index,structured]"`

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

        Agents; a call that is forced follows a grammar, and always fits:

        ```python
        from llama_index.core.agent.workflow import FunctionAgent

        agent = FunctionAgent(tools=[add], llm=llm)
        print(await agent.run("What is 17 + 25?"))
        llm.predict_and_call([FunctionTool.from_defaults(add)], "What is 17 + 25?")
        ```

        Objects of a Pydantic class, which follow the grammar of its schema:

        ```python
        llm.structured_predict(Person, PromptTemplate("Who is {name}?"), name="Anna")
        ```

        Whose phrases are used, also inside of query engines and agents:

        ```python
        from llama_index.core.instrumentation.dispatcher import instrument_tags
        from llama_index.llms.ouroboros import ouroboros_scope

        with instrument_tags({"session_id": "42"}):  # the scope conversation:42
            engine.query("How do I ...?")
        with ouroboros_scope("conversation:42"):
            engine.query("How do I ...?")
        ```

        Documents that every conversation over them may quote:

        ```python
        llm = OuroborosLLM(corpus_scope="manuals")
        llm.index_documents(documents, show_progress=True)
        ```
    """

    @classmethod
    def class_name(cls) -> str:
        return "OuroborosLLM"

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return in_full(self._asking(self._completion_prompt(prompt, formatted), kwargs), completion_response)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return in_full(self._asking(self._chat_prompt(messages), kwargs), chat_response)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        asking = self._asking(self._completion_prompt(prompt, formatted), kwargs)
        pieces = asking.pieces()

        @llm_completion_callback()
        def respond(llm: OuroborosLLM, prompt: str, **kwargs: Any) -> CompletionResponseGen:
            return cumulative(asking, pieces, completion_response)

        return closed_with(respond(self, prompt, formatted=formatted, **kwargs), pieces)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        asking = self._asking(self._chat_prompt(messages), kwargs)
        pieces = asking.pieces()

        @llm_chat_callback()
        def respond(llm: OuroborosLLM, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
            return cumulative(asking, pieces, chat_response)

        return closed_with(respond(self, messages, **kwargs), pieces)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return await ain_full(self._asking(self._completion_prompt(prompt, formatted), kwargs), completion_response)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await ain_full(self._asking(self._chat_prompt(messages), kwargs), chat_response)

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        asking = self._asking(self._completion_prompt(prompt, formatted), kwargs)
        pieces = asking.apieces()

        @llm_completion_callback()
        async def respond(llm: OuroborosLLM, prompt: str, **kwargs: Any) -> CompletionResponseAsyncGen:
            return acumulative(asking, pieces, completion_response)

        return aclosed_with(await respond(self, prompt, formatted=formatted, **kwargs), pieces)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        asking = self._asking(self._chat_prompt(messages), kwargs)
        pieces = asking.apieces()

        @llm_chat_callback()
        async def respond(llm: OuroborosLLM, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
            return acumulative(asking, pieces, chat_response)

        return aclosed_with(await respond(self, messages, **kwargs), pieces)

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        formatter = self.messages_to_prompt
        assert formatter is not None  # a validator sets it
        templated = formatter is default_messages_to_prompt
        return Prompt(messages=messages, formatter=formatter, templated=templated)

    def _completion_prompt(self, prompt: str, formatted: bool) -> Prompt:
        """The system prompt goes where `predict` puts it: a message of its own, or in front of the text."""
        assert self.completion_to_prompt is not None  # a validator sets it
        if formatted:
            return Prompt(prompt)
        text = self._extend_prompt(self.completion_to_prompt(prompt))
        if self.completion_to_prompt is not default_completion_to_prompt:
            return Prompt(text)
        return Prompt(text, self._extend_messages([ChatMessage(content=prompt)]))

    def _asking(self, prompt: Prompt, call: dict[str, Any]) -> Asking:
        """Checks the call's keywords now, and settles its scopes; loads the model and decodes when iterated."""
        return Asking(self, prompt, asked(call), self.options(call), self.scopes(call))
