from __future__ import annotations

from conftest import byte_tokenizer, plain, tiny_model

from ouroboros_llm import Ouroboros
from ouroboros_llm.bench.report import COLUMNS, cells, conditions, markdown, table
from ouroboros_llm.bench.side_by_side import measure

PROMPTS = ["the cat sat on the mat, the cat", "abcabcabc", "one two one two"]


def test_every_method_answers_every_prompt_with_the_same_tokens() -> None:
    with Ouroboros(tiny_model("qwen3"), byte_tokenizer()) as ouroboros:
        prompts = [ouroboros.encode(prompt) for prompt in PROMPTS]
        rows = list(measure(ouroboros, prompts, 30))
        wanted = [tuple(plain(ouroboros.model, prompt, 30)) for prompt in prompts]
    assert [row.method for row in rows] == ["plain", "prompt lookup", "cold", "warm", "repeated"]
    for row in rows:
        assert [answer[0] for answer in row.answers] == wanted
        assert row.identical_to(rows[0]) == len(PROMPTS)
    by_name = {row.method: row for row in rows}
    assert by_name["plain"].mean_acceptance_length == 1.0
    assert by_name["prompt lookup"].forwards <= by_name["plain"].forwards
    assert by_name["repeated"].forwards < by_name["cold"].forwards


def test_reports_say_what_differs_and_under_which_conditions() -> None:
    with Ouroboros(tiny_model("qwen3"), byte_tokenizer()) as ouroboros:
        rows = list(measure(ouroboros, [ouroboros.encode(PROMPTS[0])], 10))
        told = conditions(ouroboros.model)
    rows[2].answers[0] = ((1, 2, 3), 3, 0.1)
    shown = cells(rows)
    assert [row[-1] for row in shown] == ["1/1", "1/1", "0/1", "1/1", "1/1"]
    assert all(len(row) == len(COLUMNS) for row in shown)
    assert "| cold | 3 | 3 | 1.00 |" in markdown(rows, "title")
    assert table(rows, "title").row_count == len(rows)
    assert "float32" in told and "torch" in told and "greedy" in told
