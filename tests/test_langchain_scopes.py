"""Whose phrases a call is about: found in configs on every way of calling, and kept out of traces and cache keys."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from speaker import Speaker, scopes
from test_langchain import CLASSES, Listener

from langchain_ouroboros import ChatOuroboros, OuroborosLLM
from langchain_ouroboros._scopes import FoundScopes, found_scopes
from ouroboros_llm import OptionError, Ouroboros, ouroboros_scope

CONFIG: Any = {"configurable": {"thread_id": "42"}}
PROMPT = ChatPromptTemplate.from_messages([("human", "{text}")])

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")


def names(speaker: Speaker) -> list[str | None]:
    return [scope for scope, _, _ in scopes(speaker)]


async def gathered(stream: Any) -> list[Any]:
    return [item async for item in stream]


# --- where an id is looked for ---


@pytest.mark.parametrize(
    ("config", "scope"),
    [
        ({}, None),
        ({"configurable": {"thread_id": "1"}}, "conversation:1"),
        ({"configurable": {"session_id": "1"}}, "conversation:1"),
        ({"configurable": {"conversation_id": 7}}, "conversation:7"),
        ({"configurable": {"conversation_id": "3", "session_id": "2", "thread_id": "1"}}, "conversation:1"),
        ({"configurable": {"thread_id": None, "session_id": "2"}}, "conversation:2"),
        ({"configurable": {"thread_id": ""}}, None),
        ({"configurable": {"thread_id": 0}}, "conversation:0"),
        ({"metadata": {"thread_id": "1"}}, "conversation:1"),
        ({"metadata": {"thread_id": "1"}, "configurable": {"conversation_id": "2"}}, "conversation:2"),
        ({"configurable": {"thread_id": "corpus:manuals"}}, "conversation:corpus:manuals"),
        ({"configurable": {"user_id": "1"}}, None),
    ],
)
def test_the_scope_of_a_config(config: Any, scope: str | None) -> None:
    assert found_scopes(config).conversation == scope


def test_ids_that_are_no_names_have_scopes_of_their_own() -> None:
    found = [found_scopes({"configurable": {"thread_id": id}}).conversation for id in ("a" * 300, "a" * 301, "a\nb")]
    assert len(set(found)) == 3
    assert all(scope is not None and scope.startswith("conversation:sha256-") for scope in found)


@pytest.mark.parametrize(
    ("config", "agent"),
    [
        ({"metadata": {"lc_agent_name": "planner", "langgraph_node": "model"}}, "agent:planner"),
        ({"configurable": {"checkpoint_ns": "team:6f1e|model:a0b1"}}, "agent:team|model"),
        ({"metadata": {"langgraph_node": "writer"}}, "agent:writer"),
        ({"configurable": {"checkpoint_ns": ""}}, None),
        ({}, None),
    ],
)
def test_the_agent_of_a_config(config: Any, agent: str | None) -> None:
    assert found_scopes(config).agent == agent


def test_a_config_inside_a_run_completes_what_the_run_says() -> None:
    seen: list[FoundScopes] = []

    def look(_: Any) -> None:
        seen.append(found_scopes({"configurable": {"limit": 3}}))
        seen.append(found_scopes({"configurable": {"thread_id": "mine"}}))

    RunnableLambda(look).invoke(None, CONFIG)
    assert seen == [FoundScopes("conversation:42"), FoundScopes("conversation:mine")]


# --- every way of calling ---


@pytest.mark.parametrize("kind", CLASSES)
async def test_every_way_of_calling_finds_the_scope(kind: Any) -> None:
    speaker = Speaker("Yes.", template=None) if kind is OuroborosLLM else Speaker("Yes.")
    model = kind(ouroboros=speaker)
    chain = PROMPT | model
    for runnable, given in (
        (model, "hi"),
        (model.bind(max_tokens=9), "hi"),
        (model.with_config(tags=["x"]), "hi"),
        (model.with_retry(), "hi"),
        (model.with_fallbacks([model]), "hi"),
        (model.configurable_fields(max_tokens=ConfigurableField(id="limit")), "hi"),
        (chain, {"text": "hi"}),
        (RunnableLambda(lambda text: model.invoke(text)), "hi"),
    ):
        runnable.invoke(given, CONFIG)
        await runnable.ainvoke(given, CONFIG)
        list(runnable.stream(given, CONFIG))
        await gathered(runnable.astream(given, CONFIG))
        await gathered(runnable.astream_events(given, CONFIG, version="v2"))
        runnable.batch([given], CONFIG)
        await runnable.abatch([given], [CONFIG])
        assert names(speaker) == ["conversation:42"] * 7, runnable
        speaker.calls.clear()


async def test_protocol_events_find_the_scope() -> None:
    speaker = Speaker("Yes.")
    model = ChatOuroboros(ouroboros=speaker)
    for runnable in (model, model.bind(max_tokens=9)):
        assert runnable.stream_events("hi", CONFIG, version="v3").output.text == "Yes."
        stream = await runnable.astream_events("hi", CONFIG, version="v3")
        assert (await stream).text == "Yes."
    assert names(speaker) == ["conversation:42"] * 4


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("chained", [False, True])
async def test_the_inputs_of_a_batch_have_scopes_of_their_own(kind: Any, chained: bool) -> None:
    speaker = Speaker(lambda prompt: str(prompt[0]["content"]) if isinstance(prompt, list) else prompt)
    model = kind(ouroboros=speaker)
    runnable: Any = PROMPT | model if chained else model
    inputs: list[Any] = [f"text {number}" for number in range(5)]
    configs: list[Any] = [{"configurable": {"thread_id": number}} for number in range(5)]
    given = [{"text": text} for text in inputs] if chained else inputs
    for answers in (runnable.batch(given, configs), await runnable.abatch(given, configs)):
        assert [answer if isinstance(answer, str) else answer.text for answer in answers] == [
            f"Human: {text}" if chained and kind is OuroborosLLM else text for text in inputs
        ]
    assert sorted(str(name) for name in names(speaker)) == sorted(2 * [f"conversation:{n}" for n in range(5)])
    for one in speaker.calls:
        assert f"text {one['scope'][-1]}" in str(one["prompt"])


@pytest.mark.parametrize("kind", CLASSES)
def test_the_call_wins_over_the_model_and_the_model_over_the_config(kind: Any) -> None:
    speaker = Speaker("Yes.")
    kind(ouroboros=speaker, scope="mine").bind(scope="theirs").invoke("hi", CONFIG)
    kind(ouroboros=speaker, scope="mine").invoke("hi", CONFIG)
    kind(ouroboros=speaker).invoke("hi", CONFIG)
    kind(ouroboros=speaker).invoke("hi")
    assert names(speaker) == ["theirs", "mine", "conversation:42", None]


@pytest.mark.parametrize("kind", CLASSES)
async def test_a_named_scope_stands_between_the_call_and_the_model(kind: Any) -> None:
    speaker = Speaker("Yes.")
    with ouroboros_scope("here"):
        kind(ouroboros=speaker, scope="mine").bind(scope="theirs").invoke("hi", CONFIG)
        kind(ouroboros=speaker, scope="mine").invoke("hi", CONFIG)
        await kind(ouroboros=speaker, scope="mine").ainvoke("hi", CONFIG)
        await gathered(kind(ouroboros=speaker).astream("hi", CONFIG))
        kind(ouroboros=speaker).batch(["hi", "ho"], CONFIG)
    assert names(speaker) == ["theirs", *["here"] * 5]


@pytest.mark.parametrize("kind", CLASSES)
def test_the_agent_is_read_behind_and_written_only_if_wanted(kind: Any) -> None:
    speaker = Speaker("Yes.")
    config: Any = {"configurable": {"thread_id": "1"}, "metadata": {"lc_agent_name": "planner"}}
    kind(ouroboros=speaker, read_scopes=["corpus:a"]).invoke("hi", config)
    kind(ouroboros=speaker, learn_agent=True).invoke("hi", config)
    kind(ouroboros=speaker).bind(learn_agent=True, read_scopes=["agent:planner"]).invoke("hi", config)
    kind(ouroboros=speaker, learn_agent=True).invoke("hi")
    assert scopes(speaker) == [
        ("conversation:1", ("corpus:a", "agent:planner"), ()),
        ("conversation:1", ("agent:planner",), ("agent:planner",)),
        ("conversation:1", ("agent:planner",), ("agent:planner",)),
        (None, (), ()),
    ]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_corpus_is_read(kind: Any) -> None:
    speaker = Speaker("Yes.")
    kind(ouroboros=speaker, corpus_scope="manuals").invoke("hi")
    kind(ouroboros=speaker, corpus_scope="manuals").bind(corpus_scope="corpus:news").invoke("hi")
    kind(ouroboros=speaker).invoke("hi")
    assert [one.get("corpus_scopes") for one in speaker.calls] == [["corpus:manuals"], ["corpus:news"], None]


# --- traces and cache keys ---


@pytest.mark.parametrize("kind", CLASSES)
async def test_traces_do_not_tell_the_scope(kind: Any) -> None:
    listener, model = Listener(), kind(ouroboros=Speaker("Yes."))
    config: Any = {"configurable": {"__hidden": 1, "thread_id": "secret"}, "callbacks": [listener]}
    settings: Any = {"learn_agent": True}
    model.invoke("hi", config, **settings)
    await model.ainvoke("hi", config, **settings)
    list(model.stream("hi", config, **settings))
    await gathered(model.astream("hi", config, **settings))
    model.batch(["hi"], config, **settings)
    if kind is ChatOuroboros:
        assert model.stream_events("hi", config, version="v3", **settings).output.text
    assert len(listener.starts) == 5 + (kind is ChatOuroboros)
    for start in listener.starts:
        told = {name: value for name, value in start.items() if name != "metadata"}
        assert "secret" not in repr(told) and "scope" not in repr(told).lower() and "learn_agent" not in repr(told)


@pytest.mark.parametrize("kind", CLASSES)
async def test_conversations_share_cached_answers(kind: Any) -> None:
    speaker = Speaker("Yes.")
    model = kind(ouroboros=speaker, cache=InMemoryCache())
    for number in range(3):
        model.invoke("hi", {"configurable": {"thread_id": number}}, learn_agent=bool(number), drafters=["phrases"])
        await model.ainvoke("hi", {"configurable": {"thread_id": number}})
    assert len(speaker.calls) == 1


# --- graphs ---


def graph(model: Any, checkpointer: Any = None, name: str = "writer") -> Any:
    """One node that calls the model without handing it the config."""

    async def node(state: MessagesState) -> Any:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def sync_node(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node(name, RunnableLambda(sync_node, node))
    builder.add_edge(START, name)
    builder.add_edge(name, END)
    return builder.compile(checkpointer=checkpointer)


@pytest.mark.parametrize("checkpointer", [None, InMemorySaver()])
async def test_nodes_of_a_graph_find_scope_and_agent(checkpointer: Any) -> None:
    speaker = Speaker("Yes.")
    app = graph(ChatOuroboros(ouroboros=speaker, learn_agent=True), checkpointer)
    asked: Any = {"messages": [HumanMessage("hi")]}
    app.invoke(asked, CONFIG)
    await app.ainvoke(asked, CONFIG)
    list(app.stream(asked, CONFIG, stream_mode="messages"))
    await gathered(app.astream(asked, CONFIG, stream_mode="messages"))
    await gathered(app.astream_events(asked, CONFIG, version="v2"))
    assert scopes(speaker) == [("conversation:42", ("agent:writer",), ("agent:writer",))] * 5


def test_a_subgraph_is_in_the_same_conversation_and_has_a_place_of_its_own() -> None:
    speaker = Speaker("Yes.")
    outer = StateGraph(MessagesState)
    outer.add_node("team", graph(ChatOuroboros(ouroboros=speaker)))
    outer.add_edge(START, "team")
    app = outer.compile(checkpointer=InMemorySaver())
    for thread in ("1", "2"):
        app.invoke({"messages": [HumanMessage("hi")]}, {"configurable": {"thread_id": thread}})
    assert scopes(speaker) == [(f"conversation:{thread}", ("agent:team|writer",), ()) for thread in "12"]


async def test_an_agent_s_name_is_its_scope() -> None:
    speaker = Speaker("Yes.")
    model = ChatOuroboros(ouroboros=speaker, learn_agent=True)
    agent = create_agent(model, [], name="planner")
    await agent.ainvoke({"messages": [HumanMessage("hi")]}, CONFIG)
    list(agent.stream({"messages": [HumanMessage("hi")]}, CONFIG, stream_mode="messages"))
    assert scopes(speaker) == [("conversation:42", ("agent:planner",), ("agent:planner",))] * 2


async def test_threads_at_once_get_their_own_answers() -> None:
    speaker = Speaker(lambda prompt: f"You said {prompt[-1]['content']}.")
    app = graph(ChatOuroboros(ouroboros=speaker), InMemorySaver())

    async def ask(number: int) -> str:
        config: Any = {"configurable": {"thread_id": number}}
        answer = await app.ainvoke({"messages": [HumanMessage(f"number {number}")]}, config)
        return str(answer["messages"][-1].content)

    assert await asyncio.gather(*map(ask, range(20))) == [f"You said number {number}." for number in range(20)]
    for one in speaker.calls:
        assert one["prompt"][-1]["content"] == f"number {one['scope'].removeprefix('conversation:')}"


def test_phrases_of_an_agent_reach_its_other_conversations_only_if_wanted(tiny_ouroboros: Ouroboros) -> None:
    def forwards(thread: str, **settings: Any) -> int:
        model = ChatOuroboros(ouroboros=tiny_ouroboros, max_tokens=60, max_draft_tokens=31, **settings)
        config: Any = {"configurable": {"thread_id": thread}, "metadata": {"lc_agent_name": "planner"}}
        message: AIMessage = model.invoke("abab", config)
        return int(message.response_metadata["ouroboros"]["target_forwards"])

    cold = forwards("1")
    assert forwards("2") == cold
    assert forwards("3", learn_agent=True) == cold
    assert forwards("4") < cold


def test_what_an_agent_s_conversations_begin_with_is_read_once(tiny_ouroboros: Ouroboros) -> None:
    def cached(thread: str, system: str = "You plan journeys.", **settings: Any) -> int:
        settings = {"learn_agent": True, **settings}
        model = ChatOuroboros(ouroboros=tiny_ouroboros, max_tokens=4, **settings)
        config: Any = {"configurable": {"thread_id": thread}, "metadata": {"lc_agent_name": "planner"}}
        message: AIMessage = model.invoke([("system", system), ("human", f"I am {thread}.")], config)
        usage: Any = message.usage_metadata
        return int(usage["input_token_details"]["cache_read"])

    system = tiny_ouroboros.encode([{"role": "system", "content": "You plan journeys."}])
    assert cached("anna") == 0
    assert tiny_ouroboros.kv_usage.kept == 0, "it may be one that never comes again"
    instructions = cached("ben")
    assert 20 < instructions < len(system)
    assert cached("clara") == instructions, "nothing of what the others say"
    assert cached("anna") > instructions
    assert cached("dave", learn_agent=False) == 0
    assert cached("elif", system="You plan journeys by rail.") < instructions
    assert tiny_ouroboros.kv_usage.kept > 0


def test_instructions_that_cannot_be_kept_are_read_again(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> int:
        raise OptionError("there is no room")

    monkeypatch.setattr(tiny_ouroboros, "keep_prefix", refuse)
    model = ChatOuroboros(ouroboros=tiny_ouroboros, max_tokens=4, learn_agent=True)
    for thread in "ab":
        config: Any = {"configurable": {"thread_id": thread}, "metadata": {"lc_agent_name": "planner"}}
        assert model.invoke([("system", "You plan."), ("human", "hi")], config).usage_metadata
