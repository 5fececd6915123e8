"""`ChatOuroboros` and `OuroborosLLM`: over a scripted stand-in for what they call, and over a tiny model for real."""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, own_model
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.modifier import RemoveMessage
from langchain_core.outputs import LLMResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField

import langchain_ouroboros
from langchain_ouroboros import ChatOuroboros, OuroborosLLM, _base
from langchain_ouroboros._messages import to_dicts
from ouroboros_llm import (
    DecodingOptions,
    DecodingStatistics,
    GenerationResult,
    MissingExtraError,
    OptionError,
    Ouroboros,
    PromptError,
    RequestTimeoutError,
    StreamChunk,
    Usage,
)
from ouroboros_llm.defaults import DEFAULT_MODEL, DEFAULT_STORE

TEXTS = ("Ouro", "", "boros eats", " its tail")
CLASSES = (ChatOuroboros, OuroborosLLM)
STATISTICS = DecodingStatistics(
    rounds=3,
    target_forwards=4,
    completion_tokens=9,
    drafted_tokens=12,
    accepted_tokens=5,
    accepted_by_source={"phrases": 5},
    seconds=0.25,
)


class Scripted:
    """Has what the adapters use of an `Ouroboros`, and says the same whatever it is asked."""

    def __init__(self, texts: Sequence[str] = TEXTS) -> None:
        self.name, self.store, self.texts = "scripted", None, texts
        self.calls: list[dict[str, Any]] = []
        self.threads: set[int] = set()
        self.closed = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def encode(self, prompt: Any, *, tools: Any = None) -> list[int]:
        return list(str(prompt).encode()) + [0] * len(tools or ())

    def stream(self, prompt: Any, **arguments: Any) -> Iterator[StreamChunk]:
        self.calls.append({"prompt": prompt, **arguments})
        return self._stream(prompt)

    def _stream(self, prompt: Any) -> Iterator[StreamChunk]:
        try:
            for number, text in enumerate(self.texts):
                self.threads.add(threading.get_ident())
                assert self.go_on.wait(30)
                yield StreamChunk(text, (3 * number, 3 * number + 1, 3 * number + 2))
            usage = Usage(len(self.encode(prompt)), 9, cached_tokens=2)
            yield StreamChunk("", (), GenerationResult("".join(self.texts), tuple(range(9)), "stop", usage, STATISTICS))
        finally:
            self.closed.set()


