from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import byte_tokenizer, plain, tiny_model

from ouroboros_llm.bench.replay import History, cost_curve, replay, report, rounds
from ouroboros_llm.bench.traces import Trace
from ouroboros_llm.cli import main
from ouroboros_llm.decoding.decoder import Decoder
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.drafting.token_recycling import KEPT
from ouroboros_llm.target_model.prepared import prepare

FLAT = cost_curve("1:1,64:1")


def trace(number: int, token_ids: list[int], category: str = "a", probability: float = 0.9) -> Trace:
    top_ids = tuple((token_id, token_id + 1) for token_id in token_ids)
    return Trace(
        str(number), category, (1, 2, 3), tuple(token_ids), top_ids, ((probability, 1 - probability),) * len(token_ids)
    )


TRACES = [trace(1, [10, 11, 12, 13, 14, 15, 16, 2]), trace(2, [20, 21, 22, 2], "b"), trace(3, [10, 11, 12, 13, 2])]


@pytest.mark.parametrize("width", [None, 1, 2, 64])
def test_every_recorded_token_is_emitted_once(width: int | None) -> None:
    history = History()
    for recorded in TRACES * 2:
        found = list(rounds(recorded, history.drafter(recorded.prompt_ids), cost=FLAT, width=width))
        assert [token_id for round in found for token_id in round.token_ids] == list(recorded.token_ids)
        assert all(round.draft.width <= (width or 64) for round in found)
        history.remember(recorded)


def test_scores_add_up() -> None:
    found = report(*replay(TRACES, cost=FLAT))
    assert set(found) == {"all", "a", "b"}
    for name in ("tokens", "forwards"):
        assert found["all"][name] == found["a"][name] + found["b"][name]
    for row in found.values():
        assert sum(row["hits"].values()) == row["tokens"]
        assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / row["forwards"], abs=1e-3)
        assert row["speedup"] == row["tokens_per_forward"], "where every pass costs one"


def test_width_one_is_plain_decoding() -> None:
    found = report(*replay(TRACES, cost=cost_curve("cpu"), width=1))
    assert found["all"]["speedup"] == found["all"]["nodes_per_forward"] == 1.0
    assert found["all"]["hits"] == {"bonus": found["all"]["tokens"]}


def test_history_helps_unless_cold() -> None:
    _, warm = replay(TRACES, cost=FLAT, passes=2)
    (cold,) = replay(TRACES, cost=FLAT, cold=True)
    assert report(warm)["all"]["forwards"] <= len(TRACES) * 2 < report(cold)["all"]["forwards"]
    assert "phrases" not in report(cold)["all"]["hits"]


def test_sources_can_be_replayed_alone() -> None:
    for name in ("phrases", "recycling"):
        _, found = replay(TRACES, cost=FLAT, drafters=[name], passes=2)
        allowed = {"text", "phrases", "answers"} if name == "phrases" else {"recycling"}
        assert set(report(found)["all"]["hits"]) <= allowed | {"recovered", "bonus"}


def test_a_replay_does_what_decoding_does() -> None:
    """With drafts whose rejected nodes teach nothing, the replay of a recorded answer takes the rounds that it took."""
    model, prompt = tiny_model(), byte_tokenizer()("the cat sat on the mat, the cat sat on")["input_ids"]
    wanted = plain(model, prompt, 40)
    recorded = Trace("1", "a", tuple(prompt), tuple(wanted))
    one, other = (History(["phrases"]).drafter(prompt) for _ in range(2))
    decoder = Decoder(prepare(model).start(), one, width=9, successors=KEPT)
    decoded = [round.token_ids for round in decoder.rounds(prompt, Sampler(), limit=40, end_token_ids={2})]
    replayed = [round.token_ids for round in rounds(recorded, other, cost=FLAT, width=9)]
    # What was rejected but right goes to the scope's pool, which only a model can say.
    assert decoded[:5] == replayed[:5] and sum(map(len, replayed)) == len(wanted)


class TestCostCurves:
    def test_named_ones(self) -> None:
        assert [cost_curve("cpu")(width) for width in (1, 8, 64)] == [1.0, 1.07, 2.95]
        assert cost_curve("gpu")(64) == 1.25

    def test_points_are_joined_by_lines(self) -> None:
        cost = cost_curve("1:1,3:2,5:10")
        assert [cost(width) for width in (1, 2, 3, 4, 5, 64)] == [1.0, 1.5, 2.0, 6.0, 10.0, 10.0]

    @pytest.mark.parametrize("text", ["", "fast", "1:x", "1", "0:1", "1:0", "1:-2"])
    def test_anything_else_is_an_error(self, text: str) -> None:
        with pytest.raises(ValueError, match="cost must be"):
            cost_curve(text)


class TestCommand:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "traces.jsonl"
        path.write_text("".join(recorded.to_json() + "\n" for recorded in TRACES))
        return path

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(main, ["replay", *map(str, arguments)])

    def test_json(self, file: Path) -> None:
        found = json.loads(self.run(file, "--json", "--cost", "gpu").stdout)
        assert {"tokens_per_forward", "nodes_per_forward", "speedup", "tokens", "forwards", "hits"} == set(found["all"])
        assert found == json.loads(self.run(file, "--json", "--cost", "gpu").stdout), "every run gives the same numbers"

    def test_files_are_replayed_in_order(self, file: Path) -> None:
        once, twice = (json.loads(self.run(*[file] * count, "--json").stdout) for count in (1, 2))
        assert twice["all"]["tokens"] == 2 * once["all"]["tokens"]
        assert twice["all"]["forwards"] < 2 * once["all"]["forwards"]

    def test_table(self, file: Path) -> None:
        result = self.run(file, "--width", 8, "--cold", "--drafters", "phrases")
        assert result.exit_code == 0 and "speed-up" in result.stdout and "all" in result.stdout

    @pytest.mark.parametrize(
        "arguments", [["--cost", "fast"], ["--drafters", "draft_model"], ["--width", "65"], ["--passes", "0"]]
    )
    def test_bad_options_are_one_line(self, file: Path, arguments: list[str]) -> None:
        result = self.run(file, *arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output

    def test_a_file_without_traces_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.jsonl"
        path.write_text("\n")
        result = self.run(path)
        assert result.exit_code == 1 and "no trace in there" in result.output

    def test_what_is_no_trace_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "other.jsonl"
        path.write_text('{"prompt": "x"}\n')
        result = self.run(path)
        assert result.exit_code == 1 and str(path) in result.output
