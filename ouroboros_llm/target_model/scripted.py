"""A target without a model: logits computed from the text. The second implementation of `TargetModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..decoding.draft_tree import DraftTree
from ..decoding.target import Branching


class ScriptedTarget:
    """Answers every node with `logits_after(text up to and including the node)`; for tests and for replaying traces."""

    def __init__(
        self,
        logits_after: Callable[[tuple[int, ...]], torch.Tensor],
        branching: Branching = "tree",
        costs: Callable[[int], float] = lambda width: 1.0,
    ) -> None:
        """`logits_after` returns [vocabulary]; `costs` is what `cost` answers."""
        self._logits_after, self.branching, self.cost = logits_after, branching, costs
        self.prefill_branching = branching
        self.token_ids: list[int] = []
        self._pending: tuple[int, ...] = ()

    def prefill(self, token_ids: Sequence[int], draft: DraftTree | None = None, before: int = 0) -> torch.Tensor:
        self.token_ids = list(token_ids[:-1])
        return self.verify(draft or DraftTree.root(token_ids[-1]))

    def verify(self, draft: DraftTree) -> torch.Tensor:
        self._pending = draft.token_ids
        texts = [
            (*self.token_ids, *(draft.token_ids[node] for node in draft.path_to(last))) for last in range(draft.width)
        ]
        return torch.stack([self._logits_after(text) for text in texts])

    def keep(self, path: Sequence[int]) -> None:
        self.token_ids += [self._pending[node] for node in path]
        self._pending = ()

    def rewind(self, length: int) -> None:
        del self.token_ids[length:]
        self._pending = ()
