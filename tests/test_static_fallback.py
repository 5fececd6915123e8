"""Passes of fixed shape that fail: the library's own forward takes over, and nobody who reads an answer can tell."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, own_model, plain
from test_graphed import TREE, ByAddress, Repeating

from ouroboros_llm import DecodingOptions, Ouroboros
from ouroboros_llm.decoding.target import DeviceAcceptance, GreedyAcceptance
from ouroboros_llm.target_model import measurements, prepared
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.prepared import measure, prepare
from ouroboros_llm.target_model.static.forward import StaticForward
from ouroboros_llm.target_model.static.in_place import PointerAttention

PROMPT = [5 + number * 7 % 90 for number in range(40)]
OTHER = [7, 8] * 9
GREEDY = DecodingOptions(max_new_tokens=40)
SAMPLED = DecodingOptions(max_new_tokens=40, temperature=0.7, seed=3)


class CompilationError(Exception):
    """As Triton's: no RuntimeError."""


class Failing:
    """Passes of fixed shape of all models, of which some raise."""

    def __init__(self, patch: pytest.MonkeyPatch, when: Callable[[int], Exception | None]) -> None:
        self.passes, self.failures = 0, 0
        self._when, self._step = when, StaticForward.step
        patch.setattr(StaticForward, "step", lambda static, *args: self.step(static, *args))

    def step(self, static: StaticForward, *args: Any) -> torch.Tensor:
        # What fails has written its keys and values already.
        logits = self._step(static, *args)
        self.passes += 1
        if (error := self._when(self.passes)) is not None:
            self.failures += 1
            raise error
        return logits


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "ouroboros_llm")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("ouroboros_llm")]


@pytest.fixture
def wrapped() -> Iterator[Ouroboros]:
    with Ouroboros(own_model(), byte_tokenizer(), target="static") as ouroboros:
        assert ouroboros._prepared.way.static is not None
        yield ouroboros


def answer(ouroboros: Ouroboros, prompt: list[int], scope: str, options: DecodingOptions = GREEDY) -> list[int]:
    return list(ouroboros.generate(prompt, scope=scope, options=options).token_ids)


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        SAMPLED,
        DecodingOptions(max_new_tokens=40, repetition_penalty=1.3),
        DecodingOptions(max_new_tokens=40, drafters=("phrases",)),
        DecodingOptions(max_new_tokens=40, max_draft_tokens=0),
    ],
    ids=["greedy", "sampled", "penalty", "no recycling", "no drafts"],
)
def test_logits_that_are_no_numbers_reach_nobody(
    options: DecodingOptions, wrapped: Ouroboros, monkeypatch: pytest.MonkeyPatch, warned: Callable[[], list[str]]
) -> None:
    expected = answer(wrapped, PROMPT, "before", options)
    step = StaticForward.step
    monkeypatch.setattr(StaticForward, "step", lambda static, *args: step(static, *args) * float("nan"))
    assert answer(wrapped, PROMPT, "a", options) == expected
    assert len(warned()) == 1 and wrapped._prepared.way.static is None


