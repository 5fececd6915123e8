"""A model's twin: the same weights and the same code, under a configuration of its own.

What a static pass changes (how attention is computed, in which precision the output head answers) it changes in the
twin. The model itself stays as its owner made it, also for threads that call it while a pass runs.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Module = TypeVar("Module", bound=nn.Module)


def clone_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of copied modules that hold the very parameters and buffers of `model`.

    Weights that are changed in place or moved later are seen by both; a module put in another's place is not.
    """
    configs: dict[int, Any] = {}
    # The outermost first, so that the parts of a configuration stay its parts.
    copy.deepcopy(model.config, configs)
    return _copied(model, {}, configs)


def _copied(module: Module, known: dict[int, nn.Module], configs: dict[int, Any]) -> Module:
    if id(module) not in known:
        # Not by its own __init__, which would make weights; nor by deepcopy, which would copy them.
        twin = known[id(module)] = copy.copy(module)
        twin.__dict__ = {
            name: copy.deepcopy(value, configs) if isinstance(value, PreTrainedConfig) else value
            for name, value in module.__dict__.items()
        }
        twin._modules = {
            name: None if child is None else _copied(child, known, configs) for name, child in module._modules.items()
        }
    found: Any = known[id(module)]
    return found  # type: ignore[no-any-return]
