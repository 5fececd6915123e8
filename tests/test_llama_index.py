"""`OuroborosLLM` for LlamaIndex: over a scripted stand-in for what it calls, and over a tiny model for real."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, own_model
from llama_index.core import Document, PromptTemplate, SummaryIndex
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler

from llama_index.llms import ouroboros as package
from llama_index.llms.ouroboros import OuroborosLLM, configuration
from llama_index.llms.ouroboros.prompts import chat_messages
from ouroboros_llm import (
    DecodingOptions,
    DecodingStatistics,
    GenerationResult,
    OptionError,
    Ouroboros,
    PromptError,
    RequestTimeoutError,
    StreamChunk,
    Usage,
)
from ouroboros_llm.defaults import DEFAULT_STORE

SYNC = ["complete", "chat", "stream_complete", "stream_chat"]
ASYNC = ["acomplete", "achat", "astream_complete", "astream_chat"]
STREAMS = ["stream_complete", "stream_chat", "astream_complete", "astream_chat"]
PATIENCE = 60
"""Seconds after which a test that would wait for ever fails; none takes this long."""


class ScriptedOuroboros:
    """Says what it is told to, and remembers what it was asked.

    `gate`, if given, is waited for before every piece but the first; `serial`: a lock is held for a whole answer.
    """

    name = "scripted"
    context_length = 2048

    def __init__(
        self,
        *texts: str,
        template: str | None = "yes",
        gate: threading.Event | None = None,
        serial: bool = False,
    ) -> None:
        self.texts, self.gate = texts or ("Once", " upon", " a time", ""), gate
        self.tokenizer = SimpleNamespace(chat_template=template)
        self.model = SimpleNamespace(generation_config=SimpleNamespace(max_new_tokens=None))
        self.prompts: list[Any] = []
        self.scopes: list[tuple[str | None, tuple[str, ...]]] = []
        self.options: list[DecodingOptions] = []
        self.threads: set[int] = set()
        self.waiting, self.closed = threading.Event(), threading.Event()
        self.lock: Any = threading.Lock() if serial else None

    def stream(
        self,
        prompt: Any,
        *,
        scope: str | None = None,
        read_scopes: Any = (),
        options: DecodingOptions | None = None,
        tools: Any = None,
    ) -> Iterator[StreamChunk]:
        assert options is not None and tools is None
        self.prompts.append(prompt)
        self.scopes.append((scope, tuple(read_scopes)))
        self.options.append(options)
        return self._pieces()

    def _pieces(self) -> Iterator[StreamChunk]:
        if self.lock:
            self.lock.acquire()
        try:
            for number, text in enumerate(self.texts):
                self.threads.add(threading.get_ident())
                if self.gate and number:
                    self.waiting.set()
                    assert self.gate.wait(PATIENCE), "the event loop did not run"
                yield StreamChunk(text, (number,), self._result() if number == len(self.texts) - 1 else None)
        finally:
            self.threads.add(threading.get_ident())
            if self.lock:
                self.lock.release()
            self.closed.set()

    def _result(self) -> GenerationResult:
        statistics = DecodingStatistics(
            rounds=3, target_forwards=2, completion_tokens=4, accepted_by_source={"phrases": 2}
        )
        return GenerationResult("".join(self.texts), (1, 2, 3, 4), "stop", Usage(7, 4, 5), statistics)


def ask(llm: OuroborosLLM, method: str, text: str = "Tell me", **kwargs: Any) -> Any:
    """The prompt through any method: the response, or the stream of them."""
    return getattr(llm, method)([ChatMessage(text)] if method.endswith("chat") else text, **kwargs)


async def responses(llm: OuroborosLLM, method: str, text: str = "Tell me", **kwargs: Any) -> list[Any]:
    """All responses of any method, in one list."""
    asked = ask(llm, method, text, **kwargs)
    if inspect.iscoroutine(asked):
        asked = await asked
    if isinstance(asked, AsyncGenerator):
        return [response async for response in asked]
    return list(asked) if isinstance(asked, Iterator) else [asked]


def text_of(response: Any) -> str:
    return response.text if hasattr(response, "text") else response.message.content


def wait(event: threading.Event) -> bool:
    return event.wait(PATIENCE)


@pytest.fixture
def scripted() -> ScriptedOuroboros:
    return ScriptedOuroboros()


@pytest.fixture
def llm(scripted: ScriptedOuroboros) -> OuroborosLLM:
    return OuroborosLLM(ouroboros=scripted)


class TestMethods:
    @pytest.mark.parametrize("method", SYNC + ASYNC)
    async def test_whole_text_usage_and_statistics(self, llm: OuroborosLLM, method: str) -> None:
        last = (await responses(llm, method))[-1]
        usage = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11, "cached_tokens": 5}
        assert text_of(last) == "Once upon a time"
        assert last.raw["usage"] == usage
        assert last.raw["finish_reason"] == "stop"
        assert last.raw["statistics"]["mean_acceptance_length"] == 2.0
        assert last.raw["statistics"]["accepted_by_source"] == {"phrases": 2}
        assert last.additional_kwargs == {**usage, **{key: last.raw[key] for key in ("finish_reason", "statistics")}}
        assert json.loads(json.dumps(last.raw)) == last.raw

    @pytest.mark.parametrize("method", STREAMS)
    async def test_streams_are_cumulative(self, llm: OuroborosLLM, method: str) -> None:
        streamed = await responses(llm, method)
        assert [response.delta for response in streamed] == ["Once", " upon", " a time", ""]
        assert [text_of(response) for response in streamed] == [
            "Once",
            "Once upon",
            "Once upon a time",
            "Once upon a time",
        ]
        assert [response.raw is None for response in streamed] == [True, True, True, False]

    @pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
    async def test_chat_answers_as_the_assistant(self, llm: OuroborosLLM, method: str) -> None:
        message = (await responses(llm, method))[-1].message
        assert message.role is MessageRole.ASSISTANT
        # History goes back into prompts; bookkeeping must not.
        assert message.additional_kwargs == {}

    def test_names(self, llm: OuroborosLLM) -> None:
        assert package.__all__ == ["OuroborosLLM", "ouroboros_scope"]
        assert llm.class_name() == "OuroborosLLM"
        assert llm.to_payload()["model_name"] == "scripted"

    def test_metadata_is_true_to_the_model(self, scripted: ScriptedOuroboros, llm: OuroborosLLM) -> None:
        metadata = llm.metadata
        assert (metadata.context_window, metadata.num_output, metadata.model_name) == (2048, 512, "scripted")
        assert metadata.is_chat_model and metadata.is_function_calling_model
        scripted.model.generation_config.max_new_tokens = 100
        assert llm.metadata.num_output == 100
        assert OuroborosLLM(ouroboros=scripted, max_tokens=30).metadata.num_output == 30
        assert OuroborosLLM(ouroboros=scripted, context_window=150).metadata.context_window == 150
        assert OuroborosLLM(ouroboros=scripted, context_window=150).metadata.num_output == 75
        scripted.tokenizer.chat_template = scripted.context_length = None
        assert not llm.metadata.is_chat_model and not llm.metadata.is_function_calling_model
        assert llm.metadata.context_window == 3900


class TestOptions:
    @pytest.mark.parametrize("method", SYNC + ASYNC)
    async def test_reach_the_decoder(self, scripted: ScriptedOuroboros, llm: OuroborosLLM, method: str) -> None:
        await responses(
            llm,
            method,
            temperature=0.5,
            max_tokens=9,
            stop=["\n"],
            seed=3,
            top_k=4,
            scope="agent:a",
            read_scopes=["corpus:b"],
        )
        assert scripted.options == [DecodingOptions(temperature=0.5, max_new_tokens=9, stop=("\n",), seed=3, top_k=4)]
        assert scripted.scopes == [("agent:a", ("corpus:b",))]

    def test_unset_is_unset(self, scripted: ScriptedOuroboros, llm: OuroborosLLM) -> None:
        llm.complete("x")
        assert scripted.options == [DecodingOptions()]
        assert scripted.scopes == [(None, ())]

    def test_every_field(self, scripted: ScriptedOuroboros) -> None:
        given: dict[str, Any] = {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "logit_bias": {5: -1.0},
            "seed": 1,
            "stop": "END",
            "exact": True,
            "max_draft_tokens": 2,
            "max_rounds": 4,
            "timeout": 60,
            "overflow": "slide",
        }
        llm = OuroborosLLM(ouroboros=scripted, max_tokens=8, scope="conversation:1", read_scopes=["corpus:b"], **given)
        llm.complete("x")
        assert scripted.options == [DecodingOptions(max_new_tokens=8, **{**given, "stop": ("END",)})]
        assert scripted.scopes == [("conversation:1", ("corpus:b",))]

    def test_a_call_overrides_and_none_keeps(self, scripted: ScriptedOuroboros) -> None:
        llm = OuroborosLLM(ouroboros=scripted, temperature=0.7, stop=["a"], scope="conversation:1")
        llm.complete("x", temperature=0, stop="b", scope="conversation:2")
        llm.complete("x", temperature=None, stop=None, scope=None)
        assert [options.temperature for options in scripted.options] == [0, 0.7]
        assert [options.stop for options in scripted.options] == [("b",), ("a",)]
        assert [scope for scope, _ in scripted.scopes] == ["conversation:2", "conversation:1"]

    def test_unknown_field_fails(self, scripted: ScriptedOuroboros) -> None:
        with pytest.raises(ValueError, match="temprature"):
            OuroborosLLM(ouroboros=scripted, temprature=0.5)

    @pytest.mark.parametrize("method", SYNC + ASYNC)
    async def test_unknown_keyword_fails(self, scripted: ScriptedOuroboros, llm: OuroborosLLM, method: str) -> None:
        with pytest.raises(OptionError, match="'temprature'; did you mean 'temperature'"):
            await responses(llm, method, temprature=0.5)
        with pytest.raises(OptionError, match="expected one of max_tokens, stop, temperature"):
            await responses(llm, method, zzz=1)
        assert scripted.prompts == []

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"temperature": -1.0}, "temperature must be a number"),
            ({"max_tokens": 0}, "^max_tokens must be a whole number of at least 1"),
            ({"top_p": 0.5}, "no effect without a temperature"),
            ({"stop": [""]}, "stop must be non-empty"),
        ],
    )
    def test_bad_options(self, scripted: ScriptedOuroboros, given: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            OuroborosLLM(ouroboros=scripted).complete("x", **given)
        with pytest.raises(ValueError, match=message.lstrip("^")):
            OuroborosLLM(ouroboros=scripted, **given)

    def test_prebuilt_and_model_contradict(self, scripted: ScriptedOuroboros) -> None:
        with pytest.raises(ValueError, match="model, device, store cannot be given beside ouroboros"):
            OuroborosLLM(ouroboros=scripted, model="other", device="cpu", store=None)


class TestPrompts:
    @pytest.mark.parametrize("method", ["complete", "stream_complete", "acomplete", "astream_complete"])
    async def test_formatted_goes_as_it_is(self, scripted: ScriptedOuroboros, method: str) -> None:
        llm = OuroborosLLM(ouroboros=scripted, system_prompt="Be brief.")
        await responses(llm, method, "<s>raw", formatted=True)
        await responses(llm, method, "question")
        system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "question"}
        assert scripted.prompts == ["<s>raw", [system, user]]

    def test_without_a_template_text_is_sent(self) -> None:
        scripted = ScriptedOuroboros(template=None)
        llm = OuroborosLLM(ouroboros=scripted, system_prompt="Be brief.")
        llm.complete("question")
        llm.chat([ChatMessage("question")])
        assert scripted.prompts == ["Be brief.\n\nquestion", "user: question\nassistant: "]

    def test_formatters_of_the_user(self, scripted: ScriptedOuroboros) -> None:
        llm = OuroborosLLM(
            ouroboros=scripted,
            messages_to_prompt=lambda messages: "|".join(str(message.content) for message in messages),
            completion_to_prompt=lambda prompt: f"[{prompt}]",
        )
        llm.complete("question")
        llm.complete("question", formatted=True)
        llm.chat([ChatMessage("a"), ChatMessage("b", role="assistant")])
        assert scripted.prompts == ["[question]", "question", "a|b"]

    def test_predict(self, scripted: ScriptedOuroboros) -> None:
        llm = OuroborosLLM(ouroboros=scripted, system_prompt="Be brief.")
        assert llm.predict(PromptTemplate("About {topic}"), topic="snakes") == "Once upon a time"
        assert scripted.prompts == [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "About snakes"}]
        ]

    def test_roles_in_a_row_are_merged(self) -> None:
        roles = ["system", "developer", "user", "user", "assistant", "model", "tool", "tool", "user"]
        messages = [ChatMessage(str(number), role=role) for number, role in enumerate(roles)]
        assert [(message["role"], message["content"]) for message in chat_messages(messages)] == [
            ("system", "0\n1"),
            ("user", "2\n3"),
            ("assistant", "4\n5"),
            ("tool", "6"),
            ("tool", "7"),
            ("user", "8"),
        ]

    def test_late_system_message_is_the_users(self) -> None:
        roles = ["system", "user", "assistant", "system"]
        merged = chat_messages([ChatMessage(role, role=role) for role in roles])
        assert [message["role"] for message in merged] == ["system", "user", "assistant", "user"]
        merged = chat_messages([ChatMessage("Hi"), ChatMessage("Stop now", role="system")])
        assert merged == [{"role": "user", "content": "Hi\nStop now"}]

    def test_text_blocks_only(self, scripted: ScriptedOuroboros, llm: OuroborosLLM) -> None:
        llm.chat([ChatMessage(blocks=[TextBlock(text="a"), TextBlock(text="b")])])
        assert scripted.prompts == [[{"role": "user", "content": "a\nb"}]]
        with pytest.raises(PromptError, match="a user message holds a ImageBlock"):
            llm.chat([ChatMessage(blocks=[ImageBlock(url="http://localhost/x.png")])])

    def test_the_callers_messages_are_not_changed(self, llm: OuroborosLLM) -> None:
        messages = [ChatMessage("a"), ChatMessage("b"), ChatMessage("c", role="system")]
        before = copy.deepcopy(messages)
        llm.chat(messages)
        assert messages == before


class TestEventLoop:
    @pytest.mark.parametrize("method", ASYNC)
    async def test_runs_during_a_generation(self, method: str) -> None:
        gate = threading.Event()
        scripted = ScriptedOuroboros(gate=gate)
        task = asyncio.create_task(responses(OuroborosLLM(ouroboros=scripted), method))
        assert await asyncio.to_thread(wait, scripted.waiting)
        # The generation waits for this line, which only a free loop can reach.
        gate.set()
        assert text_of((await task)[-1]) == "Once upon a time"
        assert threading.get_ident() not in scripted.threads

    @pytest.mark.parametrize("method", ASYNC)
    async def test_runs_while_loading(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        loading, gate = threading.Event(), threading.Event()

        def shared(*args: Any, **kwargs: Any) -> ScriptedOuroboros:
            loading.set()
            assert gate.wait(PATIENCE), "the event loop did not run"
            return ScriptedOuroboros()

        monkeypatch.setattr(configuration, "shared", shared)
        task = asyncio.create_task(responses(OuroborosLLM(), method))
        assert await asyncio.to_thread(wait, loading)
        gate.set()
        assert text_of((await task)[-1]) == "Once upon a time"

    @pytest.mark.parametrize("method", ASYNC)
    async def test_cancelling_closes_the_generation(self, method: str) -> None:
        gate = threading.Event()
        scripted = ScriptedOuroboros(gate=gate)
        task = asyncio.create_task(responses(OuroborosLLM(ouroboros=scripted), method))
        assert await asyncio.to_thread(wait, scripted.waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The caller is free at once, though the round still runs.
        assert not scripted.closed.is_set()
        gate.set()
        assert await asyncio.to_thread(wait, scripted.closed)

    async def test_more_streams_than_shared_threads(self) -> None:
        scripted = ScriptedOuroboros(serial=True)
        llm = OuroborosLLM(ouroboros=scripted)
        calls = asyncio.gather(*(responses(llm, ASYNC[number % 4]) for number in range(48)))
        assert len(await asyncio.wait_for(calls, PATIENCE)) == 48

    async def test_errors_come_through(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise PromptError("prompt is empty")

        scripted = ScriptedOuroboros()
        monkeypatch.setattr(scripted, "stream", refuse)
        for method in SYNC + ASYNC:
            with pytest.raises(PromptError, match="prompt is empty"):
                await responses(OuroborosLLM(ouroboros=scripted), method)


class GraphCapturer(BaseEventHandler):
    events: list[Any] = []

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)

    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


@pytest.fixture
def recorder() -> Iterator[GraphCapturer]:
    recorder, root = GraphCapturer(events=[]), get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


class TestClosing:
    """With handlers that keep what they are given, exceptions and their frames included."""

    @pytest.mark.parametrize("method", ["stream_complete", "stream_chat"])
    def test_sync(self, scripted: ScriptedOuroboros, recorder: GraphCapturer, method: str) -> None:
        llm = OuroborosLLM(ouroboros=scripted, callback_manager=CallbackManager([LlamaDebugHandler()]))
        stream = ask(llm, method)
        assert next(stream).delta == "Once"
        assert not scripted.closed.is_set()
        stream.close()
        assert scripted.closed.is_set()
        assert recorder.names()[-1] == "ExceptionEvent"

    @pytest.mark.parametrize("method", ["astream_complete", "astream_chat"])
    async def test_async(self, scripted: ScriptedOuroboros, recorder: GraphCapturer, method: str) -> None:
        llm = OuroborosLLM(ouroboros=scripted, callback_manager=CallbackManager([LlamaDebugHandler()]))
        stream = await ask(llm, method)
        assert (await anext(stream)).delta == "Once"
        assert not scripted.closed.is_set()
        await stream.aclose()
        assert await asyncio.to_thread(wait, scripted.closed)
        # Closing flushes the store, which the event loop must not wait for.
        assert threading.get_ident() not in scripted.threads
        assert recorder.names()[-1] == "ExceptionEvent"

    @pytest.mark.parametrize("method", STREAMS)
    async def test_never_started(self, scripted: ScriptedOuroboros, llm: OuroborosLLM, method: str) -> None:
        stream = ask(llm, method)
        if inspect.iscoroutine(stream):
            await (await stream).aclose()
        else:
            stream.close()
        assert scripted.prompts == []


class TestEvents:
    @pytest.mark.parametrize("method", SYNC + ASYNC)
    async def test_fire_in_order(self, llm: OuroborosLLM, recorder: GraphCapturer, method: str) -> None:
        await responses(llm, method, seed=5)
        kind = "Chat" if method.endswith("chat") else "Completion"
        progress = [f"LLM{kind}InProgressEvent"] * 4 if method in STREAMS else []
        assert recorder.names() == [f"LLM{kind}StartEvent", *progress, f"LLM{kind}EndEvent"]
        start, end = recorder.events[0], recorder.events[-1]
        assert start.additional_kwargs["seed"] == 5
        assert start.model_dict["class_name"] == "OuroborosLLM"
        assert start.span_id.startswith(f"OuroborosLLM.{method}-")
        assert end.response.raw["usage"]["total_tokens"] == 11

    @pytest.mark.parametrize("method", SYNC + ASYNC)
    async def test_tokens_are_counted(self, scripted: ScriptedOuroboros, method: str) -> None:
        counter = TokenCountingHandler(tokenizer=lambda text: pytest.fail("counts are the model's own"))
        await responses(OuroborosLLM(ouroboros=scripted, callback_manager=CallbackManager([counter])), method)
        assert (counter.prompt_llm_token_count, counter.completion_llm_token_count) == (7, 4)


class TestLoading:
    def test_only_when_needed_and_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []

        def shared(*args: Any, **kwargs: Any) -> ScriptedOuroboros:
            calls.append((args, kwargs))
            return ScriptedOuroboros()

        monkeypatch.setattr(configuration, "shared", shared)
        llm = OuroborosLLM(model=Path("/models/a"), draft_model="b", device=torch.device("cpu"), dtype=torch.float32)
        assert llm.to_payload() == {"class_name": "OuroborosLLM", "model_name": "/models/a"}
        copy.deepcopy(llm), llm.to_json()
        assert calls == []
        llm.complete("x")
        llm.complete("x")
        expected = {
            "draft_model": "b",
            "device": "cpu",
            "dtype": "float32",
            "quantization": None,
            "store": DEFAULT_STORE,
        }
        assert calls == [(("/models/a",), expected)]

    def test_defaults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OUROBOROS_MODEL", "from-the-environment")
        assert OuroborosLLM().to_payload()["model_name"] == "from-the-environment"

    def test_serialization(self) -> None:
        llm = OuroborosLLM(
            model="m", store="sqlite:///x.db", stop=["a"], scope="conversation:1", seed=2, logit_bias={3: 1}
        )
        restored = OuroborosLLM.from_dict(json.loads(llm.to_json()))
        assert restored.to_dict() == llm.to_dict()
        assert (restored.store, restored.stop, restored.logit_bias) == ("sqlite:///x.db", ["a"], {3: 1.0})
        assert OuroborosLLM.model_validate(llm.model_dump()).to_dict() == llm.to_dict()
        assert pickle.loads(pickle.dumps(llm)).to_dict() == llm.to_dict()

    @pytest.mark.parametrize(
        ("store", "kept"), [(None, True), ("sqlite:///x.db", True), ("postgresql://me:secret@host/db", False)]
    )
    def test_no_secret_and_no_lost_choice_in_serialization(self, store: str | None, kept: bool) -> None:
        dumped = OuroborosLLM(store=store).to_dict()
        assert ("store" in dumped) == kept
        assert "secret" not in json.dumps(dumped)
        assert "store" not in OuroborosLLM().to_dict()

    def test_a_prebuilt_one_is_shared_not_copied(self, scripted: ScriptedOuroboros, llm: OuroborosLLM) -> None:
        llm.complete("x")
        assert copy.deepcopy(llm).load() is scripted
        assert "ouroboros" not in llm.to_dict()
        restored = pickle.loads(pickle.dumps(llm))
        assert (restored.ouroboros, restored.model) == (None, "scripted")

    def test_missing_extra_names_the_command(self) -> None:
        code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("llama_index.core"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
try:
    import llama_index.llms.ouroboros
except ImportError as error:
    print(type(error).__name__, error)
"""
        path = Path(__file__).resolve().parents[1]
        output = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=path
        ).stdout
        assert "MissingExtraError" in output and 'pip install "ouroboros-llm[llama-index]"' in output


