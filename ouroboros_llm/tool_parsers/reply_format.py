"""How the replies of a model are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .deltas import Reply, ToolCall, reply_of
from .response_template import TemplateStream
from .section import Section
from .streaming import ReplyStream

_OBJECT = ('{"name": "', '", "arguments": ', "}")


@dataclass(frozen=True)
class ReplyFormat:
    """How the replies of a model are to be read.

    Attributes:
        sections: the marked parts that a reply may have.
        bare: a reply that is nothing but calls of offered tools, as JSON without markers, is read as calls too.
        frame: what stands before the name, between name and arguments, and after the arguments of one call.
        kept_tokens: special tokens that are markers, by id; text without them cannot be read.
        response_template: the tokenizer's own description of its replies; it stands in for sections.
    """

    sections: tuple[Section, ...] = ()
    bare: bool = False
    frame: tuple[str, str, str] = _OBJECT
    kept_tokens: Mapping[int, str] = field(default_factory=dict, hash=False)
    response_template: Mapping[str, Any] | None = field(default=None, hash=False)

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]] | None = None, *, prompt: str = "") -> Reply:
        """Take a whole reply apart. See `stream` for the arguments."""
        stream = self.stream(tools, prompt=prompt)
        return reply_of([*stream.push(text), *stream.end()])

    def stream(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: str = "",
        ids: Iterable[str | None] = (),
        about: str = "",
    ) -> ReplyStream | TemplateStream:
        """Take a reply apart while it comes: `push` its pieces, then `end`.

        Args:
            tools: function schemas that were offered; without any, calls are left in the text.
            prompt: the prompt with its special tokens, or its end: the chat template may have begun the reply.
            ids: of the calls in the conversation so far, which no call of this reply gets.
            about: what was asked, or whatever else tells the question from others: calls to which the model gives no
                id have one that comes from this.
        """
        # What is nothing but calls follows `frame`, whatever the template says of other replies.
        if self.response_template is not None and not self.bare:
            return TemplateStream(self.response_template, tools, prompt=prompt, ids=ids, about=about)
        return ReplyStream(self.sections, tools, bare=self.bare, prompt=prompt, ids=ids, about=about)

    def render(self, calls: Iterable[ToolCall]) -> str:
        """Calls as a model of this format writes them: `parse` of it is `calls`, but for their ids."""
        before, between, after = self.frame
        return "\n".join(
            before + call.name + between + json.dumps(call.arguments, ensure_ascii=False) + after for call in calls
        )
