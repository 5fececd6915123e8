"""Processes for tests: forks of the one that runs them, so that nothing is imported twice."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

Report = Callable[[str], None]

_SECONDS = 60
"""After which a process that hangs is ended; no test takes so long."""


class Process:
    """Runs `action` beside the test, which reads the lines that `action` reports. Any warning there is an error.

    It is killed at the end of the `with` block at the latest.
    """

    def __init__(self, action: Callable[[Report], None]) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Newer Pythons warn of forks beside threads. The action must keep away from what threads may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            _run(action, write)
        os.close(write)
        self._lines = os.fdopen(read, encoding="utf-8")
        self._status: int | None = None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        self.wait()
        self._lines.close()

    def line(self) -> str:
        """The next line; empty where there are no more."""
        return self._lines.readline().rstrip("\n")

    def kill(self) -> None:
        """`kill -9`."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit status, or minus the signal that ended it."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def rest(self) -> list[str]:
        """The lines that were not read, until the process has ended."""
        return self._lines.read().splitlines()


def together(*actions: Callable[[Report], None]) -> list[str]:
    """Run all at once, each in a process; what they report, when all have ended well."""
    gate_read, gate_write = os.pipe()

    def held(action: Callable[[Report], None]) -> Callable[[Report], None]:
        def run(report: Report) -> None:
            os.close(gate_write)
            os.read(gate_read, 1)  # until the gate is closed on the other side
            action(report)

        return run

    with ExitStack() as cleanup:
        processes = [cleanup.enter_context(Process(held(action))) for action in actions]
        os.close(gate_read)
        os.close(gate_write)
        lines = [line for process in processes for line in process.rest()]
        assert [process.wait() for process in processes] == [0] * len(actions), "\n".join(lines)
    return lines


def _run(action: Callable[[Report], None], write: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not what pytest-timeout does: C code that hangs runs no handler
        signal.alarm(_SECONDS)
        warnings.simplefilter("error")
        # Lines of this size reach the pipe whole.
        action(lambda line: os.write(write, f"{line}\n".encode()) and None)
        status = 0
    except BaseException:
        os.write(write, traceback.format_exc().encode()[-4000:])
    finally:
        os._exit(status)
