"""What of a prompt fits into a model's context, and how much may be said behind it."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ContextLengthError
from .text import Prompt

_RESERVE = 4
"""A sliding prompt leaves this part of the context to the answer, or as much as is wanted, if that is less."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt that leaves room for an answer."""

    token_ids: list[int]
    limit: int
    """Tokens that may be said: as many as are wanted, as far as the context reaches."""
    dropped: int = 0
    """Tokens that were left out."""


def fit(
    prompt: Prompt,
    encode: Callable[[Prompt], list[int]],
    *,
    context_length: int | None,
    wanted: int,
    slide: bool = False,
    first_token_id: int | None = None,
    name: str = "the model",
) -> Fitted:
    """`prompt` as token ids, shortened where that is wanted and needed.

    Args:
        wanted: tokens to generate.
        slide: whether the oldest of the prompt may be left out.
        first_token_id: begins every text of this model; where it begins the prompt, it is never left out.
        name: of the model, for errors.

    Raises:
        PromptError: the prompt cannot be encoded. ContextLengthError: it leaves no room, whatever may be left out.
    """
    token_ids = encode(prompt)
    context = context_length or sys.maxsize
    length, most = len(token_ids), context - max(1, min(wanted, context // _RESERVE))
    if slide and length > most:
        shortened = _shorten_messages(prompt, encode, most) if _is_chat(prompt) else token_ids
        token_ids = shortened if _is_chat(prompt) else _shorten_tokens(token_ids, most, first_token_id)
    if len(token_ids) >= context:
        advice = "shorten the system messages or the last one" if slide else "shorten it, or set overflow='slide'"
        raise ContextLengthError(
            f"prompt has {len(token_ids)} tokens, but the context of {name} holds {context_length}, "
            f"output included; {advice}"
        )
    return Fitted(token_ids, min(wanted, context - len(token_ids)), length - len(token_ids))


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and isinstance(prompt[0], Mapping)


def _shorten_tokens(token_ids: list[int], most: int, first_token_id: int | None) -> list[int]:
    kept = token_ids[:1] if token_ids[0] == first_token_id and most > 1 else []
    return kept + token_ids[len(token_ids) - most + len(kept) :]


def _shorten_messages(messages: Any, encode: Callable[[Prompt], list[int]], most: int) -> list[int]:
    """The longest ending of the conversation that fits, behind its system messages; if none does, the shortest."""
    begins = _beginnings(messages)

    def encoded(begin: int) -> list[int]:
        return encode([m for place, m in enumerate(messages) if place >= begin or m.get("role") == "system"])

    fits = bisect_left(begins, True, key=lambda begin: len(encoded(begin)) <= most)
    return encoded(begins[min(fits, len(begins) - 1)])


def _beginnings(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where a shortened conversation may begin: at what the user said, as templates want it and so that no result of a
    tool stands without its call; or at the last message."""
    last = len(messages) - 1
    users = [place for place, message in enumerate(messages) if message.get("role") == "user" and place < last]
    return [*users[1:], last] if users and users[0] == _first(messages) else [*users, last]


def _first(messages: Sequence[Mapping[str, Any]]) -> int:
    return next((place for place, message in enumerate(messages) if message.get("role") != "system"), 0)
