from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, plain, tiny_model

from ouroboros_llm import ModelError, OptionError, Ouroboros, PromptError
from ouroboros_llm.bench.methods import METHODS, Answer, Question, build_methods, choose_methods
from ouroboros_llm.bench.prompts import Conversation, encode, read_prompts
from ouroboros_llm.bench.report import conditions, figures, machine, summarize
from ouroboros_llm.bench.results import Results
from ouroboros_llm.bench.side_by_side import Record, SideBySide, first_difference, logit_gap
from ouroboros_llm.bench.tables import COLUMNS, cells, conditions_line, markdown, tables
from ouroboros_llm.models.loading import LoadedModel

TEXTS = ["the cat sat on the mat, the cat", "abcabcabc", "one two one two"]
OURS = ("plain", "prompt_lookup", "ouroboros", "ouroboros_warm", "ouroboros_repeated")


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def asking(*texts: str, follow_ups: Sequence[str] = ()) -> list[Conversation]:
    return [
        Conversation(str(number), None, None, ({"role": "user", "content": text},), tuple(follow_ups))
        for number, text in enumerate(texts)
    ]


def measured(
    ouroboros: Ouroboros, conversations: list[Conversation], names: Sequence[str] = OURS, **options: Any
) -> SideBySide:
    run = SideBySide(
        ouroboros, build_methods(tuple(names), ouroboros, None), conversations, **{"max_new_tokens": 30, **options}
    )
    run.run(lambda record: None)
    return run


def answer(token_ids: Sequence[int], seconds: float = 1.0, **changes: Any) -> Answer:
    given = Answer(tuple(token_ids), target_forwards=2, first_tokens=1, prefill_seconds=seconds / 2, seconds=seconds)
    return replace(given, **changes)


def record(method: str, number: int, given: Answer, category: str | None = None) -> Record:
    return Record(Question(number, str(number), category, 0, 0, (5, 6), 30), method, given)


