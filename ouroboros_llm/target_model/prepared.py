"""A loaded model, and what is known of it however many callers share it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from time import perf_counter
from typing import Any, Final, Literal, get_args
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .. import progress
from ..decoding.draft_tree import DraftTree
from ..decoding.target import KeptTarget
from ..errors import ModelError
from ..model_config import context_length_of
from ..serving.fork_safety import guard
from ..transformers_api import attention_of, check_generates, warn_if_untested
from . import measurements
from .batching import Batcher
from .capabilities import Probe, drained, is_confirmed, probe, probe_batching, probing_static
from .eager import EagerTarget, kind_of
from .failures import reason_of
from .latency import LatencyModel
from .measurements import BackendMeasurements, Measurements, key_of
from .recurrent import RecurrentTarget
from .static.forward import StaticForward

logger = logging.getLogger(__name__)

Kind = Literal["auto", "eager", "static"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EAGER: Final = "eager"
STATIC: Final = "static"

PROVEN_DEVICES: Final = frozenset({"cpu"})
"""Device types on which "auto" races passes of fixed shape; on the others it is eager. Recordings and Triton kernels
have run on no accelerator yet: a type comes in once `pytest -m gpu` has passed on one and its figures are committed."""


@dataclass(frozen=True, eq=False)
class ExecutionBackend:
    """One of the ways in which a model's passes can be made, and what was measured of it."""

    probe: Probe
    pass_times: LatencyModel
    packer: Batcher | None = None
    """Makes passes of several texts in one; None where the model cannot take that."""
    static: StaticForward | None = None
    """Verifies drafts in passes of fixed shape; None: the library's own forward does."""
    missed: str | None = None
    """Why the model cannot be run in the way that was asked for, as a clause; None where it is."""
    eager: ExecutionBackend | None = None
    """Takes over where a pass of fixed shape fails; None where that cannot happen."""


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model with the way its passes are made, and the lock that lets one pass at a time run on it."""

    model: PreTrainedModel
    lock: threading.RLock
    fingerprint: str
    """Tells models apart whose choices differ; opaque."""
    chosen: ExecutionBackend

    @property
    def way(self) -> ExecutionBackend:
        """The way that was chosen, or that which took over from it."""
        static, eager = self.chosen.static, self.chosen.eager
        if static is None or static.failure is None or eager is None:
            return self.chosen
        return _instead(eager, static.failure)

    @property
    def probe(self) -> Probe:
        return self.way.probe

    @property
    def pass_times(self) -> LatencyModel:
        return self.way.pass_times

    @property
    def packer(self) -> Batcher | None:
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
            yield f"decodes without drafts, one token a pass: {self.probe.reason}"

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and output together at most; None where the model names no limit."""
        return context_length_of(self.model.config)

    def start(self, *, marks: bool = False) -> KeptTarget:
        """A target that has read nothing yet; `marks`: it will be asked to come back to the end of a prompt."""
        if self.probe.branching == "none":
            return RecurrentTarget(self.model, self.probe.continues, marks=marks)
        return _target(self.model, self.way, marks=marks)


