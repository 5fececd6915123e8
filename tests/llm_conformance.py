"""What every LLM class for LlamaIndex must do, whoever wrote it: a suite to inherit from.

A subclass has a fixture `llm`, and says by its attributes what its LLM promises beyond the interface.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

import pytest
from llama_index.core import Document, PromptTemplate, Settings, SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.tools import FunctionTool

SYNC = ["complete", "chat", "stream_complete", "stream_chat"]
ASYNC = ["acomplete", "achat", "astream_complete", "astream_chat"]
STREAMS = ["stream_complete", "stream_chat", "astream_complete", "astream_chat"]
METHODS = SYNC + ASYNC
TOOL_METHODS = ["chat_with_tools", "achat_with_tools", "stream_chat_with_tools", "astream_chat_with_tools"]
QUESTION = "Call ping."
"""What the LLM of a suite with tools answers with a call of `ping`, if it is offered."""

CONVERSATIONS: dict[str, list[tuple[str, str]]] = {
    "alternating": [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hi!"), ("user", "Who?")],
    "several in a row": [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"), ("assistant", "e")] * 2,
    "a system message at the end": [("user", "Hi"), ("assistant", "Hi!"), ("system", "Stop now.")],
    "an answer first": [("assistant", "Hi!"), ("user", "Hi")],
    "nothing but a system message": [("system", "Be brief.")],
    "an empty message": [("user", "Hi"), ("assistant", ""), ("user", "Hi?")],
    "other names of roles": [("developer", "Be brief."), ("user", "Hi"), ("model", "Hi!"), ("chatbot", "Ho!")],
    "any language": [("user", "größe 日本 🐍\n\n\t<|x|>")],
}


def ping(host: str = "localhost") -> str:
    """Ping a host."""
    return f"{host} is up"


def text_of(response: Any) -> str:
    return str(response.text if isinstance(response, CompletionResponse) else response.message.content or "")


async def listed(answer: Any) -> list[Any]:
    """All responses of any method, in one list."""
    answer = await answer if inspect.isawaitable(answer) else answer
    if isinstance(answer, AsyncGenerator):
        return [response async for response in answer]
    return list(answer) if isinstance(answer, Iterator) else [answer]


async def ask(llm: Any, method: str, text: str = "Tell me", **settings: Any) -> list[Any]:
    return await listed(getattr(llm, method)([ChatMessage(text)] if method.endswith("chat") else text, **settings))


class GraphCapturer(BaseEventHandler):
    events: list[Any] = []

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)


@pytest.fixture
def recorder() -> Iterator[GraphCapturer]:
    recorder, root = GraphCapturer(events=[]), get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


@pytest.fixture(autouse=True)
def no_other_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would fall back to the default LLM fails."""
    monkeypatch.setattr(Settings, "_llm", None)


