"""Commands that only read: `list`, `show`, `stats`, `check`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import nlargest
from typing import TYPE_CHECKING, Any

import click

from ouroboros_llm.errors import StoreError

from .display import counted, moment, plain, progress, say, short, show_json, show_table
from .options import find_scopes, json_option, opened, scope_argument, store_name, store_option
from .tokenizers import Tokenizers

if TYPE_CHECKING:
    from ..records import StoredRun

_PROBLEMS = 1
"""The exit status of `check` where it found some."""


@click.command("list")
@store_option
@json_option
def list_(as_json: bool) -> None:
    """The scopes, by name; one row per tokenizer."""
    with opened() as store:
        found = store.list()
    if as_json:
        show_json(list(found))
        return
    rows = (
        (
            one.scope,
            short(one.fingerprint),
            moment(one.created),
            moment(one.last_used),
            f"{one.runs:,}",
            f"{one.tokens:,}",
        )
        for one in found
    )
    show_table(("scope", "tokenizer", "created", "last used", "runs", "tokens"), rows, right=("runs", "tokens"))


@click.command(short_help="What a scope remembers, as text.")
@store_option
@scope_argument
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Phrases at most.")
@click.option("--model", metavar="NAME", help="Decode with this model's tokenizer: registry name, folder or hub id.")
@click.option("--fingerprint", metavar="F", help="Only what this tokenizer wrote, by the beginning of its fingerprint.")
@json_option
def show(scope: str, limit: int, model: str | None, fingerprint: str | None, as_json: bool) -> None:
    """What a scope remembers, as text: what came most often first, then what came last.

    Text is decoded by the tokenizer that wrote it, if that is on this machine; only the tokenizer is loaded, and
    nothing is fetched. On a terminal long phrases are cut; `--json`, or a pipe, shows all of them.
    """
    with opened() as store:
        written = [row.fingerprint for row in find_scopes(store, [scope])[scope]]
        wanted = written if fingerprint is None else [_matching(fingerprint, written)]
        runs = (run for run in store.export(scope) if run.fingerprint in wanted)
        top = nlargest(limit, runs, key=lambda run: (run.count, run.last_used))
    phrases = list(_decoded(top, Tokenizers(model)))
    if as_json:
        show_json(phrases)
    else:
        _show_phrases(phrases, several=len(wanted) > 1)


def _matching(start: str, written: list[str]) -> str:
    """The one fingerprint that begins so, or is it."""
    found = [one for one in written if one.startswith(start)] if start not in written else [start]
    if len(found) != 1:
        names = ", ".join(map(short, written))
        raise StoreError(f"--fingerprint {start!r} begins {len(found)} of this scope's tokenizers: {names}")
    return found[0]


def _decoded(runs: Iterable[StoredRun], tokenizers: Tokenizers) -> Iterator[dict[str, Any]]:
    """Runs with their text; where no tokenizer fits the text is None, and a line on stderr says why, once."""
    told = set()
    for run in runs:
        found = tokenizers.find(run.fingerprint)
        if found is None and run.fingerprint not in told:
            told.add(run.fingerprint)
            tried = "; ".join(tokenizers.tried)
            say(f"Token ids only of tokenizer {short(run.fingerprint)}: {tried}. Name the model that wrote by --model")
        yield {
            "scope": run.scope,
            "fingerprint": run.fingerprint,
            "model": found and found.model,
            "text": found and found.decode(run.token_ids),
            "token_ids": run.token_ids,
            "count": run.count,
            "answer": run.answer,
            "created": run.created,
            "last_used": run.last_used,
        }


def _show_phrases(phrases: list[dict[str, Any]], *, several: bool) -> None:
    columns = ("count", "tokens", "last used", "from", *(["tokenizer"] if several else []), "phrase")
    rows = (
        (
            f"{phrase['count']:,}",
            f"{len(phrase['token_ids']):,}",
            moment(phrase["last_used"]),
            "answer" if phrase["answer"] else "rejected draft",
            *([short(phrase["fingerprint"])] if several else []),
            " ".join(map(str, phrase["token_ids"])) if phrase["text"] is None else phrase["text"],
        )
        for phrase in phrases
    )
    show_table(columns, rows, right=("count", "tokens"), cut="phrase")


@click.command()
@store_option
@click.argument("scope", required=False)
@json_option
def stats(scope: str | None, as_json: bool) -> None:
    """How much is kept, in all or of one SCOPE."""
    with opened() as store:
        if scope is not None:
            find_scopes(store, [scope])
        found = store.stats(scope)
    names = ("scopes", "runs", "tokens", "uses", "notes", "nbytes", "oldest", "newest", "file_bytes")
    kept = {name: getattr(found, name) for name in names}
    if as_json:
        show_json({"store": store_name(), "scope": scope, **kept})
        return
    # `file_bytes` is missing where there is no file.
    cells = {name: f"{value:,}" if isinstance(value, int) else moment(value) for name, value in kept.items()}
    rows = [
        ("store", store_name()),
        ("scope", scope or "all"),
        *((_LABELS[name], cell) for name, cell in cells.items()),
    ]
    show_table(("", ""), [row for row in rows if row[1]])


_LABELS = {
    "scopes": "scopes",
    "runs": "runs",
    "tokens": "tokens",
    "uses": "times runs were added",
    "notes": "notes",
    "nbytes": "bytes of token ids and notes",
    "oldest": "unused longest since",
    "newest": "used last",
    "file_bytes": "bytes of the whole file",
}


@click.command()
@store_option
@json_option
def check(as_json: bool) -> None:
    """Read everything and say what is wrong. Nothing is mended; the exit status is 1 where something was found."""
    problems, runs = _problems()
    if as_json:
        show_json({"store": store_name(), "ok": not problems, "runs": runs, "problems": problems})
    else:
        for problem in problems:
            click.echo(plain(problem))
        if not problems:
            click.echo(f"No problems in {counted(runs, 'run')}.")
    if problems:
        click.get_current_context().exit(_PROBLEMS)


def _problems() -> tuple[Sequence[str], int]:
    from ..sqlite_file import CorruptFileError

    try:
        with opened() as store:
            total = store.stats().runs
            with progress("checking", total) as advance:
                return store.check(advance), total
    except CorruptFileError as error:  # a file that cannot even be opened has a problem, too
        return [str(error)], 0