@dataclass(eq=False)
class _Known:
    """What was found out of a model. It must not hold the model, or that would never be freed."""

    state: object
    """What the model was like: device, precision, attention."""
    parts: int
    """What it was made of."""
    fingerprint: str
    key: str | None
    """Of its measurements on disk; None where they hold for this very object alone."""
    measurements: Measurements
    ways: dict[Kind, ExecutionBackend]
    lock: threading.RLock

    def note(self, **found: Any) -> None:
        """Keep what was found out, with what passes have cost until now."""
        with self.lock:
            self._note(**found)

    def _note(self, **found: Any) -> None:
        others = None if self.key is None else measurements.latest(self.key)
        if others is not None:
            # What another process has found out meanwhile is known here too.
            for name in ("static", "batches"):
                if getattr(self.measurements, name) is None and name not in found:
                    found[name] = getattr(others, name)
            # Passes that failed elsewhere, on another copy of the weights, stay out of "auto".
            if others.static_wins is False:
                found.setdefault("static_wins", False)
        self.measurements = replace(self.measurements, **found)
        for kind in (EAGER, STATIC):
            way, measured = self.ways.get(kind), getattr(self.measurements, kind)
            if way is not None and measured is not None and way.missed is None:
                costs = replace(measured, costs=way.pass_times.costs)
                self.measurements = replace(self.measurements, **{kind: costs})
        if self.key is not None:
            measurements.keep(self.key, self.measurements)

    def lose(self, name: str, error: Exception) -> None:
        """Give up passes of fixed shape, one of which failed after the probe; for later processes too, by "auto"."""
        reason, eager = reason_of(error), self.ways[EAGER]
        self.ways |= {STATIC: _instead(eager, reason), "auto": eager}
        self.note(static=None, static_wins=False)
        logger.warning(
            "a pass of fixed shape over %s failed (%s); the library's own forward verifies its drafts from here on",
            name,
            reason,
        )
        logger.debug("the pass that failed", exc_info=error)

    def batches(self, model: PreTrainedModel) -> bool:
        """Tell whether one pass can be made over several texts, found out the first time."""
        if self.measurements.batches is None:
            if self.key is not None and key_of(model, self.fingerprint) != self.key:
                self.key = None  # hooks have come, or code has changed: what is found now is no more than this object's
            with progress.step("checking passes over several texts, once", quiet=True):
                self.note(batches=probe_batching(model))
        return bool(self.measurements.batches)


def _instead(eager: ExecutionBackend, reason: str) -> ExecutionBackend:
    """The way that takes over where a pass of fixed shape has failed."""
    return replace(eager, missed=f"one failed: {reason}")


_known: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()

_preparing = guard(threading.RLock())

_SAMPLED = 16
"""Numbers of each weight that a fingerprint looks at."""

_LONG = 0.1
"""Seconds of a pass beside which the library's work around it, all that another way could save, is nothing."""

_RACES = 5
"""Races in a row that passes of fixed shape must win."""

_RACED = (1, 8)
"""Widths of the passes in a race."""

_TIMED = (2, 1, 2, 1, 2)
"""Widths of the passes that are timed before the first answer, after those of the probe."""


def prepare(model: PreTrainedModel, kind: Kind = "auto") -> PreparedModel:
    """Find out what `model` can verify, run in a way of this kind or, where it cannot be, by the library's own forward.

    What is known of it on this machine is found again; else it is probed, by some fifteen passes. Whether several texts
    fit in a pass and whether passes of fixed shape are faster is left for later (`measure`).

    Raises:
        ModelError: it is no causal language model. LibraryVersionError: the library does not say how to run it.
    """
    with _preparing:
        known = _known_of(model)
        way = known.ways.get(kind)
        if way is None:
            with known.lock:
                way = known.ways[kind] = _static(model, known) if kind == "static" else _faster(model, known)
        return PreparedModel(model, known.lock, known.fingerprint, way)


def measure(model: PreTrainedModel, *, races: bool = True) -> Iterator[None]:
    """Find out, a few passes at a time, what `prepare` left for later: which way is faster, for whoever prepares this
    model next. Also keeps what passes have cost until now. `races`: whether it is open which way is taken."""
    known = _known.get(model)
    if known is None:
        return
    if races and _is_raced(model, known):
        yield from _under(known.lock, _race(model, known))
    known.note()


