"""Drafting replayed on recorded answers: what a drafter would have saved, without a model and in seconds.

A replay cannot see what the target would have said after rejected guesses, so rejected-but-right phrases and
recycling look weaker than they are; draft models and lookahead, which need a model, are not seen at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..decoding.decoder import Cost, fit
from ..decoding.draft_tree import MAX_WIDTH, DraftTree
from ..decoding.drafter import Budget, Drafter, Round, Successors
from ..decoding.verification import accept
from ..drafting.cached_answer import answer_source, index_answer
from ..drafting.learned_state import LearnedState, sources
from ..drafting.tree_drafter import TreeDrafter
from ..phrase_pool.memory import MemoryPool
from ..target_model.latency import PRIOR_COSTS, WIDTHS
from .traces import Trace

RECORDED = 256
"""Tokens that `record` lets an answer have unless told otherwise."""

_SEVERAL = 3

_RECORDED = "recorded"
"""Stands for the fingerprint of the model that was recorded."""

REPLAYED = ("phrases", "recycling")
"""The drafters that need no model."""


@dataclass
class Score:
    """What drafting did for some traces."""

    tokens: int = 0
    forwards: int = 0
    """Passes, the prefill counted as one."""
    nodes: int = 0
    """Tokens in those passes, roots included and prompts not."""
    cost: float = 0.0
    """Time of those passes, in units of a pass over one token; a prefill without a draft costs one."""
    hits: Counter[str] = field(default_factory=Counter)
    """Emitted tokens by the source that drafted them, and those that none did."""

    def add(self, round: Round, cost: Cost) -> None:
        self.tokens += len(round.token_ids)
        self.forwards += 1
        self.nodes += round.draft.width
        self.cost += cost(round.draft.width)
        self.hits.update(round.origins)

    def summary(self) -> dict[str, Any]:
        forwards = max(self.forwards, 1)
        return {
            "tokens_per_forward": round(self.tokens / forwards, 4),
            "nodes_per_forward": round(self.nodes / forwards, 4),
            "speedup": round(self.tokens / self.cost, 4) if self.cost else 0.0,
            "tokens": self.tokens,
            "forwards": self.forwards,
            "hits": dict(self.hits.most_common()),
        }


class History:
    """A scope that remembers the answers replayed so far."""

    def __init__(self, drafters: Sequence[str] = REPLAYED) -> None:
        self._drafters = drafters
        self.pool, self.memory = MemoryPool(), LearnedState()

    def drafter(self, prompt_ids: Sequence[int]) -> Drafter:
        answer = answer_source([self.pool], _RECORDED, prompt_ids)
        found = sources(self._drafters, self.memory, answer=answer, write=self.pool)
        return TreeDrafter(found, self.memory.calibration)

    def remember(self, trace: Trace) -> None:
        self.pool.add(trace.token_ids)
        index_answer(self.pool, _RECORDED, trace.prompt_ids, trace.token_ids)


def replay(
    traces: Sequence[Trace],
    *,
    cost: Cost,
    width: int | None = None,
    drafters: Sequence[str] = REPLAYED,
    cold: bool = False,
    passes: int = 1,
) -> Iterator[dict[str, Score]]:
    """The score of each category, pass by pass.

    Args:
        cost: time of a pass by width, in units of a pass over one token.
        width: nodes of every draft, as far as there are guesses; None: as many as pay by `cost`.
        cold: whether every answer begins without a memory of those before it.
        passes: how often all traces are gone over, with the memory of the passes before.
    """
    history, ends = History(drafters), end_tokens(traces)
    for _ in range(passes):
        scores: dict[str, Score] = {}
        for trace in traces:
            if cold:
                history = History(drafters)
            score = scores.setdefault(trace.category, Score())
            for round in rounds(trace, history.drafter(trace.prompt_ids), cost=cost, width=width, end_token_ids=ends):
                score.add(round, cost)
            history.remember(trace)
        yield scores


def end_tokens(traces: Sequence[Trace]) -> set[int]:
    """What ends the model's answers, which a decoder knows and traces do not say: tokens that end several of them and
    stand nowhere else in any."""
    last = Counter(trace.token_ids[-1] for trace in traces if trace.token_ids)
    inside = {token_id for trace in traces for token_id in trace.token_ids[:-1]}
    return {token_id for token_id, count in last.items() if count >= _SEVERAL and token_id not in inside}


def rounds(
    trace: Trace,
    drafter: Drafter,
    *,
    cost: Cost,
    width: int | None = None,
    end_token_ids: Collection[int] = (),
) -> Iterator[Round]:
    """The rounds in which `drafter` would have had a trace's answer verified; the first is the prefill."""
    context, left = list(trace.prompt_ids), len(trace.token_ids)
    drafter.open(context)
    while left:
        begin = len(trace.token_ids) - left
        # Drafts are made as for a model, which does not know where its answer will end.
        depth = max(RECORDED, len(trace.token_ids)) - begin - 1
        budget = Budget(width or MAX_WIDTH, depth, cost if width is None else None, end_token_ids)
        draft = fit(drafter.draft(context, budget), context[-1], budget, "tree")
        recorded = trace.token_ids[begin:]
        accepted = accept(draft, lambda _, emitted: recorded[len(emitted)], limit=left, end_token_ids=())  # noqa: B023
        round = Round(
            draft, accepted.token_ids, accepted.path, _likeliest(draft, recorded), _successors(draft, trace, begin)
        )
        context += accepted.token_ids
        left -= len(accepted.token_ids)
        drafter.learn(round)
        yield round


