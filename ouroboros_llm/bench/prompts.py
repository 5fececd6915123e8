"""Prompts from the files that benchmarks come in: Spec-Bench, MT-Bench, HumanEval, GSM8K, plain JSON lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..ouroboros import Ouroboros

Message = dict[str, str]

# Spec-Bench counts MT-Bench as one task, while its file names the eight parts.
MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a file: what is said before the first answer, and what is asked after each answer."""

    name: str
    category: str | None
    part: str | None
    """The category as the file names it."""
    messages: tuple[Message, ...]
    follow_ups: tuple[str, ...] = ()


def read_prompts(
    path: Path, *, categories: Collection[str] = (), limit: int | None = None, instruction: str = ""
) -> list[Conversation]:
    """The conversations of a JSON lines file, in its order.

    Args:
        categories: only these, by the name of the category or of its part; none: all.
        limit: conversations at most per category, or in all where the file has no categories. Parts of a category
            (the eight of MT-Bench) take turns.
        instruction: put before the first user message of each conversation.

    Raises:
        PromptError: a line cannot be read, or nothing is left. The message names the line.
    """
    conversations = list(_rows(path, instruction))
    chosen = [one for one in conversations if not categories or {one.category, one.part} & {*categories}]
    if not chosen:
        known = ", ".join(sorted({one.category for one in conversations if one.category})) or "no categories"
        raise PromptError(f"{path} has no prompts of {', '.join(categories) or 'any kind'}; it has {known}")
    return _limited(chosen, limit)


def encode(ouroboros: Ouroboros, messages: Sequence[Message]) -> list[int]:
    """Token ids of messages: through the chat template if the tokenizer has one, else their plain text."""
    if ouroboros.tokenizer.chat_template:
        return ouroboros.encode(messages)
    return ouroboros.encode("\n\n".join(message["content"] for message in messages))


def _rows(path: Path, instruction: str) -> Iterator[Conversation]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _conversation(json.loads(line), number, instruction)
            except json.JSONDecodeError as error:
                raise PromptError(f"{path}, line {number}: not valid JSON ({error})") from error
            except PromptError as error:
                raise PromptError(f"{path}, line {number}: {error}") from error


def _conversation(row: Any, number: int, instruction: str) -> Conversation:
    if not isinstance(row, Mapping):
        raise PromptError(f"expected an object, but got {type(row).__name__}")
    messages, follow_ups = _said(row)
    asked = next((n for n, message in enumerate(messages) if message["role"] == "user"), 0)
    messages[asked]["content"] = instruction + messages[asked]["content"]
    part = None if row.get("category") is None else str(row["category"])
    category = "mt_bench" if "turns" in row and part in MT_BENCH else part
    name = next((str(row[key]) for key in ("task_id", "question_id", "id") if key in row), str(number))
    return Conversation(name, category, part, tuple(messages), tuple(follow_ups))


def _said(row: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    for field in ("prompt", "question"):
        if isinstance(row.get(field), str) and row[field]:
            return [_user(row[field])], []
    turns, messages = row.get("turns"), row.get("messages")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return [_user(turns[0])], turns[1:]
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return [dict(message) for message in messages], []
    raise PromptError(
        "expected `prompt` or `question` (text), `turns` (texts) or `messages` "
        f"({{'role': ..., 'content': ...}}), but its fields are {', '.join(map(str, row)) or 'none'}"
    )


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _limited(conversations: list[Conversation], limit: int | None) -> list[Conversation]:
    """The first `limit` of every category; where it has parts, the first of each part, then the second of each ..."""
    if limit is None:
        return conversations
    seen, kept = Counter[str | None](), Counter[str | None]()
    ranks = []
    for place, conversation in enumerate(conversations):
        ranks.append((seen[conversation.part], place))
        seen[conversation.part] += 1
    chosen = []
    for _, place in sorted(ranks):
        category = conversations[place].category
        if kept[category] < limit:
            kept[category] += 1
            chosen.append(place)
    return [conversations[place] for place in sorted(chosen)]
