"""`ouroboros bench gpu`: figures from what was seen, and that all of it runs without a device."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import byte_tokenizer, tiny_model

from ouroboros_llm import OptionError
from ouroboros_llm.bench import gpu
from ouroboros_llm.bench.device import bandwidth, covered, profile_of
from ouroboros_llm.bench.gpu_tables import markdown
from ouroboros_llm.bench.methods import Answer, Question
from ouroboros_llm.bench.shapes import SHAPES, TINY, bytes_read, choose_shapes, random_model
from ouroboros_llm.bench.side_by_side import Record
from ouroboros_llm.bench.steps import _our_round
from ouroboros_llm.cli import main
from ouroboros_llm.models.loading import LoadedModel
from ouroboros_llm.target_model.latency import WIDTHS
from ouroboros_llm.target_model.prepared import prepare


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("qwen2.5-coder-1.5b", 3.09), ("llama-3.1-8b", 15.0), ("qwen2.5-32b", 64.0)]
)
def test_shapes_are_those_of_the_models(name: str, gigabytes: float) -> None:
    """Bytes of the weights that a pass reads, in half precision, as their publishers' files have them."""
    shape = SHAPES[name]
    model = random_model(shape, torch.device("meta"), torch.bfloat16, 4096)
    assert bytes_read(model, 0) / 1e9 == pytest.approx(gigabytes, rel=0.005)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(shape.parameters, rel=1e-3)
    longer = bytes_read(model, 1000) - bytes_read(model, 0)
    assert longer == 1000 * 2 * shape.layers * shape.key_heads * shape.head * 2


def test_shapes_are_chosen_by_name() -> None:
    assert choose_shapes("all") == SHAPES and choose_shapes("tiny") == TINY
    assert [*choose_shapes("llama-3.1-8b, tiny")] == ["llama-3.1-8b", *TINY]
    with pytest.raises(OptionError, match="shapes must be some of all, tiny, .* but got huge"):
        choose_shapes("tiny,huge")


def test_intervals_that_overlap_count_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8)]) == 4
    assert covered([]) == 0


def event(name: str, kind: str, start: float, end: float) -> Any:
    return SimpleNamespace(
        name=name, device_type=SimpleNamespace(name=kind), time_range=SimpleNamespace(start=start, end=end)
    )


def test_a_profile_tells_work_from_gaps() -> None:
    events = [
        event("cudaGraphLaunch", "CPU", 0, 5),
        event("cudaLaunchKernel", "CPU", 5, 6),
        event("cudaMemcpyAsync", "CPU", 6, 7),
        event("aten::mm", "CPU", 0, 7),
        *(event("kernel", "CUDA", 1e6 * start, 1e6 * end) for start, end in ((0, 3), (2, 4), (6, 8))),
    ]
    seen = profile_of(events, on_device=True)
    assert (8 * seen.kernels, 8 * seen.launches) == (3, 2)
    assert 8 * seen.seconds == pytest.approx(8) and seen.host_gap == pytest.approx(0.25)
    assert 8 * (seen.busy_seconds or 0) == pytest.approx(6)
    alone = profile_of(events[:4], on_device=False)
    assert 8 * alone.kernels == 1 and alone.host_gap is None


def test_bandwidth_is_measured_both_ways() -> None:
    moved = bandwidth(torch.device("cpu"), 1 << 20)
    assert {*moved} == {"copy", "read"} and min(moved.values()) > 0


def record(method: str, number: int, said: tuple[int, ...]) -> Record:
    answer = Answer(said, target_forwards=1, first_tokens=1, prefill_seconds=0.1, seconds=0.2)
    return Record(Question(number, str(number), None, 0, 0, (5,), 30), method, answer)


def test_divergences_are_counted_up_to_where_they_are() -> None:
    records = [
        record("plain", 0, (1, 2, 3, 4)),
        record("plain", 1, (1, 2, 3, 4)),
        record("ouroboros", 0, (1, 2, 3, 4)),
        record("ouroboros", 1, (1, 9, 9, 9)),
    ]
    assert gpu.divergences(records) == {"ouroboros": pytest.approx(1000 / (4 + 2))}


