"""What turns leave for the next ones of their scope: never another answer, never another scope's, never too much."""

from __future__ import annotations

import copy
import functools
import gc
import stat
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, byte_tokenizer, plain, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ouroboros_llm import (
    DecodingOptions,
    KVUsage,
    MemoryLimitError,
    OptionError,
    Ouroboros,
    PromptError,
    SnapshotError,
    kv_usage,
    limit_kv_bytes,
)
from ouroboros_llm.sessions.prefix_cache import MEMORY, CachedSequence, PrefixCache
from ouroboros_llm.sessions.session import SessionStore
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.prepared import prepare
from ouroboros_storage import PhraseStore

OPTIONS = DecodingOptions(max_new_tokens=12)
SYSTEM = [20 + i * 7 % 90 for i in range(80)]
"""Tokens that prompts begin with."""
BACKWARD = [
    name for name in ARCHITECTURES if name not in ("lfm2_chains", "mamba_plain", "bamba_plain", "qwen3_next_plain")
]
"""Architectures whose caches go back to any length."""
STATIC = ["gemma3_mixed static"]
"""Passes of fixed shape over slots that grow in steps."""
FORWARD = ["lfm2_chains", "bamba_plain", "qwen3_next_plain"]
"""Those whose states only go forward, and rightly so by many tokens at once."""


def make(architecture: str = "llama", **arguments: Any) -> Ouroboros:
    """Of an architecture, or of one whose passes are "static"."""
    name, _, target = architecture.partition(" ")
    return Ouroboros(tiny_model(name), byte_tokenizer(), target=target or "eager", **arguments)


def bounded(limit: int, **arguments: Any) -> tuple[Ouroboros, PrefixCache]:
    ouroboros, memory = make(**arguments), PrefixCache(limit)
    ouroboros._sessions.sessions = SessionStore(memory=memory)
    return ouroboros, memory


@pytest.fixture(autouse=True)
def the_limit_of_the_process() -> Iterator[None]:
    before = MEMORY.limit
    yield
    MEMORY.limit = before


def check(ouroboros: Ouroboros, prompt: list[int], scope: str = "c", new: int = 12) -> tuple[list[int], int]:
    """Generate, compare with the model alone; the answer and the tokens that were not read again."""
    result = ouroboros.generate(prompt, scope=scope, options=DecodingOptions(max_new_tokens=new))
    assert list(result.token_ids) == plain(ouroboros.model, prompt, new)
    return list(result.token_ids), result.usage.cached_tokens


# The longest common prefix, whatever became of the tail.


@pytest.mark.parametrize("architecture", [*BACKWARD, *STATIC])
def test_an_edited_tail_costs_the_tail(architecture: str) -> None:
    with make(architecture) as ouroboros:
        answer, cached = check(ouroboros, SYSTEM)
        assert cached == 0
        edited = [*SYSTEM, *answer[:6], 200, 201, 202]
        assert check(ouroboros, edited)[1] == len(SYSTEM) + 6
        assert check(ouroboros, edited)[1] == len(edited) - 1
        assert check(ouroboros, [*SYSTEM[:-3], 99, 98, 97])[1] == len(SYSTEM) - 3


@pytest.mark.parametrize("architecture", FORWARD)
def test_states_that_only_go_forward_go_on_from_the_text_or_from_the_prompt_before(architecture: str) -> None:
    with make(architecture) as ouroboros:
        answer, _ = check(ouroboros, SYSTEM)
        longer = [*SYSTEM, *answer, 99, 98]
        assert check(ouroboros, longer)[1] == len(SYSTEM) + len(answer) - 1
        answer, _ = check(ouroboros, [*longer, 97])
        # The tail of the answer was edited: back to the end of the prompt, where the states were marked.
        assert check(ouroboros, [*longer, 97, *answer[:5], 5, 6])[1] == len(longer) + 1
        # Before that nothing is known of the states: the prompt is read anew.
        assert check(ouroboros, SYSTEM[:40])[1] == 0
        assert check(ouroboros, SYSTEM[:40])[1] == 0, "the logits after the last token are wanted as well"


def test_states_that_go_on_wrongly_are_read_anew() -> None:
    with make("mamba_plain") as ouroboros:
        answer, _ = check(ouroboros, SYSTEM)
        assert not ouroboros._prepared.probe.continues
        assert check(ouroboros, [*SYSTEM, *answer, 9])[1] == 0
        assert ouroboros.kv_usage.total == 0


edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "replace", "append", "answer", "back"]),
        st.floats(0, 1),
        st.lists(st.integers(7, 250), min_size=1, max_size=20),
    ),
    min_size=1,
    max_size=6,
)


def edited(prompts: list[list[int]], answer: list[int], edit: tuple[str, float, list[int]]) -> list[int]:
    kind, where, tokens = edit
    prompt = prompts[-1]
    place = int(where * len(prompt))
    return {
        "insert": [*prompt[:place], *tokens, *prompt[place:]],
        "delete": [*prompt[:place], *prompt[place + len(tokens) :]],
        "replace": [*prompt[:place], *tokens],
        "append": [*prompt, *tokens],
        "answer": [*prompt, *answer[: 1 + int(where * len(answer))], *tokens],
        "back": prompts[int(where * (len(prompts) - 1))],
    }[kind][:300] or tokens


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3_mixed", "mistral_sliding", "gpt2", *FORWARD, "mamba_plain", *STATIC]
)
@settings(max_examples=8, deadline=None)
@given(edits=edits)
def test_no_edit_changes_an_answer(architecture: str, edits: list[Any]) -> None:
    with make(architecture) as ouroboros:
        prompts, answer = [SYSTEM], check(ouroboros, SYSTEM)[0]
        for edit in edits:
            prompts.append(edited(prompts, answer, edit))
            answer, cached = check(ouroboros, prompts[-1])
            assert 0 <= cached < len(prompts[-1])
            if architecture in BACKWARD and edit[0] in ("append", "answer"):
                assert cached >= len(prompts[-2]) - 1 or len(prompts[-1]) == 300


def test_a_conversation_of_thirty_turns_is_read_once() -> None:
    """A prompt that grows to 6,000 tokens; every answer as from an `Ouroboros` that knows nothing."""
    model, tokenizer = tiny_model(context=8192), byte_tokenizer()
    options = DecodingOptions(max_new_tokens=24)
    messages = [{"role": "system", "content": "You are an agent with tools. " * 20}]
    read = 0
    with Ouroboros(model, tokenizer) as ouroboros:
        for turn in range(30):
            messages.append({"role": "user", "content": f"step {turn}: " + "observation " * (10 + turn % 5)})
            result = ouroboros.generate(messages, scope="agent:a", options=options)
            read += result.usage.prompt_tokens - result.usage.cached_tokens
            with Ouroboros(model, tokenizer) as fresh:
                alone = fresh.generate(messages, options=options)
            assert alone.usage.cached_tokens == 0
            assert result.token_ids == alone.token_ids
            # What the model said is not always what its text is tokenized to: it is a random model of bytes.
            messages.append({"role": "assistant", "content": result.text})
        length = result.usage.prompt_tokens
        assert list(result.token_ids) == plain(model, ouroboros.encode(messages[:-1]), 24)
    assert 5_500 < length < 6_500
    assert read <= 1.2 * length


# Several workspaces per scope.


def test_prompts_that_take_turns_keep_their_own() -> None:
    planner, worker = SYSTEM, [150 + i * 11 % 90 for i in range(90)]
    with make() as ouroboros:
        texts = {"planner": planner, "worker": worker}
        for turn in range(4):
            for name, text in texts.items():
                answer, cached = check(ouroboros, text)
                assert cached >= (len(text) - 4 if turn else 0)
                texts[name] = [*text, *answer, 30 + turn]


def test_a_short_common_prefix_does_not_destroy_a_long_text() -> None:
    with make() as ouroboros:
        check(ouroboros, SYSTEM)
        other = [*SYSTEM[:10], *range(60, 90)]
        assert check(ouroboros, other)[1] == 10, "of a copy"
        assert check(ouroboros, [*SYSTEM, 5])[1] == len(SYSTEM)
        assert check(ouroboros, [*other, 5])[1] == len(other)


def test_what_another_holds_as_well_is_not_kept_twice(tiny_ouroboros: Ouroboros) -> None:
    for _ in range(4):
        tiny_ouroboros.generate(SYSTEM, scope="c", options=DecodingOptions(max_new_tokens=200))
    assert len(tiny_ouroboros._sessions.sessions.open("c").shelf.idle) == 1


def test_a_scope_keeps_no_more_than_a_few(tiny_ouroboros: Ouroboros) -> None:
    for number in range(12):
        tiny_ouroboros.generate([number + 7] * 20, scope="c", options=OPTIONS)
    assert len(tiny_ouroboros._sessions.sessions.open("c").shelf.idle) == 8
    assert check(tiny_ouroboros, [7] * 20)[1] == 0
    assert check(tiny_ouroboros, [18] * 20)[1] == 19


