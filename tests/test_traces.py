"""Traces: what is recorded is what the model says, and files that cannot be read name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import byte_tokenizer, plain, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from ouroboros_llm import OptionError
from ouroboros_llm.bench.traces import Trace, parse_trace, read_traces, recorded_ids, write_trace
from ouroboros_llm.cli import main
from ouroboros_llm.cli.record import answer

ids = st.lists(st.integers(0, 2**31), min_size=1, max_size=8).map(tuple)
chances = st.lists(st.integers(0, 10_000).map(lambda n: n / 10_000), min_size=8, max_size=8).map(tuple)
ROW = {"id": "a/1", "category": "qa", "prompt_ids": [1, 2], "gen": [3, 4]}


@st.composite
def any_trace(draw: st.DrawFn) -> Trace:
    token_ids = draw(ids)
    rows = {"min_size": len(token_ids), "max_size": len(token_ids)}
    top_ids = st.lists(st.integers(0, 99), min_size=8, max_size=8).map(tuple)
    return Trace(
        draw(st.text()),
        draw(st.text()),
        draw(ids),
        token_ids,
        draw(st.just(()) | st.lists(top_ids, **rows).map(tuple)),
        draw(st.just(()) | st.lists(chances, **rows).map(tuple)),
    )


@given(any_trace())
def test_round_trip(trace: Trace) -> None:
    line = trace.to_json()
    assert "\n" not in line and parse_trace(line, "here") == trace


def test_the_format() -> None:
    trace = Trace("sb/81", "mt_bench", (1, 2), (3,), ((3, 7),), ((0.123456, 0.0),))
    assert trace.to_json() == (
        '{"id":"sb/81","category":"mt_bench","prompt_ids":[1,2],"gen":[3],"top_ids":[[3,7]],"top_p":[[0.1235,0.0]]}'
    )
    assert list(json.loads(Trace("a", "b", (1,), (2,)).to_json())) == ["id", "category", "prompt_ids", "gen"]


def test_reading_is_lazy_and_passes_over_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW | {'id': 'b'})}\nnonsense\n")
    traces = read_traces(path)
    assert [next(traces).id, next(traces).id] == ["a/1", "b"]
    with pytest.raises(OptionError, match=r"traces\.jsonl, line 4: .*JSON"):
        next(traces)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "'id' must be a text, but got NoneType"),
        ({"category": 3}, "'category' must be a text"),
        ({"prompt_ids": []}, "'prompt_ids' must be a list of token ids, at least one"),
        ({"prompt_ids": "text"}, "'prompt_ids' must be a list of token ids"),
        ({"gen": [1.5]}, r"'gen' must be a list of token ids, at least one, but got list: \[1.5\]"),
        ({"gen": [True]}, "'gen' must be"),
        ({"gen": [-1]}, "'gen' must be"),
        ({"top_ids": 5}, "'top_ids' must be a list of lists of token ids"),
        ({"top_ids": [[1], ["x"]]}, r"'top_ids\[1\]' must be a list of token ids"),
        ({"top_ids": [[1]]}, "'top_ids' must have 2 lists, one per token of gen, not 1"),
        ({"top_p": [[0.5], [1.5]]}, r"'top_p\[1\]' must be a list of probabilities"),
        ({"top_p": [[0.5], [float("nan")]]}, r"'top_p\[1\]'"),
        ({"top_ids": [[1], [2]], "top_p": [[0.5], [0.5, 0.1]]}, "'top_p' must have one probability per id"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW | change)}\n")
    with pytest.raises(OptionError, match=r"traces\.jsonl, line 2: field " + message):
        list(read_traces(path))


@pytest.mark.parametrize("field", ROW)
def test_missing_fields_are_named(field: str) -> None:
    with pytest.raises(OptionError, match=f"line 7: field '{field}' is missing"):
        parse_trace(json.dumps({name: value for name, value in ROW.items() if name != field}), "line 7")


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff")
    for name in ("image", "nowhere"):
        with pytest.raises(OptionError, match=name):
            list(read_traces(tmp_path / name))
    with pytest.raises(OptionError, match="object"):
        parse_trace("[1]", "here")


def test_an_unfinished_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    assert recorded_ids(path) == set()
    with path.open("w") as file:
        write_trace(file, Trace("é", "c", (1,), (2,)))
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut].replace(b"\\u00e9", b"other"))
        assert recorded_ids(path) >= {"é"}
        assert [trace.id for trace in read_traces(path)][0] == "é" and path.read_bytes().endswith(b"\n")


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for contents in ("dear diary", '{"id": "a", "prompt": "x"}', "x\n" + '{"id":"cut'):
        path.write_text(contents)
        with pytest.raises(OptionError, match="notes.txt, line 1"):
            recorded_ids(path)
        assert path.read_text() == contents


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    rows = [
        {"task_id": "Eval/0", "prompt": "abcabc"},
        {"question": "why?"},
        {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
        {"id": "m", "category": "qa", "messages": [{"role": "user", "content": "hi"}]},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["record", *map(str, arguments)])


def chat(text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return list(
        byte_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )


def test_what_is_recorded_is_what_the_model_says(tmp_path: Path, model_folder: Path, prompt_file: Path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ("--model", model_folder, "--prompts", prompt_file, "--output", output, "--max-new-tokens", 24)
    result = run(*arguments, "--instruction", "Say: ")
    assert result.exit_code == 0, result.output
    traces = list(read_traces(output))
    assert [(trace.id, trace.category) for trace in traces] == [
        ("Eval/0", "asked"),
        ("asked/2", "asked"),
        ("asked/81", "mt_bench"),
        ("asked/m", "qa"),
    ]
    for trace, text in zip(traces, ("abcabc", "why?", "one", "hi"), strict=True):
        assert list(trace.prompt_ids) == chat(f"Say: {text}")
        assert list(trace.token_ids) == plain(tiny_model(), list(trace.prompt_ids), 24)
        assert tuple(best[0] for best in trace.top_ids) == trace.token_ids
        assert all(len(set(best)) == 8 for best in trace.top_ids)
        assert all(list(probs) == sorted(probs, reverse=True) and sum(probs) <= 1.001 for probs in trace.top_probs)


def test_recorded_probabilities_are_the_models(model_folder: Path) -> None:
    prompt_ids = chat("abcabc")
    token_ids, top_ids, top_probs = answer(tiny_model(), prompt_ids, 12)
    with torch.inference_mode():
        logits = tiny_model()(torch.tensor([[*prompt_ids, *token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    for row, best, probs in zip(logits.softmax(-1), top_ids, top_probs, strict=True):
        assert torch.allclose(row[list(best)], torch.tensor(probs), atol=1e-4)
        assert torch.allclose(row.topk(8).values, torch.tensor(probs), atol=1e-4)


def test_penalties_of_the_model_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)
    token_ids, top_ids, _ = answer(model, chat("abcabc"), 24)
    assert list(token_ids) == plain(model, chat("abcabc"), 24)
    assert tuple(best[0] for best in top_ids) == token_ids


def test_an_interrupted_recording_goes_on(tmp_path: Path, model_folder: Path, prompt_file: Path) -> None:
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    arguments = ("--model", model_folder, "--prompts", prompt_file, "--max-new-tokens", 8)
    assert run(*arguments, "--output", whole).exit_code == 0
    lines = whole.read_text().splitlines(keepends=True)
    output.write_text(lines[0] + lines[2] + lines[1][:50])
    result = run(*arguments, "--output", output)
    assert result.exit_code == 0 and "2 prompts to record, 2 recorded already" in result.output
    assert sorted(output.read_text().splitlines(keepends=True)) == sorted(lines)
    assert "0 prompts to record" in run("--model", "no such model", *arguments[2:], "--output", output).output


def test_limit_category_and_equal_ids(tmp_path: Path, model_folder: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"id": "x", "prompt": "a"}\n' * 3)
    arguments = ("--model", model_folder, "--prompts", prompts, "--output", output, "--max-new-tokens", 2)
    assert run(*arguments, "--limit", 2, "--category", "agents").exit_code == 0
    assert [(trace.id, trace.category) for trace in read_traces(output)] == [("p/x", "agents"), ("p/x#2", "agents")]


def test_prompts_without_room_for_an_answer_are_named(tmp_path: Path, model_folder: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"id": "long", "prompt": "a" * 600}) + "\n" + json.dumps({"id": "b", "prompt": "b"}))
    result = run("--model", model_folder, "--prompts", prompts, "--output", output, "--max-new-tokens", 1000)
    assert result.exit_code == 0 and "p/long: 6" in result.output
    (trace,) = read_traces(output)
    assert trace.id == "p/b" and len(trace.prompt_ids) + len(trace.token_ids) <= 512


def test_the_commands_errors_are_one_line(tmp_path: Path, model_folder: Path, prompt_file: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("not a trace\n")
    arguments = ("--model", model_folder, "--prompts", prompt_file)
    result = run(*arguments, "--output", output)
    assert result.exit_code == 1 and "out.jsonl, line 1" in result.output and output.read_text() == "not a trace\n"
    prompt_file.write_text('{"text": "x"}\n')
    result = run(*arguments, "--output", tmp_path / "new.jsonl")
    assert result.exit_code == 1 and "asked.jsonl, line 1" in result.output
    assert run(*arguments, "--output", tmp_path, "--max-new-tokens", 0).exit_code == 2