def test_everything_runs_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "bandwidth", lambda device: {"copy": 2e9, "read": 1e9})
    arguments = ["--shapes", "tiny-llama", "--device", "cpu", "--repeats", "1", "--tokens", "2", "--length", "16"]
    run = CliRunner().invoke(main, ["bench", "gpu", *arguments, "--no-weights", "--results", str(tmp_path), "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    shape = report["shapes"]["tiny-llama"]
    assert [*shape["steps"]] == [*shape["cost_curve"]] == [str(width) for width in WIDTHS]
    assert shape["cost_curve"]["1"] == 1.0 and shape["not_static"] is None
    assert shape["limit_seconds"] == shape["bytes_read"] / 2e9
    step = shape["steps"]["8"]
    assert step["times_limit"] == pytest.approx(step["ours"] / shape["limit_seconds"])
    assert {*shape["tokens_per_second"]} == {"ours", "generate", "generate, static cache"}
    assert all(seen["kernels"] > 10 and seen["host_gap"] is None for seen in shape["profiles"].values())
    assert shape["fused"] == {} and report["conditions"]["quantization"] is None
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.md").read_text() == markdown(report) and "| 64 |" in markdown(report)


def test_quantized_shapes_read_fewer_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "bandwidth", lambda device: {"copy": 2e9, "read": 1e9})
    settings = gpu.Settings(
        tmp_path, shapes="tiny-llama", weights=False, device="cpu", length=16, repeats=1, tokens=2, quantization="int8"
    )
    report = gpu.measure(settings)
    whole = random_model(TINY["tiny-llama"], torch.device("cpu"), torch.bfloat16, 4096)
    matrices = sum(weight.numel() for weight in whole.model.layers.parameters() if weight.dim() == 2)
    scales = 2 * 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert report["shapes"]["tiny-llama"]["bytes_read"] == bytes_read(whole, 16) - matrices + scales
    assert "quantization: int8" in markdown(report)


def test_rounds_move_keys_and_values() -> None:
    """Half of the nodes are accepted, each behind a wrong guess."""
    prepared = prepare(tiny_model(), "static")
    found: Any = _our_round(prepared, [5, 6, 7] * 6, 8)()
    assert found.path == (0, 2, 4, 6)
    assert _our_round(prepare(tiny_model(), "eager"), [5, 6, 7] * 6, 8)().path == found.path  # type: ignore[attr-defined]


def test_what_does_not_fit_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "bandwidth", lambda device: {"copy": 2e9, "read": 1e9})
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 40_000_000_000)
    monkeypatch.setattr(gpu, "_here", lambda name: False)
    report = gpu.measure(gpu.Settings(tmp_path, shapes="qwen2.5-32b", device="cpu"))
    assert report["shapes"]["qwen2.5-32b"] == {"skipped": "needs 82 GB of memory, and 40 GB are free"}
    assert all("not on this machine" in weights["skipped"] for weights in report["weights"])
    assert "Skipped: needs 82 GB" in markdown(report)


def test_real_weights_answer_by_every_method(tmp_path: Path) -> None:
    settings = gpu.Settings(tmp_path, limit=2, max_new_tokens=12)
    loaded = LoadedModel(tiny_model(), byte_tokenizer(), "tiny")
    draft = LoadedModel(tiny_model(seed=1), byte_tokenizer(), "tinier")
    found = gpu.answers(loaded, draft, gpu._conversations(settings), settings)
    assert [*found["methods"]] == ["plain", "prompt_lookup", "assisted", "ouroboros", "ouroboros_warm"]
    for name, row in found["methods"].items():
        assert row["answers"] == 2 and row["identical"] == 2
        assert name == "plain" or row["divergences_per_1000_tokens"] == 0.0


def test_bench_still_asks_for_prompts() -> None:
    run = CliRunner().invoke(main, ["bench"])
    assert run.exit_code == 2 and "Missing option '--prompts'" in run.output
    assert "gpu" in CliRunner().invoke(main, ["bench", "--help"]).output
