"""Tools, reasoning and structured output of `ChatOuroboros`, over a scripted stand-in for the model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from conftest import tiny_model
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableBinding
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import BaseModel, Field
from speaker import HERMES, THINKING, Speaker, call
from typing_extensions import TypedDict

from langchain_ouroboros import ChatOuroboros
from ouroboros_llm import OptionError, Ouroboros, PromptError
from ouroboros_llm.chat import reply_grammar as forms


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Weather(BaseModel):
    """What the weather is like in a city."""

    city: str = Field(description="Its name")
    days: int = 1


class Joke(TypedDict):
    """A joke."""

    setup: Annotated[str, ..., "Its beginning"]
    punchline: str


SEARCH = {
    "title": "search",
    "description": "Searches.",
    "type": "object",
    "properties": {"query": {"type": "string"}},
    "required": ["query"],
}
PLAIN = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}<|assistant|>"
ADDED = call("add", '{"a": 1, "b": 2}')


def chat(*replies: Any, **settings: Any) -> tuple[ChatOuroboros, Speaker]:
    names = ("template", "cut", "end")
    speaker = Speaker(*replies, **{name: settings.pop(name) for name in names if name in settings})
    return ChatOuroboros(ouroboros=speaker, **settings), speaker


def names_of(asked: dict[str, Any]) -> list[str]:
    return [one["function"]["name"] for one in asked["tools"] or ()]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without grammars: replies are merely asked to have a form."""
    monkeypatch.setattr(forms, "connected", lambda: False)


# --- what the model is told ---


