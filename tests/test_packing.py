"""Passes of several texts made as one: the same tokens as alone, in fewer passes, and nobody pays for another."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, byte_tokenizer, own_model, plain, tiny_model

import ouroboros_llm.target_model.batching
from ouroboros_llm import DecodingOptions, GenerationResult, OptionError, Ouroboros, QueueFullError
from ouroboros_llm.decoding.decoder import Decoder
from ouroboros_llm.decoding.draft_tree import DraftTree
from ouroboros_llm.decoding.drafter import NoDrafts
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.decoding.target import Pass
from ouroboros_llm.serving.request import AHEAD, End, Request, Steps
from ouroboros_llm.serving.scheduler import Scheduler
from ouroboros_llm.target_model import prepared
from ouroboros_llm.target_model.batching import BatchedLayer, Batcher, BatchLatency, can_batch
from ouroboros_llm.target_model.capabilities import probe, probe_batching
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.latency import LatencyModel
from ouroboros_llm.target_model.prepared import prepare

pytestmark = pytest.mark.clock

PATIENCE = 120
TREES = ("llama", "qwen3", "gpt_neox", "gpt2", "mistral_sliding", "gemma3_mixed")
TREE = DraftTree((60, 61, 62, 63, 64, 65), (-1, 0, 0, 1, 2, 4), (1.0,) * 6, ("",) * 6, (None,) * 6)
PROMPTS = [
    "the cat sat on the mat, the cat",
    "abcabcabcabc",
    "x",
    "def f(a):\n    return a\n" * 4,
    "one two one two one",
]
TOKENS = 40


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Packs whatever can be, whatever it takes; the widths of the texts' parts in each pass that was packed."""
    made: list[list[int]] = []
    together = Batcher.together

    def noted(self: Batcher, passes: Sequence[Pass]) -> list[torch.Tensor]:
        made.append([wanted.draft.width for wanted in passes])
        return together(self, passes)

    monkeypatch.setattr(BatchLatency, "cost", lambda *_: 1.0)
    monkeypatch.setattr(Batcher, "together", noted)
    # Its passes are nobody's answers, and have tests of their own.
    monkeypatch.setattr(prepared, "probe_batching", lambda _: True)
    return made


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens of every pass of a model."""
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, given, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield widths
    finally:
        hook.remove()


def held(ouroboros: Ouroboros) -> Any:
    """Lets everybody submit before the first step is taken."""

    @contextmanager
    def holding() -> Iterator[None]:
        ouroboros._worker.hold()
        try:
            yield
        finally:
            ouroboros._worker.go_on()

    return holding()


def at_once(ouroboros: Ouroboros, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls return or raise; all of them have been submitted when the first is decoded."""
    found: list[Any] = [None] * len(calls)

    def call(number: int) -> None:
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    with held(ouroboros):
        for thread in threads:
            thread.start()
        while ouroboros._worker.requests < len(calls) and all(thread.is_alive() for thread in threads):
            threading.Event().wait(0.001)
    for thread in threads:
        thread.join(PATIENCE)
    return found


def ids(prompt: str) -> list[int]:
    found: list[int] = byte_tokenizer()(prompt)["input_ids"]
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", TREES)
def test_a_packed_pass_gives_what_each_gets_alone(architecture: str, implementation: str) -> None:
    model = tiny_model(architecture, seed=5)
    model.set_attn_implementation(implementation)
    prepared = prepare(model)
    assert prepared.packer is not None

    def passes() -> list[Pass]:
        found = []
        for number, length in enumerate((3, 40, 17, 90)):
            target = prepared.start()
            target.prefill(ids("abcdefg" * 20)[number : number + length])
            target.keep((0,))
            found.append(Pass(target, (TREE, DraftTree.root(9), DraftTree.chain((9, 8, 7)), TREE)[number]))
        new = ids("a prompt that nobody has read so far")
        prompt = Pass(prepared.start(), DraftTree.root(new[-1]), new, 3)
        # This one goes on from what is there, and verifies a draft in the same pass.
        known = prepared.start()
        known.prefill(new[:20])
        known.keep((0,))
        tree = DraftTree((new[-1], *TREE.token_ids[1:]), TREE.parents, TREE.chances, TREE.sources, TREE.evidence)
        return [*found, prompt, Pass(known, tree, new, 30)]

    together, alone = passes(), passes()
    for path in ((0,), (0, 2, 4), (0, 1)):
        for packed, wanted in zip(prepared.packer.together(together), [one.make() for one in alone], strict=True):
            assert packed.shape == wanted.shape
            assert torch.allclose(packed, wanted, atol=1e-3, rtol=1e-3)
        for one in (*together, *alone):
            one.target.keep(path if one.draft is TREE else (0,))
            one.draft, one.text = TREE, None
        assert [list(one.target.token_ids) for one in together] == [list(one.target.token_ids) for one in alone]


