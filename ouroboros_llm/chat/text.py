"""Between text and tokens: prompts in, pieces of text out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from ..errors import PromptError

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text as it is (no template), token ids, or chat messages."""

HALVES = re.compile("[\ud800-\udfff]")
"""Halves of characters, as broken JSON and file names leave them. No tokenizer takes them."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    answering: bool = True,
) -> list[int]:
    """Token ids of a prompt; with `answering`, messages end with the opening of an answer.

    Text gets the tokenizer's own special tokens and no chat template; messages go through the chat template straight to
    tokens, because a template's text may already hold the special tokens that the tokenizer would add again.

    Raises:
        PromptError: the prompt is empty or of another type, or the chat template refuses it.
    """
    if isinstance(prompt, str):
        token_ids = list(tokenizer(prompt)["input_ids"]) if prompt else []
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(item, Mapping) for item in prompt):
        messages = [dict(cast(Mapping[str, Any], item)) for item in prompt]
        token_ids = _encode_messages(tokenizer, messages, tools, answering)
    else:
        token_ids = _checked_ids(prompt)
    if not token_ids:
        raise PromptError("prompt is empty; expected text, chat messages or token ids with at least one token")
    return token_ids


def _encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    answering: bool,
) -> list[int]:
    if not tokenizer.chat_template:
        raise PromptError(
            "prompt is a list of messages, but the tokenizer has no chat template; pass text or token ids"
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages,
            tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=answering,
            tokenize=True,
            return_dict=True,
        )
    except Exception as error:  # a template may raise anything, jinja's own errors and plain ones
        if any(HALVES.search(str(message.get("content"))) for message in messages):
            raise PromptError(
                "messages hold half of a character (a lone surrogate), which no tokenizer reads"
            ) from error
        raise PromptError(f"the model's chat template refused the messages: {error}") from error
    return list(encoded["input_ids"])


def _checked_ids(prompt: Any) -> list[int]:
    ids = isinstance(prompt, Sequence) and all(isinstance(item, Integral) and int(item) >= 0 for item in prompt)
    if not ids or isinstance(prompt, bytes):
        raise PromptError(
            "prompt must be text, a list of messages ({'role': ..., 'content': ...}) or a list of token ids, "
            f"but got {type(prompt).__name__}: {str(prompt)[:80]}"
        )
    return [int(token_id) for token_id in prompt]


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of what the token ids mean: two tokenizers share it only if every id stands for the same token."""
    digest = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{token_id}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class Detokenizer:
    """Text of a growing run of tokens, in pieces that never split a character.

    A token may hold a part of a character, or decode differently by what stands before it. So every piece is the
    difference between two decodings that start at the same earlier token.
    """

    _LONGEST_CHARACTER = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kept_tokens: Mapping[int, str] | None = None) -> None:
        """`kept_tokens`: special tokens that are shown as their text; all others are left out."""
        self._tokenizer = tokenizer
        self._kept_tokens = kept_tokens or {}
        self._token_ids: list[int] = []
        self._start = self._done = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        if token_id in self._kept_tokens:
            return self.flush() + self._keep(token_id)
        self._token_ids.append(token_id)
        # Bytes that still are no character after so many tokens never will be one.
        waits = len(self._token_ids) - self._done < self._LONGEST_CHARACTER
        return self._take(waits)

    def flush(self) -> str:
        """What was held back, incomplete characters as replacement characters."""
        return self._take(waits=False)

    def _keep(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        # What follows is decoded without what stands before: bytes on both sides are never one character.
        self._start = self._done = len(self._token_ids)
        return self._kept_tokens[token_id]

    def _take(self, waits: bool) -> str:
        text = self._decode(len(self._token_ids))
        if waits and text.endswith("\ufffd"):
            return ""
        piece = text[len(self._decode(self._done)) :]
        self._start, self._done = self._done, len(self._token_ids)
        return piece

    def _decode(self, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self._token_ids[self._start : end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class StopStrings:
    """Finds stop strings in text that comes in pieces, and lets nothing of them out."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far may be shown: all before a stop string, or before what may become one."""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.found = bool(places)
        shown = min(places) if places else len(self._held) - self._doubtful()
        piece, self._held = self._held[:shown], "" if places else self._held[shown:]
        return piece

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _doubtful(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = min(max((len(stop) for stop in self._stop), default=0) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)


class Transcript:
    """Turns tokens into the text of an answer, and knows where the answer ends."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        end_token_ids: Collection[int],
        kept_tokens: Mapping[int, str] | None = None,
    ) -> None:
        """`kept_tokens`: special tokens that are part of the text, as a reply's markers are (`ReplyFormat`)."""
        self._detokenizer, self._stop_strings = Detokenizer(tokenizer, kept_tokens), StopStrings(stop)
        self._end_token_ids = end_token_ids
        self.token_ids: list[int] = []
        self.text = ""
        self.ended = False

    def push(self, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Take one round's tokens, up to the one that ends the answer; the new text and the tokens taken."""
        text, taken = "", 0
        for token_id in token_ids:
            taken += 1
            if token_id in self._end_token_ids:
                self.ended = True
            else:
                text += self._stop_strings.push(self._detokenizer.push(token_id))
                self.ended = self._stop_strings.found
            if self.ended:
                break
        self.token_ids += token_ids[:taken]
        self.text += text
        return text, tuple(token_ids[:taken])

    def flush(self) -> str:
        """The text still held back when no more tokens come."""
        if self._stop_strings.found:
            return ""
        text = self._stop_strings.push(self._detokenizer.flush())
        if self._stop_strings.found:
            self.ended = True
        else:
            text += self._stop_strings.flush()
        self.text += text
        return text
