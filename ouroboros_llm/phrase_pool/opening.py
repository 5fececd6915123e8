"""From what the caller gave as `store=` to something that opens pools."""

from __future__ import annotations

import warnings
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any

from ..errors import MissingExtraError, StoreError, StoreUnavailableError
from .base import PhrasePool, PoolSource
from .memory import MemorySource

ENTRY_POINTS = "ouroboros_llm.stores"
"""Entry points of this group are classes that take a URL or an engine and make a `PoolSource`; their `setup()` opens
the database, or raises StoreError."""


def open_source(store: Any) -> PoolSource:
    """The pools behind `store`: None is memory, a `PoolSource` is itself, a URL or an engine is opened.

    A store that cannot be used costs speed, never an answer: one warning, and memory takes its place. One that merely
    does not answer now is kept, for it gathers what is said until it does.
    """
    if store is None:
        return MemorySource()
    if isinstance(store, PoolSource):
        return store
    try:
        source: Any = store_class()(store)
        # A temporary outage is reported later, when the first pool is opened.
        with suppress(StoreUnavailableError):
            source.setup()
        opened: PoolSource = source
        return opened
    except (StoreError, MissingExtraError) as error:
        warnings.warn(f"{error}; phrases stay in memory and are forgotten at exit", RuntimeWarning, stacklevel=3)
        return MemorySource()


def open_pool(source: PoolSource, scope: str, fingerprint: str) -> PhrasePool:
    """The pool of `scope`, or an empty one with a warning where the store fails."""
    try:
        return source.open(scope, fingerprint=fingerprint)
    except Exception as error:  # whatever a store raises, it costs speed and never an answer
        warnings.warn(f"{error}; the scope starts without its phrases", RuntimeWarning, stacklevel=3)
        return MemorySource().open(scope, fingerprint=fingerprint)


def flush(source: PoolSource) -> None:
    """Flush at the end of a turn; a store that fails is a warning."""
    try:
        source.flush()
    except Exception as error:
        warnings.warn(f"phrases could not be kept: {error}", RuntimeWarning, stacklevel=3)


def store_class() -> Any:
    """The class that keeps phrases in a database. Raises StoreError where none is installed."""
    found = list(entry_points(group=ENTRY_POINTS))
    if not found:
        raise StoreError(f"store needs a package with an entry point in {ENTRY_POINTS!r}; install ouroboros-llm whole")
    return found[0].load()
