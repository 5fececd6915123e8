"""Measurements of a model on disk: found again for the same model on the same machine, and for nothing else."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, byte_tokenizer, own_model, plain

import ouroboros_llm.target_model.eager
import ouroboros_llm.target_model.measurements
from ouroboros_llm import DecodingOptions, Ouroboros
from ouroboros_llm.target_model import measurements, prepared
from ouroboros_llm.target_model.capabilities import Probe
from ouroboros_llm.target_model.latency import WIDTHS
from ouroboros_llm.target_model.measurements import BackendMeasurements, Measurements, find, keep, key_of
from ouroboros_llm.target_model.prepared import fingerprint, measure, prepare

PROMPT = [5 + number * 7 % 90 for number in range(40)]
OPTIONS = DecodingOptions(max_new_tokens=12)
Passes = list[tuple[Any, int]]
SOME = Measurements(
    BackendMeasurements(Probe("tree", 1e-5, token_bytes=256), tuple(0.1 * knot for knot in range(len(WIDTHS)))),
    BackendMeasurements(Probe("tree", 2e-5, token_bytes=256), (0.0,) * len(WIDTHS)),
    static_wins=True,
    batches=False,
)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """All forward passes of models, by which model and how wide; workers of other tests may still measure theirs."""
    made: Passes = []
    call = torch.nn.Module.__call__

    def counted(module: torch.nn.Module, *args: Any, **named: Any) -> Any:
        if "input_ids" in named and hasattr(module, "generation_config"):
            made.append((module, named["input_ids"].shape[1]))
        return call(module, *args, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    return made


@pytest.fixture
def later_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets what this process knows, so that only the disk is left."""

    def forget() -> None:
        measurements._memory.clear()

    return forget


def widths_of(model: Any, passes: Passes) -> list[int]:
    return [width for module, width in passes if module is model]


def first_token(model: Any, passes: Passes) -> list[int]:
    """Widths of the passes from wrapping a model to the first token of its first answer."""
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        made: list[int] = []
        for piece in ouroboros.stream(PROMPT, options=OPTIONS):
            if piece.token_ids and not made:
                made = widths_of(model, passes)
            last = piece
        assert last.result is not None
        assert list(last.result.token_ids) == plain(model, PROMPT, 12)
    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_passes_come_before_the_first_token(
    architecture: str, passes: Passes, later_process: Callable[[], None]
) -> None:
    """The request may be some rounds ahead of its reader."""
    ahead = 4
    assert len(first_token(own_model(architecture), passes)) <= 24 + ahead
    later_process()
    known = first_token(own_model(architecture), passes)
    assert len(known) <= 5 + ahead


def test_what_is_kept_is_found() -> None:
    keep("some", SOME)
    assert find("some") == SOME
    keep("some", replace(SOME, static=None, static_wins=None, batches=None))
    assert find("some") == replace(SOME, static=None, static_wins=None, batches=None)
    assert find("other") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "",
        lambda data: "{",
        lambda data: "[]",
        lambda data: json.dumps(data | {"format": 1}),
        lambda data: json.dumps(data | {"eager": None}),
        lambda data: json.dumps(data | {"static": None}),
        lambda data: json.dumps(data | {"batches": "yes"}),
        lambda data: json.dumps(data | {"eager": data["eager"] | {"costs": [0.0]}}),
        lambda data: json.dumps(data | {"eager": data["eager"] | {"costs": [float("nan")] * len(WIDTHS)}}),
        lambda data: json.dumps(data | {"eager": data["eager"] | {"probe": {"branching": "bush", "margin": 0.0}}}),
        lambda data: json.dumps(data | {"eager": data["eager"] | {"probe": data["eager"]["probe"] | {"margin": -1.0}}}),
        lambda data: json.dumps(data | {"eager": data["eager"] | {"probe": data["eager"]["probe"] | {"more": 1}}}),
    ],
)
def test_damaged_measurements_are_made_anew(
    damage: Callable[[Any], str], measurements_folder: Path, later_process: Callable[[], None]
) -> None:
    keep("some", SOME)
    later_process()
    path = measurements_folder / "some.json"
    path.write_text(damage(json.loads(path.read_text())))
    assert find("some") is None
    path.write_bytes(b"\xff\xfe\x00")
    assert find("some") is None


def test_a_folder_that_cannot_be_written_to_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(ouroboros_llm.target_model.measurements, "cache_folder", lambda: tmp_path / "file")
    caplog.set_level(logging.INFO, "ouroboros_llm")
    keep("some", SOME)
    assert find("some") == SOME, "this process still knows"
    assert "cannot be kept" in caplog.text
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def key(model: Any) -> str | None:
    return key_of(model, fingerprint(model))


def test_the_same_model_has_the_same_key() -> None:
    assert key(own_model()) == key(own_model()) is not None


