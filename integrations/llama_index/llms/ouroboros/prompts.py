"""LlamaIndex messages and prompts, as the model gets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from ouroboros_llm import PromptError

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
    MessageRole.TOOL: "tool",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in both forms; which of them is sent, only the loaded model can tell."""

    text: str
    """For a model without a chat template, and wherever the user formats prompts."""
    messages: list[dict[str, str]] | None = None
    """For a model with a chat template; None: always the text."""

    def form(self, has_template: bool) -> str | list[dict[str, str]]:
        return self.messages if has_template and self.messages is not None else self.text


def chat_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages in an order that chat templates accept: at most one system message, at the front, then turns.

    Messages of one role in a row become one, a line break between them; tool results stay apart, as each answers
    another call. A system message after the first turn is sent as the user's: many templates refuse it where it stands,
    and in front it would lose its place in time (an agent's "stop now" is about what was just said) and change the
    prefix whose keys and values a session keeps.

    Raises:
        PromptError: a message holds something other than text.
    """
    merged: list[dict[str, str]] = []
    for message in messages:
        role, content = _ROLES[message.role], _text(message)
        if role == "system" and merged and merged[-1]["role"] != "system":
            role = "user"
        if merged and merged[-1]["role"] == role and role != "tool":
            merged[-1]["content"] += "\n" + content
        else:
            merged.append({"role": role, "content": content})
    return merged


def _text(message: ChatMessage) -> str:
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise PromptError(
                f"messages must hold text only, but a {message.role.value} message holds a {type(block).__name__}; "
                "pass its text as a TextBlock, or leave it out"
            )
    return message.content or ""
