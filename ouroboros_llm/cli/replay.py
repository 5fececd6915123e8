"""`ouroboros replay`: drafting over recorded traces, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click


def _curve(context: click.Context, parameter: click.Parameter, text: str) -> Callable[[int], float]:
    from ..bench.replay import cost_curve

    try:
        return cost_curve(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _drafters(context: click.Context, parameter: click.Parameter, text: str | None) -> Sequence[str]:
    from ..bench.replay import REPLAYED

    names = list(REPLAYED) if text is None else text.split(",")
    if unknown := sorted(set(names) - set(REPLAYED)):
        raise click.BadParameter(f"{', '.join(unknown)} cannot be replayed; choose of {', '.join(REPLAYED)}")
    return names


@click.command()
@click.argument("traces", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--cost",
    default="cpu",
    show_default=True,
    callback=_curve,
    metavar="cpu|cpu-float32|gpu|W:C,...",
    help="Time of a pass over so many tokens, in units of a pass over one: a known curve, or points of one.",
)
@click.option("--width", type=click.IntRange(1, 64), help="Nodes of every draft; without it, as many as pay.")
@click.option("--drafters", callback=_drafters, metavar="NAME,...", help="Of phrases and recycling; default: both.")
@click.option("--cold", is_flag=True, help="Begin every answer without a memory of those before it.")
@click.option("--passes", type=click.IntRange(min=1), default=1, show_default=True, help="Go over all traces so often.")
@click.option("--json", "as_json", is_flag=True, help="Print the report of the last pass as JSON.")
def replay(
    traces: tuple[Path, ...],
    cost: Callable[[int], float],
    width: int | None,
    drafters: Sequence[str],
    cold: bool,
    passes: int,
    as_json: bool,
) -> None:
    """What drafting would have saved for recorded answers.

    TRACES are files that `ouroboros record` wrote, replayed in the order given. History is kept from answer to answer,
    and from pass to pass. What the target says of rejected guesses is not recorded, so a run with the model drafts a
    little better than its replay.
    """
    from ..bench.replay import replay as replayed
    from ..bench.replay import report
    from ..bench.traces import read_traces

    recorded = [trace for path in traces for trace in read_traces(path)]
    if not recorded:
        raise click.ClickException(f"{', '.join(map(str, traces))}: no trace in there; `ouroboros record` writes them")
    *_, scores = replayed(recorded, cost=cost, width=width, drafters=drafters, cold=cold, passes=passes)
    found = report(scores)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("", "tokens per forward", "nodes per forward", "speed-up", "tokens", "forwards", "hits by source"):
        table.add_column(column, justify="left" if column in ("", "hits by source") else "right")
    for name, row in found.items():
        table.add_row(name, *_cells(row))
    Console().print(table)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    for name in ("tokens_per_forward", "nodes_per_forward", "speedup"):
        yield f"{row[name]:.2f}"
    yield f"{row['tokens']:,}"
    yield f"{row['forwards']:,}"
    yield ", ".join(f"{source} {count / max(row['tokens'], 1):.0%}" for source, count in row["hits"].items())