def test_tools_of_every_kind_are_in_the_prompt() -> None:
    def multiply(a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return a * b

    model, speaker = chat("Hm.")
    bound = model.bind_tools([add, multiply, Weather, Joke, SEARCH], strict=True)
    assert isinstance(bound, RunnableBinding)
    bound.invoke("hi")
    assert names_of(speaker.calls[0]) == ["add", "multiply", "Weather", "Joke", "search"]
    prompt = speaker.prompt()
    assert all(word in prompt for word in ('"multiply"', "The second.", "Its name", '"query"', "Its beginning"))
    assert "strict" not in prompt


async def test_tools_are_told_on_every_way_of_calling() -> None:
    model, speaker = chat("Hm.")
    bound = model.bind_tools([add])
    bound.invoke("hi")
    list(bound.stream("hi"))
    await bound.ainvoke("hi")
    [_ async for _ in bound.astream("hi")]
    bound.batch(["hi"])
    assert [names_of(one) for one in speaker.calls] == [["add"]] * 5


@pytest.mark.parametrize(
    ("choice", "told", "forced"),
    [
        (None, True, []),
        ("auto", True, []),
        ("none", False, []),
        (False, False, []),
        ("any", True, ["add", "search"]),
        ("required", True, ["add", "search"]),
        (True, True, ["add", "search"]),
        ("search", True, ["search"]),
        ({"type": "function", "function": {"name": "search"}}, True, ["search"]),
        ({"type": "tool", "name": "search"}, True, ["search"]),
        ({"type": "any"}, True, ["add", "search"]),
        ({"type": "auto"}, True, []),
    ],
)
def test_choices_of_tools(choice: Any, told: bool, forced: list[str], free: None) -> None:
    model, speaker = chat(call("search", '{"query": "x"}'))
    message = model.bind_tools([add, SEARCH], tool_choice=choice).invoke("hi")
    assert names_of(speaker.calls[0]) == (["add", "search"] if told else [])
    asked = speaker.calls[0]["prompt"][-1]["content"]
    assert asked == (f"hi\n\nAnswer by calling {' or '.join(forced)}." if forced else "hi")
    assert bool(message.tool_calls) is told


@pytest.mark.parametrize("choice", ["multiply", "", 1, {"type": "function"}, {"type": "web"}, {}, ["add"]])
def test_choices_that_are_none(choice: Any) -> None:
    model, _ = chat("Hm.")
    with pytest.raises(OptionError, match="tool_choice must be 'auto'.*add"):
        model.bind_tools([add], tool_choice=choice)


def test_wrong_tools() -> None:
    model, _ = chat("Hm.")
    with pytest.raises(OptionError, match="'any' needs tools"):
        model.bind_tools([], tool_choice="any")
    with pytest.raises(OptionError, match="tools must be functions with names, but got .*web_search"):
        model.bind_tools([{"type": "web_search"}])
    with pytest.raises(OptionError, match="response_format must be"):
        model.invoke("hi", response_format={"type": "yaml"})
    with pytest.raises(OptionError, match="takes no argument 'functions'"):
        model.bind_tools([add], functions=1).invoke("hi")


def test_a_template_that_only_names_tools_gets_them_in_words() -> None:
    model, speaker = chat("fine")
    speaker.tokenizer.chat_template = PLAIN.replace(
        "<|{{", "{% if 'tools' in message %}{{ message['tools'] }}{% endif %}<|{{"
    )
    model.bind_tools([add]).invoke([("system", "Be good."), ("human", "1 + 2?")])
    assert '"name": "add"' in speaker.prompt()
    with pytest.raises(PromptError, match="at least one message"):
        model.bind_tools([add]).invoke([])


@pytest.mark.parametrize("refused", ["{{ raise_exception('System role not supported') }}", ""])
def test_a_template_without_a_system_role_gets_its_words_from_the_user(refused: str) -> None:
    system = "{% if message['role'] == 'system' %}" + refused + "{% else %}<|{{ message['role'] }}|>"
    model, speaker = chat(
        "fine",
        template=PLAIN.replace("<|{{ message['role'] }}|>", system).replace("{% endfor %}", "{% endif %}{% endfor %}"),
    )
    messages = [
        SystemMessage("Be good."),
        HumanMessage("Hi"),
        AIMessage("Ho"),
        SystemMessage("Now."),
        HumanMessage("?"),
    ]
    assert model.invoke(messages).content == "fine"
    assert speaker.calls[-1]["prompt"] == [
        {"role": "user", "content": "Be good.\nHi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Now.\n?"},
    ]
    model.bind_tools([add]).invoke(messages)
    assert '"name": "add"' in speaker.prompt() and "Be good." in speaker.prompt()


def test_blocks_of_other_providers() -> None:
    model, speaker = chat("fine")
    refusal = AIMessage([{"type": "refusal", "refusal": "No."}, {"type": "server_tool_call", "name": "search"}])
    model.invoke([HumanMessage([{"type": "text-plain", "text": "A file."}]), refusal, HumanMessage("Why?")])
    assert [message["content"] for message in speaker.calls[-1]["prompt"]] == ["A file.", "No.", "Why?"]
    for block in ({"type": "text"}, {"type": "text-plain", "url": "there"}, {"type": "image", "url": "there"}):
        with pytest.raises(PromptError, match=f"a content block of type '{block['type']}'"):
            model.invoke([HumanMessage([block])])


def test_a_template_without_tools_gets_them_in_words() -> None:
    model, speaker = chat('{"name": "add", "arguments": {"a": 1, "b": 2}}', "3", template=PLAIN)
    bound = model.bind_tools([add])
    messages: list[Any] = [SystemMessage("Be brief."), HumanMessage("1 + 2?")]
    answer = bound.invoke(messages)
    messages += [answer, ToolMessage("3", tool_call_id=answer.tool_calls[0]["id"])]
    assert [(one["name"], one["args"]) for one in answer.tool_calls] == [("add", {"a": 1, "b": 2})]
    assert bound.invoke(messages).content == "3"
    first, second = speaker.calls
    assert first["tools"] is second["tools"] is None
    assert first["prompt"][0]["content"].startswith("Be brief.\n\nYou can call")
    assert '"description": "Add two numbers."' in first["prompt"][0]["content"]
    assert second["prompt"][1:] == [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
        {"role": "user", "content": "Result of add:\n3"},
    ]
    bound.invoke("hi")
    assert speaker.calls[-1]["prompt"][0]["content"].endswith("\n\nhi")


# --- what the model says ---


@pytest.mark.parametrize("cut", [1, 3, 1000])
async def test_calls_are_the_same_however_they_come(cut: int) -> None:
    text = "\n".join(["Let me add.", ADDED, call("search", '{"query": "größe"}')])
    model, _ = chat(text, cut=cut)
    bound = model.bind_tools([add, SEARCH])
    chunks: list[Any] = list(bound.stream("hi"))
    totals = [sum(chunks[1:], chunks[0]), bound.invoke("hi"), await bound.ainvoke("hi")]
    achunks: list[Any] = [chunk async for chunk in bound.astream("hi")]
    first, second = (call["id"] for call in totals[0].tool_calls)
    assert first != second and all(id.isalnum() and len(id) == 9 for id in (first, second))
    for message in [*totals, sum(achunks[1:], achunks[0])]:
        assert message.content == "Let me add."
        assert message.tool_calls == [
            {"name": "add", "args": {"a": 1, "b": 2}, "id": first, "type": "tool_call"},
            {"name": "search", "args": {"query": "größe"}, "id": second, "type": "tool_call"},
        ]
        assert message.invalid_tool_calls == []
        assert message.response_metadata["finish_reason"] == "tool_calls"
        assert [block["type"] for block in message.content_blocks] == ["text", "tool_call", "tool_call"]


def test_chunks_follow_the_rules_of_streams() -> None:
    model, _ = chat(f"Hm. {ADDED}")
    chunks: list[AIMessageChunk] = list(model.bind_tools([add]).stream("hi"))  # type: ignore[arg-type]
    assert [chunk.chunk_position for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].chunk_position == "last"
    assert not any(chunk.usage_metadata or chunk.response_metadata for chunk in chunks[:-1])
    parts = [part for chunk in chunks for part in chunk.tool_call_chunks]
    assert len(parts) > 3, "arguments come while they are said"
    assert parts[0]["name"] == "add" and parts[0]["id"]
    assert all(part["name"] is part["id"] is None for part in parts[1:])
    assert {part["index"] for part in parts} == {0}
    assert json.loads("".join(part["args"] or "" for part in parts)) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "arguments", ['{"a": 1, "b": "two', '{"a": 1, "b"', '{"a": [1, {"b": 2', '{"a": nothing}', '{"a": 1'], ids=str
)
async def test_calls_that_are_none_are_kept_as_such(arguments: str) -> None:
    model, _ = chat(f'<tool_call>{{"name": "add", "arguments": {arguments}', end="length")
    bound = model.bind_tools([add])
    message = await bound.ainvoke("hi")
    assert message.tool_calls == []
    (invalid,) = message.invalid_tool_calls
    assert invalid["name"] == "add" and invalid["id"]
    assert invalid["error"]
    assert (invalid["args"] or "").startswith(arguments[:8])
    assert message.response_metadata["finish_reason"] == "length"
    chunks: list[Any] = list(bound.stream("hi"))
    total = sum(chunks[1:], chunks[0])
    assert total.tool_calls == []
    assert [one["name"] for one in total.invalid_tool_calls] == ["add"]


