"""`model.generate(custom_generate=...)`: what works without us works the same with us."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, plain, tiny_model
from transformers import LogitsProcessor, TextIteratorStreamer
from transformers.generation import GenerateDecoderOnlyOutput

from ouroboros_llm import MemoryPool, OptionError, custom_generate

PROMPT = "abc abc abd abc abc abd abc"
TOKENS = 40


def inputs() -> dict[str, torch.Tensor]:
    return dict(byte_tokenizer()(PROMPT, return_tensors="pt"))


def ours(architecture: str = "qwen3", **options: Any) -> list[int]:
    settings = dict(inputs(), max_new_tokens=TOKENS, do_sample=False) | options
    output = tiny_model(architecture).generate(**settings, custom_generate=custom_generate)
    return output[0, inputs()["input_ids"].shape[1] :].tolist()


def theirs(architecture: str = "qwen3", **options: Any) -> list[int]:
    return plain(tiny_model(architecture), inputs()["input_ids"][0].tolist(), TOKENS, **options)


class Veto(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, input_ids[0, -1]] = -float("inf")
        return scores


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "bloom_chains", "lfm2_chains", "qwen3_next_plain"])
def test_same_tokens_cold_and_warm(architecture: str) -> None:
    pool = MemoryPool()
    for _ in range(2):
        assert ours(architecture, phrase_pool=pool) == theirs(architecture)
    assert pool.stats.runs >= 1


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.4),
        dict(logits_processor=[Veto()]),
        dict(min_new_tokens=30, eos_token_id=[40, 60, 80]),
        dict(eos_token_id=[100, 101, 120, 90]),
    ],
)
def test_processors_and_ends_are_honored(options: dict[str, Any]) -> None:
    pool = MemoryPool()
    for _ in range(2):
        assert ours(phrase_pool=pool, **options) == theirs(**options)


def test_sampling_takes_the_same_random_numbers() -> None:
    pool = MemoryPool()
    options = dict(do_sample=True, temperature=1.1, top_p=0.9)
    torch.manual_seed(4)
    wanted = theirs(**options)
    for _ in range(3):
        torch.manual_seed(4)
        assert ours(phrase_pool=pool, **options) == wanted


def test_stopping_criteria_are_asked_after_every_token() -> None:
    """A criterion in the middle of an accepted run must not be jumped over."""
    length = inputs()["input_ids"].shape[1]
    criterion = [lambda text, scores, **_: torch.tensor([text.shape[1] == length + 17])]
    pool = MemoryPool()
    for _ in range(2):
        assert ours(phrase_pool=pool, stopping_criteria=criterion) == theirs()[:17]


def test_streamers_get_everything_and_the_end() -> None:
    streamer = TextIteratorStreamer(byte_tokenizer(), skip_prompt=False, timeout=5)
    thread = threading.Thread(target=ours, kwargs=dict(ouroboros_streamer=streamer))
    thread.start()
    assert "".join(streamer) == byte_tokenizer().decode(theirs())
    thread.join()


def test_dictionaries_are_returned_on_demand() -> None:
    output = tiny_model("qwen3").generate(
        **inputs(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, custom_generate=custom_generate
    )
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert output.sequences[0, -5:].tolist() == theirs()[:5]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(num_beams=2), "num_beams=2"),
        (dict(num_return_sequences=2, do_sample=True), "num_return_sequences=2"),
        (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens"),
        (dict(assistant_model=tiny_model("qwen3", seed=1)), "assistant_model"),
        (dict(streamer=TextIteratorStreamer(byte_tokenizer())), "ouroboros_streamer"),
        (dict(return_dict_in_generate=True, output_scores=True), "output_scores"),
        (dict(input_ids=torch.tensor([[5, 6], [7, 8]]), attention_mask=torch.ones(2, 2)), "a batch of 2"),
        (dict(input_ids=torch.tensor([[0, 6]]), attention_mask=torch.tensor([[0, 1]])), "padding"),
    ],
)
def test_what_is_not_honored_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        ours(**options)


def test_typos_are_refused() -> None:
    with pytest.raises(ValueError, match="phrase_pol"):
        ours(phrase_pol=MemoryPool())
