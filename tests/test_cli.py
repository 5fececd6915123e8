from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import byte_tokenizer, tiny_model

from ouroboros_llm import PromptError, __version__
from ouroboros_llm.bench.methods import METHODS, Stream
from ouroboros_llm.cli import commands, main
from ouroboros_llm.models import loading as models

ROOT = Path(__file__).parent.parent
PROMPTS = [
    {"prompt": "the cat sat on the mat, the cat", "category": "cats"},
    {"prompt": "abcabcabc", "category": "letters"},
]


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def told(result: Result) -> str:
    """The one line of an error."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `target` and `draft`, and with prompts."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("target", 0), ("draft", 1)):
        tiny_model("qwen3", seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return folder


def bench(saved: Path, results: Path, *arguments: Any) -> Result:
    return invoke(
        "bench", "--model", saved / "target", "--prompts", saved / "prompts.jsonl", "--results", results,
        "--device", "cpu", "--max-new-tokens", 12, "--threads", 1, *arguments,
    )  # fmt: skip


class TestGroup:
    def test_help_lists_the_commands(self) -> None:
        result = invoke("--help")
        assert result.exit_code == 0
        assert all(f"\n  {name} " in result.stdout for name in commands.BUILT_IN)

    def test_version(self) -> None:
        assert invoke("--version").stdout == f"ouroboros-llm {__version__}\n"

    @pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"]])
    def test_help_loads_no_torch(self, arguments: list[str]) -> None:
        # The package's own names are not the command line's doing, so a bare package stands in for it.
        program = (
            "import sys, types\n"
            f"package = types.ModuleType('ouroboros_llm'); package.__path__ = [{str(ROOT / 'ouroboros_llm')!r}]\n"
            "sys.modules['ouroboros_llm'] = package\n"
            "from ouroboros_llm.cli import main\n"
            f"main({arguments!r}, standalone_mode=False)\n"
            "print(sorted({'torch', 'transformers', 'sqlalchemy'} & {*sys.modules}))\n"
        )
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith("Usage:") and ran.stdout.endswith("[]\n")

    def test_the_script_of_the_package_is_this_group(self) -> None:
        script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["ouroboros"]
        module, _, name = script.partition(":")
        assert getattr(import_module(module), name) is main

    @pytest.mark.parametrize("name", sorted(commands.BUILT_IN))
    def test_every_built_in_command_loads(self, name: str) -> None:
        result = invoke(name, "--help")
        assert result.exit_code == 0 and result.stdout.startswith("Usage:")

    def test_an_unknown_command_is_refused(self) -> None:
        result = invoke("nothing")
        assert result.exit_code == 2 and "nothing" in told(result)


@click.command()
def added() -> None:
    """Added by another package."""
    click.echo("added ran")


@click.command()
@click.argument("kind")
def failing(kind: str) -> None:
    if kind == "prompt":
        raise PromptError("prompt is empty; give some")
    if kind == "json":
        json.loads("{")
    if kind == "file":
        Path("no-such-file").read_text()
    if kind == "interrupt":
        raise KeyboardInterrupt
    raise RuntimeError("a bug")


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points: one that works, one that fails on purpose, and two that are broken."""
    values = {
        "added": f"{__name__}:added",
        "failing": f"{__name__}:failing",
        "missing": "no_such_module_anywhere:command",
        "wrong": "json:loads",
        "bench": "no_such_module_anywhere:bench",
    }
    found = [EntryPoint(name, value, commands.ENTRY_POINTS) for name, value in values.items()]
    monkeypatch.setattr(commands, "entry_points", lambda group: found if group == commands.ENTRY_POINTS else [])


@pytest.mark.usefixtures("points")
class TestAddedCommands:
    def test_they_run_and_are_listed(self) -> None:
        assert invoke("added").stdout == "added ran\n"
        assert "Added by another package." in invoke("--help").stdout

    def test_a_broken_one_is_a_line_and_the_rest_goes_on(self) -> None:
        for name, reason in (("missing", "ModuleNotFoundError"), ("wrong", "must be a click command")):
            result = invoke(name)
            assert result.exit_code == 1
            assert f"command {name!r} cannot be loaded" in told(result) and reason in told(result)
        listing = invoke("--help")
        assert listing.exit_code == 0 and "cannot be loaded" in listing.stdout and "  added " in listing.stdout

    def test_built_in_ones_cannot_be_replaced(self) -> None:
        assert invoke("bench", "--help").exit_code == 0

    @pytest.mark.parametrize(
        "kind, line",
        [("prompt", "prompt is empty; give some"), ("json", "a file is not what"), ("file", "no-such-file: No such")],
    )
    def test_what_users_can_mend_is_one_line(self, kind: str, line: str) -> None:
        result = invoke("failing", kind)
        assert result.exit_code == 1
        assert told(result).startswith(f"Error: {line}")

    def test_a_bug_stays_a_traceback(self) -> None:
        assert isinstance(invoke("failing", "bug").exception, RuntimeError)

    def test_interrupts_have_their_exit_status(self) -> None:
        assert invoke("failing", "interrupt").exit_code == 130


