"""The whole algorithm: rounds of draft, verify, accept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from .draft_tree import MAX_WIDTH, DraftTree
from .drafter import Budget, Drafter, Round, Successors
from .target import Branching, DeviceAcceptance, GreedyAcceptance, Pass, TargetModel, ask
from .verification import Choose, Chooser, accept

if TYPE_CHECKING:
    import torch


Cost = Callable[[int], float]
"""Time of a pass by width, in units of a pass over one token."""

PROMPT_POSITIONS = 8
"""Tokens at the end of a prompt whose successors are looked at. Reading the output head once, they come for free; the
head over a whole prompt would not."""


class Decoder:
    """Emits what the target model alone would emit, several tokens per pass where its drafter guesses well."""

    def __init__(
        self,
        target: TargetModel,
        drafter: Drafter,
        *,
        width: int | None = None,
        successors: int = 0,
        prefill_drafts: bool = True,
    ) -> None:
        """`width`: nodes of every draft at most, root included; None: as many as pay by the target's own pass times.
        `successors`: how many of the likeliest tokens after each node the drafter gets to see. `prefill_drafts`:
        whether the pass over the prompt carries a draft."""
        self.target, self.drafter, self.width = target, drafter, width
        self._successors, self._prefill_drafts = successors, prefill_drafts

    def rounds(
        self, prompt: Sequence[int], sampler: Chooser, *, limit: int, end_token_ids: Collection[int] = ()
    ) -> Iterator[Round]:
        """Decode `prompt`; the first round is the prefill. Stops after `limit` tokens or at one of `end_token_ids`.

        The generator may be abandoned at any point: the next call starts from what the target has committed.
        """
        steps = self.steps(prompt, sampler, limit=limit, end_token_ids=end_token_ids)
        return (step for step in steps if isinstance(step, Round))

    def steps(
        self, prompt: Sequence[int], sampler: Chooser, *, limit: int, end_token_ids: Collection[int] = ()
    ) -> Generator[Pass | Round, torch.Tensor | None, None]:
        """As `rounds`, but before each the pass that it wants: whoever made that, together with others of the same
        model, sends its logits; where None is sent it is made here."""
        context, left = list(prompt), limit
        self.drafter.open(context)
        branching = self.target.prefill_branching if self._prefill_drafts else "none"
        draft = self._draft(context, left, branching, end_token_ids, prefill_cost(self.target.cost))
        before = PROMPT_POSITIONS if self._successors else 0
        wanted = Pass(self.target, draft, context, before)
        found = yield from ask(wanted)
        assert not isinstance(found, DeviceAcceptance)  # it would know nothing of the text before the root
        read, found = self._read(context, found[: -draft.width]), found[-draft.width :]
        while True:
            began = perf_counter()
            likeliest, successors, choose = self._choices(found, sampler, context)
            seconds = wanted.seconds + perf_counter() - began
            accepted = accept(draft, choose, limit=left, end_token_ids=end_token_ids)
            self.target.keep(accepted.path)
            context += accepted.token_ids
            left -= len(accepted.token_ids)
            round = Round(draft, accepted.token_ids, accepted.path, tuple(likeliest), successors, read, seconds)
            self.drafter.learn(round)
            yield round
            read = ()
            if not left or (accepted.token_ids and accepted.token_ids[-1] in end_token_ids):
                return
            # A choice that was left open is decided by a pass over its token alone.
            branching = self.target.branching if accepted.token_ids else "none"
            draft = self._draft(context, left, branching, end_token_ids, self.target.cost)
            greedy = GreedyAcceptance(left, end_token_ids, self._successors) if sampler.plain else None
            wanted = Pass(self.target, draft, greedy=greedy)
            found = yield from ask(wanted)

    def _choices(
        self, found: torch.Tensor | DeviceAcceptance, sampler: Chooser, context: Sequence[int]
    ) -> tuple[list[int], tuple[Successors, ...], Choose]:
        """Per node of a pass the likeliest token, the likeliest few, and the target's choices."""
        if isinstance(found, DeviceAcceptance):
            return found.likeliest, found.successors, lambda node, _: found.likeliest[node]
        likeliest, successors = likeliest_tokens(found, self._successors)
        return likeliest, successors, sampler.chooser(found, likeliest, context)

    def _read(self, context: Sequence[int], logits: torch.Tensor) -> tuple[tuple[int, Successors], ...]:
        """The tokens before the root whose logits [n, vocabulary] a prefill gave, with their successors."""
        _, successors = likeliest_tokens(logits, self._successors) if len(logits) else ([], ())
        return tuple(zip(context[-1 - len(logits) : -1], successors, strict=False))

    def _draft(
        self, context: Sequence[int], left: int, branching: Branching, end_token_ids: Collection[int], cost: Cost
    ) -> DraftTree:
        width = MAX_WIDTH if self.width is None else self.width
        budget = Budget(width, left - 1, cost if self.width is None else None, end_token_ids)
        if branching == "none" or min(width - 1, budget.depth) < 1:
            return DraftTree.root(context[-1])
        return fit(self.drafter.draft(context, budget), context[-1], budget, branching)


