"""Fork and interpreter-exit safety for background threads."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import Protocol

EXIT_SECONDS = 30.0
"""How long the end of the interpreter waits for the step that runs."""


class Running(Protocol):
    """Something with a thread of its own that takes steps."""

    def hold(self) -> None:
        """Let no step begin, and wait for the one that runs."""

    def go_on(self) -> None:
        """Undo `hold`."""

    def forked(self) -> None:
        """Start anew in a child process, where the thread does not exist. It is being held."""

    def retire(self) -> None:
        """End the thread after the step that runs."""

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended, or that many seconds."""


def watch(running: Running) -> None:
    """Let forks and the end of the process wait for its steps, as long as it lives."""
    with _forking:
        _watched.add(running)


def guard(lock: threading.RLock) -> threading.RLock:
    """Let forks wait until nobody holds a lock of the whole process, so that no child finds it held by a thread that it
    does not have. Whoever holds it must not wait for a step."""
    _guards.append(lock)
    return lock


_watched: weakref.WeakSet[Running] = weakref.WeakSet()
_guards: list[threading.RLock] = []
_held: list[Running] = []
_forking = threading.RLock()
"""One fork at a time."""


def _before_fork() -> None:
    _forking.acquire()
    _held[:] = list(_watched)
    for running in _held:
        running.hold()
    for lock in _guards:
        lock.acquire()


def _after_fork_in_parent() -> None:
    for lock in _guards:
        lock.release()
    while _held:
        _held.pop().go_on()
    _forking.release()


def _after_fork_in_child() -> None:
    for lock in _guards:
        lock.release()
    while _held:
        _held.pop().forked()
    _forking.release()


@atexit.register
def _retire_all() -> None:
    """A thread that runs a model must not meet the end of the interpreter: it would take the process down with it."""
    watched = list(_watched)
    for running in watched:
        running.retire()
    for running in watched:
        running.join(EXIT_SECONDS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