class Listener(BaseCallbackHandler):
    """Takes down what LangChain reports."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.starts: list[dict[str, Any]] = []
        self.ends: list[LLMResult] = []
        self.errors: list[BaseException] = []

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.starts.append({"serialized": serialized, **kwargs})

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.starts.append({"serialized": serialized, **kwargs})

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:  # type: ignore[override]
        self.tokens.append(token)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.ends.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


def text_of(answer: Any) -> str:
    return str(getattr(answer, "content", answer))


async def texts_of(stream: Any) -> list[str]:
    return [text_of(piece) async for piece in stream]


async def until(event: threading.Event) -> None:
    """Wait for what another thread does, without taking the loop from others."""
    assert await asyncio.to_thread(event.wait, 30)


# --- invoke, stream, batch, and their async twins ---


@pytest.mark.parametrize("kind", CLASSES)
def test_every_way_of_calling_says_the_same(kind: Any, scripted: Scripted) -> None:
    model, answer = kind(ouroboros=scripted), "".join(TEXTS)
    assert text_of(model.invoke("hi")) == answer
    assert [text_of(chunk) for chunk in model.stream("hi")] == ["Ouro", "boros eats", " its tail", ""]
    assert [text_of(reply) for reply in model.batch(["hi", "ho", "ha"])] == [answer] * 3


@pytest.mark.parametrize("kind", CLASSES)
async def test_every_async_way_of_calling_says_the_same(kind: Any, scripted: Scripted) -> None:
    model, answer = kind(ouroboros=scripted), "".join(TEXTS)
    assert text_of(await model.ainvoke("hi")) == answer
    assert await texts_of(model.astream("hi")) == ["Ouro", "boros eats", " its tail", ""]
    assert [text_of(reply) for reply in await model.abatch(["hi", "ho", "ha"])] == [answer] * 3
    assert threading.get_ident() not in scripted.threads


def test_chat_prompts_are_messages_and_text_prompts_are_text(scripted: Scripted) -> None:
    ChatOuroboros(ouroboros=scripted).invoke("hi")
    OuroborosLLM(ouroboros=scripted).invoke("hi")
    assert [call["prompt"] for call in scripted.calls] == [[{"role": "user", "content": "hi"}], "hi"]


def test_a_model_ends_a_chain(scripted: Scripted) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Speak {language}."), ("human", "{text}")])
    chain = prompt | ChatOuroboros(ouroboros=scripted)
    assert chain.invoke({"language": "Latin", "text": "Hi"}).text == "".join(TEXTS)
    assert scripted.calls[0]["prompt"] == [
        {"role": "system", "content": "Speak Latin."},
        {"role": "user", "content": "Hi"},
    ]


def test_options_reach_the_decoder_and_those_of_a_call_win(scripted: Scripted) -> None:
    model = ChatOuroboros(ouroboros=scripted, temperature=0.5, top_k=7, max_tokens=5, seed=0, stop_sequences=["a"])
    model.invoke("hi")
    model.invoke("hi", stop=["b", "c"], temperature=0.9, max_tokens=6, logit_bias={3: -1.0})
    model.invoke("hi", stop=[])
    assert [call["options"] for call in scripted.calls] == [
        DecodingOptions(temperature=0.5, top_k=7, max_new_tokens=5, seed=0, stop=("a",)),
        DecodingOptions(temperature=0.9, top_k=7, max_new_tokens=6, seed=0, stop=("b", "c"), logit_bias={3: -1.0}),
        DecodingOptions(temperature=0.5, top_k=7, max_new_tokens=5, seed=0),
    ]


@pytest.mark.parametrize("kind", CLASSES)
async def test_stop_of_the_model_and_of_the_call_hold_on_every_path(kind: Any, scripted: Scripted) -> None:
    model = kind(ouroboros=scripted, stop="end")
    for stop in (None, ["halt"]):
        model.invoke("hi", stop=stop)
        list(model.stream("hi", stop=stop))
        model.batch(["hi"], stop=stop)
        await model.ainvoke("hi", stop=stop)
        await texts_of(model.astream("hi", stop=stop))
        model.bind(**({"stop": stop} if stop else {})).invoke("hi")
    assert [call["options"].stop for call in scripted.calls] == [("end",)] * 6 + [("halt",)] * 6


@pytest.mark.parametrize("kind", CLASSES)
async def test_the_scope_of_a_call_wins_on_every_path(kind: Any, scripted: Scripted) -> None:
    model = kind(ouroboros=scripted, scope="conversation:1", read_scopes=["corpus:a"])
    model.invoke("hi")
    bound = model.bind(scope="conversation:7", read_scopes=("corpus:b",))
    bound.invoke("hi")
    list(bound.stream("hi"))
    bound.batch(["hi"])
    await bound.ainvoke("hi")
    await texts_of(bound.astream("hi"))
    scopes = [(call["scope"], tuple(call["read_scopes"])) for call in scripted.calls]
    assert scopes == [("conversation:1", ("corpus:a",))] + [("conversation:7", ("corpus:b",))] * 5


# --- usage and metadata ---


def test_usage_and_metadata_of_a_message(scripted: Scripted) -> None:
    message = ChatOuroboros(ouroboros=scripted).invoke("hi")
    tokens = len(scripted.encode([{"role": "user", "content": "hi"}]))
    assert message.usage_metadata == {
        "input_tokens": tokens,
        "output_tokens": 9,
        "total_tokens": tokens + 9,
        "input_token_details": {"cache_read": 2},
    }
    assert message.response_metadata == {
        "model_name": "scripted",
        "model_provider": "ouroboros",
        "finish_reason": "stop",
        "ouroboros": {
            "rounds": 3,
            "target_forwards": 4,
            "draft_forwards": 0,
            "drafted_tokens": 12,
            "accepted_tokens": 5,
            "accepted_by_source": {"phrases": 5},
            "mean_acceptance_length": 2.25,
            "seconds": 0.25,
            "prefill_seconds": 0.0,
            "model_seconds": 0.0,
            "wait_seconds": 0.0,
            "load_seconds": 0.0,
            "tokens_per_second": 36.0,
        },
    }


async def test_chunks_add_up_to_the_message_and_only_the_last_has_metadata(scripted: Scripted) -> None:
    model = ChatOuroboros(ouroboros=scripted)
    for chunks in (list(model.stream("hi")), [chunk async for chunk in model.astream("hi")]):
        assert [chunk.chunk_position for chunk in chunks] == [None, None, None, "last"]
        assert not any(chunk.usage_metadata or chunk.response_metadata for chunk in chunks[:-1])
        total = sum(chunks[1:], chunks[0])
        message = model.invoke("hi")
        assert isinstance(total, AIMessageChunk)
        assert (total.content, total.usage_metadata) == (message.content, message.usage_metadata)
        assert total.response_metadata == message.response_metadata


def test_usage_and_metadata_of_texts(scripted: Scripted) -> None:
    result = OuroborosLLM(ouroboros=scripted).generate(["hi", "ho ho"])
    usage = {"prompt_tokens": 2 + 5, "completion_tokens": 18, "total_tokens": 25, "cached_tokens": 4}
    assert result.llm_output == {"token_usage": usage, "model_name": "scripted"}
    info = result.generations[1][0].generation_info
    assert info is not None
    assert (info["finish_reason"], info["model_name"], info["token_usage"]["prompt_tokens"]) == ("stop", "scripted", 5)
    assert info["ouroboros"]["mean_acceptance_length"] == 2.25


def test_token_counts_are_the_tokenizers_own(scripted: Scripted) -> None:
    chat, llm = ChatOuroboros(ouroboros=scripted), OuroborosLLM(ouroboros=scripted)
    messages = [HumanMessage("hi"), AIMessage("ho")]
    tokens = len(scripted.encode(to_dicts(messages)))
    assert chat.get_num_tokens("héllo") == 6
    assert chat.get_token_ids("hi") == [104, 105]
    assert chat.get_num_tokens_from_messages(messages) == tokens
    schema = {"title": "add", "description": "Adds.", "type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat.get_num_tokens_from_messages(messages, tools=[schema]) == tokens + 1
    assert llm.get_num_tokens_from_messages(messages) == len("Human: hi\nAI: ho")
    with pytest.raises(OptionError, match="tools"):
        llm.get_num_tokens_from_messages(messages, tools=[schema])
    assert ChatOuroboros(ouroboros=scripted, custom_get_token_ids=lambda text: [7]).get_num_tokens("hello") == 1


# --- callbacks and traces ---


@pytest.mark.parametrize("kind", CLASSES)
async def test_listeners_hear_every_token_once(kind: Any, scripted: Scripted) -> None:
    model, pieces = kind(ouroboros=scripted), ["Ouro", "boros eats", " its tail", ""]
    for call in (
        lambda config: list(model.stream("hi", config)),
        lambda config: texts_of(model.astream("hi", config)),
        lambda config: kind(ouroboros=scripted, streaming=True).invoke("hi", config),
        lambda config: kind(ouroboros=scripted, streaming=True).ainvoke("hi", config),
    ):
        listener = Listener()
        answer = call({"callbacks": [listener]})
        if asyncio.iscoroutine(answer):
            await answer
        assert listener.tokens == pieces
        assert [end.generations[0][0].text for end in listener.ends] == ["".join(TEXTS)]


@pytest.mark.parametrize("kind", CLASSES)
def test_listeners_hear_no_tokens_of_a_plain_invoke(kind: Any, scripted: Scripted) -> None:
    listener = Listener()
    kind(ouroboros=scripted).invoke("hi", {"callbacks": [listener]})
    assert listener.tokens == []


def test_tokens_of_several_texts_are_never_told_to_the_wrong_run(scripted: Scripted) -> None:
    first, second = Listener(), Listener()
    model = OuroborosLLM(ouroboros=scripted, streaming=True)
    model.batch(["hi", "ho"], [{"callbacks": [first]}, {"callbacks": [second]}])
    assert (first.tokens, second.tokens) == (["Ouro", "boros eats", " its tail", ""], [])


@pytest.mark.parametrize("kind", CLASSES)
async def test_events_carry_tokens(kind: Any, scripted: Scripted) -> None:
    events = [event async for event in kind(ouroboros=scripted).astream_events("hi", version="v2")]
    chunks = [event["data"]["chunk"] for event in events if event["event"].endswith("_stream")]
    assert "".join(chunk if isinstance(chunk, str) else text_of(chunk) for chunk in chunks) == "".join(TEXTS)


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_protocol_events_carry_text_usage_and_scope(scripted: Scripted) -> None:
    listener = Listener()
    model = ChatOuroboros(ouroboros=scripted)
    stream = model.stream_events("hi", {"callbacks": [listener]}, version="v3", scope="conversation:7")
    message = stream.output
    assert (message.text, message.usage_metadata["output_tokens"]) == ("".join(TEXTS), 9)
    assert listener.tokens == ["Ouro", "boros eats", " its tail", ""]
    assert scripted.calls[0]["scope"] == "conversation:7"


@pytest.mark.parametrize("kind", CLASSES)
async def test_traces_name_the_model_but_no_scope_store_or_key(kind: Any, scripted: Scripted) -> None:
    listener = Listener()
    model = kind(ouroboros=scripted, scope="secret-1", read_scopes=["secret-2"], api_key="secret-3", temperature=0.5)
    config = {"callbacks": [listener]}
    settings = {"scope": "secret-4", "read_scopes": ["secret-5"], "max_tokens": 9}
    model.invoke("hi", config, **settings)
    list(model.stream("hi", config, **settings))
    model.batch(["hi"], config, **settings)
    await model.ainvoke("hi", config, **settings)
    await texts_of(model.astream("hi", config, **settings))
    assert len(listener.starts) == 5
    for start in listener.starts:
        assert "secret" not in repr(start)
        assert start["metadata"]["ls_provider"] == "ouroboros"
        assert start["metadata"]["ls_model_name"] == "scripted"
        assert start["metadata"]["ls_temperature"] == 0.5
        assert start["metadata"]["ls_max_tokens"] == 9
        assert start["metadata"]["lc_versions"]["ouroboros-llm"]
        assert start["invocation_params"]["model"] == "scripted"
    shown = repr(model) + str(model) + repr(model.asdict())
    assert "secret" not in shown and "Scripted" not in shown
    assert "ouroboros" not in model.model_dump(exclude_defaults=True)


# --- caches ---


@pytest.mark.parametrize("kind", CLASSES)
async def test_a_cached_answer_is_shared_by_scopes_and_by_settings_of_speed(kind: Any, scripted: Scripted) -> None:
    cache = InMemoryCache()
    kind(ouroboros=scripted, cache=cache, scope="conversation:1").invoke("hi")
    again = kind(ouroboros=scripted, cache=cache, scope="conversation:2", timeout=60, api_key="key")
    again.invoke("hi", scope="conversation:3", timeout=9)
    await again.ainvoke("hi", read_scopes=["corpus:a"])
    assert len(scripted.calls) == 1


@pytest.mark.parametrize("kind", CLASSES)
async def test_a_cached_answer_is_not_shared_where_the_text_may_differ(kind: Any, scripted: Scripted) -> None:
    cache = InMemoryCache()
    differing: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5},
        {"temperature": 0.5, "seed": 0},
        {"max_tokens": 5},
        {"stop": ["a"]},
        {"stop": ["b"]},
        {"exact": True},
        {"logit_bias": {1: 2.0}},
    ]
    for settings in differing:
        model = kind(ouroboros=scripted, cache=cache, **settings)
        model.invoke("hi")
        model.invoke("hi")
    assert len(scripted.calls) == len(differing)
    model = kind(ouroboros=scripted, cache=cache)
    for settings in differing:  # the same settings given to the call are the same question
        model.invoke("hi", **settings)
        await model.ainvoke("hi", **settings)
    assert len(scripted.calls) == len(differing)


# --- the event loop, cancelling, time limits ---


@pytest.mark.parametrize("kind", CLASSES)
async def test_the_event_loop_runs_on_while_the_model_works(kind: Any, scripted: Scripted) -> None:
    scripted.go_on.clear()
    task = asyncio.create_task(kind(ouroboros=scripted).ainvoke("hi"))
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert not task.done()
    scripted.go_on.set()
    assert text_of(await task) == "".join(TEXTS)


@pytest.mark.parametrize("kind", CLASSES)
async def test_more_answers_at_once_than_a_thread_pool_holds(kind: Any) -> None:
    """Answers that wait must not keep those that could go on from doing so."""
    crowd, gate = 80, threading.Barrier(80)

    class Meeting(Scripted):
        def _stream(self, prompt: Any) -> Iterator[StreamChunk]:
            gate.wait(60)
            return super()._stream(prompt)

        def stream(self, prompt: Any, **arguments: Any) -> Iterator[StreamChunk]:
            yield from self._stream(prompt)

    model = kind(ouroboros=Meeting())
    answers = await asyncio.gather(*(texts_of(model.astream("hi")) for _ in range(crowd)))
    assert ["".join(answer) for answer in answers] == ["".join(TEXTS)] * crowd


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("call", ["ainvoke", "astream"])
async def test_a_cancelled_task_ends_the_decoding_within_a_round(kind: Any, call: str, scripted: Scripted) -> None:
    listener = Listener()
    scripted.go_on.clear()
    answer = getattr(kind(ouroboros=scripted), call)("hi", {"callbacks": [listener]})
    task = asyncio.ensure_future(texts_of(answer) if call == "astream" else answer)
    while not scripted.threads:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task  # at once, though the round is still running
    assert not scripted.closed.is_set()
    scripted.go_on.set()
    await until(scripted.closed)
    assert len(scripted.threads) == 1
    assert text_of(await kind(ouroboros=scripted).ainvoke("hi")) == "".join(TEXTS)


@pytest.mark.parametrize("kind", CLASSES)
async def test_a_stream_left_midway_ends_the_decoding(kind: Any, scripted: Scripted) -> None:
    model = kind(ouroboros=scripted)
    for _ in model.stream("hi"):
        break
    gc.collect()
    assert scripted.closed.is_set()
    scripted.closed.clear()
    stream = model.astream("hi")
    await anext(stream)
    await stream.aclose()
    del stream
    gc.collect()
    await until(scripted.closed)


@pytest.mark.parametrize("kind", CLASSES)
async def test_a_time_limit_ends_the_decoding(kind: Any, tiny_ouroboros: Ouroboros) -> None:
    model = kind(ouroboros=tiny_ouroboros, timeout=1e-9, max_tokens=40)
    with pytest.raises(RequestTimeoutError, match="timeout=1e-09") as error:
        model.invoke("hi")
    assert not tiny_ouroboros._worker.requests, error  # which keeps the frames of the call alive
    with pytest.raises(TimeoutError):
        await texts_of(model.astream("hi"))
    assert not tiny_ouroboros._worker.requests
    assert text_of(model.invoke("hi", timeout=60)) == text_of(
        kind(ouroboros=tiny_ouroboros, max_tokens=40).invoke("hi")
    )


@pytest.mark.parametrize("kind", CLASSES)
async def test_errors_of_the_model_reach_caller_and_listeners(kind: Any, scripted: Scripted) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[StreamChunk]:
        raise PromptError("prompt is empty")

    scripted.stream = fail  # type: ignore[method-assign]
    model, listener = kind(ouroboros=scripted), Listener()
    with pytest.raises(PromptError):
        model.invoke("hi", {"callbacks": [listener]})
    with pytest.raises(PromptError):
        await texts_of(model.astream("hi", {"callbacks": [listener]}))
    assert [type(error) for error in listener.errors] == [PromptError] * 2


# --- messages ---


def test_messages_in_a_row_by_one_speaker_are_merged() -> None:
    messages = [
        SystemMessage("Be brief."),
        SystemMessage("Be kind."),
        HumanMessage("Hello", name="ann"),
        HumanMessage("there", name="ann"),
        AIMessage("Hi"),
        AIMessageChunk(content="you"),
        ChatMessage("How", role="user", name="ann"),
        HumanMessage("are you?", name="bob"),
    ]
    assert to_dicts(messages) == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "Hello\nthere", "name": "ann"},
        {"role": "assistant", "content": "Hi\nyou"},
        {"role": "user", "content": "How\nare you?"},
    ]


def test_tool_calls_and_their_answers() -> None:
    calls = [{"name": "add", "args": {"a": 1}, "id": "call_1", "type": "tool_call"}]
    block = {"type": "tool_use", "name": "add", "input": {"a": 1}, "id": "call_1"}
    broken = {"name": "add", "args": '{"a": ', "id": "call_2", "error": None, "type": "invalid_tool_call"}
    messages = [
        AIMessage(
            [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Adding."}, block], tool_calls=calls
        ),
        ToolMessage("2", tool_call_id="call_1", name="add"),
        ToolMessage([{"type": "text", "text": "3"}, "!"], tool_call_id="call_2"),
        AIMessage("", invalid_tool_calls=[broken]),
        AIMessage("", tool_calls=calls),
    ]
    one = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    two = {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": '{"a": '}}
    assert to_dicts(messages) == [
        {"role": "assistant", "content": "Adding.", "tool_calls": [one]},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "call_1"},
        {"role": "tool", "content": "3!", "tool_call_id": "call_2"},
        {"role": "assistant", "content": "", "tool_calls": [two, one]},
    ]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}]), "'image_url'"),
        (HumanMessage([{"type": "thinking", "thinking": "Hm."}]), "'thinking'"),
        (AIMessage([{"type": "tool_use", "name": "add", "input": {}, "id": "1"}]), "'tool_use'"),
        (RemoveMessage(id="1"), "RemoveMessage"),
    ],
)
def test_what_is_not_text_is_refused(message: Any, named: str) -> None:
    with pytest.raises(PromptError, match=named):
        to_dicts([message])


# --- settings ---


@pytest.mark.parametrize("kind", CLASSES)
def test_constructing_loads_nothing_and_the_first_call_does(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []

    def shared(model: Any, **arguments: Any) -> Scripted:
        loads.append((model, arguments))
        return Scripted()

    monkeypatch.setattr(_base, "shared", shared)
    monkeypatch.delenv("OUROBOROS_MODEL", raising=False)
    model = kind()
    assert (model.model, loads) == (DEFAULT_MODEL, [])
    model.invoke("hi")
    arguments = {"draft_model": None, "device": "auto", "dtype": "auto", "quantization": None, "store": DEFAULT_STORE}
    assert loads == [(DEFAULT_MODEL, arguments)]
    kind(
        model_name="other", draft_model=Path("small"), device="cpu", dtype="float32", quantization="int8", store=None
    ).invoke("hi")
    arguments = {"draft_model": "small", "device": "cpu", "dtype": "float32", "quantization": "int8", "store": None}
    assert loads[1] == ("other", arguments)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_model_of_a_call(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_base, "shared", lambda model, **_: Scripted([model]))
    monkeypatch.setenv("OUROBOROS_MODEL", "mine")
    model, listener = kind(), Listener()
    assert text_of(model.invoke("hi")) == "mine"
    answer = model.invoke("hi", {"callbacks": [listener]}, model="other")
    assert text_of(answer) == "other"
    assert listener.starts[0]["metadata"]["ls_model_name"] == "other"
    generation = listener.ends[0].generations[0][0]
    metadata = generation.message.response_metadata if kind is ChatOuroboros else generation.generation_info
    assert metadata["model_name"] == "other"


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 0.5}, "'temprature'; did you mean 'temperature'"),
        ({"xyzzy": 1}, "'xyzzy'; expected one of: .*temperature"),
        ({"stop": ["a"], "stop_sequences": ["b"]}, "stop is given twice"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, but got 0"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": 0.5}, "top_p=0.5 has no effect without a temperature"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"read_scopes": "corpus:a"}, "read_scopes"),
        ({"model": "other"}, "model='other' has no effect beside ouroboros="),
        ({"draft_model": "small"}, "draft_model='small' has no effect"),
        ({"device": "cuda"}, "device='cuda' has no effect"),
        ({"dtype": "float16"}, "dtype='float16' has no effect"),
        ({"store": "sqlite:///phrases.db"}, "store has no effect"),
    ],
)
def test_wrong_settings_of_a_model(kind: Any, settings: dict[str, Any], message: str, scripted: Scripted) -> None:
    with pytest.raises(ValueError, match=message):
        kind(ouroboros=scripted, **settings)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 0.5}, "'temprature'; did you mean 'temperature'"),
        ({"functions": []}, "'functions'; expected one of: .*temperature"),
        ({"learn_agent": "yes"}, "learn_agent must be True or False, but got 'yes'"),
        ({"drafters": ["magic"]}, "magic"),
        ({"store": None}, "'store'"),
        ({"max_tokens": -1}, "max_tokens must be a whole number"),
        ({"top_k": 5}, "top_k=5 has no effect without a temperature"),
        ({"timeout": -1}, "timeout must be a positive number"),
        ({"read_scopes": "corpus:a"}, "read_scopes must be a list of names"),
        ({"model": "other"}, "model='other' has no effect beside ouroboros="),
    ],
)
async def test_wrong_settings_of_a_call(kind: Any, settings: dict[str, Any], message: str, scripted: Scripted) -> None:
    model = kind(ouroboros=scripted)
    with pytest.raises(OptionError, match=message):
        model.invoke("hi", **settings)
    with pytest.raises(OptionError, match=message):
        list(model.stream("hi", **settings))
    with pytest.raises(OptionError, match=message):
        await model.ainvoke("hi", **settings)
    with pytest.raises(OptionError, match=message):
        await texts_of(model.astream("hi", **settings))
    assert scripted.calls == []


def test_errors_show_no_secrets(scripted: Scripted) -> None:
    for settings in ({"temprature": 1}, {}):
        with pytest.raises(ValueError) as error:
            ChatOuroboros(ouroboros=scripted, store="postgresql://me:secret@host/db", api_key="secret", **settings)
        assert "secret" not in str(error.value)


def test_what_is_no_ouroboros_is_refused() -> None:
    with pytest.raises(ValueError, match="ouroboros must be an Ouroboros, but got str"):
        ChatOuroboros(ouroboros="smollm2-135m-instruct")


def test_a_configurable_setting(scripted: Scripted) -> None:
    model = ChatOuroboros(ouroboros=scripted).configurable_fields(max_tokens=ConfigurableField(id="limit"))
    model.invoke("hi")
    model.with_config(configurable={"limit": 3}).invoke("hi")
    assert [call["options"].max_new_tokens for call in scripted.calls] == [None, 3]


def test_texts_call_no_tools(scripted: Scripted) -> None:
    with pytest.raises(OptionError, match="'tools'; expected one of"):
        OuroborosLLM(ouroboros=scripted).invoke("hi", tools=[])


# --- the package ---


def test_public_names() -> None:
    assert langchain_ouroboros.__all__ == ["ChatOuroboros", "OuroborosLLM"]


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("langchain_core", MissingExtraError, r'pip install "ouroboros-llm\[langchain\]"'),
        ("pydantic", ModuleNotFoundError, "pydantic"),
    ],
)
def test_without_langchain_the_import_names_the_extra(
    missing: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "langchain_ouroboros":
            monkeypatch.delitem(sys.modules, name)
        elif name.partition(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(error, match=message) as caught:
        importlib.import_module("langchain_ouroboros")
    assert caught.type is error


# --- over a real, tiny model ---


def test_a_tiny_model_says_what_it_says_alone(tiny_ouroboros: Ouroboros) -> None:
    options = DecodingOptions(max_new_tokens=24)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = ChatOuroboros(ouroboros=tiny_ouroboros, max_tokens=24)
    llm = OuroborosLLM(ouroboros=tiny_ouroboros, max_tokens=24)
    assert chat.invoke([("system", "Be brief."), ("human", "Hi")]).content == (
        tiny_ouroboros.generate(messages, options=options).text
    )
    assert llm.invoke("Hi") == tiny_ouroboros.generate("Hi", options=options).text


@pytest.mark.parametrize("kind", CLASSES)
async def test_streams_of_a_tiny_model_add_up(kind: Any, tiny_ouroboros: Ouroboros) -> None:
    model = kind(ouroboros=tiny_ouroboros, max_tokens=40, scope="conversation:1")
    whole = text_of(model.invoke("Hi"))
    assert whole
    assert "".join(text_of(chunk) for chunk in model.stream("Hi")) == whole
    assert "".join(await texts_of(model.astream("Hi"))) == whole
    assert text_of(await model.ainvoke("Hi")) == whole
    assert [text_of(reply) for reply in await model.abatch(["Hi"] * 8)] == [whole] * 8


def test_a_tiny_model_stops_before_a_stop_string(tiny_ouroboros: Ouroboros) -> None:
    chat = ChatOuroboros(ouroboros=tiny_ouroboros, max_tokens=40)
    whole = chat.invoke("Hi").text
    stop = whole[3:5]
    message = chat.invoke("Hi", stop=[stop])
    assert message.text == whole[: whole.index(stop)]
    assert message.response_metadata["finish_reason"] == "stop"


def test_a_tiny_model_counts_as_it_is_asked(tiny_ouroboros: Ouroboros) -> None:
    messages: list[Any] = [SystemMessage("Be brief."), HumanMessage("Hi")]
    chat, llm = (kind(ouroboros=tiny_ouroboros, max_tokens=8) for kind in CLASSES)
    message = chat.invoke(messages)
    assert message.usage_metadata["input_tokens"] == chat.get_num_tokens_from_messages(messages)
    assert message.usage_metadata["output_tokens"] == 8
    assert message.response_metadata["finish_reason"] == "length"
    output = llm.generate(["Hi"]).llm_output
    assert output["token_usage"]["prompt_tokens"] == llm.get_num_tokens("Hi")


async def test_a_cancelled_tiny_model_answers_again(tiny_ouroboros: Ouroboros) -> None:
    chat = ChatOuroboros(ouroboros=tiny_ouroboros, max_tokens=40)
    whole = chat.invoke("Hi").text
    stream = chat.astream("Hi")
    await anext(stream)
    await stream.aclose()
    assert (await chat.ainvoke("Hi")).text == whole


def test_two_streams_of_a_tiny_model_take_turns(tiny_ouroboros: Ouroboros) -> None:
    chat = ChatOuroboros(ouroboros=tiny_ouroboros, max_tokens=30)
    whole = {prompt: chat.invoke(prompt).text for prompt in ("Hi", "Ho")}
    streams = [chat.stream(prompt) for prompt in whole]
    texts = [[next(stream).text] for stream in streams]
    assert chat.invoke("Hi").text == whole["Hi"]
    for stream, text in zip(streams, texts, strict=True):
        text.extend(chunk.text for chunk in stream)
    assert ["".join(text) for text in texts] == list(whole.values())


def test_a_model_in_a_folder_is_loaded_once_for_both_classes(tiny_ouroboros: Ouroboros, tmp_path: Path) -> None:
    tiny_ouroboros.model.save_pretrained(tmp_path)
    tiny_ouroboros.tokenizer.save_pretrained(tmp_path)
    models = [each(model=tmp_path, device="cpu", dtype="float32", store=None, max_tokens=12) for each in CLASSES]
    answers = [model.invoke("Hi") for model in models]
    prompts: list[Any] = [[{"role": "user", "content": "Hi"}], "Hi"]
    options = DecodingOptions(max_new_tokens=12)
    assert [text_of(answer) for answer in answers] == [
        tiny_ouroboros.generate(prompt, options=options).text for prompt in prompts
    ]
    assert models[0]._loaded() is models[1]._loaded()


class Meeting(Scripted):
    """Nobody gets an answer before all have asked."""

    def __init__(self, callers: int) -> None:
        super().__init__()
        self.all_here = threading.Barrier(callers)

    def _stream(self, prompt: Any) -> Iterator[StreamChunk]:
        self.all_here.wait(30)
        yield from super()._stream(prompt)


@pytest.mark.parametrize("cls", CLASSES)
async def test_batches_are_answered_at_once(cls: Any) -> None:
    for asynchronously in (False, True):
        llm = cls(ouroboros=Meeting(3))
        answers = await llm.abatch(["a", "b", "c"]) if asynchronously else llm.batch(["a", "b", "c"])
        assert [getattr(answer, "content", answer) for answer in answers] == ["".join(TEXTS)] * 3


@pytest.mark.parametrize("asynchronously", [False, True])
async def test_an_error_of_one_prompt_does_not_wait_for_the_others(asynchronously: bool) -> None:
    class Failing(Scripted):
        def _stream(self, prompt: Any) -> Iterator[StreamChunk]:
            if prompt == "bad":
                raise ZeroDivisionError
            yield from super()._stream(prompt)

    ouroboros = Failing()
    ouroboros.go_on.clear()
    llm = OuroborosLLM(ouroboros=ouroboros)
    with pytest.raises(ZeroDivisionError):
        await llm.abatch(["bad", "good"]) if asynchronously else llm.batch(["bad", "good"])
    ouroboros.go_on.set()


def test_an_error_of_one_prompt_ends_the_others() -> None:
    class Endless(Scripted):
        closed, begun = threading.Event(), threading.Event()

        def _stream(self, prompt: Any) -> Iterator[StreamChunk]:
            if prompt == "bad":
                assert self.begun.wait(30)
                raise ZeroDivisionError
            try:
                while True:
                    yield StreamChunk("a", (7,))
                    self.begun.set()
            finally:
                self.closed.set()

    ouroboros = Endless()
    with pytest.raises(ZeroDivisionError):
        OuroborosLLM(ouroboros=ouroboros).batch(["good", "bad"])
    assert ouroboros.closed.wait(30)


@pytest.mark.parametrize("cls", CLASSES)
async def test_a_batch_may_be_longer_than_the_queue(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.serving.stream.PLACES", 4)
    ouroboros = Ouroboros(own_model(), byte_tokenizer(), store=None, max_active=2, max_waiting=2)
    model = cls(ouroboros=ouroboros, max_tokens=4)
    assert len({text_of(answer) for answer in await model.abatch(["Hi"] * 12)}) == 1
