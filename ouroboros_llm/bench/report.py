"""Figures of a run and the conditions they hold under."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from typing import Any

import torch
import transformers

from .. import __version__
from .methods import METHODS, PLAIN, Answer
from .side_by_side import Record, first_difference

Gaps = Mapping[tuple[int, int, str], float]
Pair = tuple[Record, Answer]
"""An answer, and the plain one to the same prompt in the same repeat."""


def summarize(records: Sequence[Record], gaps: Gaps) -> dict[str, Any]:
    """{"all": {METHOD: figures}, "categories": {CATEGORY: {METHOD: figures}}}; see `figures`."""
    categories = dict.fromkeys(record.question.category for record in records if record.question.category)
    return {
        "all": by_method(records, gaps),
        "categories": {
            category: by_method([record for record in records if record.question.category == category], gaps)
            for category in categories
        },
    }


def by_method(records: Sequence[Record], gaps: Gaps) -> dict[str, Any]:
    plain = {record.key: record.answer for record in records if record.method == PLAIN}
    # Methods take turns in being first, so the order of the records says nothing.
    methods = sorted({record.method for record in records}, key=[*METHODS].index)
    return {
        method: figures([record for record in records if record.method == method], plain, gaps) for method in methods
    }


def figures(records: Sequence[Record], plain: Mapping[tuple[int, int], Answer], gaps: Gaps) -> dict[str, Any]:
    """What one method did.

    Ratios, identity and differences are over the prompts that have a plain answer too; an interrupted run may lack
    some. Decoding is what comes after the first forward, its tokens and its seconds. Quartiles are over prompts
    and repeats.
    """
    answers = [record.answer for record in records]
    pairs = [(record, plain[record.key]) for record in records if record.key in plain]
    tokens, forwards = sum(len(answer.token_ids) for answer in answers), sum(a.target_forwards for a in answers)
    return {
        "answers": len(answers),
        "tokens": tokens,
        "target_forwards": forwards,
        "tokens_per_forward": _quotient(tokens, forwards),
        "draft_forwards": sum(answer.draft_forwards for answer in answers),
        "seconds": sum(answer.seconds for answer in answers),
        "prefill_seconds": sum(answer.prefill_seconds for answer in answers),
        "decode_seconds": sum(answer.decode_seconds for answer in answers),
        "wall_ratio": _ratio(pairs, lambda answer: (len(answer.token_ids), answer.seconds)),
        "decode_ratio": _ratio(pairs, lambda answer: (answer.decode_tokens, answer.decode_seconds)),
        "prefill_ratio": _quotient(
            sum(one.prefill_seconds for _, one in pairs), sum(record.answer.prefill_seconds for record, _ in pairs)
        ),
        "compared": len(pairs),
        "identical": sum(record.answer.token_ids == one.token_ids for record, one in pairs),
        "differences": _differences(pairs, gaps),
        "accepted_by_source": dict(sum((Counter(answer.accepted_by_source) for answer in answers), Counter[str]())),
        "prompt_tokens": sum(len(record.question.token_ids) for record in records),
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
    }


def machine(model: torch.nn.Module) -> dict[str, Any]:
    """What ran the model, and which versions."""
    parameter = next(model.parameters())
    return {
        "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else parameter.device.type.upper(),
        "threads": torch.get_num_threads(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": {
            "ouroboros-llm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        },
    }


def conditions(model: torch.nn.Module) -> str:
    """What the machine and the versions were, as a line."""
    about = machine(model)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']}, {about['threads']} threads; {about['dtype']}; greedy; {versions}"


def _ratio(pairs: Sequence[Pair], work: Callable[[Answer], tuple[int, float]]) -> dict[str, Any]:
    """Tokens per second over plain's: of the sums, and the quartiles over the pairs that have work of this kind."""
    both = [(work(record.answer), work(one)) for record, one in pairs]
    each = [ratio for mine, its in both if (ratio := _rate_ratio(mine, its)) is not None]
    mine, its = ((sum(work[0] for work in side), sum(work[1] for work in side)) for side in _sides(both))
    spread = quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {"of_sums": _rate_ratio(mine, its), "quartiles": spread or None}


def _sides(
    both: Sequence[tuple[tuple[int, float], tuple[int, float]]],
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    return [mine for mine, _ in both], [its for _, its in both]


def _rate_ratio(mine: tuple[int, float], its: tuple[int, float]) -> float | None:
    if not mine[0] or not its[0] or mine[1] <= 0 or its[1] <= 0:
        return None
    return (mine[0] / mine[1]) / (its[0] / its[1])


def _quotient(one: float, other: float) -> float | None:
    return one / other if other else None


def _differences(pairs: Sequence[Pair], gaps: Gaps) -> list[dict[str, Any]]:
    differences = []
    for record, plain in pairs:
        position = first_difference(plain.token_ids, record.answer.token_ids)
        if position is not None:
            question = record.question
            differences.append(
                {
                    "prompt": question.name,
                    "turn": question.turn,
                    "repeat": question.repeat,
                    "position": position,
                    # None where the answer merely ends, or the run was interrupted before it was measured.
                    "logit_gap": gaps.get((*record.key, record.method)),
                }
            )
    return differences
