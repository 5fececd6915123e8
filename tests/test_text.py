from __future__ import annotations

from collections.abc import Sequence

import pytest
from conftest import byte_tokenizer, plain, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ouroboros_llm import DecodingOptions, Ouroboros, PromptError
from ouroboros_llm.chat.text import Detokenizer, StopStrings, Transcript, encode, vocabulary_hash

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <s> there"}]


def test_text_is_taken_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(tokenizer, "héllo") == tokenizer("héllo")["input_ids"]


def test_messages_go_through_the_template_once(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = encode(tokenizer, MESSAGES)
    text = tokenizer.decode(token_ids)
    assert token_ids[0] == tokenizer.bos_token_id and token_ids[1] != tokenizer.bos_token_id
    assert text.startswith("<s><|system|>Be brief.</s><|user|>Hi")
    assert text.endswith("<|assistant|>")


def test_token_ids_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(tokenizer, [5, 6, 7]) == [5, 6, 7]
    assert encode(tokenizer, (5, 6)) == [5, 6]


@pytest.mark.parametrize(
    "prompt", ["", [], (), None, 5, b"ab", [5, "x"], [-1], [1.5], [MESSAGES[0], 5], {"role": "user"}]
)
def test_what_is_no_prompt_is_refused(tokenizer: PreTrainedTokenizerFast, prompt: object) -> None:
    with pytest.raises(PromptError, match="prompt"):
        encode(tokenizer, prompt)  # type: ignore[arg-type]


def test_messages_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(PromptError, match="chat template"):
            encode(tokenizer, MESSAGES)
    finally:
        tokenizer.chat_template = template


def test_templates_that_refuse_say_why(tokenizer: PreTrainedTokenizerFast) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(PromptError, match="roles must alternate"):
            encode(tokenizer, MESSAGES)
    finally:
        tokenizer.chat_template = template


@given(st.text(max_size=60))
def test_pieces_are_the_text(text: str) -> None:
    """One token per byte: every character beyond ASCII is split between tokens."""
    tokenizer = byte_tokenizer()
    token_ids = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_come_out_in_the_end(content: bytes) -> None:
    tokenizer = byte_tokenizer()
    alphabet = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert len(alphabet) == 263
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(7 + byte) for byte in content) + detokenizer.flush()
    assert len(text) > 0 or not content


def test_characters_are_never_split(tokenizer: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer("a😀é")["input_ids"]]
    assert pieces == ["a", "", "", "", "😀", "", "é"]


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_are_found_however_the_text_comes(text: str, stop: list[str], data: st.DataObject) -> None:
    """Against cutting the whole text; several stops may overlap, and the one completed first ends the answer."""
    stops, shown, place = StopStrings(stop), "", 0
    while place < len(text) and not stops.found:
        shown += stops.push(text[place : place + 1])
        place += 1
    shown += stops.flush()
    ends = [(text.find(string) + len(string), text.find(string)) for string in stop if string in text]
    first_end = min((end for end, _ in ends), default=None)
    start = min((start for end, start in ends if end == first_end), default=len(text))
    assert shown == text[:start]
    assert stops.found == bool(ends)


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    stops = StopStrings(["</tool>"])
    assert [stops.push(part) for part in ("a<", "/to", "x</t", "ool>b")] == ["a", "", "</tox", ""]
    assert stops.found and stops.flush() == ""


def rounds_of(token_ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_stop_inside_a_block_of_tokens(tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    transcript = Transcript(tokenizer, ["lo w", "xyz"], {2})
    token_ids = tokenizer("héllo wörld")["input_ids"]
    text = ""
    for block in rounds_of(token_ids, size):
        piece, _ = transcript.push(block)
        text += piece
        if transcript.ended:
            break
    assert text + transcript.flush() == transcript.text == "hél"
    assert transcript.token_ids == token_ids[: len("héllo w".encode())]


def test_end_tokens_are_tokens_but_not_text(tokenizer: PreTrainedTokenizerFast) -> None:
    transcript = Transcript(tokenizer, [], {2})
    transcript.push([*tokenizer("hi")["input_ids"], 2, *tokenizer("more")["input_ids"]])
    assert (transcript.text + transcript.flush(), len(transcript.token_ids), transcript.ended) == ("hi", 3, True)


def test_streams_and_answers_agree_on_stop_strings() -> None:
    """Stops taken from the model's own output, at every place, found inside accepted runs too."""
    with Ouroboros(tiny_model("qwen3"), byte_tokenizer()) as ouroboros:
        free = ouroboros.generate("abcabc", options=DecodingOptions(max_new_tokens=40))
        tokens = list(free.token_ids)
        assert tokens == plain(ouroboros.model, ouroboros.encode("abcabc"), 40)
        for start in range(0, len(free.text) - 3, 3):
            stop = free.text[start : start + 3]
            options = DecodingOptions(max_new_tokens=40, stop=stop)
            pieces = list(ouroboros.stream("abcabc", options=options))
            result = pieces[-1].result
            assert result is not None and result.finish_reason == "stop"
            assert result.text == free.text[: free.text.find(stop)] == "".join(piece.text for piece in pieces)
            assert list(result.token_ids) == tokens[: len(result.token_ids)]
            assert [token_id for piece in pieces for token_id in piece.token_ids] == list(result.token_ids)


def test_fingerprints_tell_vocabularies_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    before = vocabulary_hash(tokenizer)
    assert before == vocabulary_hash(byte_tokenizer())
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert vocabulary_hash(other) == before
    other.add_tokens(["<new>"])
    assert vocabulary_hash(other) != before
