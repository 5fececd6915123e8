"""The last section of a test run: which tests were left out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

KEY = "left_out"
SLOW, OTHER = "marked slow, run by `make test-all`", "deselected by -k or -m"

_deselected: Counter[tuple[str, str]] = Counter()
"""(reason, file): in this process, or in the processes of pytest-xdist, which alone collect."""


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        reason = SLOW if item.get_closest_marker("slow") else OTHER
        _deselected[reason, item.location[0]] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[KEY] = [[*key, count] for key, count in _deselected.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # Every process collects, and deselects, all tests.
    for reason, file, count in getattr(node, "workeroutput", {}).get(KEY, ()):
        _deselected[reason, file] = max(_deselected[reason, file], count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = Counter(reason_of(report) for report in terminalreporter.stats.get("skipped", ()))
    lines = [line for reason in (SLOW, OTHER) for line in lines_of(reason)]
    lines += [f"{sum(skipped.values())} skipped:"] if skipped else []
    lines += [f"{count:6d}  {reason}" for reason, count in skipped.most_common()]
    if lines:
        terminalreporter.section("left out")
        terminalreporter.write("\n".join(lines) + "\n")


def lines_of(reason: str) -> list[str]:
    """What was deselected for one reason, by file."""
    files = {file: count for (why, file), count in sorted(_deselected.items()) if why == reason}
    return (
        [f"{sum(files.values())} {reason}:", *(f"{count:6d}  {file}" for file, count in files.items())] if files else []
    )


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped, in the words of its mark."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    return str(reason).removeprefix("Skipped: ")
