"""`ouroboros pool`: what it prints, what it changes, and what it never does without being told."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import signal
import sqlite3
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result
from conftest import byte_tokenizer
from sqlalchemy import create_engine, make_url, text

from ouroboros_llm.chat.text import vocabulary_hash
from ouroboros_llm.cli import commands, main
from ouroboros_llm.environment import cache_folder
from ouroboros_storage import PhraseStore
from ouroboros_storage.cli import display, exchange
from ouroboros_storage.migrations import MIGRATIONS

POSTGRES = os.environ.get("OUROBOROS_TEST_POSTGRES", "")
ROOT = Path(__file__).parent.parent
HOSTILE = [
    "conversation:42 ",
    "%",
    "_",
    "*",
    "--all",
    "-",
    "'; DROP TABLE ouroboros_runs; --",
    "../../etc/passwd",
    "[bold red]markup[/]",
    ":smile:",
    "ünï:☃",
    "x" * 255,
]
SECRET = "the password is hunter2"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point as pyproject.toml declares it, whatever is installed."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][commands.ENTRY_POINTS]
    points = [EntryPoint(name, value, commands.ENTRY_POINTS) for name, value in declared.items()]
    monkeypatch.setattr(commands, "entry_points", lambda group: points)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "phrases.db"


@pytest.fixture(autouse=True)
def settings(file: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default database is `file`, the default model a folder with nothing but the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    monkeypatch.setenv("OUROBOROS_STORE", f"sqlite:///{file}")
    monkeypatch.setenv("OUROBOROS_MODEL", str(folder))
    monkeypatch.setenv("OUROBOROS_CACHE", str(folder / "none"))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if somebody sat there."""
    monkeypatch.setattr(display, "is_interactive", lambda: True)


def pool(*arguments: Any, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["pool", *map(str, arguments)], input=input)


def done(*arguments: Any, input: str | bytes | None = None) -> str:
    """What a command that works prints."""
    result = pool(*arguments, input=input)
    assert result.exit_code == 0, result.output
    return result.stdout


def answered(*arguments: Any) -> Any:
    return json.loads(done(*arguments[:1], "--json", *arguments[1:]))


def refused(*arguments: Any, input: str | bytes | None = None, status: int = 1) -> str:
    """The one line of an error."""
    result = pool(*arguments, input=input)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


def ids(text: str) -> list[int]:
    found: list[int] = byte_tokenizer()(text)["input_ids"]
    return found


def say(file: Path, scope: str, *texts: str, fingerprint: str | None = None, answer: bool = True) -> None:
    """Remember texts in a scope, as a turn that says them would."""
    with PhraseStore(f"sqlite:///{file}") as store:
        pool = store.open(scope, fingerprint=fingerprint or vocabulary_hash(byte_tokenizer()))
        for text in texts:
            pool.add(ids(text), answer=answer)


def kept(file: Path) -> set[tuple[Any, ...]]:
    """Every run with its count and times, and every note."""
    with PhraseStore(f"sqlite:///{file}", create=False) as store:
        names = {row.scope for row in store.list()}
        runs = {dataclasses.astuple(run) for name in names for run in store.export(name)}
        notes = {dataclasses.astuple(note)[:-1] for name in names for note in store.export_notes(name)}
        return runs | notes


def scopes(file: Path) -> dict[str, int]:
    """How many runs each scope has."""
    with PhraseStore(f"sqlite:///{file}", create=False) as store:
        found = store.list()
        return {row.scope: sum(other.runs for other in found if other.scope == row.scope) for row in found}