def test_two_turns_at_once_share_nothing() -> None:
    with make() as ouroboros:
        answer, _ = check(ouroboros, SYSTEM)
        prompts = [[*SYSTEM, *answer, last] for last in (30, 31, 32)]
        streams = [ouroboros.stream(prompt, scope="c", options=OPTIONS) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        while any(streams):
            for number, stream in enumerate(streams):
                if stream and (piece := next(stream, None)):
                    tokens[number] += piece.token_ids
                elif stream:
                    streams[number] = None
        assert tokens == [plain(ouroboros.model, prompt, 12) for prompt in prompts]
        pointers = [
            workspace.target.cache._layers[0].keys.data_ptr()
            for workspace in ouroboros._sessions.sessions.open("c").shelf.idle
        ]
        assert len(set(pointers)) == len(pointers) == 3
        assert ouroboros.kv_usage.in_use == 0


def test_threads_of_one_scope_get_their_own_answers() -> None:
    with make() as ouroboros:
        ouroboros.keep_prefix(SYSTEM, scope="c")
        errors: list[BaseException] = []

        def converse(number: int) -> None:
            text = [*SYSTEM, 100 + number]
            try:
                for turn in range(4):
                    answer, cached = check(ouroboros, text)
                    assert cached >= len(SYSTEM)
                    text = [*text, *answer, 40 + turn]
            except BaseException as error:
                errors.append(error)

        run_all([functools.partial(converse, number) for number in range(5)])
        assert errors == []
        assert ouroboros.kv_usage.in_use == 0


def run_all(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# No scope sees another's.


def test_no_scope_goes_on_from_another_s_text(tiny_ouroboros: Ouroboros) -> None:
    tiny_ouroboros.keep_prefix(SYSTEM, scope="a")
    check(tiny_ouroboros, SYSTEM, "a")
    for scope in ("b", "a ", "A"):
        assert check(tiny_ouroboros, SYSTEM, scope)[1] == 0
    reader = tiny_ouroboros.generate([*SYSTEM, 5], scope="d", read_scopes=["a"], options=OPTIONS)
    assert reader.usage.cached_tokens == 0
    other = make()
    assert check(other, SYSTEM, "a")[1] == 0, "another object's scope is another scope"


def test_deleting_a_scope_frees_its_workspaces() -> None:
    with PhraseStore("sqlite://") as store, make(store=store) as ouroboros:
        ouroboros.keep_prefix(SYSTEM[:40], scope="a", name="system")
        check(ouroboros, SYSTEM, "a")
        check(ouroboros, SYSTEM, "b")
        shelf = ouroboros._sessions.sessions.open("a").shelf
        store.delete("a")
        check(ouroboros, SYSTEM[:30], "b")
        assert not shelf.idle and not shelf.prefixes, "freed with the next turn of anybody"
        assert ouroboros.kv_usage.kept == 0
        assert check(ouroboros, SYSTEM, "a")[1] == 0
        assert check(ouroboros, SYSTEM, "b")[1] > 0


def test_a_scope_deleted_in_the_middle_of_a_turn_keeps_nothing_of_it() -> None:
    with PhraseStore("sqlite://") as store, make(store=store) as ouroboros:
        stream = ouroboros.stream(SYSTEM, scope="a", options=OPTIONS)
        next(stream)
        store.delete("a")
        list(stream)
        assert ouroboros.kv_usage.total == 0
        assert check(ouroboros, SYSTEM, "a")[1] == 0


def test_closing_frees_everything() -> None:
    ouroboros = make()
    before = kv_usage().total
    ouroboros.keep_prefix(SYSTEM)
    check(ouroboros, SYSTEM, "a")
    stream = ouroboros.stream(SYSTEM, scope="a", options=OPTIONS)
    next(stream)
    assert kv_usage().total > before
    ouroboros.close()
    list(stream)
    assert ouroboros.kv_usage.total == 0 and kv_usage().total == before


def test_objects_that_are_gone_count_no_more() -> None:
    before = kv_usage().total
    ouroboros = make()
    check(ouroboros, SYSTEM)
    assert kv_usage().total > before
    del ouroboros
    assert kv_usage().total == before


@pytest.mark.parametrize("draft_model", [None, "qwen3"])
@pytest.mark.parametrize("abandoned", [False, True])
def test_what_is_dropped_is_freed_at_once(draft_model: str | None, abandoned: bool) -> None:
    draft = draft_model and tiny_model(draft_model)
    with make(draft_model=draft) as ouroboros:
        gc.collect()
        gc.disable()
        try:
            stream = ouroboros.stream(SYSTEM, scope="c", options=OPTIONS)
            next(stream)
            if not abandoned:
                list(stream)
            del stream
            ouroboros.flush()  # what was abandoned is put away
            (idle,) = ouroboros._sessions.sessions.open("c").shelf.idle
            targets = [weakref.ref(target) for target in idle.targets]
            del idle
            MEMORY.make_room(MEMORY.limit)
            assert [target() for target in targets] == [None] * (2 if draft else 1)
        finally:
            gc.enable()


# The bound.


def test_usage_says_what_is_where(tiny_ouroboros: Ouroboros) -> None:
    assert tiny_ouroboros.kv_usage == KVUsage(0, 0, 0, MEMORY.limit)
    tiny_ouroboros.keep_prefix(SYSTEM, scope="c")
    # Two layers, keys and values, two heads of eight numbers of four bytes; no room to spare.
    assert tiny_ouroboros.kv_usage.kept == len(SYSTEM) * 2 * 2 * 2 * 8 * 4
    stream = tiny_ouroboros.stream(SYSTEM, scope="c", options=OPTIONS)
    next(stream)
    assert tiny_ouroboros.kv_usage.in_use > 0 == tiny_ouroboros.kv_usage.idle
    list(stream)
    usage = tiny_ouroboros.kv_usage
    assert usage.idle > 0 == usage.in_use and usage.total == usage.idle + usage.kept <= kv_usage().total


@settings(max_examples=25, deadline=None)
@given(
    limit=st.integers(0, 400_000),
    turns=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 200), st.booleans()), min_size=1, max_size=8),
)
def test_the_bound_holds_after_every_turn(limit: int, turns: list[tuple[str, int, bool]]) -> None:
    ouroboros, memory = bounded(limit)
    with ouroboros:
        for scope, length, shares in turns:
            check(ouroboros, [*(SYSTEM if shares else SYSTEM[::-1]), *range(7, 7 + length)], scope, new=4)
            usage = memory.usage()
            assert usage.in_use == 0 and usage.total <= limit
            assert usage.total == sum(
                workspace.nbytes
                for session in ouroboros._sessions.sessions._sessions.values()
                for workspace in session.shelf.idle
            )


