"""Commands that change what is kept: `prune`, `delete`, `copy`, `merge`, `rename`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from .display import confirm, counted, plain, progress, show_json
from .options import find_scopes, json_option, opened, parse_age, store_option, yes_option

if TYPE_CHECKING:
    from ..records import StoredScope

_AT_LEAST_ZERO = click.IntRange(min=0)


def _report(as_json: bool, sentence: str, **facts: Any) -> None:
    if as_json:
        show_json(facts)
    else:
        click.echo(plain(sentence))


def _size(rows: Sequence[StoredScope]) -> str:
    return f"{counted(sum(row.runs for row in rows), 'run')}, {counted(sum(row.tokens for row in rows), 'token')}"


@click.command(short_help="Drop what was used least recently.")
@store_option
@click.argument("scope", required=False)
@click.option("--max-tokens", type=_AT_LEAST_ZERO, help="Keep so many tokens.")
@click.option("--max-runs", type=_AT_LEAST_ZERO, help="Keep so many runs.")
@click.option(
    "--max-age", metavar="AGE", callback=parse_age, help="Keep what was used within this time: 90m, 12h, 30d, 2w."
)
@yes_option
@json_option
def prune(
    scope: str | None,
    max_tokens: int | None,
    max_runs: int | None,
    max_age: timedelta | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Drop what was used least recently, of one SCOPE or of the whole store, until all bounds hold."""
    bounds = {"max_tokens": max_tokens, "max_runs": max_runs, "max_age": max_age}
    given: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    if not given:
        raise click.UsageError("say what may stay: --max-tokens, --max-runs or --max-age")
    with opened() as store:
        held = f" ({_size(find_scopes(store, [scope])[scope])})" if scope is not None else ""
        wanted = ", ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in given.items())
        confirm(f"Prune {scope or 'the whole store'}{held} to {wanted}?", yes)
        with progress("pruning"):
            runs = store.prune(scope, **given)
    _report(as_json, f"Pruned {counted(runs, 'run')}.", scope=scope, runs=runs)


@click.command()
@store_option
@click.argument("scopes", metavar="SCOPE...", nargs=-1, required=True)
@yes_option
@json_option
def delete(scopes: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Erase scopes, with everything that was learned in them.

    Either all of them are there, or nothing is erased.
    """
    with opened() as store:
        found = find_scopes(store, scopes)
        named = "; ".join(f"{name} ({_size(rows)})" for name, rows in found.items())
        confirm(f"Delete {named} for good?", yes)
        runs = sum(store.delete(name) for name in found)
    _report(
        as_json,
        f"Deleted {', '.join(found)}: {counted(runs, 'run')}.",
        scopes=list(found),
        runs=runs,
    )


@click.command()
@store_option
@click.argument("source")
@click.argument("target")
@json_option
def copy(source: str, target: str, as_json: bool) -> None:
    """Copy SOURCE to a new scope TARGET. Whoever uses TARGET then drafts from what was said in SOURCE."""
    with opened() as store:
        runs = store.copy(source, target)
    _report(
        as_json, f"Copied {counted(runs, 'run')} from {source} to {target}.", source=source, target=target, runs=runs
    )


@click.command(short_help="Add scopes to another.")
@store_option
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.argument("target")
@yes_option
@json_option
def merge(sources: tuple[str, ...], target: str, yes: bool, as_json: bool) -> None:
    """Add what SOURCEs hold to TARGET; counts add up, and the sources stay as they are.

    Whoever uses TARGET then drafts from what was said in the sources.
    """
    with opened() as store:
        find_scopes(store, sources)
        if there := [row for row in store.list() if row.scope == target]:
            confirm(f"{target} holds {_size(there)} already; merging cannot be undone. Merge into it?", yes)
        with progress("merging"):
            runs = store.merge(sources, target)
    _report(
        as_json,
        f"Merged {counted(runs, 'run')} from {', '.join(sources)} into {target}.",
        sources=list(sources),
        target=target,
        runs=runs,
    )


@click.command()
@store_option
@click.argument("source")
@click.argument("target")
@json_option
def rename(source: str, target: str, as_json: bool) -> None:
    """Give SOURCE the new name TARGET."""
    with opened() as store:
        runs = store.rename(source, target)
    _report(as_json, f"Renamed {source} to {target}: {counted(runs, 'run')}.", source=source, target=target, runs=runs)
