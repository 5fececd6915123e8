"""Any Hugging Face causal language model as a target, run by the library's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..decoding.draft_tree import MAX_WIDTH, DraftTree
from ..decoding.target import Branching, DeviceAcceptance, GreedyAcceptance
from ..transformers_api import Cache, forward_signature
from .batching import Batcher
from .kv_cache import RewindableCache, SlotCache, cache_for
from .latency import LatencyModel, PassTimer, padded
from .static.device_accept import checked, read
from .tree_masks import tree_masks

if TYPE_CHECKING:
    from .static.forward import StaticForward

PREFILL_CHUNK = 512
"""Prompt tokens per pass: bounds the memory of attention scores and activations."""


def vocabulary_size(model: Any) -> int:
    """Rows of the input embedding: ids from here on cannot be looked up."""
    return int(model.get_input_embeddings().num_embeddings)


def kind_of(model: PreTrainedModel) -> str:
    """What `LatencyModel` has a prior for: the device, and on a CPU whether it computes in single precision."""
    single = model.device.type == "cpu" and model.dtype == torch.float32
    return "cpu float32" if single else model.device.type


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    limit = min(len(left), len(right))
    if list(left[:limit]) == list(right[:limit]):
        return limit
    return next(position for position in range(limit) if left[position] != right[position])


def numbers(logits: torch.Tensor) -> torch.Tensor:
    """The logits of a pass of fixed shape. Raises RuntimeError where some are no numbers."""
    if bool(logits.isnan().any()):
        raise RuntimeError("logits are no numbers")
    return logits


class EagerTarget:
    """A `TargetModel` over a model's forward; the model itself is not changed."""

    def __init__(
        self,
        model: PreTrainedModel,
        branching: Branching,
        pass_times: LatencyModel | None = None,
        *,
        marks: bool = False,
        cache: RewindableCache | None = None,
        packer: Batcher | None = None,
        static: StaticForward | None = None,
    ) -> None:
        """`branching` is what `probe` found; `pass_times` is shared by all targets of one model; `marks`: keep what it
        takes to come back to the end of a prompt, where a cache cannot go back anyway; `packer`: makes passes of
        several targets in one, if the model can be asked for that; `static`: verifies drafts in passes of fixed shape,
        where the cache is a `SlotCache`, until one of them fails."""
        self.model, self.branching = model, branching
        self.marks, self._marked = marks, True
        self.config: Any = model.config.get_text_config(decoder=True)
        self.pass_times = pass_times or LatencyModel(kind_of(model))
        self._clock = PassTimer(self.pass_times)
        self.packer, self._static = packer, static
        self.cache: RewindableCache = cache_for(self.config) if cache is None else cache
        self.token_ids: list[int] = []
        self._pending: tuple[int, ...] = ()
        self._moved: tuple[int, ...] | None = None
        """The path of a walk, whose keys and values are where they belong already."""
        self._vocabulary = vocabulary_size(model)
        self._signature = forward_signature(model)

    @property
    def prefill_branching(self) -> Branching:
        # States of convolutions that a first pass brings into being cannot drop their end yet.
        return self.branching if self.cache.can_rewind else "none"

    def prefill(self, token_ids: Sequence[int], draft: DraftTree | None = None, before: int = 0) -> torch.Tensor:
        chunk = PREFILL_CHUNK if self.cache.can_rewind else len(token_ids)
        draft = draft or DraftTree.root(token_ids[-1])
        unread = self.begin(draft, token_ids)
        while len(unread) > chunk:
            self._forward(DraftTree.chain(unread[:chunk]), logits_to_keep=1)
            self.token_ids += unread[:chunk]
            unread = unread[chunk:]
        began = perf_counter()
        logits = self._forward(draft.behind(unread), logits_to_keep=min(before, len(unread)) + draft.width)
        self.token_ids += unread
        if self.packer is not None:
            self.packer.saw_alone(logits, len(unread) + draft.width, len(self.token_ids) + draft.width, began)
        return logits

    def begin(self, draft: DraftTree, text: Sequence[int] | None = None) -> Sequence[int]:
        """Get ready for a pass over `draft`; of `text`, which ends at its root, the tokens before the root that are
        still to be read."""
        if text is not None:
            self.rewind(self.common_prefix(text))
            self._marked = not self.marks
        # Whatever happens in a pass, it is known from here on that the states may be ahead of the text.
        self._pending, self._moved = draft.token_ids, None
        return () if text is None else text[len(self.token_ids) : -1]

    def verify(self, draft: DraftTree) -> torch.Tensor:
        if (static := self.static) is not None and (slots := self._slots(draft)) is not None:
            try:
                with self._timed(draft):
                    self.begin(draft)
                    return numbers(static.verify(draft, len(self.token_ids), slots))
            except Exception as error:
                if not self._takes_back(static, error):
                    raise
        # Out of the handler, which keeps the tensors of the failed pass alive.
        with self._timed(draft):
            self.begin(draft)
            return self._forward(draft)

    def walk(self, draft: DraftTree, greedy: GreedyAcceptance) -> DeviceAcceptance | torch.Tensor:
        if (static := self.static) is not None and (slots := self._slots(draft)) is not None:
            try:
                with self._timed(draft, greedy):
                    self.begin(draft)
                    row = static.walk(draft, len(self.token_ids), slots, greedy)
                walked = checked(read(row, padded(draft.width), draft.width), draft, greedy)
                self._moved = walked.path
                return walked
            except Exception as error:
                if not self._takes_back(static, error):
                    raise
        return self.verify(draft)

    def _takes_back(self, static: StaticForward, error: Exception) -> bool:
        """Forget a pass of fixed shape that failed, and make no more of them; false where its error is for others."""
        if not static.give_up(error):
            return False
        self.rewind(len(self.token_ids))
        return True

    @property
    def static(self) -> StaticForward | None:
        """Verifies drafts in passes of fixed shape; None where nothing does, or a pass of any text has failed."""
        return None if self._static is None or self._static.failure is not None else self._static

    def _timed(self, draft: DraftTree, greedy: GreedyAcceptance | None = None) -> AbstractContextManager[None]:
        # Capture time says nothing about replay time; do not record it.
        usual = self.static is None or self.static.ready(draft.width, greedy)
        return self._clock.over(draft.width, self.model.device) if usual else nullcontext()

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        if self._moved is None:
            self.cache.keep(len(self.token_ids), path, len(self._pending))
        elif tuple(path) == self._moved[: len(path)]:
            self.cache.rewind(len(self.token_ids) + len(path))
        else:
            raise RuntimeError(f"the nodes {self._moved} were accepted, but {tuple(path)} are to be kept")
        self.token_ids += [self._pending[node] for node in path]
        self._pending, self._moved = (), None
        if not self._marked:
            self.cache.mark()
            self._marked = True

    def rewind(self, length: int) -> None:
        self.cache.rewind(length)
        del self.token_ids[length:]
        self._pending, self._moved = (), None

    def cost(self, width: int) -> float:
        return self.pass_times.cost(width) if self.packer is None else self.packer.cost(width)

    @property
    def can_rewind(self) -> bool:
        return self.cache.can_rewind

    @property
    def reusable(self) -> bool:
        return self.can_rewind or not self._pending

    def common_prefix(self, token_ids: Sequence[int]) -> int:
        return self.reach(min(shared_prefix(self.token_ids, token_ids), len(token_ids) - 1))

    def reach(self, length: int) -> int:
        return self.cache.reach(min(length, len(self.token_ids))) if self.reusable else 0

    def fork(self, length: int) -> EagerTarget:
        other = EagerTarget(
            self.model,
            self.branching,
            self.pass_times,
            marks=self.marks,
            cache=self.cache.copy(length),
            packer=self.packer,
            static=self.static,
        )
        other.token_ids = self.token_ids[:length]
        return other

    def shrink(self, length: int) -> None:
        self.rewind(length)
        self.cache.shrink()

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def _slots(self, draft: DraftTree) -> SlotCache | None:
        """Where a pass of fixed shape over `draft` takes place; None where the library's own forward verifies it."""
        # The first pass over a text makes its buffers.
        fixed = self.token_ids and draft.width <= MAX_WIDTH
        return self.cache if fixed and isinstance(self.cache, SlotCache) else None

    def _forward(self, draft: DraftTree, logits_to_keep: int = 0) -> torch.Tensor:
        """One pass over `draft` behind the committed text; logits [width, vocabulary], or of the last so many nodes."""
        logits = self.read([(draft, len(self.token_ids))], self.cache.states, logits_to_keep or None)
        return logits[-logits_to_keep:] if logits_to_keep else logits

    @torch.inference_mode()
    def read(
        self, rows: Sequence[tuple[DraftTree, int]], states: Cache, wanted: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """One pass over drafts, each behind so many committed tokens of a text of its own.

        Args:
            states: the keys and values of all these texts.
            wanted: places of the nodes whose logits are wanted, or how many of the last ones; None: all. Models that do
                not know how to leave some out may return more where this is a number.

        Returns:
            Logits [nodes, vocabulary].
        """
        device = self.model.device
        # An id outside the vocabulary cannot be looked up. The target never chooses one, so any stand-in is right.
        ids = torch.tensor([[token_id for draft, _ in rows for token_id in draft.token_ids]], device=device)
        ids = torch.where(ids < self._vocabulary, ids, 0)
        positions = [length + depth for draft, length in rows for depth in draft.depths]
        plain = len(rows) == 1 and rows[0][0].is_chain
        if isinstance(wanted, torch.Tensor):
            wanted = wanted.to(device)
        output = self._signature.call(
            (self.static and self.static.reader) or self.model,
            ids,
            states,
            position_ids=torch.tensor([positions], device=device),
            attention_mask=None if plain else tree_masks(rows, self.config, device, self.model.dtype),
            logits_to_keep=wanted,
        )
        logits: torch.Tensor = output.logits[0]
        return logits[wanted] if isinstance(wanted, torch.Tensor) and not self._signature.keeps_logits else logits
