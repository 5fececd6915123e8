"""What a caller wants of a worker, and where the two meet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Generic, TypeVar

from ..decoding.target import Pass

if TYPE_CHECKING:
    import torch

AHEAD = 4
"""Items that may lie there, not yet taken by the caller, before a request pauses."""

Item = TypeVar("Item")
Steps = Generator[Item | Pass | None, "torch.Tensor | None", Item | None]
"""What a request does: every `next` is one step and yields what it brought, if anything; the last item is returned,
when everything is put away. Closing it between two steps abandons the request.

A step may stop at a `Pass` that it wants. It goes on when it is sent the logits, or None: then it makes that itself."""


class End:
    """The last thing that arrives of a request."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class RequestClock:
    """Time that a request spent between its submission and its end, while its caller was not behind."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._paused_at: float | None = None
        self._paused = 0.0

    def start(self) -> None:
        self._began = monotonic()

    def pause(self, paused: bool) -> None:
        """Stop, or go on, if it does not yet."""
        if paused == (self._paused_at is not None):
            return
        if self._paused_at is not None:
            self._paused, self._paused_at = self._paused + monotonic() - self._paused_at, None
        else:
            self._paused_at = monotonic()

    @property
    def seconds(self) -> float:
        """Until now; 0 before it starts."""
        if self._began is None:
            return 0.0
        return (monotonic() if self._paused_at is None else self._paused_at) - self._began - self._paused


class Request(Generic[Item]):
    """One caller's work: the worker takes its steps, the caller takes what they bring.

    The caller's side may run in a finalizer, in whichever thread and whatever locks that holds, so everything it does
    here is setting a field or putting into a `SimpleQueue`, which cannot deadlock.
    """

    def __init__(
        self,
        steps: Steps[Item],
        *,
        timeout: float | None = None,
        after: Callable[[], None] | None = None,
        clock: RequestClock | None = None,
    ) -> None:
        """`timeout`: seconds that it may wait and run, the time its caller leaves it paused not counted; `after`: runs
        in a background thread once the request has finished, e.g. flushing the store; `clock`: what its steps look at,
        if they want to know how long it has waited."""
        self.steps, self.timeout, self.after = steps, timeout, after
        self.clock = clock or RequestClock()
        self.arrived: SimpleQueue[Item | End] = SimpleQueue()
        self.on_arrival: Callable[[], None] | None = None
        self.ended = threading.Event()
        self.hurried = self.closed = False
        self.whole = False
        """Whether only the last item is wanted: then nobody need be woken before it."""
        self.asked: Pass | None = None
        """The pass at which its step has stopped."""
        self.shares = True
        """Whether its steps are believed to stop at passes, which can then be made together with others'."""

    def submitted(self) -> None:
        """Time counts from here."""
        self.clock.start()

    @property
    def ready(self) -> bool:
        """Whether a step is wanted: the caller is not behind, or waits for the end alone."""
        return self.hurried or self.whole or self.arrived.qsize() < AHEAD

    @property
    def late(self) -> bool:
        """Whether its time is over. While it is paused, no time passes for it."""
        self.clock.pause(not self.ready)
        return self.timeout is not None and self.ready and self.clock.seconds > self.timeout

    def bring(self, item: Item | None) -> None:
        """What a step brought goes to the caller, if that wants it."""
        if item is not None and not self.whole:
            self.deliver(item)

    def deliver(self, item: Item | End) -> None:
        self.arrived.put(item)
        if isinstance(item, End):
            self.ended.set()
        if (heard := self.on_arrival) is not None:
            heard()


def nothing() -> Generator[None, torch.Tensor | None, None]:
    """Steps of a request that has none."""
    yield from ()
