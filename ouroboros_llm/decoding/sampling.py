"""From logits to the target's choice."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from ..options import DecodingOptions
from ..transformers_api import logits_processors, prepare_special_tokens
from .verification import Choose

if TYPE_CHECKING:
    from ..grammar.constraint import Constraint

Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The library's logits processors: (text [1, length], scores [1, vocabulary]) -> scores."""


class Sampler:
    """The target's choice after any prefix: greedy, or one sample from the processed distribution.

    A sample takes the same random numbers as `torch.multinomial` in the library's own loop, one draw per emitted token.
    So a seed gives the same tokens with drafts or without, and the same as `model.generate` after `torch.manual_seed`.
    """

    def __init__(
        self,
        processors: Sequence[Process] = (),
        *,
        generator: torch.Generator | None = None,
        sample: bool = False,
        margin: float = 0.0,
        constraint: Constraint | None = None,
    ) -> None:
        """`margin`: greedy scores closer than this are left to a pass over one token; 0 decides all at once.
        `constraint`: a grammar that the text is to follow; its mask is one of `processors`."""
        self._processors, self._generator, self._sample, self._margin = tuple(processors), generator, sample, margin
        self._constraint = constraint

    @property
    def plain(self) -> bool:
        return not (self._processors or self._sample or self._margin > 0)

    def chooser(self, logits: torch.Tensor, likeliest: Sequence[int], context: Sequence[int]) -> Choose:
        plain = not (self._processors or self._sample)
        wary = self._margin > 0 and len(logits) > 1
        text = torch.tensor([list(context)], device=logits.device) if self._processors else None

        def choose(node: int, emitted: list[int]) -> int | None:
            if plain and not wary:
                return likeliest[node]
            if self._constraint is not None:
                self._constraint.place(context, emitted)
                if not self._sample and (only := self._constraint.only) is not None:
                    return only
            scores = self._scores(logits[node : node + 1], text, emitted)
            if wary and not self._sample and _lead(scores) <= self._margin:
                return None
            preferences = (self._perturbed(scores) if self._sample else scores)[0]
            return int(preferences.argmax()) if self._constraint is None else self._constraint.pick(preferences)

        return choose

    def mark(self) -> torch.Tensor | None:
        """Where the random numbers are now; None where nothing is drawn, or from torch's own generator."""
        return self._generator.get_state() if self._sample and self._generator is not None else None

    def back_to(self, mark: torch.Tensor | None) -> None:
        """Draw the random numbers since `mark` again."""
        if self._generator is not None and mark is not None:
            self._generator.set_state(mark)

    def _scores(self, row: torch.Tensor, text: torch.Tensor | None, emitted: list[int]) -> torch.Tensor:
        scores = row.to(torch.float32, copy=True)
        if text is not None:
            ids = torch.cat([text, text.new_tensor([emitted])], dim=1) if emitted else text
            for process in self._processors:
                scores = process(ids, scores)
        return scores

    def _perturbed(self, scores: torch.Tensor) -> torch.Tensor:
        """Probabilities over random numbers: the greatest is a sample."""
        probabilities = scores.softmax(-1)
        return probabilities / torch.empty_like(probabilities).exponential_(1, generator=self._generator)


def _lead(scores: torch.Tensor) -> float:
    """How far the best score is ahead of the second."""
    best = scores[0].topk(2).values
    return float(best[0] - best[1])


class LogitBias:
    """Adds a number to the logits of given tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._biases = dict(biases)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        known = [token_id for token_id in self._biases if token_id < scores.shape[-1]]
        scores[:, known] += torch.tensor([self._biases[token_id] for token_id in known], device=scores.device)
        return scores


class OutputPenalty:
    """Presence and frequency penalties as the OpenAI interface defines them: for tokens of the output alone."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence, self._frequency, self._prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = Counter(input_ids[0, self._prompt_length :].tolist())
        penalties = [self._presence + self._frequency * count for count in counts.values()]
        scores[:, list(counts)] -= torch.tensor(penalties, device=scores.device)
        return scores


def sampler_for(
    model: Any,
    options: DecodingOptions,
    prompt_length: int,
    limit: int,
    margin: float,
    constraint: Constraint | None = None,
) -> Sampler:
    """The sampler that `options` ask for; what they leave unset follows `model.generation_config`.

    Args:
        prompt_length, limit: tokens of the prompt, and tokens to generate at most.
        margin: what `exact=True` takes for a near-tie.
        constraint: the grammar of the options, beside this text.
    """
    config = _generation_config(model, options, prompt_length + limit)
    # What the model's configuration asks for is done as `generate` does it.
    processors = logits_processors(model, config, prompt_length, _own_processors(options, prompt_length, constraint))
    generator = None
    if not options.greedy and options.seed is not None:
        generator = torch.Generator(model.device).manual_seed(options.seed)
    # A penalty stretches the distance between two logits, and so what rounding does to it.
    margin *= max(config.repetition_penalty or 1.0, 1 / (config.repetition_penalty or 1.0)) if options.exact else 0.0
    return Sampler(processors, generator=generator, sample=not options.greedy, margin=margin, constraint=constraint)


def _own_processors(options: DecodingOptions, prompt_length: int, constraint: Constraint | None) -> list[Process]:
    processors: list[Process] = []
    if options.logit_bias:
        processors.append(LogitBias(options.logit_bias))
    if options.presence_penalty or options.frequency_penalty:
        penalties = options.presence_penalty or 0.0, options.frequency_penalty or 0.0
        processors.append(OutputPenalty(*penalties, prompt_length))
    if constraint is not None:
        # Before temperature and cut-offs, which the library does last: they go by what the grammar leaves.
        processors.append(lambda input_ids, scores: constraint.mask(scores))
    return processors


def _generation_config(model: Any, options: DecodingOptions, max_length: int) -> GenerationConfig:
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    config.do_sample = not options.greedy
    config.max_length = max_length
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if getattr(options, name) is not None:
            setattr(config, name, getattr(options, name))
    prepare_special_tokens(model, config)
    return config
