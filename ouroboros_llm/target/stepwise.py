"""Models whose state cannot be rewound (Mamba, RWKV, hybrids with recurrent layers): one token a pass, no drafts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..draft_tree import DraftTree
from ..errors import ModelError
from .base import Branching

_STATE_NAMES = ("past_key_values", "cache_params", "state")


class StepwiseTarget:
    """A `TargetModel` that carries whatever state the model returns from one pass to the next."""

    branching: Branching = "none"
    prefill_branching: Branching = "none"

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelError where the model returns no state to carry, as encoder-decoder models and encoders do."""
        self.model = model
        self.token_ids: list[int] = []
        self._state: Any = None
        self._pending: tuple[int, ...] = ()
        names = [name for name in _STATE_NAMES if name in inspect.signature(model.forward).parameters]
        if model.config.is_encoder_decoder or not names or not model.can_generate():
            raise ModelError(
                f"model must be a causal language model that generates from a cache, but got {type(model).__name__}; "
                "load it with AutoModelForCausalLM"
            )
        self._state_name = names[0]
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def prefill(self, token_ids: Sequence[int], draft: DraftTree | None = None, before: int = 0) -> torch.Tensor:
        self.token_ids, self._state = list(token_ids[:-1]), None
        # In one pass: continuing a recurrent state by many tokens is not something every model does right.
        return self._forward(token_ids)[-1:]

    def verify(self, draft: DraftTree) -> torch.Tensor:
        return self._forward(draft.token_ids)

    def keep(self, path: Sequence[int]) -> None:
        self.token_ids += [self._pending[-1] for _ in path]

    def rewind(self, length: int) -> None:
        del self.token_ids[length:]
        self._state = None

    def cost(self, width: int) -> float:
        return float(width)

    @torch.inference_mode()
    def _forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        self._pending = tuple(token_ids)
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        state = {self._state_name: self._state}
        if self._takes_positions:
            # Left alone, some models count from zero in every pass.
            start = len(self.token_ids) if self._state is not None else 0
            state["position_ids"] = torch.arange(start, start + len(token_ids), device=ids.device)[None]
        output = self.model(input_ids=ids, use_cache=True, return_dict=True, **state)
        self._state = getattr(output, self._state_name)
        logits: torch.Tensor = output.logits[0]
        return logits
