"""What a model's chat template takes, and how its replies are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from .families import format_of
from .formats import ReplyFormat
from .templates import ArgumentsForm, arguments_form, takes_system, takes_tools


@dataclass(frozen=True)
class Habits:
    """What a model's chat template takes, and how its replies are read."""

    format: ReplyFormat = ReplyFormat()
    form: ArgumentsForm | None = "object"
    takes_tools: bool = True
    takes_system: bool = True

    @property
    def begins_replies(self) -> bool:
        """Whether the reply may begin in the prompt."""
        kinds = {section.kind for section in self.format.sections}
        return self.format.response_template is not None or not kinds.isdisjoint({"reasoning", "header"})


_habits: WeakKeyDictionary[Any, tuple[Any, Habits]] = WeakKeyDictionary()


def habits_of(ouroboros: Any) -> Habits:
    """The habits of a loaded model."""
    tokenizer = getattr(ouroboros, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return Habits()
    template = tokenizer.chat_template or ""
    known, habits = _habits.get(tokenizer, (None, Habits()))
    if known != template:
        shown = arguments_form(tokenizer), takes_tools(tokenizer), takes_system(tokenizer)
        habits = Habits(format_of(tokenizer), *shown)
        _habits[tokenizer] = template, habits
    return habits