def _likeliest(draft: DraftTree, recorded: Sequence[int]) -> tuple[int, ...]:
    """Per node: the recorded token after it where it is right; no token (-1) where only a model could say."""
    likeliest = [recorded[0]]
    for node in range(1, draft.width):
        depth, parent = draft.depths[node], draft.parents[node]
        right = likeliest[parent] == draft.token_ids[node] and depth < len(recorded)
        likeliest.append(recorded[depth] if right else -1)
    return tuple(likeliest)


def _successors(draft: DraftTree, trace: Trace, begin: int) -> tuple[Successors, ...]:
    """Per node: the recorded alternatives after it, where it is right."""
    likeliest = _likeliest(draft, trace.token_ids[begin:])
    found: list[Successors] = []
    for node, token_id in enumerate(likeliest):
        place = begin + draft.depths[node]
        known = token_id >= 0 and place < len(trace.top_ids) and place < len(trace.top_probs)
        # Among themselves, as the decoder tells them.
        total = sum(trace.top_probs[place]) if known else 0.0
        chances = [chance / total for chance in trace.top_probs[place]] if total else []
        found.append(tuple(zip(trace.top_ids[place], chances, strict=False)) if known else ())
    return tuple(found)


def report(scores: Mapping[str, Score]) -> dict[str, Any]:
    """What `ouroboros replay --json` prints."""
    total = Score()
    for score in scores.values():
        total.tokens += score.tokens
        total.forwards += score.forwards
        total.nodes += score.nodes
        total.cost += score.cost
        total.hits += score.hits
    return {"all": total.summary(), **{category: score.summary() for category, score in scores.items()}}


def cost_curve(text: str) -> Cost:
    """The cost of a pass by width from its name ("cpu", "gpu") or from points "1:1.0,8:1.07,...".

    Between the points it is linear, beyond them constant. Raises ValueError where `text` is neither.
    """
    named = {"cpu": "cpu", "cpu-float32": "cpu float32", "gpu": "cuda", "cuda": "cuda"}
    try:
        points = sorted((int(width), float(value)) for width, value in (point.split(":") for point in text.split(",")))
    except ValueError:
        points = list(zip(WIDTHS, PRIOR_COSTS[named[text]], strict=True)) if text in named else []
    widths, costs = [width for width, _ in points], [value for _, value in points]
    if not points or widths[0] < 1 or min(costs) <= 0:
        raise ValueError(f"cost must be {', '.join(named)} or points 'W:C,W:C,...' above 0, but got {text!r}")
    table = [float(value) for value in np.interp(range(MAX_WIDTH + 1), widths, costs)]
    return table.__getitem__
