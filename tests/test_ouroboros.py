from __future__ import annotations

import copy
import gc
import json
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SPECIAL_TOKENS, byte_tokenizer, own_model, plain, tiny_model
from transformers import PreTrainedTokenizerFast

from ouroboros_llm import (
    ContextLengthError,
    DecodingOptions,
    MemoryPool,
    ModelError,
    OptionError,
    Ouroboros,
    PromptError,
    StoreError,
    TokenizerMismatchError,
)
from ouroboros_llm.phrase_pool.base import NoteStore
from ouroboros_llm.phrase_pool.memory import MemorySource
from ouroboros_llm.sessions.prefix_cache import PrefixCache
from ouroboros_llm.sessions.session import SessionStore
from ouroboros_storage import PhraseStore

PROMPT = "the cat sat on the mat, the dog"
OPTIONS = DecodingOptions(max_new_tokens=40)
FIXED_WIDTH = DecodingOptions(max_new_tokens=40, max_draft_tokens=12)
"""Measured pass times have no say: a tiny model's passes are so fast that drafting may not pay."""


def test_results_say_what_happened(tiny_ouroboros: Ouroboros) -> None:
    result = tiny_ouroboros.generate(PROMPT, options=OPTIONS)
    statistics, usage = result.statistics, result.usage
    assert list(result.token_ids) == plain(tiny_ouroboros.model, tiny_ouroboros.encode(PROMPT), 40)
    assert result.text == byte_tokenizer().decode(result.token_ids, skip_special_tokens=True)
    assert usage.prompt_tokens == len(PROMPT) and usage.completion_tokens == len(result.token_ids) == 40
    assert usage.total_tokens == usage.prompt_tokens + 40 and result.finish_reason == "length"
    assert statistics.target_forwards == statistics.rounds + 1
    assert statistics.completion_tokens == 40
    assert statistics.accepted_tokens == sum(statistics.accepted_by_source.values()) <= statistics.drafted_tokens
    assert statistics.accepted_tokens + statistics.target_forwards >= 40
    assert statistics.mean_acceptance_length == 40 / statistics.target_forwards
    assert statistics.seconds > 0


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 40], ids=["short", "in chunks"])
def test_times_are_parts_of_each_other(prompt: str) -> None:
    ouroboros = Ouroboros(own_model(context=2048), byte_tokenizer())
    first, second = (ouroboros.generate(prompt, scope=scope, options=OPTIONS).statistics for scope in "ab")
    for times in (first, second):
        assert 0 < times.prefill_seconds < times.model_seconds <= times.seconds and times.wait_seconds >= 0
        assert times.tokens_per_second == 40 / times.seconds
    assert first.load_seconds == ouroboros.load_seconds > 0 and second.load_seconds == 0
    ouroboros.close()


