"""`transformers serve` over a folder of ours: what it answers is what the model says without us."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, plain, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, TextIteratorStreamer

from ouroboros_llm import OptionError
from ouroboros_llm.chat.text import vocabulary_hash
from ouroboros_storage import PhraseStore

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformers_serve"
TOKENS = 40
QUESTION = "abc abc abd abc abc abd abc"
MESSAGES = [{"role": "user", "content": QUESTION}]
SERVE_PACKAGES = ("accelerate", "fastapi", "openai", "uvicorn")


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load(EXAMPLE / "prepare.py").prepare


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model that speaks ASCII, so that text can be compared piece by piece."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mute = [number for token, number in tokenizer.get_vocab().items() if len(token) > 1 or not "!" <= token <= "~"]
    GenerationConfig(suppress_tokens=sorted(mute), eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untouched(source: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source)


@pytest.fixture(scope="module")
def prompt_ids() -> list[int]:
    return byte_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]


@pytest.fixture
def store_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path / 'phrases.db'}"
    monkeypatch.setenv("OUROBOROS_STORE", url)
    return url


@pytest.fixture
def model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_url: str) -> PreTrainedModel:
    """The model as the library loads it from a prepared folder."""
    # The library copies the folder's code there and imports it from there, anew for every place.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    prepare(source, tmp_path / "served")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "served", trust_remote_code=True)


def answer(model: PreTrainedModel, prompt_ids: list[int], conversation: str | None = None, **options: Any) -> list[int]:
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False)
    if conversation is not None:
        config.ouroboros_conversation = conversation
    output = model.generate(input_ids=torch.tensor([prompt_ids]), generation_config=config, **options)
    return output[0, len(prompt_ids) :].tolist()


def scopes(url: str) -> dict[str, int]:
    with PhraseStore(url) as store:
        return {scope.scope: scope.runs for scope in store.list()}


def test_conversation_is_remembered(
    model: PreTrainedModel, untouched: PreTrainedModel, prompt_ids: list[int], store_url: str
) -> None:
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    answer(model, prompt_ids)  # the first call of all also measures the model
    counts = []
    for _ in range(2):
        forwards.clear()
        assert answer(model, prompt_ids, "42") == plain(untouched, prompt_ids, TOKENS)
        counts.append(len(forwards))
    assert counts[1] < counts[0]
    assert scopes(store_url)["conversation:42"] > 0


def test_without_conversation_nothing_is_kept(model: PreTrainedModel, prompt_ids: list[int], store_url: str) -> None:
    answer(model, prompt_ids)
    assert scopes(store_url) == {}
    answer(model, prompt_ids, "42")
    answer(model, prompt_ids)
    assert list(scopes(store_url)) == ["conversation:42"]


@pytest.mark.parametrize("conversation", ["", "a\nb", 42])
def test_conversation_must_be_a_name(model: PreTrainedModel, prompt_ids: list[int], conversation: Any) -> None:
    with pytest.raises(OptionError, match="ouroboros_conversation"):
        answer(model, prompt_ids, conversation)


def test_streamer_gets_prompt_answer_and_end(
    model: PreTrainedModel, untouched: PreTrainedModel, prompt_ids: list[int]
) -> None:
    streamer = TextIteratorStreamer(byte_tokenizer(), timeout=30)
    thread = threading.Thread(target=answer, args=(model, prompt_ids), kwargs=dict(streamer=streamer))
    thread.start()
    assert "".join(streamer) == byte_tokenizer().decode(prompt_ids + plain(untouched, prompt_ids, TOKENS))
    thread.join()


def test_stop_strings_end_where_they_end_without_us(
    model: PreTrainedModel, untouched: PreTrainedModel, prompt_ids: list[int]
) -> None:
    tokenizer = byte_tokenizer()
    stop = tokenizer.decode(plain(untouched, prompt_ids, TOKENS)[12:15])
    wanted = plain(untouched, prompt_ids, TOKENS, stop_strings=[stop], tokenizer=tokenizer)
    assert len(wanted) <= 15
    for _ in range(2):
        assert answer(model, prompt_ids, "42", stop_strings=[stop], tokenizer=tokenizer) == wanted


@pytest.mark.parametrize(
    ("options", "word"),
    [(dict(assistant_model=tiny_model("llama", seed=1)), "assistant_model"), (dict(num_beams=2), "num_beams=2")],
)
def test_what_is_not_honored_is_refused(
    model: PreTrainedModel, prompt_ids: list[int], options: dict[str, Any], word: str
) -> None:
    with pytest.raises(OptionError, match=word):
        answer(model, prompt_ids, **options)


def test_unusable_store_costs_one_warning(
    model: PreTrainedModel, untouched: PreTrainedModel, prompt_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUROBOROS_STORE", "no url")
    with pytest.warns(RuntimeWarning, match="phrases stay in memory") as warned:
        for _ in range(2):
            assert answer(model, prompt_ids, "42") == plain(untouched, prompt_ids, TOKENS)
    assert len([warning for warning in warned if warning.category is RuntimeWarning]) == 1


def test_prepare_overwrites_nothing(source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        prepare(source, tmp_path / "links")
    assert (tmp_path / "links" / "config.json").is_symlink()
    prepare(source, tmp_path / "copies", copy=True)
    assert (tmp_path / "copies" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    for folder in (source, tmp_path / "copies"):
        with pytest.raises(FileExistsError, match="config.json"):
            prepare(source, folder)


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    folder: Path
    url: str
    store_url: str
    log: Path

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Content-Type": "application/json"})
        if body is not None:
            request.data = json.dumps(dict(model=str(self.folder)) | body).encode()
        # Past any proxy of the environment: it is this machine.
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)

    def chat(self, **body: Any) -> dict[str, Any]:
        with self.open("/v1/chat/completions", dict(messages=MESSAGES, max_tokens=TOKENS) | body) as response:
            return json.load(response)

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        body = dict(messages=MESSAGES, max_tokens=TOKENS, stream=True) | body
        with self.open("/v1/chat/completions", body) as response:
            lines = [line.decode().removeprefix("data: ").strip() for line in response]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait(self) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return self.open("/health").close()
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"the server did not start:\n{self.log.read_text()}")


@pytest.fixture(scope="module")
def server(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    for package in SERVE_PACKAGES:
        pytest.importorskip(package, reason="transformers serve needs `pip install transformers[serving]`")
    home = tmp_path_factory.mktemp("server")
    prepare(source, home / "served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store_url, log = f"sqlite:///{home / 'phrases.db'}", home / "log"
    environment = os.environ | dict(
        HF_HOME=str(home / "hub"), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_UPDATE_CHECK="1", OUROBOROS_STORE=store_url
    )
    command = ["-m", "transformers.cli.transformers", "serve", str(home / "served"), "--trust-remote-code"]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=output)
    server = Server(process, home / "served", f"http://127.0.0.1:{port}", store_url, log)
    try:
        server.wait()
        yield server
    finally:
        process.kill()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def wanted(untouched: PreTrainedModel, prompt_ids: list[int]) -> str:
    return byte_tokenizer().decode(plain(untouched, prompt_ids, TOKENS), skip_special_tokens=True)


def named(conversation: str) -> dict[str, str]:
    return dict(generation_config=json.dumps(dict(ouroboros_conversation=conversation)))


def test_server_answers_what_the_model_says(server: Server, wanted: str, prompt_ids: list[int]) -> None:
    reply = server.chat()
    assert reply["choices"][0]["message"]["content"] == wanted
    assert reply["choices"][0]["finish_reason"] == "length"
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (len(prompt_ids), TOKENS)
    assert scopes(server.store_url) == {}


def test_server_streams_the_same(server: Server, wanted: str) -> None:
    chunks = server.stream()
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == TOKENS


def test_server_remembers_a_conversation(server: Server, wanted: str) -> None:
    replies = [server.chat(**named("42")) for _ in range(2)]
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == [wanted, wanted]
    with PhraseStore(server.store_url) as store:
        (scope,) = store.list()
        runs = [byte_tokenizer().decode(run.token_ids) for run in store.export("conversation:42")]
    assert (scope.scope, scope.fingerprint) == ("conversation:42", vocabulary_hash(byte_tokenizer()))
    assert wanted in runs


def test_server_stops_at_stop_strings(server: Server, wanted: str) -> None:
    stop = wanted[12:15]
    assert server.chat(stop=[stop])["choices"][0]["message"]["content"] == wanted[: wanted.index(stop) + 3]


def test_server_says_what_it_does_not_honor(server: Server) -> None:
    (error,) = [chunk["error"] for chunk in server.stream(generation_config='{"num_beams": 2}') if "error" in chunk]
    assert "num_beams=2" in error


def test_server_shuts_down(server: Server) -> None:
    """The last test: it ends the server that the others share."""
    server.process.send_signal(signal.SIGINT)
    server.process.wait(timeout=60)
    assert "Application shutdown complete" in server.log.read_text()
