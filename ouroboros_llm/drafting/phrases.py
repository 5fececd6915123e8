"""Guesses from phrases: what followed the text's own ending before, here or in earlier texts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

from ..decoding.drafter import Round
from ..phrase_pool.base import ANSWER, MATCH_LIMIT, PhrasePool
from ..phrase_pool.memory import MemoryPool
from .base import Guess, Guesses

_WINDOW = "lookahead"

_MIN_REJECTED_RUN = 3
"""Shorter runs of a rejected draft say little: one token and the target's next."""

_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 21, 33)
_SHARES = (0.02, 0.1, 0.3, 0.5, 0.75, 0.95)
_COUNTS = (2, 3, 5, 9)
"""Bounds of the classes in which guesses are equally good."""

Cursor = tuple[tuple[int, ...], int, int, int]
"""A place in a phrase: its tokens, how many of them are passed, how many tokens before agree, and how often it was
seen."""


class Branch:
    """The phrases that agree with a path so far."""

    __slots__ = ("_by_token", "cursors")

    def __init__(self, cursors: list[Cursor]) -> None:
        self.cursors = cursors
        self._by_token: dict[int, list[Cursor]] | None = None

    @property
    def by_token(self) -> dict[int, list[Cursor]]:
        """The phrases that go on, by their next token."""
        if self._by_token is None:
            self._by_token = {}
            for token_ids, passed, length, count in self.cursors:
                if passed < len(token_ids):
                    ahead = (token_ids, passed + 1, length + 1, count)
                    self._by_token.setdefault(token_ids[passed], []).append(ahead)
        return self._by_token


class PhraseSource:
    """Continuations of the longest suffixes found in a pool, weighed by match length and count."""

    def __init__(
        self, name: str, pool: PhrasePool, *, learns: bool = False, after: Literal["prompt", "answer"] = "answer"
    ) -> None:
        """`learns`: add rejected-but-right runs to the pool; `after`: whether what is looked up may reach back into
        the prompt, or begins with the answer, as what pools of answers hold does."""
        self.name, self.pool, self._learns, self._after = name, pool, learns, after
        self._answer_start = 0

    def open(self, context: Sequence[int]) -> None:
        self._answer_start = len(context)

    def start(self, context: Sequence[int]) -> Branch | None:
        start = len(context) - MATCH_LIMIT
        tail = list(context[max(start, 0) :])
        if self._after == "answer" and start < self._answer_start:
            tail = [ANSWER, *context[self._answer_start :]]
        phrases = self.pool.match(tail)
        return Branch([(p.token_ids, 0, p.match_length, p.count) for p in phrases]) if phrases else None

    def follow(self, state: Branch, token_id: int) -> Branch | None:
        cursors = state.by_token.get(token_id)
        return Branch(cursors) if cursors else None

    def guesses(self, state: Branch) -> Guesses | None:
        summary, total, longest = [], 0.0, 0
        for token_id, cursors in state.by_token.items():
            weight, length, count = 0.0, 0, 0
            for _, _, ahead, seen in cursors:
                # A longer match is rarer and says more; weights grow as fast as matches of that length get rarer.
                weight += seen * 4.0 ** min(ahead - 1, 8)
                length = max(length, ahead - 1, 1)
                count += seen
            summary.append((token_id, weight, length, count))
            total += weight
            longest = max(longest, length)
        if not summary:
            return None
        by_token = {
            token_id: Guess(
                (
                    self.name,
                    bisect_right(_LENGTHS, length),
                    bisect_right(_SHARES, weight / total),
                    bisect_right(_COUNTS, count),
                ),
                prior=(weight / total) ** 1.2 * (1 - 0.62 / length**0.7),
            )
            for token_id, weight, length, count in summary
        }
        return Guesses(by_token, Guess((self.name, "other", min(longest, 8)), prior=0.02), longest)

    def learn(self, round: Round) -> None:
        if self._learns:
            for run in rejected_but_right(round):
                self.pool.add(run, answer=False)


class RunningText:
    """The text so far, prompt and output, as a pool of its own: prompt lookup falls out of it."""

    def __init__(self, name: str = "text") -> None:
        self.name, self.pool = name, MemoryPool()
        self._phrases = PhraseSource(name, self.pool, after="prompt")

    def open(self, context: Sequence[int]) -> None:
        self.pool.extend(context)

    def start(self, context: Sequence[int]) -> Branch | None:
        return self._phrases.start(context)

    def follow(self, state: Branch, token_id: int) -> Branch | None:
        return self._phrases.follow(state, token_id)

    def guesses(self, state: Branch) -> Guesses | None:
        return self._phrases.guesses(state)

    def learn(self, round: Round) -> None:
        self.pool.extend(round.token_ids)


def rejected_but_right(round: Round) -> list[tuple[int, ...]]:
    """What the target says after rejected nodes: each rejected guess, the target's own choices as far as the draft
    happens to hold them, and one more. Maximal runs of at least three tokens (after Ouroboros, arXiv 2402.13720).
    """
    draft, rejected = round.draft, set(range(1, round.draft.width)) - set(round.path)
    runs = []
    for node in sorted(rejected):
        if draft.sources[node] == _WINDOW:
            continue  # a window stands where its tokens do not belong; it gathers its own runs
        if round.likeliest[draft.parents[node]] == draft.token_ids[node] and draft.parents[node] in rejected:
            continue  # the run that started above goes through here
        run, at = [draft.token_ids[node]], node
        while (child := draft.child(at, round.likeliest[at])) is not None:
            run.append(draft.token_ids[child])
            at = child
        run.append(round.likeliest[at])
        if len(run) >= _MIN_REJECTED_RUN:
            runs.append(tuple(run))
    return runs
