"""SmolLM2-135M-Instruct, float32: real prompts, real text, and phrases that survive a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import plain

from ouroboros_llm import DecodingOptions, Ouroboros

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]  # many forwards, perhaps on a busy machine

MODEL = "smollm2-135m-instruct"
TOKENS = 32
PROMPTS: list[str | list[dict[str, str]]] = [
    "Once upon a time",
    "def fibonacci(n):\n",
    "The capital of France is",
    "1, 2, 3, 4, 5, 6,",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,\n\n",
    "Zutaten für einen Apfelkuchen:\n-",
    "import numpy as np\nimport",
    "to be, or not to be, to be, or not to be, to be,",
    "😀 😃 😄",
    *(
        [{"role": "user", "content": question}]
        for question in (
            "Name three primary colors.",
            "Write a haiku about the sea.",
            "What is 17 + 25? Think step by step.",
            "Translate to French: Good morning, my friend.",
            'Answer in JSON: {"city": ..., "country": ...} for Rome.',
            "Write a Python function that reverses a string.",
            "List the days of the week, one per line.",
            "Explain photosynthesis in two sentences.",
            "Repeat this sentence three times: The quick brown fox jumps over the lazy dog.",
        )
    ),
    [
        {"role": "system", "content": "You answer with one word."},
        {"role": "user", "content": "Is the sky blue?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And grass?"},
    ],
]


@pytest.fixture(scope="module")
def ouroboros() -> Iterator[Ouroboros]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with Ouroboros.from_pretrained(MODEL, dtype="float32", device="cpu") as ouroboros:
        yield ouroboros
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_twenty_prompts_cold_and_warm(ouroboros: Ouroboros) -> None:
    """Cold, then repeated after everything else was said: always the model's own tokens."""
    assert len(PROMPTS) == 20
    wanted = [plain(ouroboros.model, ouroboros.encode(prompt), TOKENS) for prompt in PROMPTS]
    forwards = {"cold": 0, "repeated": 0}
    for round in forwards:
        for prompt, tokens in zip(PROMPTS, wanted, strict=True):
            result = ouroboros.generate(prompt, scope="agent:a", options=DecodingOptions(max_new_tokens=TOKENS))
            assert list(result.token_ids) == tokens, (round, prompt)
            assert result.text == ouroboros.tokenizer.decode(tokens, skip_special_tokens=True)
            forwards[round] += result.statistics.target_forwards
    assert forwards["repeated"] < forwards["cold"] / 2


def test_passes_of_fixed_shape_say_the_same(ouroboros: Ouroboros) -> None:
    with Ouroboros(ouroboros.model, ouroboros.tokenizer, target="static") as static:
        assert static._prepared.way.static is not None
        for prompt in PROMPTS[1::7]:
            wanted = plain(ouroboros.model, ouroboros.encode(prompt), TOKENS)
            for _ in range(2):
                result = static.generate(prompt, options=DecodingOptions(max_new_tokens=TOKENS))
                assert list(result.token_ids) == wanted, prompt


def test_messages_get_the_template_and_end_at_its_token(ouroboros: Ouroboros) -> None:
    messages = [{"role": "user", "content": "Say hi."}]
    prompt_ids = ouroboros.encode(messages)
    text = ouroboros.tokenizer.decode(prompt_ids)
    assert text.count("<|im_start|>assistant\n") == 1 and text.endswith("<|im_start|>assistant\n")
    result = ouroboros.generate(messages, options=DecodingOptions(max_new_tokens=200))
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] == 2 and "<|im_end|>" not in result.text


def test_long_conversations_reuse_what_was_read(ouroboros: Ouroboros) -> None:
    messages = [{"role": "user", "content": "Name a fruit."}]
    options = DecodingOptions(max_new_tokens=24)
    for turn in range(3):
        prompt_ids = ouroboros.encode(messages)
        result = ouroboros.generate(messages, scope="conversation:long", options=options)
        assert list(result.token_ids) == plain(ouroboros.model, prompt_ids, 24)
        assert (result.usage.cached_tokens > len(prompt_ids) / 2) == (turn > 0)
        messages += [{"role": "assistant", "content": result.text}, {"role": "user", "content": "Another one."}]


SCRIPT = """
import sys
from ouroboros_llm import DecodingOptions, Ouroboros
with Ouroboros.from_pretrained("smollm2-135m-instruct", dtype="float32", device="cpu", store=sys.argv[1]) as ouroboros:
    result = ouroboros.generate(
        [{"role": "user", "content": "Write a Python function that adds two numbers, with a docstring."}],
        scope=sys.argv[2], options=DecodingOptions(max_new_tokens=60))
print(result.statistics.target_forwards, *result.token_ids)
"""


def test_phrases_of_one_process_speed_up_the_next(tmp_path: Path) -> None:
    def run(scope: str) -> list[int]:
        command = [sys.executable, "-c", SCRIPT, f"sqlite:///{tmp_path / 'phrases.db'}", scope]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [int(word) for word in output.split()]

    cold, warm, stranger = run("agent:a"), run("agent:a"), run("agent:b")
    assert cold[1:] == warm[1:] == stranger[1:]
    assert warm[0] < cold[0] / 2
    # Another scope starts as cold as the first. Widths follow measured times, so its count may differ a little.
    assert stranger[0] > warm[0] * 1.5
