"""What LlamaIndex asks of an LLM on the event loop is answered without its weights."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_model
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llama_index.llms.ouroboros import OuroborosLLM
from ouroboros_llm import ModelError, defaults
from ouroboros_llm.models import loading as models


class Answer(BaseModel):
    sum: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which weights were loaded."""
    found: list[str] = []
    load = models.load

    def noted(*arguments: Any, **settings: Any) -> Any:
        found.append(threading.current_thread().name)
        return load(*arguments, **settings)

    monkeypatch.setattr(models, "load", noted)
    return found


def fresh(folder: Path, **settings: Any) -> OuroborosLLM:
    """An LLM of whose model nothing is in memory."""
    defaults._weights.clear()
    defaults._shared.clear()
    return OuroborosLLM(model=str(folder), store=None, **settings)


def change(folder: Path, template: str | None, max_new_tokens: int | None) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = template
    for file in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        (folder / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    if max_new_tokens is not None:
        GenerationConfig(max_new_tokens=max_new_tokens).save_pretrained(folder)


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 7}, {"context_window": 99}])
@pytest.mark.parametrize("template", [byte_tokenizer().chat_template, None])
@pytest.mark.parametrize("max_new_tokens", [33, None])
def test_metadata_are_those_of_the_loaded_model(
    folder: Path, loading: list[str], settings: dict[str, Any], template: str | None, max_new_tokens: int | None
) -> None:
    change(folder, template, max_new_tokens)
    llm = fresh(folder, **settings)
    before = llm.metadata
    assert loading == [] and before.is_chat_model is bool(template)
    assert llm.load().name == str(folder)
    assert loading and llm.metadata == before


def test_older_files_say_the_same(folder: Path) -> None:
    """A template in the tokenizer's configuration, and another name for the length of the context."""
    change(folder, None, None)
    assert not fresh(folder).metadata.is_chat_model
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": byte_tokenizer().chat_template}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 77}))
    assert AutoTokenizer.from_pretrained(folder).chat_template and AutoConfig.from_pretrained(folder).n_positions == 77
    metadata = fresh(folder).metadata
    assert metadata.is_chat_model and metadata.context_window == 77


async def test_no_call_loads_on_the_event_loop(folder: Path, loading: list[str]) -> None:
    prompt, settings = PromptTemplate("About {topic}"), {"max_tokens": 3, "overflow": "slide"}
    await fresh(folder, **settings).apredict(prompt, topic="snakes")
    _ = [token async for token in await fresh(folder, **settings).astream(prompt, topic="snakes")]
    await FunctionAgent(tools=[add], llm=fresh(folder, **settings)).run("1 + 2?")
    tools = [FunctionTool.from_defaults(add)]
    await fresh(folder, **settings).apredict_and_call(tools, "1 + 2?", error_on_no_tool_call=False)
    settings["max_tokens"] = 40
    structured = await fresh(folder, **settings).as_structured_llm(Answer).acomplete("1 + 2?")
    assert isinstance(structured.raw, Answer)
    assert len(loading) == 5 and threading.current_thread().name not in loading


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown model 'nonsense'"):
        _ = OuroborosLLM(model="nonsense").metadata
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        _ = OuroborosLLM(model=str(tmp_path)).metadata