def changed_configuration(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def changed_weights(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1


def changed_precision(model: Any) -> None:
    model.to(torch.bfloat16)


def changed_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def changed_code(model: Any) -> None:
    class Other(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> Any:
            return super().forward(hidden_states) * 1.0

    model.model.norm.__class__ = Other


@pytest.mark.parametrize(
    "change", [changed_configuration, changed_weights, changed_precision, changed_attention, changed_code]
)
def test_a_model_that_differs_has_another_key(change: Callable[[Any], None]) -> None:
    model = own_model()
    before = key(model)
    change(model)
    assert key(model) not in (before, None)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (measurements, "VERSION", "9.9.9"),
        (measurements, "own_code", lambda: "another"),
        (torch, "__version__", "9.9.9"),
        (measurements, "processor_name", lambda: "another"),
        (torch, "get_num_threads", lambda: 64),
    ],
)
def test_another_machine_or_version_has_another_key(
    owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(own_model())
    monkeypatch.setattr(owner, name, value)
    assert key(own_model()) != before


def test_a_mask_that_is_wrong_by_now_is_found(
    monkeypatch: pytest.MonkeyPatch, later_process: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The key cannot see all that may change: what was found is confirmed by a few passes."""
    prepare(own_model())
    later_process()
    masks = ouroboros_llm.target_model.eager.tree_masks
    monkeypatch.setattr(ouroboros_llm.target_model.eager, "tree_masks", lambda *given: torch.ones_like(masks(*given)))
    model = own_model()
    assert prepare(model).probe.branching == "chain"
    assert "is not what it was" in caplog.text
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        assert list(ouroboros.generate(PROMPT, options=OPTIONS).token_ids) == plain(model, PROMPT, 12)


def test_attention_that_is_no_library_s_is_measured_by_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "attention_function", lambda name: test_what_is_kept_is_found)
    assert key(own_model()) is None


def test_constants_of_a_forward_are_part_of_the_key() -> None:
    keys = set()
    for factor in (1.0, 2.0):
        model = own_model()
        kind = type(model.model.norm)
        code = f"def forward(self, x): return super(kind, self).forward(x) * {factor}"
        names: dict[str, Any] = {"kind": kind}
        exec(code, names)
        model.model.norm.__class__ = type("Other", (kind,), {"forward": names["forward"], "__module__": __name__})
        keys.add(key(model))
    assert len(keys) == 2 and None not in keys


@pytest.mark.parametrize("odd", [{1: 2, "a": 3}, object(), {"f": test_what_is_kept_is_found}])
def test_a_configuration_that_cannot_be_written_down_stops_nothing(odd: Any) -> None:
    model = own_model()
    model.config.mine = odd
    assert prepare(model).probe.branching == "tree"


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    model.model.norm.forward = model.model.norm.forward


@pytest.mark.parametrize("change", [hooked, replaced])
def test_code_that_cannot_be_told_apart_is_measured_by_every_process(
    change: Callable[[Any], None], measurements_folder: Path
) -> None:
    model = own_model()
    change(model)
    assert key(model) is None
    assert prepare(model).probe.branching == "tree"
    assert not measurements_folder.exists()


def test_measurements_of_another_model_are_not_used(later_process: Callable[[], None]) -> None:
    """A recurrent model that has a Llama's measurements would decode wrongly."""
    prepare(own_model("llama"))
    assert prepare(own_model("mamba_plain")).probe.branching == "none"


def test_costs_learned_in_one_process_are_known_to_the_next(later_process: Callable[[], None]) -> None:
    model = own_model()
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        for _ in range(50):
            ouroboros._prepared.pass_times.add(1, 0.1)
            ouroboros._prepared.pass_times.add(16, 0.9)
        costs = ouroboros._prepared.pass_times.costs
    later_process()
    again = prepare(own_model())
    assert again.pass_times.costs == pytest.approx(costs)
    assert again.pass_times.one is None, "how fast the machine is now is not known yet"


def test_a_race_is_won_for_the_next_process(
    passes: Passes, monkeypatch: pytest.MonkeyPatch, later_process: Callable[[], None]
) -> None:
    monkeypatch.setattr(prepared, "_is_raced", lambda model, known: known.measurements.static_wins is None)
    monkeypatch.setattr(prepared, "_wins", lambda *_: True)
    model = own_model()
    assert prepare(model).way.static is None
    list(measure(model))
    later_process()
    again = own_model()
    assert prepare(again).way.static is not None and len(widths_of(again, passes)) <= 7
    with Ouroboros(again, byte_tokenizer()) as ouroboros:
        assert list(ouroboros.generate(PROMPT, options=OPTIONS).token_ids) == plain(again, PROMPT, 12)


def test_what_was_left_for_later_is_measured_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.serving.scheduler.QUIET_SECONDS", 0.0)
    model = own_model()
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        done: list[int] = []

        def work() -> Iterator[None]:
            for step in range(3):
                done.append(step)
                yield

        def failing() -> Iterator[None]:
            raise ValueError("not this time")
            yield

        ouroboros._worker.when_idle(failing)
        ouroboros._worker.when_idle(work)
        assert not done, "nothing is done before an answer"
        for _ in range(1000):
            ouroboros.generate(PROMPT, options=OPTIONS)
            if len(done) == 3:
                break
        assert done == [0, 1, 2]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import own_model
from ouroboros_llm.target_model.prepared import prepare
from ouroboros_llm.target_model import prepared, measurements
def never(*_):
    raise AssertionError("probed again")
if sys.argv[2] == "known":
    prepared.probe = never
print(prepare(own_model()).probe)
"""


def test_a_new_process_finds_them(tmp_path: Path) -> None:
    """With the threads of its own that the key names."""
    environment = os.environ | {"OUROBOROS_CACHE": str(tmp_path), "OUROBOROS_PROGRESS": "0"}
    said = [
        subprocess.run(
            [sys.executable, "-c", CHILD, str(Path(__file__).parent), which],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for which in ("new", "known")
    ]
    assert said[0] == said[1] and "tree" in said[0]
