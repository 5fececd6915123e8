"""The same prompts through every method, in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ModelError, OuroborosError
from ..ouroboros import Ouroboros
from ..transformers_api import last_logits
from .methods import PLAIN, SECOND_PASS, Answer, Method, Question
from .prompts import Conversation, encode

WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Record:
    """One answer of one method."""

    question: Question
    method: str
    answer: Answer

    @property
    def key(self) -> tuple[int, int]:
        """What was asked, and in which repeat."""
        return self.question.number, self.question.repeat


class SideBySide:
    """Asks the methods in turn, prompt by prompt, and keeps what they answered, however it ends.

    Which method goes first rotates from prompt to prompt, so that none always profits from what the one before left
    in caches, or suffers from its heat. Later turns of a conversation follow the plain answer, so that all methods see
    the same prompt. The repeated method makes a second pass after the first.

    Attributes:
        records: every answer so far.
        gaps: by (prompt, repeat, method): how far the target's best logit was ahead of the method's token where its
            answer leaves the plain one.
        skipped: prompts that leave no room in the model's context.
    """

    def __init__(
        self,
        ouroboros: Ouroboros,
        methods: Mapping[str, Method],
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        repeats: int = 1,
    ) -> None:
        """`methods`: by name, "plain" among them."""
        self._ouroboros, self._methods, self._conversations = ouroboros, methods, conversations
        self._max_new_tokens, self._repeats = max_new_tokens, repeats
        self._on_answer: Callable[[Record], None] = lambda record: None
        self._plain: dict[tuple[int, int], tuple[int, ...]] = {}
        self.records: list[Record] = []
        self.gaps: dict[tuple[int, int, str], float] = {}
        self.skipped = 0

    @property
    def total(self) -> int:
        """Answers that a whole run gives, where no prompt is skipped."""
        turns = sum(1 + len(conversation.follow_ups) for conversation in self._conversations)
        return turns * self._repeats * len(self._methods)

    def warm_up(self) -> None:
        """A short generation per method that does not count. Raises ModelError where a method cannot run."""
        token_ids = encode(self._ouroboros, self._conversations[0].messages)
        token_ids = token_ids[: max(1, self._context_length - WARM_UP_TOKENS)]
        question = Question(-1, "warm-up", None, 0, -1, tuple(token_ids), WARM_UP_TOKENS)
        for name, method in self._methods.items():
            try:
                method(question)
            except OuroborosError:
                raise
            except (ValueError, NotImplementedError) as error:
                reason = str(error).partition("\n")[0]
                raise ModelError(
                    f"method {name} cannot run with {self._ouroboros.name}: {reason}; leave it out with --methods"
                ) from error

    def run(self, on_answer: Callable[[Record], None]) -> None:
        """Ask everything; `on_answer` gets each answer as it comes. If interrupted, what was answered stays."""
        self._on_answer = on_answer
        first_pass = [name for name in self._methods if name not in SECOND_PASS]
        second_pass = [name for name in self._methods if name in SECOND_PASS]
        for repeat in range(self._repeats):
            asked: list[Question] = []
            for conversation in self._conversations:
                for question in self._questions(conversation, repeat, len(asked)):
                    first = len(asked) % len(first_pass)
                    self._ask(question, first_pass[first:] + first_pass[:first])
                    asked.append(question)
            for question in asked:
                self._ask(question, second_pass)

    def _questions(self, conversation: Conversation, repeat: int, number: int) -> Iterator[Question]:
        """The turns of a conversation; each must be asked before the next."""
        messages = list(conversation.messages)
        for turn in range(1 + len(conversation.follow_ups)):
            if turn:
                said = self.text(self._plain[number + turn - 1, repeat])
                messages.append({"role": "assistant", "content": said})
                messages.append({"role": "user", "content": conversation.follow_ups[turn - 1]})
            token_ids = encode(self._ouroboros, messages)
            limit = min(self._max_new_tokens, self._context_length - len(token_ids))
            if limit < 1:
                self.skipped += 1 + len(conversation.follow_ups) - turn if not repeat else 0
                return
            yield Question(
                number + turn, conversation.name, conversation.category, turn, repeat, tuple(token_ids), limit
            )

    def _ask(self, question: Question, names: Sequence[str]) -> None:
        answers = {}
        for name in names:
            if self._ouroboros.model.device.type == "cuda":
                torch.cuda.synchronize(self._ouroboros.model.device)
            answers[name] = self._methods[name](question)
            record = Record(question, name, answers[name])
            self.records.append(record)
            if name == PLAIN:
                self._plain[record.key] = answers[name].token_ids
            self._on_answer(record)
        for name, answer in answers.items():
            self._compare(question, name, answer.token_ids)

    def _compare(self, question: Question, name: str, token_ids: tuple[int, ...]) -> None:
        plain = self._plain[question.number, question.repeat]
        position = first_difference(plain, token_ids)
        if position is not None and position < len(token_ids):
            text = [*question.token_ids, *token_ids[:position]]
            self.gaps[question.number, question.repeat, name] = logit_gap(
                self._ouroboros.model, text, token_ids[position]
            )

    def text(self, token_ids: Sequence[int]) -> str:
        """What an answer says."""
        return str(self._ouroboros.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def _context_length(self) -> int:
        return self._ouroboros.context_length or sys.maxsize


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two answers differ, the shorter one's end included; None: they are the same."""
    if one == other:
        return None
    pairs = zip(one, other, strict=False)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@torch.inference_mode()
def logit_gap(model: torch.nn.Module, token_ids: Sequence[int], token_id: int) -> float:
    """How far the best logit after `token_ids` is ahead of the one of `token_id`, by one forward of its own."""
    ids = torch.tensor([token_ids], device=next(model.parameters()).device)
    logits = last_logits(model, ids).float()
    return float(logits.max() - logits[token_id])
