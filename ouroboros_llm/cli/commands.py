"""The commands by name, imported only when asked for."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from ..errors import OuroborosError

ENTRY_POINTS = "ouroboros_llm.commands"
"""Entry points of this group are click commands that other packages add."""

INTERRUPTED = 130
"""The exit status that shells give to a program ended by Ctrl-C."""

# The help of a command stands here as well, so that listing them loads no torch.
BUILT_IN = {
    "bench": ("ouroboros_llm.cli.bench", "Measure a model side by side with transformers' own methods."),
    "doctor": ("ouroboros_llm.cli.doctor", "Check what works here, and ask a model something."),
    "models": ("ouroboros_llm.cli.models", "List packaged models, and what is on this machine."),
    "record": ("ouroboros_llm.cli.record", "Record greedy traces of a model, for `replay`."),
    "replay": ("ouroboros_llm.cli.replay", "Run drafting over recorded traces, without a model."),
}


class Commands(click.Group):
    """A group whose commands are modules of this package and entry points of others.

    What a user can mend (an option, a file, a model's name) is one line and an exit status, not a traceback.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*BUILT_IN, *_added()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in BUILT_IN:
            command: click.Command = getattr(import_module(BUILT_IN[cmd_name][0]), cmd_name)
            return command
        added = _added().get(cmd_name)
        return _load(added) if added else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        with formatter.section("Commands"):
            limit = formatter.width - 6 - max(map(len, names))
            formatter.write_dl([(name, _short_help(name, limit)) for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OuroborosError as error:
            raise click.ClickException(str(error)) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise click.ClickException(f"a file is not what it should be: {error}") from error
        except OSError as error:
            if error.filename is None:  # not about a file: a broken pipe, say, which click knows
                raise
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


def _added() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _load(point: EntryPoint) -> click.Command:
    try:
        command = point.load()
    except Exception as error:  # somebody else's module may raise anything
        raise click.ClickException(f"command {point.name!r} cannot be loaded: {_reason(error)}") from error
    if not isinstance(command, click.Command):
        raise click.ClickException(
            f"command {point.name!r} cannot be loaded: {point.value} must be a click command, "
            f"but is {type(command).__name__}"
        )
    return command


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _short_help(name: str, limit: int) -> str:
    if name in BUILT_IN:
        return BUILT_IN[name][1]
    try:
        return _load(_added()[name]).get_short_help_str(limit)
    except click.ClickException as error:
        return error.message
