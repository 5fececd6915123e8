"""A database that fails costs speed, never an answer; what the user is told of it."""

from __future__ import annotations

import warnings

from .database import reason


class Outage:
    """Whether the database works. Warns once, until it works again: a warning per turn would drown the answer."""

    def __init__(self, name: str) -> None:
        """`name`: of the database, as it may be shown."""
        self.failing = False
        """Whether the last attempt failed: then every turn would wait for all attempts, and one is enough to see the
        database come back."""
        self._name, self._warned = name, False

    def begin(self, verb: str, error: BaseException) -> None:
        """It could not be read, or written."""
        self.failing = True
        self.mention(verb, error)

    def mention(self, verb: str, error: BaseException) -> None:
        """It could not be read this once, which says nothing of the next time."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"phrases of {self._name} cannot be {verb}: {reason(error)}; generation goes on, and what was added waits "
            "in memory for a flush that succeeds",
            RuntimeWarning,
            stacklevel=5,
        )

    def end(self) -> None:
        """It could be written."""
        self.failing = self._warned = False
