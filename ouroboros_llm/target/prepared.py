"""A loaded model, and what is known of it however many callers share it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from time import perf_counter
from typing import Literal, get_args
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..draft_tree import DraftTree
from ..errors import ModelError
from ..model_facts import context_length_of
from .base import KeptTarget
from .eager import EagerTarget, kind_of
from .packing import Packer
from .pass_times import PassTimes
from .probe import FAILURES, Probe, probe, probe_static
from .static import StaticForward
from .stepwise import StepwiseTarget

Kind = Literal["auto", "eager", "static"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, eq=False)
class Way:
    """One of the ways in which a model's passes can be made, and what was measured of it."""

    probe: Probe
    pass_times: PassTimes
    packer: Packer | None = None
    """Makes passes of several texts in one; None where the model cannot take that."""
    static: StaticForward | None = None
    """Verifies drafts in passes of fixed shape; None: the library's own forward does."""
    missed: str | None = None
    """Why the model cannot be run in the way that was asked for, as a clause; None where it is."""


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model with the way its passes are made, and the lock that lets one pass at a time run on it."""

    model: PreTrainedModel
    lock: threading.RLock
    fingerprint: str
    """Tells models apart whose choices differ; opaque."""
    way: Way

    @property
    def probe(self) -> Probe:
        return self.way.probe

    @property
    def pass_times(self) -> PassTimes:
        return self.way.pass_times

    @property
    def packer(self) -> Packer | None:
        return self.way.packer

    @property
    def shortcomings(self) -> Iterator[str]:
        """What a user should know of how this model is run, as ends of sentences about it."""
        if self.way.missed is not None:
            yield (
                f"cannot make passes of fixed shape ({self.way.missed}), so the library's own forward verifies its "
                "drafts, as with target='eager'"
            )
        if self.probe.branching == "none":
            yield "keeps states that cannot be rewound, so it decodes without drafts, one token a pass"

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and output together at most; None where the model names no limit."""
        return context_length_of(self.model.config)

    def start(self, *, marks: bool = False) -> KeptTarget:
        """A target that has read nothing yet; `marks`: it will be asked to come back to the end of a prompt."""
        if self.probe.branching == "none":
            return StepwiseTarget(self.model, self.probe.continues, marks=marks)
        return _target(self.model, self.way, marks=marks)


@dataclass(eq=False)
class _Known:
    """What was found out of a model. It must not hold the model, or that would never be freed."""

    state: object
    """What the model was like: device, precision, attention."""
    parts: int
    """What it was made of."""
    fingerprint: str
    ways: dict[Kind, Way]
    lock: threading.RLock


_known: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()

_times: dict[tuple[object, ...], PassTimes] = {}
"""By model, device, dtype, threads and way: what was measured holds for a copy that is loaded later."""

_preparing = threading.Lock()

_SAMPLED = 16
"""Numbers of each weight that a fingerprint looks at."""

_LONG = 0.1
"""Seconds of a pass on a CPU beside which the library's work around it, all that another way could save, is nothing."""

_RACES = 5
"""Races in a row that passes of fixed shape must win on a CPU."""

_RACED = (1, 8)
"""Widths of the passes in a race."""


def prepare(model: PreTrainedModel, kind: Kind = "auto") -> PreparedModel:
    """What is known of `model`, run in a way of this kind or, where it cannot be, by the library's own forward.

    Probes and measures the first time. Raises ModelError if it is no causal language model.
    """
    with _preparing:
        known = _known_of(model)
        if kind not in known.ways:
            with known.lock:
                known.ways[kind] = _static(model, known) if kind == "static" else _faster(model, known)
        return PreparedModel(model, known.lock, known.fingerprint, known.ways[kind])