def test_least_recently_used_goes_first_and_is_cut_before_it_is_dropped() -> None:
    per_token = 2 * 2 * 2 * 8 * 4
    text = SYSTEM * 3
    ouroboros, memory = bounded(per_token * 700)
    with ouroboros:
        for scope in "abc":
            check(ouroboros, text, scope)
        # 3 * 252 tokens in 700: the first was cut to half, not dropped.
        assert ouroboros._sessions.sessions.open("a").shelf.idle[0].length == (len(text) + 11) // 2
        assert check(ouroboros, text, "c")[1] == len(text) - 1
        assert check(ouroboros, text, "b")[1] == len(text) - 1
        assert 0 < check(ouroboros, text, "a")[1] < len(text) - 1
        memory.limit = per_token * 300
        assert ouroboros._sessions.sessions.open("a").shelf.idle, "used last"
        assert not ouroboros._sessions.sessions.open("c").shelf.idle


def test_the_bound_is_the_process_s() -> None:
    first, second = make(), make("qwen3")
    check(first, SYSTEM)
    check(second, SYSTEM)
    limit_kv_bytes(kv_usage().total)
    assert first.kv_usage.idle and second.kv_usage.idle
    limit_kv_bytes(second.kv_usage.idle)
    assert first.kv_usage.idle and second.kv_usage.idle, "there was room to spare in both"
    limit_kv_bytes(second.kv_usage.idle)
    assert not first.kv_usage.idle and second.kv_usage.idle
    limit_kv_bytes(0)
    assert kv_usage().idle == 0
    assert check(second, SYSTEM)[1] == 0


@pytest.mark.parametrize("limit", [-1, 1.5, "much", None, True])
def test_limits_are_numbers(limit: Any) -> None:
    with pytest.raises(OptionError, match="limit must be a whole number of bytes"):
        limit_kv_bytes(limit)


def test_the_environment_sets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUROBOROS_KV_BYTES", "12345")
    assert PrefixCache().limit == 12345
    monkeypatch.setenv("OUROBOROS_KV_BYTES", "a lot")
    with pytest.raises(OptionError, match=r"\$OUROBOROS_KV_BYTES must be .*'a lot'"):
        SessionStore(memory=PrefixCache())


