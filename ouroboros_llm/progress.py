"""Progress of what takes long: shown on standard error, told to the log, and silenced by one switch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import perf_counter

from rich.console import Console
from rich.errors import LiveError

logger = logging.getLogger(__name__)

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
"""Where progress is shown."""

_shown: bool | None = None


def show_progress(shown: bool | None = True) -> None:
    """Show progress on standard error, or nothing at all; None: as `$OUROBOROS_PROGRESS` says, which 0 silences.

    The log (`logging.getLogger("ouroboros_llm")`) is told in any case.
    """
    global _shown
    _shown = shown


def is_shown() -> bool:
    """Tell whether progress is shown."""
    if _shown is not None:
        return _shown
    return os.environ.get("OUROBOROS_PROGRESS", "1").lower() not in ("0", "false", "no", "off")


def is_animated(where: Console | None = None) -> bool:
    """Tell whether bars and spinners are shown there, or where progress is: on a terminal that somebody looks at."""
    return is_shown() and (where or console).is_terminal


def say(text: str) -> None:
    """Show a line."""
    logger.info(text)
    if is_shown():
        console.print(text)


@contextmanager
def _spinner(text: str) -> Iterator[None]:
    """Show a spinner, unless something moves on the console already."""
    status = console.status(text)
    try:
        if is_animated():
            with suppress(LiveError):
                status.start()
        yield
    finally:
        status.stop()


@contextmanager
def step(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Show what is being done for as long as it takes, on a terminal with a clock; the log gets the seconds.

    Args:
        text: what is being done, in the progressive form.
        quiet: leave no line behind, and show none where there is no terminal.
    """
    began = perf_counter()
    if is_shown() and not quiet and not console.is_terminal:
        console.print(text)
    with _spinner(text):
        yield
    if is_animated() and not quiet:
        console.print(f"{text}: {perf_counter() - began:.1f} s")
    logger.info("%s took %.2f s", text, perf_counter() - began)
