"""Documents in scopes of their own: indexed once, by content, quoted by whoever names them, removable."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, own_model, tiny_model
from databases import POSTGRES, needs_postgres

from ouroboros_llm import DecodingOptions, GenerationResult, OptionError, Ouroboros, PoolSource, StoreError
from ouroboros_llm.phrase_pool.base import run_key
from ouroboros_llm.phrase_pool.corpus import Corpus
from ouroboros_llm.phrase_pool.memory import MemoryPool
from ouroboros_storage import PhraseStore
from ouroboros_storage.records import content_hash, encode

TOKENIZER = byte_tokenizer()
SCOPE = "corpus:manuals"
# A random model says bytes that are no text: it may say printable ones only.
PRINTABLE = {id for char in range(32, 127) for id in TOKENIZER.encode(chr(char), add_special_tokens=False)}
BIAS = {id: -1e4 for id in range(len(TOKENIZER)) if id not in PRINTABLE}
OPTIONS = DecodingOptions(max_new_tokens=60, logit_bias=BIAS, drafters=("retrieval",), max_draft_tokens=15)
PROMPT = "What do the manuals say?"
TEXTS = {"a": "The ouroboros eats its tail.\n\nForever.", "b": "The phoenix rises.", "c": "Nobody has seen either."}


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=needs_postgres)])
def open_one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Ouroboros]]:
    """Opens an `Ouroboros`; all of a test have one store, in memory one that only the first has."""
    urls = {"memory": None, "sqlite": f"sqlite:///{tmp_path}/phrases.db", "postgres": POSTGRES}
    opened: list[Ouroboros] = []

    def open_one() -> Ouroboros:
        if request.param == "memory" and opened:
            return opened[0]
        opened.append(Ouroboros(tiny_model(), TOKENIZER, store=urls[request.param]))
        return opened[-1]

    yield open_one
    for ouroboros in opened:
        if isinstance(ouroboros.store, PhraseStore) and ouroboros is opened[-1]:
            for found in ouroboros.store.list():
                ouroboros.store.delete(found.scope)
        ouroboros.close()


@pytest.fixture
def ouroboros(open_one: Callable[[], Ouroboros]) -> Ouroboros:
    return open_one()


def ask(ouroboros: Ouroboros, scope: str = "conversation:1", **settings: Any) -> GenerationResult:
    return ouroboros.generate(PROMPT, scope=scope, options=OPTIONS, **settings)


def corpus(ouroboros: Ouroboros, scope: str = SCOPE) -> Corpus:
    return ouroboros._corpora._corpus(scope)


def forwards(result: GenerationResult) -> int:
    return result.statistics.target_forwards


def matches(ouroboros: Ouroboros, text: str) -> list[str]:
    pool = ouroboros._corpora.open(SCOPE)
    found = pool.match(TOKENIZER.encode(text, add_special_tokens=False))
    return [str(TOKENIZER.decode(list(phrase.token_ids))) for phrase in found if phrase.match_length >= 4]


# --- quoting ---


async def test_what_documents_say_is_drafted_for_every_conversation(ouroboros: Ouroboros) -> None:
    plain = ask(ouroboros)
    assert forwards(plain) == 60
    said = plain.text
    ouroboros.index_documents({"said": f"Page 1.\n\n{said}\n\nPage 2."}, scope=SCOPE)
    for scope in ("conversation:2", "conversation:3"):
        result = ask(ouroboros, scope, corpus_scopes=[SCOPE])
        assert result.token_ids == plain.token_ids and forwards(result) < 20
        assert result.statistics.accepted_by_source["retrieval"] > 30
    arguments: dict[str, Any] = {"options": OPTIONS, "scope": "conversation:4", "corpus_scopes": [SCOPE]}
    assert forwards(await ouroboros.agenerate(PROMPT, **arguments)) < 20
    assert forwards(ouroboros.batch([PROMPT], **arguments)[0]) < 20
    *_, last = [piece async for piece in ouroboros.astream(PROMPT, **arguments)]
    assert last.result is not None and forwards(last.result) < 20


def test_who_does_not_name_them_does_not_read_them(ouroboros: Ouroboros) -> None:
    said = ask(ouroboros).text
    ouroboros.index_documents([said], scope=SCOPE)
    assert forwards(ask(ouroboros, "conversation:2")) == 60
    assert forwards(ask(ouroboros, "conversation:2", corpus_scopes=["corpus:other"])) == 60


def test_answers_do_not_go_there(ouroboros: Ouroboros) -> None:
    ouroboros.index_documents(TEXTS, scope=SCOPE)
    before = ouroboros._corpora.open(SCOPE).stats
    ask(ouroboros, corpus_scopes=[SCOPE])
    assert ouroboros._corpora.open(SCOPE).stats == before
    if isinstance(ouroboros.store, PhraseStore):
        runs = list(ouroboros.store.export(SCOPE))
        assert sorted(str(TOKENIZER.decode(list(run.token_ids))) for run in runs) == sorted(TEXTS.values())
        assert not any(run.answer for run in runs)


def test_a_scope_holds_documents_or_answers(ouroboros: Ouroboros) -> None:
    ask(ouroboros)
    with pytest.raises(OptionError, match="'conversation:1' holds answers; documents need one"):
        ouroboros.index_documents(TEXTS, scope="conversation:1")
    ouroboros.index_documents(TEXTS, scope=SCOPE)
    for settings in (
        {"scope": SCOPE},
        {"scope": "conversation:5", "write_scopes": [SCOPE]},
        {"scope": "conversation:1", "write_scopes": [SCOPE]},
    ):
        with pytest.raises(OptionError, match=f"{SCOPE}' holds documents, which are only read"):
            ouroboros.generate(PROMPT, options=OPTIONS, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "drafter"), [("corpus_scopes", "retrieval"), ("read_scopes", "phrases")])
def test_documents_are_phrases_of_their_scope(ouroboros: Ouroboros, name: Any, drafter: str) -> None:
    options = replace(OPTIONS, drafters=(drafter,))
    cold = ouroboros.generate(PROMPT, scope="conversation:1", options=options)
    ouroboros.index_documents([cold.text], scope=SCOPE)
    result = ouroboros.generate(PROMPT, scope="conversation:2", options=options, **{name: [SCOPE]})
    assert result.token_ids == cold.token_ids and 2 * forwards(result) < forwards(cold)


def test_answers_written_beside_are_answers(ouroboros: Ouroboros) -> None:
    ask(ouroboros, write_scopes=["agent:planner"])
    with pytest.raises(OptionError, match="'agent:planner' holds answers"):
        ouroboros.index_documents(TEXTS, scope="agent:planner")


def test_answers_of_another_process_are_noticed(open_one: Callable[[], Ouroboros]) -> None:
    first = open_one()
    ask(first)
    first.flush()
    with pytest.raises(OptionError, match="holds answers"):
        open_one().index_documents(TEXTS, scope="conversation:1")


# --- indexing ---


def test_what_is_there_costs_no_tokens(open_one: Callable[[], Ouroboros], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    indexed = open_one().index_documents(TEXTS, scope=SCOPE, advance=steps.append)
    lengths = [len(TOKENIZER.encode(text, add_special_tokens=False)) for text in TEXTS.values()]
    assert (indexed.ids, indexed.added, indexed.unchanged) == (("a", "b", "c"), 3, 0)
    assert indexed.tokens == sum(lengths) and steps == [1, 1, 1]
    monkeypatch.setattr("ouroboros_llm.phrase_pool.corpus.runs_of", lambda *_: pytest.fail("it is there"))
    again = open_one().index_documents(TEXTS, scope=SCOPE)
    assert (again.added, again.unchanged, again.tokens) == (0, 3, 0)
    renamed = {f"new {id}": text for id, text in TEXTS.items()}
    assert open_one().index_documents(renamed, scope=SCOPE).unchanged == 3
    assert set(corpus(open_one()).entries()) == {*TEXTS, *renamed}


@pytest.mark.parametrize("before", [{}, {"b": "Something else."}])
def test_the_same_text_under_two_ids_is_two_documents(
    open_one: Callable[[], Ouroboros], before: dict[str, str]
) -> None:
    open_one().index_documents({"a": TEXTS["a"], **before}, scope=SCOPE)
    ouroboros = open_one()
    assert ouroboros.index_documents({"b": TEXTS["a"]}, scope=SCOPE).unchanged == 1
    assert set(corpus(open_one()).entries()) == {"a", "b"}
    assert ouroboros._corpora.open(SCOPE).stats.runs == 1, "what it said before is gone"
    assert ouroboros.remove_documents(["a"], scope=SCOPE) == 1
    assert matches(open_one(), "The ouroboros ") == ["eats its tail.\n\nForever."]
    assert ouroboros.index_documents({"b": TEXTS["b"]}, scope=SCOPE).added == 1
    assert matches(open_one(), "The ouroboros ") == []


def test_a_document_that_says_something_else_replaces_what_it_said(open_one: Callable[[], Ouroboros]) -> None:
    open_one().index_documents(TEXTS, scope=SCOPE)
    indexed = open_one().index_documents({"b": "The phoenix burns again."}, scope=SCOPE)
    assert (indexed.added, indexed.unchanged) == (1, 0)
    for ouroboros in (open_one(), open_one()):
        assert set(corpus(ouroboros).entries()) == set(TEXTS)
        assert matches(ouroboros, "The phoenix ") == ["burns again."]
        assert matches(ouroboros, "The ouroboros ") == ["eats its tail.\n\nForever."]


def test_documents_that_are_removed_are_gone(open_one: Callable[[], Ouroboros], tmp_path: Path) -> None:
    ouroboros = open_one()
    ouroboros.index_documents({**TEXTS, "b too": TEXTS["b"]}, scope=SCOPE)
    assert ouroboros.remove_documents(["a", "b", "unknown"], scope=SCOPE) == 2
    for one in (ouroboros, open_one()):
        assert set(corpus(one).entries()) == {"c", "b too"}
        assert matches(one, "The ouroboros ") == []
        assert matches(one, "The phoenix ") == ["rises."], "another document says so too"
    if isinstance(ouroboros.store, PhraseStore):
        ouroboros.close()
        erased, kept = (encode(TOKENIZER.encode(TEXTS[id], add_special_tokens=False)) for id in "ab")
        data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        if data:
            assert erased not in data and kept in data


def other_tokenizer(store: Any) -> Ouroboros:
    tokenizer, model = copy.deepcopy(TOKENIZER), own_model()
    tokenizer.add_tokens(["<another>"])
    model.resize_token_embeddings(len(tokenizer))
    return Ouroboros(model, tokenizer, store=store)


@pytest.mark.parametrize("ephemeral", [True, False])
def test_documents_are_removed_for_every_tokenizer(ouroboros: Ouroboros, ephemeral: bool) -> None:
    if ephemeral and isinstance(ouroboros.store, PhraseStore):
        ouroboros.store.open(SCOPE, fingerprint="any", ephemeral=True)
    other = other_tokenizer(ouroboros.store)
    assert other.fingerprint != ouroboros.fingerprint
    ouroboros.index_documents(TEXTS, scope=SCOPE)
    assert other.index_documents({"b": TEXTS["b"], "d": "Another."}, scope=SCOPE).added == 2
    assert other.remove_documents(["a", "b"], scope=SCOPE) == 2
    assert set(corpus(ouroboros).entries()) == {"c"} and set(corpus(other).entries()) == {"d"}
    assert [matches(ouroboros, start) for start in ("The ouroboros ", "The phoenix ", "Nobody ")] == [
        [],
        [],
        ["has seen either."],
    ]
    assert ouroboros.remove_documents(["d"], scope=SCOPE) == 1 and corpus(other).entries() == {}


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Ouroboros, Ouroboros]]:
    """As in two processes; the first has opened the corpus while it was empty."""
    url = f"sqlite:///{tmp_path}/phrases.db"
    with (
        Ouroboros(tiny_model(), TOKENIZER, store=url) as first,
        Ouroboros(tiny_model(), TOKENIZER, store=url) as second,
    ):
        assert matches(first, "The phoenix ") == []
        yield first, second


def test_what_other_processes_indexed_is_there(two: tuple[Ouroboros, Ouroboros]) -> None:
    first, second = two
    second.index_documents({"b": TEXTS["b"]}, scope=SCOPE)
    assert first.index_documents(TEXTS, scope=SCOPE).unchanged == 1, "documents are no answers"
    second.index_documents({"b": "The phoenix burns again."}, scope=SCOPE)
    assert first.remove_documents(["b"], scope=SCOPE) == 1
    assert matches(first, "The phoenix ") == matches(second, "The phoenix ") == []


def test_a_corpus_of_another_process_takes_no_answers(two: tuple[Ouroboros, Ouroboros]) -> None:
    first, second = two
    second.index_documents(TEXTS, scope=SCOPE)
    with pytest.raises(OptionError, match="holds documents, which are only read"):
        ask(first, SCOPE)


class Interrupted(BaseException):
    """As whoever waits for the end gives up."""


def interrupt(_: int) -> None:
    raise Interrupted


@pytest.fixture
def replacing(open_one: Callable[[], Ouroboros], monkeypatch: pytest.MonkeyPatch) -> Ouroboros:
    """In the middle of replacing a document of a corpus; the rest is seen by another process."""
    monkeypatch.setattr("ouroboros_llm.phrase_pool.corpus._FLUSHED", 1)
    ouroboros = open_one()
    ouroboros.index_documents({"b": "The phoenix has a secret."}, scope=SCOPE)
    with pytest.raises(Interrupted):
        ouroboros.index_documents({"b": TEXTS["b"], "c": TEXTS["c"]}, scope=SCOPE, advance=interrupt)
    assert set(matches(ouroboros, "The phoenix ")) == {"has a secret.", "rises."}
    return open_one()


def test_a_replacement_that_was_interrupted_is_finished_by_the_next_call(replacing: Ouroboros) -> None:
    replacing.index_documents({"a": TEXTS["a"]}, scope=SCOPE)
    assert matches(replacing, "The phoenix ") == ["rises."]
    assert set(corpus(replacing).entries()) == {"a", "b"}


def test_a_document_can_be_removed_whose_replacement_was_interrupted(replacing: Ouroboros) -> None:
    assert replacing.remove_documents(["b"], scope=SCOPE) == 1
    assert matches(replacing, "The phoenix ") == []
    assert replacing._corpora.open(SCOPE).stats.runs == 0
    assert replacing.index_documents(TEXTS, scope=SCOPE).added == 3, "it is a corpus all the same"


def test_a_replacement_that_was_interrupted_can_be_taken_back(replacing: Ouroboros) -> None:
    assert replacing.index_documents({"b": "The phoenix has a secret."}, scope=SCOPE).added == 1
    assert matches(replacing, "The phoenix ") == ["has a secret."]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'{"id": 1}'])
def test_a_corpus_is_one_whatever_became_of_its_notes(ouroboros: Ouroboros, damage: bytes) -> None:
    ouroboros.index_documents({"b": TEXTS["b"]}, scope=SCOPE)
    found = corpus(ouroboros)
    found._pool.remember({found.entries()["b"].name: damage})
    assert ouroboros.index_documents({"b": TEXTS["b"]}, scope=SCOPE).added == 1
    assert ouroboros.remove_documents(["b"], scope=SCOPE) == 1
    assert matches(ouroboros, "The phoenix ") == []


def test_a_text_without_an_id_has_that_of_what_it_says(ouroboros: Ouroboros) -> None:
    indexed = ouroboros.index_documents([*TEXTS.values(), TEXTS["a"]], scope=SCOPE)
    assert len(set(indexed.ids)) == 3 == indexed.added
    assert ouroboros.index_documents(iter(TEXTS.values()), scope=SCOPE).unchanged == 3
    assert ouroboros.remove_documents(indexed.ids[:1], scope=SCOPE) == 1
    assert matches(ouroboros, "The ouroboros ") == []


def test_the_parts_of_a_document_are_told_apart(ouroboros: Ouroboros) -> None:
    ouroboros.index_documents({"x": ["ab", "c"]}, scope=SCOPE)
    assert ouroboros.index_documents({"x": ["a", "bc"]}, scope=SCOPE).added == 1
    assert ouroboros.index_documents({"x": []}, scope=SCOPE).added == 1
    assert ouroboros.index_documents({"y": ""}, scope=SCOPE).added == 1
    assert set(corpus(ouroboros).entries()) == {"x", "y"}


def test_halves_of_characters_are_replaced(ouroboros: Ouroboros) -> None:
    texts = {"a\ud800": "A lone \udc00half; a pair \ud83d\ude00 of them."}
    assert ouroboros.index_documents(texts, scope=SCOPE).added == 1
    assert matches(ouroboros, "A lone ") == ["\ufffdhalf; a pair \U0001f600 of them."]
    assert ouroboros.index_documents(texts, scope=SCOPE).unchanged == 1
    assert ouroboros.remove_documents(texts, scope=SCOPE) == 1


def test_what_was_pruned_is_indexed_again(tmp_path: Path) -> None:
    store = PhraseStore(f"sqlite:///{tmp_path}/phrases.db")
    with store, Ouroboros(tiny_model(), TOKENIZER, store=store) as ouroboros:
        ouroboros.index_documents(TEXTS, scope=SCOPE)
        store.prune(SCOPE, max_runs=1)
        assert ouroboros.index_documents(TEXTS, scope=SCOPE).added == 2
        store.delete(SCOPE)
        assert matches(ouroboros, "The phoenix ") == []
        assert ouroboros.index_documents(TEXTS, scope=SCOPE).added == 3


def test_the_notes_of_documents_are_not_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them a document could be neither found nor removed."""
    monkeypatch.setattr("ouroboros_storage.upkeep._KEPT_NOTES", 5)
    monkeypatch.setattr("ouroboros_storage.upkeep._NOTES_COUNTED", 1)
    url, texts = f"sqlite:///{tmp_path}/phrases.db", {str(number): f"Document {number}." for number in range(20)}
    with Ouroboros(tiny_model(), TOKENIZER, store=url) as ouroboros:
        ouroboros.index_documents(texts, scope=SCOPE)
        corpus(ouroboros)._pool.remember({f"successors/{number}": b"x" for number in range(20)})
    with Ouroboros(tiny_model(), TOKENIZER, store=url) as ouroboros:
        assert set(corpus(ouroboros).entries()) == set(texts)
        assert len(corpus(ouroboros)._pool.recall("successors/")) == 5, "others are"
        assert ouroboros.remove_documents(texts, scope=SCOPE) == 20
        assert ouroboros._corpora.open(SCOPE).stats.runs == 0