def test_who_waits_behind_another_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second with every step: the second request waits for all steps of the first."""
    now = 0.0

    def monotonic() -> float:
        return now

    monkeypatch.setattr("ouroboros_llm.serving.request.monotonic", monotonic)
    with Ouroboros(own_model(), byte_tokenizer(), max_active=1) as ouroboros:
        step = ouroboros._worker._step

        def counted(*args: Any, **named: Any) -> None:
            nonlocal now
            now += 1.0
            step(*args, **named)

        monkeypatch.setattr(ouroboros._worker, "_step", counted)
        first, second = ouroboros.batch([PROMPT, PROMPT], scope=["a", "b"], options=OPTIONS)
        assert second.statistics.wait_seconds > first.statistics.wait_seconds + first.statistics.rounds


def test_origins_are_as_many_as_tokens(tiny_ouroboros: Ouroboros) -> None:
    text = tiny_ouroboros.generate(PROMPT, scope="a", options=OPTIONS).text
    stop = next(text[i : i + 2] for i in range(8, 30) if text[i : i + 2].isprintable())
    for _ in range(2):
        options = DecodingOptions(max_new_tokens=40, stop=(stop,))
        result = tiny_ouroboros.generate(PROMPT, scope="a", options=options)
        assert result.finish_reason == "stop"
        assert len(result.statistics.origins) == len(result.token_ids)


def test_warm_is_faster_than_cold(tiny_ouroboros: Ouroboros) -> None:
    cold = tiny_ouroboros.generate(PROMPT, scope="agent:a", options=FIXED_WIDTH)
    warm = tiny_ouroboros.generate(PROMPT, scope="agent:a", options=FIXED_WIDTH)
    assert warm.token_ids == cold.token_ids
    assert warm.statistics.target_forwards <= cold.statistics.target_forwards / 2


def test_streams_are_answers(tiny_ouroboros: Ouroboros) -> None:
    for _ in range(2):
        pieces = list(tiny_ouroboros.stream(PROMPT, options=OPTIONS))
        result = tiny_ouroboros.generate(PROMPT, scope="other", options=OPTIONS)
        assert "".join(piece.text for piece in pieces) == result.text
        assert tuple(token_id for piece in pieces for token_id in piece.token_ids) == result.token_ids
        assert [piece.result is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_no_scope_sees_another_s_phrases(tiny_ouroboros: Ouroboros) -> None:
    options = FIXED_WIDTH
    cold = tiny_ouroboros.generate(PROMPT, scope="conversation:1", options=options).statistics
    tiny_ouroboros.generate(PROMPT, options=options)  # the default scope
    other = tiny_ouroboros.generate(PROMPT, scope="conversation:2", options=options)
    assert other.usage.cached_tokens == 0, "keys and values are as private as phrases"
    assert other.statistics.target_forwards == cold.target_forwards
    assert other.statistics.drafted_tokens == cold.drafted_tokens


def test_scopes_are_read_where_the_caller_says_so(tiny_ouroboros: Ouroboros) -> None:
    cold = tiny_ouroboros.generate(PROMPT, scope="agent:a", options=FIXED_WIDTH).statistics
    reader = tiny_ouroboros.generate(PROMPT, scope="b", read_scopes=["agent:a"], options=FIXED_WIDTH)
    assert reader.statistics.target_forwards < cold.target_forwards
    assert reader.usage.cached_tokens == 0


def test_reading_a_scope_writes_nothing_to_it() -> None:
    source = MemorySource()
    with Ouroboros(tiny_model(), byte_tokenizer(), store=source) as ouroboros:
        ouroboros.generate(PROMPT, scope="b", read_scopes=["agent:a"], options=OPTIONS)
        assert source.open("agent:a", fingerprint=ouroboros.fingerprint).stats.runs == 0
        assert source.open("b", fingerprint=ouroboros.fingerprint).stats.runs > 0
        assert source.open("b", fingerprint="of another tokenizer").stats.runs == 0


def test_prompts_are_never_kept() -> None:
    source = MemorySource()
    with Ouroboros(tiny_model(), byte_tokenizer(), store=source) as ouroboros:
        result = ouroboros.generate("a secret of mine", scope="s", options=OPTIONS)
        pool = source.open("s", fingerprint=ouroboros.fingerprint)
        secret = ouroboros.encode("a secret of mine")
        assert pool.match(secret[:-1]) == [] or max(p.match_length for p in pool.match(secret[:-1])) < 4
        assert pool.match(result.token_ids[:5])


def test_a_conversation_reuses_its_prefix(tiny_ouroboros: Ouroboros) -> None:
    first = tiny_ouroboros.encode(PROMPT)
    answer = tiny_ouroboros.generate(first, scope="c", options=OPTIONS)
    second = [*first, *answer.token_ids, *tiny_ouroboros.encode(" and then")]
    result = tiny_ouroboros.generate(second, scope="c", options=OPTIONS)
    assert list(result.token_ids) == plain(tiny_ouroboros.model, second, 40)
    assert result.usage.cached_tokens >= len(first) + 39
    assert result.usage.prompt_tokens == len(second)


def test_kept_keys_and_values_are_bounded() -> None:
    sessions = SessionStore(capacity=3, memory=PrefixCache(limit=1))
    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        ouroboros._sessions.sessions = sessions
        for number in range(5):
            ouroboros.generate(PROMPT, scope=f"c{number}", options=OPTIONS)
        assert ouroboros.generate(PROMPT, scope="c4", options=OPTIONS).usage.cached_tokens == 0
        assert len(sessions._sessions) == 3


def test_an_abandoned_stream_harms_nothing(tiny_ouroboros: Ouroboros) -> None:
    wanted = plain(tiny_ouroboros.model, tiny_ouroboros.encode(PROMPT), 40)
    for pulled in (0, 1, 3):
        stream = tiny_ouroboros.stream(PROMPT, scope="c", options=OPTIONS)
        for _ in range(pulled):
            next(stream, None)
        # Still open, and already used again; then closed, dropped, and used again.
        assert list(tiny_ouroboros.generate(PROMPT, scope="c", options=OPTIONS).token_ids) == wanted
        stream.close()
        del stream
        gc.collect()
        assert list(tiny_ouroboros.generate(PROMPT, scope="c", options=OPTIONS).token_ids) == wanted


def test_what_an_abandoned_stream_said_is_learned() -> None:
    source = MemorySource()
    with Ouroboros(tiny_model(), byte_tokenizer(), store=source) as ouroboros:
        stream = ouroboros.stream(PROMPT, scope="c", options=OPTIONS)
        said = [*next(stream).token_ids, *next(stream).token_ids, *next(stream).token_ids]
        stream.close()
        assert source.open("c", fingerprint=ouroboros.fingerprint).match(said[:2])[0].token_ids[0] == said[2]


def test_streams_of_one_thread_may_interleave(tiny_ouroboros: Ouroboros) -> None:
    prompts = [PROMPT, "abcabc", PROMPT, "xyz"]
    streams = [tiny_ouroboros.stream(prompt, scope="same", options=OPTIONS) for prompt in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    while any(streams):
        for number, stream in enumerate(streams):
            if stream and (piece := next(stream, None)):
                tokens[number] += piece.token_ids
            elif stream:
                streams[number] = None
    assert tokens == [plain(tiny_ouroboros.model, tiny_ouroboros.encode(prompt), 40) for prompt in prompts]


def test_threads_get_their_own_answers(tiny_ouroboros: Ouroboros) -> None:
    prompts = [f"{number} bottles of beer" for number in range(6)]
    answers: dict[str, list[int]] = {}

    def ask(prompt: str) -> None:
        answers[prompt] = list(tiny_ouroboros.generate(prompt, scope="shared", options=OPTIONS).token_ids)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {prompt: plain(tiny_ouroboros.model, tiny_ouroboros.encode(prompt), 40) for prompt in prompts}


def test_an_error_in_a_round_leaves_the_object_usable(
    tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ouroboros_llm.target_model.eager.EagerTarget.verify", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny_ouroboros.generate(PROMPT, scope="c", options=OPTIONS)
    wanted = plain(tiny_ouroboros.model, tiny_ouroboros.encode(PROMPT), 40)
    assert list(tiny_ouroboros.generate(PROMPT, scope="c", options=OPTIONS).token_ids) == wanted


def test_a_draft_model_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    # As large as its target it never pays; here it is asked all the same.
    tokenizer = byte_tokenizer()
    with Ouroboros(tiny_model("qwen3"), tokenizer, draft_model=(tiny_model("qwen3"), tokenizer)) as ouroboros:
        for _ in range(2):
            result = ouroboros.generate(PROMPT, options=FIXED_WIDTH)
            assert list(result.token_ids) == plain(ouroboros.model, ouroboros.encode(PROMPT), 40)
            if not _:
                assert result.statistics.draft_forwards > 0
                assert result.statistics.accepted_by_source["draft_model"] > 0
                # A draft model equal to the target is believed, so rounds are long even with empty pools.
                assert result.statistics.mean_acceptance_length > 2


def test_no_drafts_on_demand(tiny_ouroboros: Ouroboros) -> None:
    result = tiny_ouroboros.generate(PROMPT, options=DecodingOptions(max_new_tokens=20, max_draft_tokens=0))
    assert result.statistics.mean_acceptance_length == 1.0 and result.statistics.drafted_tokens == 0


def test_draft_models_of_another_vocabulary_are_refused() -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    other.add_tokens(["<new>"])
    with pytest.raises(TokenizerMismatchError, match="draft_model must share"):
        Ouroboros(tiny_model(), byte_tokenizer(), draft_model=(tiny_model("qwen3"), other))


@pytest.mark.parametrize("draft_model", [5, ("only one",), object()])
def test_draft_models_of_another_type_are_refused(draft_model: Any) -> None:
    with pytest.raises(OptionError, match="draft_model"):
        Ouroboros(tiny_model(), byte_tokenizer(), draft_model=draft_model)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(prompt=""), PromptError, "empty"),
        (dict(prompt=[]), PromptError, "empty"),
        (dict(prompt=[5] * 512), ContextLengthError, "512 tokens"),
        (dict(prompt="x" * 2000), ContextLengthError, "2000 tokens"),
        (dict(prompt="x", scope=""), OptionError, "scope"),
        (dict(prompt="x", scope="a\nb"), OptionError, "printable"),
        (dict(prompt="x", scope="s" * 256), OptionError, "255"),
        (dict(prompt="x", scope=42), OptionError, "42"),
        (dict(prompt="x", read_scopes="corpus:x"), OptionError, "read_scopes"),
        (dict(prompt="x", read_scopes=["a", ""]), OptionError, r"read_scopes\[1\]"),
        (dict(prompt="x", max_new_tokens=5), TypeError, "max_new_tokens"),
        (dict(prompt="x", options={"max_new_tokens": 3}), OptionError, "DecodingOptions"),
        (dict(prompt=[999_999, 5]), PromptError, "999999"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_bad_calls_fail_at_once(
    tiny_ouroboros: Ouroboros, method: str, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        getattr(tiny_ouroboros, method)(**arguments)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(OptionError, match="target must be"):
        Ouroboros(tiny_model(), byte_tokenizer(), target="fast")


class BrokenSource(MemorySource):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def open(self, scope: str, *, fingerprint: str) -> MemoryPool:
        raise self._error

    def flush(self) -> None:
        raise self._error


@pytest.mark.parametrize("error", [StoreError("the database is gone"), OSError("the database is gone")])
def test_a_store_that_breaks_costs_speed_not_answers(error: Exception) -> None:
    ouroboros = Ouroboros(tiny_model(), byte_tokenizer(), store=BrokenSource(error))
    with pytest.warns(RuntimeWarning, match="the database is gone"):
        result = ouroboros.generate(PROMPT, options=OPTIONS)
    assert list(result.token_ids) == plain(ouroboros.model, ouroboros.encode(PROMPT), 40)


def test_a_deleted_scope_leaves_nothing_in_memory() -> None:
    store = PhraseStore("sqlite://")
    with Ouroboros(tiny_model(), byte_tokenizer(), store=store) as ouroboros:
        # Of a fixed width, so that measured pass times have no say.
        options = DecodingOptions(max_new_tokens=40, max_draft_tokens=12)
        cold = ouroboros.generate(PROMPT, scope="c", options=options)
        assert ouroboros.generate(PROMPT, scope="c", options=options).usage.cached_tokens > 0
        store.delete("c")
        again = ouroboros.generate(PROMPT, scope="c", options=options)
        assert again.usage.cached_tokens == 0
        assert again.statistics.target_forwards == cold.statistics.target_forwards
    store.close()


def test_what_was_learned_goes_with_its_scope_even_in_the_middle_of_a_turn() -> None:
    with PhraseStore("sqlite://") as store, Ouroboros(tiny_model(), byte_tokenizer(), store=store) as ouroboros:
        ouroboros.generate(PROMPT, scope="c", options=OPTIONS)
        pool = store.open("c", fingerprint=ouroboros.fingerprint)
        assert pool.recall("")
        stream = ouroboros.stream(PROMPT, scope="c", options=OPTIONS)
        next(stream)
        store.delete("c")
        list(stream)
        assert pool.recall("") == {}


def test_what_was_learned_is_there_for_the_next_process(tmp_path: Path) -> None:
    url, before = f"sqlite:///{tmp_path}/phrases.db", b""
    for number in range(2):
        with Ouroboros(tiny_model(), byte_tokenizer(), store=url) as ouroboros:
            ouroboros.generate(PROMPT, scope="c", options=OPTIONS)
            session = ouroboros._sessions.sessions.open("c")
            if number:
                assert session.memory.calibration.to_bytes() != before  # it went on from there
            before = session.memory.calibration.to_bytes()
            learned = ouroboros.store.open("c", fingerprint=ouroboros.fingerprint).recall("")
            assert learned[f"{ouroboros._prepared.fingerprint}/calibration"] == before
            # Another scope knows nothing of it.
            ouroboros.generate(PROMPT, scope="d", options=DecodingOptions(max_new_tokens=1))
            assert len(ouroboros._sessions.sessions.open("d").memory.successors) < len(session.memory.successors)


def test_collecting_an_abandoned_stream_inside_a_lock_does_not_deadlock(tiny_ouroboros: Ouroboros) -> None:
    streams = [tiny_ouroboros.stream(PROMPT, scope="c", options=OPTIONS)]
    next(streams[0])
    done = threading.Event()

    def collect() -> None:
        with tiny_ouroboros._sessions.sessions._lock:
            streams.clear()  # what the garbage collector does, in whichever thread allocates
        done.set()

    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(60)


def test_draft_models_that_cannot_rewind_are_refused() -> None:
    for architecture in ("mamba_plain", "lfm2_chains"):
        with pytest.raises(ModelError, match="draft_model must be able to drop"):
            Ouroboros(tiny_model(), byte_tokenizer(), draft_model=tiny_model(architecture))


def test_a_draft_model_with_a_shorter_context_drafts_as_far_as_it_reads() -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_model("gpt2").config)
    config.n_positions = 64
    short = type(tiny_model("gpt2"))(config).train(False)
    prompt = "abcabd" * 7
    with Ouroboros(tiny_model("gpt2"), byte_tokenizer(), draft_model=short) as ouroboros:
        result = ouroboros.generate(prompt, options=DecodingOptions(max_new_tokens=60))
        assert list(result.token_ids) == plain(ouroboros.model, ouroboros.encode(prompt), 60)
        assert result.statistics.draft_forwards > 0


@pytest.mark.parametrize("pair", [("a name", None), (None, None)])
def test_names_are_no_models(pair: tuple[Any, Any]) -> None:
    with pytest.raises(OptionError, match="from_pretrained"):
        Ouroboros(*pair)


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/at/all\0/x.db", "nosuchdialect://x", "phrases.db"])
def test_a_store_that_cannot_be_opened_is_one_warning(url: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Ouroboros(tiny_model(), byte_tokenizer(), store=url) as ouroboros:
            for _ in range(2):
                result = ouroboros.generate(PROMPT, options=OPTIONS)
    assert list(result.token_ids) == plain(tiny_model(), byte_tokenizer()(PROMPT)["input_ids"], 40)
    assert len([warning for warning in caught if issubclass(warning.category, RuntimeWarning)]) == 1


def test_closing_twice_is_closing_once(tiny_ouroboros: Ouroboros) -> None:
    tiny_ouroboros.close()
    tiny_ouroboros.close()


# --- where an answer goes, and what its text shows ---


def test_an_answer_is_added_to_further_scopes_but_they_are_not_read(tiny_ouroboros: Ouroboros) -> None:
    first = tiny_ouroboros.generate(PROMPT, scope="a", write_scopes=["agent:x", "a"], options=FIXED_WIDTH)
    unread = tiny_ouroboros.generate(PROMPT, scope="b", write_scopes=["agent:x"], options=FIXED_WIDTH)
    reader = tiny_ouroboros.generate(PROMPT, scope="c", read_scopes=["agent:x"], options=FIXED_WIDTH)
    assert first.token_ids == unread.token_ids == reader.token_ids
    assert "answers" not in unread.statistics.accepted_by_source
    assert reader.statistics.accepted_by_source["answers"] > 0
    assert tiny_ouroboros.store.open("agent:x", fingerprint=tiny_ouroboros.fingerprint).stats.runs == 1
    with pytest.raises(OptionError, match="write_scopes"):
        tiny_ouroboros.generate(PROMPT, write_scopes="agent:x")


def test_a_scope_begins_with_the_calibration_of_those_that_it_reads(tiny_ouroboros: Ouroboros) -> None:
    model = tiny_ouroboros._prepared.fingerprint

    def notes(scope: str) -> Mapping[str, bytes]:
        pool = tiny_ouroboros.store.open(scope, fingerprint=tiny_ouroboros.fingerprint)
        assert isinstance(pool, NoteStore)
        return pool.recall("")

    def begin(scope: str, *read: str) -> bytes:
        nothing = DecodingOptions(max_new_tokens=1, drafters=())
        tiny_ouroboros.generate(PROMPT, scope=scope, read_scopes=read, options=nothing)
        return notes(scope)[f"{model}/calibration"]

    tiny_ouroboros.generate(PROMPT, scope="a", write_scopes=["agent:x"], options=FIXED_WIDTH)
    learned = notes("a")[f"{model}/calibration"]
    # No successors: they are of the prompt as well.
    assert not [name for name in notes("agent:x") if "/successors/" in name]
    assert notes("agent:x")[f"{model}/calibration"] == learned
    assert len(notes("a")) > 1
    assert json.loads(learned)["counts"]
    assert begin("b", "empty", "agent:x") == learned
    assert begin("stranger") != learned
    # What a scope has found out for itself comes first.
    tiny_ouroboros.generate(PROMPT, scope="agent:y", options=OPTIONS)
    assert begin("a", "agent:y") == learned


async def test_text_shows_the_special_tokens_that_are_asked_for(tiny_ouroboros: Ouroboros) -> None:
    plain_text = tiny_ouroboros.generate(PROMPT, options=OPTIONS)
    special = dict(enumerate(SPECIAL_TOKENS))
    bias = DecodingOptions(max_new_tokens=4, logit_bias={3: 1e9})
    hidden = tiny_ouroboros.generate(PROMPT, options=bias)
    assert (hidden.text, hidden.token_ids) == ("", (3, 3, 3, 3))
    assert tiny_ouroboros.generate(PROMPT, options=bias, kept_tokens=special).text == "<|system|>" * 4
    assert "".join(piece.text for piece in tiny_ouroboros.stream(PROMPT, options=bias, kept_tokens=special)) == (
        (await tiny_ouroboros.agenerate(PROMPT, options=bias, kept_tokens=special)).text
    )
    assert tiny_ouroboros.generate(PROMPT, options=OPTIONS, kept_tokens={}).text == plain_text.text
