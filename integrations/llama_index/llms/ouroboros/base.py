"""`OuroborosLLM` for LlamaIndex."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

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
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.schema import BaseNode
from llama_index.core.tools.types import BaseTool

from ouroboros_llm import OptionError
from ouroboros_llm.corpus import Indexed
from ouroboros_llm.scopes import corpus_of

from .asking import Asking
from .documents import ids_of, shown, texts_by_document
from .prompts import Prompt
from .responses import chat_response, completion_response
from .streams import aclosed_with, acumulative, ain_full, closed_with, cumulative, in_full
from .structured import StructuredPrediction
from .tools import asked, openai_tools, selections

if TYPE_CHECKING:
    from llama_index.core.chat_engine.types import AgentChatResponse


class OuroborosLLM(StructuredPrediction):
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

    def index_documents(
        self, nodes: Sequence[BaseNode], *, corpus_scope: str | None = None, show_progress: bool = False
    ) -> Indexed:
        """Let answers quote documents: put what they say into the corpus, where every conversation over it finds it.

        Documents that are there and say the same cost next to nothing, those that say something else replace what they
        said. Loads the model, for its tokenizer.

        Args:
            nodes: documents, or all nodes of some: what belongs to one document has its `ref_doc_id`.
            corpus_scope: in place of that of the constructor.
            show_progress: show a bar.

        Raises:
            OptionError: no corpus is named. StoreError: the store fails.
        """
        documents = texts_by_document(nodes)
        steps = shown(documents, show_progress)
        indexed = self.load().index_documents(
            documents, scope=self._corpus(corpus_scope), advance=lambda _: next(steps, None)
        )
        next(steps, None)  # the bar is full
        return indexed

    def remove_documents(
        self, documents: str | BaseNode | Iterable[str | BaseNode], *, corpus_scope: str | None = None
    ) -> int:
        """Take documents out of the corpus again.

        Args:
            documents: their ids (`ref_doc_id` of their nodes), or documents or nodes themselves.

        Returns:
            How many there were.
        """
        return int(self.load().remove_documents(ids_of(documents), scope=self._corpus(corpus_scope)))

    def _corpus(self, name: str | None) -> str:
        chosen = name or self.corpus_scope
        if not chosen:
            raise OptionError(
                "corpus_scope must name the corpus, for example 'manuals'; pass it here or to the constructor"
            )
        return corpus_of(chosen)

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


def _forcing(settings: dict[str, Any], needed: bool) -> dict[str, Any]:
    chosen = settings.get("tool_choice") is not None or "tool_required" in settings
    return settings if chosen or not needed else {**settings, "tool_required": True}
