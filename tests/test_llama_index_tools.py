"""Tools, reasoning, agents and structured output of LlamaIndex's `OuroborosLLM`: over a scripted stand-in for the
model, and where a grammar must do it, over random models."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_model
from llama_index.core import Document, PromptTemplate, SummaryIndex
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.memory import Memory
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.core.workflow import Context
from pydantic import BaseModel, Field
from speaker import HERMES, THINKING, Speaker, call

from llama_index.llms.ouroboros import OuroborosLLM
from llama_index.llms.ouroboros.prompts import chat_messages
from ouroboros_llm import Grammar, OptionError, Ouroboros
from ouroboros_llm.chat import reply_grammar as forms

PLAIN = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}<|assistant|>"
ADDED = call("add", '{"a": 1, "b": 2}')


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def search(query: str) -> str:
    """Search."""
    return f"nothing about {query}"


ADD, SEARCH = FunctionTool.from_defaults(add), FunctionTool.from_defaults(search)


class Seat(Enum):
    WINDOW = "Fenster"
    AISLE = "通路"


class Booking(BaseModel):
    """Book a flight."""

    name: str = Field(max_length=6)
    seat: Seat
    price: float = Field(ge=0, le=1e6)


class Tree(BaseModel):
    """A tree."""

    value: int = Field(ge=0, le=9)
    children: list[Tree] = Field(default_factory=list, max_length=1)


def asking(*replies: Any, **settings: Any) -> tuple[OuroborosLLM, Speaker]:
    names = ("template", "cut", "end")
    speaker = Speaker(*replies, **{name: settings.pop(name) for name in names if name in settings})
    return OuroborosLLM(ouroboros=stand_in(speaker), **settings), speaker


def stand_in(speaker: Speaker, **unset: Any) -> Any:
    """The speaker with what metadata ask of a model; arguments that calls may leave out are unset."""
    speaker.model = copy.copy(tiny_model())
    stream = speaker.stream
    speaker.stream = lambda prompt, **arguments: stream(
        prompt, **{"tools": None, "kept_tokens": {}, **unset, **arguments}
    )
    return speaker


def names_of(asked: dict[str, Any]) -> list[str]:
    return [one["function"]["name"] for one in asked["tools"] or ()]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without grammars: replies are merely asked to have a form."""
    monkeypatch.setattr(forms, "connected", lambda: False)


