"""Pools of documents: what they find continues a document, and nothing else ever goes in."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import byte_tokenizer, plain, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ouroboros_llm import OptionError, StoreError
from ouroboros_llm.decoding.decoder import Decoder
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.drafting.phrases import PhraseSource
from ouroboros_llm.drafting.tree_drafter import TreeDrafter
from ouroboros_llm.phrase_pool.base import PhrasePool
from ouroboros_llm.phrase_pool.documents import documents_pool, paragraphs, read_documents
from ouroboros_llm.target_model.prepared import prepare

TEXTS = (
    "The wheel turns slowly.\n\nOil it twice a year, and never in winter.\n",
    "def oil(wheel):\n    return wheel\n",
)
lines = st.text(st.sampled_from("ab \t\n`-é"), max_size=60)


def pool_of(*texts: str, **options: int) -> PhrasePool:
    return documents_pool(texts, byte_tokenizer(), **options)


def ids(text: str) -> list[int]:
    return list(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])


def found(pool: PhrasePool, tail: str) -> list[str]:
    return [byte_tokenizer().decode(phrase.token_ids) for phrase in pool.match(ids(tail))]


def test_quotes_are_continued() -> None:
    pool = pool_of(*TEXTS)
    assert found(pool, "as the manual says: Oil it twice")[0] == " a year, and never in winter.\n"
    assert found(pool, "```python\ndef oil(")[0] == "wheel):\n    return wheel\n"
    assert found(pool, "turns slowly.")[0].startswith("\n\nOil it"), "paragraphs go on across their borders"
    assert found(pool, "\n\n§") == []


@given(lines)
def test_paragraphs_are_the_whole_text(text: str) -> None:
    found = paragraphs(text)
    assert "".join(found) == text
    assert all(found) and not any("\n\n" in paragraph.strip() for paragraph in found)


@given(st.lists(lines, max_size=4), st.integers(0, 200), st.integers(1, 40), lines)
def test_every_phrase_continues_a_document(texts: list[str], begin: int, length: int, other: str) -> None:
    pool = pool_of(*texts)
    documents = [ids(text) for text in texts]
    everything = [token_id for document in documents for token_id in document]
    for tail in (everything[begin : begin + length], ids(other)):
        for phrase in pool.match(tail):
            run = [*tail[-phrase.match_length :], *phrase.token_ids]
            assert any(
                document[start : start + len(run)] == run for document in documents for start in range(len(document))
            )


@given(st.lists(lines, max_size=4), st.data())
def test_what_stands_in_a_document_is_found(texts: list[str], data: st.DataObject) -> None:
    """Whatever two neighboring tokens of a paragraph are, the second is among what follows the first."""
    pool = pool_of(*texts)
    for text in texts:
        for paragraph in paragraphs(text):
            token_ids = ids(paragraph.strip())
            if len(token_ids) > 1:
                place = data.draw(st.integers(1, len(token_ids) - 1))
                phrases = pool.match(token_ids[:place])
                # A pool returns the 16 best.
                assert token_ids[place] in {phrase.token_ids[0] for phrase in phrases} or len(phrases) == 16


def test_equal_paragraphs_count_once() -> None:
    licence = "Permission is hereby granted to everybody.\n\n"
    pool = pool_of(*(f"Number {number} is a text.\n\n{licence}It ends with {number}.\n" for number in range(50)))
    alone = pool_of(licence)
    assert pool.stats.tokens < 50 * 45 + 2 * alone.stats.tokens
    (phrase,) = (phrase for phrase in pool.match(ids("Permission is")) if phrase.match_length > 10)
    assert phrase.count == 1
    assert found(pool, "Number 33")[0] == " is a text.\n\n", "what follows a paragraph left out is not sewn on"
    assert pool_of(licence, licence.strip(), f"  {licence}").stats == alone.stats


def test_long_texts_are_split_and_lose_nothing_within_paragraphs() -> None:
    prose = "\n\n".join(f"Whoever squares {number} gets {number * number}." for number in range(2000))
    pool = pool_of(prose)
    assert pool.stats.runs > 5 and pool.stats.tokens == len(ids(prose))
    for number in (0, 777, 1999):
        assert found(pool, f"Whoever squares {number} ")[0].startswith(f"gets {number * number}.")
    one_line = "".join(f"<{number}>" for number in range(5000))
    assert pool_of(one_line).stats.tokens == len(one_line)
    assert pool_of(one_line).stats.runs == -(-len(one_line) // 4096)


def test_what_does_not_fit_is_left_out_with_a_warning() -> None:
    texts = [f"Text {number}: {'x' * 80} and its end {number}." for number in range(100)]
    with pytest.warns(RuntimeWarning, match="more than 1000 tokens.*Raise capacity"):
        pool = pool_of(*texts, capacity=1000)
    assert 800 < pool.stats.tokens <= 1000
    assert found(pool, "Text 0")[0].startswith(": xx"), "the first ones stay"
    assert not any("99" in text for text in found(pool, "and its end"))


def test_documents_are_only_read() -> None:
    pool = pool_of(*TEXTS)
    assert isinstance(pool, PhrasePool)
    before = pool.stats
    with pytest.raises(StoreError, match="read-only; write to the pool of a scope"):
        pool.add([1, 2, 3])
    assert pool.stats == before


def test_no_special_tokens_are_added() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>")), bos_token="<s>"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("a b")["input_ids"] == [0, 1, 2]
    pool = documents_pool(["a b"], tokenizer)
    assert pool.stats.tokens == 2 and pool.match([0]) == [] and pool.match([1])[0].token_ids == (2,)


@pytest.mark.parametrize(("texts", "message"), [("one text", r"write \[text\]"), ([b"bytes"], "one is bytes")])
def test_texts_must_be_texts(texts: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        documents_pool(texts, byte_tokenizer())


def test_no_documents_are_an_empty_pool() -> None:
    assert pool_of().match(ids("a")) == [] and pool_of("", "\n\n").stats.tokens <= 2


def test_quoting_models_are_faster_and_say_the_same() -> None:
    prompt_ids = ids("the cat sat on")
    wanted = plain(tiny_model(), prompt_ids, 40)
    text = byte_tokenizer().decode(wanted)
    # A random model says bytes that are no text, so its words go in as they are.
    pool = pool_of(*TEXTS, text)
    pool._pool.add(wanted)
    decoder = Decoder(
        prepare(tiny_model()).start(), TreeDrafter([PhraseSource("retrieval", pool, after="prompt")]), width=32
    )
    rounds = list(decoder.rounds(prompt_ids, Sampler(), limit=40, end_token_ids={2}))
    assert [token_id for round in rounds for token_id in round.token_ids] == wanted
    assert {origin for round in rounds for origin in round.origins} >= {"retrieval"} and len(rounds) < 20


def test_folders_are_walked_in_order(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name, text in {
        "b/deep/z.md": "z",
        "a.txt": "a",
        "b/notes.PY": "notes",
        "photo.png": "no text",
        ".git/config.txt": "hidden",
        "b/.hidden.txt": "hidden",
    }.items():
        (tmp_path / name).write_text(text)
    assert list(read_documents([tmp_path])) == ["a", "z", "notes"]
    assert list(read_documents([tmp_path / "photo.png", tmp_path / "b"])) == ["no text", "z", "notes"]
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["a"]


def test_files_are_utf_8_without_its_mark(tmp_path: Path) -> None:
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nx")
    assert list(read_documents([tmp_path / "mark.txt"])) == ["café\nx"]
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(OptionError, match=r"latin\.txt' must be text in UTF-8"):
        list(read_documents([tmp_path]))
    with pytest.raises(OptionError, match=r"nowhere\.txt' cannot be read: No such file"):
        list(read_documents([tmp_path / "nowhere.txt"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="empty' has no text files"):
        list(read_documents([tmp_path / "empty"]))