def test_room_is_made_on_demand(tiny_ouroboros: Ouroboros) -> None:
    check(tiny_ouroboros, SYSTEM)
    MEMORY.make_room(MEMORY.limit)
    assert tiny_ouroboros.kv_usage.idle == 0


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")


def test_what_cannot_even_be_cut_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    ouroboros, memory = bounded(10**6)
    with ouroboros:
        check(ouroboros, SYSTEM, "a")
        monkeypatch.setattr(EagerTarget, "shrink", out_of_memory)
        memory.limit = 10
        assert memory.usage().total == 0
        monkeypatch.undo()
        assert check(ouroboros, SYSTEM, "a")[1] == 0


def test_where_no_copy_can_be_had_the_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as ouroboros:
        check(ouroboros, SYSTEM)
        monkeypatch.setattr(EagerTarget, "fork", out_of_memory)
        short = [*SYSTEM[:30], 9]
        assert check(ouroboros, short)[1] == 0
        assert check(ouroboros, SYSTEM)[1] == len(SYSTEM) - 1, "what could not be copied is still there"


# Kept prefixes.


@pytest.mark.parametrize("architecture", [*BACKWARD, *FORWARD, *STATIC])
def test_a_kept_prefix_serves_turns_at_once(architecture: str) -> None:
    with make(architecture) as ouroboros:
        assert ouroboros.keep_prefix(SYSTEM, scope="c", name="system") == len(SYSTEM)
        streams = [ouroboros.stream([*SYSTEM, 100 + n], scope="c", options=OPTIONS) for n in range(3)]
        firsts = [next(stream) for stream in streams]
        for number, (first, stream) in enumerate(zip(firsts, streams, strict=True)):
            pieces = [first, *stream]
            result = pieces[-1].result
            assert result and result.usage.cached_tokens == len(SYSTEM)
            assert list(result.token_ids) == plain(ouroboros.model, [*SYSTEM, 100 + number], 12)
        ouroboros.drop_prefix(scope="c", name="system")
        ouroboros.drop_prefix(scope="c", name="system")
        assert ouroboros.kv_usage.kept == 0


def test_a_kept_prefix_serves_scopes_that_name_its_own(tiny_ouroboros: Ouroboros) -> None:
    def ask(scope: str, named: str) -> int:
        prompt = [*SYSTEM, 7]
        result = tiny_ouroboros.generate(prompt, scope=scope, prefix_scopes=[named], options=OPTIONS)
        assert list(result.token_ids) == plain(tiny_ouroboros.model, prompt, 12)
        return result.usage.cached_tokens

    tiny_ouroboros.keep_prefix(SYSTEM[:40], scope="agent:x")
    check(tiny_ouroboros, SYSTEM, "agent:x")
    assert ask("a", "agent:x") == 40, "what the other scope's turns left is its own"
    assert ask("b", "agent:y") == 0
    assert ask("a", "agent:y") == len(SYSTEM)
    assert "agent:y" not in tiny_ouroboros._sessions.sessions._sessions, "naming a scope makes none"
    tiny_ouroboros.drop_prefix(scope="agent:x")
    assert ask("c", "agent:x") == 0


def test_a_deleted_scope_s_prefix_serves_nobody() -> None:
    with PhraseStore("sqlite://") as store, make(store=store) as ouroboros:
        ouroboros.keep_prefix(SYSTEM, scope="agent:x")
        store.delete("agent:x")
        result = ouroboros.generate([*SYSTEM, 7], scope="a", prefix_scopes=["agent:x"], options=OPTIONS)
        assert result.usage.cached_tokens == 0


