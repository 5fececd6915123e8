"""Probes a model by running it: which drafts it verifies rightly, and whether it takes several texts in a pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ..decoding.draft_tree import DraftTree
from ..decoding.target import Branching, DeviceAcceptance, GreedyAcceptance, Pass
from ..errors import ModelError
from ..transformers_api import attention_of, forward_signature
from .batching import Batcher, can_batch
from .eager import EagerTarget, vocabulary_size
from .failures import reason_of
from .latency import LatencyModel
from .recurrent import RecurrentTarget
from .static.forward import StaticForward
from .tree_masks import takes_masks

_TEXT = (5, 9, 2, 7, 3, 9, 4, 8)
_LONG = _TEXT + tuple(range(96))
"""Longer than the chunks in which recurrences are computed."""
_TREE = DraftTree((6, 3, 8, 9, 4, 2), (-1, 0, 0, 1, 2, 3), (1.0,) * 6, ("",) * 6, (None,) * 6)


FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Probe:
    """The drafts that a model can verify, and how much its logits depend on the shape of a pass."""

    branching: Branching
    margin: float
    """Two logits closer than this may change places between a wide pass and a pass over one token."""
    continues: bool = True
    """Whether a pass over many tokens goes on from the state of a text rightly."""
    token_bytes: int | None = None
    """Bytes of one token's keys and values, in all layers; None where the model keeps other states."""
    reason: str = ""
    """Why drafts are no wider than `branching`, as a clause; empty where trees are verified."""


def probe(model: PreTrainedModel, times: LatencyModel | None = None) -> Probe:
    """Compare a pass over a small draft, committed tokens behind it, with passes over one token each.

    Args:
        model: any causal language model of the library. At most twenty passes are run, eight where it takes trees.
        times: takes note of what the passes over drafts and single tokens took.
    """
    if (reason := _no_drafts(model)) is not None:
        return _undrafted(model, reason)
    plain = EagerTarget(model, "none", times)
    try:
        alone = _step_by_step(_read(plain), _tokens(model, _TREE.main_chain().token_ids))
    except FAILURES as error:
        return _undrafted(model, f"a pass over a single token fails: {reason_of(error)}")
    reason = _no_trees(model)
    kinds: tuple[Branching, ...] = ("chain",) if reason else ("tree", "chain")
    for branching in kinds:
        draft = _TREE if branching == "tree" else _TREE.main_chain()
        start = partial(EagerTarget, model, branching, times)
        drafted = _drafted(draft, start)
        largest, near = _errors(drafted, alone)
        if largest <= _tolerance(model, alone):
            return Probe(branching, 2 * near, token_bytes=plain.cache.token_bytes, reason=reason or "")
        reason = f"a pass over a {branching} {_fault(drafted, largest, alone)}"
    return _undrafted(model, reason or "")


def is_confirmed(model: PreTrainedModel, found: Probe, static: StaticForward | None = None) -> bool:
    """Tell whether a model still verifies the drafts that it was found to verify, by four passes.

    Measurements that are found again are trusted no further: code may have changed in ways that their key does not
    see. Logits after a path of a draft are compared with those of a plain pass over the same tokens.
    """
    if found.branching == "none":
        return True
    draft = _TREE if found.branching == "tree" else _TREE.main_chain()
    drafted = _drafted(draft, partial(EagerTarget, model, found.branching, static=static))
    text = _tokens(model, (*_TEXT, *_TREE.main_chain().token_ids))
    try:
        plain = EagerTarget(model, "none").prefill(text, before=len(text) - len(_TEXT) - 1)
    except FAILURES:
        return False
    error, _ = _errors(drafted, plain)
    return error <= _tolerance(model, plain)


def probe_static(model: PreTrainedModel, static: StaticForward, found: Probe) -> Probe:
    """Find out the same of a model whose drafts are verified in passes of fixed shape: see `probing_static`."""
    return drained(probing_static(model, static, found))


