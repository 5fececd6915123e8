"""LlamaIndex's documents as texts that answers quote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_model
from llama_index.core import Document
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import HierarchicalNodeParser, MarkdownNodeParser, SentenceSplitter, get_leaf_nodes
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from test_corpus import BIAS, OPTIONS, PROMPT, ask, corpus, matches
from test_llama_index_scopes import asking

from llama_index.llms.ouroboros import OuroborosLLM
from llama_index.llms.ouroboros.documents import texts_by_document
from ouroboros_llm import OptionError, Ouroboros

MANUAL = " ".join(f"Whoever squares {number} gets {number * number}." for number in range(200))


@pytest.fixture
def ouroboros() -> Iterator[Ouroboros]:
    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        yield ouroboros


@pytest.fixture
def llm(ouroboros: Ouroboros) -> OuroborosLLM:
    return OuroborosLLM(ouroboros=ouroboros, corpus_scope="manuals")


def test_answers_quote_what_was_indexed(ouroboros: Ouroboros) -> None:
    said = ask(ouroboros).text
    llm = OuroborosLLM(
        ouroboros=ouroboros,
        corpus_scope="manuals",
        max_tokens=60,
        logit_bias=BIAS,
        drafters=OPTIONS.drafters,
        max_draft_tokens=15,
    )

    def forwards(scope: str, **settings: Any) -> int:
        response = llm.complete(PROMPT, formatted=True, scope=scope, **settings)
        assert response.text == said
        return int(response.raw["statistics"]["target_forwards"])

    assert forwards("conversation:2") == 60
    llm.index_documents([Document(text=f"Page 1.\n\n{said}\n\nPage 2.")])
    assert forwards("conversation:3") < 20
    assert forwards("conversation:3", corpus_scope="corpus:other") == 60


def test_nodes_of_a_document_are_one(llm: OuroborosLLM, ouroboros: Ouroboros) -> None:
    documents = [Document(text=MANUAL, doc_id="manual"), Document(text="The phoenix rises.", doc_id="news")]
    nodes = SentenceSplitter(chunk_size=120, chunk_overlap=40).get_nodes_from_documents(documents)
    assert len(nodes) > 20
    # Chunks overlap; what is indexed does not.
    texts = texts_by_document(nodes)
    assert " ".join(text.strip() for text in texts["manual"]).split() == MANUAL.split()
    indexed = llm.index_documents(nodes)
    assert (indexed.ids, indexed.added) == (("manual", "news"), 2)
    assert llm.index_documents(nodes).unchanged == 2
    assert matches(ouroboros, "The phoenix ") == ["rises."]
    assert llm.remove_documents("news") == 1
    assert llm.remove_documents([nodes[0], nodes[1], "nothing"]) == 1
    assert corpus(ouroboros).entries() == {}


FACTS = [f"Whoever squares {number} gets {number * number}." for number in range(200)]
CHAPTERS = "".join(
    f"# Chapter {first}\n\n" + "\n\n".join(FACTS[first : first + 50]) + "\n\n" for first in range(0, 200, 50)
)
PARSERS = {
    "sentences": SentenceSplitter(chunk_size=64, chunk_overlap=20),
    "hierarchy": HierarchicalNodeParser.from_defaults(chunk_sizes=[512, 128, 64], chunk_overlap=20),
    "one after the other": IngestionPipeline(
        transformations=[MarkdownNodeParser(), SentenceSplitter(chunk_size=64, chunk_overlap=20)],
        disable_cache=True,
    ),
}


def parsed(parser: str, text: str) -> list[Any]:
    documents, found = [Document(text=text, doc_id="manual")], PARSERS[parser]
    if isinstance(found, IngestionPipeline):
        return list(found.run(documents=documents))
    return list(found.get_nodes_from_documents(documents))


@pytest.mark.parametrize("parser", [*PARSERS, "leaves"])
def test_nothing_is_lost_wherever_nodes_say_that_they_stand(parser: str) -> None:
    nodes = get_leaf_nodes(parsed("hierarchy", CHAPTERS)) if parser == "leaves" else parsed(parser, CHAPTERS)
    texts = texts_by_document(nodes)
    assert set(texts) == {"manual"}
    assert [fact for fact in FACTS if not any(fact in text for text in texts["manual"])] == []


def test_what_overlaps_is_put_together_again() -> None:
    assert texts_by_document(parsed("sentences", MANUAL)) == {"manual": [MANUAL]}
    assert texts_by_document(parsed("hierarchy", MANUAL)) == {"manual": [MANUAL]}


def test_nodes_that_were_edited_are_whole() -> None:
    nodes = parsed("sentences", MANUAL)
    for number, node in enumerate(nodes):
        node.set_content(f"Page {number}: {node.text}")
    texts = texts_by_document(nodes)["manual"]
    assert all(any(node.text in text for text in texts) for node in nodes)


def test_documents_by_new_ids_cost_no_tokens(llm: OuroborosLLM, ouroboros: Ouroboros) -> None:
    tokens = [llm.index_documents([Document(text=MANUAL)]).tokens for _ in range(3)]
    assert tokens[0] > 0 and tokens[1:] == [0, 0]
    first, *others = corpus(ouroboros).entries()
    runs = ouroboros._corpora.open("corpus:manuals").stats
    assert llm.remove_documents(others) == 2 and ouroboros._corpora.open("corpus:manuals").stats == runs
    assert llm.remove_documents(first) == 1 and ouroboros._corpora.open("corpus:manuals").stats.runs == 0


def test_nodes_that_stand_nowhere(llm: OuroborosLLM) -> None:
    alone = TextNode(text="The phoenix rises.", id_="alone")
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    parts = [TextNode(text=text, relationships=source) for text in ("One.", "Two.", "")]
    assert texts_by_document([alone, *parts]) == {"alone": ["The phoenix rises."], "book": ["One.", "Two."]}
    assert llm.index_documents([]).ids == ()


@pytest.mark.parametrize("show", [True, False])
def test_progress_is_shown_where_it_is_wanted(
    llm: OuroborosLLM, capsys: pytest.CaptureFixture[str], show: bool
) -> None:
    llm.index_documents([Document(text=f"Text {number}.") for number in range(7)], show_progress=show)
    assert ("7/7" in capsys.readouterr().err) is show


def test_the_corpus_must_have_a_name(ouroboros: Ouroboros) -> None:
    llm = OuroborosLLM(ouroboros=ouroboros)
    with pytest.raises(OptionError, match="corpus_scope must name the corpus"):
        llm.index_documents([Document(text="x")])
    with pytest.raises(OptionError, match="nodes must be nodes or documents"):
        llm.index_documents(["x"], corpus_scope="manuals")  # type: ignore[list-item]
    assert llm.index_documents([Document(text="xy")], corpus_scope="corpus:manuals").added == 1
    assert set(corpus(ouroboros).entries())


def test_the_name_of_a_corpus_is_a_string(llm: OuroborosLLM) -> None:
    named: Any = {"corpus_scope": 5}
    for call in (llm.complete, llm.stream_complete, llm.remove_documents):
        with pytest.raises(OptionError, match="corpus_scope must be the name of a corpus.* but got 5"):
            call("hi", **named)


def test_the_corpus_of_a_call() -> None:
    llm, speaker = asking(corpus_scope="manuals")
    llm.complete("hi")
    llm.complete("hi", corpus_scope="news")
    llm, other = asking()
    llm.complete("hi")
    named = [one.get("corpus_scopes") for one in (*speaker.calls, *other.calls)]
    assert named == [["corpus:manuals"], ["corpus:news"], None]
