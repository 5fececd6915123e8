"""Many callers of one `Ouroboros`: threads and tasks, their answers, their limits, and what they leave behind."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, own_model, plain, tiny_model

import ouroboros_llm.sessions.device_memory
from ouroboros_llm import (
    ContextLengthError,
    DecodingOptions,
    GenerationResult,
    MemoryLimitError,
    OptionError,
    Ouroboros,
    QueueFullError,
    RequestTimeoutError,
    custom_generate,
)
from ouroboros_llm.phrase_pool.memory import MemorySource
from ouroboros_llm.sessions.device_memory import free_bytes, needed_bytes
from ouroboros_llm.target_model.batching import Batcher
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.failures import out_of_memory
from ouroboros_llm.target_model.kv_cache import SlotLayer
from ouroboros_llm.target_model.prepared import prepare

PATIENCE = 120
ROOT = Path(__file__).resolve().parents[1]
CALLERS, REQUESTS = 16, 200
PROMPTS = [f"{number} green bottles" for number in range(10)]
LENGTHS = (5, 20, 33)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def asked(number: int) -> tuple[str, DecodingOptions]:
    """A request: one of ten prompts, of three lengths, every fourth one sampled."""
    sampling: dict[str, Any] = {"temperature": 0.8, "seed": number % 5} if number % 4 == 0 else {}
    return PROMPTS[number % 10], DecodingOptions(max_new_tokens=LENGTHS[number % 3], **sampling)


@pytest.fixture(scope="module")
def alone() -> list[tuple[int, ...]]:
    """What every request is answered by itself."""
    found: dict[Any, tuple[int, ...]] = {}
    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        for number in range(REQUESTS):
            prompt, options = asked(number)
            key = prompt, options
            if key not in found:
                found[key] = ouroboros.generate(prompt, scope=f"alone:{number}", options=options).token_ids
        return [found[asked(number)] for number in range(REQUESTS)]


def in_threads(ask: Callable[[int], None]) -> None:
    """Requests 0, 1, 2 ... by sixteen callers."""

    def calls(first: int) -> None:
        for number in range(first, REQUESTS, CALLERS):
            ask(number)

    threads = [threading.Thread(target=calls, args=(first,)) for first in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)


async def in_tasks(ask: Callable[[int], Any]) -> None:
    async def calls(first: int) -> None:
        for number in range(first, REQUESTS, CALLERS):
            await ask(number)

    await asyncio.wait_for(asyncio.gather(*(calls(first) for first in range(CALLERS))), PATIENCE)


def live_bytes() -> int:
    """Bytes of all keys and values in the process."""
    gc.collect()
    layers = [thing for thing in gc.get_objects() if isinstance(thing, SlotLayer) and thing.is_initialized]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@pytest.mark.parametrize("scopes", [1, 16])
def test_threads_get_what_they_would_get_alone(
    tiny_ouroboros: Ouroboros, alone: list[tuple[int, ...]], scopes: int
) -> None:
    answers: dict[int, GenerationResult] = {}

    def ask(number: int) -> None:
        prompt, options = asked(number)
        answers[number] = tiny_ouroboros.generate(prompt, scope=f"c{number % scopes}", options=options)

    in_threads(ask)
    assert [answers[number].token_ids for number in range(REQUESTS)] == alone


async def test_tasks_get_what_they_would_get_alone(tiny_ouroboros: Ouroboros, alone: list[tuple[int, ...]]) -> None:
    answers: dict[int, tuple[int, ...]] = {}

    async def ask(number: int) -> None:
        prompt, options = asked(number)
        if number % 2:
            answers[number] = (await tiny_ouroboros.agenerate(prompt, scope="tasks", options=options)).token_ids
        else:
            stream = tiny_ouroboros.astream(prompt, scope=f"c{number % 7}", options=options)
            answers[number] = tuple([token_id async for piece in stream for token_id in piece.token_ids])

    await in_tasks(ask)
    assert [answers[number] for number in range(REQUESTS)] == alone


async def test_cancelling_half_leaves_the_rest_intact(tiny_ouroboros: Ouroboros, alone: list[tuple[int, ...]]) -> None:
    of_others = live_bytes()
    for number in range(CALLERS):
        tiny_ouroboros.generate(*asked(number)[:1], scope=f"c{number}", options=asked(number)[1])
    answers: dict[int, tuple[int, ...]] = {}

    async def ask(number: int) -> None:
        prompt, options = asked(number)
        call = partial(tiny_ouroboros.astream, prompt, scope=f"c{number % CALLERS}", options=options)
        if number // CALLERS % 2:
            # Every other round of callers is cut off in the middle, in one of three ways.
            async with aclosing(call()) as stream:
                await anext(stream)
                if number % 3 == 0:
                    return
                task = asyncio.ensure_future(anext(stream, None))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        else:
            answers[number] = tuple([token_id async for piece in call() for token_id in piece.token_ids])

    await in_tasks(ask)
    tiny_ouroboros.flush()
    assert tiny_ouroboros._worker.requests == 0
    assert len(answers) == 104
    assert {number: alone[number] for number in answers} == answers
    usage = tiny_ouroboros.kv_usage
    assert usage.in_use == 0 and 0 < live_bytes() <= usage.idle + of_others


def test_a_short_answer_behind_a_long_one_comes_first(tiny_ouroboros: Ouroboros) -> None:
    ended: list[str] = []

    def ask(name: str, length: int) -> None:
        options = DecodingOptions(max_new_tokens=length, max_draft_tokens=0)
        result = tiny_ouroboros.generate(name, scope=name, options=options)
        assert len(result.token_ids) == length
        ended.append(name)

    long = threading.Thread(target=ask, args=("long", 480))
    long.start()
    until(lambda: tiny_ouroboros._worker.requests)
    ask("short", 20)
    long.join(PATIENCE)
    assert ended == ["short", "long"]


def test_a_long_prompt_does_not_hold_up_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.sessions.prefix_cache.PREFILL_CHUNK", 16)
    monkeypatch.setattr(Batcher, "make", lambda _, wanted: {wanted[0]: None})  # each pass by itself, to be counted
    widths: list[int] = []
    forward = EagerTarget._forward

    def noted(self: EagerTarget, draft: Any, logits_to_keep: int = 0) -> torch.Tensor:
        widths.append(draft.width)
        return forward(self, draft, logits_to_keep)

    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        monkeypatch.setattr(EagerTarget, "_forward", noted)
        answer = ouroboros.stream("a", scope="a", options=DecodingOptions(max_new_tokens=60, max_draft_tokens=0))
        next(answer)
        prompt = "b" * 333
        result = ouroboros.generate(prompt, scope="b", options=DecodingOptions(max_new_tokens=3, max_draft_tokens=0))
        assert list(result.token_ids) == plain(ouroboros.model, ouroboros.encode(prompt), 3)
        assert result.statistics.target_forwards == 3
        assert max(widths) == 16
        assert len([width for width in widths if width == 16]) >= 333 // 16
        assert len([*answer]) >= 50
        # What is read already is not read again.
        widths.clear()
        again = ouroboros.generate(
            [*ouroboros.encode(prompt), *result.token_ids, 9, 9], scope="b", options=DecodingOptions(max_new_tokens=1)
        )
        assert again.usage.cached_tokens >= 333 and sum(widths) < 64


def test_two_of_one_model_share_its_worker() -> None:
    with Ouroboros(tiny_model(), byte_tokenizer()) as one, Ouroboros(tiny_model(), byte_tokenizer()) as other:
        assert one._worker is other._worker
        assert Ouroboros(tiny_model("qwen3"), byte_tokenizer())._worker is not one._worker


def test_custom_generate_gets_its_turn_beside_streams(tiny_ouroboros: Ouroboros) -> None:
    stream = tiny_ouroboros.stream("a b c", options=DecodingOptions(max_new_tokens=300, max_draft_tokens=0))
    read = threading.Thread(target=list, args=(stream,))
    read.start()
    ids = torch.tensor([tiny_ouroboros.encode("some prompt")])
    model: Any = tiny_ouroboros.model
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=custom_generate, max_new_tokens=20, do_sample=False
    )
    assert output[0, ids.shape[1] :].tolist() == plain(model, ids[0].tolist(), 20)
    read.join(PATIENCE)


def test_one_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = own_model()
    go_on = threading.Event()
    verify = EagerTarget.verify
    with Ouroboros(model, byte_tokenizer(), max_active=1, max_waiting=2) as ouroboros:
        monkeypatch.setattr(EagerTarget, "verify", lambda *given: go_on.wait(PATIENCE) and verify(*given))
        streams = [ouroboros.stream(str(number), options=DecodingOptions(max_new_tokens=5)) for number in range(4)]
        threads = [threading.Thread(target=list, args=(stream,)) for stream in streams[:3]]
        for thread in threads:
            thread.start()
        until(lambda: ouroboros._worker.requests == 3)
        with pytest.raises(QueueFullError, match="1 may take turns and 2 wait"):
            next(streams[3])
        go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(list(streams[3])) > 1
    with pytest.raises(OptionError, match="max_waiting must be a whole number"):
        Ouroboros(model, byte_tokenizer(), max_waiting=0)


def test_cancelling_from_another_thread_returns_what_was_said(tiny_ouroboros: Ouroboros) -> None:
    source = tiny_ouroboros.store
    options = DecodingOptions(max_new_tokens=400, max_draft_tokens=0)
    stream = tiny_ouroboros.stream("abc", scope="c", options=options)
    pieces = [next(stream) for _ in range(5)]
    canceller = threading.Thread(target=stream.cancel)
    canceller.start()
    canceller.join()
    pieces += stream
    result = pieces[-1].result
    assert result is not None and result.finish_reason == "cancelled"
    assert 5 <= len(result.token_ids) < 50
    assert result.token_ids == tuple(token_id for piece in pieces for token_id in piece.token_ids)
    assert result.text == "".join(piece.text for piece in pieces)
    assert list(result.token_ids) == plain(tiny_ouroboros.model, tiny_ouroboros.encode("abc"), len(result.token_ids))
    assert source.open("c", fingerprint=tiny_ouroboros.fingerprint).match(result.token_ids[:3])
    assert list(stream) == []


def test_cancelled_before_it_began_is_an_empty_answer(tiny_ouroboros: Ouroboros) -> None:
    stream = tiny_ouroboros.stream("abc")
    stream.cancel()
    (piece,) = stream
    assert piece.result is not None
    assert (piece.result.finish_reason, piece.result.token_ids) == ("cancelled", ())
    assert piece.result.statistics.target_forwards == 0


def test_a_closed_stream_is_empty(tiny_ouroboros: Ouroboros) -> None:
    stream = tiny_ouroboros.stream("abc")
    stream.close()
    assert list(stream) == []
    stream = tiny_ouroboros.stream("abc")
    next(stream)
    stream.close()
    assert list(stream) == [] and tiny_ouroboros._worker.requests == 0


def test_what_a_cancelled_task_said_is_learned_when_the_store_is_flushed() -> None:
    async def ask(ouroboros: Ouroboros) -> list[int]:
        async with aclosing(ouroboros.astream("abc", scope="c")) as stream:
            return [token_id for _ in range(3) for token_id in (await anext(stream)).token_ids]

    source = MemorySource()
    with Ouroboros(tiny_model(), byte_tokenizer(), store=source) as ouroboros:
        said = asyncio.run(ask(ouroboros))
    pool = source.open("c", fingerprint=ouroboros.fingerprint)
    assert pool.match(said[:2])[0].token_ids[0] == said[2]


async def test_the_event_loop_runs_while_a_prompt_is_read(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_thread, ran = threading.get_ident(), threading.Event()
    encode = Ouroboros.encode

    def slow(self: Ouroboros, *given: Any, **named: Any) -> list[int]:
        assert threading.get_ident() != loop_thread
        assert ran.wait(PATIENCE), "the event loop did not run"
        return encode(self, *given, **named)

    monkeypatch.setattr(Ouroboros, "encode", slow)
    task = asyncio.create_task(tiny_ouroboros.agenerate("abc", options=DecodingOptions(max_new_tokens=5)))
    await asyncio.sleep(0.01)
    ran.set()
    assert len((await task).token_ids) == 5


async def test_a_stream_can_be_read_by_an_event_loop(tiny_ouroboros: Ouroboros) -> None:
    options = DecodingOptions(max_new_tokens=30)
    pieces = [piece async for piece in tiny_ouroboros.stream("abc", options=options)]
    assert pieces[-1].result is not None
    assert pieces[-1].result.token_ids == tiny_ouroboros.generate("abc", scope="x", options=options).token_ids


async def test_answers_that_an_event_loop_waits_for_take_no_threads(tiny_ouroboros: Ouroboros) -> None:
    streams = [tiny_ouroboros.astream("abc", scope=str(number)) for number in range(40)]
    await asyncio.gather(*(anext(stream) for stream in streams))
    await asyncio.to_thread(until, lambda: sum("ouroboros_" in thread.name for thread in threading.enumerate()) == 0)
    assert tiny_ouroboros._worker.requests == 40
    for stream in streams:
        await stream.aclose()
    await asyncio.to_thread(until, lambda: not tiny_ouroboros._worker.requests)


def test_a_time_limit(tiny_ouroboros: Ouroboros) -> None:
    with pytest.raises(RequestTimeoutError, match="timeout=1e-09"):
        tiny_ouroboros.generate("abc", options=DecodingOptions(timeout=1e-9))
    assert tiny_ouroboros._worker.requests == 0
    result = tiny_ouroboros.generate("abc", options=DecodingOptions(max_new_tokens=5, timeout=PATIENCE))
    assert len(result.token_ids) == 5


def test_max_rounds(tiny_ouroboros: Ouroboros) -> None:
    wanted = plain(tiny_ouroboros.model, tiny_ouroboros.encode("abc"), 40)
    for rounds in (1, 4):
        options = DecodingOptions(max_new_tokens=40, max_rounds=rounds, max_draft_tokens=0)
        result = tiny_ouroboros.generate("abc", scope=f"{rounds}", options=options)
        assert (result.statistics.rounds, result.finish_reason) == (rounds, "length")
        assert list(result.token_ids) == wanted[: rounds + 1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(timeout=0), "timeout must be a positive number of seconds, but got 0"),
        (dict(timeout=True), "timeout"),
        (dict(timeout=float("nan")), "timeout"),
        (dict(max_rounds=0), "max_rounds must be a whole number of at least 1"),
        (dict(overflow="drop"), "overflow must be 'error' or 'slide', but got 'drop'"),
    ],
)
def test_bad_limits_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        DecodingOptions(**given)


def test_text_slides(tiny_ouroboros: Ouroboros) -> None:
    prompt = "".join(chr(97 + number % 26) for number in range(600))
    with pytest.raises(ContextLengthError, match="600 tokens.*overflow='slide'"):
        tiny_ouroboros.generate(prompt, options=DecodingOptions(max_new_tokens=10))
    result = tiny_ouroboros.generate(prompt, options=DecodingOptions(max_new_tokens=10, overflow="slide"))
    assert (result.usage.prompt_tokens, result.usage.dropped_tokens) == (502, 98)
    assert list(result.token_ids) == plain(tiny_ouroboros.model, tiny_ouroboros.encode(prompt[98:]), 10)
    # Of what is wanted, a quarter of the context is granted for certain.
    result = tiny_ouroboros.generate(prompt, options=DecodingOptions(max_new_tokens=400, overflow="slide"))
    assert result.usage.prompt_tokens == 384
    ids = [1, *tiny_ouroboros.encode(prompt)]
    result = tiny_ouroboros.generate(ids, options=DecodingOptions(max_new_tokens=10, overflow="slide"))
    assert list(result.token_ids) == plain(tiny_ouroboros.model, [1, *ids[-501:]], 10)
    fitting = tiny_ouroboros.generate("abc", options=DecodingOptions(max_new_tokens=10, overflow="slide"))
    assert fitting.usage.dropped_tokens == 0


def test_conversations_slide(tiny_ouroboros: Ouroboros) -> None:
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"{number}" * 90} for number, role in enumerate(roles)]
    options = DecodingOptions(max_new_tokens=10, overflow="slide")
    result = tiny_ouroboros.generate(messages, options=options)
    # Whole exchanges go: no result of a tool stays without the question that it belongs to.
    kept = tiny_ouroboros.encode([messages[0], *messages[5:]])
    assert list(result.token_ids) == plain(tiny_ouroboros.model, kept, 10)
    whole = len(tiny_ouroboros.encode(messages))
    assert result.usage.dropped_tokens == whole - len(kept) > 0
    assert result.usage.prompt_tokens == len(kept)
    # The last message and the system's stay, however little fits.
    tight = [{"role": "system", "content": "s" * 200}, *messages[1:-1], {"role": "user", "content": "u" * 200}]
    result = tiny_ouroboros.generate(tight, options=options)
    assert list(result.token_ids) == plain(tiny_ouroboros.model, tiny_ouroboros.encode([tight[0], tight[-1]]), 10)
    too_long = [{"role": "system", "content": "s" * 300}, *messages[1:-1], {"role": "user", "content": "u" * 300}]
    with pytest.raises(ContextLengthError, match="shorten the system messages or the last one"):
        tiny_ouroboros.generate(too_long, options=options)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral_sliding", "gemma3_mixed", "gpt_neox"])
def test_bytes_of_a_token_are_those_that_a_cache_takes(architecture: str) -> None:
    prepared = prepare(tiny_model(architecture))
    target = EagerTarget(tiny_model(architecture), "none")
    target.prefill([5] * 256)
    counted = prepared.probe.token_bytes
    assert counted is not None
    assert counted == target.cache.nbytes // 256
    heads = 4 if architecture in ("gpt2", "gpt_neox") else 2
    assert counted == 2 * 2 * heads * 8 * 4  # keys and values, layers, heads, head size, float32
    needed = needed_bytes(prepared, 1000)
    assert needed is not None and needed > 1000 * counted


@pytest.mark.parametrize("architecture", ["mamba_plain", "lfm2_chains"])
def test_bytes_of_other_states_are_unknown(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needed_bytes(prepare(tiny_model(architecture)), 1000) is None
    monkeypatch.setattr(ouroboros_llm.sessions.device_memory, "free_bytes", lambda device: 0)
    with Ouroboros(tiny_model(architecture), byte_tokenizer()) as ouroboros:
        assert ouroboros.generate("abc", options=DecodingOptions(max_new_tokens=3)).token_ids


def test_this_machine_has_memory() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 1 << 20
    assert free_bytes(torch.device("meta")) is None


def test_memory_of_a_container_counts(tmp_path: Path) -> None:
    assert ouroboros_llm.sessions.device_memory._left_in_group(tmp_path) is None
    for name, text in {"max": "1000", "current": "700", "stat": "anon 300\ninactive_file 250"}.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert ouroboros_llm.sessions.device_memory._left_in_group(tmp_path) == 550
    (tmp_path / "memory.max").write_text("max\n")
    assert ouroboros_llm.sessions.device_memory._left_in_group(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       7 kB\n")
    assert ouroboros_llm.sessions.device_memory._available(tmp_path / "meminfo") == 7 * 1024
    assert ouroboros_llm.sessions.device_memory._available(tmp_path / "nothing") is None


def test_what_does_not_fit_is_refused_before_it_is_read(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DecodingOptions(max_new_tokens=40)
    tiny_ouroboros.generate("abc", scope="a", options=options)
    monkeypatch.setattr(EagerTarget, "_forward", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(ouroboros_llm.sessions.device_memory, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match=r"43 tokens .* need .* \(\d+ bytes\).* \(1000 bytes\) free; shorten"):
        tiny_ouroboros.generate("abc", scope="b", options=options)
    assert tiny_ouroboros._sessions.sessions.open("a").shelf.idle == [], "idle caches go first"
    monkeypatch.undo()
    assert len(tiny_ouroboros.generate("abc", scope="b", options=options).token_ids) == 40


def test_idle_caches_make_room(tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_ouroboros.generate("abc", scope="a", options=DecodingOptions(max_new_tokens=40))
    free = iter([1000, 1 << 30])
    monkeypatch.setattr(ouroboros_llm.sessions.device_memory, "free_bytes", lambda device: next(free))
    tiny_ouroboros.generate("abc", scope="b", options=DecodingOptions(max_new_tokens=5))
    assert tiny_ouroboros._sessions.sessions.open("a").shelf.idle == []
    assert tiny_ouroboros._sessions.sessions.open("a").memory.successors, "what was learned stays"


class Starved:
    """`EagerTarget._forward` that runs out of memory on demand, in the middle of the pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[int, int], bool]) -> None:
        """`when` gets the number of the pass and its width."""
        self.widths: list[int] = []
        self.targets: list[EagerTarget] = []
        self.failures = 0
        self._forward, self._when = EagerTarget._forward, when
        monkeypatch.setattr(EagerTarget, "_forward", lambda *given, **named: self._run(*given, **named))

    def _run(self, target: EagerTarget, draft: Any, logits_to_keep: int = 0) -> torch.Tensor:
        self.widths.append(draft.width)
        self.targets.append(target)
        logits = self._forward(target, draft, logits_to_keep)
        if self._when(len(self.widths), draft.width):
            self.failures += 1
            # The first layer has got no further than before, the others hold what the pass wrote.
            target.cache.states.layers[0].length = len(target.token_ids)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits


# Of a fixed width, so that measured pass times have no say.
GREEDY = DecodingOptions(max_new_tokens=40, max_draft_tokens=6)
SAMPLED = DecodingOptions(max_new_tokens=40, max_draft_tokens=6, temperature=0.7, seed=3)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_out_of_memory_drops_drafts_first(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch, options: DecodingOptions
) -> None:
    wanted = tiny_ouroboros.generate("abcabc", scope="a", options=options).token_ids
    starved = Starved(monkeypatch, lambda number, width: number > 1 and width > 1)
    result = tiny_ouroboros.generate("abcabc", scope="b", options=options)
    assert starved.failures == 1 and len(set(map(id, starved.targets))) == 1
    assert result.token_ids == wanted
    failed = starved.widths.index(next(width for width in starved.widths[1:] if width > 1))
    assert set(starved.widths[failed + 1 :]) == {1}, "from there on a token a pass"


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_out_of_memory_drops_caches_next(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch, options: DecodingOptions
) -> None:
    wanted = tiny_ouroboros.generate("abcabc", scope="a", options=options).token_ids
    assert tiny_ouroboros._sessions.sessions.open("a").shelf.idle != []
    starved = Starved(monkeypatch, lambda number, width: number in (5, 6))
    result = tiny_ouroboros.generate("abcabc", scope="b", options=replace(options, max_draft_tokens=0))
    assert result.token_ids == wanted
    assert tiny_ouroboros._sessions.sessions.open("a").shelf.idle == []
    first, last = starved.targets[0], starved.targets[-1]
    assert first is not last and starved.targets[6] is last
    assert starved.widths[6] == 6 + 4, "prompt and output are read anew"


