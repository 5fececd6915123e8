"""What the decoder asks of the model whose output must be reproduced."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from .draft_tree import DraftTree
from .drafter import Successors

if TYPE_CHECKING:
    import torch


Branching = Literal["tree", "chain", "none"]
"""What one pass can verify: any draft, a draft without branches, or none."""


@dataclass(frozen=True, slots=True)
class GreedyAcceptance:
    """That the target's choice after every node is its likeliest token, and how far the walk may go."""

    limit: int
    """Tokens to emit at most, one or more."""
    end_token_ids: Collection[int] = ()
    successors: int = 0
    """How many of the likeliest tokens after each node are wanted."""

    @property
    def count(self) -> int:
        """How many of them are looked for: of less than two there are no chances."""
        return max(self.successors, 2) if self.successors else 0

    def guesses(self, draft: DraftTree) -> list[int]:
        """Per node: the token that accepts this node; -1 if it can never be accepted."""
        return [
            token_id
            if 0 < node
            and draft.depths[node] < self.limit
            and token_id not in self.end_token_ids
            and draft.child(draft.parents[node], token_id) == node
            else -1
            for node, token_id in enumerate(draft.token_ids)
        ]


class DeviceAcceptance(NamedTuple):
    """What a walk found, per node of the draft, and its path, root first."""

    likeliest: list[int]
    successors: tuple[Successors, ...]
    path: tuple[int, ...]


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
    def prefill_branching(self) -> Branching:
        """The widest kind of draft that `prefill` takes."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The committed text: its keys and values are there."""

    def prefill(self, token_ids: Sequence[int], draft: DraftTree | None = None, before: int = 0) -> torch.Tensor:
        """Read a text, reusing the longest prefix already there, and verify `draft` in the same pass.

        The draft's root is the text's last token; None is a draft without guesses. The text up to the root is
        committed, the nodes are left pending.

        Returns:
            Logits [n + width, vocabulary]: after the last n tokens before the root, n being `before` or as many of them
            as the last pass read, and after each node.
        """

    def verify(self, draft: DraftTree) -> torch.Tensor:
        """One pass over `draft`, whose root follows the committed text; logits [width, vocabulary] after each node,
        which are there until the model's next pass.

        Leaves all nodes pending and changes nothing that is committed.
        """

    def keep(self, path: Sequence[int]) -> None:
        """Commit the pending nodes of `path` (root first, each the parent of the next) and drop the others."""

    def rewind(self, length: int) -> None:
        """Forget the text after its first `length` tokens, and whatever is pending."""

    def cost(self, width: int) -> float:
        """The time of a pass over `width` tokens in units of a pass over one."""


@runtime_checkable
class WalkingTarget(TargetModel, Protocol):
    """A target that can find out by itself which nodes greedy decoding accepts."""

    def walk(self, draft: DraftTree, greedy: GreedyAcceptance) -> DeviceAcceptance | torch.Tensor:
        """As `verify`, and the walk down `draft` that `verification.accept` makes where the target's choices are its
        likeliest tokens; logits where that cannot be done in the pass. After a walk `keep` takes its path alone, or the
        beginning of it."""


@runtime_checkable
class KeptTarget(TargetModel, Protocol):
    """A target that can go on from what another turn left in it."""

    @property
    def can_rewind(self) -> bool:
        """Whether `reach` reaches every length."""

    @property
    def reusable(self) -> bool:
        """Whether a next text can go on from here: false after a pass that failed, unless that can be taken back."""

    def common_prefix(self, token_ids: Sequence[int]) -> int:
        """Tokens of `token_ids` that need no prefill, never all of them: the last one's logits are wanted."""

    def reach(self, length: int) -> int:
        """The longest text of at most `length` tokens that `rewind` can go back to without reading it again."""

    def fork(self, length: int) -> KeptTarget:
        """Another target that holds the first `length` tokens, to which `reach` must reach, in storage of its own."""

    def shrink(self, length: int) -> None:
        """Rewind to `length` and free the memory behind it."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and other states, spare room included."""


class PassBatcher(Protocol):
    """Makes passes of several texts of one model in one forward pass."""

    def make(self, wanted: Sequence[Pass]) -> dict[Pass, torch.Tensor | None]:
        """Make the first of `wanted`, and others with it where that pays: logits of each that was made.

        None stands for a pass that its maker has to make alone.
        """


@dataclass(eq=False, slots=True)
class Pass:
    """One forward pass that is wanted of a target: `verify`, or `prefill` where there is a text to read."""

    target: TargetModel
    draft: DraftTree
    text: Sequence[int] | None = None
    before: int = 0
    """As for `prefill`."""
    greedy: GreedyAcceptance | None = None
    """Of a pass without a text whose choices are the target's likeliest tokens."""
    seconds: float = 0.0
    """What the pass took; on an accelerator, where it was made alone, until it was handed over."""

    @property
    def packer(self) -> PassBatcher | None:
        """Makes it together with other passes of the same model; None where it can only be made alone."""
        # Not in the protocol: targets that know nothing of packing are made alone.
        packer: PassBatcher | None = getattr(self.target, "packer", None)
        return packer

    def make(self) -> torch.Tensor | DeviceAcceptance:
        """Make it alone; what a walk found, where it is greedy and its target can do that, else logits."""
        walk, began = getattr(self.target, "walk", None), perf_counter()
        found: torch.Tensor | DeviceAcceptance
        found = self.logits() if self.greedy is None or walk is None else walk(self.draft, self.greedy)
        self.seconds = perf_counter() - began
        return found

    def logits(self) -> torch.Tensor:
        """Make it alone; logits as `verify` and `prefill` return them."""
        if self.text is None:
            return self.target.verify(self.draft)
        return self.target.prefill(self.text, self.draft, self.before)


def ask(wanted: Pass) -> Generator[Pass, torch.Tensor | None, torch.Tensor | DeviceAcceptance]:
    """What comes of a pass that whoever is asked may make, together with others, and then sends the logits; who sends
    None has it made here."""
    logits = yield wanted
    return wanted.make() if logits is None else logits