def _race(model: PreTrainedModel, known: _Known) -> Iterator[None]:
    """Let passes of fixed shape race against the library's own, a few passes a step, and note who won."""
    if "static" not in known.ways:
        known.ways["static"] = yield from _trying(model, known)
    static = known.ways["static"]
    # What is raced with is no traffic that passes in company could be judged by.
    racers = [_target(model, replace(way, packer=None)) for way in (static, known.ways[EAGER])]
    won, raced = static.static is not None, 0
    while won and raced < _RACES:
        yield
        won, raced = _wins(*racers), raced + 1
    won = won and racers[0].static is not None  # else a pass failed, and both were of one kind
    known.note(static_wins=won)
    # Who lost need not be held; whoever asks for it by name makes it again.
    known.ways.pop("auto", None)
    if not won:
        known.ways.pop(STATIC, None)
    logger.info("passes of fixed shape are %s for %s", "faster" if won else "no faster", type(model).__name__)


def _under(lock: threading.RLock, steps: Iterator[None]) -> Iterator[None]:
    """The same steps, each while a lock is held."""
    while True:
        with lock:
            if next(steps, steps) is steps:
                return
        yield


def measure_now(model: PreTrainedModel) -> None:
    """Find out at once what `prepare` leaves for later, so that nothing runs beside what is timed next."""
    prepare(model)
    for _ in measure(model):
        pass


def keep_measurements(model: PreTrainedModel) -> None:
    """Keep what passes of a prepared model have cost until now for the next process."""
    if (known := _known.get(model)) is not None:
        known.note()


def _known_of(model: PreTrainedModel) -> _Known:
    """With what the library's own forward can do, at least."""
    state = (model.device, model.dtype, attention_of(model.config.get_text_config(decoder=True)))
    # Whoever adapts layers or resizes embeddings puts other modules in their places, which a twin does not see.
    parts = hash(tuple(map(id, model.modules())))
    if model not in _known or (_known[model].state, _known[model].parts) != (state, parts):
        check_generates(model)  # refuses what no target can run
        warn_if_untested()
        model.train(False)
        weights = fingerprint(model)
        key = key_of(model, weights)
        found = None if key is None else _confirmed(model, measurements.find(key))
        times = LatencyModel(kind_of(model), costs=found.eager.costs if found else None)
        known = _Known(state, parts, weights, key, found or _measured(model, times), {}, threading.RLock())
        known.ways["eager"] = _way(model, known, "eager", times)
        if found is None:
            known.note()
        _known[model] = known
    return _known[model]


def _confirmed(model: PreTrainedModel, found: Measurements | None) -> Measurements | None:
    """Measurements that were found, unless the model verifies other drafts by now."""
    if found is None or is_confirmed(model, found.eager.probe):
        return found
    logger.warning("%s is not what it was when it was measured; it is measured again", type(model).__name__)
    return None


def _measured(model: PreTrainedModel, times: LatencyModel) -> Measurements:
    """Probe a model that nothing is known of; `times` takes note of the passes."""
    name = type(model).__name__
    with progress.step(f"checking which drafts {name} verifies, once", quiet=True):
        found = probe(model, times)
        if found.branching != "none":
            _time(EagerTarget(model, found.branching, times))
    logger.info("%s verifies %s", name, {"tree": "trees", "chain": "chains", "none": "no drafts"}[found.branching])
    return Measurements(BackendMeasurements(found, times.costs))


def _way(
    model: PreTrainedModel, known: _Known, kind: Literal["eager", "static"], times: LatencyModel
) -> ExecutionBackend:
    """The way of a kind that was measured."""
    measured = known.measurements.static if kind == "static" else known.measurements.eager
    assert measured is not None
    trees = measured.probe.branching == "tree"
    packer = Batcher(times, known.lock, known.batches) if trees and known.measurements.batches is not False else None
    way = ExecutionBackend(measured.probe, times, packer)
    return replace(way, static=StaticForward(model), eager=known.ways[EAGER]) if kind == "static" else way


def _static(model: PreTrainedModel, known: _Known) -> ExecutionBackend:
    """Passes of fixed shape, or the library's own where these are wrong or fail."""
    return drained(_trying(model, known))


