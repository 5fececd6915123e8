"""A database that fails costs speed, never an answer; what the user is told of it."""

from __future__ import annotations

import warnings
from time import monotonic

from .database import reason, timed_out

_REST_SECONDS = 30.0
"""After a server let us wait in vain."""


class Outage:
    """Whether the database works. Warns once, until it works again: a warning per turn would drown the answer."""

    def __init__(self, name: str) -> None:
        """`name`: of the database, as it may be shown."""
        self.failing = False
        """Whether the last attempt failed: then every turn would wait for all attempts, and one is enough to see the
        database come back."""
        self._name, self._warned = name, False
        self._rests_until = 0.0

    @property
    def resting(self) -> bool:
        """Whether not even one attempt should be made: a server that does not answer lets everyone wait for seconds."""
        return monotonic() < self._rests_until

    def begin(self, verb: str, error: BaseException) -> None:
        """It could not be read, or written."""
        self.failing = True
        if timed_out(error):
            self._rests_until = monotonic() + _REST_SECONDS
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
        self._rests_until = 0.0
