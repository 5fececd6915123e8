"""Two chats with histories, in two processes: what stays in memory between turns, and what phrases buy.

Run it with `python examples/chat_memory.py`. LangChain's `RunnableWithMessageHistory` keeps the histories, and hands
their session's id to the model, which keeps the phrases of each apart, and the keys and values of what it has read.
The second process finds histories and phrases again; keys and values it has to read anew, once for each chat.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import BaseMessage, messages_from_dict, messages_to_dict
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.history import RunnableWithMessageHistory

from _table import (
    about,
    arguments,
    as_dicts,
    conditions,
    in_another_process,
    main_or_part,
    percent,
    plain,
    replies,
    show,
)
from langchain_ouroboros import ChatOuroboros

PROCESSES = (
    (
        ("anna", "Write a Python function `mean(numbers)` with a docstring."),
        ("ben", "Write a shopping list for pancakes, one item per line."),
        ("anna", "Write it again, but return None for an empty list."),
        ("ben", "Write the same list again, with amounts for four people."),
    ),
    (
        ("anna", "Write it again, and add a function `median(numbers)` in the same style."),
        ("ben", "Write the list again, and add maple syrup."),
        ("anna", "Write both functions again, with type hints."),
    ),
)


class FileHistory(BaseChatMessageHistory):
    """The messages of a chat, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def messages(self) -> list[BaseMessage]:
        return messages_from_dict(json.loads(self._path.read_text())) if self._path.exists() else []

    @messages.setter
    def messages(self, messages: list[BaseMessage]) -> None:
        self._path.write_text(json.dumps(messages_to_dict(messages)))

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        self.messages = [*self.messages, *messages]

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)


def work(given: Namespace) -> dict[str, Any]:
    """The turns of one process."""
    model = ChatOuroboros(model=given.model, dtype=given.dtype, store=given.store, max_tokens=given.max_tokens)
    model = plain(model) if given.plain else model
    prompt = ChatPromptTemplate(
        [("system", "You answer briefly."), MessagesPlaceholder("history"), ("human", "{text}")]
    )
    chat = RunnableWithMessageHistory(
        prompt | model,
        lambda session_id: FileHistory(Path(given.folder) / f"{session_id}.json"),
        input_messages_key="text",
        history_messages_key="history",
    )
    turns = []
    for session, text in PROCESSES[given.process]:
        print(f"\n{session}> {text}\n", flush=True)
        config: RunnableConfig = {"configurable": {"session_id": session}}
        message: Any = None
        for chunk in chat.stream({"text": text}, config):
            print(chunk.text, end="", flush=True)
            message = chunk if message is None else message + chunk
        print(flush=True)
        turns.append({"session": session, "text": message.text, **as_dicts(replies([message]))[0]})
    return {"conditions": about(model), "turns": turns}


def both(given: Namespace, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The chats, in two processes."""
    folder.mkdir()
    titles = ("first process", "second process: histories and phrases are there, keys and values are not")
    kind = ", plain decoding" if changes else ""
    return [
        in_another_process(
            __file__, given, title + kind, folder / "part.json", folder=str(folder), process=number, **changes
        )
        for number, title in enumerate(titles)
    ]


def main(given: Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        given.store = given.store or f"sqlite:///{Path(name) / 'phrases.db'}"
        parts = both(given, Path(name) / "ours")
        reference = both(given, Path(name) / "plain", plain=True) if given.compare else parts
    rows, same = [], True
    for number, (part, alone) in enumerate(zip(parts, reference, strict=True), 1):
        for turn, its in zip(part["turns"], alone["turns"], strict=True):
            same = same and turn["text"] == its["text"]
            of_plain = percent(turn["target_forwards"], turn["completion_tokens"])
            counts = (turn[key] for key in ("prompt_tokens", "cached_tokens", "completion_tokens", "target_forwards"))
            rows.append((f"{turn['session']}, process {number}", *counts, of_plain))
    columns = ("turn", "prompt", "of it cached", "tokens", "forwards", "forwards per token")
    show("Two chats", columns, rows)
    print(conditions(parts[0]["conditions"]))
    if given.compare:
        print(f"Plain decoding says {'the same' if same else 'something else'}.")
        raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--max-tokens", type=int, default=96, help="per reply, at most [%(default)s]")
    parser.add_argument("--compare", action="store_true", help="also decode plainly, and compare all texts")
    parser.set_defaults(plain=False)
    main_or_part(parser, main, work)