def _trying(model: PreTrainedModel, known: _Known) -> Generator[None, None, ExecutionBackend]:
    """The same, a few passes a step."""
    try:
        way = (yield from _probing(model, known)) if known.measurements.static is None else _found(model, known)
    # Compilers of kernels raise errors of their own kinds.
    except Exception as error:
        return replace(known.ways[EAGER], missed=reason_of(error))
    assert way.static is not None
    way.static.on_failure = partial(known.lose, type(model).__name__)
    return way


def _found(model: PreTrainedModel, known: _Known) -> ExecutionBackend:
    """Passes of fixed shape that were probed by an earlier process."""
    assert known.measurements.static is not None
    times = LatencyModel(kind_of(model), padded=True, costs=known.measurements.static.costs)
    way = _way(model, known, "static", times)
    if not is_confirmed(model, way.probe, way.static):
        known.note(static=None, static_wins=None)
        raise ModelError("its logits are not what they were when it was measured")
    return way


def _probing(model: PreTrainedModel, known: _Known) -> Generator[None, None, ExecutionBackend]:
    """Passes of fixed shape, tried and timed. Raises ModelError where they are wrong, and what they raise."""
    eager = known.ways[EAGER]
    if eager.probe.branching != "tree":
        raise ModelError("it cannot verify drafts with branches")
    static = StaticForward(model)
    yield
    found = yield from probing_static(model, static, eager.probe)
    times = LatencyModel(kind_of(model), padded=True)
    _time(EagerTarget(model, "tree", times, static=static))
    known.note(static=BackendMeasurements(found, times.costs))
    return ExecutionBackend(found, times, Batcher(times, known.lock, known.batches), static, eager=eager)


def _way_of(kind: Kind, model: PreTrainedModel, known: _Known) -> ExecutionBackend:
    if kind not in known.ways:
        known.ways[kind] = _static(model, known)
    return known.ways[kind]


def _faster(model: PreTrainedModel, known: _Known) -> ExecutionBackend:
    """The way that won the race, if there was one: the library's own forward where there was none."""
    if _may_race(model) and known.measurements.static_wins:
        return _way_of("static", model, known)
    return known.ways["eager"]


def _may_race(model: PreTrainedModel) -> bool:
    return model.device.type in PROVEN_DEVICES


def _is_raced(model: PreTrainedModel, known: _Known) -> bool:
    """Tell whether it is open which way is faster, and worth knowing."""
    eager, seen = known.ways["eager"], known.measurements.static_wins
    one = eager.pass_times.one
    return _may_race(model) and seen is None and eager.probe.branching == "tree" and (one or _LONG) < _LONG


def _wins(one: EagerTarget, other: EagerTarget) -> bool:
    """Tell whether passes of `one` are clearly faster than those of `other`, right before them."""
    context = (context_length_of(one.model.config) or 256) - max(_RACED)
    for target in (one, other):
        if not target.token_ids:
            target.prefill((1,) * max(1, min(128, context)))
            target.keep((0,))
            _run(target)  # what is compiled or recorded once is no part of the race
    return _seconds(one) < 0.95 * _seconds(other)


def _seconds(target: EagerTarget) -> float:
    """Time passes over one token and over a few, which are forgotten."""
    began = perf_counter()
    _run(target)
    return perf_counter() - began


def _run(target: EagerTarget) -> None:
    length = len(target.token_ids)
    for width in _RACED:
        # To read a number is to wait for the pass, also on an accelerator.
        target.verify(DraftTree.chain((1,) * width))[0, 0].item()
        target.rewind(length)


def _target(model: PreTrainedModel, way: ExecutionBackend, *, marks: bool = False) -> EagerTarget:
    return EagerTarget(model, way.probe.branching, way.pass_times, marks=marks, packer=way.packer, static=way.static)


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
    for width in _TIMED:
        # To read a number is to wait for the pass: only what is over is counted.
        target.verify(DraftTree.chain((1,) * width))[0, 0].item()
        target.keep((0,))
    target.rewind(0)