def test_a_corpus_that_is_too_large_says_so(tmp_path: Path) -> None:
    store = PhraseStore(f"sqlite:///{tmp_path}/phrases.db", capacity=2000)
    with store, Ouroboros(tiny_model(), TOKENIZER, store=store) as ouroboros:
        texts = [f"Text {number}: {'x' * 80} and its end {number}." for number in range(100)]
        with pytest.warns(RuntimeWarning, match="no room for .* of its documents"):
            ouroboros.index_documents(texts, scope=SCOPE)


def test_a_scope_in_memory_only(tmp_path: Path) -> None:
    store = PhraseStore(f"sqlite:///{tmp_path}/phrases.db", ephemeral=[SCOPE])
    with store, Ouroboros(tiny_model(), TOKENIZER, store=store) as ouroboros:
        ouroboros.index_documents(TEXTS, scope=SCOPE)
        assert ouroboros.remove_documents(["a"], scope=SCOPE) == 1
        assert matches(ouroboros, "The ouroboros ") == [] and matches(ouroboros, "The phoenix ") == ["rises."]
        assert store.list() == []


def test_a_damaged_note_is_a_document_that_is_indexed_again(ouroboros: Ouroboros) -> None:
    ouroboros.index_documents(TEXTS, scope=SCOPE)
    found = corpus(ouroboros)
    found._pool.remember({found.entries()["a"].name: b"{"})
    assert ouroboros.index_documents(TEXTS, scope=SCOPE).added == 1


