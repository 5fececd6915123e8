"""What commands print: tables, JSON, questions and progress. Nothing stored reaches a terminal as a command to it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

_UNBOUNDED = 1_000_000
"""Columns of what is no terminal."""


def plain(text: str) -> str:
    """Text with everything escaped that a terminal could obey, that would reorder what is shown around it, or that the
    encoding of stdout does not have."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def short(fingerprint: str) -> str:
    """Enough of a fingerprint to tell it from others."""
    return plain(fingerprint if len(fingerprint) <= 12 else f"{fingerprint[:12]}…")


def moment(time: datetime | None) -> str:
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = (), cut: str = ""
) -> None:
    """Print a table, the columns `right` justified so.

    On a terminal the column `cut` is no longer than fits. Elsewhere every row is one line without a frame, for `grep`.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(show_header=any(columns))
    for name in columns:
        short = name == cut
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=short,
            overflow="ellipsis" if short else "fold",
        )
    for row in rows:
        cells: list[RenderableType] = [Text(plain(cell)) for cell in row]
        table.add_row(*cells)
    if console.is_terminal:
        console.print(table)
        return
    table.box, table.pad_edge, console.width = None, False, _UNBOUNDED
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        click.echo(line.rstrip())


def show_json(value: Any, *, err: bool = False) -> None:
    """Print JSON, of a list an element a line. Everything beyond ASCII is escaped, so that it is safe on any terminal,
    in any encoding."""
    if isinstance(value, list) and value:
        text = ",\n".join(json.dumps(element, default=_jsonable) for element in value)
        click.echo(f"[\n{text}\n]", err=err)
    else:
        click.echo(json.dumps(value, indent=2, default=_jsonable), err=err)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(type(value).__name__)


def say(text: str) -> None:
    """A line beside the output."""
    click.echo(plain(text), err=True)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def confirm(question: str, yes: bool) -> None:
    """Go on only if the user says so. Without anybody to ask, nothing is done."""
    if yes:
        return
    if not is_interactive():
        raise click.ClickException(f"{plain(question)} Nobody can be asked here; say --yes to do it")
    try:
        click.confirm(plain(question), abort=True, err=True)
    except click.Abort as abort:
        if isinstance(abort.__context__, KeyboardInterrupt):  # the group has an exit status for it
            raise KeyboardInterrupt from None
        raise


def is_interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


@contextmanager
def progress(title: str, total: int | None = None, *, hidden: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; call what is given with how much was done. `total` None: unknown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from ouroboros_llm.progress import is_animated

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=hidden or not is_animated(console), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
