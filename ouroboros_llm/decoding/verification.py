"""The one rule that makes drafting lossless."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .draft_tree import DraftTree

if TYPE_CHECKING:
    import torch

Choose = Callable[[int, list[int]], int | None]
"""(node, tokens emitted this round) -> the target's token after that node, or None to leave it to the next round."""


class Chooser(Protocol):
    """Makes the target's choices; `Sampler` is the one for users."""

    @property
    def plain(self) -> bool:
        """Whether every choice is the likeliest token, whatever the text."""

    def chooser(self, logits: torch.Tensor, likeliest: Sequence[int], context: Sequence[int]) -> Choose:
        """How to choose after the nodes of one pass.

        Args:
            logits: [width, vocabulary], as the model gave them.
            likeliest: [width], the argmax of each row.
            context: the text up to the root.
        """


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What one round emits."""

    token_ids: tuple[int, ...]
    """The target's own choices, in order."""
    path: tuple[int, ...]
    """The nodes that those choices followed, root first: as many as there are tokens."""


def accept(draft: DraftTree, choose: Choose, *, limit: int, end_token_ids: Collection[int]) -> Acceptance:
    """Walk the draft: at each node let the target choose, emit its choice, step into the child that guessed it.

    Whatever was drafted, every token is the target's choice after exactly the tokens before it: greedy output is the
    model's own, and sampled output has the model's own distribution, because each choice is one sample from it and
    drafts decide only how far one pass reaches (for point-mass drafts this equals the rejection rule of
    arXiv 2211.17192: accept with probability target_probs[token], else sample from what is left).

    The walk ends where no child agrees, after `limit` tokens, at one of `end_token_ids`, and where `choose` declines.
    """
    token_ids: list[int] = []
    path: list[int] = []
    node: int | None = 0
    while node is not None and len(token_ids) < limit:
        token_id = choose(node, token_ids)
        if token_id is None:
            break
        path.append(node)
        token_ids.append(token_id)
        node = None if token_id in end_token_ids else draft.child(node, token_id)
    return Acceptance(tuple(token_ids), tuple(path))
