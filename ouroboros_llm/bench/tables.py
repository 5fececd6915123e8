"""The figures as tables: for terminals, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table

COLUMNS = (
    "method",
    "tokens",
    "forwards",
    "tokens per forward",
    "times plain",
    "middle half",
    "decoding alone",
    "prefill + decode s",
    "identical",
)
DRAFT_COLUMNS = ("method", "draft forwards", "cached prompt tokens", "accepted by source")
DIFFERENCE_COLUMNS = ("method", "prompt", "turn", "repeat", "first difference at", "logit gap")


def cells(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One tuple of `COLUMNS` per method of a summary's part."""
    return [
        (
            method,
            f"{row['tokens']:,}",
            f"{row['target_forwards']:,}",
            _number(row["tokens_per_forward"]),
            _number(row["wall_ratio"]["of_sums"]),
            _middle_half(row["wall_ratio"]["quartiles"]),
            _number(row["decode_ratio"]["of_sums"]),
            f"{row['prefill_seconds']:.1f} + {row['decode_seconds']:.1f}",
            f"{row['identical']}/{row['compared']}",
        )
        for method, row in figures.items()
    ]


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """One per category, and one for all."""
    for name, figures in _parts(report):
        drawn = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for column in COLUMNS:
            # What is folded can still be read; what is cut off cannot.
            name_column = column == "method"
            drawn.add_column(column, justify="left" if name_column else "right", no_wrap=name_column, overflow="fold")
        for row in cells(figures):
            drawn.add_row(*row)
        yield drawn


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report, with its conditions."""
    conditions = report["conditions"]
    parts = [f"# {conditions['model']}, {conditions['prompts']}" + (" (partial)" if report["partial"] else "")]
    parts.append(conditions_line(conditions))
    for name, figures in _parts(report):
        parts.append(f"## {name}\n\n" + markdown_table(COLUMNS, cells(figures)))
    parts.append("## Drafts\n\n" + markdown_table(DRAFT_COLUMNS, _drafts(report["all"])))
    if differences := list(_differences(report["all"])):
        parts.append("## Answers that differ from plain\n\n" + markdown_table(DIFFERENCE_COLUMNS, differences))
    return "\n\n".join(parts) + "\n"


def conditions_line(conditions: Mapping[str, Any]) -> str:
    """All conditions in one line."""
    told = {name: value for name, value in conditions.items() if value not in (None, "", []) and name != "versions"}
    about = [f"{name.replace('_', ' ')}: {_told(value)}" for name, value in told.items()]
    return "; ".join([*about, *(f"{name} {version}" for name, version in conditions["versions"].items())])


def _told(value: Any) -> str:
    # Instructions may hold line breaks, which would break the line.
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value).replace("\n", "\\n")


def _parts(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from report["categories"].items()
    yield "all", report["all"]


def _drafts(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for method, row in figures.items():
        sources = ", ".join(f"{source} {count:,}" for source, count in row["accepted_by_source"].items())
        yield method, f"{row['draft_forwards']:,}", f"{row['cached_tokens']:,}", sources


def _differences(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for method, row in figures.items():
        for difference in row["differences"]:
            gap = difference["logit_gap"]
            places = (str(difference[name]) for name in ("prompt", "turn", "repeat", "position"))
            yield method, *places, "" if gap is None else f"{gap:.4f}"


def markdown_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _middle_half(quartiles: list[float] | None) -> str:
    return "" if quartiles is None else f"{quartiles[0]:.2f}-{quartiles[2]:.2f}"
