"""Sampling and processors through the one accept rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, plain, tiny_model

from ouroboros_llm import DecodingOptions, OptionError, Ouroboros
from ouroboros_llm.decoding.decoder import Decoder
from ouroboros_llm.decoding.draft_tree import DraftTree, TreeBuilder
from ouroboros_llm.decoding.drafter import Budget, Round
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.target_model.scripted import ScriptedTarget

PROMPT = "abab abab abab"
TOKENS = 40


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.8),
        dict(temperature=1.3, top_k=7),
        dict(temperature=1.0, top_p=0.8),
        dict(temperature=1.5, min_p=0.1),
        dict(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_the_library_s_own_sample(options: dict[str, Any], seed: int) -> None:
    """Token for token what `model.generate` samples, warm and cold: each emitted token takes one draw."""
    model = tiny_model("qwen3")
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        prompt_ids = ouroboros.encode(PROMPT)
        torch.manual_seed(seed)
        wanted = plain(model, prompt_ids, TOKENS, do_sample=True, **{"top_k": 0, **options})
        for _ in range(3):
            # Of a fixed width, so that measured pass times have no say.
            asked = DecodingOptions(max_new_tokens=TOKENS, seed=seed, max_draft_tokens=12, **options)
            result = ouroboros.generate(PROMPT, options=asked)
            assert list(result.token_ids) == wanted
    assert result.statistics.accepted_tokens > 0  # the last calls were warm


@pytest.mark.parametrize(
    "config",
    [
        dict(repetition_penalty=1.3),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=20),
        dict(suppress_tokens=[40, 41, 42]),
        dict(bad_words_ids=[[100], [101, 102]]),
        dict(forced_eos_token_id=2),
    ],
)
def test_the_model_s_own_configuration_is_followed(config: dict[str, Any]) -> None:
    model = copy.copy(tiny_model())
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(**config)
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        wanted = plain(model, ouroboros.encode(PROMPT), TOKENS)
        for _ in range(2):
            result = ouroboros.generate(PROMPT, options=DecodingOptions(max_new_tokens=TOKENS))
            assert list(result.token_ids) == wanted


def test_temperature_unset_is_greedy_whatever_the_model_s_configuration() -> None:
    model = copy.copy(tiny_model())
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.5)
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        wanted = plain(tiny_model(), ouroboros.encode(PROMPT), TOKENS)
        for options in (DecodingOptions(max_new_tokens=TOKENS), DecodingOptions(max_new_tokens=TOKENS, temperature=0)):
            assert list(ouroboros.generate(PROMPT, options=options).token_ids) == wanted


def test_penalties_on_the_output_only() -> None:
    """Against a loop that applies the OpenAI formula to every step."""
    model, options = (
        tiny_model("qwen3"),
        DecodingOptions(
            max_new_tokens=TOKENS,
            presence_penalty=2.0,
            frequency_penalty=1.5,
            logit_bias={50: 3.0, 51: -100.0, 10**6: 5.0},
        ),
    )
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        text, wanted = ouroboros.encode(PROMPT), list[int]()
        for _ in range(TOKENS):
            with torch.no_grad():
                scores = model(torch.tensor([[*text, *wanted]])).logits[0, -1]
            scores[50] += 3.0
            scores[51] -= 100.0
            for token_id in set(wanted):
                scores[token_id] -= 2.0 + 1.5 * wanted.count(token_id)
            wanted.append(int(scores.argmax()))
            if wanted[-1] == 2:
                break
        for _ in range(2):
            assert list(ouroboros.generate(PROMPT, options=options).token_ids) == wanted
    assert 51 not in wanted


class Forced:
    """Drafts a full tree over the vocabulary, always holding the truth, or always a chain of one wrong token."""

    def __init__(self, kind: str, vocabulary: int) -> None:
        self._kind, self._vocabulary = kind, vocabulary

    def open(self, context: Any) -> None:
        pass

    def draft(self, context: Any, budget: Budget) -> DraftTree:
        builder = TreeBuilder(context[-1], budget.width)
        if self._kind == "full":
            for first in range(self._vocabulary):
                node = builder.add(0, first, 0.5, "forced")
                for second in range(self._vocabulary):
                    builder.add(node, second, 0.5, "forced")
        elif self._kind == "likeliest":
            builder.add(builder.add(0, 0, 0.9, "forced"), 0, 0.9, "forced")
        else:
            builder.add(0, self._vocabulary + 1, 0.9, "forced")
        return builder.build()

    def learn(self, round: Round) -> None:
        pass


@pytest.mark.parametrize("kind", ["full", "likeliest", "impossible"])
def test_samples_have_the_target_s_distribution(kind: str) -> None:
    """A chi-square test over all outputs of three tokens; chance of failing a right decoder: one in a million."""
    vocabulary, samples = 5, 4000
    tables = torch.randn(vocabulary + 1, vocabulary, generator=torch.Generator().manual_seed(1)) * 1.2

    def logits_after(text: tuple[int, ...]) -> torch.Tensor:
        # Depends on the last two tokens; ids outside the vocabulary only come from impossible guesses.
        return tables[min(text[-1], vocabulary)] + 0.5 * tables[min(text[-2], vocabulary)].roll(1)

    probabilities = {}
    for a in range(vocabulary):
        for b in range(vocabulary):
            for c in range(vocabulary):
                texts = [((0, 0), a), ((0, 0, a), b), ((0, 0, a, b), c)]
                chances = [logits_after(text).softmax(-1)[token].item() for text, token in texts]
                probabilities[a, b, c] = chances[0] * chances[1] * chances[2]
    sampler = Sampler(sample=True, generator=torch.Generator().manual_seed(2))
    counts = dict.fromkeys(probabilities, 0)
    for _ in range(samples):
        decoder = Decoder(ScriptedTarget(logits_after), Forced(kind, vocabulary), width=64)
        rounds = decoder.rounds([0, 0], sampler, limit=3)
        counts[tuple(token_id for round in rounds for token_id in round.token_ids)] += 1
    statistic = sum((counts[key] - samples * p) ** 2 / (samples * p) for key, p in probabilities.items())
    degrees = len(probabilities) - 1
    # Wilson-Hilferty: the 1 - 1e-6 quantile of chi-square with so many degrees of freedom.
    critical = degrees * (1 - 2 / (9 * degrees) + 4.753 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert statistic < critical


def test_exact_sampling_runs_without_drafts(tiny_ouroboros: Ouroboros) -> None:
    options = DecodingOptions(max_new_tokens=20, temperature=0.1, seed=3, exact=True)
    for _ in range(2):
        result = tiny_ouroboros.generate(PROMPT, options=options)
        assert result.statistics.drafted_tokens == 0
    free = tiny_ouroboros.generate(PROMPT, options=DecodingOptions(max_new_tokens=20, temperature=0.1, seed=3))
    assert free.token_ids == result.token_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(max_new_tokens=0), ("max_new_tokens", "at least 1", "0")),
        (dict(max_new_tokens=2.5), ("max_new_tokens", "whole number")),
        (dict(temperature=-1), ("temperature", "-1")),
        (dict(temperature=float("nan")), ("temperature", "nan")),
        (dict(temperature="hot"), ("temperature", "hot")),
        (dict(temperature=1.0, top_p=0), ("top_p", "(0, 1]", "0")),
        (dict(temperature=1.0, top_p=1.1), ("top_p", "1.1")),
        (dict(temperature=1.0, top_k=0), ("top_k", "at least 1")),
        (dict(temperature=1.0, min_p=2), ("min_p", "2")),
        (dict(repetition_penalty=0), ("repetition_penalty", "0")),
        (dict(presence_penalty=float("inf")), ("presence_penalty", "inf")),
        (dict(logit_bias={-1: 2.0}), ("logit_bias", "-1")),
        (dict(logit_bias={"a": 2.0}), ("logit_bias", "'a'")),
        (dict(stop=("",)), ("stop", "non-empty")),
        (dict(stop=(3,)), ("stop", "3")),
        (dict(seed=-3), ("seed", "-3")),
        (dict(seed=2**70), ("seed", "at most")),
        (dict(stop=5), ("stop", "5")),
        (dict(logit_bias=[1]), ("logit_bias", "[1]")),
        (dict(exact="no"), ("exact", "'no'")),
        (dict(max_draft_tokens=-1), ("max_draft_tokens", "-1")),
        (dict(top_p=0.9), ("top_p", "temperature")),
    ],
)
def test_options_say_what_is_wrong(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as error:
        DecodingOptions(**options)
    assert all(word in str(error.value) for word in words)


def test_unknown_options_fail() -> None:
    with pytest.raises(TypeError, match="temprature"):
        DecodingOptions(temprature=1.0)  # type: ignore[call-arg]
