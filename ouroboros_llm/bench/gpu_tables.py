"""The figures of `ouroboros bench gpu` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .tables import conditions_line, markdown_table

_STEP_COLUMNS = ("width", "ours ms", "times the limit", "times width 1", "transformers ms")
_RATE_COLUMNS = ("way", "tokens per second", "times generate")
_PROFILE_COLUMNS = ("round", "kernels", "launches", "ms", "device busy ms", "host gap")
_WEIGHT_COLUMNS = ("method", "tokens per second", "times plain", "tokens per forward", "divergences per 1,000 tokens")


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    moved = report["bandwidth"]
    parts = [
        "# Passes and answers on a device",
        conditions_line(report["conditions"]),
        f"Bandwidth, measured in this run: {moved['copy'] / 1e9:,.0f} GB/s copying (read and written), "
        f"{moved['read'] / 1e9:,.0f} GB/s reading. The limit of a pass is the time to read weights, keys and values "
        "once, at the greater of the two.",
    ]
    for name, shape in report["shapes"].items():
        parts += [f"## {name}, random weights", *_shape(shape)]
    for weights in report["weights"]:
        parts += [f"## {weights['model']}", *_weights(weights)]
    return "\n\n".join(parts) + "\n"


def _shape(shape: Mapping[str, Any]) -> Iterator[str]:
    if "skipped" in shape:
        yield f"Skipped: {shape['skipped']}."
        return
    yield f"{shape['bytes_read'] / 1e9:.2f} GB read per pass, limit {1000 * shape['limit_seconds']:.3f} ms."
    if shape["not_static"]:
        yield f"Without passes of fixed shape: {shape['not_static']}."
    if shape["fused"]:
        yield f"One kernel each: {', '.join(f'{count} {name}' for name, count in shape['fused'].items())}."
    yield markdown_table(_STEP_COLUMNS, (_step(width, step, shape) for width, step in shape["steps"].items()))
    rates = shape["tokens_per_second"]
    times = {way: rate / rates["generate"] if rate and rates["generate"] else None for way, rate in rates.items()}
    yield markdown_table(_RATE_COLUMNS, ((way, _number(rate), _number(times[way])) for way, rate in rates.items()))
    yield markdown_table(_PROFILE_COLUMNS, map(_profile, shape["profiles"].items()))


def _step(width: str, step: Mapping[str, float], shape: Mapping[str, Any]) -> tuple[str, ...]:
    cost = shape["cost_curve"][width]
    return width, _ms(step["ours"]), _number(step["times_limit"]), _number(cost), _ms(step["transformers"])


def _profile(entry: tuple[str, Mapping[str, Any]]) -> tuple[str, ...]:
    name, seen = entry
    gap = seen["host_gap"]
    return (
        name,
        f"{seen['kernels']:,.0f}",
        f"{seen['launches']:,.0f}",
        _ms(seen["seconds"]),
        _ms(seen["busy_seconds"]),
        "" if gap is None else f"{100 * gap:.0f} %",
    )


def _weights(weights: Mapping[str, Any]) -> Iterator[str]:
    if "skipped" in weights:
        yield f"Skipped: {weights['skipped']}."
        return
    if weights["draft"]:
        yield f"Assisted by {weights['draft']}."
    if weights["not_static"]:
        yield f"Without passes of fixed shape: {weights['not_static']}."
    yield markdown_table(
        _WEIGHT_COLUMNS,
        (
            (
                method,
                _number(row["tokens"] / row["seconds"] if row["seconds"] else None),
                _number(row["wall_ratio"]["of_sums"]),
                _number(row["tokens_per_forward"]),
                _number(row.get("divergences_per_1000_tokens")),
            )
            for method, row in weights["methods"].items()
        ),
    )


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
