"""The walk down a draft where the logits are: which nodes greedy decoding accepts, and what else a round wants to know.

`verification.accept` says what is accepted; this finds the same nodes before anybody has read a number, so that their
keys and values can be moved in the same pass and the host waits for the device once, for one row of numbers.
"""

from __future__ import annotations

import numpy as np
import torch

from ...decoding.draft_tree import DraftTree
from ...decoding.target import DeviceAcceptance, GreedyAcceptance
from ...decoding.verification import accept
from .tree_attention import DraftInputs


def accepted(nodes: DraftInputs, likeliest: torch.Tensor) -> torch.Tensor:
    """[width], whether greedy decoding accepts each node; `likeliest` [width] are the target's choices.

    A node is where the walk gets to if it and all its ancestors were guessed rightly.
    """
    right = likeliest[nodes.parents] == nodes.guesses
    # The root has nothing to be guessed; the bits of nodes are those of `lineage`.
    bits = (right.long() << nodes.numbers).sum() | 1
    reached: torch.Tensor = (nodes.lineage & bits) == nodes.lineage
    return reached


def order(nodes: DraftInputs, accepted: torch.Tensor) -> torch.Tensor:
    """[width], the node whose keys and values belong to each place behind the text: in front those of the path, one
    behind the other, and everywhere else the place's own."""
    depths = nodes.positions[0] - nodes.length
    # Those that are not on the path go to a place of their own behind all others, whose content nobody reads.
    places = torch.where(accepted, depths, nodes.width)
    own = torch.cat([nodes.numbers, nodes.numbers[-1:]])
    return own.scatter(0, places, nodes.numbers)[:-1]


def found(
    accepted: torch.Tensor, likeliest: torch.Tensor, logits: torch.Tensor, nodes: DraftInputs, count: int
) -> torch.Tensor:
    """One row of 64-bit numbers, for `read`: a bit for each accepted node, the likeliest token after each node, and
    `count` of the likeliest with their chances among each other."""
    bits = (accepted.long() << nodes.numbers).sum()
    parts = [bits[None], likeliest]
    if count:
        top, ids = logits.topk(min(count, logits.shape[-1]))
        chances = top.float().softmax(-1)
        parts += [ids.flatten(), chances.view(torch.int32).long().flatten()]
    return torch.cat(parts)


def checked(walked: DeviceAcceptance, draft: DraftTree, greedy: GreedyAcceptance) -> DeviceAcceptance:
    """Compare the path of a walk with what `accept` makes of the same numbers.

    Raises:
        RuntimeError: it is another, or logits are no numbers, so the pass went wrong.
    """
    likeliest = walked.likeliest
    if min(likeliest) < 0:
        raise RuntimeError("logits are no numbers")
    right = accept(draft, lambda node, _: likeliest[node], limit=greedy.limit, end_token_ids=greedy.end_token_ids)
    if walked.path != right.path:
        raise RuntimeError(f"the nodes {walked.path} were accepted, but the likeliest tokens are those of {right.path}")
    return walked


def read(row: torch.Tensor, padded: int, width: int) -> DeviceAcceptance:
    """What `found` put into a row of a pass that was padded; the host waits for it here."""
    bits, *numbers = row.tolist()
    path = tuple(node for node in range(width) if bits >> node & 1)
    ids, chances = np.array(numbers[padded:], dtype=np.int64).reshape(2, -1)
    count = ids.size // padded
    if not count:
        return DeviceAcceptance(numbers[:width], (), path)
    of_nodes = (
        part.reshape(padded, count)[:width].tolist() for part in (ids, chances.astype(np.int32).view(np.float32))
    )
    successors = tuple(tuple(zip(*both, strict=True)) for both in zip(*of_nodes, strict=True))
    return DeviceAcceptance(numbers[:width], successors, path)
