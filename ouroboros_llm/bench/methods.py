"""The ways to answer a prompt that are measured: transformers' own and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from ..errors import OptionError
from ..models.loading import LoadedModel
from ..options import DecodingOptions
from ..ouroboros import Ouroboros

PLAIN = "plain"
METHODS = {
    PLAIN: "model.generate",
    "prompt_lookup": "the same with prompt_lookup_num_tokens=10",
    "assisted": "the same with assistant_model, where a draft model is given",
    "ouroboros": "ours, cold: a new scope for every prompt",
    "ouroboros_warm": "ours, one scope that keeps the phrases of the prompts before",
    "ouroboros_repeated": "ours, the same prompts a second time in the warm scope",
}
SECOND_PASS = ("ouroboros_repeated",)
LOOKUP_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as all methods get it."""

    number: int
    """Of the prompts asked; the same in every repeat."""
    name: str
    category: str | None
    turn: int
    repeat: int
    token_ids: tuple[int, ...]
    limit: int
    """Tokens to generate at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one method made of one prompt."""

    token_ids: tuple[int, ...]
    """The completion, end-of-sequence token included."""
    target_forwards: int
    first_tokens: int
    """Tokens that the first forward of the target gave."""
    prefill_seconds: float
    """From the call until those tokens were there."""
    seconds: float
    draft_forwards: int = 0
    cached_tokens: int = 0
    accepted_by_source: Mapping[str, int] = field(default_factory=dict)

    @property
    def decode_tokens(self) -> int:
        return len(self.token_ids) - self.first_tokens

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds


Method = Callable[[Question], Answer]


def choose_methods(names: str | None, *, draft: bool) -> tuple[str, ...]:
    """The methods that a comma-separated list names, in the order of `METHODS`; None: all that are possible.

    `plain` is always among them, because the others are compared with it, and so is the warm pass before a repeated
    one.

    Raises:
        OptionError: an unknown name, or `assisted` without a draft model.
    """
    if names is None:
        return tuple(name for name in METHODS if draft or name != "assisted")
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = sorted(wanted - {*METHODS})
    if unknown or not wanted:
        raise OptionError(f"methods must be some of {', '.join(METHODS)}, but got {', '.join(unknown) or 'none'}")
    if "assisted" in wanted and not draft:
        raise OptionError("method assisted needs a draft model; give one with --draft, or leave it out of --methods")
    wanted |= {PLAIN} | ({"ouroboros_warm"} if "ouroboros_repeated" in wanted else set())
    return tuple(name for name in METHODS if name in wanted)


def build_methods(names: tuple[str, ...], ouroboros: Ouroboros, draft: LoadedModel | None) -> dict[str, Method]:
    """What runs under each of the names, all of it over the same weights."""
    target = ouroboros.model
    every: dict[str, Method] = {
        PLAIN: Generate(target),
        "prompt_lookup": Generate(target, prompt_lookup_num_tokens=LOOKUP_TOKENS),
        "ouroboros": Stream(ouroboros, lambda question: f"bench:cold-{question.repeat}-{question.number}"),
        "ouroboros_warm": Stream(ouroboros, _warm_scope),
        "ouroboros_repeated": Stream(ouroboros, _warm_scope),
    }
    if draft is not None:
        every["assisted"] = Generate(target, draft.model, **_assistance(ouroboros, draft))
    return {name: every[name] for name in names}


def _warm_scope(question: Question) -> str:
    return f"bench:warm-{question.repeat}"


def _assistance(ouroboros: Ouroboros, draft: LoadedModel) -> dict[str, Any]:
    """The library wants both tokenizers where the embeddings differ in size, and refuses them where they do not."""
    options: dict[str, Any] = {"assistant_model": draft.model}
    sizes = [model.config.get_text_config().vocab_size for model in (ouroboros.model, draft.model)]
    if sizes[0] != sizes[1]:
        options |= {"tokenizer": ouroboros.tokenizer, "assistant_tokenizer": draft.tokenizer}
    return options


class Stream:
    """Ours, through the public stream."""

    def __init__(self, ouroboros: Ouroboros, scope: Callable[[Question], str]) -> None:
        self._ouroboros, self._scope = ouroboros, scope

    def __call__(self, question: Question) -> Answer:
        options = DecodingOptions(max_new_tokens=question.limit)
        began = perf_counter()
        pieces = self._ouroboros.stream(list(question.token_ids), scope=self._scope(question), options=options)
        first = next(pieces)
        prefill_seconds = perf_counter() - began
        *_, last = first, *pieces
        seconds = perf_counter() - began
        assert last.result is not None  # the last piece always carries it
        statistics = last.result.statistics
        return Answer(
            token_ids=last.result.token_ids,
            target_forwards=statistics.target_forwards,
            first_tokens=len(first.token_ids),
            prefill_seconds=prefill_seconds,
            seconds=seconds,
            draft_forwards=statistics.draft_forwards,
            cached_tokens=last.result.usage.cached_tokens,
            accepted_by_source=dict(statistics.accepted_by_source),
        )


class Generate:
    """transformers' own `generate`, greedy, with the options of a method."""

    def __init__(self, target: Any, draft: Any = None, **options: Any) -> None:
        self._target, self._draft, self._options = target, draft, options

    def __call__(self, question: Question) -> Answer:
        ids = torch.tensor([question.token_ids], device=self._target.device)
        options = greedy_options(self._target) | self._options | {"max_new_tokens": question.limit}
        with _counted(self._target) as forwards, _counted(self._draft) as draft_forwards:
            first_round = FirstRound()
            output = self._target.generate(ids, attention_mask=torch.ones_like(ids), streamer=first_round, **options)
            token_ids = tuple(output[0, len(question.token_ids) :].tolist())
            seconds = perf_counter() - first_round.began
        return Answer(
            token_ids=token_ids,
            target_forwards=forwards[0],
            first_tokens=first_round.tokens,
            prefill_seconds=first_round.seconds,
            seconds=seconds,
            draft_forwards=draft_forwards[0],
        )


class FirstRound:
    """A streamer that notes when the first forward's tokens came, and how many."""

    def __init__(self) -> None:
        self._puts = 0
        self.tokens, self.seconds = 0, 0.0
        self.began = perf_counter()

    def put(self, token_ids: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:  # the first are the prompt's
            self.tokens, self.seconds = token_ids.numel(), perf_counter() - self.began

    def end(self) -> None:
        """Nothing is held back."""


def greedy_options(model: Any) -> dict[str, Any]:
    """Greedy, whatever the model's own configuration samples with, and without a warning per call."""
    options: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    ends = model.generation_config.eos_token_id
    if model.generation_config.pad_token_id is None and ends is not None:
        options["pad_token_id"] = ends if isinstance(ends, int) else ends[0]
    return options


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """Counts the forward passes of a model, if there is one."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    handle = model.register_forward_pre_hook(add) if model is not None else None
    try:
        yield count
    finally:
        if handle is not None:
            handle.remove()