def drained(steps: Generator[None, None, Result]) -> Result:
    """Make all steps at once; what they return."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


def probing_static(model: PreTrainedModel, static: StaticForward, found: Probe) -> Generator[None, None, Probe]:
    """Find out the same of a model whose drafts are verified in passes of fixed shape, a few passes a step.

    Args:
        found: what is known of its own passes.

    Raises:
        ModelError: these passes give other logits than the model's own, or none. The message says what is wrong with
            the model, as a clause.
    """
    chain = _tokens(model, _TREE.main_chain().token_ids)
    start = partial(EagerTarget, model, "tree", static=static)
    drafted = _drafted(_TREE, start)
    yield
    alone = _step_by_step(_read(EagerTarget(model, "none")), chain)
    yield
    error, _ = _errors(drafted, alone)
    if isinstance(drafted, Exception):
        raise ModelError(reason_of(drafted)) from drafted
    if error > _tolerance(model, alone):
        raise ModelError(f"its logits are off by {error:.2g} of {float(alone.abs().max()):.2g}")
    if (off := _walk_error(model, start)) > _tolerance(model, alone):
        raise ModelError(f"after a walk its logits are off by {off:.2g} of {float(alone.abs().max()):.2g}")
    yield
    _, near = _errors(drafted, _step_by_step(_read(start()), chain))
    return replace(found, margin=2 * near)


def probe_batching(model: PreTrainedModel) -> bool:
    """Tell whether one pass over several texts gives what passes over each alone do, whatever the other texts are.

    Some fifteen passes over at most 24 tokens a text are run.
    """
    if not can_batch(model.config.get_text_config(decoder=True)):
        return False
    try:
        together = _texts(model)
        alone, company = _forked(together), _forked(together)
        company[1] = _short(model, others=7)
        company[2] = _prompt(model, others=7)
        found = [_in_one(together), _in_one(together)]
        wanted = [_each(alone), _each(alone)]
        beside = _in_one(company)
    except FAILURES:
        return False
    # Of random text, half precision rounds single nodes to something else altogether; a wrong mask spoils most nodes.
    typical = torch.amax if model.dtype in (torch.float32, torch.float64) else torch.median
    right = max(float(typical(_largest(one, other))) for one, other in zip(found, wanted, strict=True))
    # The first and the last text are the same in other company, where the same kernels round them alike.
    same = [slice(0, _TREE.width), slice(-_TREE.width, None)]
    apart = max(float(typical(_largest(found[0][rows], beside[rows]))) for rows in same)
    tolerance = _tolerance(model, torch.cat(wanted))
    return right <= tolerance and apart <= tolerance / 10


def _walk_error(model: PreTrainedModel, start: Callable[[], EagerTarget]) -> float:
    """The largest difference to a logit after a walk whose path has to be moved. Raises what a walk raises."""
    target, (root, after) = _read(start()), _tokens(model, _TREE.token_ids[:2])
    length, chosen = len(target.token_ids), [root]
    for _ in range(2):
        chosen.append(int(target.verify(DraftTree.chain(chosen))[-1].argmax()))
        target.rewind(length)
    other = (chosen[1] + 1) % vocabulary_size(model)
    draft = DraftTree((root, other, *chosen[1:]), (-1, 0, 0, 2), (1.0,) * 4, ("",) * 4, (None,) * 4)
    walked = target.walk(draft, GreedyAcceptance(draft.width, (), 0))
    assert isinstance(walked, DeviceAcceptance)
    target.keep(walked.path)
    moved = target.verify(DraftTree.root(after))
    plain = EagerTarget(model, "none").prefill([*target.token_ids, after])[-1:]
    return float((moved - plain).abs().nan_to_num(float("inf")).max())


def _no_drafts(model: PreTrainedModel) -> str | None:
    """The reason why a model verifies no drafts that is known before any is tried, as a clause."""
    if not forward_signature(model).takes_cache:
        return "its forward takes a state of its own, which cannot drop tokens"
    return None if _can_drop(model) else "its cache keeps recurrent states, which cannot drop tokens"


def _no_trees(model: PreTrainedModel) -> str | None:
    """The reason why a model verifies no trees that is known before one is tried, as a clause."""
    config = model.config.get_text_config(decoder=True)
    if not EagerTarget(model, "tree").cache.can_rewind:
        return "its convolution states can drop the end of a chain alone"
    if not takes_masks(config):
        return f"its attention ({attention_of(config)}) takes no mask of a tree, or applies windows of its own"
    return None


def _fault(drafted: torch.Tensor | Exception, largest: float, alone: torch.Tensor) -> str:
    """The predicate of a sentence that says how a pass is wrong."""
    if isinstance(drafted, Exception):
        return f"fails: {reason_of(drafted)}"
    if largest == float("inf"):
        return "gives logits that are no numbers"
    return f"gives logits that are off by {largest:.2g} of {float(alone.abs().max()):.2g}"


def _undrafted(model: PreTrainedModel, reason: str) -> Probe:
    """Find out of a model that is run one token a pass whether a second prompt may go on behind a first."""
    text = _tokens(model, _LONG)
    try:
        target = RecurrentTarget(model, continues=True)
        target.prefill(text[: len(_TEXT)])
        target.keep((0,))
        continued = target.prefill(text)
        plain = RecurrentTarget(model).prefill(text)
    except FAILURES:
        return Probe("none", 0.0, continues=False, reason=reason)
    error = float((continued - plain).abs().nan_to_num(float("inf")).max())
    return Probe("none", 0.0, continues=error <= _tolerance(model, plain), reason=reason)


def _tolerance(model: PreTrainedModel, logits: torch.Tensor) -> float:
    """A wrong mask or state is off by the size of the logits themselves; rounding by its precision."""
    return float(logits.abs().max()) * (1e-3 if model.dtype in (torch.float32, torch.float64) else 1e-1)


def _can_drop(model: PreTrainedModel) -> bool:
    """Whether the cache can drop tokens; states that only a first pass brings into being are asked after it."""
    target = EagerTarget(model, "none")
    try:
        if not target.cache.can_drop:
            target.prefill(_tokens(model, _TEXT))
    except FAILURES:
        return False
    return target.cache.can_drop


def _drafted(draft: DraftTree, start: Callable[[], EagerTarget]) -> torch.Tensor | Exception:
    """Logits after the nodes on the path to the last one of `draft`, verified in one pass, and after one token more,
    which stands again for the third of them; or what a pass raised."""
    path = draft.path_to(draft.width - 1)
    try:
        target = _read(start())
        draft = replace(draft, token_ids=tuple(_tokens(target.model, draft.token_ids)))
        wide = target.verify(draft)[list(path)].clone()
        # Committing a part of the path and stepping on shows whether what was dropped is really gone.
        target.keep(path[:2])
        return torch.cat([wide, target.verify(DraftTree.root(draft.token_ids[path[2]]))])
    except FAILURES as error:
        return error


def _errors(drafted: torch.Tensor | Exception, alone: torch.Tensor) -> tuple[float, float]:
    """The largest difference that drafting makes to a logit (infinite where a pass failed), and the largest to one of
    the likeliest eight. `alone`: the logits of a path one token at a time."""
    if isinstance(drafted, Exception):
        return float("inf"), 0.0
    alone = torch.cat([alone, alone[2:3]])
    differences = (drafted - alone).abs().nan_to_num(float("inf"))
    likeliest = alone.topk(min(8, alone.shape[-1])).indices
    return float(differences.max()), float(differences.gather(-1, likeliest).max())


def _largest(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Per row: the largest difference, infinite where there is a number missing."""
    return (one - other).abs().nan_to_num(float("inf")).amax(-1)


