"""The examples run offline, print what phrases bought, and say what plain decoding says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_model

EXAMPLES = Path(__file__).parent.parent / "examples"

pytest.importorskip("langchain.agents")


def test_the_algorithm_without_weights() -> None:
    """Drafts, what was accepted of them, and a pool that grows: the third message takes a fraction of the passes."""
    done = subprocess.run([sys.executable, str(EXAMPLES / "algorithm.py")], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    totals = [line.split() for line in lines if "mean acceptance length" in line]
    words, passes = ([int(total[position]) for total in totals] for position in (0, 3))
    assert words == [20, 21, 21]
    assert passes[0] > passes[1] > passes[2] and passes[2] <= 8
    held = [int(total[-2]) for total in totals]
    assert words[0] <= held[0] < held[1] < held[2]
    accepted = [int(line.partition("accepted")[2].split()[0]) for line in lines if line.startswith("  pass")]
    assert sum(accepted) + len(accepted) == sum(words), "each pass emits what it accepted and one token of its own"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model whose tokens are bytes, with room for long prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(context=16_384).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def run(script: str, model: str, *arguments: str) -> str:
    """What an example prints; it has to end well."""
    command = [sys.executable, str(EXAMPLES / script), "--model", model, "--dtype", "float32", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(printed: str, first: str) -> list[list[str]]:
    """Cells of the table lines that begin with `first`."""
    lines = (line.split("│") for line in printed.splitlines() if line.startswith("│"))
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    return [row for row in cells if row[0].startswith(first)]


def test_the_sql_agent_says_the_same_in_fewer_passes(tiny_folder: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    printed = run(
        "langgraph_sql_agent.py", tiny_folder, "--tasks=2", "--max-tokens=64", "--compare", f"--json={report}"
    )
    found: dict[str, Any] = json.loads(report.read_text())
    first, second, alone = (found["figures"][name] for name in ("run 1", "run 2", "plain"))
    assert alone["target_forwards"] == alone["completion_tokens"] == first["completion_tokens"]
    assert second["target_forwards"] < first["target_forwards"] < alone["target_forwards"]
    assert first["same_messages"] == second["same_messages"] == 2
    assert first["prefilled_tokens"] <= 1.3 * first["final_prompt_tokens"]
    for name, figures in found["figures"].items():
        [row] = rows(printed, name)
        assert row[1:3] == [str(int(figures["completion_tokens"])), str(int(figures["target_forwards"]))]
    assert [row[0] for row in rows(printed, "all")] == ["all", "all"]


def test_chats_go_on_in_another_process(tiny_folder: str) -> None:
    printed = run("chat_memory.py", tiny_folder, "--max-tokens=24", "--compare")
    assert "Plain decoding says the same." in printed
    turns = [(row[0], *map(int, row[1:5])) for row in rows(printed, "anna") + rows(printed, "ben")]
    assert len(turns) == 7
    cached = {turn: read for turn, _, read, _, _ in turns}
    # A chat's first turn in a process finds nothing; anna's last turn goes on from the one before.
    assert cached["ben, process 2"] == 0
    assert max(read for turn, _, read, _, _ in turns if turn == "anna, process 2") > 0


def test_answers_from_docstrings_are_those_of_plain_decoding(tiny_folder: str) -> None:
    printed = run("rag_chain.py", tiny_folder, "--tasks=2", "--max-tokens=24")
    [total] = rows(printed, "all")
    assert total[-1] == "2/2"
    assert 0 < int(total[2]) <= int(total[1]) <= 48


@pytest.mark.real_model
def test_an_agent_of_a_small_model_calls_tools() -> None:
    printed = run("langgraph_sql_agent.py", "smollm2-135m-instruct", "--tasks=1", "--runs=1", "--max-tokens=48")
    [total] = rows(printed, "run 1")
    assert int(total[2]) < int(total[1])