def _known_of(model: PreTrainedModel) -> _Known:
    """With what the library's own forward can do, at least."""
    state = (model.device, model.dtype, model.config.get_text_config(decoder=True)._attn_implementation)
    # Whoever adapts layers or resizes embeddings puts other modules in their places, which a twin does not see.
    parts = hash(tuple(map(id, model.modules())))
    if model not in _known or (_known[model].state, _known[model].parts) != (state, parts):
        StepwiseTarget(model)  # refuses what no target can run
        model.train(False)
        found, lock = probe(model), threading.RLock()
        known = _Known(state, parts, fingerprint(model), {}, lock)
        times = _times_of(model, known, "eager")
        known.ways["eager"] = Way(found, times, Packer(times, lock) if found.packs else None)
        if found.branching != "none":
            _time(_target(model, known.ways["eager"]))
        _known[model] = known
    return _known[model]


def _static(model: PreTrainedModel, known: _Known) -> Way:
    """Passes of fixed shape, or the library's own where these are wrong."""
    eager = known.ways["eager"]
    try:
        if eager.probe.branching != "tree":
            raise ModelError("it cannot verify drafts with branches")
        static = StaticForward(model)
        found = probe_static(model, static, eager.probe)
    except (ModelError, *FAILURES) as error:
        return replace(eager, missed=str(error))
    times = _times_of(model, known, "static")
    way = Way(found, times, Packer(times, known.lock) if found.packs else None, static)
    _time(_target(model, way))
    return way


def _faster(model: PreTrainedModel, known: _Known) -> Way:
    """The way that takes less time: on an accelerator that of fixed shape, which can be replayed."""
    eager = known.ways["eager"]
    one = eager.pass_times.one
    if model.device.type == "cpu" and (one is None or one > _LONG or eager.probe.branching != "tree"):
        return eager
    if "static" not in known.ways:
        known.ways["static"] = _static(model, known)
    static = known.ways["static"]
    if model.device.type != "cpu":
        return static
    # What is raced with is no traffic that passes in company could be judged by.
    racers = (_target(model, replace(way, packer=None)) for way in (static, eager))
    return static if static.static and _wins(*racers) else eager


def _wins(one: EagerTarget, other: EagerTarget) -> bool:
    """Whether passes of `one` are faster than those of `other` every time that they run one after the other."""
    context = (context_length_of(one.model.config) or 256) - max(_RACED)
    for target in (one, other):
        target.prefill((1,) * max(1, min(128, context)))
        target.keep((0,))
    return all(_seconds(one) < 0.95 * _seconds(other) for _ in range(_RACES))


def _seconds(target: EagerTarget) -> float:
    """Of passes over one token and over a few, which are forgotten."""
    length, began = len(target.token_ids), perf_counter()
    for width in _RACED:
        target.verify(DraftTree.chain((1,) * width))
        target.rewind(length)
    return perf_counter() - began


def _target(model: PreTrainedModel, way: Way, *, marks: bool = False) -> EagerTarget:
    return EagerTarget(model, way.probe.branching, way.pass_times, marks=marks, packer=way.packer, static=way.static)


def _times_of(model: PreTrainedModel, known: _Known, kind: Kind) -> PassTimes:
    key = (known.fingerprint, str(known.state), torch.get_num_threads(), kind)
    return _times.setdefault(key, PassTimes(kind_of(model), padded=kind == "static"))


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's architecture and of a sample of its weights."""
    digest = blake2b(type(model).__name__.encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        row = parameter.detach().flatten()
        sample = row[:: max(1, row.numel() // _SAMPLED)][:_SAMPLED]
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def locked(*models: PreparedModel | None) -> Iterator[None]:
    """Holds the locks of all the models, always in the same order."""
    with ExitStack() as stack:
        for prepared in sorted((model for model in models if model is not None), key=lambda model: id(model.lock)):
            stack.enter_context(prepared.lock)
        yield


def _time(target: EagerTarget) -> None:
    """Measure narrow passes, which all widths are compared with: a decoder that drafts well would seldom run them."""
    target.prefill((1,))
    target.keep((0,))
    for _ in range(4):
        for width in (1, 2):
            # To read a number is to wait for the pass: only what is over is counted.
            target.verify(DraftTree.chain((1,) * width))[0, 0].item()
            target.keep((0,))
    target.rewind(0)
