"""The soak, in seconds and with a tiny model: samples while it runs, a plot at the end, and whatever ends it early."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_model

from ouroboros_llm import Ouroboros

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts" / "soak.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ouroboros() -> Iterator[Ouroboros]:
    with Ouroboros(tiny_model(context=2048), byte_tokenizer()) as ouroboros:
        yield ouroboros


def settings(soak: ModuleType, **changes: Any) -> Any:
    small = dict(minutes=2 / 60, conversations=3, threads=2, prompt_tokens=800, max_new_tokens=8, every=0.1)
    return soak.Settings(**{**small, **changes})


def sample(soak: ModuleType, seconds: float, resident: int) -> Any:
    return soak.Sample(seconds, resident, 0, 0, 0, 0, 0, 0, 0, None, None)


def test_samples_are_written_as_it_goes(soak: ModuleType, tmp_path: Path, ouroboros: Ouroboros) -> None:
    samples, interrupted = soak.soak(ouroboros, settings(soak), tmp_path / "samples.jsonl")
    assert not interrupted
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [soak.Sample(**line) for line in lines] == samples and len(lines) >= 3
    first, last = samples[0], samples[-1]
    assert (first.turns, first.seconds_per_token) == (0, None)
    assert last.turns > 0 and last.completion_tokens > 0
    assert 0 < last.prefilled_tokens < last.prompt_tokens, "conversations go on from what they have read"
    assert last.resident_bytes > 0
    assert any(sample.kv_in_use_bytes + sample.kv_idle_bytes for sample in samples)
    assert all(sample.mean_acceptance_length >= 1 for sample in samples if sample.mean_acceptance_length is not None)
    assert ouroboros.kv_usage.in_use == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("soak-")]


def test_the_plot_is_a_picture(soak: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    soak.plot([sample(soak, second, 10**8) for second in range(5)], 0.25, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(PNG)


def test_the_slope_leaves_out_the_warm_up(soak: ModuleType) -> None:
    growing = [sample(soak, 6.0 * n, 10**8 + 1000 * n) for n in range(101)]
    assert soak.slope(growing, 0.25) == pytest.approx(10_000)
    warming = [sample(soak, 6.0 * n, 10**8 + (10**7 * n if n < 20 else 2 * 10**8)) for n in range(101)]
    assert soak.slope(warming, 0.25) == pytest.approx(0, abs=1)
    assert soak.slope(growing[:2], 0.25) is None and soak.slope([], 0.25) is None


def test_conversations_begin_anew_when_they_are_long(soak: ModuleType, ouroboros: Ouroboros) -> None:
    conversation = soak.Conversation(0, seed=0)
    lengths = [conversation.turn(ouroboros, settings(soak, prompt_tokens=500)).usage.prompt_tokens for _ in range(6)]
    assert any(later < earlier for earlier, later in zip(lengths, lengths[1:], strict=False))
    again = soak.Conversation(0, seed=0)
    assert again.turn(ouroboros, settings(soak)).usage.prompt_tokens == lengths[0], "the same seed, the same words"


def test_an_error_in_a_turn_ends_it_and_is_told(
    soak: ModuleType, tmp_path: Path, ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ouroboros, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        soak.soak(ouroboros, settings(soak, minutes=5), tmp_path / "samples.jsonl")
    assert (tmp_path / "samples.jsonl").read_text()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    tiny_model(context=2048).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(model: Path, results: Path, minutes: str) -> list[str]:
    sizes = "--conversations 2 --threads 2 --prompt-tokens 800 --max-new-tokens 8 --every 0.1 --kv-bytes 200000".split()
    script = str(ROOT / "scripts" / "soak.py")
    return [sys.executable, script, "--model", str(model), "--results", str(results), "--minutes", minutes, *sizes]


def test_a_whole_run(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    output = subprocess.run(
        command(tiny_folder, results, "0.03"), capture_output=True, text=True, check=True, timeout=170
    ).stdout
    assert "MB a minute after the warm-up" in output and "turns" in output
    assert (results / "soak.png").read_bytes().startswith(PNG)
    lines = [json.loads(line) for line in (results / "samples.jsonl").read_text().splitlines()]
    idle = [line["kv_idle_bytes"] + line["kv_kept_bytes"] for line in lines]
    assert max(idle) <= 200_000


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C of another process is POSIX")
def test_ctrl_c_leaves_what_was_measured(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    process = subprocess.Popen(command(tiny_folder, results, "30"), stdout=subprocess.PIPE, text=True)
    try:
        written = wait_for_lines(results / "samples.jsonl", 5, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "resident memory" in output
    assert (results / "soak.png").read_bytes().startswith(PNG)
    lines = [json.loads(line) for line in (results / "samples.jsonl").read_text().splitlines()]
    assert len(lines) >= written


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> int:
    """Wait until a file has so many lines; the number it has."""
    ready = threading.Event()
    for _ in range(1200):
        if path.exists() and (found := path.read_bytes().count(b"\n")) >= count:
            return found
        assert process.poll() is None, "it ended on its own"
        ready.wait(0.1)
    raise AssertionError(f"{path} never had {count} lines")