def test_out_of_memory_while_a_cache_grows(tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plain(tiny_ouroboros.model, tiny_ouroboros.encode("abc"), 300)
    zeros, calls = torch.zeros, []

    def scarce(*shape: Any, **named: Any) -> torch.Tensor:
        if 512 in shape:
            calls.append(shape)
            if len(calls) == 2:  # the keys' buffer has grown, the values' has not
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros(*shape, **named)

    monkeypatch.setattr(torch, "zeros", scarce)
    result = tiny_ouroboros.generate("abc", options=DecodingOptions(max_new_tokens=300, max_draft_tokens=0))
    assert list(result.token_ids) == wanted and len(calls) == 5


def test_out_of_memory_fails_one_request_in_the_end(tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch) -> None:
    options = DecodingOptions(max_new_tokens=40, max_draft_tokens=0)
    wanted = plain(tiny_ouroboros.model, tiny_ouroboros.encode("fine"), 40)
    bad = tiny_ouroboros.encode("bad")
    with monkeypatch.context() as patch:
        starved = Starved(patch, lambda number, width: starved.targets[-1].token_ids[:3] == bad)
        fine = tiny_ouroboros.stream("fine", scope="fine", options=options)
        next(fine)
        with pytest.raises(MemoryLimitError, match="3 tokens of prompt and 2 of output.*Tried to allocate 2.00 GiB"):
            tiny_ouroboros.generate("bad", scope="bad", options=options)
        assert starved.failures == 3
        said = [token_id for piece in fine for token_id in piece.token_ids]
        assert said == wanted[-len(said) :] and len(said) >= 38
    assert list(tiny_ouroboros.generate("bad", scope="bad", options=options).token_ids) == plain(
        tiny_ouroboros.model, bad, 40
    )


def test_states_that_cannot_be_rewound_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from ouroboros_llm.target_model.recurrent import RecurrentTarget

    with Ouroboros(tiny_model("mamba_plain"), byte_tokenizer()) as ouroboros:
        forward, calls = RecurrentTarget._forward, []

        def failing(self: RecurrentTarget, token_ids: Any) -> torch.Tensor:
            calls.append(len(token_ids))
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(self, token_ids)

        monkeypatch.setattr(RecurrentTarget, "_forward", failing)
        result = ouroboros.generate("abc", options=DecodingOptions(max_new_tokens=10))
        assert list(result.token_ids) == plain(ouroboros.model, ouroboros.encode("abc"), 10)
        assert calls == [3, 1, 1, 1, 6, *[1] * 6]


def test_a_draft_model_that_runs_out_of_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    with Ouroboros(tiny_model("qwen3"), tokenizer, draft_model=(tiny_model(), tokenizer)) as ouroboros:
        starved = Starved(monkeypatch, lambda number, width: starved.targets[-1].model is tiny_model() and number > 8)
        result = ouroboros.generate("abc", options=DecodingOptions(max_new_tokens=40))
        assert starved.failures == 1 and result.statistics.draft_forwards > 0
        assert list(result.token_ids) == plain(ouroboros.model, ouroboros.encode("abc"), 40)
        monkeypatch.setattr(starved, "_when", lambda number, width: False)
        again = ouroboros.generate("abc", scope="b", options=DecodingOptions(max_new_tokens=40))
        assert again.token_ids == result.token_ids and again.statistics.accepted_tokens > 0


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (MemoryLimitError("ours"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: Exception, is_it: bool) -> None:
    assert out_of_memory(error) is is_it


def test_the_interpreter_exits_in_the_middle_of_an_answer() -> None:
    code = """
import threading
from conftest import byte_tokenizer, tiny_model
from ouroboros_llm import DecodingOptions, Ouroboros, OuroborosError

ouroboros = Ouroboros(tiny_model(), byte_tokenizer())
options = DecodingOptions(max_new_tokens=490, max_draft_tokens=0)
streams = [ouroboros.stream("abc", scope=str(number), options=options) for number in range(3)]
for stream in streams:
    next(stream)
# One reader goes on in a daemon thread, one has stopped, and one stream is held by a cycle.
def read():
    try:
        list(streams[0])
    except OuroborosError as error:
        assert "the interpreter exits" in str(error)

threading.Thread(target=read, daemon=True).start()
streams.append(streams)
print("fine", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT / "tests"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
