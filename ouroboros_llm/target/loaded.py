"""A loaded model, and what is known of it however many callers share it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .base import TargetModel
from .eager import EagerTarget
from .pass_times import PassTimes
from .probe import Probe, probe
from .stepwise import StepwiseTarget


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its probe, its pass times and the lock that lets one pass at a time run on it."""

    model: PreTrainedModel
    probe: Probe
    pass_times: PassTimes
    lock: threading.RLock = field(default_factory=threading.RLock)

    def start(self) -> TargetModel:
        """A target that has read nothing yet."""
        if self.probe.branching == "none":
            return StepwiseTarget(self.model)
        return EagerTarget(self.model, self.probe.branching, self.pass_times)


_loaded: WeakKeyDictionary[PreTrainedModel, LoadedModel] = WeakKeyDictionary()
_loading = threading.Lock()


def load(model: PreTrainedModel) -> LoadedModel:
    """What is known of `model`; runs the probe the first time. Raises ModelError if it is no causal language model."""
    with _loading:
        if model not in _loaded:
            StepwiseTarget(model)  # refuses what no target can run
            model.train(False)
            _loaded[model] = LoadedModel(model, probe(model), PassTimes(model.device.type))
        return _loaded[model]
