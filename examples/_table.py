"""What the examples count, and the tables they print."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage
from rich.console import Console
from rich.table import Table

from langchain_ouroboros import ChatOuroboros
from ouroboros_llm.bench.report import machine
from ouroboros_llm.defaults import shared


@dataclass(frozen=True)
class Reply:
    """What one reply of the model took, as its message tells."""

    completion_tokens: int
    target_forwards: int
    draft_forwards: int
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    sources: dict[str, int]
    """Accepted tokens by where their drafts came from."""

    @property
    def prefilled_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


def replies(messages: Iterable[BaseMessage]) -> list[Reply]:
    """Of all messages that the model wrote."""
    said = (message for message in messages if isinstance(message, AIMessage))
    return [_reply(message) for message in said if message.usage_metadata is not None]


def _reply(message: AIMessage) -> Reply:
    usage: Any = message.usage_metadata
    bought = message.response_metadata["ouroboros"]
    return Reply(
        completion_tokens=usage["output_tokens"],
        target_forwards=bought["target_forwards"],
        draft_forwards=bought["draft_forwards"],
        prompt_tokens=usage["input_tokens"],
        cached_tokens=usage["input_token_details"]["cache_read"],
        seconds=bought["seconds"],
        sources=bought["accepted_by_source"],
    )


def total(found: Iterable[Reply], what: str) -> int:
    """The sum of one count."""
    return sum(getattr(reply, what) for reply in found)


def arguments(description: str | None) -> ArgumentParser:
    """The flags that all examples have."""
    parser = ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--model", help="registry name, path or hub id [$OUROBOROS_MODEL, else smollm2-135m-instruct]")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument(
        "--store", metavar="URL", help="where phrases are kept [nowhere: they are forgotten at the end]"
    )
    return parser


def plain(model: ChatOuroboros) -> ChatOuroboros:
    """The same model, which decodes plainly, a token a pass, and remembers nothing on disk."""
    return ChatOuroboros(
        model=model.model, dtype=model.dtype, max_tokens=model.max_tokens, store=None, max_draft_tokens=0
    )


def about(model: ChatOuroboros) -> dict[str, Any]:
    """The conditions under which the model ran."""
    loaded = shared(model.model, draft_model=model.draft_model, dtype=model.dtype, store=model.store)
    return {"model": model.model, "draft_model": model.draft_model, **machine(loaded.model)}


def conditions(found: Mapping[str, Any]) -> str:
    """`about`, as a line."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    draft = f" with {found['draft_model']}" if found["draft_model"] else ""
    return (
        f"{found['model']}{draft}; {found['device']}, {found['threads']} threads; {found['dtype']}; greedy; {versions}"
    )


def in_another_process(script: str, given: Namespace, title: str, report: Path, **changes: Any) -> Any:
    """Run an example anew, with other arguments here and there, and return what it put into `report`."""
    print(f"\n=== {title} ===", flush=True)
    settings = json.dumps({**vars(given), **changes, "report": str(report)}, default=str)
    subprocess.run([sys.executable, script, "--settings", settings], check=True)
    return json.loads(report.read_text())


def main_or_part(parser: ArgumentParser, main: Callable[[Namespace], None], part: Callable[[Namespace], Any]) -> None:
    """`main`, or in a process of `in_another_process` the `part` of the work that belongs there."""
    parser.add_argument("--settings", help="[for the example itself]")
    given = parser.parse_args()
    if given.settings is None:
        main(given)
        return
    settings = Namespace(**json.loads(given.settings))
    Path(settings.report).write_text(json.dumps(part(settings)))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], ends: str | None = None) -> None:
    """Print a table; the row called `ends` is the last one, below a line."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        if row[0] == ends:
            table.add_section()
        table.add_row(*map(str, row))
    Console().print(table)


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def as_dicts(found: Iterable[Reply]) -> list[dict[str, Any]]:
    return [asdict(reply) for reply in found]
