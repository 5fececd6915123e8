"""`examples/llamaindex_query_engine.py` over a tiny model: what it counts, not how good the answers are."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_model
from llama_index.core import Document
from llama_index.core.node_parser import SentenceSplitter

from llama_index.llms.ouroboros import OuroborosLLM
from ouroboros_llm import Ouroboros


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path(__file__).parent.parent / "examples" / "llamaindex_query_engine.py"
    spec = importlib.util.spec_from_file_location("llamaindex_query_engine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nodes(example: Any) -> Any:
    chapters = [Document(text=example.topics[name], doc_id=name) for name in example.CHAPTERS]
    return SentenceSplitter(chunk_size=320, chunk_overlap=0).get_nodes_from_documents(chapters)


def test_twenty_questions_in_three_conversations_on_both_days(example: Any) -> None:
    for day in (example.FIRST_DAY, example.SECOND_DAY):
        assert len(day) == 3 and sum(map(len, day)) == 20
        assert [len(questions) for questions in example._first(day, 20)] == [len(questions) for questions in day]
        assert [len(questions) for questions in example._first(day, 4)] == [2, 1, 1]
    assert not set(sum(example.FIRST_DAY, ())) & set(sum(example.SECOND_DAY, ()))


def test_passages_that_are_found_belong_to_the_question(example: Any, nodes: Any) -> None:
    retriever = example.BM25(nodes)
    for question, chapter in {
        "How does the execution of the with statement proceed?": "with",
        "What does the global statement declare?": "global",
        "What does a dict display yield?": "dict",
    }.items():
        assert retriever.retrieve(question)[0].node.ref_doc_id == chapter


def test_the_table(example: Any, nodes: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(example, "MAX_TOKENS", 12)
    with Ouroboros(tiny_model(context=65536), byte_tokenizer()) as ouroboros:
        llm = OuroborosLLM(ouroboros=ouroboros, max_tokens=12, max_draft_tokens=15, corpus_scope="python")
        llm.index_documents(nodes)
        questions = example._first(example.FIRST_DAY, 4)
        results = {name: example.ask(llm, nodes, questions) for name in ("cold", "others", "again")}
        results |= example.peers(ouroboros, results["cold"], 2)
    example.report(results, "a machine", True)
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] == {"cold": "2 of 2", "again": "2 of 2"}
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == list(example.NAMES.values())
    cold, again = rows[example.NAMES["cold"]], rows[example.NAMES["again"]]
    assert again["tokens"] == cold["tokens"] == 48
    assert again["forwards"] < cold["forwards"] and again["cached"] > cold["cached"] > 0
    # The second question of a conversation begins with all of the first, and with its answer.
    first, second = results["cold"][:2]
    assert second.cached_tokens >= len(first.prompt_ids)
