"""Finds out, by running it, what drafts a model verifies correctly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from ..draft_tree import DraftTree
from ..errors import ModelError
from ..transformers_api import forward_signature
from .base import Branching, Pass
from .eager import EagerTarget, vocabulary_size
from .masks import takes_masks
from .packing import Packer, can_pack
from .pass_times import PassTimes
from .static import StaticForward
from .stepwise import StepwiseTarget

_TEXT = (5, 9, 2, 7, 3, 9, 4, 8)
_LONG = _TEXT + tuple(range(96))
"""Longer than the chunks in which recurrences are computed."""
_TREE = DraftTree((6, 3, 8, 9, 4, 2), (-1, 0, 0, 1, 2, 3), (1.0,) * 6, ("",) * 6, (None,) * 6)


FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a model can verify, and how much its logits depend on the shape of a pass."""

    branching: Branching
    margin: float
    """Two logits closer than this may change places between a wide pass and a pass over one token."""
    continues: bool = True
    """Whether a pass over many tokens goes on from the state of a text rightly."""
    packs: bool = False
    """Whether one pass can be made over several texts."""


def probe(model: PreTrainedModel) -> Probe:
    """Compare a pass over a small draft, committed tokens behind it, with passes over one token each.

    Args:
        model: any causal language model of the library. A few passes over at most eight tokens are run.
    """
    if not forward_signature(model).takes_cache:
        return _undrafted(model)
    if not _can_drop(model):
        return _undrafted(model)
    kinds: tuple[Branching, ...] = ("tree", "chain") if _takes_trees(model) else ("chain",)
    for branching in kinds:
        draft = _TREE if branching == "tree" else _TREE.main_chain()
        error, near, scale = _errors(draft, partial(EagerTarget, model, branching), partial(EagerTarget, model, "none"))
        if error <= scale * _tolerance(model):
            return Probe(branching, 2 * near, packs=branching == "tree" and _packs(model, scale))
    return _undrafted(model)


def probe_static(model: PreTrainedModel, static: StaticForward, found: Probe) -> Probe:
    """What `found`, of a model that verifies trees, becomes where passes are of fixed shape.

    Raises:
        ModelError: these passes give other logits than the model's own, or none. The message says what is wrong with
            the model, as a clause.
    """
    start = partial(EagerTarget, model, "tree", static=static)
    error, _, scale = _errors(_TREE, start, partial(EagerTarget, model, "none"))
    if error > scale * _tolerance(model):
        raise ModelError(_reason(start) or f"its logits are off by {error:.2g} of {scale:.2g}")
    _, near, _ = _errors(_TREE, start, start)
    return replace(found, margin=2 * near)


def _reason(start: Callable[[], EagerTarget]) -> str | None:
    """Why a pass over a draft fails, if it does."""
    try:
        target = _read(start)
        target.verify(DraftTree.root(target.token_ids[-1]))
    except FAILURES as error:
        return str(error)
    return None


def _undrafted(model: PreTrainedModel) -> Probe:
    """What is known of a model that is run one token a pass: whether a second prompt may go on behind a first."""
    text = _tokens(model, _LONG)
    try:
        target = StepwiseTarget(model, continues=True)
        target.prefill(text[: len(_TEXT)])
        target.keep((0,))
        continued = target.prefill(text)
        plain = StepwiseTarget(model).prefill(text)
    except FAILURES:
        return Probe("none", 0.0, continues=False)
    error = float((continued - plain).abs().nan_to_num(float("inf")).max())
    return Probe("none", 0.0, continues=error <= float(plain.abs().max()) * _tolerance(model))


def _tolerance(model: PreTrainedModel) -> float:
    """A wrong mask or state is off by the size of the logits themselves; rounding by its precision."""
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 1e-1


def _takes_trees(model: PreTrainedModel) -> bool:
    return EagerTarget(model, "tree").cache.can_rewind and takes_masks(model.config.get_text_config(decoder=True))


def _can_drop(model: PreTrainedModel) -> bool:
    """Whether the cache can drop tokens; states that only a first pass brings into being are asked after it."""
    target = EagerTarget(model, "none")
    try:
        if not target.cache.can_drop:
            target.prefill(_tokens(model, _TEXT))
    except FAILURES:
        return False
    return target.cache.can_drop


