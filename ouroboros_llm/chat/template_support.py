"""What a model's chat template takes, and how its replies are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..tool_parsers.deltas import InvalidToolCall, ToolCall
from ..tool_parsers.families import format_of
from ..tool_parsers.partial_json import object_of
from ..tool_parsers.reply_format import ReplyFormat


@dataclass(frozen=True)
class TemplateSupport:
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


_habits: WeakKeyDictionary[Any, tuple[Any, TemplateSupport]] = WeakKeyDictionary()


def detect_template_support(ouroboros: Any) -> TemplateSupport:
    """The habits of a loaded model."""
    tokenizer = getattr(ouroboros, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return TemplateSupport()
    template = tokenizer.chat_template or ""
    known, habits = _habits.get(tokenizer, (None, TemplateSupport()))
    if known != template:
        shown = arguments_form(tokenizer), takes_tools(tokenizer), takes_system(tokenizer)
        habits = TemplateSupport(format_of(tokenizer), *shown)
        _habits[tokenizer] = template, habits
    return habits


_PROBE = {"probe_key": "probe value"}
_PROBE_TEXT = '{"probe_key": "probe value"}'
ArgumentsForm = Literal["object", "text"]


def arguments_form(tokenizer: PreTrainedTokenizerBase) -> ArgumentsForm | None:
    """How the chat template wants the arguments of a call: as an object, or as JSON text. None: it shows no calls.

    Found out by rendering one: a template that writes objects as JSON quotes a text again; one that pastes text shows
    an object in Python's notation, or fails. Costs two renderings; ask once per tokenizer.
    """
    if not tokenizer.chat_template:
        return None
    as_object, as_text = _rendered(tokenizer, _PROBE), _rendered(tokenizer, _PROBE_TEXT)
    if "probe_tool" not in as_object + as_text:
        return None
    return "text" if _PROBE_TEXT in as_text and _PROBE_TEXT not in as_object else "object"


def takes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes down the tools that are offered; found out by rendering one."""
    if not tokenizer.chat_template:
        return False
    function = {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
    tools: list[Any] = [{"type": "function", "function": function}]
    for messages in (
        [{"role": "user", "content": "question"}],
        [{"role": "system", "content": "instructions"}, {"role": "user", "content": "question"}],
    ):
        try:
            if "probe_tool" in str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)):
                return True
        except Exception:  # a template may raise anything
            continue
    return False


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes down a system message; found out by rendering one."""
    messages = [{"role": "system", "content": "probe_instructions"}, {"role": "user", "content": "question"}]
    try:
        return "probe_instructions" in str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may raise anything
        return False


def _rendered(tokenizer: PreTrainedTokenizerBase, arguments: Any) -> str:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "tool_calls": [_entry("probe_tool", arguments, "call00000")]},
        {"role": "tool", "content": "result", "name": "probe_tool", "tool_call_id": "call00000"},
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may raise anything
        return ""


def _entry(name: str, arguments: Any, id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def template_tool_calls(
    calls: Sequence[ToolCall | InvalidToolCall], form: ArgumentsForm | None
) -> list[dict[str, Any]]:
    """`calls` as a message's `tool_calls` for the chat template; `form` is `arguments_form(tokenizer)`.

    Invalid calls keep their text, as an object if it happens to be one.
    """
    entries = []
    for call in calls:
        arguments: Any = call.arguments
        if form == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif form != "text" and isinstance(arguments, str):
            arguments = _object(arguments)
        entries.append(_entry(call.name or "", arguments, call.id))
    return entries


def _object(text: str) -> Any:
    try:
        return object_of(text)
    except ValueError:
        return text
