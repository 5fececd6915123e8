"""Forced calls and structured output over models that are random, so that whatever fits is the grammar's doing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, Literal

import pytest
from conftest import byte_tokenizer, tiny_model
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.messages import AIMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, Field
from speaker import HERMES, THINKING
from test_langchain_tools import PLAIN, SEARCH, Joke, Weather, add
from test_reply_templates import LAX_CALLS

from langchain_ouroboros import ChatOuroboros
from ouroboros_llm import DecodingOptions, OptionError, Ouroboros
from ouroboros_llm.chat.reply_grammar import call_options
from ouroboros_llm.tool_parsers import reply_of
from ouroboros_llm.tool_parsers.families import FAMILIES, Family

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")


class Seat(Enum):
    WINDOW = "Fenster"
    AISLE = "通路"


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int | None = Field(ge=0, le=120)


class Booking(BaseModel):
    """Book a flight."""

    passengers: list[Person] = Field(min_length=1, max_length=2)
    seat: Seat
    price: float | Literal["unknown"]
    extras: dict[str, bool] = Field(default_factory=dict, max_length=1)


class Tree(BaseModel):
    """A tree."""

    value: int = Field(ge=0, le=9)
    children: list[Tree]


def ouroboros_of(template: str, seed: int = 0) -> Ouroboros:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = template
    return Ouroboros(tiny_model("qwen3", seed=seed, context=8192), tokenizer)


@pytest.fixture(params=[HERMES, THINKING, PLAIN], ids=["tools", "thinking", "plain"])
def model(request: pytest.FixtureRequest) -> Iterator[ChatOuroboros]:
    with ouroboros_of(request.param) as ouroboros:
        yield ChatOuroboros(ouroboros=ouroboros, max_tokens=160)


TOOLS = {"function": add, "model": Weather, "typed": Joke, "schema": SEARCH, "nested": Booking, "recursive": Tree}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
async def test_a_forced_call_is_one(model: ChatOuroboros, tool: Any) -> None:
    bound: Any = model.bind_tools([tool], tool_choice="any")
    schema = bound.kwargs["tools"][0]["function"]
    message = bound.invoke("hi")
    (call,) = message.tool_calls
    assert (call["name"], message.content, message.invalid_tool_calls) == (schema["name"], "", [])
    jsonschema.validate(call["args"], schema["parameters"])
    chunks = list(bound.stream("hi"))
    total = sum(chunks[1:], chunks[0])
    assert total.tool_calls[0]["args"] == call["args"] == (await bound.ainvoke("hi")).tool_calls[0]["args"]
    assert message.response_metadata["finish_reason"] == "tool_calls"


def test_a_forced_choice_among_tools(model: ChatOuroboros) -> None:
    tools: Any = {"Booking": Booking, "search": SEARCH, "Weather": Weather}
    for choice in ("any", *tools):
        bound = model.bind_tools(list(tools.values()), tool_choice=choice)
        for seed in range(3):
            (call,) = bound.invoke("hi", seed=seed, temperature=1.5).tool_calls
            assert choice in ("any", call["name"])
            schema = tools[call["name"]]
            jsonschema.validate(call["args"], schema if isinstance(schema, dict) else schema.model_json_schema())


@pytest.mark.parametrize("schema", [Booking, Tree, Joke, SEARCH], ids=str)
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output_fits(model: ChatOuroboros, schema: Any, method: Any) -> None:
    structured = model.with_structured_output(schema, method=method, include_raw=True)
    for answer in (structured.invoke("hi"), await structured.ainvoke("hi")):
        assert answer["parsing_error"] is None
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            assert isinstance(answer["parsed"], schema)
        else:
            assert set(answer["parsed"]) <= {"setup", "punchline", "query"}


class Free(BaseModel):
    """Numbers of any size."""

    x: float
    y: float | None = None


def test_numbers_without_bounds_can_be_read(model: ChatOuroboros) -> None:
    forced = model.bind_tools([Free], tool_choice="any")
    for seed in range(6):
        (call,) = forced.invoke("hi", seed=seed, temperature=1.5).tool_calls
        assert abs(Free(**call["args"]).x) <= 1e18


@pytest.mark.parametrize("stop", ["\n", ",", '"'])
def test_stop_strings_do_not_cut_what_has_a_form(model: ChatOuroboros, stop: str) -> None:
    (call,) = model.bind_tools([add], tool_choice="any", stop=[stop]).invoke("hi").tool_calls
    assert set(call["args"]) == {"a", "b"}
    assert set(model.bind(stop=[stop]).invoke("hi", response_format=Tree).text) & {"{"}


def test_schemas_as_other_providers_take_them(model: ChatOuroboros) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    for given in (schema, {"name": "f", "schema": schema, "strict": True}):
        assert model.with_structured_output(given).invoke("hi") == {"a": 1}
    with pytest.raises(OptionError, match="schema must be a JSON Schema"):
        model.with_structured_output({"title": "f", "description": "says nothing"}).invoke("hi")


def test_calls_are_read_whatever_the_tokenizer_says_of_other_replies() -> None:
    with ouroboros_of(HERMES) as ouroboros:
        ouroboros.tokenizer.response_template = LAX_CALLS
        model = ChatOuroboros(ouroboros=ouroboros, max_tokens=160)
        (call,) = model.bind_tools([add], tool_choice="any").invoke("hi").tool_calls
        assert call["name"] == "add"
        assert isinstance(model.with_structured_output(Tree, method="function_calling").invoke("hi"), Tree)


def test_json_mode_says_an_object(model: ChatOuroboros) -> None:
    message = model.invoke("hi", response_format={"type": "json_object"})
    assert isinstance(json.loads(str(message.content)), dict)


def test_many_forced_calls_of_varied_schemas() -> None:
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 5},
        {"type": "integer", "minimum": -3, "maximum": 300},
        {"enum": ["größe", "日本", 'a "b"', None, 3]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        {
            "anyOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "properties": {"é": {"type": "number", "minimum": -1e6, "maximum": 1e6}},
                    "required": ["é"],
                },
            ]
        },
    ]
    with ouroboros_of(HERMES) as ouroboros:
        model = ChatOuroboros(ouroboros=ouroboros, max_tokens=120, temperature=1.0)
        for number in range(100):
            chosen = {f"p{n}": kinds[(number // 5**n + n) % len(kinds)] for n in range(1 + number % 3)}
            parameters = {"type": "object", "properties": chosen, "required": list(chosen)}
            tool = {"type": "function", "function": {"name": f"tool_{number}", "parameters": parameters}}
            (call,) = model.bind_tools([tool], tool_choice=f"tool_{number}").invoke("hi", seed=number).tool_calls
            jsonschema.validate(call["args"], parameters)


def test_what_cannot_be_kept_is_said_before_anything_is_decoded(model: ChatOuroboros) -> None:
    tool = {
        "title": "f",
        "description": "",
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": True}},
    }
    with pytest.raises(OptionError, match="uniqueItems"):
        model.bind_tools([tool], tool_choice="f").invoke("hi")
    with pytest.raises(OptionError, match="max_tokens"):
        model.bind_tools([Booking], tool_choice="any").invoke("hi", max_tokens=4)


def test_an_agent_s_structured_answer_needs_no_skill(model: ChatOuroboros) -> None:
    agent = create_agent(model, [], response_format=Booking)
    assert isinstance(agent.invoke({"messages": [("human", "hi")]})["structured_response"], Booking)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: (family.template or family.vocabulary)[0])
def test_whatever_family_forced_calls_are_read_back(family: Family) -> None:
    format = replace(family.format, bare=True)
    tools = [convert_to_openai_tool(tool) for tool in (add, Weather, SEARCH)]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    grammar = call_options(format, tools)["grammar"]
    seen = set()
    with Ouroboros(tiny_model("qwen3", context=8192), byte_tokenizer()) as ouroboros:
        for seed in range(3):
            options = DecodingOptions(grammar=grammar, max_new_tokens=300, temperature=2.0, seed=seed)
            text = ouroboros.generate("hi", options=options).text
            reading = format.stream(tools)
            (called,) = reply_of([*reading.push(text), *reading.end()]).tool_calls
            jsonschema.validate(called.arguments, schemas[called.name])
            seen.add(called.name)
    assert seen


class Itself(BaseModel):
    """A node."""

    less: Itself | None = None
    size: int = Field(ge=0, le=99)


@pytest.mark.parametrize("parallel", [True, False])
def test_beside_tools_a_reply_is_calls_or_json(model: ChatOuroboros, parallel: bool) -> None:
    tools: Any = {"Weather": Weather.model_json_schema(), "Itself": Itself.model_json_schema()}
    bound = model.bind_tools([Weather, Itself], response_format=Tree, parallel_tool_calls=parallel)
    kinds = set()
    for seed in range(8):
        message = bound.invoke("hi", seed=seed, temperature=2.0)
        assert message.invalid_tool_calls == []
        for called in message.tool_calls:
            jsonschema.validate(called["args"], tools[called["name"]])
        if not message.tool_calls:
            Tree.model_validate_json(message.text)
        kinds.add(len(message.tool_calls))
    assert 0 in kinds and 1 in kinds and (parallel or kinds == {0, 1})


def test_an_agent_with_tools_and_a_structured_answer(model: ChatOuroboros) -> None:
    agent = create_agent(model, [add], response_format=ProviderStrategy(Tree))
    first = next(iter(agent.stream({"messages": [("human", "hi")]}, stream_mode="updates")))["model"]
    (message,) = first["messages"]
    assert message.tool_calls or isinstance(first["structured_response"], Tree)
    assert message.invalid_tool_calls == []


def test_forced_text_costs_few_passes() -> None:
    with ouroboros_of(HERMES) as ouroboros:
        model = ChatOuroboros(ouroboros=ouroboros, max_tokens=200, max_draft_tokens=31)
        message: AIMessage = model.bind_tools([Weather], tool_choice="Weather").invoke("hi")
        assert message.usage_metadata is not None
        forwards = message.response_metadata["ouroboros"]["target_forwards"]
        assert forwards <= message.usage_metadata["output_tokens"] / 2


def test_a_schema_that_holds_itself_is_told_whole() -> None:
    with ouroboros_of(HERMES) as ouroboros:
        model: Any = ChatOuroboros(ouroboros=ouroboros)
        for bound in (
            model.bind_tools([Tree]).kwargs["tools"][0]["function"]["parameters"],
            model.with_structured_output(Tree).first.kwargs["response_format"]["json_schema"]["schema"],
        ):
            assert bound["$defs"]["Tree"]["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}