class TestBench:
    def test_json_is_the_report(self, saved: Path, tmp_path: Path) -> None:
        result = bench(saved, tmp_path, "--draft", saved / "draft", "--repeats", 2, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        [folder] = tmp_path.iterdir()
        assert report == json.loads((folder / "report.json").read_text())
        assert (folder / "report.md").read_text().startswith("# ")
        assert report["partial"] is False
        assert list(report["all"]) == list(METHODS) and list(report["categories"]) == ["cats", "letters"]
        for row in report["all"].values():
            assert (row["answers"], row["identical"], row["differences"]) == (4, 4, [])
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert len(answers) == 4 * len(METHODS)
        assert report["all"]["plain"]["tokens"] == sum(
            len(one["token_ids"]) for one in answers if one["method"] == "plain"
        )

    def test_conditions_stand_beside_the_figures(self, saved: Path, tmp_path: Path) -> None:
        result = bench(saved, tmp_path, "--methods", "plain", "--limit", 1, "--instruction", "Say: ", "--json")
        about = json.loads(result.stdout)["conditions"]
        assert about["model"] == str(saved / "target") and about["draft"] is None
        assert (about["prompts"], about["limit"], about["instruction"]) == ("prompts.jsonl", 1, "Say: ")
        assert (about["max_new_tokens"], about["repeats"], about["dtype"]) == (12, 1, "float32")
        assert (about["device"], about["threads"], about["methods"]) == ("CPU", 1, ["plain"])
        assert {*about["versions"]} == {"ouroboros-llm", "torch", "transformers", "Python"}
        assert about["started"] and about["skipped_prompts"] == 0

    def test_tables_name_categories_and_the_folder_stands_on_stderr(self, saved: Path, tmp_path: Path) -> None:
        for runs in (1, 2):
            result = bench(saved, tmp_path, "--methods", "ouroboros")
            assert result.exit_code == 0, result.output
            assert len(list(tmp_path.iterdir())) == runs
        lines = [line.strip() for line in result.stdout.splitlines()]
        assert all(title in lines for title in ("cats", "letters", "all"))
        assert "results in " in result.stderr and "answers " not in result.stderr

    def test_one_category(self, saved: Path, tmp_path: Path) -> None:
        result = bench(saved, tmp_path, "--methods", "plain", "--category", "letters", "--json")
        assert list(json.loads(result.stdout)["categories"]) == ["letters"]

    def test_ctrl_c_leaves_a_partial_report(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped_by(monkeypatch, KeyboardInterrupt(), tmp_path)
        result = bench(saved, tmp_path, "--methods", "plain,prompt_lookup", "--repeats", 20, "--json")
        assert result.exit_code == 130
        report = json.loads(result.stdout)
        [folder] = tmp_path.iterdir()
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert report["partial"] is True and report == json.loads((folder / "report.json").read_text())
        assert 0 < len(answers) == sum(row["answers"] for row in report["all"].values()) < 80
        assert "(partial)" in (folder / "report.md").read_text()

    def test_any_other_end_leaves_a_partial_report_too(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped_by(monkeypatch, RuntimeError("out of memory"), tmp_path)
        result = bench(saved, tmp_path, "--methods", "plain", "--repeats", 20)
        assert isinstance(result.exception, RuntimeError)
        [folder] = tmp_path.iterdir()
        assert json.loads((folder / "report.json").read_text())["partial"] is True

    def test_an_interrupted_load_leaves_nothing(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(models, "load", interrupted)
        assert bench(saved, tmp_path).exit_code == 130
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "arguments, line",
        [
            (("--methods", "magic"), f"Error: methods must be some of {', '.join(METHODS)}, but got magic"),
            (("--methods", "assisted"), "Error: method assisted needs a draft model"),
            (("--category", "dogs"), "no prompts of dogs; it has cats, letters"),
            (("--model", "no-such-model"), "Error: unknown model 'no-such-model'"),
            (("--dtype", "float8"), "Error: dtype must be"),
            (("--prompts", __file__), "line 1: not valid JSON"),
        ],
    )
    def test_user_errors_are_one_line_and_leave_no_folder(
        self, saved: Path, tmp_path: Path, arguments: tuple[Any, ...], line: str
    ) -> None:
        result = bench(saved, tmp_path / "results", *arguments)
        assert result.exit_code == 1
        assert line in told(result)
        assert not (tmp_path / "results").exists()

    def test_a_missing_file_is_a_usage_error(self, saved: Path, tmp_path: Path) -> None:
        result = bench(saved, tmp_path, "--prompts", tmp_path / "missing.jsonl")
        assert result.exit_code == 2 and "missing.jsonl" in told(result)

    def test_a_difference_is_reported(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from dataclasses import replace

        right = Stream.__call__

        def wrong(self: Stream, question: Any) -> Any:
            given = right(self, question)
            return replace(given, token_ids=(*given.token_ids[:3], 9, *given.token_ids[4:]))

        monkeypatch.setattr(Stream, "__call__", wrong)
        row = json.loads(bench(saved, tmp_path, "--methods", "ouroboros", "--json").stdout)["all"]["ouroboros"]
        assert (row["identical"], row["compared"]) == (0, 2)
        assert [one["position"] for one in row["differences"]] == [3, 3]
        assert all(one["logit_gap"] > 0 for one in row["differences"])


def stopped_by(monkeypatch: pytest.MonkeyPatch, error: BaseException, folder: Path) -> None:
    """The model that is loaded raises `error` in a forward after the first answer has been written below `folder`."""
    load = models.load

    def hook(*_: Any) -> None:
        if any(file.read_text() for file in folder.glob("*/answers.jsonl")):
            raise error

    def loading(*arguments: Any, **options: Any) -> Any:
        loaded = load(*arguments, **options)
        loaded.model.register_forward_hook(hook)
        return loaded

    monkeypatch.setattr(models, "load", loading)
