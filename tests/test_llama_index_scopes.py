"""Whose phrases a call of LlamaIndex is about: found on every way of calling, in engines and agents."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_model
from llama_index.core import Document, PromptTemplate, SummaryIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.instrumentation import dispatcher as instrumentation
from llm_conformance import METHODS, ask
from pydantic import BaseModel
from speaker import Speaker, call, scopes
from test_llama_index_tools import ADD, ADDED, stand_in
from test_scopes import Watched

from llama_index.llms.ouroboros import OuroborosLLM, ouroboros_scope
from ouroboros_llm import Ouroboros
from ouroboros_llm.ouroboros import DEFAULT_SCOPE

instrument_tags = instrumentation.instrument_tags
DOCUMENTS = [Document(text="The ouroboros eats its tail."), Document(text="The phoenix rises from ashes.")]


class Answer(BaseModel):
    who: str


def asking(*replies: Any, **settings: Any) -> tuple[OuroborosLLM, Speaker]:
    speaker = Speaker(*(replies or ("Yes.",)))
    speaker.context_length = 8192
    return OuroborosLLM(ouroboros=stand_in(speaker, write_scopes=()), **settings), speaker


def names(speaker: Speaker) -> set[str | None]:
    found = {scope for scope, _, _ in scopes(speaker)}
    speaker.calls.clear()
    return found


def tagged(**tags: Any) -> AbstractContextManager[None]:
    found: AbstractContextManager[None] = instrument_tags(tags)
    return found


NAMED = [
    pytest.param(lambda: tagged(session_id=42), id="tags"),
    pytest.param(lambda: ouroboros_scope("conversation:42"), id="context manager"),
]


@pytest.mark.parametrize(
    ("tags", "scope"),
    [
        ({}, None),
        ({"session_id": "1"}, "conversation:1"),
        ({"thread_id": "1"}, "conversation:1"),
        ({"conversation_id": 7}, "conversation:7"),
        ({"conversation_id": "3", "session_id": "2", "thread_id": "1"}, "conversation:1"),
        ({"thread_id": None, "session_id": "2"}, "conversation:2"),
        ({"session_id": ""}, None),
        ({"session_id": 0}, "conversation:0"),
        ({"session_id": "corpus:manuals"}, "conversation:corpus:manuals"),
        ({"user_id": "1", "llamaindex.run_id": "x"}, None),
    ],
)
def test_the_scope_of_tags(tags: dict[str, Any], scope: str | None) -> None:
    llm, speaker = asking()
    with tagged(**tags):
        llm.complete("hi")
    assert names(speaker) == {scope}


def test_ids_that_are_no_names_have_scopes_of_their_own() -> None:
    llm, speaker = asking()
    for id in ("a" * 300, "a" * 301, "a\nb"):
        with tagged(session_id=id):
            llm.complete("hi")
    found = names(speaker)
    assert len(found) == 3 and all(scope and scope.startswith("conversation:sha256-") for scope in found)


def test_who_takes_precedence() -> None:
    llm, speaker = asking(scope="the constructor's")
    with tagged(session_id="tag"):
        llm.complete("hi")
        assert names(speaker) == {"the constructor's"}
        with ouroboros_scope("the manager's"):
            llm.complete("hi")
            assert names(speaker) == {"the manager's"}
            llm.complete("hi", scope="the call's")
            assert names(speaker) == {"the call's"}
        other, speaker = asking()
        other.complete("hi")
        assert names(speaker) == {"conversation:tag"}
    other.complete("hi")
    assert names(speaker) == {None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("named", NAMED)
async def test_every_method(named: Any, method: str) -> None:
    llm, speaker = asking()
    with named():
        await ask(llm, method)
    assert names(speaker) == {"conversation:42"}


@pytest.mark.parametrize("named", NAMED)
async def test_streams_keep_the_scope_in_which_they_were_begun(named: Any) -> None:
    llm, speaker = asking()
    with named():
        stream, astream = llm.stream_complete("hi"), await llm.astream_chat([ChatMessage("hi")])
    assert list(stream) and [one async for one in astream]
    assert names(speaker) == {"conversation:42"}


async def test_streams_begun_without_a_scope_take_none_of_their_reader() -> None:
    source = Watched()
    with Ouroboros(tiny_model(), byte_tokenizer(), store=source) as ouroboros:
        llm = OuroborosLLM(ouroboros=ouroboros, max_tokens=4)
        messages = [ChatMessage("hi")]
        streams = [llm.stream_complete("hi"), llm.stream_chat(messages)]
        astreams = [await llm.astream_complete("hi"), await llm.astream_chat(messages)]
        with ouroboros_scope("conversation:eve"):
            assert all([list(stream) for stream in streams])
            assert all([[one async for one in stream] for stream in astreams])
    assert set(source.opened) == {DEFAULT_SCOPE}


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "accumulate"])
async def test_query_engines(named: Any, mode: Any) -> None:
    llm, speaker = asking()
    index = SummaryIndex.from_documents(DOCUMENTS)
    engine = index.as_query_engine(llm=llm, response_mode=mode)
    with named():
        engine.query("Who?")
        await engine.aquery("Who?")
        index.as_query_engine(llm=llm, response_mode=mode, use_async=True).query("Who?")
    assert names(speaker) == {"conversation:42"}


@pytest.mark.parametrize("named", NAMED)
def test_query_engines_without_an_event_loop(named: Any) -> None:
    llm, speaker = asking()
    index = SummaryIndex.from_documents(DOCUMENTS)
    engine = index.as_query_engine(llm=llm, response_mode="tree_summarize", use_async=True)
    with named():
        engine.query("Who?")
        # A streaming query engine asks the model when it is read.
        streamed = index.as_query_engine(llm=llm, streaming=True).query("Who?")
        assert "".join(streamed.response_gen) == "Yes."
    assert names(speaker) == {"conversation:42"}


@pytest.mark.parametrize("named", NAMED)
async def test_chat_engines(named: Any) -> None:
    llm, speaker = asking()
    index = SummaryIndex.from_documents(DOCUMENTS)
    engines: list[Any] = [SimpleChatEngine.from_defaults(llm=llm)]
    engines += [index.as_chat_engine(chat_mode=mode, llm=llm) for mode in ("context", "condense_plus_context")]
    for engine in engines:
        with named():
            engine.chat("one")
            await engine.achat("two")
            assert "".join(engine.stream_chat("three").response_gen) == "Yes."
            stream = await engine.astream_chat("four")
            assert [token async for token in stream.async_response_gen()]
        assert names(speaker) == {"conversation:42"}, engine


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("streaming", [True, False])
async def test_agents(named: Any, streaming: bool) -> None:
    llm, speaker = asking(lambda prompt: "3." if prompt[-1]["role"] == "tool" else ADDED)
    agent = FunctionAgent(name="adder", description="Adds.", tools=[ADD], llm=llm, streaming=streaming)
    with named():
        assert str(await agent.run("1 + 2?")) == "3."
        assert str(await AgentWorkflow(agents=[agent], root_agent="adder").run("1 + 2?")) == "3."
    assert len(speaker.calls) == 4 and names(speaker) == {"conversation:42"}
    llm, speaker = asking("Thought: I know.\nAnswer: 3.")
    with named():
        handler = ReActAgent(tools=[ADD], llm=llm, streaming=streaming).run("1 + 2?")
    assert str(await handler) == "3." and names(speaker) == {"conversation:42"}


@pytest.mark.parametrize("named", NAMED)
async def test_predictions(named: Any) -> None:
    llm, speaker = asking('{"who": "it"}', system_prompt="Be brief.")
    prompt = PromptTemplate("About {topic}")
    with named():
        llm.predict(prompt, topic="x")
        await llm.apredict(prompt, topic="x")
        list(llm.stream(prompt, topic="x"))
        [token async for token in await llm.astream(prompt, topic="x")]
        llm.structured_predict(Answer, prompt, topic="x")
        await llm.astructured_predict(Answer, prompt, topic="x")
        list(llm.stream_structured_predict(Answer, prompt, topic="x"))
        [one async for one in await llm.astream_structured_predict(Answer, prompt, topic="x")]
    assert len(speaker.calls) == 8 and names(speaker) == {"conversation:42"}


@pytest.mark.parametrize("kind", ["tags", "context manager"])
async def test_conversations_at_once(kind: str) -> None:
    llm, speaker = asking(lambda prompt: call("add", '{"a": 1, "b": 2}') if len(prompt) == 1 else "3.")
    agent = FunctionAgent(tools=[ADD], llm=llm)

    async def converse(number: int) -> None:
        with tagged(session_id=number) if kind == "tags" else ouroboros_scope(f"conversation:{number}"):
            await asyncio.sleep(0)
            assert str(await agent.run(f"number {number}")) == "3."

    await asyncio.gather(*map(converse, range(12)))
    assert len(speaker.calls) == 24
    for asked in speaker.calls:
        assert asked["scope"] == f"conversation:{asked['prompt'][0]['content'].removeprefix('number ')}"


@pytest.mark.parametrize("named", NAMED)
def test_threads_with_a_copy_of_the_context(named: Any) -> None:
    llm, speaker = asking()
    with ThreadPoolExecutor(1) as pool, named():
        pool.submit(copy_context().run, llm.complete, "hi").result()
        assert names(speaker) == {"conversation:42"}
        pool.submit(llm.complete, "hi").result()
        assert names(speaker) == {None}


def test_one_conversation_learns_nothing_from_another() -> None:
    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        llm = OuroborosLLM(ouroboros=ouroboros, max_tokens=60, max_draft_tokens=31)

        def forwards(session: str) -> int:
            with tagged(session_id=session):
                return int(llm.complete("abab", formatted=True).raw["statistics"]["target_forwards"])

        cold = forwards("1")
        assert forwards("2") == cold > forwards("1")