def test_corpora_outlive_conversations_in_memory() -> None:
    with Ouroboros(tiny_model(), TOKENIZER) as ouroboros:
        ouroboros.index_documents(TEXTS, scope=SCOPE)
        for number in range(70):
            ouroboros.store.open(f"conversation:{number}", fingerprint=ouroboros.fingerprint)
        assert matches(ouroboros, "The phoenix ") == ["rises."]


def test_no_corpus_in_memory_pushes_out_another() -> None:
    with Ouroboros(tiny_model(), TOKENIZER) as ouroboros:
        for number in range(70):
            ouroboros.index_documents(TEXTS, scope=f"corpus:{number}")
        assert all(set(corpus(ouroboros, f"corpus:{number}").entries()) == set(TEXTS) for number in range(70))


def test_a_corpus_in_memory_has_room() -> None:
    texts = [f"Text {number}: {'x' * 4000} and its end." for number in range(60)]
    with Ouroboros(tiny_model(), TOKENIZER) as ouroboros, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ouroboros.index_documents(texts, scope=SCOPE).tokens > 200_000


@pytest.mark.parametrize(
    ("documents", "message"),
    [("text", r"write \[text\]"), ([b"x"], "documents must be texts"), ({1: "x"}, "documents must be texts")],
)
def test_documents_must_be_texts(ouroboros: Ouroboros, documents: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ouroboros.index_documents(documents, scope=SCOPE)
    with pytest.raises(OptionError, match="ids must be several"):
        ouroboros.remove_documents("a", scope=SCOPE)
    with pytest.raises(OptionError, match="scope must be 1 to 255"):
        ouroboros.index_documents(TEXTS, scope="")


def test_a_store_that_cannot_let_go_holds_no_documents() -> None:
    class Bare:
        def open(self, scope: str, *, fingerprint: str) -> MemoryPool:
            return MemoryPool()

        def flush(self) -> None: ...

        def close(self) -> None: ...

    source: PoolSource = Bare()
    with Ouroboros(tiny_model(), TOKENIZER, store=source) as ouroboros:
        with pytest.raises(StoreError, match="documents need a store that keeps notes and lets go of runs, but Bare"):
            ouroboros.index_documents(TEXTS, scope=SCOPE)


# --- pools ---


def test_runs_have_one_key_wherever_they_are() -> None:
    token_ids = [0, 1, 255, 70_000, (1 << 32) - 1]
    assert run_key(token_ids) == content_hash(encode(token_ids))


def test_runs_taken_out_of_a_pool_leave_the_others_as_they_were() -> None:
    runs = [[10 * number + digit for digit in range(9)] for number in range(1000)]
    pool = MemoryPool()
    for run in runs:
        pool.add(run, answer=run[0] % 20 == 0)
    pool.remember({"a": b"1", "b": b"2"})
    gone = runs[::3]
    assert pool.take_out([run_key(run) for run in [*gone, [1, 2, 3]]], ["a"]) == len(gone)
    expected = MemoryPool()
    for run in runs:
        if run not in gone:
            expected.add(run, answer=run[0] % 20 == 0)
    assert pool.stats == expected.stats and pool.recall("") == {"b": b"2"}
    for run in runs:
        assert pool.match(run[:4]) == expected.match(run[:4])
        assert pool.match([-1]) == expected.match([-1])
