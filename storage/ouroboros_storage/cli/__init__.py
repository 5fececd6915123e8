"""`ouroboros pool`: the phrases that are kept, from the command line.

Nothing here imports the database, or a model, before a command runs: `ouroboros --help` lists this group too.
"""

from __future__ import annotations

import click

from .changing import copy, delete, merge, prune, rename
from .exchange import export, import_
from .options import store_option
from .reading import check, list_, show, stats

__all__ = ["pool"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@store_option
def pool() -> None:
    """Look at the phrases that are kept; copy, move and erase them.

    What is kept are pieces of what models answered, in named scopes. Names are taken exactly as they are: no character
    in them is a pattern. One that begins with a dash goes behind `--`.
    """


for _command in (list_, show, stats, prune, delete, copy, merge, rename, export, import_, check):
    pool.add_command(_command)
