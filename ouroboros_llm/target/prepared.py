"""A loaded model, and what is known of it however many callers share it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .base import TargetModel
from .eager import EagerTarget
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

    def start(self) -> TargetModel:
        """A target that has read nothing yet."""
        if self.probe.branching == "none":
            return StepwiseTarget(self.model)
        return EagerTarget(self.model, self.probe.branching, self.pass_times)


# The values must not hold the model, or it would never be freed.
_known: WeakKeyDictionary[PreTrainedModel, tuple[Probe, PassTimes, threading.RLock]] = WeakKeyDictionary()
_preparing = threading.Lock()


def prepare(model: PreTrainedModel) -> PreparedModel:
    """What is known of `model`; runs the probe the first time. Raises ModelError if it is no causal language model."""
    with _preparing:
        if model not in _known:
            StepwiseTarget(model)  # refuses what no target can run
            model.train(False)
            _known[model] = (probe(model), PassTimes(model.device.type), threading.RLock())
        return PreparedModel(model, *_known[model])