class TestGroup:
    def test_every_command_has_help(self) -> None:
        listing = done("--help")
        for name in "list show stats prune delete copy merge rename export import check".split():
            assert f"\n  {name} " in listing
            assert "--store" in done(name, "--help") and "--json" in done(name, "--help")

    def test_help_loads_neither_torch_nor_a_database(self) -> None:
        code = (
            "import sys\nfrom ouroboros_storage.cli import pool\n"
            "pool(['list', '--help'], standalone_mode=False)\n"
            "print(sorted({'torch', 'transformers', 'sqlalchemy', 'numpy'} & {*sys.modules}))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("[]\n")

    def test_listing_loads_no_torch(self, file: Path) -> None:
        say(file, "a", SECRET)
        code = (
            "import sys\nfrom ouroboros_storage.cli import pool\n"
            "pool(['list', '--json'], standalone_mode=False)\n"
            "print({'torch', 'transformers'} & {*sys.modules})"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith(
            "]\nset()\n"
        )


class TestStore:
    @pytest.mark.parametrize("form", ["sqlite:///{}", "{}"])
    @pytest.mark.parametrize("place", ["group", "command", "both"])
    def test_it_may_stand_at_the_group_and_at_the_command(self, tmp_path: Path, form: str, place: str) -> None:
        other = tmp_path / "other.db"
        say(other, "b", SECRET)
        store = form.format(other)
        before, behind = {
            "group": (["--store", store], []),
            "command": ([], ["--store", store]),
            "both": (["--store", tmp_path / "not-there.db"], ["--store", store]),
        }[place]
        assert [row["scope"] for row in json.loads(done(*before, "list", "--json", *behind))] == ["b"]

    def test_the_default_is_that_of_the_adapters(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        say(file, "a", SECRET)
        assert [row["scope"] for row in answered("list")] == ["a"]
        monkeypatch.setenv("OUROBOROS_STORE", str(file))
        assert [row["scope"] for row in answered("list")] == ["a"]
        monkeypatch.delenv("OUROBOROS_STORE")
        monkeypatch.setenv("XDG_DATA_HOME", str(file.parent / "nothing"))
        monkeypatch.setenv("HOME", str(file.parent / "nothing"))
        assert "phrases.db does not exist" in refused("list")

    def test_a_path_in_the_folder_needs_no_slash(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        say(file, "a", SECRET)
        monkeypatch.chdir(file.parent)
        file.rename("phrases?mode=memory#%41")
        assert [row["scope"] for row in answered("list", "--store", "phrases?mode=memory#%41")] == ["a"]
        assert "must be a database URL" in refused("list", "--store", "phrases")

    def test_an_empty_name_is_not_the_default(self, file: Path) -> None:
        say(file, "a", SECRET)
        assert "is empty" in refused("delete", "a", "--yes", "--store", "", status=2)
        assert scopes(file) == {"a": 1}

    def test_passwords_are_not_shown(self) -> None:
        for url in ("postgresql://me:hunter2@", "mysql://me:hunter2@host/name", "sqlite://me:hunter2@:x/y"):
            assert "hunter2" not in refused("list", "--store", url)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["list"],
            ["show", "a"],
            ["stats"],
            ["check"],
            ["export", "--all"],
            ["delete", "a", "--yes"],
            ["prune", "--max-runs", "0", "--yes"],
            ["copy", "a", "b"],
            ["merge", "a", "b", "--yes"],
            ["rename", "a", "b"],
        ],
        ids=lambda arguments: arguments[0],
    )
    def test_only_import_makes_a_database(self, file: Path, arguments: list[str]) -> None:
        assert "does not exist" in refused(*arguments)
        file.touch()
        assert "needs tables" in refused(*arguments)
        assert file.read_bytes() == b"" and os.listdir(file.parent) == ["phrases.db"]

    def test_an_earlier_schema_is_brought_up_to_date(self, file: Path) -> None:
        say(file, "a", SECRET)
        newest = list(MIGRATIONS)
        with pytest.MonkeyPatch.context() as patch:
            added = ("CREATE TABLE ouroboros_later (id INTEGER)",)
            patch.setattr("ouroboros_storage.migrations.MIGRATIONS", (*newest, added))
            patch.setattr("ouroboros_storage.database.MIGRATIONS", (*newest, added))
            assert [phrase["text"] for phrase in answered("show", "a")] == [SECRET]
        with sqlite3.connect(file) as connection:
            assert connection.execute("SELECT count(*) FROM ouroboros_later").fetchone() == (0,)
        connection.close()

    @pytest.mark.parametrize("arguments", [["list"], ["check"], ["delete", "a", "--yes"], ["import", "-"]])
    def test_a_later_schema_is_left_alone(self, file: Path, arguments: list[str]) -> None:
        later = len(MIGRATIONS) + 1
        connection = sqlite3.connect(file)
        connection.execute("CREATE TABLE ouroboros_migrations (version INTEGER PRIMARY KEY)")
        connection.execute("INSERT INTO ouroboros_migrations VALUES (?)", (later,))
        connection.commit()
        connection.close()
        before = file.read_bytes()
        assert f"schema version {later}" in refused(*arguments, input="")
        assert file.read_bytes() == before and os.listdir(file.parent) == ["phrases.db"]


class TestReading:
    def test_list(self, file: Path) -> None:
        say(file, "b", "one two", "three")
        say(file, "a", SECRET)
        rows = answered("list")
        assert [(row["scope"], row["runs"], row["tokens"]) for row in rows] == [("a", 1, 23), ("b", 2, 12)]
        for row in rows:
            assert list(row) == ["scope", "fingerprint", "runs", "tokens", "created", "last_used"]
            assert row["fingerprint"] == vocabulary_hash(byte_tokenizer())
            assert datetime.now(UTC) - datetime.fromisoformat(row["last_used"]) < timedelta(hours=1)
        table = done("list")
        assert re.search(r"^a .* 1 +23$", table, re.M) and re.search(r"^b .* 2 +12$", table, re.M)
        assert rows[0]["fingerprint"][:12] in table and SECRET not in table

    def test_a_long_name_is_whole(self, file: Path) -> None:
        say(file, "x" * 255, SECRET)
        assert "x" * 255 in done("list")

    def test_show_decodes_what_came_most_often_and_then_last(self, file: Path) -> None:
        say(file, "a", "once", "often", "often")
        say(file, "a", "twice", "twice", "last")
        say(file, "a", "a rejected one", answer=False)
        say(file, "b", "of another scope")
        phrases = answered("show", "a")
        assert [phrase["text"] for phrase in phrases] == ["twice", "often", "a rejected one", "last", "once"]
        assert [phrase["count"] for phrase in phrases] == [2, 2, 1, 1, 1]
        assert [phrase["answer"] for phrase in phrases] == [True, True, False, True, True]
        assert list(phrases[0]) == [
            "scope", "fingerprint", "model", "text", "token_ids", "count", "answer", "created", "last_used",
        ]  # fmt: skip
        assert phrases[0]["token_ids"] == ids("twice")
        table = done("show", "a")
        assert [name for name in re.findall("twice|often|once|last used|last", table)][1:] == [
            "twice", "often", "last", "once",
        ]  # fmt: skip
        assert "rejected draft" in table and "of another" not in table

    def test_show_is_limited(self, file: Path) -> None:
        say(file, "a", *(f"phrase {number}" for number in range(30)))
        assert len(answered("show", "a")) == 20
        assert [phrase["text"] for phrase in answered("show", "a", "--limit", 2)] == ["phrase 29", "phrase 28"]
        refused("show", "a", "--limit", 0, status=2)

    def test_special_tokens_are_shown(self, file: Path) -> None:
        with PhraseStore(f"sqlite:///{file}") as store:
            tokenizer = byte_tokenizer()
            store.open("a", fingerprint=vocabulary_hash(tokenizer)).add([*ids("bye"), tokenizer.eos_token_id])
        assert answered("show", "a")[0]["text"] == "bye</s>"

    def test_without_a_tokenizer_that_fits_there_are_token_ids_and_a_reason(
        self, file: Path, settings: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        say(file, "a", "abc", "def", fingerprint="another" * 3)
        result = pool("show", "a")
        assert result.exit_code == 0
        assert " ".join(map(str, ids("abc"))) in result.stdout
        assert result.stderr.count("Token ids only") == 1
        assert f"{settings} has another vocabulary" in result.stderr and "--model" in result.stderr
        assert [phrase["text"] for phrase in answered("show", "a")] == [None, None]
        monkeypatch.setenv("OUROBOROS_MODEL", "smollm2-135m-instruct")
        assert "no tokenizer of 'smollm2-135m-instruct' is on this machine" in pool("show", "a").stderr

    def test_a_model_that_is_named_is_the_only_one_tried(
        self, file: Path, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        say(file, "a", SECRET)
        monkeypatch.setenv("OUROBOROS_MODEL", "org/not-here")
        assert answered("show", "a")[0]["text"] is None
        assert answered("show", "a", "--model", settings)[0]["text"] == SECRET
        assert "no tokenizer" in refused("show", "a", "--model", "org/not-here")
        assert "unknown model" in refused("show", "a", "--model", "no model")
        assert "cannot be loaded" in refused("show", "a", "--model", tmp_path)

    def test_tokenizers_are_told_apart(self, file: Path) -> None:
        say(file, "a", "of ours")
        say(file, "a", "of theirs", fingerprint="theirs")
        say(file, "a", "of them", fingerprint="them")
        assert [phrase["text"] for phrase in answered("show", "a")] == [None, None, "of ours"]
        assert "theirs" in done("show", "a")
        ours = vocabulary_hash(byte_tokenizer())
        assert [phrase["text"] for phrase in answered("show", "a", "--fingerprint", ours[:8])] == ["of ours"]
        assert [phrase["fingerprint"] for phrase in answered("show", "a", "--fingerprint", "them")] == ["them"]
        for start in ("the", "none", "%", "*"):
            assert "theirs" in refused("show", "a", "--fingerprint", start)

    def test_token_ids_beyond_the_vocabulary_do_no_harm(self, file: Path) -> None:
        with PhraseStore(f"sqlite:///{file}") as store:
            store.open("a", fingerprint=vocabulary_hash(byte_tokenizer())).add([*ids("ok"), 999_999, (1 << 32) - 1])
        [phrase] = answered("show", "a")
        assert phrase["text"].startswith("ok") and phrase["token_ids"][-1] == (1 << 32) - 1

    @pytest.mark.parametrize("control", ["\x1b]0;owned\x07\x1b[2J", "\x9b31m", "\r\b\x7f", "\u202e", "\n\t", "\u2028"])
    def test_nothing_stored_is_a_command_to_the_terminal(self, file: Path, control: str) -> None:
        say(file, "a", f"before{control}after")
        for output in (done("show", "a"), done("show", "a", "--json")):
            shown = "".join(output.splitlines())
            assert all(character.isprintable() for character in shown), shown
            assert "before" in shown and "after" in shown
        assert answered("show", "a")[0]["text"] == f"before{control}after"

    def test_names_that_only_another_program_could_have_written(self, file: Path) -> None:
        say(file, "a", SECRET)
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE ouroboros_scopes SET name = ?, fingerprint = ?", ("\x1b[2J", "\x9b2J"))
        connection.close()
        for arguments in (["list"], ["list", "--json"]):
            assert not set(done(*arguments)) & {"\x1b", "\x9b"}

    def test_an_encoding_that_lacks_characters(self, file: Path) -> None:
        say(file, "☃", "a snowman ☃")
        code = "from ouroboros_storage.cli import pool; pool()"
        for command in (["list"], ["show", "☃"]):
            ran = subprocess.run(
                [sys.executable, "-c", code, *command],
                capture_output=True,
                env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
            )
            assert ran.returncode == 0 and b"\\u2603" in ran.stdout, ran.stderr

    def test_markup_is_text(self, file: Path) -> None:
        say(file, "a", "[red]:smile:[/red] [link=http://x]y[/link]")
        assert "[red]:smile:[/red] [link=http://x]y[/link]" in done("show", "a")

    def test_a_scope_that_is_not_there(self, file: Path) -> None:
        say(file, "conversation:42", SECRET)
        for name in ("conversation:4", "conversation:%", "*", "Conversation:42"):
            for command in ("show", "stats", "export"):
                assert f"no scope {name!r}" in refused(command, name)
        assert "printable" in refused("show", "a\nb")

    def test_an_empty_scope_can_be_shown(self, file: Path) -> None:
        say(file, "a", "")
        assert answered("show", "a") == [] and done("show", "a")

    def test_stats(self, file: Path) -> None:
        say(file, "a", "one", "one", "two")
        say(file, "b", "three")
        found = answered("stats")
        assert (found["scopes"], found["runs"], found["tokens"], found["uses"]) == (2, 3, 11, 4)
        assert found["store"] == f"sqlite:///{file}" and found["scope"] is None
        assert found["file_bytes"] >= file.stat().st_size > 0 and found["nbytes"] == 4 * 11
        assert datetime.fromisoformat(found["oldest"]) <= datetime.fromisoformat(found["newest"])
        assert answered("stats", "b")["runs"] == 1
        assert re.search(r"^times runs were added +4$", done("stats"), re.M)
        assert "three" not in done("stats", "b")

    def test_a_sound_database(self, file: Path) -> None:
        say(file, "a", "one", "two")
        assert done("check") == "No problems in 2 runs.\n"
        assert answered("check") == {"store": f"sqlite:///{file}", "ok": True, "runs": 2, "problems": []}

    def test_check_finds_what_was_changed(self, file: Path) -> None:
        say(file, "a", "one", "two")
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE ouroboros_runs SET token_ids = ? WHERE id = 1", (b"\1\0\0\0\2\0\0\0",))
        connection.close()
        result = pool("check", "--json")
        found = json.loads(result.stdout)
        assert result.exit_code == 1 and found["ok"] is False and len(found["problems"]) == 1
        result = pool("check")
        assert result.exit_code == 1 and "not what was written" in result.stdout and result.stderr == ""

    def test_check_says_that_a_file_is_damaged_and_leaves_it(self, file: Path) -> None:
        say(file, "a", *(f"phrase {number}" for number in range(200)))
        damaged = bytearray(file.read_bytes())
        damaged[4096:12288] = b"\xff" * 8192
        file.write_bytes(damaged)
        result = pool("check", "--json")
        assert result.exit_code == 1 and json.loads(result.stdout)["problems"]
        assert refused("list")
        assert os.listdir(file.parent) == ["phrases.db"] and file.read_bytes() == damaged

    def test_reading_does_not_change_the_file(self, file: Path) -> None:
        say(file, "a", SECRET)
        before = file.read_bytes()
        for arguments in (["list"], ["show", "a"], ["stats"], ["check"], ["export", "a"]):
            done(*arguments)
        assert file.read_bytes() == before and os.listdir(file.parent) == ["phrases.db"]


class TestChanging:
    def test_delete(self, file: Path) -> None:
        say(file, "a", SECRET, "two")
        say(file, "b", "three")
        assert answered("delete", "a", "--yes") == {"scopes": ["a"], "runs": 2}
        assert scopes(file) == {"b": 1}
        assert done("delete", "b", "--yes") == "Deleted b: 1 run.\n"

    def test_several_at_once_or_none(self, file: Path) -> None:
        for name in ("a", "b", "c"):
            say(file, name, SECRET)
        assert "no scope 'd'" in refused("delete", "a", "d", "--yes")
        assert scopes(file) == {"a": 1, "b": 1, "c": 1}
        assert answered("delete", "a", "c", "a", "--yes") == {"scopes": ["a", "c"], "runs": 2}
        assert scopes(file) == {"b": 1}

    def test_no_name_is_a_pattern(self, file: Path) -> None:
        for name in ("conversation:1", "conversation:2"):
            say(file, name, SECRET)
        for name in ("*", "conversation:*", "conversation:%", "conversation:_", "conversation:?", "%"):
            refused("delete", name, "--yes")
            refused("prune", name, "--max-runs", 0, "--yes")
        assert scopes(file) == {"conversation:1": 1, "conversation:2": 1}

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_names(self, file: Path, tmp_path: Path, name: str) -> None:
        say(file, "conversation:42", "untouched")
        say(file, name, SECRET)
        assert {row["scope"] for row in answered("list")} == {"conversation:42", name}
        assert name in done("list")
        assert [phrase["text"] for phrase in answered("show", "--", name)] == [SECRET]
        done("copy", "--", name, f"{name[:250]} 2")
        done("rename", "--", f"{name[:250]} 2", "b")
        lines = done("export", "--", name)
        done("import", "-", "--store", tmp_path / "other.db", input=lines)
        assert scopes(tmp_path / "other.db") == {name: 1}
        done("prune", "--max-runs", 0, "--yes", "--", name)
        done("delete", "--yes", "--", name)
        assert scopes(file) == {"conversation:42": 1, "b": 1}

    @pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", "\x1b[2J", "a\x00b", "\u202e"])
    def test_what_is_no_name(self, file: Path, name: str) -> None:
        say(file, "a", SECRET)
        for arguments in (["delete", name, "--yes"], ["copy", "a", name], ["rename", "a", name], ["merge", "a", name]):
            line = refused(*arguments)
            assert "1 to 255 printable characters" in line and line.isprintable()
        assert scopes(file) == {"a": 1}

    @pytest.mark.parametrize(
        "arguments",
        [["delete", "a"], ["prune", "a", "--max-runs", "0"], ["prune", "--max-runs", "0"], ["merge", "b", "a"]],
    )
    def test_what_cannot_be_undone_is_asked_for(self, file: Path, arguments: list[str], asked: None) -> None:
        say(file, "a", SECRET)
        say(file, "b", "two")
        before = kept(file)
        for answer in ("n\n", "\n", ""):
            result = pool(*arguments, "--json", input=answer)
            assert result.exit_code == 1 and result.stdout == "" and "[y/N]" in result.stderr
        assert kept(file) == before
        result = pool(*arguments, "--json", input="y\n")
        assert result.exit_code == 0 and json.loads(result.stdout)["runs"]
        assert kept(file) != before

    @pytest.mark.parametrize(
        "arguments",
        [["delete", "a"], ["prune", "a", "--max-runs", "0"], ["prune", "--max-runs", "0"], ["merge", "b", "a"]],
    )
    def test_nobody_to_ask_means_no(self, file: Path, arguments: list[str]) -> None:
        say(file, "a", SECRET)
        say(file, "b", "two")
        before = kept(file)
        assert "--yes" in refused(*arguments, input="y\n")
        assert kept(file) == before

    def test_prune_by_runs_and_tokens(self, file: Path) -> None:
        say(file, "a", *(f"phrase {number}" for number in range(10)))
        say(file, "b", "untouched")
        assert answered("prune", "a", "--max-runs", 4, "--yes") == {"scope": "a", "runs": 6}
        assert done("prune", "a", "--max-tokens", 17, "--yes") == "Pruned 2 runs.\n"
        assert [phrase["text"] for phrase in answered("show", "a")] == ["phrase 9", "phrase 8"]
        assert answered("prune", "--max-runs", 1, "--yes") == {"scope": None, "runs": 2}
        assert scopes(file)["b"] == 1

    def test_prune_by_age(self, file: Path) -> None:
        say(file, "a", "old", "new")
        with sqlite3.connect(file) as connection:
            long_ago = int((datetime.now(UTC) - timedelta(days=40)).timestamp() * 1e6)
            connection.execute("UPDATE ouroboros_runs SET last_used = ? WHERE id = 1", (long_ago,))
        connection.close()
        assert answered("prune", "--max-age", "6w", "--yes")["runs"] == 0
        assert answered("prune", "--max-age", "30d", "--yes")["runs"] == 1
        assert [phrase["text"] for phrase in answered("show", "a")] == ["new"]

    @pytest.mark.parametrize(
        "written, age",
        [
            ("30d", timedelta(days=30)),
            ("12h", timedelta(hours=12)),
            ("90m", timedelta(minutes=90)),
            ("45s", timedelta(seconds=45)),
            ("2w", timedelta(weeks=2)),
            ("1.5h", timedelta(minutes=90)),
            ("0s", timedelta(0)),
        ],
    )
    def test_ages(self, file: Path, written: str, age: timedelta, monkeypatch: pytest.MonkeyPatch) -> None:
        say(file, "a", SECRET)
        given: list[Any] = []
        monkeypatch.setattr(PhraseStore, "prune", lambda self, scope, **bounds: given.append((scope, bounds)) or 0)
        done("prune", "a", "--max-age", written, "--yes")
        assert given == [("a", {"max_age": age})]

    @pytest.mark.parametrize("age", ["30", "-1d", "d", "1y", "1d12h", "1e3s", "", "9" * 30 + "w"])
    def test_what_is_no_age(self, file: Path, age: str) -> None:
        say(file, "a", SECRET)
        assert "--max-age" in refused("prune", f"--max-age={age}", "--yes", status=2)
        assert scopes(file) == {"a": 1}

    def test_prune_needs_a_bound(self, file: Path) -> None:
        say(file, "a", SECRET)
        assert "--max-tokens" in refused("prune", "--yes", status=2)
        refused("prune", "--max-runs=-1", "--yes", status=2)

    def test_copy_and_rename(self, file: Path) -> None:
        say(file, "a", SECRET, "two")
        assert answered("copy", "a", "b") == {"source": "a", "target": "b", "runs": 2}
        assert answered("rename", "a", "c") == {"source": "a", "target": "c", "runs": 2}
        assert scopes(file) == {"b": 2, "c": 2}
        assert done("copy", "c", "a") == "Copied 2 runs from c to a.\n"
        assert done("rename", "a", "d") == "Renamed a to d: 2 runs.\n"
        for command in ("copy", "rename"):
            assert "exists" in refused(command, "b", "c")
            assert "'nothing'" in refused(command, "nothing", "e")
        assert scopes(file) == {"b": 2, "c": 2, "d": 2}

    def test_merge(self, file: Path) -> None:
        say(file, "a", "one", "both")
        say(file, "b", "two", "both")
        assert answered("merge", "a", "b", "new") == {"sources": ["a", "b"], "target": "new", "runs": 4}
        assert {phrase["text"]: phrase["count"] for phrase in answered("show", "new")} == {
            "both": 2,
            "one": 1,
            "two": 1,
        }
        assert done("merge", "a", "b", "--yes") == "Merged 2 runs from a into b.\n"
        assert scopes(file) == {"a": 2, "b": 3, "new": 3}
        assert "no scope 'c'" in refused("merge", "a", "c", "b", "--yes")
        assert "another scope" in refused("merge", "a", "b", "b", "--yes")
        assert scopes(file) == {"a": 2, "b": 3, "new": 3}

    def test_quotas_of_others_are_not_applied(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Moving phrases about must not drop any, whatever a store drops by itself."""
        for default in ("scope_quota", "quota"):
            monkeypatch.setitem(PhraseStore.__init__.__kwdefaults__, default, 10)
        with PhraseStore(f"sqlite:///{file}", scope_quota=None, quota=None) as store:
            store.open("a", fingerprint="f").add(ids("x" * 50))
            store.open("a", fingerprint="f").add(ids("y" * 50))
        done("copy", "a", "b")
        done("merge", "a", "c")
        done("import", "-", "--scope", "d", input=done("export", "a"))
        assert scopes(file) == dict.fromkeys("abcd", 2)

    def test_what_keeps_deleted_bytes_is_a_line(self, file: Path) -> None:
        say(file, "a", SECRET)
        reader = sqlite3.connect(file, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM ouroboros_runs").fetchone()
        result = pool("delete", "a", "--yes")
        reader.close()
        assert result.exit_code == 0 and result.stdout == "Deleted a: 1 run.\n"
        [line] = result.stderr.splitlines()
        assert line.startswith("Warning: ") and "write-ahead log" in line

    def test_a_locked_database_is_a_line(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from ouroboros_storage import database, sqlite_file

        monkeypatch.setattr(sqlite_file, "BUSY_MILLISECONDS", 10)
        monkeypatch.setattr(database, "_PAUSES", (0.01,))
        say(file, "a", SECRET)
        lock = sqlite3.connect(file, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        assert "locked" in refused("delete", "a", "--yes")
        lock.close()


class TestExchange:
    @pytest.fixture
    def filled(self, file: Path) -> Path:
        say(file, "a", "one", "one", "two")
        say(file, "b", "three ☃", answer=False)
        say(file, "b", "theirs", fingerprint="theirs")
        with PhraseStore(f"sqlite:///{file}") as store:
            store.open("a", fingerprint="f").remember({"m/calibration": b"{}", "m/successors/5": bytes(range(16))})
        return file

    def test_another_store_gets_all_of_it(self, filled: Path, tmp_path: Path) -> None:
        other = tmp_path / "folder" / "other.db"
        lines = done("export", "--all")
        assert all(json.loads(line)["scope"] in "ab" for line in lines.splitlines())
        for _ in range(2):  # importing twice does no harm
            found = json.loads(done("import", "-", "--store", other, "--json", input=lines))
            assert found == {"scopes": ["a", "b"], "runs": 4, "notes": 2}
            assert kept(other) == kept(filled)
        assert stat.S_IMODE(other.stat().st_mode) == 0o600
        assert done("show", "a", "--store", other) == done("show", "a")

    def test_files(self, filled: Path, tmp_path: Path) -> None:
        lines = tmp_path / "a.jsonl"
        old = os.umask(0)
        try:
            assert answered("export", "a", "-o", lines) == {"file": str(lines), "scopes": ["a"], "runs": 2, "notes": 2}
        finally:
            os.umask(old)
        assert stat.S_IMODE(lines.stat().st_mode) == 0o600
        assert lines.read_text() == done("export", "a")
        result = pool("import", lines, "--store", tmp_path / "other.db")
        assert result.stderr == "Imported 2 runs and 2 notes into 1 scope.\n" and result.exit_code == 0
        assert scopes(tmp_path / "other.db") == {"a": 2}

    def test_lines_alone_go_to_stdout(self, filled: Path) -> None:
        for arguments in (["export", "b"], ["export", "b", "--json"]):
            result = pool(*arguments)
            assert len([json.loads(line) for line in result.stdout.splitlines()]) == 2
            assert result.stdout.isascii()  # safe on a terminal, and in any encoding
        assert json.loads(result.stderr) == {"file": None, "scopes": ["b"], "runs": 2, "notes": 0}
        assert pool("export", "b").stderr == "Exported 2 runs and 0 notes of 1 scope.\n"

    def test_scopes_are_named_or_all(self, filled: Path) -> None:
        for arguments in ([], ["a", "--all"]):
            assert "--all" in refused("export", *arguments, status=2)
        assert "no scope 'c'" in refused("export", "a", "c")
        assert len(done("export", "a", "b", "a").splitlines()) == len(done("export", "--all").splitlines()) == 6

    def test_an_empty_store(self, file: Path) -> None:
        PhraseStore(f"sqlite:///{file}").setup()
        assert done("export", "--all") == "" and answered("list") == []
        assert "0 runs" in pool("import", "-", input="\n\n").stderr

    def test_everything_into_one_scope(self, filled: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.db"
        done("import", "-", "--scope", "all of it", "--store", other, input=done("export", "--all"))
        assert scopes(other) == {"all of it": 4}
        for name in ("", "a\nb"):
            assert "printable" in refused("import", "-", "--scope", name, "--store", tmp_path / "third.db", input="")
        assert not (tmp_path / "third.db").exists()

    @pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError(28, "No space left", "x"), 1)])
    def test_what_is_interrupted_leaves_the_old_file(
        self, filled: Path, tmp_path: Path, error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = tmp_path / "lines" / "a.jsonl"
        lines.parent.mkdir()
        real, calls = exchange._write, []

        def interrupted(*arguments: Any) -> Any:
            calls.append(real(*arguments))
            raise error

        for old in (None, "what was there"):
            if old:
                lines.write_text(old)
            with monkeypatch.context() as patch:
                patch.setattr(exchange, "_write", interrupted)
                assert pool("export", "a", "-o", lines).exit_code == status
            assert [entry.read_text() for entry in lines.parent.iterdir()] == ([old] if old else [])
        assert len(calls) == 2
        done("export", "a", "-o", lines)
        assert lines.read_text() == done("export", "a")

    def test_a_link_stays_a_link(self, filled: Path, tmp_path: Path) -> None:
        (tmp_path / "real.jsonl").write_text("old")
        (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
        done("export", "a", "-o", tmp_path / "link.jsonl")
        assert (tmp_path / "link.jsonl").is_symlink()
        assert (tmp_path / "real.jsonl").read_text() == done("export", "a")

    def test_what_is_no_place_for_a_file(self, filled: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert "no ordinary file" in refused("export", "a", "-o", tmp_path / "pipe", status=2)
        assert "there is no folder" in refused("export", "a", "-o", tmp_path / "no" / "a.jsonl", status=2)
        refused("export", "a", "-o", tmp_path, status=2)
        assert (tmp_path / "pipe").is_fifo()

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            "[]",
            "null",
            "{}",
            '{"scope": "a"}',
            "[" * 20_000,
            b"\xff\xfe",
            '{"scope": "a\\nb", "fingerprint": "f", "token_ids": [1], "count": 1, "answer": true, '
            '"created": "2026-01-01T00:00:00+00:00", "last_used": "2026-01-01T00:00:00+00:00"}',
            '{"scope": "a", "fingerprint": "f", "token_ids": [-1], "count": 1, "answer": true, '
            '"created": "2026-01-01T00:00:00+00:00", "last_used": "2026-01-01T00:00:00+00:00"}',
            '{"scope": "a", "fingerprint": "f", "token_ids": [1], "count": 1, "answer": true, '
            '"created": "0001-01-01T00:00:00+14:00", "last_used": "2026-01-01T00:00:00+00:00"}',
            '{"scope": "a", "fingerprint": "f", "note": "m", "data": "!", "last_used": "2026-01-01T00:00:00+00:00"}',
        ],
    )
    def test_what_is_no_export_names_the_line(self, filled: Path, line: str | bytes, tmp_path: Path) -> None:
        lines = tmp_path / "lines.jsonl"
        lines.write_bytes(done("export", "a").encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()))
        said = refused("import", lines, "--store", tmp_path / "other.db")
        assert f"line 6 of {lines}" in said and said.isprintable()

    def test_a_file_that_is_not_there(self) -> None:
        assert "does not exist" in refused("import", "nothing.jsonl", status=2)

    def test_newer_counts_stay(self, filled: Path) -> None:
        before = done("export", "a")
        say(filled, "a", "one")
        done("import", "-", input=before)
        assert {phrase["text"]: phrase["count"] for phrase in answered("show", "a")} == {"one": 3, "two": 1}

    def test_a_pipe_that_closes_early_is_no_traceback(self, file: Path) -> None:
        say(file, "a", *(f"phrase {number}" for number in range(3000)))
        command = f"{sys.executable} -c 'from ouroboros_storage.cli import pool; pool()' export a | head -n 1"
        ran = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert len(ran.stdout.splitlines()) == 1 and "Traceback" not in ran.stderr


@pytest.mark.skipif(not POSTGRES, reason="OUROBOROS_TEST_POSTGRES has no URL")
def test_postgres(file: Path) -> None:
    """The same commands; the rest of this file is about what comes before the database."""
    say(file, "a", "one", "one", "two")
    lines = done("export", "a")
    schema = f"ouroboros_test_{uuid4().hex}"
    engine = create_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
        there = make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(False)
        assert "needs tables" in refused("list", "--store", there)
        assert json.loads(done("import", "-", "--store", there, "--json", input=lines))["runs"] == 2
        assert done("export", "a", "--store", there) == lines
        assert [phrase["text"] for phrase in answered("show", "a", "--store", there)] == ["one", "two"]
        assert answered("stats", "--store", there)["file_bytes"] is None
        assert answered("check", "--store", there)["ok"] is True
        for command in (["copy", "a", "b"], ["merge", "a", "b", "--yes"], ["rename", "b", "c"]):
            done(*command, "--store", there)
        assert answered("prune", "--max-runs", 1, "--yes", "--store", there)["runs"] == 3
        assert answered("delete", "a", "c", "--yes", "--store", there)["runs"] == 1
        assert answered("list", "--store", there) == []
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


class Terminal:
    """A command that runs on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.process, self.screen = pty.fork()
        if not self.process:
            os.environ |= {"TERM": "xterm", "COLUMNS": "80"}
            code = (
                "from importlib.metadata import EntryPoint\nfrom ouroboros_llm.cli import commands, main\n"
                "commands.entry_points = lambda group: [EntryPoint('pool', 'ouroboros_storage.cli:pool', group)]\n"
                "main(prog_name='ouroboros')"
            )
            os.execv(sys.executable, [sys.executable, "-c", code, "pool", *arguments])
        self.output = ""

    def read(self, until: str = "\0") -> str:
        """What appears until a text does, or the command ends."""
        while until not in self.output:
            if not select.select([self.screen], [], [], 120)[0]:
                os.kill(self.process, signal.SIGKILL)
                pytest.fail(f"nothing comes any more after {self.output!r}")
            if not self._take_in():
                break
        return self.output

    def ends(self, seconds: float) -> bool:
        """Whether the command ends before nothing has come for so long."""
        while select.select([self.screen], [], [], seconds)[0]:
            if not self._take_in():
                return True
        return False

    def _take_in(self) -> bool:
        try:
            piece = os.read(self.screen, 4096)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.output += piece.decode(errors="replace")
        return bool(piece)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def end(self) -> tuple[int, str]:
        output = self.read()
        os.close(self.screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]), output


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no pseudo-terminals here")
class TestTerminal:
    @pytest.mark.parametrize("answer, left", [("n\n", {"a": 1}), ("y\n", {})])
    def test_questions(self, file: Path, answer: str, left: dict[str, int]) -> None:
        say(file, "a", SECRET)
        terminal = Terminal("delete", "a")
        assert "Delete a (1 run, 23 tokens) for good?" in terminal.read("[y/N]")
        terminal.type(answer)
        status, _ = terminal.end()
        assert (status, scopes(file)) == (0 if not left else 1, left)

    def test_ctrl_c_at_a_question_has_its_status(self, file: Path) -> None:
        say(file, "a", SECRET)
        terminal = Terminal("delete", "a")
        terminal.read("[y/N]")
        terminal.type("\x03")
        if not terminal.ends(5):
            terminal.type("\n")  # an interrupt just before Python waits for input is seen when that comes
        status, output = terminal.end()
        assert (status, scopes(file)) == (130, {"a": 1}) and "Traceback" not in output, output

    @pytest.mark.parametrize("arguments", [["check"], ["export", "a", "-o", "{}"], ["prune", "--max-runs", "9", "-y"]])
    def test_bars(self, file: Path, tmp_path: Path, arguments: list[str]) -> None:
        say(file, "a", *(f"phrase {number}" for number in range(2000)))
        status, output = Terminal(*(argument.format(tmp_path / "lines") for argument in arguments)).end()
        assert status == 0 and re.search("checking|exporting|pruning", output)
        lines = [word.format(tmp_path / "lines") for word in arguments]
        result = pool(*lines)
        assert result.exit_code == 0 and not re.search("checking|exporting|pruning", result.output)

    def test_long_phrases_are_cut_and_obey_nobody(self, file: Path) -> None:
        say(file, "a", "start\x1b[2J\x07" + "x" * 500 + "end")
        status, output = Terminal("show", "a").end()
        assert status == 0 and "start\\x1b[2J\\x07" in output and "end" not in output
        assert "\x1b[2J" not in output and "\x07" not in output

    def test_lines_on_a_terminal_have_no_bar_among_them(self, file: Path) -> None:
        say(file, "a", *(f"phrase {number}" for number in range(50)))
        status, output = Terminal("export", "a").end()
        assert status == 0 and "exporting" not in output
        assert len([json.loads(line) for line in output.splitlines() if line.startswith("{")]) == 50


@pytest.mark.skipif(not (cache_folder() / "smollm2-135m-instruct").is_dir(), reason="SmolLM2 is not in the cache")
def test_a_real_tokenizer_without_its_weights(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ouroboros_llm.models import loading as models

    monkeypatch.setenv("OUROBOROS_CACHE", _CACHE)
    monkeypatch.setenv("OUROBOROS_MODEL", "SmolLM2-135M-Instruct")
    monkeypatch.setattr(models, "fetch", None)
    tokenizer = models.load_tokenizer("smollm2-135m-instruct")
    with PhraseStore(f"sqlite:///{file}") as store:
        store.open("a", fingerprint=vocabulary_hash(tokenizer)).add(
            tokenizer("def add(a, b):\n    return a + b")["input_ids"]
        )
    [phrase] = answered("show", "a")
    assert phrase["text"] == "def add(a, b):\n    return a + b" and phrase["model"] == "SmolLM2-135M-Instruct"


_CACHE = str(cache_folder())
