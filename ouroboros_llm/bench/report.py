"""Tables with the conditions they hold under."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch
import transformers
from rich.table import Table

from .. import __version__
from .side_by_side import Row

COLUMNS = ("method", "tokens", "target forwards", "mean acceptance length", "seconds", "times plain", "identical")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One tuple of `COLUMNS` per row; the first row is what the others are compared with."""
    plain = rows[0]
    return [
        (
            row.method,
            f"{row.tokens:,}",
            f"{row.forwards:,}",
            f"{row.mean_acceptance_length:.2f}",
            f"{row.seconds:.1f}",
            f"{plain.seconds / row.seconds * row.tokens / plain.tokens:.2f}",
            f"{row.identical_to(plain)}/{len(row.answers)}",
        )
        for row in rows
    ]


def table(rows: Sequence[Row], title: str) -> Table:
    drawn = Table(title=title)
    for column in COLUMNS:
        drawn.add_column(column, justify="left" if column == "method" else "right")
    for row in cells(rows):
        drawn.add_row(*row)
    return drawn


def markdown(rows: Sequence[Row], title: str) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells(rows)]) + "\n"


def conditions(model: torch.nn.Module) -> str:
    """What the machine and the versions were."""
    parameter = next(model.parameters())
    device = (
        torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    )
    return (
        f"{device}; {str(parameter.dtype).removeprefix('torch.')}; greedy; "
        f"ouroboros-llm {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