class TestPrompts:
    async def test_tools_are_told_on_every_way_of_calling(self) -> None:
        llm, speaker = asking("Hm.")
        llm.chat_with_tools([ADD, SEARCH], "hi")
        list(llm.stream_chat_with_tools([ADD, SEARCH], "hi"))
        await llm.achat_with_tools([ADD, SEARCH], "hi")
        [_ async for _ in await llm.astream_chat_with_tools([ADD, SEARCH], "hi")]
        llm.chat([ChatMessage("hi")], tools=[ADD, SEARCH])
        assert [names_of(one) for one in speaker.calls] == [["add", "search"]] * 5
        assert "Add two numbers." in speaker.prompt()
        assert speaker.calls[0]["prompt"] == [{"role": "user", "content": "hi"}]

    def test_the_callers_history_is_not_changed(self) -> None:
        llm, speaker = asking("Hm.")
        history = [ChatMessage("a", role="system")]
        llm.chat_with_tools([ADD], ChatMessage("b"), chat_history=history)
        assert history == [ChatMessage("a", role="system")]
        assert [message["content"] for message in speaker.calls[0]["prompt"]] == ["a", "b"]

    @pytest.mark.parametrize(
        ("settings", "told", "forced"),
        [
            ({}, True, []),
            ({"tool_choice": "auto"}, True, []),
            ({"tool_choice": "none"}, False, []),
            ({"tool_required": True}, True, ["add", "search"]),
            ({"tool_choice": "required"}, True, ["add", "search"]),
            ({"tool_choice": "any"}, True, ["add", "search"]),
            ({"tool_choice": "search"}, True, ["search"]),
            ({"tool_choice": "search", "tool_required": True}, True, ["search"]),
            ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, True, ["add"]),
        ],
    )
    def test_choices_of_tools(self, settings: Any, told: bool, forced: list[str], free: None) -> None:
        llm, speaker = asking(call("search", '{"query": "x"}'))
        llm.chat_with_tools([ADD, SEARCH], "hi", **settings)
        assert names_of(speaker.calls[0]) == (["add", "search"] if told else [])
        asked = speaker.calls[0]["prompt"][-1]["content"]
        assert asked == (f"hi\n\nAnswer by calling {' or '.join(forced)}." if forced else "hi")

    def test_wrong_choices(self) -> None:
        llm, speaker = asking("Hm.")
        with pytest.raises(OptionError, match="tool_choice must be 'auto'.*add"):
            llm.chat_with_tools([ADD], "hi", tool_choice="multiply")
        with pytest.raises(OptionError, match="needs tools, but there are none"):
            llm.chat_with_tools([], "hi", tool_required=True)
        with pytest.raises(OptionError, match="tools and response_format need chat messages"):
            llm.complete("hi", formatted=True, tools=[ADD])
        with pytest.raises(OptionError, match="grammar cannot be given beside"):
            llm.chat_with_tools([ADD], "hi", tool_required=True, grammar=Grammar.regex("a"))
        assert speaker.calls == []

    def test_no_tools_are_none(self) -> None:
        llm, speaker = asking("Hm.")
        assert llm.chat_with_tools([], "hi").message.content == "Hm."
        assert speaker.calls[0]["tools"] is None

    def test_a_template_without_tools_gets_them_in_words(self) -> None:
        llm, speaker = asking('{"name": "add", "arguments": {"a": 1, "b": 2}}', "3", template=PLAIN)
        messages = [ChatMessage("Be brief.", role="system"), ChatMessage("1 + 2?")]
        answer = llm.chat_with_tools([ADD], chat_history=messages).message
        (block,) = answer.blocks
        assert isinstance(block, ToolCallBlock) and block.tool_kwargs == {"a": 1, "b": 2}
        result = ChatMessage("3", role="tool", additional_kwargs={"tool_call_id": block.tool_call_id})
        assert llm.chat_with_tools([ADD], chat_history=[*messages, answer, result]).message.content == "3"
        first, second = speaker.calls
        assert first["tools"] is None
        assert first["prompt"][0]["content"].startswith("Be brief.\n\nYou can call")
        assert second["prompt"][1:] == [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"role": "user", "content": "Result of add:\n3"},
        ]

    def test_a_formatter_of_the_user_gets_them_in_words(self) -> None:
        def formatted(messages: Any) -> str:
            return "|".join(f"{message.role.value}: {message.content}" for message in messages)

        llm, speaker = asking('{"name": "add", "arguments": {"a": 1, "b": 2}}', messages_to_prompt=formatted)
        response = llm.chat_with_tools([ADD], "1 + 2?")
        assert llm.get_tool_calls_from_response(response)[0].tool_kwargs == {"a": 1, "b": 2}
        assert speaker.calls[0]["tools"] is None
        assert speaker.calls[0]["prompt"].startswith("user: You can call these functions")

    def test_calls_of_earlier_turns(self) -> None:
        calls = [
            ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs={"a": 1}),
            ToolCallBlock(tool_call_id="2", tool_name="add", tool_kwargs='{"a": 2}'),
        ]
        messages = [
            ChatMessage("hi"),
            ChatMessage(role="assistant", blocks=[ThinkingBlock(content="Hm."), TextBlock(text="So:"), *calls]),
            ChatMessage("1", role="tool", additional_kwargs={"tool_call_id": "1"}),
            ChatMessage("2", role="function", additional_kwargs={"tool_call_id": "2"}),
        ]
        _, assistant, *results = chat_messages(messages)
        assert (assistant["content"], assistant["reasoning_content"]) == ("So:", "Hm.")
        assert [one["function"]["arguments"] for one in assistant["tool_calls"]] == [{"a": 1}, {"a": 2}]
        assert results == [
            {"role": "tool", "content": number, "name": "add", "tool_call_id": number} for number in "12"
        ]
        older = {"tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}]}
        (assistant,) = chat_messages([ChatMessage(role="assistant", additional_kwargs=older)], "text")
        assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


class TestReplies:
    @pytest.mark.parametrize("cut", [1, 3, 1000])
    async def test_calls_are_the_same_however_they_come(self, cut: int) -> None:
        text = "\n".join(["Let me add.", ADDED, call("search", '{"query": "größe"}')])
        llm, _ = asking(text, cut=cut)
        given: dict[str, Any] = {"user_msg": "hi", "allow_parallel_tool_calls": True}
        responses = [
            llm.chat_with_tools([ADD, SEARCH], **given),
            list(llm.stream_chat_with_tools([ADD, SEARCH], **given))[-1],
            await llm.achat_with_tools([ADD, SEARCH], **given),
            [response async for response in await llm.astream_chat_with_tools([ADD, SEARCH], **given)][-1],
        ]
        first, second = (call.tool_id for call in llm.get_tool_calls_from_response(responses[0]))
        assert first != second
        for response in responses:
            assert [block.block_type for block in response.message.blocks] == ["text", "tool_call", "tool_call"]
            assert response.message.content == "Let me add."
            assert llm.get_tool_calls_from_response(response) == [
                ToolSelection(tool_id=first, tool_name="add", tool_kwargs={"a": 1, "b": 2}),
                ToolSelection(tool_id=second, tool_name="search", tool_kwargs={"query": "größe"}),
            ]
            assert response.raw["finish_reason"] == "tool_calls"
            assert json.loads(json.dumps(response.raw)) == response.raw
            json.loads(response.message.model_dump_json())

    def test_streams_are_cumulative(self) -> None:
        llm, _ = asking(f"Well. {ADDED}")
        responses = list(llm.stream_chat_with_tools([ADD], "hi"))
        assert "".join(response.delta or "" for response in responses) == responses[-1].message.content == "Well."
        arguments = [
            selection.tool_kwargs
            for response in responses
            for selection in llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
        ]
        assert {} in arguments and {"a": 1} in arguments and arguments[-1] == {"a": 1, "b": 2}
        assert [response.raw is None for response in responses] == [True] * (len(responses) - 1) + [False]

    def test_one_call_at_most_where_several_are_not_wanted(self) -> None:
        llm, _ = asking(f"{ADDED}\n{ADDED}")
        for parallel in (False, True):
            response = llm.chat_with_tools([ADD], "hi", allow_parallel_tool_calls=parallel)
            assert len(llm.get_tool_calls_from_response(response)) == 1 + parallel

    @pytest.mark.parametrize("arguments", ['{"a": 1, "b": "two', '{"a": 1, "b"', '{"a": nothing}'])
    async def test_calls_that_are_none_are_text(self, arguments: str) -> None:
        llm, _ = asking(f'<tool_call>{{"name": "add", "arguments": {arguments}', end="length")
        last = list(llm.stream_chat_with_tools([ADD], "hi"))[-1]
        for response in (last, await llm.achat_with_tools([ADD], "hi")):
            assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
            assert (response.message.content or "").startswith(f"add: {arguments[:6]}")
            assert response.message.additional_kwargs == {}
            with pytest.raises(ValueError, match="Expected at least one tool call.*add: "):
                llm.get_tool_calls_from_response(response)
            assert response.raw["finish_reason"] == "length"

    def test_without_tools_text_is_text(self) -> None:
        llm, _ = asking(ADDED)
        assert llm.chat([ChatMessage("hi")]).message.content == ADDED

    @pytest.mark.parametrize(
        ("template", "reply"),
        [(HERMES, "<think>\nHm. Well.\n</think>\n\nYes."), (THINKING, "Hm. Well.\n</think>\n\nYes.")],
    )
    def test_thoughts_are_no_text(self, template: str, reply: str) -> None:
        llm, speaker = asking(reply, template=template)
        message = llm.chat([ChatMessage("hi")]).message
        assert [block.block_type for block in message.blocks] == ["thinking", "text"]
        assert message.content == llm.complete("hi").text == "Yes."
        responses = list(llm.stream_chat([ChatMessage("hi")]))
        thoughts = "".join(response.additional_kwargs.get("thinking_delta", "") for response in responses)
        assert thoughts == "Hm. Well."
        assert responses[-1].message == message
        llm.chat([ChatMessage("hi"), message, ChatMessage("ho")])
        assert "<think>Hm. Well.</think>Yes." in speaker.prompt()

    def test_ids_are_new_in_the_conversation(self) -> None:
        llm, speaker = asking(ADDED)
        messages, given = [ChatMessage("hi")], set[str | None]()
        for number in range(3):
            answer = llm.chat_with_tools([ADD], chat_history=messages).message
            (block,) = answer.blocks
            assert isinstance(block, ToolCallBlock)
            given.add(block.tool_call_id)
            assert len(given) == number + 1
            result = ChatMessage("3", role="tool", additional_kwargs={"tool_call_id": block.tool_call_id})
            messages += [answer, result]
        llm.chat(messages)
        assert speaker.prompt().count('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>') == 3


class TestCalling:
    async def test_predict_and_call(self) -> None:
        llm, speaker = asking(ADDED)
        assert llm.predict_and_call([ADD, SEARCH], "1 + 2?").response == "3"
        assert (await llm.apredict_and_call([ADD, SEARCH], "1 + 2?")).response == "3"
        assert all("anyOf" in one["options"].grammar.source for one in speaker.calls)
        llm.predict_and_call([ADD], "1 + 2?", error_on_no_tool_call=False)
        llm.predict_and_call([ADD], "1 + 2?", tool_choice="auto")
        assert [one["options"].grammar for one in speaker.calls[2:]] == [None, None]

    def test_text_where_none_is_needed(self) -> None:
        llm, _ = asking("Three.")
        assert llm.predict_and_call([ADD], "1 + 2?", error_on_no_tool_call=False).response == "Three."
        with pytest.raises(ValueError, match="Expected at least one tool call, but the model said: 'Three.'"):
            llm.predict_and_call([ADD], "1 + 2?")

    def test_programs_of_llama_index(self) -> None:
        text = json.dumps({"name": "Anna", "seat": "Fenster", "price": 3.5})
        llm, speaker = asking(call("Booking", text))
        program = FunctionCallingProgram.from_defaults(Booking, "Book for {who}.", llm=llm)
        assert program(who="Anna") == Booking(name="Anna", seat=Seat.WINDOW, price=3.5)
        assert speaker.calls[0]["prompt"] == [{"role": "user", "content": "Book for Anna."}]
        assert list(program.stream_call(who="Anna"))[-1] == program(who="Anna")


class TestAgents:
    @pytest.mark.parametrize("streaming", [True, False])
    async def test_function_agent(self, streaming: bool) -> None:
        llm, speaker = asking(ADDED, "It is 3.", call("search", '{"query": "x"}'), "Nothing.")
        agent = FunctionAgent(tools=[ADD, SEARCH], llm=llm, system_prompt="Be brief.", streaming=streaming)
        context, memory = Context(agent), Memory.from_defaults()
        handler = agent.run("1 + 2?", ctx=context, memory=memory)
        events = [event async for event in handler.stream_events()]
        assert str(await handler) == "It is 3."
        results = [event for event in events if isinstance(event, ToolCallResult)]
        assert [(one.tool_name, str(one.tool_output)) for one in results] == [("add", "3")]
        assert any(isinstance(event, AgentStream) and event.delta for event in events) is streaming
        assert str(await agent.run("And x?", ctx=context, memory=memory)) == "Nothing."
        roles = [message["role"] for message in speaker.calls[-1]["prompt"]]
        assert roles == ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool"]
        assert "nothing about x" in speaker.prompt()
        # LlamaIndex writes a context without its memory.
        restored = Context.from_dict(agent, json.loads(json.dumps(context.to_dict())))
        assert str(await agent.run("And y?", ctx=restored, memory=memory)) == "Nothing."
        assert speaker.prompt().count("It is 3.") == 1

    async def test_the_first_call_is_forced(self) -> None:
        llm, speaker = asking(ADDED, "3.")
        agent = FunctionAgent(tools=[ADD, SEARCH], llm=llm, initial_tool_choice="add")
        assert str(await agent.run("1 + 2?")) == "3."
        first, second = speaker.calls
        assert '"name": "add"' in first["options"].grammar.before and second["options"].grammar is None

    async def test_agents_hand_over(self) -> None:
        handing = call("handoff", '{"to_agent": "adder", "reason": "numbers"}')
        llm, speaker = asking(handing, ADDED, "It is 3.")
        talker = FunctionAgent(name="talker", description="Talks.", llm=llm, can_handoff_to=["adder"])
        adder = FunctionAgent(name="adder", description="Adds.", tools=[ADD], llm=llm)
        workflow = AgentWorkflow(agents=[talker, adder], root_agent="talker")
        assert str(await workflow.run("1 + 2?")) == "It is 3."
        assert [names_of(one) for one in speaker.calls] == [["handoff"], ["add", "handoff"], ["add", "handoff"]]

    @pytest.mark.parametrize("streaming", [True, False])
    async def test_react_agent(self, streaming: bool) -> None:
        thought = 'Thought: I need to add.\nAction: add\nAction Input: {"a": 1, "b": 2}'
        llm, speaker = asking(thought, "Thought: I can answer.\nAnswer: It is 3.")
        agent = ReActAgent(tools=[ADD], llm=llm, streaming=streaming)
        assert str(await agent.run("1 + 2?", memory=Memory.from_defaults())) == "It is 3."
        assert "Observation: 3" in speaker.prompt()

    async def test_a_structured_end(self) -> None:
        text = json.dumps({"name": "Anna", "seat": "Fenster", "price": 3.5})
        llm, _ = asking("Done.", text)
        agent = FunctionAgent(tools=[ADD], llm=llm, output_cls=Booking)
        output = await agent.run("Book for Anna.")
        assert output.get_pydantic_model(Booking) == Booking(name="Anna", seat=Seat.WINDOW, price=3.5)

    async def test_agents_at_once(self) -> None:
        llm, _ = asking(lambda prompt: f"You said {prompt[-1]['content']}.")
        agent = FunctionAgent(tools=[ADD], llm=llm)
        answers = await asyncio.gather(*(agent.run(f"number {number}") for number in range(8)))
        assert [str(answer) for answer in answers] == [f"You said number {number}." for number in range(8)]


def ouroboros_of(template: str | None, seed: int = 0) -> Ouroboros:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = template
    return Ouroboros(tiny_model("qwen3", seed=seed, context=8192), tokenizer)


@pytest.fixture(params=[HERMES, THINKING, PLAIN, None], ids=["tools", "thinking", "plain", "no template"])
def random_llm(request: pytest.FixtureRequest) -> Iterator[OuroborosLLM]:
    pytest.importorskip("llguidance")
    with ouroboros_of(request.param) as ouroboros:
        yield OuroborosLLM(ouroboros=ouroboros, max_tokens=160)


PROMPT = PromptTemplate("About {topic}")


class TestForms:
    """The models are random: whatever fits is the grammar's doing."""

    @pytest.mark.parametrize("kind", [Booking, Tree])
    async def test_structured_prediction_always_parses(self, random_llm: OuroborosLLM, kind: Any) -> None:
        found = random_llm.structured_predict(kind, PROMPT, topic="flights")
        assert isinstance(found, kind)
        assert await random_llm.astructured_predict(kind, PROMPT, topic="flights") == found
        partial = list(random_llm.stream_structured_predict(kind, PROMPT, topic="flights"))
        assert partial[-1] == found and len(partial) > 1
        stream = await random_llm.astream_structured_predict(kind, PROMPT, topic="flights")
        assert [one async for one in stream][-1] == found
        warm = random_llm.structured_predict(kind, PROMPT, {"temperature": 1.5, "seed": 3}, topic="flights")
        assert isinstance(warm, kind)

    @pytest.mark.parametrize("mode", [PydanticProgramMode.FUNCTION, PydanticProgramMode.LLM])
    async def test_other_program_modes(self, mode: PydanticProgramMode) -> None:
        pytest.importorskip("llguidance")
        with ouroboros_of(HERMES) as ouroboros:
            llm = OuroborosLLM(ouroboros=ouroboros, max_tokens=160, pydantic_program_mode=mode)
            found = llm.structured_predict(Booking, PROMPT, topic="flights")
            assert isinstance(found, Booking)
            assert await llm.astructured_predict(Booking, PROMPT, topic="flights") == found

    async def test_structured_llms(self, random_llm: OuroborosLLM) -> None:
        structured = random_llm.as_structured_llm(Booking)
        raw = structured.chat([ChatMessage("hi")]).raw
        assert isinstance(raw, Booking)
        assert (await structured.achat([ChatMessage("hi")])).raw == raw
        assert list(structured.stream_chat([ChatMessage("hi")]))[-1].raw == raw
        assert isinstance(structured.complete("hi").raw, Booking)
        documents = [Document(text="The ouroboros eats its tail.")]
        llm = random_llm.model_copy(update={"context_window": 8000})
        engine = SummaryIndex.from_documents(documents).as_query_engine(llm=llm.as_structured_llm(Booking))
        assert isinstance(engine.query("Who?").response, Booking)

    async def test_forced_calls_fit(self, random_llm: OuroborosLLM) -> None:
        async def booked(**settings: Any) -> str:
            return Booking(**settings).model_dump_json()

        tool = FunctionTool.from_defaults(async_fn=booked, name="book", fn_schema=Booking)
        for settings in ({"tool_required": True}, {"tool_choice": "book"}):
            response = random_llm.chat_with_tools([tool], "hi", **settings)
            (selected,) = random_llm.get_tool_calls_from_response(response)
            assert selected.tool_name == "book" and Booking.model_validate(selected.tool_kwargs)
            last = list(random_llm.stream_chat_with_tools([tool], "hi", **settings))[-1]
            assert random_llm.get_tool_calls_from_response(last) == [selected]
        if random_llm.metadata.is_function_calling_model:
            assert Booking.model_validate_json((await random_llm.apredict_and_call([tool], "hi")).response)

    def test_a_choice_among_tools(self, random_llm: OuroborosLLM) -> None:
        for seed in range(3):
            response = random_llm.chat_with_tools(
                [ADD, SEARCH], "hi", tool_required=True, seed=seed, temperature=1.5, max_tokens=80
            )
            (selected,) = random_llm.get_tool_calls_from_response(response)
            assert set(selected.tool_kwargs) == ({"a", "b"} if selected.tool_name == "add" else {"query"})

    def test_a_grammar_of_the_call(self, random_llm: OuroborosLLM) -> None:
        grammar = Grammar.choices(["yes", "no"])
        assert random_llm.complete("hi", formatted=True, grammar=grammar).text in ("yes", "no")
        response = random_llm.chat([ChatMessage("hi")], response_format={"type": "json_object"})
        assert isinstance(json.loads(response.message.content or ""), dict)

    def test_too_little_room_is_said_before_anything_is_decoded(self, random_llm: OuroborosLLM) -> None:
        with pytest.raises(OptionError, match="max_tokens"):
            random_llm.structured_predict(Booking, PROMPT, {"max_tokens": 4}, topic="flights")