DOCUMENTS = [Document(text="The ouroboros eats its tail."), Document(text="The phoenix rises from ashes.")]


class TestEngines:
    def test_query_engine(self, scripted: ScriptedOuroboros, llm: OuroborosLLM) -> None:
        engine = SummaryIndex.from_documents(DOCUMENTS).as_query_engine(llm=llm)
        assert str(engine.query("Who eats what?")) == "Once upon a time"
        sent = scripted.prompts[-1][-1]["content"]
        assert all(text in sent for text in ("eats its tail", "rises from ashes", "Who eats what?"))

    async def test_async_and_streaming_query_engines(self, llm: OuroborosLLM) -> None:
        index = SummaryIndex.from_documents(DOCUMENTS)
        assert str(await index.as_query_engine(llm=llm).aquery("Who?")) == "Once upon a time"
        streamed = index.as_query_engine(llm=llm, streaming=True).query("Who?")
        assert list(streamed.response_gen) == ["Once", " upon", " a time", ""]

    async def test_chat_engine_remembers(self, scripted: ScriptedOuroboros, llm: OuroborosLLM) -> None:
        engine = SimpleChatEngine.from_defaults(llm=llm, system_prompt="Be brief.")
        engine.chat("first")
        await engine.achat("second")
        assert [(message["role"], message["content"]) for message in scripted.prompts[-1]] == [
            ("system", "Be brief."),
            ("user", "first"),
            ("assistant", "Once upon a time"),
            ("user", "second"),
        ]