class TestPrompts:
    @pytest.mark.parametrize(
        "row, name, category, texts",
        [
            ({"task_id": "HumanEval/0", "prompt": "def f", "test": "x"}, "HumanEval/0", None, ["def f"]),
            ({"question": "How many?", "answer": "4"}, "1", None, ["How many?"]),
            ({"question_id": 81, "category": "writing", "turns": ["A", "B"]}, "81", "mt_bench", ["A", "B"]),
            ({"question_id": 1, "category": "rag", "turns": ["A"]}, "1", "rag", ["A"]),
            ({"prompt": "Hi", "category": "greeting"}, "1", "greeting", ["Hi"]),
        ],
    )
    def test_every_format_is_read(
        self, tmp_path: Path, row: Any, name: str, category: str | None, texts: list[str]
    ) -> None:
        [read] = read_prompts(lines(tmp_path / "file.jsonl", row))
        assert (read.name, read.category) == (name, category)
        assert [read.messages[0]["content"], *read.follow_ups] == texts

    def test_messages_keep_their_roles_and_the_instruction_goes_to_the_user(self, tmp_path: Path) -> None:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        [read] = read_prompts(lines(tmp_path / "file.jsonl", {"messages": messages}), instruction="Answer: ")
        assert list(read.messages) == [messages[0], {"role": "user", "content": "Answer: Hi"}]

    def test_line_separators_inside_text_do_not_end_a_row(self, tmp_path: Path) -> None:
        [read] = read_prompts(lines(tmp_path / "file.jsonl", {"prompt": "one\u2028two"}))
        assert read.messages[0]["content"] == "one\u2028two"

    @pytest.mark.parametrize(
        "line, told",
        [
            ('{"prompt": ', "line 2: not valid JSON"),
            ('{"text": "Hi"}', "line 2: expected `prompt` or `question`.*its fields are text"),
            ('["Hi"]', "line 2: expected an object, but got list"),
            ('{"turns": []}', "line 2: expected"),
            ('{"messages": [{"role": "user"}]}', "line 2: expected"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: str, told: str) -> None:
        path = tmp_path / "file.jsonl"
        path.write_text('{"prompt": "Hi"}\n' + line + "\n")
        with pytest.raises(PromptError, match=told):
            read_prompts(path)

    def test_nothing_to_ask_is_an_error(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "file.jsonl", {"prompt": "Hi", "category": "rag"})
        with pytest.raises(PromptError, match="no prompts of qa; it has rag"):
            read_prompts(path, categories=["qa"])
        with pytest.raises(PromptError, match="no prompts"):
            read_prompts(lines(tmp_path / "empty.jsonl"))

    def test_the_limit_is_per_category_and_parts_take_turns(self, tmp_path: Path) -> None:
        parts = ["writing", "writing", "writing", "math", "rag", "rag", "rag"]
        rows = [{"question_id": n, "category": part, "turns": ["A"]} for n, part in enumerate(parts)]
        path = lines(tmp_path / "file.jsonl", *rows)
        assert [read.name for read in read_prompts(path, limit=2)] == ["0", "3", "4", "5"]
        assert [read.name for read in read_prompts(path, limit=2, categories=["mt_bench"])] == ["0", "3"]
        assert [read.name for read in read_prompts(path, categories=["math", "rag"])] == ["3", "4", "5", "6"]
        assert [read.name for read in read_prompts(path)] == [str(n) for n in range(7)]

    def test_without_categories_the_limit_is_of_the_file(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "file.jsonl", *({"prompt": text} for text in TEXTS))
        assert [read.messages[0]["content"] for read in read_prompts(path, limit=2)] == TEXTS[:2]

    def test_without_a_chat_template_messages_are_plain_text(
        self, tiny_ouroboros: Ouroboros, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        messages = [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}]
        assert encode(tiny_ouroboros, messages) == tiny_ouroboros.encode(messages)
        monkeypatch.setattr(tiny_ouroboros.tokenizer, "chat_template", None)
        assert encode(tiny_ouroboros, messages) == tiny_ouroboros.encode("A\n\nB")


class TestMethods:
    def test_all_that_are_possible_run_unless_chosen(self) -> None:
        assert choose_methods(None, draft=True) == tuple(METHODS)
        assert choose_methods(None, draft=False) == OURS
        assert choose_methods("ouroboros, prompt_lookup", draft=False) == ("plain", "prompt_lookup", "ouroboros")
        assert choose_methods("ouroboros_repeated", draft=False) == ("plain", "ouroboros_warm", "ouroboros_repeated")

    @pytest.mark.parametrize("names", ["plain,magic", ""])
    def test_unknown_ones_are_refused_by_name(self, names: str) -> None:
        with pytest.raises(OptionError, match=f"methods must be some of {', '.join(METHODS)}, but got"):
            choose_methods(names, draft=True)

    def test_assisted_needs_a_draft_model(self) -> None:
        with pytest.raises(OptionError, match="--draft"):
            choose_methods("assisted", draft=False)

    def test_a_method_that_the_model_cannot_do_is_named(self) -> None:
        model = tiny_model("mamba_plain")
        with pytest.warns(RuntimeWarning, match="without drafts"):
            ouroboros = Ouroboros(model, byte_tokenizer())
        methods = build_methods(("plain", "prompt_lookup"), ouroboros, None)
        run = SideBySide(ouroboros, methods, asking("Hi"), max_new_tokens=4)
        with pytest.raises(ModelError, match="method prompt_lookup cannot run with .*--methods"):
            run.warm_up()

    def test_assisted_counts_both_models_and_leaves_the_target_as_it_was(self) -> None:
        target, draft = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
        before = target.generation_config.to_dict()
        with Ouroboros(target, byte_tokenizer(), draft_model=(draft, byte_tokenizer())) as ouroboros:
            methods = build_methods(tuple(METHODS), ouroboros, LoadedModel(draft, byte_tokenizer(), "draft"))
            run = SideBySide(ouroboros, methods, asking(*TEXTS), max_new_tokens=20)
            run.warm_up()
            run.run(lambda record: None)
        assert target.generation_config.to_dict() == before
        rows = summarize(run.records, run.gaps)["all"]
        assert list(rows) == list(METHODS)
        assert all(row["identical"] == row["compared"] == len(TEXTS) for row in rows.values())
        assert rows["plain"]["draft_forwards"] == 0
        assert rows["assisted"]["draft_forwards"] > 0 and rows["ouroboros"]["draft_forwards"] > 0
        assert rows["plain"]["target_forwards"] == rows["plain"]["tokens"]
        assert rows["assisted"]["target_forwards"] <= rows["plain"]["target_forwards"]

    def test_a_perfect_assistant_gives_several_tokens_with_the_first_forward(self) -> None:
        model = tiny_model("qwen3")
        with Ouroboros(model, byte_tokenizer()) as ouroboros:
            loaded = LoadedModel(model, byte_tokenizer(), "itself")
            run = SideBySide(
                ouroboros, build_methods(("plain", "assisted"), ouroboros, loaded), asking(TEXTS[1]), max_new_tokens=12
            )
            run.run(lambda record: None)
        by_method = {record.method: record.answer for record in run.records}
        assert by_method["plain"].first_tokens == 1
        assert by_method["assisted"].first_tokens > 1


class TestSideBySide:
    def test_every_method_answers_every_prompt_with_the_same_tokens(self) -> None:
        with Ouroboros(tiny_model("qwen3"), byte_tokenizer()) as ouroboros:
            run = measured(ouroboros, asking(*TEXTS))
            prompts = [ouroboros.encode([{"role": "user", "content": text}]) for text in TEXTS]
            wanted = [tuple(plain(ouroboros.model, prompt, 30)) for prompt in prompts]
        assert len(run.records) == run.total == len(OURS) * len(TEXTS)
        for name in OURS:
            assert [one.answer.token_ids for one in run.records if one.method == name] == wanted
        for one in run.records:
            assert 0 < one.answer.prefill_seconds <= one.answer.seconds
            assert 1 <= one.answer.first_tokens <= len(one.answer.token_ids)
        rows = summarize(run.records, run.gaps)["all"]
        assert rows["plain"]["tokens_per_forward"] == 1.0
        assert rows["prompt_lookup"]["target_forwards"] <= rows["plain"]["target_forwards"]
        assert rows["ouroboros_repeated"]["accepted_by_source"]

    def test_methods_take_turns_in_being_first(self) -> None:
        with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
            run = measured(ouroboros, asking(*TEXTS), max_new_tokens=2)
        order = [one.method for one in run.records]
        first_pass = list(OURS[:-1])
        assert order[:4] == first_pass
        assert order[4:8] == first_pass[1:] + first_pass[:1]
        assert order[8:12] == first_pass[2:] + first_pass[:2]
        assert order[12:] == ["ouroboros_repeated"] * 3

    def test_scopes_are_cold_or_warm_and_new_in_every_repeat(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scopes: list[str] = []
        with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
            stream = ouroboros.stream

            def spied(*arguments: Any, **options: Any) -> Any:
                scopes.append(options["scope"])
                return stream(*arguments, **options)

            monkeypatch.setattr(ouroboros, "stream", spied)
            run = SideBySide(
                ouroboros,
                build_methods(("plain", "ouroboros", "ouroboros_warm", "ouroboros_repeated"), ouroboros, None),
                asking(*TEXTS),
                max_new_tokens=2,
                repeats=2,
            )
            run.warm_up()
            warming = [*scopes]
            scopes.clear()
            run.run(lambda record: None)
        counts = {scope: scopes.count(scope) for scope in scopes}
        assert sorted(counts.values()) == [1] * 6 + [6] * 2
        assert warming and not {*counts} & {*warming}

    def test_the_second_turn_follows_the_plain_answer_for_all(self) -> None:
        with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
            run = measured(ouroboros, asking("First", "Other", follow_ups=["Second"]), max_new_tokens=6)
            said = next(one for one in run.records if one.method == "plain" and one.question.number == 0)
            messages = [
                {"role": "user", "content": "First"},
                {"role": "assistant", "content": run.text(said.answer.token_ids)},
                {"role": "user", "content": "Second"},
            ]
            wanted = tuple(ouroboros.encode(messages))
        asked = [one.question for one in run.records if one.question.number == 1]
        assert len(asked) == len(OURS)
        assert {(question.turn, question.token_ids) for question in asked} == {(1, wanted)}
        assert sorted({one.question.number for one in run.records}) == [0, 1, 2, 3]

    def test_prompts_beyond_the_context_are_skipped_and_long_ones_cut_the_answer(self) -> None:
        with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
            conversations = asking("x" * 600, "y" * 492, "z")
            run = measured(ouroboros, conversations, ("plain", "ouroboros"), repeats=2)
            run.warm_up()
        assert run.skipped == 1
        limits = {one.question.name: one.question.limit for one in run.records}
        assert limits["1"] < 30 and limits["2"] == 30
        assert all(len(one.answer.token_ids) <= one.question.limit for one in run.records)

    def test_differences_say_where_and_by_how_much(self) -> None:
        with Ouroboros(tiny_model("qwen3"), byte_tokenizer()) as ouroboros:
            methods = build_methods(("plain", "ouroboros", "ouroboros_warm"), ouroboros, None)

            def doctored(change: Callable[[tuple[int, ...]], tuple[int, ...]], name: str) -> Any:
                def method(question: Question) -> Answer:
                    given = methods[name](question)
                    return replace(given, token_ids=change(given.token_ids))

                return method

            wrong = 9
            altered = {
                "plain": methods["plain"],
                "ouroboros": doctored(lambda ids: (*ids[:5], wrong, *ids[6:]), "ouroboros"),
                "ouroboros_warm": doctored(lambda ids: ids[:4], "ouroboros_warm"),
            }
            run = SideBySide(ouroboros, altered, asking(TEXTS[0]), max_new_tokens=12)
            run.run(lambda record: None)
            own = run.records[0]
            text = torch.tensor([[*own.question.token_ids, *own.answer.token_ids[:5]]])
            with torch.inference_mode():
                logits = ouroboros.model(text).logits[0, -1]
        rows = summarize(run.records, run.gaps)["all"]
        assert rows["plain"]["identical"] == 1 and rows["plain"]["differences"] == []
        [difference] = rows["ouroboros"]["differences"]
        assert (rows["ouroboros"]["identical"], difference["position"]) == (0, 5)
        assert difference["logit_gap"] == pytest.approx(float(logits.max() - logits[wrong]), rel=1e-4)
        assert difference["logit_gap"] > 0
        [difference] = rows["ouroboros_warm"]["differences"]
        assert (difference["position"], difference["logit_gap"]) == (4, None)

    def test_the_gap_of_the_models_own_choice_is_zero(self) -> None:
        prompt = byte_tokenizer()("abc")["input_ids"]
        own = plain(tiny_model(), prompt, 1)[0]
        assert logit_gap(tiny_model(), prompt, own) == 0.0

    @pytest.mark.parametrize(
        "one, other, position",
        [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2, 3), (1, 2), 2), ((), (1,), 0), ((), (), None)],
    )
    def test_first_difference(self, one: Sequence[int], other: Sequence[int], position: int | None) -> None:
        assert first_difference(one, other) == position


class TestReport:
    def test_ratios_are_of_sums_with_quartiles_over_prompts(self) -> None:
        one = {(n, 0): answer(range(10), seconds=10.0) for n in range(3)}
        mine = [record("ouroboros", n, answer(range(10), seconds=s)) for n, s in enumerate((10.0, 5.0, 2.5))]
        row = figures(mine, one, {})
        assert row["wall_ratio"]["of_sums"] == pytest.approx(30 / 17.5)
        assert row["wall_ratio"]["quartiles"] == pytest.approx([1.5, 2.0, 3.0])
        assert row["decode_ratio"]["of_sums"] == pytest.approx(30 / 17.5)
        assert row["prefill_ratio"] == pytest.approx(30 / 17.5)
        assert (row["tokens"], row["target_forwards"], row["tokens_per_forward"]) == (30, 6, 5.0)
        assert row["seconds"] == row["prefill_seconds"] + row["decode_seconds"] == 17.5

    def test_a_ratio_is_over_the_prompts_that_both_answered(self) -> None:
        mine = [record("ouroboros", n, answer(range(10), seconds=5.0)) for n in range(2)]
        row = figures(mine, {(0, 0): answer(range(10), seconds=10.0)}, {})
        assert (row["answers"], row["compared"], row["identical"]) == (2, 1, 1)
        assert row["wall_ratio"] == {"of_sums": 2.0, "quartiles": [2.0] * 3}

    def test_answers_that_the_prefill_gave_have_no_decoding_to_compare(self) -> None:
        whole = answer(range(10), first_tokens=10, prefill_seconds=1.0)
        row = figures([record("ouroboros", 0, whole)], {(0, 0): answer(range(10))}, {})
        assert row["decode_ratio"] == {"of_sums": None, "quartiles": None}
        assert row["wall_ratio"]["of_sums"] == 1.0

    def test_sources_and_cached_tokens_are_summed(self) -> None:
        drafts = [answer([1], accepted_by_source={"phrases": 2}), answer([1], accepted_by_source={"phrases": 1})]
        rows = [record("ouroboros", n, replace(one, cached_tokens=3)) for n, one in enumerate(drafts)]
        row = figures(rows, {}, {})
        assert (row["accepted_by_source"], row["cached_tokens"], row["prompt_tokens"]) == ({"phrases": 3}, 6, 4)

    def test_tables_have_every_category_and_what_differs(self) -> None:
        records = [
            record(method, n, answer(ids), category)
            for n, category in enumerate(("rag", "qa"))
            for method, ids in (("ouroboros", [1, 2, 4]), ("plain", [1, 2, 3]))
        ]
        report = {
            "partial": True,
            "conditions": {"model": "tiny", "prompts": "file.jsonl", "limit": None, "instruction": "a\nb"}
            | machine(tiny_model()),
            **summarize(records, {(0, 0, "ouroboros"): 0.25}),
        }
        assert list(report["categories"]) == ["rag", "qa"]
        shown = cells(report["all"])
        assert [row[0] for row in shown] == ["plain", "ouroboros"]
        assert [row[-1] for row in shown] == ["2/2", "0/2"]
        assert all(len(row) == len(COLUMNS) for row in shown)
        text = markdown(report)
        assert [line for line in text.splitlines() if line.startswith("#")] == [
            "# tiny, file.jsonl (partial)",
            "## rag",
            "## qa",
            "## all",
            "## Drafts",
            "## Answers that differ from plain",
        ]
        assert "| ouroboros | 0 | 0 | 0 | 2 | 0.2500 |" in text
        assert "| ouroboros | 1 | 0 | 0 | 2 |  |" in text
        assert [table.title for table in tables(report)] == ["rag", "qa", "all"]
        line = conditions_line(report["conditions"])
        assert "\n" not in line and "limit" not in line and "torch 2" in line and "dtype: float32" in line

    def test_conditions_name_machine_and_versions(self) -> None:
        told = conditions(tiny_model())
        assert all(word in told for word in ("CPU", "threads", "float32", "greedy", "torch", "transformers", "Python"))


class TestResults:
    def test_a_folder_is_never_written_over(self, tmp_path: Path) -> None:
        started = datetime(2030, 1, 2, 3, 4, 5)
        folders = []
        for token in range(3):
            results = Results(tmp_path / "results", "org/a model", started)
            results.add(record("plain", 0, answer([token])), "text")
            results.finish({"token": token}, "# report\n")
            folders.append(results.folder)
        assert [folder.name for folder in folders] == [
            "2030-01-02T03-04-05-a-model",
            "2030-01-02T03-04-05-a-model-2",
            "2030-01-02T03-04-05-a-model-3",
        ]
        assert [json.loads((folder / "report.json").read_text())["token"] for folder in folders] == [0, 1, 2]
        assert all(
            {*map(lambda path: path.name, folder.iterdir())} == {"answers.jsonl", "report.json", "report.md"}
            for folder in folders
        )

    def test_answers_are_on_disk_as_they_come(self, tmp_path: Path) -> None:
        results = Results(tmp_path, "model", datetime(2030, 1, 1))
        results.add(record("plain", 4, answer([7, 8]), "rag"), "Grüße")
        [line] = (results.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        read = json.loads(line)
        assert (read["prompt"], read["category"], read["method"]) == ("4", "rag", "plain")
        assert (read["token_ids"], read["prompt_tokens"], read["text"]) == ([7, 8], 2, "Grüße")
        results.finish({}, "")
