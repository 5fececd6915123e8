"""The same prompts through plain `generate`, prompt lookup and our decoder, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from ..options import DecodingOptions
from ..ouroboros import Ouroboros

Answer = tuple[tuple[int, ...], int, float]
"""(token ids, target forwards, seconds) of one prompt."""

Method = Callable[[int, list[int]], Answer]
"""(number of the prompt, its token ids) -> the answer."""


@dataclass
class Row:
    """What one method took for all prompts."""

    method: str
    answers: list[Answer] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(token_ids) for token_ids, _, _ in self.answers)

    @property
    def forwards(self) -> int:
        return sum(forwards for _, forwards, _ in self.answers)

    @property
    def seconds(self) -> float:
        return sum(seconds for _, _, seconds in self.answers)

    @property
    def mean_acceptance_length(self) -> float:
        return self.tokens / max(self.forwards, 1)

    def identical_to(self, other: Row) -> int:
        """Prompts answered with the same tokens."""
        return sum(mine[0] == theirs[0] for mine, theirs in zip(self.answers, other.answers, strict=True))


def measure(ouroboros: Ouroboros, prompts: Sequence[list[int]], max_new_tokens: int) -> Iterator[Row]:
    """One row per method: plain, prompt lookup, cold, warm, repeated; the methods alternate prompt by prompt.

    Cold has an empty pool for every prompt; warm has the outputs for the prompts before it; repeated is a second pass
    of warm, over the same prompts.
    """
    methods = _methods(ouroboros, max_new_tokens)
    rows = {name: Row(name) for name in methods}
    for names in (("plain", "prompt lookup", "cold", "warm"), ("repeated",)):
        for number, prompt_ids in enumerate(prompts):
            for name in names:
                rows[name].answers.append(methods[name](number, prompt_ids))
    yield from rows.values()


def _methods(ouroboros: Ouroboros, max_new_tokens: int) -> dict[str, Method]:
    options = DecodingOptions(max_new_tokens=max_new_tokens)

    def ours(scope: Callable[[int], str]) -> Method:
        def answer(number: int, prompt_ids: list[int]) -> Answer:
            began = perf_counter()
            result = ouroboros.generate(prompt_ids, scope=scope(number), options=options)
            return result.token_ids, result.statistics.target_forwards, perf_counter() - began

        return answer

    return {
        "plain": lambda _, prompt_ids: _library(ouroboros.model, prompt_ids, max_new_tokens),
        "prompt lookup": lambda _, prompt_ids: _library(
            ouroboros.model, prompt_ids, max_new_tokens, prompt_lookup_num_tokens=10
        ),
        "cold": ours(lambda number: f"bench:cold-{number}"),
        "warm": ours(lambda number: "bench:warm"),
        "repeated": ours(lambda number: "bench:warm"),
    }


def _library(model: Any, prompt_ids: list[int], max_new_tokens: int, **options: Any) -> Answer:
    ids = torch.tensor([prompt_ids], device=model.device)
    with _counted(model) as count:
        began = perf_counter()
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
        )
        seconds = perf_counter() - began
    return tuple(output[0, len(prompt_ids) :].tolist()), count[0], seconds


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """Counts the model's forward passes."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    handle = model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()