@pytest.mark.parametrize("architecture", TREES)
def test_no_text_depends_on_its_company(architecture: str) -> None:
    """To the last bit: what is masked counts exactly nothing."""
    prepared = prepare(tiny_model(architecture))
    assert prepared.packer is not None
    found = []
    for company in ("somebody else's secret", "nobody else's worry..."):
        texts = [ids(company), ids("mine alone"), ids(company[::-1])]
        passes = [Pass(prepared.start(), DraftTree.root(text[-1]), text, 8) for text in texts]
        found.append(prepared.packer.together(passes))
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.allclose(found[0][0], found[1][0], atol=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_models_that_verify_trees_are_packed(architecture: str) -> None:
    packer = prepare(tiny_model(architecture)).packer
    assert (packer is not None) is (architecture in TREES)
    assert packer is None or probe_batching(tiny_model(architecture))


def test_a_model_that_packs_wrongly_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    update = BatchedLayer.update

    def leaking(self: BatchedLayer, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = update(self, *given, **named)
        return keys.flip(2), values

    assert probe_batching(tiny_model())
    monkeypatch.setattr(BatchedLayer, "update", leaking)
    assert probe(tiny_model()).branching == "tree" and not probe_batching(tiny_model())
    monkeypatch.setattr(BatchLatency, "cost", lambda *_: 1.0)
    with Ouroboros(own_model(), byte_tokenizer()) as ouroboros:
        results = ouroboros.batch(PROMPTS, options=DecodingOptions(max_new_tokens=TOKENS))
        for prompt, result in zip(PROMPTS, results, strict=True):
            assert list(result.token_ids) == plain(ouroboros.model, ouroboros.encode(prompt), TOKENS)
    monkeypatch.setattr(BatchedLayer, "update", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe_batching(tiny_model())
    monkeypatch.setattr(BatchedLayer, "update", lambda *_, **__: None)
    assert not probe_batching(tiny_model())


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
        {"rope_scaling": {"type": "longrope"}},
        {"attn_temperature_tuning": True},
    ],
)
def test_texts_whose_angles_depend_on_others_are_not_packed(changed: dict[str, Any]) -> None:
    class Config:
        pass

    config = Config()
    assert can_batch(config) and can_batch(tiny_model("gemma3_mixed").config)
    vars(config).update(changed)
    assert not can_batch(config)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("architecture", TREES)
def test_batches_are_answered_as_each_alone(architecture: str, sampled: bool, packs: list[list[int]]) -> None:
    model = tiny_model(architecture)
    lengths = (TOKENS, 7, 23, 31, 12)
    sampling: dict[str, Any] = {"temperature": 0.8} if sampled else {}
    options = [
        DecodingOptions(max_new_tokens=length, seed=number if sampled else None, max_draft_tokens=width, **sampling)
        for number, (length, width) in enumerate(zip(lengths, (None, 6, 0, 20, 3), strict=True))
    ]
    wanted = []
    for number, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        torch.manual_seed(number)
        given = dict(do_sample=True, temperature=0.8, top_k=0) if sampled else {}
        wanted.append(plain(model, ids(prompt), length, **given))
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        for scope in (None, "one", ["a", "b", "c", "d", "e"]):
            for _ in range(2):  # the second time with pools that know the answer
                results = ouroboros.batch(PROMPTS, scope=scope, options=options)
                assert [list(result.token_ids) for result in results] == wanted
    assert any(len(widths) > 2 and max(widths) > 1 for widths in packs)


def test_a_draft_model_beside(packs: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("qwen3"), byte_tokenizer()
    with Ouroboros(model, tokenizer, draft_model=(tiny_model(), tokenizer)) as ouroboros:
        results = ouroboros.batch(PROMPTS, options=DecodingOptions(max_new_tokens=TOKENS))
    assert [list(result.token_ids) for result in results] == [plain(model, ids(prompt), TOKENS) for prompt in PROMPTS]
    assert packs and sum(result.statistics.draft_forwards for result in results) > 0


def test_eight_answers_take_hardly_more_passes_than_one(packs: list[list[int]]) -> None:
    model, prompts = tiny_model(), [f"{number} green bottles" for number in range(8)]
    options = DecodingOptions(max_new_tokens=TOKENS, max_draft_tokens=0)
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        calls = [
            lambda number=number: ouroboros.generate(prompts[number], scope=f"{number}", options=options)
            for number in range(8)
        ]
        ouroboros.generate("narrow passes are measured by the first", options=DecodingOptions(max_new_tokens=1))
        with counted(model) as alone:
            results = [call() for call in calls]
        assert len(alone) == 8 * TOKENS
        with Ouroboros(model, byte_tokenizer()) as fresh, counted(model) as widths:
            calls = [
                lambda number=number: fresh.generate(prompts[number], scope=f"{number}", options=options)
                for number in range(8)
            ]
            assert [result.token_ids for result in at_once(fresh, calls)] == [one.token_ids for one in results]
        # All prompts in one pass, then a token of each in every other.
        assert widths == [sum(map(len, map(ids, prompts))), *[8] * (TOKENS - 1)]


def test_drafts_and_packs_add_up(packs: list[list[int]]) -> None:
    model, prompts = tiny_model(), [f"{number} green bottles" for number in range(8)]
    options = DecodingOptions(max_new_tokens=TOKENS, max_draft_tokens=12)
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        scopes = [f"{number}" for number in range(8)]
        cold = ouroboros.batch(prompts, scope=scopes, options=options)
        with counted(model) as widths:
            warm = ouroboros.batch(prompts, scope=scopes, options=options)
        assert [one.token_ids for one in warm] == [one.token_ids for one in cold]
        assert len(widths) < sum(one.statistics.target_forwards for one in warm) < 8 * TOKENS / 4


def test_answers_join_and_leave_in_mid_flight(packs: list[list[int]]) -> None:
    model = tiny_model("mistral_sliding")
    lengths = (90, 5, 60, 17, 44, 3, 71, 30)
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        answers: dict[int, list[int]] = {}

        def ask(number: int) -> None:
            options = DecodingOptions(max_new_tokens=lengths[number], max_draft_tokens=number % 3 * 4)
            stream = ouroboros.stream(PROMPTS[number % 5], scope=f"{number}", options=options)
            tokens: list[int] = []
            for piece in stream:
                tokens += piece.token_ids
                if number % 4 == 2 and len(tokens) > 20:
                    stream.close()
            answers[number] = tokens

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads[:3]:
            thread.start()
        while len(packs) < 5 and any(thread.is_alive() for thread in threads[:3]):
            threading.Event().wait(0.001)
        for thread in threads[3:]:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        for number in range(8):
            wanted = plain(model, ids(PROMPTS[number % 5]), lengths[number])
            assert answers[number] == wanted[: len(answers[number])]
            assert len(answers[number]) == len(wanted) or (number % 4 == 2 and len(answers[number]) > 20)
        ouroboros.flush()
        assert ouroboros._worker.requests == 0 and ouroboros.kv_usage.in_use == 0
    assert len({len(widths) for widths in packs}) > 1


def test_long_prompts_share_passes_as_far_as_they_fit(packs: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.sessions.prefix_cache.PREFILL_CHUNK", 16)
    monkeypatch.setattr(ouroboros_llm.target_model.batching, "BATCH_TOKENS", 40)
    model = tiny_model()
    prompts = [f"{number}" * 100 for number in range(4)]
    options = DecodingOptions(max_new_tokens=5, max_draft_tokens=0)
    with Ouroboros(model, byte_tokenizer()) as ouroboros, counted(model) as widths:
        results = ouroboros.batch(prompts, scope=list("abcd"), options=options)
        assert [list(result.token_ids) for result in results] == [plain(model, ids(prompt), 5) for prompt in prompts]
    assert 32 in widths and max(width for width in widths if width != 100) <= 40


class Poisoned:
    """`EagerTarget.read` that fails on some passes, after the cache was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[Any], bool], error: Exception) -> None:
        """`when` gets the drafts of a pass."""
        self.failures = 0
        read = EagerTarget.read

        def failing(target: EagerTarget, rows: Any, *given: Any) -> torch.Tensor:
            logits = read(target, rows, *given)
            if when([draft for draft, _ in rows]):
                self.failures += 1
                raise error
            return logits

        monkeypatch.setattr(EagerTarget, "read", failing)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_pack_that_runs_out_of_memory_is_made_one_by_one(
    packs: list[list[int]], monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    sampling: dict[str, Any] = {"temperature": 0.7, "seed": 3} if sampled else {}
    options = DecodingOptions(max_new_tokens=TOKENS, max_draft_tokens=5, **sampling)
    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        wanted = [ouroboros.generate(prompt, scope="alone", options=options).token_ids for prompt in PROMPTS]
        packs.clear()
        poisoned = Poisoned(monkeypatch, lambda drafts: len(drafts) > 2, torch.OutOfMemoryError("CUDA out of memory."))
        results = ouroboros.batch(PROMPTS, options=options)
        assert [result.token_ids for result in results] == wanted
        assert poisoned.failures > 0 and packs
        assert sum(result.statistics.drafted_tokens for result in results) > 60, "drafts are not given up for it"


def test_an_error_reaches_only_the_caller_whose_text_it_is(
    packs: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = tiny_model(), [ids("abc"), ids("x"), ids("one two")]
    wanted = [plain(model, text, 20) for text in texts]
    bad = next(token_id for token_id in range(7, 263) if all(token_id not in text for text in (*texts, *wanted)))
    options = DecodingOptions(max_new_tokens=20, max_draft_tokens=0)
    prompts = [texts[0], [*ids("ab"), bad, *ids("cd")], *texts[1:]]
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        ouroboros.batch(PROMPTS, options=options)  # it is probed by now
        poisoned = Poisoned(
            monkeypatch, lambda drafts: any(bad in draft.token_ids for draft in drafts), ValueError("a bad text")
        )
        calls = [
            lambda number=number: ouroboros.generate(prompts[number], scope=f"{number}", options=options)
            for number in range(4)
        ]
        found = at_once(ouroboros, calls)
        assert isinstance(found[1], ValueError) and str(found[1]) == "a bad text"
        assert poisoned.failures == 2, "once with the others, once by itself"
        assert [list(found[number].token_ids) for number in (0, 2, 3)] == wanted
        with pytest.raises(ValueError, match="a bad text"):
            ouroboros.batch(prompts, options=options)
        ouroboros.flush()
        assert ouroboros._worker.requests == 0 and ouroboros.kv_usage.in_use == 0


def test_exact_answers_are_made_alone(packs: list[list[int]]) -> None:
    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        exact = DecodingOptions(max_new_tokens=20, exact=True)
        ouroboros.batch(PROMPTS, options=exact)
        assert packs == []
        ouroboros.batch(PROMPTS, options=[exact, None, exact, exact, None])
        assert packs and max(map(len, packs)) == 2


def test_decoders_by_themselves_make_their_own_passes() -> None:
    target = prepare(tiny_model()).start()
    steps = list(Decoder(target, NoDrafts()).steps(ids("abc"), Sampler(), limit=4))
    assert [type(step).__name__ for step in steps] == ["Pass", "Round"] * 4
    rounds = Decoder(prepare(tiny_model()).start(), NoDrafts()).rounds(ids("abc"), Sampler(), limit=4)
    assert [token_id for round in rounds for token_id in round.token_ids] == plain(tiny_model(), ids("abc"), 4)


# What pays.


def passes(*widths: int) -> list[Pass]:
    """Passes over chains of these widths, for a packer to choose among."""
    made = []
    for width in widths:
        target = EagerTarget(tiny_model(), "tree")
        made.append(Pass(target, DraftTree.chain((5,) * width)))
    return made


def packer(kind: str = "cpu") -> Batcher:
    times = LatencyModel(kind)
    times.add(1, 0.1)
    return Batcher(times, threading.RLock())


def chosen(packer: Batcher, wanted: Sequence[Pass]) -> list[int]:
    """The places of the passes that it would make in one."""
    return [wanted.index(one) for one in packer._chosen(wanted)]


def test_passes_are_packed_while_that_pays_by_measured_times() -> None:
    one, wanted = packer(), passes(1, 1, 1, 1)
    assert chosen(one, wanted) == [0, 1, 2, 3]
    for _ in range(20):
        one.times.add(4, 4, 4, 3.0)  # as long as thirty passes over one token each
    assert len(chosen(one, wanted)) < 4
    for _ in range(20):
        one.times.add(3, 3, 3, 3.0)
        one.times.add(2, 2, 2, 3.0)
    assert chosen(one, wanted) == [0]
    declined = next(number for number in range(1000) if chosen(one, wanted) == [0, 1, 2, 3])
    assert declined > 20, "tried again, but not often"
    for _ in range(20):
        one.times.add(4, 4, 4, 0.11)
    assert chosen(one, wanted) == [0, 1, 2, 3]


def test_who_is_first_is_always_among_those_chosen() -> None:
    one = packer()
    for widths in itertools.permutations((600, 1, 2)):
        order = chosen(one, passes(*widths))
        assert order[0] == 0
        # What is too wide for company goes alone.
        assert {widths[place] for place in order} == ({600} if widths[0] == 600 else {1, 2})


def test_a_slow_machine_does_not_make_packs_look_dear() -> None:
    one, wanted = packer(), passes(*[1] * 8)
    for _ in range(30):
        one.times.add(8, 8, 8, 0.6)
    assert one.times.one is not None and one.times.one > 0.15
    assert len(chosen(one, wanted)) == 8


def test_drafts_are_narrower_in_company() -> None:
    one = packer("cpu float32")
    alone = [one.cost(width) for width in (1, 2, 8, 64)]
    seconds = one.seconds
    one.members = 8
    packed = [one.cost(width) for width in (1, 2, 8, 64)]
    assert alone[0] == packed[0] == 1.0
    assert packed[3] > packed[2] > packed[1] > 1.0
    assert packed[3] > 2 * alone[3], "in company, 64 nodes each are 512 tokens"
    assert seconds is not None and one.seconds is not None and one.seconds < seconds / 4


def test_wide_passes_over_prompts_are_measured_alone_too() -> None:
    prepared = prepare(tiny_model("qwen3", seed=21))
    assert prepared.packer is not None
    prepared.start().prefill(ids("a" * 60))
    assert not prepared.packer.times._surplus
    prepared.start().prefill(ids("a" * 200))
    assert list(prepared.packer.times._surplus) == [(False, 8, 8)]


# Many prompts in one call.


def test_a_batch_may_be_longer_than_the_queue() -> None:
    model = own_model()
    with Ouroboros(model, byte_tokenizer(), max_active=2, max_waiting=1) as ouroboros:
        results = ouroboros.batch([f"{number}" for number in range(12)], options=DecodingOptions(max_new_tokens=4))
        assert [list(one.token_ids) for one in results] == [plain(model, ids(f"{n}"), 4) for n in range(12)]
        others = [ouroboros.stream("abc", options=DecodingOptions(max_new_tokens=400)) for _ in range(3)]
        for stream in others:
            next(stream)
        with pytest.raises(QueueFullError):
            ouroboros.batch(["a", "b"])
        for stream in others:
            stream.close()
        assert ouroboros.batch([]) == []


def test_scopes_of_a_batch_are_their_prompts_own(tiny_ouroboros: Ouroboros) -> None:
    options = DecodingOptions(max_new_tokens=20, max_draft_tokens=6)
    tiny_ouroboros.batch(["abcd", "wxyz"], scope=["a", "b"], options=options)
    again: list[GenerationResult] = tiny_ouroboros.batch(["abcd", "abcd"], scope=["a", "b"], options=options)
    assert [result.usage.cached_tokens for result in again] == [3, 0]
    assert again[0].statistics.target_forwards < again[1].statistics.target_forwards


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(prompts="abc"), "prompts must be a list of prompts, but got the text 'abc'"),
        (dict(prompts=["a", "b"], scope=["c"]), "scope must be one for all 2 prompts or a list of 2, but got 1"),
        (dict(prompts=["a", "b"], options=[None] * 3), "options must be one for all 2 prompts or a list of 2"),
        (dict(prompts=["a", "b"], options={"max_new_tokens": 3}), "options must be DecodingOptions"),
    ],
)
def test_bad_batches_are_refused(tiny_ouroboros: Ouroboros, given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        tiny_ouroboros.batch(**given)
    assert tiny_ouroboros._worker.requests == 0


# The worker, with passes that are none.


class FakePacker:
    """Answers every pass that stands there with the names of all of them."""

    def __init__(self) -> None:
        self.made: list[list[str]] = []

    def make(self, wanted: Sequence[Any]) -> dict[Any, Any]:
        self.made.append([one.target.name for one in wanted])
        return dict.fromkeys(wanted, self.made[-1])


class FakeTarget:
    def __init__(self, name: str, packer: FakePacker) -> None:
        self.name, self.packer = name, packer


class Company:
    """Requests that stop at passes, and what happened to them."""

    def __init__(self) -> None:
        self.packer = FakePacker()
        self.log: list[str] = []

    def request(self, name: str, steps: int, *, shares: bool = True, silent: bool = True) -> Request[Any]:
        return Request(self._steps(name, steps, shares, silent))

    def _steps(self, name: str, steps: int, shares: bool, silent: bool) -> Steps[Any]:
        try:
            for _ in range(steps):
                if shares:
                    target: Any = FakeTarget(name, self.packer)
                    made: Any = yield Pass(target, DraftTree.root(1))
                    assert name in made
                self.log.append(name)
                yield None if silent else name
        finally:
            self.log.append(f"{name} closed")
        return f"{name}!"


def run(worker: Scheduler, *requests: Request[Any]) -> None:
    worker.hold()
    for request in requests:
        worker.submit(request)
    worker.go_on()


def the_end_of(request: Request[Any]) -> list[Any]:
    found = []
    while not isinstance(item := request.arrived.get(timeout=PATIENCE), End):
        found.append(item)
    assert item.error is None
    return found


@pytest.fixture
def worker() -> Iterator[Scheduler]:
    worker = Scheduler()
    yield worker
    worker.retire()
    worker.join(PATIENCE)


def test_requests_that_stop_at_passes_go_on_together(worker: Scheduler) -> None:
    company = Company()
    requests = [company.request(name, 3 + 2 * (name == "c")) for name in "abc"]
    run(worker, *requests)
    assert [the_end_of(request) for request in requests] == [["a!"], ["b!"], ["c!"]]
    assert [sorted(made) for made in company.packer.made] == [list("abc")] * 3 + [["c"]] * 2


def test_whoever_shares_no_passes_has_as_many_turns(worker: Scheduler) -> None:
    company = Company()
    requests = [company.request(name, 30, shares=name != "x") for name in "axb"]
    run(worker, *requests)
    for request in requests:
        the_end_of(request)
    for place in range(12, 80):
        begun = [company.log[:place].count(name) for name in "axb"]
        assert max(begun) - min(begun) <= 2


def test_a_request_that_stands_at_a_pass_can_be_closed(worker: Scheduler) -> None:
    company = Company()
    closed, slow = company.request("closed", 10**6), company.request("slow", 50, silent=False)
    run(worker, closed, slow)
    while company.log.count("slow") < AHEAD:
        threading.Event().wait(0.001)
    closed.closed = True
    worker.wake()
    assert the_end_of(closed) == []
    assert "closed closed" in company.log
    assert company.log.count("slow") == AHEAD, "whose reader is behind costs no pass"
    other = company.request("other", 5)
    run(worker, other)
    assert the_end_of(other) == ["other!"]
    assert ["other"] in company.packer.made
    slow.closed = True
    worker.wake()
    the_end_of(slow)