@pytest.fixture
def tiny(tiny_ouroboros: Ouroboros) -> Callable[..., OuroborosLLM]:
    return lambda **kwargs: OuroborosLLM(ouroboros=tiny_ouroboros, **{"max_tokens": 24, **kwargs})


class TestTinyModel:
    def oracle(self, ouroboros: Ouroboros, prompt: Any) -> str:
        prompt_ids = ouroboros.encode(prompt)
        output = ouroboros.model.generate(torch.tensor([prompt_ids]), max_new_tokens=24, do_sample=False)
        return ouroboros.tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)

    @pytest.mark.parametrize("method", SYNC + ASYNC)
    async def test_says_what_the_model_says(
        self, tiny: Callable[..., OuroborosLLM], tiny_ouroboros: Ouroboros, method: str
    ) -> None:
        expected = self.oracle(tiny_ouroboros, [{"role": "user", "content": "Tell me"}])
        for _ in range(2):
            streamed = await responses(tiny(), method)
            assert text_of(streamed[-1]) == expected
            if method in STREAMS:
                assert "".join(response.delta for response in streamed) == expected
        assert streamed[-1].raw["usage"]["prompt_tokens"] > 0

    @pytest.mark.parametrize("method", SYNC + ASYNC)
    async def test_a_time_limit(
        self, tiny: Callable[..., OuroborosLLM], tiny_ouroboros: Ouroboros, method: str
    ) -> None:
        with pytest.raises(RequestTimeoutError, match="timeout=1e-09"):
            await responses(tiny(timeout=1e-9), method)
        assert not tiny_ouroboros._worker.requests
        assert text_of((await responses(tiny(timeout=PATIENCE), method))[-1])

    def test_stop_and_sampling(self, tiny: Callable[..., OuroborosLLM]) -> None:
        whole = tiny().complete("Tell me", formatted=True).text
        stop = whole[len(whole) // 2]
        stopped = tiny().complete("Tell me", formatted=True, stop=stop)
        assert stopped.text == whole.partition(stop)[0]
        assert stopped.raw["finish_reason"] == "stop"
        sampled = [tiny(temperature=5.0, seed=seed).complete("Tell me", formatted=True).text for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]

    async def test_conversations_at_once(self, tiny: Callable[..., OuroborosLLM]) -> None:
        llm = tiny()
        alone = [text_of(llm.complete(f"Prompt {number}")) for number in range(4)]
        together = await asyncio.gather(
            *(llm.acomplete(f"Prompt {number}", scope=f"conversation:{number}") for number in range(4))
        )
        assert [response.text for response in together] == alone

    async def test_abandoned_stream_leaves_the_model_usable(self, tiny: Callable[..., OuroborosLLM]) -> None:
        llm = tiny()
        expected = llm.complete("Tell me").text
        stream = await llm.astream_complete("Tell me")
        await anext(stream)
        await stream.aclose()
        assert (await llm.acomplete("Tell me")).text == expected

    @pytest.mark.parametrize("method", SYNC + ASYNC)
    async def test_empty_prompt(self, tiny: Callable[..., OuroborosLLM], method: str) -> None:
        with pytest.raises(PromptError, match="empty"):
            if method.endswith("chat"):
                stream = getattr(tiny(), method)([])
                stream = await stream if inspect.iscoroutine(stream) else stream
                _ = [part async for part in stream] if isinstance(stream, AsyncGenerator) else list(stream)
            else:
                await responses(tiny(), method, "", formatted=True)

    def test_query_engine(self, tiny: Callable[..., OuroborosLLM], tiny_ouroboros: Ouroboros) -> None:
        # LlamaIndex leaves 500 of its own tokens of padding, more than the tiny model's context.
        llm = tiny(context_window=2048)
        template = PromptTemplate("{context_str}\n{query_str}")
        engine = SummaryIndex.from_documents(DOCUMENTS).as_query_engine(llm=llm, text_qa_template=template)
        content = "\n\n".join(document.text for document in DOCUMENTS) + "\nWho eats what?"
        expected = self.oracle(tiny_ouroboros, [{"role": "user", "content": content}])
        assert str(engine.query("Who eats what?")) == expected


async def test_questions_at_once_may_be_more_than_the_queue_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.serving.stream.PLACES", 4)
    ouroboros = Ouroboros(own_model(), byte_tokenizer(), store=None, max_active=2, max_waiting=2)
    llm = OuroborosLLM(ouroboros=ouroboros, max_tokens=4)
    assert len({answer.text for answer in await asyncio.gather(*(llm.acomplete("Hi") for _ in range(12)))}) == 1
