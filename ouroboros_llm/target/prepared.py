"""A loaded model, and what is known of it however many callers share it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..draft_tree import DraftTree
from .base import KeptTarget
from .eager import EagerTarget, kind_of
from .packing import Packer
from .pass_times import PassTimes
from .probe import Probe, probe
from .stepwise import StepwiseTarget


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model with its probe, its pass times and the lock that lets one pass at a time run on it."""

    model: PreTrainedModel
    probe: Probe
    pass_times: PassTimes
    lock: threading.RLock
    fingerprint: str
    """Tells models apart whose choices differ; opaque."""
    packer: Packer | None = None
    """Makes passes of several texts in one; None where the model cannot take that."""

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and output together at most; None where the model names no limit."""
        length = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(length) if length else None

    def start(self, *, marks: bool = False) -> KeptTarget:
        """A target that has read nothing yet; `marks`: it will be asked to come back to the end of a prompt."""
        if self.probe.branching == "none":
            return StepwiseTarget(self.model, self.probe.continues, marks=marks)
        return EagerTarget(self.model, self.probe.branching, self.pass_times, marks=marks, packer=self.packer)


# The values must not hold the model, or it would never be freed.
_known: WeakKeyDictionary[PreTrainedModel, tuple[object, Any]] = WeakKeyDictionary()
"""The state that a model was prepared in, and the fields of its `PreparedModel` behind the first."""

_times: dict[tuple[object, ...], PassTimes] = {}
"""By model, device, dtype and threads: what was measured holds for a copy that is loaded later."""

_preparing = threading.Lock()

_SAMPLED = 16
"""Numbers of each weight that a fingerprint looks at."""


def prepare(model: PreTrainedModel) -> PreparedModel:
    """What is known of `model`; runs the probe the first time. Raises ModelError if it is no causal language model."""
    with _preparing:
        state = (model.device, model.dtype, model.config.get_text_config(decoder=True)._attn_implementation)
        if model not in _known or _known[model][0] != state:
            StepwiseTarget(model)  # refuses what no target can run
            model.train(False)
            found, mark = probe(model), fingerprint(model)
            times = _times.setdefault((mark, *map(str, state), torch.get_num_threads()), PassTimes(kind_of(model)))
            if found.branching != "none":
                _time(EagerTarget(model, found.branching, times))
            lock = threading.RLock()
            _known[model] = (state, (found, times, lock, mark, Packer(times, lock) if found.packs else None))
        return PreparedModel(model, *_known[model][1])


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
            target.verify(DraftTree.chain((1,) * width))
            target.keep((0,))
    target.rewind(0)
