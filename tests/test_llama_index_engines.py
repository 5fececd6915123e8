"""What query engines of LlamaIndex make of prompts that are too long, and of errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llama_index.core
import pytest
from conftest import byte_tokenizer, tiny_model
from llama_index.core import Document, Settings, SummaryIndex
from test_llama_index_scopes import asking

from llama_index.llms.ouroboros import OuroborosLLM
from ouroboros_llm import ContextLengthError, Ouroboros, PromptError

CONTEXT = 2048
# A byte is a token of the model's; LlamaIndex's own tokenizer takes many for one.
DENSE = Document(text="Remarkably, the ouroboros measures 31415926 hands 🐍. " * 100)
MODES = ["compact", "refine", "tree_summarize", "simple_summarize", "accumulate"]


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaIndex's own token counting, which holds for the process."""
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)


@pytest.fixture
def llm() -> Iterator[OuroborosLLM]:
    with Ouroboros(tiny_model(context=CONTEXT), byte_tokenizer()) as ouroboros:
        yield OuroborosLLM(ouroboros=ouroboros, max_tokens=4)


def engine(llm: OuroborosLLM, **settings: Any) -> Any:
    return SummaryIndex.from_documents([DENSE]).as_query_engine(llm=llm, **settings)


@pytest.mark.parametrize("mode", MODES)
async def test_a_prompt_that_is_too_long_is_an_error_in_query_engines(llm: OuroborosLLM, mode: str) -> None:
    named = f"the context of .* holds {CONTEXT}.*Settings.tokenizer = llm.load"
    with pytest.raises(ContextLengthError, match=named):
        engine(llm, response_mode=mode).query("How long?")
    with pytest.raises(ContextLengthError, match=named):
        await engine(llm, response_mode=mode).aquery("How long?")
    if mode == "accumulate":  # which does not stream
        return
    with pytest.raises(ContextLengthError, match=named):
        str(engine(llm, response_mode=mode, streaming=True).query("How long?"))


def test_passages_fit_where_the_models_tokens_are_counted(llm: OuroborosLLM) -> None:
    Settings.tokenizer = llm.load().tokenizer
    for mode in ("compact", "refine", "tree_summarize"):
        assert engine(llm, response_mode=mode).query("How long?").response, mode


async def test_what_cannot_be_asked_is_an_error_in_query_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, speaker = asking()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PromptError("the model's chat template refused the messages")

    monkeypatch.setattr(speaker, "stream", refuse)
    for mode in MODES:
        with pytest.raises(PromptError, match="refused the messages"):
            engine(llm, response_mode=mode).query("How long?")
        with pytest.raises(PromptError, match="refused the messages"):
            await engine(llm, response_mode=mode).aquery("How long?")