def test_without_tools_text_is_text() -> None:
    model, _ = chat(ADDED)
    assert model.invoke("hi").content == ADDED


def test_one_call_at_most_where_several_are_not_wanted() -> None:
    model, _ = chat(f"{ADDED}\n{ADDED}")
    bound = model.bind_tools([add], parallel_tool_calls=False)
    assert len(bound.invoke("hi").tool_calls) == 1
    assert {part["index"] for chunk in bound.stream("hi") for part in chunk.tool_call_chunks} == {0}  # type: ignore[attr-defined]
    assert len(model.bind_tools([add]).invoke("hi").tool_calls) == 2


@pytest.mark.parametrize(
    ("template", "reply"), [(HERMES, "<think>\nHm. Well.\n</think>\n\nYes."), (THINKING, "Hm. Well.\n</think>\n\nYes.")]
)
def test_reasoning_is_no_content(template: str, reply: str) -> None:
    model, speaker = chat(reply, template=template)
    message = model.invoke("hi")
    assert (message.content, message.additional_kwargs["reasoning_content"]) == ("Yes.", "Hm. Well.")
    assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]
    chunks: list[Any] = list(model.stream("hi"))
    total = sum(chunks[1:], chunks[0])
    assert (total.content, total.additional_kwargs["reasoning_content"]) == ("Yes.", "Hm. Well.")
    model.invoke([HumanMessage("hi"), message, HumanMessage("ho")])
    assert "<think>Hm. Well.</think>Yes." in speaker.prompt()


