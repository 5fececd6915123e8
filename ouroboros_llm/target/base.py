"""What the decoder asks of the model whose output must be reproduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch

from ..draft_tree import DraftTree

Branching = Literal["tree", "chain", "none"]
"""What one pass can verify: any draft, a draft without branches, or none."""


@runtime_checkable
class TargetModel(Protocol):
    """A model and the keys and values of the text it has read so far.

    A pass leaves its nodes *pending*; `keep` commits those that were accepted and drops the rest, so between rounds the
    target holds exactly `token_ids`.
    """

    @property
    def branching(self) -> Branching:
        """The widest kind of draft that `verify` takes."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The committed text: its keys and values are there."""

    def prefill(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read a text, reusing the longest prefix already there; logits [1, vocabulary] after its last token.

        The last token is left pending as the root of a draft without guesses: `keep((0,))` commits it.
        """

    def verify(self, draft: DraftTree) -> torch.Tensor:
        """One pass over `draft`, whose root follows the committed text; logits [width, vocabulary] after each node.

        Leaves all nodes pending and changes nothing that is committed.
        """

    def keep(self, path: Sequence[int]) -> None:
        """Commit the pending nodes of `path` (root first, each the parent of the next) and drop the others."""

    def rewind(self, length: int) -> None:
        """Forget the text after its first `length` tokens, and whatever is pending."""

    def cost(self, width: int) -> float:
        """The time of a pass over `width` tokens in units of a pass over one."""
