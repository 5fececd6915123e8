"""`ouroboros bench`: a model side by side with transformers' own methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from .. import progress
from .commands import INTERRUPTED

TABLE_WIDTH = 120
AT_LEAST_ONE = click.IntRange(min=1)


@click.group(invoke_without_command=True)
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Registry name, folder or hub id.")
@click.option("--draft", help="A draft model, for `assisted` and for ours.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Required. JSON lines with `prompt`, `question`, `turns` (a conversation) or `messages`; Spec-Bench, "
    "MT-Bench, HumanEval and GSM8K as they come.",
)
@click.option(
    "--methods",
    metavar="NAME,...",
    help="Of plain, prompt_lookup, assisted, ouroboros (cold: a new scope for every prompt), ouroboros_warm (one scope "
    "keeps the phrases of the prompts before) and ouroboros_repeated (the same prompts again in the warm scope). "
    "Default: all, assisted only with --draft. plain always runs.",
)
@click.option(
    "--limit",
    type=AT_LEAST_ONE,
    help="Rows at most: of each category where the file has categories (the parts of mt_bench take turns), else of the "
    "file. All turns of a conversation are one row.",
)
@click.option("--category", multiple=True, metavar="NAME", help="Only this category; may be given several times.")
@click.option("--instruction", default="", help="Text put before every prompt.")
@click.option("--max-new-tokens", type=AT_LEAST_ONE, default=128, show_default=True, help="Length of an answer.")
@click.option("--repeats", type=AT_LEAST_ONE, default=1, show_default=True, help="Times that everything is asked.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--quantization", type=click.Choice(["int8", "int4"]), help="Bits of the weights of linear layers.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=AT_LEAST_ONE, help="CPU threads of torch.")
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Where to make a new folder with every answer and the report.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else on stdout.")
def bench(as_json: bool, **options: Any) -> None:
    """Answer the same prompts by every method, in one process, and compare them.

    Methods alternate prompt by prompt, after a warm-up, and all counts come from token ids. Ctrl-C leaves a report of
    what was answered until then.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        return
    if options["prompts"] is None:
        prompts = next(option for option in bench.params if option.name == "prompts")
        raise click.MissingParameter(ctx=context, param=prompts)
    from ..bench.run import Settings, measure

    report = measure(
        Settings(**options),
        _no_progress if as_json else _progress,
        lambda folder: progress.say(f"results in {folder}"),
    )
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _show(report)
    if report["partial"]:
        click.get_current_context().exit(INTERRUPTED)


@bench.command()
@click.option(
    "--shapes",
    default="all",
    show_default=True,
    metavar="NAME,...",
    help="Random-weight models: of qwen2.5-coder-1.5b, llama-3.1-8b and qwen2.5-32b (all), where memory allows; tiny "
    "ones show that everything runs.",
)
@click.option(
    "--weights/--no-weights",
    default=True,
    help="Also answers of real weights, where they are on this machine. Nothing is fetched.",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines, as for `bench`, to ask real weights. Default: a few of its own.",
)
@click.option("--limit", type=AT_LEAST_ONE, help="Prompts at most.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="bfloat16", show_default=True, help="float32, bfloat16 or float16.")
@click.option("--quantization", type=click.Choice(["int8", "int4"]), help="Bits of the weights of linear layers.")
@click.option(
    "--length", type=AT_LEAST_ONE, default=512, show_default=True, help="Tokens of text behind which passes are made."
)
@click.option("--repeats", type=AT_LEAST_ONE, default=20, show_default=True, help="Times that each pass is made.")
@click.option("--tokens", type=AT_LEAST_ONE, default=64, show_default=True, help="Length of answers of random weights.")
@click.option(
    "--max-new-tokens", type=AT_LEAST_ONE, default=128, show_default=True, help="Length of answers of real weights."
)
@click.option("--results", type=click.Path(file_okay=False, path_type=Path), default=Path("results"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else on stdout.")
def gpu(as_json: bool, **options: Any) -> None:
    """Measure passes of a model's shape against the device's bandwidth.

    By width, beside transformers' own; tokens per second without drafts; kernels, launches and host gaps of a round;
    with real weights, tokens per second of every method.
    """
    from ..bench.gpu import Settings, measure
    from ..bench.gpu_tables import markdown

    report = measure(Settings(**options), progress.say)
    click.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else markdown(report))


def _show(report: dict[str, Any]) -> None:
    from ..bench.tables import conditions_line, tables

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH  # nothing there to fit into
    for table in tables(report):
        console.print(table)
    click.echo(conditions_line(report["conditions"]))
    if report["partial"]:
        click.echo("interrupted: the report is partial", err=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..progress import is_animated

    console = Console(stderr=True)
    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    # Redrawing takes processor time from what is measured, so it is rare.
    with Progress(
        *columns, console=console, disable=not is_animated(console), refresh_per_second=1, transient=True
    ) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda: bar.advance(task)


@contextmanager
def _no_progress(total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None