def test_special_tokens_that_are_markers_are_asked_for() -> None:
    speaker = Speaker(ADDED)
    speaker.tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    ChatOuroboros(ouroboros=speaker).bind_tools([add]).invoke("hi")
    assert sorted(speaker.calls[0]["kept_tokens"].values()) == ["</tool_call>", "<tool_call>"]


# --- conversations with calls ---


def test_calls_of_earlier_turns_are_in_the_prompt_and_ids_are_new() -> None:
    model, speaker = chat(ADDED)
    bound = model.bind_tools([add])
    messages: list[Any] = [HumanMessage("hi")]
    for _ in range(3):
        answer = bound.invoke(messages)
        messages += [answer, ToolMessage("3", tool_call_id=answer.tool_calls[0]["id"])]
    given = [message.tool_calls[0]["id"] for message in messages[1::2]]
    assert len({*given, bound.invoke(messages).tool_calls[0]["id"]}) == 4
    assert speaker.prompt().count('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>') == 3
    assert speaker.calls[-1]["prompt"][2] == {
        "role": "tool",
        "content": "3",
        "name": "add",
        "tool_call_id": given[0],
    }


def test_ids_are_new_where_the_model_sees_the_end_of_a_conversation_only() -> None:
    model, _ = chat(ADDED)
    bound = model.bind_tools([add])

    def id_of(*messages: Any) -> str | None:
        return bound.invoke(list(messages)).tool_calls[0]["id"]

    assert id_of(HumanMessage("hi")) != id_of(HumanMessage("ho"))
    # A graph names its messages, so that the same words at another place are another question.
    assert id_of(HumanMessage("hi", id="1")) != id_of(HumanMessage("hi", id="2"))
    assert id_of(HumanMessage("hi")) == id_of(HumanMessage("hi"))


def test_samples_of_one_prompt_have_ids_of_their_own() -> None:
    model, _ = chat(ADDED)
    sampled, seeded = (model.bind_tools([add]).bind(temperature=1.0, seed=seed) for seed in (None, 3))
    assert sampled.invoke("hi").tool_calls[0]["id"] != sampled.invoke("hi").tool_calls[0]["id"]
    assert seeded.invoke("hi").tool_calls[0]["id"] == seeded.invoke("hi").tool_calls[0]["id"]


def test_arguments_are_text_for_a_template_that_wants_text() -> None:
    template = HERMES.replace("{{ call.function | tojson }}", "{{ call.function.name + call.function.arguments }}")
    model, speaker = chat("Hm.", template=template)
    calls = [{"name": "add", "args": {"a": 1}, "id": "1", "type": "tool_call"}]
    model.invoke([HumanMessage("hi"), AIMessage("", tool_calls=calls), ToolMessage("3", tool_call_id="1")])
    assert '<tool_call>add{"a": 1}</tool_call>' in speaker.prompt()


# --- forced calls and structured output, where the decoder keeps to no grammar ---


async def test_a_reply_that_is_not_the_forced_call_is_an_error(free: None) -> None:
    for reply, end in (("I would rather not.", "stop"), (ADDED, "stop"), ('<tool_call>{"name": "se', "length")):
        model, _ = chat(reply, end=end)
        bound = model.bind_tools([add, SEARCH], tool_choice="search")
        with pytest.raises(OutputParserException, match="had to call search") as error:
            bound.invoke("hi")
        assert ("raise max_tokens" in str(error.value)) is (end == "length")
        with pytest.raises(OutputParserException):
            await bound.ainvoke("hi")
        with pytest.raises(OutputParserException):
            list(bound.stream("hi"))