def on_disk(folder: Path, model: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{prepared._known[model].key}.json").read_text())
    return found


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize(
    "error",
    [CompilationError("no such\ninstruction"), RuntimeError("0 of 2 layers use the library's attention interface")],
    ids=["compiler", "layers"],
)
def test_a_pass_that_fails_is_made_again_by_the_library(
    wrapped: Ouroboros,
    error: Exception,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    warned: Callable[[], list[str]],
    measurements_folder: Path,
) -> None:
    assert on_disk(measurements_folder, wrapped.model)["static"] is not None
    failing = Failing(monkeypatch, lambda count: error if count >= number else None)
    assert answer(wrapped, PROMPT, "a") == plain(wrapped.model, PROMPT, 40)
    assert (failing.passes, failing.failures) == (number, 1)
    (line,) = warned()
    assert "LlamaForCausalLM failed" in line and str(error).partition("\n")[0] in line and "\n" not in line
    for prompt, scope in ((PROMPT, "a"), (OTHER, "b")):
        assert answer(wrapped, prompt, scope) == plain(wrapped.model, prompt, 40)
    assert failing.passes == number and len(warned()) == 1, "no pass of fixed shape is made any more"
    found = on_disk(measurements_folder, wrapped.model)
    assert found["static_wins"] is False and found["static"] is None


def test_choices_of_sampling_are_not_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with Ouroboros(own_model(), byte_tokenizer(), target="eager") as eager:
        wanted = answer(eager, PROMPT, "a", SAMPLED)
    with Ouroboros(own_model(), byte_tokenizer(), target="static") as static:
        failing = Failing(monkeypatch, lambda count: CompilationError() if count == 5 else None)
        assert answer(static, PROMPT, "a", SAMPLED) == wanted
        assert failing.failures == 1


def test_texts_that_are_open_go_on_by_the_library(wrapped: Ouroboros, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [wrapped._prepared.start() for _ in range(2)]
    for target in targets:
        target.prefill(PROMPT)
        target.keep((0,))
    failing = Failing(monkeypatch, lambda count: CompilationError())
    other = targets[1].fork(len(PROMPT))
    rows = [target.verify(prepared.DraftTree.chain((60, 61, 62))) for target in (*targets, other)]
    assert failing.passes == 1
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_concurrent_requests_and_draft_models_are_answered_too(
    monkeypatch: pytest.MonkeyPatch, warned: Callable[[], list[str]]
) -> None:
    model, draft = own_model(), own_model("qwen3", seed=1)
    with Ouroboros(model, byte_tokenizer(), draft_model=(draft, byte_tokenizer()), target="static") as ouroboros:
        assert ouroboros._draft is not None and ouroboros._draft.way.static is not None
        Failing(monkeypatch, lambda count: CompilationError("no such instruction") if count >= 4 else None)
        prompts: list[Any] = [PROMPT, OTHER, [9, *OTHER]]
        for prompt, result in zip(prompts, ouroboros.batch(prompts, options=GREEDY), strict=True):
            assert list(result.token_ids) == plain(model, prompt, 40)
        for one in (ouroboros._prepared, ouroboros._draft):
            assert (one.way.missed, one.way.static) == ("one failed: no such instruction", None)
    assert sorted(line.split(" failed")[0].split()[-1] for line in warned()) == ["LlamaForCausalLM", "Qwen3ForCausalLM"]


@pytest.mark.parametrize("greedy", [False, True], ids=["verify", "walk"])
def test_a_pass_that_fails_while_it_is_recorded_is_taken_back(greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own_model()
    static = StaticForward(model, PointerAttention(ByAddress), Repeating())
    told: list[Exception] = []
    static.on_failure = told.append
    target, oracle = (EagerTarget(model, "tree", static=one) for one in (static, None))
    for one in (target, oracle):
        one.prefill(PROMPT)
        one.keep((0,))
    Failing(monkeypatch, lambda count: CompilationError() if count == 3 else None)
    found = target.walk(TREE, GreedyAcceptance(9)) if greedy else target.verify(TREE)
    assert torch.equal(found, oracle.verify(TREE))  # type: ignore[arg-type]
    assert len(told) == 1 and target.static is None
    for one in (target, oracle):
        one.keep((0, 2))
    assert torch.equal(target.verify(TREE), oracle.verify(TREE))


def wrong_path(walked: DeviceAcceptance) -> DeviceAcceptance:
    return walked._replace(path=(0, 1))


def no_numbers(walked: DeviceAcceptance) -> DeviceAcceptance:
    ranked = tuple(tuple((token_id, float("nan")) for token_id, _ in row) for row in walked.successors)
    return walked._replace(successors=ranked, likeliest=[3] * len(walked.likeliest))


@pytest.mark.parametrize("wrong", [wrong_path, no_numbers])
def test_a_walk_that_is_plainly_wrong_is_taken_back(
    wrapped: Ouroboros,
    wrong: Callable[[DeviceAcceptance], DeviceAcceptance],
    monkeypatch: pytest.MonkeyPatch,
    warned: Callable[[], list[str]],
) -> None:
    from ouroboros_llm.target_model import eager

    read = eager.read
    monkeypatch.setattr(eager, "read", lambda *row: wrong(read(*row)))
    assert answer(wrapped, PROMPT, "a") == plain(wrapped.model, PROMPT, 40)
    assert len(warned()) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_is_no_failure_of_these_passes(
    wrapped: Ouroboros, error: Exception, monkeypatch: pytest.MonkeyPatch, warned: Callable[[], list[str]]
) -> None:
    failing = Failing(monkeypatch, lambda count: error if count == 3 else None)
    assert answer(wrapped, PROMPT, "a") == plain(wrapped.model, PROMPT, 40)
    assert failing.failures == 1 and failing.passes > 10 and not warned()
    assert wrapped._prepared.way.static is not None


def test_who_interrupts_is_heard(wrapped: Ouroboros, monkeypatch: pytest.MonkeyPatch) -> None:
    target = wrapped._prepared.start()
    target.prefill(PROMPT)
    target.keep((0,))
    Failing(monkeypatch, lambda count: KeyboardInterrupt())  # type: ignore[arg-type,return-value]
    with pytest.raises(KeyboardInterrupt):
        target.verify(prepared.DraftTree.root(60))
    assert wrapped._prepared.way.static is not None


def test_a_device_that_is_lost_is_an_error(wrapped: Ouroboros, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access no kernel runs any more, the library's neither."""
    target: Any = wrapped._prepared.start()
    target.prefill(PROMPT)
    target.keep((0,))
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    Failing(monkeypatch, lambda count: lost)

    def poisoned(*_: Any, **__: Any) -> Any:
        raise lost

    monkeypatch.setattr(target, "_forward", poisoned)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        target.verify(prepared.DraftTree.root(60))


def test_who_asks_for_them_again_is_told(wrapped: Ouroboros, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Failing(patch, lambda count: CompilationError("no such instruction"))
        answer(wrapped, PROMPT, "a")
    with pytest.warns(RuntimeWarning, match=r"cannot make passes of fixed shape \(one failed: no such instruction\)"):
        again = Ouroboros(wrapped.model, byte_tokenizer(), target="static")
    assert answer(again, PROMPT, "c") == plain(wrapped.model, PROMPT, 40)
    again.close()
    assert prepare(wrapped.model).way.static is None


def test_what_fails_at_preparation_fails_before_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, lambda count: CompilationError("no such instruction"))
    with pytest.warns(RuntimeWarning, match=r"fixed shape \(no such instruction\)"):
        ouroboros = Ouroboros(own_model(), byte_tokenizer(), target="static")
    passes = failing.passes
    assert answer(ouroboros, PROMPT, "a") == plain(ouroboros.model, PROMPT, 40)
    assert failing.passes == passes
    ouroboros.close()


def test_a_walk_that_moves_the_wrong_nodes_is_found_at_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.target_model.static.forward.order", lambda nodes, path: nodes.numbers)
    found = prepare(own_model(), "static")
    assert found.way.missed is not None and "after a walk" in found.way.missed


# "auto".


def open_race(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prepared, "_LONG", 10.0)
    patch.setattr(prepared, "_wins", lambda *_: True)


@pytest.mark.clock
def test_on_devices_where_nothing_is_proven_auto_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    open_race(monkeypatch)
    model = own_model(seed=10)
    monkeypatch.setattr(prepared, "PROVEN_DEVICES", frozenset())
    assert prepare(model).way.static is None
    assert list(measure(model)) == [], "nothing is raced"
    known = prepared._known[model]
    known.note(static_wins=True)
    known.ways.pop("auto")
    assert prepare(model).way.static is None, "whatever an earlier version found"


@pytest.mark.clock
def test_on_devices_that_are_proven_auto_is_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    open_race(monkeypatch)
    model = own_model(seed=10)
    assert prepare(model).way.static is None
    assert len(list(measure(model))) > 1
    assert prepare(model).way.static is not None


@pytest.mark.clock
def test_accelerators_are_not_proven_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    open_race(monkeypatch)
    model = own_model(seed=10)
    prepare(model)
    known = prepared._known[model]
    for kind in ("cuda", "mps", "xpu"):
        device: Any = SimpleNamespace(device=torch.device(kind))
        assert not prepared._is_raced(device, known)
        with monkeypatch.context() as patch:
            patch.setattr(prepared, "PROVEN_DEVICES", frozenset({"cpu", kind}))
            assert prepared._is_raced(device, known)


@pytest.mark.clock
def test_passes_that_fail_in_the_race_have_lost_it(
    monkeypatch: pytest.MonkeyPatch, warned: Callable[[], list[str]], measurements_folder: Path
) -> None:
    monkeypatch.setattr(prepared, "_LONG", 10.0)
    monkeypatch.setattr(prepared, "_seconds", lambda target: 1.0 if target.static is None else 0.1)
    model = own_model(seed=10)
    prepare(model)
    work = measure(model)
    for _ in range(5):  # until the first race is due
        next(work)
    failing = Failing(monkeypatch, lambda count: CompilationError() if count == 2 else None)
    list(work)
    assert failing.failures == 1 and len(warned()) == 1
    assert prepare(model).way.static is None and on_disk(measurements_folder, model)["static_wins"] is False


@pytest.mark.clock
def test_what_won_and_then_failed_is_not_chosen_by_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    open_race(monkeypatch)
    model = own_model(seed=10)
    prepare(model)
    list(measure(model))
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        assert ouroboros._prepared.way.static is not None
        Failing(monkeypatch, lambda count: CompilationError())
        assert answer(ouroboros, PROMPT, "a") == plain(model, PROMPT, 40)
    measurements._memory.clear()
    again = own_model(seed=10)
    assert prepare(again).way.static is None and list(measure(again)) == []


@pytest.mark.clock
def test_what_failed_on_one_copy_of_the_weights_is_chosen_for_no_other(
    monkeypatch: pytest.MonkeyPatch, measurements_folder: Path
) -> None:
    open_race(monkeypatch)
    models = [own_model(seed=20) for _ in range(2)]
    for model in models:
        prepare(model)
        list(measure(model))
        assert prepare(model).way.static is not None
    prepared._known[models[0]].lose("Llama", CompilationError())
    list(measure(models[1]))  # writes what it knows
    assert on_disk(measurements_folder, models[1])["static_wins"] is False
    assert prepare(own_model(seed=20)).way.static is None
