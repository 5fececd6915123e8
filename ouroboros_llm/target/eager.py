"""Any Hugging Face causal language model as a target, run by the library's own forward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from ..draft_tree import DraftTree
from .base import Branching
from .cache import RewindableCache, cache_for
from .masks import tree_masks
from .pass_times import PassTimes

PREFILL_CHUNK = 512
"""Prompt tokens per pass: bounds the memory of attention scores and activations."""


def vocabulary_size(model: Any) -> int:
    """Rows of the input embedding: ids from here on cannot be looked up."""
    return int(model.get_input_embeddings().num_embeddings)


def kind_of(model: PreTrainedModel) -> str:
    """What `PassTimes` has a prior for: the device, and on a CPU whether it computes in single precision."""
    single = model.device.type == "cpu" and model.dtype == torch.float32
    return "cpu float32" if single else model.device.type


class EagerTarget:
    """A `TargetModel` over a model's forward; the model itself is not changed."""

    def __init__(self, model: PreTrainedModel, branching: Branching, pass_times: PassTimes | None = None) -> None:
        """`branching` is what `probe` found; `pass_times` is shared by all targets of one model."""
        self.model, self.branching = model, branching
        self.config: Any = model.config.get_text_config(decoder=True)
        self.pass_times = pass_times or PassTimes(kind_of(model))
        self.cache: RewindableCache = cache_for(self.config)
        self.token_ids: list[int] = []
        self._pending: tuple[int, ...] = ()
        self._vocabulary = vocabulary_size(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prefill(self, token_ids: Sequence[int]) -> torch.Tensor:
        reused = self.common_prefix(token_ids)
        self.rewind(reused)
        rest = token_ids[reused:]
        chunk = PREFILL_CHUNK if self.cache.can_rewind else len(rest)
        for start in range(0, len(rest), chunk):
            logits = self._forward(rest[start : start + chunk], start=reused + start, logits_to_keep=1)
        self.token_ids += rest[:-1]
        self._pending = (rest[-1],)
        return logits

    def verify(self, draft: DraftTree) -> torch.Tensor:
        start = len(self.token_ids)
        began = perf_counter()
        mask = None
        if not draft.is_chain:
            mask = tree_masks(draft, start, self.config, self.model.device, self.model.dtype)
        positions = [start + depth for depth in draft.depths]
        self._pending = draft.token_ids
        logits = self._forward(draft.token_ids, positions=positions, mask=mask)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.pass_times.add(draft.width, perf_counter() - began)
        return logits

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        self.cache.keep(len(self.token_ids), path, len(self._pending))
        self.token_ids += [self._pending[node] for node in path]
        self._pending = ()

    def rewind(self, length: int) -> None:
        self.cache.rewind(length)
        del self.token_ids[length:]
        self._pending = ()

    def cost(self, width: int) -> float:
        return self.pass_times.cost(width)

    def common_prefix(self, token_ids: Sequence[int]) -> int:
        """Tokens of `token_ids` that need no prefill, never all of them: the last one's logits are wanted."""
        if not self.cache.can_rewind:
            return 0
        limit = min(len(self.token_ids), len(token_ids) - 1)
        return next((i for i in range(limit) if self.token_ids[i] != token_ids[i]), limit)

    @torch.inference_mode()
    def _forward(
        self,
        token_ids: Sequence[int],
        *,
        start: int = 0,
        positions: Sequence[int] | None = None,
        mask: Any = None,
        logits_to_keep: int = 0,
    ) -> torch.Tensor:
        """Logits [tokens, vocabulary], or of the last `logits_to_keep` tokens."""
        device = self.model.device
        # An id outside the vocabulary cannot be looked up. The target never chooses one, so any stand-in is right.
        ids = torch.tensor([token_ids], device=device)
        ids = torch.where(ids < self._vocabulary, ids, 0)
        positions = range(start, start + len(token_ids)) if positions is None else positions
        kept = {"logits_to_keep": logits_to_keep} if self._keeps_logits else {}
        output = self.model(
            input_ids=ids,
            position_ids=torch.tensor([list(positions)], device=device),
            attention_mask=mask,
            past_key_values=self.cache.states,
            use_cache=True,
            return_dict=True,
            **kept,
        )
        logits: torch.Tensor = output.logits[0]
        return logits[-logits_to_keep:] if logits_to_keep else logits
