"""What drafting has learned in one scope, and the sources that draw on it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..phrase_pool.base import NoteStore, PhrasePool
from .base import Source
from .calibration import Calibration
from .phrases import PhraseSource, RunningText
from .token_recycling import Recycling, SuccessorTable


@dataclass(eq=False)
class LearnedState:
    """What was learned of one model's choices in one scope, beside the phrases."""

    successors: SuccessorTable = field(default_factory=SuccessorTable)
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def recall(cls, pool: PhrasePool, model: str, others: Sequence[PhrasePool] = ()) -> LearnedState:
        """What the pool keeps for a model, by its fingerprint; nothing where the pool keeps no notes.

        `others`: pools that are read behind it. A scope that has no calibration yet begins with theirs, the first
        there is: how far their phrases can be trusted was found out where they were said.
        """
        memory, name = cls(), f"{model}/calibration"
        known = (one.recall(name).get(name) for one in (pool, *others) if isinstance(one, NoteStore))
        memory.calibration = next((Calibration.from_bytes(note) for note in known if note), memory.calibration)
        if not isinstance(pool, NoteStore):
            return memory
        start = f"{model}/successors/"
        memory.successors.load({int(name[len(start) :]): note for name, note in pool.recall(start).items()})
        return memory

    def remember(self, pool: PhrasePool, model: str, also: Sequence[PhrasePool] = ()) -> None:
        """Give the pool what is new since the last time.

        `also`: further pools that hold the answers. They get the calibration alone, which names no tokens: successors
        are of prompts as well, and they stay where they were seen.
        """
        calibration = {f"{model}/calibration": self.calibration.to_bytes()}
        if isinstance(pool, NoteStore):
            changed = self.successors.take_changed()
            pool.remember({f"{model}/successors/{token_id}": note for token_id, note in changed.items()} | calibration)
        for other in also:
            if isinstance(other, NoteStore):
                other.remember(calibration)


def sources(
    drafters: Collection[str],
    memory: LearnedState,
    *,
    text: Source | None = None,
    answer: Source | None = None,
    write: PhrasePool | None = None,
    read: Sequence[PhrasePool] = (),
    documents: PhrasePool | None = None,
    corpora: Sequence[PhrasePool] = (),
    learns: bool = True,
    after: Literal["prompt", "answer"] = "answer",
    sampling: bool = False,
) -> list[Source]:
    """The sources that `drafters` name, without the draft model's, the most telling first.

    Args:
        text: the running text; None: a new one.
        answer: of what was answered to the prompt before, if that is known.
        write: the pool of the session's scope; `learns`: whether rejected-but-right runs go there.
        read: pools of further scopes.
        after: what is looked up in pools of answers, where the text is opened anew in the middle of an answer.
        documents, corpora: pools of texts that answers may quote.
        sampling: whether the target samples.
    """
    found: list[Source] = []
    if "phrases" in drafters:
        if answer is not None:
            found.append(answer)
        found.append(text or RunningText())
        if write is not None:
            found.append(PhraseSource("phrases", write, learns=learns, after=after))
        found += [PhraseSource("shared", pool, after=after) for pool in read]
    if "retrieval" in drafters:
        texts = [*corpora, *([] if documents is None else [documents])]
        found += [PhraseSource("retrieval", pool, after="prompt") for pool in texts]
    if "recycling" in drafters:
        found.append(Recycling(memory.successors, sampling=sampling))
    return found