def _in_one(passes: list[Pass]) -> torch.Tensor:
    return _kept(passes, Batcher(LatencyModel(""), threading.RLock()).together(passes))


def _each(passes: list[Pass]) -> torch.Tensor:
    return _kept(passes, [wanted.logits() for wanted in passes])


def _kept(passes: list[Pass], logits: list[torch.Tensor]) -> torch.Tensor:
    for one in passes:
        one.target.keep((0,))
        one.text = None
    return torch.cat(logits).float()


def _texts(model: PreTrainedModel) -> list[Pass]:
    """Passes over a tree, over one token, over a prompt and over a tree."""
    tree = replace(_TREE, token_ids=tuple(_tokens(model, _TREE.token_ids)))
    start = partial(EagerTarget, model, "tree")
    return [
        Pass(_read(start()), tree),
        _short(model),
        _prompt(model),
        Pass(_read(start(), _TEXT[::-1]), tree),
    ]


def _short(model: PreTrainedModel, others: int = 0) -> Pass:
    between = _between(model, others)
    return Pass(_read(EagerTarget(model, "tree"), tuple(between[:11])), DraftTree.root(between[-1]))


def _prompt(model: PreTrainedModel, others: int = 0) -> Pass:
    between = _between(model, others)
    return Pass(EagerTarget(model, "tree"), DraftTree.root(between[-1]), between, 3)


def _between(model: PreTrainedModel, others: int) -> list[int]:
    return _tokens(model, tuple(token_id + others for token_id in _LONG[:24]))


def _forked(passes: list[Pass]) -> list[Pass]:
    """The same passes over texts of their own, which need not be read again."""
    copies = []
    for one in passes:
        target: Any = one.target
        copies.append(replace(one, target=target.fork(len(target.token_ids))))
    return copies


def _step_by_step(target: EagerTarget, token_ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] after each of them, by a pass each."""
    logits = []
    for token_id in token_ids:
        logits.append(target.verify(DraftTree.root(token_id)).clone())
        target.keep((0,))
    return torch.cat(logits)


def _read(target: EagerTarget, text: tuple[int, ...] = _TEXT) -> EagerTarget:
    target.prefill(_tokens(target.model, text))
    target.keep((0,))
    return target


def _tokens(model: PreTrainedModel, token_ids: tuple[int, ...]) -> list[int]:
    return [token_id % vocabulary_size(model) for token_id in token_ids]
