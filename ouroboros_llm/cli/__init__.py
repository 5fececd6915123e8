"""The command line: `ouroboros --help`."""

from __future__ import annotations

import click

from .commands import Commands


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from .. import __version__

        click.echo(f"ouroboros-llm {__version__}")
        context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress, whatever the command.")
def main(quiet: bool) -> None:
    """Local Hugging Face models, several times faster and not one token different."""
    from ..progress import show_progress

    if quiet:
        show_progress(False)