def test_a_prefix_that_is_kept_already_is_not_read_again(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_ouroboros.keep_prefix(SYSTEM, scope="c")
    monkeypatch.setattr(tiny_ouroboros._sessions, "keeping", None)
    assert tiny_ouroboros.keep_prefix(SYSTEM, scope="c") == len(SYSTEM)


def test_a_kept_prefix_of_messages_and_tools_is_found_again() -> None:
    messages = [{"role": "system", "content": "You are a pirate."}]
    with make() as ouroboros:
        kept = ouroboros.keep_prefix(messages, scope="c")
        result = ouroboros.generate([*messages, {"role": "user", "content": "hello"}], scope="c", options=OPTIONS)
        assert result.usage.cached_tokens == kept


def test_a_kept_prefix_stays_whatever_the_others_need() -> None:
    per_token = 2 * 2 * 2 * 8 * 4
    ouroboros, memory = bounded(per_token * 100)
    with ouroboros:
        ouroboros.keep_prefix(SYSTEM, scope="c")
        for number in range(3):
            check(ouroboros, [100 + number] * 60, "c")
            assert memory.usage().kept and memory.usage().total <= memory.limit
        assert check(ouroboros, [*SYSTEM, 9], "c")[1] == len(SYSTEM)


def test_scopes_that_keep_a_prefix_are_not_forgotten_for_others() -> None:
    with make() as ouroboros:
        ouroboros._sessions.sessions = SessionStore(capacity=2)
        ouroboros.keep_prefix(SYSTEM, scope="a")
        ouroboros.keep_prefix(SYSTEM, scope="b")
        for scope in "cde":
            check(ouroboros, SYSTEM[:20], scope)
        assert check(ouroboros, SYSTEM[:20], "e")[1] == 19
        assert check(ouroboros, SYSTEM[:20], "d")[1] == 0
        assert check(ouroboros, [*SYSTEM, 9], "a")[1] == check(ouroboros, [*SYSTEM, 9], "b")[1] == len(SYSTEM)


def test_prefixes_that_do_not_fit_are_refused() -> None:
    ouroboros, memory = bounded(2 * 2 * 2 * 8 * 4 * 100)
    with ouroboros:
        ouroboros.keep_prefix(SYSTEM, scope="c", name="one")
        with pytest.raises(OptionError, match="prefix 'two' takes 20480 bytes .* limit of 25600"):
            ouroboros.keep_prefix(SYSTEM, scope="c", name="two")
        assert ouroboros.keep_prefix(SYSTEM[:50], scope="c", name="one") == 50, "in place of what had its name"
        assert memory.usage().in_use == 0
    for prompt in ("", [999_999]):
        with pytest.raises(PromptError):
            ouroboros.keep_prefix(prompt)


def test_a_prefix_that_is_refused_leaves_the_one_of_its_name() -> None:
    ouroboros, _ = bounded(2 * 2 * 2 * 8 * 4 * 100)
    with ouroboros:
        ouroboros.keep_prefix(SYSTEM, scope="c", name="one")
        with pytest.raises(OptionError, match="prefix 'one' takes 40960 bytes .* other prefixes keep 0"):
            ouroboros.keep_prefix(SYSTEM * 2, scope="c", name="one")
        assert check(ouroboros, [*SYSTEM, 9])[1] == len(SYSTEM)


def test_a_prefix_that_the_device_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.sessions.device_memory.free_bytes", lambda _: 1000)
    with make() as ouroboros:
        with pytest.raises(MemoryLimitError, match="80 tokens of prompt and output need"):
            ouroboros.keep_prefix(SYSTEM, scope="c")
        assert ouroboros.kv_usage.total == 0


@pytest.mark.parametrize("architecture", ["llama", "bamba_plain"])
def test_a_prefix_is_read_between_the_steps_of_others(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.sessions.prefix_cache.PREFILL_CHUNK", 16)
    with make(architecture) as ouroboros:
        answer = ouroboros.stream("a", scope="a", options=DecodingOptions(max_new_tokens=200))
        next(answer)
        assert ouroboros.keep_prefix(SYSTEM, scope="c") == len(SYSTEM)
        assert next(answer).result is None, "the answer had not to end first"
        answer.close()
        assert check(ouroboros, [*SYSTEM, 9])[1] == len(SYSTEM)


def test_a_kept_prefix_helps_the_draft_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with make(draft_model=tiny_model("qwen3")) as ouroboros:
        ouroboros.keep_prefix(SYSTEM, scope="c")
        read = len(ouroboros._sessions.sessions.open("c").shelf.prefixes["default"].draft_target.token_ids)
        assert read == len(SYSTEM)
        for _ in range(2):
            assert check(ouroboros, [*SYSTEM, 9])[1] >= len(SYSTEM)


# Errors.


@pytest.mark.parametrize("architecture", ["llama", *FORWARD, *STATIC])
def test_a_pass_that_fails_leaves_no_wrong_states(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(architecture) as ouroboros:
        answer, _ = check(ouroboros, SYSTEM)
        longer = [*SYSTEM, *answer, 9]
        target = type(ouroboros._sessions.start().target)
        run = target._forward

        def fails(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            run(self, *args, **kwargs)
            raise MemoryError("in the middle of a pass")

        with monkeypatch.context() as patch:
            patch.setattr(target, "_forward", fails)
            with pytest.raises(MemoryError):
                ouroboros.generate(longer, scope="c", options=OPTIONS)
        assert ouroboros.kv_usage.in_use == 0
        check(ouroboros, longer)
        check(ouroboros, [*longer, 8])


# Files.


def test_another_process_takes_it_up(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    code = (
        "import sys; from ouroboros_llm import *\n"
        "with Ouroboros.from_pretrained(sys.argv[1], dtype='float32') as ouroboros:\n"
        "    ouroboros.generate('the cat sat on the mat', scope='c', options=DecodingOptions(max_new_tokens=8))\n"
        "    print(ouroboros.save_session('c', sys.argv[2]))\n"
    )
    paths = [str(tmp_path / "model"), str(tmp_path / "file")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, timeout=170)
    with make() as ouroboros:
        tokens = ouroboros.load_session("c", tmp_path / "file")
        assert tokens == int(done.stdout) == len("the cat sat on the mat") + 7
        prompt = ouroboros.encode("the cat sat on the mat, and")
        assert check(ouroboros, prompt)[1] >= len("the cat sat on the mat")


def test_a_restarted_session_reads_nothing_again(tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    with make() as ouroboros:
        answer, _ = check(ouroboros, SYSTEM, "a")
        check(ouroboros, SYSTEM[::-1], "a")
        assert ouroboros.save_session("a", path) == 2 * (len(SYSTEM) + len(answer) - 1)
        assert check(ouroboros, [*SYSTEM, *answer], "a")[1] == len(SYSTEM) + len(answer) - 1, "saving takes nothing"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    with make() as restarted:
        assert restarted.load_session("a", path) == 2 * (len(SYSTEM) + len(answer) - 1)
        path.unlink()
        assert check(restarted, [*SYSTEM, *answer, 9], "a")[1] == len(SYSTEM) + len(answer) - 1
        assert check(restarted, SYSTEM[::-1], "a")[1] == len(SYSTEM) - 1
        assert check(restarted, SYSTEM, "b")[1] == 0


@pytest.mark.parametrize("architecture", ["gemma3_mixed", "gpt2", *STATIC])
def test_every_kind_of_layer_is_restored(architecture: str, tmp_path: Path) -> None:
    with make(architecture) as ouroboros:
        check(ouroboros, SYSTEM)
        ouroboros.save_session("c", tmp_path / "file")
    with make(architecture) as restarted:
        restarted.load_session("c", tmp_path / "file")
        assert check(restarted, [*SYSTEM[:50], 5, 6])[1] == 50


def test_half_precision_is_restored_bit_by_bit(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model()).to(torch.bfloat16)
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        ouroboros.generate(SYSTEM, scope="c", options=OPTIONS)
        ouroboros.save_session("c", tmp_path / "file")
        (saved,) = ouroboros._sessions.sessions.open("c").shelf.idle
        with Ouroboros(model, byte_tokenizer()) as restarted:
            restarted.load_session("c", tmp_path / "file")
            (loaded,) = restarted._sessions.sessions.open("c").shelf.idle
        assert loaded_equal(saved, loaded)
    with pytest.raises(SnapshotError, match="its (model|dtype) must be"):
        make().load_session("c", tmp_path / "file")


def loaded_equal(saved: CachedSequence, loaded: CachedSequence) -> bool:
    targets = [workspace.target for workspace in (saved, loaded)]
    assert all(isinstance(target, EagerTarget) for target in targets)
    left, right = (target.cache.unload(len(target.token_ids)) for target in targets)  # type: ignore[attr-defined]
    return targets[0].token_ids == targets[1].token_ids and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with make() as ouroboros:
        check(ouroboros, SYSTEM)
        ouroboros.save_session("c", tmp_path / "file")
    return tmp_path / "file"


def refused(ouroboros: Ouroboros, path: Path, words: str, scope: str = "c") -> None:
    with pytest.raises(SnapshotError, match=words):
        ouroboros.load_session(scope, path)
    assert ouroboros.kv_usage.total == 0, "nothing was loaded"


def test_files_of_another_origin_are_refused(saved: Path) -> None:
    refused(make(), saved, "its scope must be 'another'", scope="another")
    refused(Ouroboros(tiny_model(seed=1), byte_tokenizer()), saved, "its model must be")
    refused(make("qwen3"), saved, "its model must be")
    other = copy.deepcopy(byte_tokenizer())
    other.add_tokens(["<new>"])
    refused(Ouroboros(tiny_model(), other), saved, "its tokenizer must be")
    # Equal weights, other positions: the same names and shapes, and every key would be wrong.
    model = copy.deepcopy(tiny_model())
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    refused(Ouroboros(model, byte_tokenizer()), saved, "its configuration must be")
    refused(Ouroboros(copy.deepcopy(tiny_model()).double(), byte_tokenizer()), saved, "its (model|dtype) must be")


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors["0.1.keys"].mul_(1.001),
        lambda tensors, _: tensors["0.token_ids"].add_(1),
        lambda tensors, _: tensors.pop("0.0.values"),
        lambda tensors, _: tensors.update({"0.0.keys": tensors["0.0.keys"][:, :, :-1].clone()}),
        lambda _, metadata: metadata.pop("digest"),
    ],
)
def test_files_that_were_changed_are_refused(saved: Path, change: Any) -> None:
    rewritten(saved, change)
    refused(make(), saved, "damaged")


def test_files_of_another_layout_are_refused(saved: Path) -> None:
    rewritten(saved, lambda _, metadata: metadata.update(layout="0"))
    refused(make(), saved, "its layout must be '1', but it is '0'")


def test_files_that_are_none_are_refused(saved: Path, tmp_path: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    refused(make(), saved, "no session file, or damaged")
    saved.write_bytes(b"not at all a file of tensors")
    refused(make(), saved, "no session file, or damaged")
    save_file({"weights": torch.zeros(3)}, saved)
    refused(make(), saved, "its layout must be")
    with pytest.raises(FileNotFoundError, match="no such session file"):
        make().load_session("c", tmp_path / "nothing")


def test_what_cannot_be_saved_says_so(tmp_path: Path, tiny_ouroboros: Ouroboros) -> None:
    with pytest.raises(SnapshotError, match="scope 'c' holds no keys and values"):
        tiny_ouroboros.save_session("c", tmp_path / "file")
    with make("lfm2_chains") as ouroboros:
        check(ouroboros, SYSTEM)
        with pytest.raises(SnapshotError, match="only go forward"):
            ouroboros.save_session("c", tmp_path / "file")
        assert check(ouroboros, [*SYSTEM, 5])[1] > 0, "failing takes nothing"
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    with make() as ouroboros:
        check(ouroboros, SYSTEM[::-1])

        def fails(*_: Any) -> None:
            raise OSError(28, "no space left")

        monkeypatch.setattr("ouroboros_llm.sessions.snapshot.os.replace", fails)
        with pytest.raises(SnapshotError, match="no space left"):
            ouroboros.save_session("c", saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


# The parts.


@pytest.mark.parametrize("architecture", BACKWARD)
def test_forks_hold_the_same_and_share_nothing(architecture: str) -> None:
    target = prepare(tiny_model(architecture)).start()
    target.prefill(SYSTEM)
    target.keep((0,))
    fork = target.fork(50)
    assert list(fork.token_ids) == SYSTEM[:50] and list(target.token_ids) == SYSTEM
    wanted = prepare(tiny_model(architecture)).start().prefill([*SYSTEM[:50], 7, 8])
    assert torch.allclose(fork.prefill([*SYSTEM[:50], 7, 8]), wanted, atol=1e-4)
    again = prepare(tiny_model(architecture)).start().prefill([*SYSTEM, 9])
    assert torch.allclose(target.prefill([*SYSTEM, 9]), again, atol=1e-4)


def test_cutting_frees_memory() -> None:
    target = prepare(tiny_model()).start()
    target.prefill(SYSTEM)
    target.keep((0,))
    before = target.nbytes
    target.shrink(40)
    assert target.nbytes == 40 * 2 * 2 * 2 * 8 * 4 < before
    assert list(target.token_ids) == SYSTEM[:40]
    wanted = prepare(tiny_model()).start().prefill([*SYSTEM[:40], 7])
    assert torch.allclose(target.prefill([*SYSTEM[:40], 7]), wanted, atol=1e-4)


@pytest.mark.parametrize("path", [".", "nowhere/session"])
def test_what_cannot_be_written_is_said(tiny_ouroboros: Ouroboros, path: str, tmp_path: Path) -> None:
    tiny_ouroboros.generate("abc", scope="c", options=DecodingOptions(max_new_tokens=4))
    with pytest.raises(SnapshotError, match="the session cannot be written to"):
        tiny_ouroboros.save_session("c", tmp_path / path)
    assert list(tmp_path.iterdir()) == []