@pytest.mark.parametrize("schema", [Weather, Joke, SEARCH], ids=["pydantic", "typed-dict", "json-schema"])
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("include_raw", [False, True])
async def test_structured_output(schema: Any, method: Any, include_raw: bool, free: None) -> None:
    name, value = {
        id(Weather): ("Weather", {"city": "Oslo", "days": 2}),
        id(Joke): ("Joke", {"setup": "Knock knock", "punchline": "Größe"}),
        id(SEARCH): ("search", {"query": "x"}),
    }[id(schema)]
    text = json.dumps(value, ensure_ascii=False)
    model, speaker = chat(call(name, text) if method == "function_calling" else text)
    structured = model.with_structured_output(schema, method=method, include_raw=include_raw)
    expected = Weather(**value) if schema is Weather else value
    for answer in (structured.invoke("hi"), await structured.ainvoke("hi"), list(structured.stream("hi"))[-1]):
        if include_raw and "raw" in answer:
            assert answer["raw"].content or answer["raw"].tool_calls
            assert answer["parsing_error"] is None
        assert (answer["parsed"] if include_raw and "parsed" in answer else answer) in (
            expected,
            {"parsing_error": None},
        )
    asked = speaker.calls[0]["prompt"][-1]["content"]
    assert ("JSON Schema" in asked) is (method == "json_schema")
    assert names_of(speaker.calls[0]) == ([name] if method == "function_calling" else [])


def test_structured_output_that_is_none(free: None) -> None:
    model, _ = chat("Hm.")
    for method in ("json_schema", "json_mode"):
        with pytest.raises(OutputParserException):
            model.with_structured_output(Weather, method=method).invoke("hi")  # type: ignore[arg-type]
        raw = model.with_structured_output(Weather, method=method, include_raw=True).invoke("hi")  # type: ignore[arg-type]
        assert (raw["parsed"], type(raw["parsing_error"])) == (None, OutputParserException)
    assert chat('{"a": 1}')[0].with_structured_output(method="json_mode").invoke("hi") == {"a": 1}
    with pytest.raises(ValueError, match="Received unsupported arguments"):
        model.with_structured_output(Weather, colour="red")
    with pytest.raises(OptionError, match="method must be"):
        model.with_structured_output(Weather, method="xml")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="schema must be given"):
        model.with_structured_output()


# --- caches, counting, profiles ---


def test_other_tools_are_another_question() -> None:
    model, speaker = chat("Hm.", cache=InMemoryCache())
    for _ in range(2):
        model.invoke("hi")
        model.bind_tools([add]).invoke("hi")
        model.bind_tools([add, SEARCH]).invoke("hi")
        model.bind_tools([add], tool_choice="none").invoke("hi")
        model.invoke("hi", response_format={"type": "json_object"})
    assert len(speaker.calls) == 5


def test_tokens_of_messages_and_tools() -> None:
    model, speaker = chat("Hm.")
    messages = [HumanMessage("hi"), AIMessage("ho"), HumanMessage("hü")]
    for tools in ([], [add, Weather]):
        message = model.bind_tools(tools).invoke(messages)
        assert message.usage_metadata is not None
        assert model.get_num_tokens_from_messages(messages, tools=tools) == message.usage_metadata["input_tokens"]


def test_the_profile() -> None:
    model, _ = chat("Hm.")
    assert model.profile is not None
    assert (model.profile["name"], model.profile["max_input_tokens"]) == ("speaker", 999)
    assert (model.profile["max_output_tokens"], model.profile["tool_calling"]) == (999, True)
    assert model.profile["reasoning_output"] is True
    assert chat("Hm.", template=PLAIN)[0].profile["reasoning_output"] is False  # type: ignore[index]
    for name in ("nobody/has-it", "no-such-model"):
        unknown = ChatOuroboros(model=name)
        assert unknown.profile is not None
        assert unknown.profile["name"] == name
        assert "max_input_tokens" not in unknown.profile