def prefill_cost(cost: Cost) -> Cost:
    """What a draft costs in the pass over a prompt: its tokens fill the pass already, so every node takes as long as
    the last ones of the widest draft do in a pass of their own."""
    slope = (cost(MAX_WIDTH) - cost(MAX_WIDTH // 2)) / (MAX_WIDTH // 2)
    return lambda width: 1 + slope * (width - 1)


def likeliest_tokens(logits: torch.Tensor, count: int) -> tuple[list[int], tuple[Successors, ...]]:
    """Per row of logits [width, vocabulary]: the likeliest token, and so many of the likeliest with their chances.

    The chances are probabilities among those tokens alone: a sum over the vocabulary would take longer than it is worth
    to drafters, who calibrate what they are told.
    """
    if not count:
        return logits.argmax(-1).tolist(), ()
    top, ids = logits.topk(min(max(count, 2), logits.shape[-1]))
    if logits.is_cuda:
        likeliest, top, ids = _fetched(logits, top, ids)
    else:
        # Which of two equal logits comes first is for argmax to say, as it is in the library's own loop.
        tied = (top[:, 0] == top[:, 1]).tolist()
        likeliest = [int(logits[row].argmax()) if tie else int(ids[row, 0]) for row, tie in enumerate(tied)]
    chances = top.float().softmax(-1).tolist()
    return likeliest, tuple(tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), chances, strict=True))


def _fetched(
    logits: torch.Tensor, top: torch.Tensor, ids: torch.Tensor
) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The argmax of each row, and `top` and `ids` on the CPU, all in one copy: the only one that a round waits for."""
    import torch

    count = top.shape[1]
    # Double precision holds tokens' numbers and logits of any other precision alike.
    fetched = torch.cat([logits.argmax(-1, keepdim=True), ids, top.double()], 1).cpu()
    return fetched[:, 0].long().tolist(), fetched[:, 1 + count :], fetched[:, 1 : 1 + count].long()


def fit(draft: DraftTree, root_token_id: int, budget: Budget, branching: Branching) -> DraftTree:
    """What of `draft` may be verified: no node past the end of the text, nothing the target cannot take."""
    if draft.token_ids[0] != root_token_id:
        raise ValueError(f"draft must start from the last token, {root_token_id}, but its root is {draft.token_ids[0]}")
    if branching == "chain" and not draft.is_chain:
        draft = draft.main_chain()
    if draft.width <= budget.width and max(draft.depths) <= budget.depth:
        return draft
    # Parents precede children, so what is cut never leaves an orphan.
    return draft.subtree([node for node in range(min(draft.width, budget.width)) if draft.depths[node] <= budget.depth])