class LLMConformance:
    """Inherit from it, with a fixture `llm`."""

    cumulative = True
    """Responses of a stream hold all text so far."""
    reports_usage = True
    """The last response counts tokens in `raw["usage"]`."""
    calls_tools = True
    """The fixture's LLM answers `QUESTION` with a call of `ping`, and the tool's result with text."""
    frees_the_loop = True
    """Async methods let other tasks of their event loop run."""
    reports_once = True
    """A call is one call to whoever listens, not several inside of each other."""
    serializes = True
    """`to_json` works."""

    # --- what it is ---

    def test_is_an_llm(self, llm: Any) -> None:
        assert isinstance(llm, BaseLLM)
        assert isinstance(llm.class_name(), str) and llm.class_name()
        assert isinstance(llm, FunctionCallingLLM) is self.calls_tools

    def test_metadata(self, llm: Any) -> None:
        metadata = llm.metadata
        assert isinstance(metadata, LLMMetadata)
        assert metadata.context_window > 0 and metadata.model_name
        assert metadata.num_output < metadata.context_window
        assert metadata.is_function_calling_model is self.calls_tools

    def test_can_be_described(self, llm: Any) -> None:
        if self.serializes:
            json.loads(llm.to_json())
        payload = llm.to_payload()
        assert payload["class_name"] == llm.class_name() and json.dumps(payload, default=str)
        assert copy.deepcopy(llm).metadata == llm.metadata

    # --- the eight methods ---

    @pytest.mark.parametrize("method", METHODS)
    async def test_kinds(self, llm: Any, method: str) -> None:
        asked = getattr(llm, method)([ChatMessage("hi")] if method.endswith("chat") else "hi")
        assert inspect.isawaitable(asked) is method.startswith("a")
        answer = await asked if inspect.isawaitable(asked) else asked
        if method in STREAMS:
            assert isinstance(answer, AsyncGenerator if method.startswith("a") else Generator)
        for response in await listed(answer):
            assert isinstance(response, ChatResponse if method.endswith("chat") else CompletionResponse)

    @pytest.mark.parametrize("method", METHODS)
    async def test_every_way_of_asking_gets_the_same_text(self, llm: Any, method: str) -> None:
        whole = text_of(llm.chat([ChatMessage("Tell me")]) if method.endswith("chat") else llm.complete("Tell me"))
        responses = await ask(llm, method)
        assert whole and text_of(responses[-1]) == whole

    @pytest.mark.parametrize("method", STREAMS)
    async def test_deltas_add_up_to_the_text(self, llm: Any, method: str) -> None:
        responses = await ask(llm, method)
        assert "".join(response.delta or "" for response in responses) == text_of(responses[-1])
        if self.cumulative:
            so_far = ""
            for response in responses:
                so_far += response.delta or ""
                assert text_of(response) == so_far

    @pytest.mark.parametrize("method", ["chat", "achat", "stream_chat", "astream_chat"])
    async def test_answers_are_the_assistants(self, llm: Any, method: str) -> None:
        assert {response.message.role for response in await ask(llm, method)} == {MessageRole.ASSISTANT}

    @pytest.mark.parametrize("method", METHODS)
    async def test_what_is_kept_is_plain_data(self, llm: Any, method: str) -> None:
        for response in await ask(llm, method):
            dumped = json.loads(response.model_dump_json())
            assert dumped.get("raw") == response.raw
            json.dumps(response.additional_kwargs)
        if self.reports_usage:
            usage = response.raw["usage"]
            assert usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    @pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
    @pytest.mark.parametrize("method", ["chat", "astream_chat"])
    async def test_conversations(self, llm: Any, method: str, messages: list[tuple[str, str]]) -> None:
        given = [ChatMessage(content, role=role) for role, content in messages]
        before = copy.deepcopy(given)
        assert text_of((await listed(getattr(llm, method)(given)))[-1])
        assert given == before

    @pytest.mark.parametrize("method", METHODS)
    async def test_formatted_prompts_and_keywords_of_messages(self, llm: Any, method: str) -> None:
        if method.endswith("chat"):
            answer = getattr(llm, method)(messages=[ChatMessage("hi")])
        else:
            answer = getattr(llm, method)("hi", formatted=True)
        assert text_of((await listed(answer))[-1])

    async def test_templates(self, llm: Any) -> None:
        template = PromptTemplate("About {topic}")
        said = llm.predict(template, topic="snakes")
        assert said and said == await llm.apredict(template, topic="snakes")
        assert "".join(llm.stream(template, topic="snakes")) == said
        assert "".join([token async for token in await llm.astream(template, topic="snakes")]) == said

    async def test_a_stream_left_midway_leaves_the_llm_usable(self, llm: Any) -> None:
        said = text_of(llm.complete("hi"))
        stream, astream = llm.stream_complete("hi"), await llm.astream_complete("hi")
        next(stream), await anext(astream)
        stream.close()
        await astream.aclose()
        assert text_of(await llm.acomplete("hi")) == said

    async def test_many_at_once(self, llm: Any) -> None:
        alone = [text_of(llm.complete(f"Number {number}")) for number in range(4)]
        together = await asyncio.gather(*(llm.acomplete(f"Number {number}") for number in range(4)))
        assert list(map(text_of, together)) == alone

    @pytest.mark.parametrize("method", ASYNC)
    async def test_the_event_loop_goes_on(self, llm: Any, method: str) -> None:
        if not self.frees_the_loop:
            pytest.skip("it does not promise to")
        task, turns = asyncio.ensure_future(ask(llm, method)), 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        assert text_of((await task)[-1]) and turns > 2

    # --- who is told ---

    @pytest.mark.parametrize("method", METHODS)
    async def test_events(self, llm: Any, recorder: GraphCapturer, method: str) -> None:
        responses = await ask(llm, method)
        kind = "Chat" if method.endswith("chat") else "Completion"
        start, progress, end = (f"LLM{kind}{phase}Event" for phase in ("Start", "InProgress", "End"))
        names = [type(event).__name__ for event in recorder.events if kind in type(event).__name__]
        assert (names[0], names[-1]) == (start, end) and names.count(start) == names.count(end)
        if self.reports_once:
            assert names == [start, *([progress] * len(responses) if method in STREAMS else []), end]

    @pytest.mark.parametrize("method", METHODS)
    async def test_callbacks(self, llm: Any, method: str) -> None:
        handler = LlamaDebugHandler(print_trace_on_end=False)
        llm.callback_manager = CallbackManager([handler])
        await ask(llm, method)
        pairs = handler.get_llm_inputs_outputs()
        assert all(start.payload and end.payload and start.id_ == end.id_ for start, end in pairs)
        assert len(pairs) == 1 if self.reports_once else len(pairs) >= 1

    # --- what is built on it ---

    async def test_query_engines(self, llm: Any) -> None:
        index = SummaryIndex.from_documents([Document(text="The ouroboros eats its tail.")])
        said = str(index.as_query_engine(llm=llm).query("Who?"))
        assert said and str(await index.as_query_engine(llm=llm).aquery("Who?")) == said
        assert "".join(index.as_query_engine(llm=llm, streaming=True).query("Who?").response_gen) == said
        for mode in ("refine", "tree_summarize", "accumulate"):
            assert str(index.as_query_engine(llm=llm, response_mode=mode).query("Who?"))

    async def test_chat_engines(self, llm: Any) -> None:
        engine = SimpleChatEngine.from_defaults(llm=llm, system_prompt="Be brief.")
        assert engine.chat("first").response and (await engine.achat("second")).response
        assert "".join(engine.stream_chat("third").response_gen)
        stream = await engine.astream_chat("fourth")
        assert "".join([token async for token in stream.async_response_gen()])
        roles = [message.role.value for message in engine.chat_history if message.role != "system"]
        assert roles == ["user", "assistant"] * 4

    @pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
    async def test_chat_engines_over_documents(self, llm: Any, mode: str) -> None:
        index = SummaryIndex.from_documents([Document(text="The ouroboros eats its tail.")])
        engine: Any = index.as_chat_engine(chat_mode=mode, llm=llm)
        assert engine.chat("Who?").response and (await engine.achat("Why?")).response

    # --- tools ---

    @pytest.mark.parametrize("method", TOOL_METHODS)
    async def test_tools(self, llm: Any, method: str) -> None:
        if not self.calls_tools:
            pytest.skip("it calls no tools")
        tool, history = FunctionTool.from_defaults(ping), [ChatMessage("Be brief.", role="system")]
        responses = await listed(getattr(llm, method)([tool], user_msg=QUESTION, chat_history=history))
        (selected,) = llm.get_tool_calls_from_response(responses[-1])
        assert selected.tool_name == "ping" and selected.tool_id
        assert set(selected.tool_kwargs) <= {"host"}
        assert history == [ChatMessage("Be brief.", role="system")]
        for response in responses:
            llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
        assert any(isinstance(block, ToolCallBlock) for block in responses[-1].message.blocks)
        json.loads(responses[-1].model_dump_json())

    async def test_results_of_tools(self, llm: Any) -> None:
        if not self.calls_tools:
            pytest.skip("it calls no tools")
        tool = FunctionTool.from_defaults(ping)
        answer = llm.chat_with_tools([tool], user_msg=QUESTION)
        (selected,) = llm.get_tool_calls_from_response(answer)
        result = ChatMessage("up", role="tool", additional_kwargs={"tool_call_id": selected.tool_id})
        history = [ChatMessage(QUESTION), answer.message, result]
        final = await llm.achat_with_tools([tool], chat_history=history)
        assert llm.get_tool_calls_from_response(final, error_on_no_tool_call=False) == []
        assert text_of(final)

    async def test_predicting_a_call(self, llm: Any) -> None:
        if not self.calls_tools:
            pytest.skip("it calls no tools")
        tool = FunctionTool.from_defaults(ping)
        assert llm.predict_and_call([tool], QUESTION).response.endswith("is up")
        assert (await llm.apredict_and_call([tool], QUESTION)).response.endswith("is up")

    @pytest.mark.parametrize("streaming", [True, False])
    async def test_agents(self, llm: Any, streaming: bool) -> None:
        if not self.calls_tools:
            pytest.skip("it calls no tools")
        agent = FunctionAgent(tools=[ping], llm=llm, streaming=streaming)
        output = await agent.run(QUESTION)
        assert [call.tool_name for call in output.tool_calls] == ["ping"]
        assert str(output)