def test_the_profile_of_a_model_that_is_not_loaded_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUROBOROS_MODEL", str(tmp_path))
    tiny_model().config.save_pretrained(tmp_path)
    profile = ChatOuroboros().profile
    assert profile is not None
    assert (profile["name"], profile["max_input_tokens"]) == (str(tmp_path), 511)


# --- agents ---


def graph(model: Any, checkpointer: Any = None) -> Any:
    bound = model.bind_tools([add])

    async def aask(state: MessagesState) -> Any:
        return {"messages": [await bound.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("model", aask)
    builder.add_node("tools", ToolNode([add]))
    builder.add_edge(START, "model")
    builder.add_conditional_edges("model", tools_condition)
    builder.add_edge("tools", "model")
    return builder.compile(checkpointer=checkpointer)


def told(prompt: Any) -> str:
    """Adds once, then says the result."""
    return f"It is {prompt[-1]['content']}." if prompt[-1]["role"] == "tool" else ADDED


ASK: Any = {"messages": [("human", "1 + 2?")]}


async def test_an_agent_uses_a_tool_and_says_the_result() -> None:
    model, _ = chat(told)
    agent = create_agent(model, [add], name="adder", checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    for number, answer in enumerate([agent.invoke(ASK, config), await agent.ainvoke(ASK, config)], 1):
        kinds = [message.type for message in answer["messages"]]
        assert kinds == ["human", "ai", "tool", "ai"] * number, "the checkpointer keeps the conversation"
        assert answer["messages"][-1].content == "It is 3."
        ids = [
            one["id"] for message in answer["messages"] if isinstance(message, AIMessage) for one in message.tool_calls
        ]
        assert len(set(ids)) == number


async def test_an_agent_streams_tokens_and_calls() -> None:
    model, _ = chat(told)
    agent = create_agent(model, [add])
    for parts in (
        list(agent.stream(ASK, stream_mode="messages")),
        [part async for part in agent.astream(ASK, stream_mode="messages")],
    ):
        chunks: list[Any] = [message for message, _ in parts if isinstance(message, AIMessageChunk)]
        assert "".join(chunk.content for chunk in chunks) == "It is 3."
        assert sum(bool(chunk.content) for chunk in chunks) > 1
        assert "".join(one["args"] for chunk in chunks for one in chunk.tool_call_chunks) == '{"a": 1, "b": 2}'


async def test_a_graph_loops_through_tools() -> None:
    model, _ = chat(told)
    app = graph(model, InMemorySaver())

    async def ask(number: int) -> str:
        answer = await app.ainvoke(ASK, {"configurable": {"thread_id": number}})
        return str(answer["messages"][-1].content)

    assert await asyncio.gather(*map(ask, range(8))) == ["It is 3."] * 8


async def test_an_agent_s_structured_answer(free: None) -> None:
    def answer(prompt: Any) -> str:
        said = "tool" in [message["role"] for message in prompt]
        return call("Weather", '{"city": "Oslo", "days": 3}') if said else ADDED

    model, _ = chat(answer)
    agent = create_agent(model, [add], response_format=Weather)
    for result in (agent.invoke(ASK), await agent.ainvoke(ASK)):
        assert result["structured_response"] == Weather(city="Oslo", days=3)


async def test_cancelling_an_agent_ends_the_decoding(tiny_ouroboros: Ouroboros) -> None:
    agent = create_agent(ChatOuroboros(ouroboros=tiny_ouroboros, max_tokens=400), [add])
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in agent.astream(ASK, stream_mode="messages"):
            begun.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    tiny_ouroboros._worker.settle()
    assert not tiny_ouroboros._worker.requests


def test_bad_tools_and_names_have_errors_that_help() -> None:
    model, _ = chat("fine")
    bad = {"type": "function", "function": {"name": "x", "description": "d", "parameters": "foo"}}
    with pytest.raises(OptionError, match="parameters of tool 'x' must be a JSON Schema"):
        model.bind_tools([bad])
    with pytest.raises(ValueError, match="did you mean 'max_tokens'"):
        ChatOuroboros(max_completion_tokens=5)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"expected one of: .*response_format.*stop.*tool_choice"):
        model.invoke("hi", zzz=1)
