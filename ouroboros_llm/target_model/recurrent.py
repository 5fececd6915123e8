"""Models whose state cannot be rewound (Mamba, RWKV, hybrids with recurrent layers): one token a pass, no drafts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..decoding.draft_tree import DraftTree
from ..decoding.target import Branching
from ..transformers_api import check_generates, forward_signature
from .eager import shared_prefix
from .recurrent_state import RecurrentState


class RecurrentTarget:
    """A `TargetModel` that carries whatever state the model returns from one pass to the next."""

    branching: Branching = "none"
    prefill_branching: Branching = "none"

    can_rewind = False

    def __init__(
        self,
        model: PreTrainedModel,
        continues: bool = False,
        *,
        marks: bool = False,
        states: RecurrentState | None = None,
    ) -> None:
        """`continues`: whether passes over several tokens go on from a state rightly, as `probe` found; `marks`: keep
        what it takes to come back to the end of a prompt.

        Raises ModelError where the model returns no state to carry, as encoder-decoder models and encoders do;
        LibraryVersionError where the library does not say by which name.
        """
        self.model, self._continues, self._marks, self._marked = model, continues, marks, True
        self.token_ids: list[int] = []
        self._states = states or RecurrentState(lambda: None)
        self._pending: tuple[int, ...] = ()
        check_generates(model)
        self._signature = forward_signature(model)

    def prefill(self, token_ids: Sequence[int], draft: DraftTree | None = None, before: int = 0) -> torch.Tensor:
        self.rewind(self.common_prefix(token_ids))
        self._marked = not self._marks
        # In one pass: continuing a recurrent state by many tokens is not something every model does right.
        unread = token_ids[len(self.token_ids) :]
        logits = self._forward(unread)[-1:]
        self.token_ids += unread[:-1]
        return logits

    def verify(self, draft: DraftTree) -> torch.Tensor:
        return self._forward(draft.token_ids)

    def keep(self, path: Sequence[int]) -> None:
        self.token_ids += [self._pending[-1] for _ in path]
        self._pending = ()
        self._states.length = len(self.token_ids)
        if not self._marked:
            self._states.mark()
            self._marked = True

    def rewind(self, length: int) -> None:
        self._states.rewind(length)
        del self.token_ids[length:]
        self._pending = ()

    @property
    def reusable(self) -> bool:
        return self._continues and not self._pending

    def common_prefix(self, token_ids: Sequence[int]) -> int:
        return self.reach(min(shared_prefix(self.token_ids, token_ids), len(token_ids) - 1))

    def reach(self, length: int) -> int:
        return self._states.reach(min(length, len(self.token_ids))) if self.reusable else 0

    def fork(self, length: int) -> RecurrentTarget:
        other = RecurrentTarget(self.model, self._continues, marks=self._marks, states=self._states.copy(length))
        other.token_ids = self.token_ids[:length]
        return other

    def shrink(self, length: int) -> None:
        self.rewind(length)

    @property
    def nbytes(self) -> int:
        return self._states.nbytes

    def cost(self, width: int) -> float:
        return float(width)

    @torch.inference_mode()
    def _forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        self._pending = tuple(token_ids)
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        # Left alone, some models count from zero in every pass.
        start = len(self.token_ids) if self._states.now is not None else 0
        positions = torch.arange(start, start + len(token_ids), device=ids.device)[None]
        output = self._signature.call(self.model, ids, self._states.now, position_ids=positions)
        self._states.now = self._signature.cache_of(output)
        logits: torch.Tensor = output.logits[0]
        return logits
