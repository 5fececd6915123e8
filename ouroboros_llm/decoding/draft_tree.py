"""The tree of guesses that one round verifies.

Node 0 is the root: the last emitted token, whose keys and values the target has not computed yet. Every other node
guesses the token after its parent. A chain is a tree without branches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

MAX_WIDTH = 64
"""Tokens in one pass at most, root included: the ancestors of a node fit one 64-bit word."""


@dataclass(frozen=True)
class DraftTree:
    """`width` nodes in an order where parents precede children; the root's parent is -1."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...] = (-1,)
    chances: tuple[float, ...] = (1.0,)
    """Per node: the estimated probability that the target chooses it, given that its parent was chosen."""
    sources: tuple[str, ...] = ("",)
    """Per node: who guessed it; the root's is empty."""
    evidence: tuple[Hashable, ...] = (None,)
    """Per node: what its chance was estimated from. Opaque to all but its source, which learns what became of it."""

    @classmethod
    def root(cls, token_id: int) -> DraftTree:
        """No guesses: a round over this tree is one step of plain decoding."""
        return cls((token_id,))

    @classmethod
    def chain(cls, token_ids: Sequence[int], source: str = "") -> DraftTree:
        """One guess after the other; the first token is the root."""
        width = len(token_ids)
        sources = ("", *[source] * (width - 1))
        return cls(tuple(token_ids), tuple(range(-1, width - 1)), (1.0,) * width, sources, (None,) * width)

    @property
    def width(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, self.width - 1))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Per node: steps from the root, whose depth is 0."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def ancestor_mask(self) -> npt.NDArray[np.bool_]:
        """[width, width]: whether the column is the row's node or one of its ancestors."""
        mask = np.eye(self.width, dtype=np.bool_)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        return {(parent, self.token_ids[node]): node for node, parent in enumerate(self.parents)}

    def child(self, node: int, token_id: int) -> int | None:
        """The child of `node` that holds `token_id`, if there is one."""
        return self._children.get((node, token_id))

    def path_to(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to `node`, both included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    def behind(self, token_ids: Sequence[int]) -> DraftTree:
        """The tree with a chain of tokens before its root."""
        if not token_ids:
            return self
        before, count = DraftTree.chain(token_ids), len(token_ids)
        return DraftTree(
            before.token_ids + self.token_ids,
            before.parents + tuple(parent + count for parent in self.parents),
            before.chances + self.chances,
            before.sources + self.sources,
            before.evidence + self.evidence,
        )

    def main_chain(self) -> DraftTree:
        """The chain from the root through the likeliest child each time, for models that cannot verify branches."""
        path = [0]
        while children := [n for n in range(path[-1] + 1, self.width) if self.parents[n] == path[-1]]:
            path.append(max(children, key=lambda node: self.chances[node]))
        return self.subtree(path)

    def subtree(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of `nodes` alone: ascending, from the root on, each with its parent."""
        renamed = {node: new for new, node in enumerate(nodes)} | {-1: -1}
        return DraftTree(
            tuple(self.token_ids[node] for node in nodes),
            tuple(renamed[self.parents[node]] for node in nodes),
            tuple(self.chances[node] for node in nodes),
            tuple(self.sources[node] for node in nodes),
            tuple(self.evidence[node] for node in nodes),
        )


class TreeBuilder:
    """Grows a `DraftTree` node by node, never wider than `width`; equal siblings are one node."""

    def __init__(self, root_token_id: int, width: int) -> None:
        self.width = max(1, min(width, MAX_WIDTH))
        self.token_ids, self.parents, self.path_chances = [root_token_id], [-1], [1.0]
        self._chances, self._sources, self._evidence = [1.0], [""], list[Hashable]([None])
        self._children: dict[tuple[int, int], int] = {}

    @property
    def room(self) -> int:
        return self.width - len(self.token_ids)

    def add(self, parent: int, token_id: int, chance: float, source: str, evidence: Hashable = None) -> int | None:
        """The child of `parent` with `token_id`, new or already there; None where there is no room for it."""
        node = self._children.get((parent, token_id))
        if node is None and self.room:
            node = self._children[parent, token_id] = len(self.token_ids)
            self.token_ids.append(token_id)
            self.parents.append(parent)
            self.path_chances.append(self.path_chances[parent] * chance)
            self._chances.append(chance)
            self._sources.append(source)
            self._evidence.append(evidence)
        return node

    def build(self, width: int | None = None) -> DraftTree:
        """The tree, or its first `width` nodes."""
        columns = (self.token_ids, self.parents, self._chances, self._sources, self._evidence)
        return DraftTree(*(tuple(column[:width]) for column in columns))  # type: ignore[arg-type]  # five types
