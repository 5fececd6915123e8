"""`export` and `import`: scopes as JSON lines, one run or note a line."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from ouroboros_llm.errors import OuroborosError, StoreError

from .display import counted, progress, say, show_json
from .options import find_scopes, json_option, opened, store_option

if TYPE_CHECKING:
    from ..records import StoredNote, StoredRun
    from ..store import PhraseStore


@click.command(short_help="Write scopes as JSON lines.")
@store_option
@click.argument("scopes", metavar="[SCOPE...]", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All scopes.")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file that only you can read; it has its name when it is whole. Default: stdout.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON, on stderr where stdout has the lines.")
def export(scopes: tuple[str, ...], everything: bool, output: Path | None, as_json: bool) -> None:
    """Write scopes as JSON lines, for `import`: every run and every note, with times and counts."""
    if bool(scopes) == everything:
        raise click.UsageError("name scopes, or say --all")
    with opened() as store, ExitStack() as stack:
        names = list(dict.fromkeys([row.scope for row in store.list()] if everything else scopes))
        total = sum(row.runs for rows in find_scopes(store, names).values() for row in rows)
        file = sys.stdout if output is None else stack.enter_context(_whole(output))
        # A bar between the lines would help nobody.
        advance = stack.enter_context(progress("exporting", total, hidden=output is None and sys.stdout.isatty()))
        runs, notes = _write(store, names, file, advance)
    target = f" to {output}" if output else ""
    sentence = (
        f"Exported {counted(runs, 'run')} and {counted(notes, 'note')} of {counted(len(names), 'scope')}{target}."
    )
    _report({"file": output and str(output), "scopes": names, "runs": runs, "notes": notes}, sentence, as_json, output)


def _report(facts: dict[str, object], sentence: str, as_json: bool, output: Path | None) -> None:
    if as_json:
        show_json(facts, err=output is None)
    else:
        say(sentence)


def _write(store: PhraseStore, names: Iterable[str], file: IO[str], advance: Callable[[int], None]) -> tuple[int, int]:
    """Write all lines; returns how many runs and notes there were."""
    from ..exchange import to_line

    runs = notes = 0
    for name in names:
        for run in store.export(name):
            file.write(f"{to_line(run)}\n")
            runs += 1
            advance(1)
        for note in store.export_notes(name):
            file.write(f"{to_line(note)}\n")
            notes += 1
    file.flush()
    return runs, notes


@contextmanager
def _whole(path: Path) -> Iterator[IO[str]]:
    """A file that only its owner can read, and that gets its name when all of it is on the disk.

    What had the name before is replaced; if anything goes wrong, it stays as it was.
    """
    path = path.resolve()  # where a link points to, not the link
    if path.exists() and not path.is_file():
        raise click.BadParameter(f"{path} is no ordinary file; leave -o out to write to stdout", param_hint="--output")
    if not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}", param_hint="--output")
    number, name = tempfile.mkstemp(prefix=f".{path.name[:200]}.", suffix=".part", dir=path.parent)  # mode 0600
    try:
        with open(number, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


@click.command("import")
@store_option
@click.argument("source", metavar="FILE|-", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--scope", metavar="NAME", help="Put everything into this scope, whatever scope it was in.")
@json_option
def import_(source: str, scope: str | None, as_json: bool) -> None:
    """Read what `export` wrote. The database is made where there is none.

    Scopes that are there grow; of a run that is there, the larger count stays, so importing twice does no harm.
    """
    from ouroboros_llm.phrase_pool.base import check_scope

    if scope is not None:
        check_scope(scope)
    found = _Records(scope)
    size = None if source == "-" else os.path.getsize(source)
    with opened(create=True) as store, click.open_file(source, "rb") as file, progress("importing", size) as advance:
        runs = store.import_(found.read(file, source, advance))
    if as_json:
        show_json({"scopes": sorted(found.scopes), "runs": runs, "notes": found.notes})
    else:
        scopes = counted(len(found.scopes), "scope")
        say(f"Imported {counted(runs, 'run')} and {counted(found.notes, 'note')} into {scopes}.")


class _Records:
    """The lines of an export as records, and what was among them."""

    def __init__(self, scope: str | None) -> None:
        """`scope`: where all of them go; None: where they were."""
        self.scopes: set[str] = set()
        self.notes = 0
        self._scope = scope

    def read(
        self, file: Iterable[bytes], name: str, advance: Callable[[int], None]
    ) -> Iterator[StoredRun | StoredNote]:
        """The records in order. Raises StoreError where a line is none."""
        from ..exchange import from_line
        from ..records import StoredNote

        for number, line in enumerate(file, 1):
            advance(len(line))
            if not line.strip():
                continue
            try:
                record = from_line(line.decode("utf-8"))
            except (OuroborosError, UnicodeDecodeError) as error:
                raise StoreError(f"line {number} of {name} cannot be imported: {error}") from error
            record = record if self._scope is None else replace(record, scope=self._scope)
            self.scopes.add(record.scope)
            self.notes += isinstance(record, StoredNote)
            yield record