def _errors(
    draft: DraftTree, start: Callable[[], EagerTarget], plain: Callable[[], EagerTarget]
) -> tuple[float, float, float]:
    """The largest difference drafting makes to a logit (infinite where a pass fails), the largest to one of the
    likeliest eight, and the largest logit; compared with passes of a `plain` target over one token each."""
    draft = replace(draft, token_ids=tuple(_tokens(start().model, draft.token_ids)))
    leaf = draft.width - 1
    path = draft.path_to(leaf)
    try:
        drafted = _read(start)
        wide = drafted.verify(draft)[list(path)]
        # Committing a part of the path and stepping on shows whether what was dropped is really gone.
        drafted.keep(path[:2])
        # Logits are there until the next pass.
        after = drafted.verify(DraftTree.root(draft.token_ids[path[2]])).clone()
    except FAILURES:
        return float("inf"), 0.0, 0.0
    alone = torch.cat(_step_by_step(plain, [draft.token_ids[node] for node in path]))
    differences = (torch.cat([wide, after]) - torch.cat([alone, alone[2:3]])).abs().nan_to_num(float("inf"))
    likeliest = torch.cat([alone, alone[2:3]]).topk(min(8, alone.shape[-1])).indices
    near = differences.gather(-1, likeliest).max()
    return float(differences.max()), float(near), float(alone.abs().max())


def _packs(model: PreTrainedModel, scale: float) -> bool:
    """Whether a pass over several texts gives what passes over each alone do, whatever the other texts are."""
    if not can_pack(model.config.get_text_config(decoder=True)):
        return False
    try:
        together, alone = _texts(model), _texts(model)
        found = [_in_one(together), _in_one(together)]
        wanted = [_each(alone), _each(alone)]
        company = _in_one(_texts(model, others=7))
    except FAILURES:
        return False
    # Of random text, half precision rounds single nodes to something else altogether; a wrong mask spoils most nodes.
    typical = torch.amax if model.dtype in (torch.float32, torch.float64) else torch.median
    right = max(float(typical(_largest(one, other))) for one, other in zip(found, wanted, strict=True))
    # The first and the last text are the same in other company, where the same kernels round them alike.
    same = [slice(0, _TREE.width), slice(-_TREE.width, None)]
    apart = max(float(typical(_largest(found[0][rows], company[rows]))) for rows in same)
    return right <= scale * _tolerance(model) and apart <= scale * _tolerance(model) / 10


def _largest(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Per row: the largest difference, infinite where there is a number missing."""
    return (one - other).abs().nan_to_num(float("inf")).amax(-1)


def _in_one(passes: list[Pass]) -> torch.Tensor:
    return _kept(passes, Packer(PassTimes(""), threading.RLock()).together(passes))


def _each(passes: list[Pass]) -> torch.Tensor:
    return _kept(passes, [wanted.logits() for wanted in passes])


def _kept(passes: list[Pass], logits: list[torch.Tensor]) -> torch.Tensor:
    for one in passes:
        one.target.keep((0,))
        one.text = None
    return torch.cat(logits).float()


def _texts(model: PreTrainedModel, others: int = 0) -> list[Pass]:
    """Passes over a tree, over one token, over a prompt and over a tree; `others` changes the texts in between."""
    tree = replace(_TREE, token_ids=tuple(_tokens(model, _TREE.token_ids)))
    start = partial(EagerTarget, model, "tree")
    first, last = _read(start), _read(start, _TEXT[::-1])
    between = _tokens(model, tuple(token_id + others for token_id in _LONG[:24]))
    short, root = _read(start, tuple(between[:11])), DraftTree.root(between[-1])
    prompt = Pass(start(), root, between, 3)
    return [Pass(first, tree), Pass(short, root), prompt, Pass(last, tree)]


def _step_by_step(start: Callable[[], EagerTarget], token_ids: list[int]) -> list[torch.Tensor]:
    target = _read(start)
    logits = []
    for token_id in token_ids:
        logits.append(target.verify(DraftTree.root(token_id)).clone())
        target.keep((0,))
    return logits


def _read(start: Callable[[], EagerTarget], text: tuple[int, ...] = _TEXT) -> EagerTarget:
    target = start()
    target.prefill(_tokens(target.model, text))
    target.keep((0,))
    return target


def _tokens(model: PreTrainedModel, token_ids: tuple[int, ...]) -> list[int]:
    return [token_id % vocabulary_size(model) for token_id in token_ids]
