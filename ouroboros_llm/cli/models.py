"""`ouroboros models`: the packaged models, and what of them is on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import click

from .checks import folder_size, size


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model that can be named."""

    name: str
    hub: str | None
    """Where its weights come from originally."""
    license: str | None
    download_bytes: int | None
    """What is fetched on first use; None where it is here by other ways."""
    folder: str | None
    """Where it is on this machine; None where it is not."""
    bytes: int | None
    """On the disk."""
    default: bool


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the models as JSON.")
def models(as_json: bool) -> None:
    """List the packaged models, which need no hub, and models of the hub's cache."""
    rows = [*packaged_rows(), *hub_rows()]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
    else:
        _show(rows)


def packaged_rows() -> Iterator[ModelRow]:
    """The registry, the default model marked."""
    from ..defaults import default_model
    from ..environment import cache_folder
    from ..models.packaged import registry

    for name, packaged in registry().items():
        folder = cache_folder() / name
        held = folder_size(folder) if folder.is_dir() else None
        yield ModelRow(
            name=name,
            hub=packaged.hub,
            license=packaged.license,
            download_bytes=packaged.bytes,
            folder=str(folder) if folder.is_dir() else None,
            bytes=held,
            default=name == default_model().lower(),
        )


def hub_rows() -> Iterator[ModelRow]:
    """Models that the hub's client has cached."""
    from ..defaults import default_model

    try:
        from huggingface_hub import constants, scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError as error:
        click.echo(f"models of the hub's cache are not listed: {error}; install huggingface_hub anew", err=True)
        return
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return
    for repository in sorted(repositories, key=lambda one: one.repo_id):
        if repository.repo_type == "model":
            name, path = repository.repo_id, str(repository.repo_path)
            yield ModelRow(name, name, None, None, path, repository.size_on_disk, name == default_model())


def _show(rows: list[ModelRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("model", "from", "license", "download", "on this machine"):
        table.add_column(column, overflow="fold")
    for row in rows:
        download = "" if row.download_bytes is None else size(row.download_bytes)
        here = "" if row.folder is None else f"{size(row.bytes or 0)} in {row.folder}"
        marked = f"{row.name} (default)" if row.default else row.name
        table.add_row(marked, row.hub or "", row.license or "", download, here)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200  # nothing there to fit into
    console.print(table)
