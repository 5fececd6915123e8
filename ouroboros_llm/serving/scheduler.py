"""Round-robin scheduler: one thread per model runs one step of each active request."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from ..decoding.target import Pass
from ..errors import OuroborosError, QueueFullError, RequestTimeoutError
from .fork_safety import guard, watch
from .request import End, Request, Steps, nothing

MAX_ACTIVE, MAX_WAITING = 16, 1024
"""Requests that take turns, and further ones that wait for a place among them."""

IDLE_SECONDS = 10.0
"""How long the thread stays without any request."""

QUIET_SECONDS = 1.0
"""How long there has to be no request before what can wait is done: a script that ends does not wait for it."""

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


class Scheduler:
    """Runs requests, one step of each in turn, in a thread that starts with the first and ends when none comes.

    Up to `max_active` requests take turns, not counting those that are paused because their callers are behind; the
    next `max_waiting` wait, first come, first served. What one request raises reaches its caller alone.
    """

    def __init__(self, max_active: int = MAX_ACTIVE, max_waiting: int = MAX_WAITING) -> None:
        self.max_active, self.max_waiting = max_active, max_waiting
        self._reset()
        watch(self)

    def _reset(self) -> None:
        # Re-entrant: a finalizer may submit a request in the middle of a submission.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._inbox: SimpleQueue[Request[Any] | None] = SimpleQueue()
        self._unfinished: set[Request[Any]] = set()
        self._waiting: deque[Request[Any]] = deque()
        self._active: deque[Request[Any]] = deque()
        self._retired = False
        self._idle_work: deque[Callable[[], Iterator[None]]] = deque()
        self._idle_step: Iterator[None] | None = None
        # Held during a step, and for a moment before it, so that a fork gets in between two steps, for certain.
        self._step_lock, self._gate = threading.RLock(), threading.RLock()
        self._afterwards: ThreadPoolExecutor | None = None

    @property
    def requests(self) -> int:
        """Requests that are not finished: waiting, running or paused."""
        return len(self._unfinished)

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs in a step."""
        return threading.current_thread() is self._thread

    def submit(self, request: Request[Any]) -> None:
        """Let a request take its turns.

        Raises:
            QueueFullError: so many are unfinished that it had to wait behind `max_waiting` others.
        """
        if self.is_current_thread:
            raise OuroborosError("a step of a request cannot wait for another request; make that call in a thread")
        with self._lock:
            if len(self._unfinished) >= self.max_active + self.max_waiting:
                raise QueueFullError(len(self._unfinished), self.max_active, self.max_waiting)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="ouroboros-worker", daemon=True)
                thread.start()
                self._thread = thread
            self._unfinished.add(request)
            request.submitted()
            self._inbox.put(request)

    def run(self, steps: Steps[Item]) -> Item:
        """Let steps take their turns among the others', and wait for what they return; raises what they raise."""
        request = Request(steps)
        request.whole = True
        try:
            self.submit(request)
            item = request.arrived.get()
        except BaseException:
            request.closed = True
            self.wake()
            raise
        if isinstance(item, End):
            raise item.error or OuroborosError("the request ended without a result")
        return item

    def when_idle(self, work: Callable[[], Iterator[None]]) -> None:
        """Do something, a step at a time, when no request is there after one has been; what it raises is logged."""
        self._idle_work.append(work)

    def give_up_idle_work(self) -> None:
        """Do nothing more of what was left for later, after the step that runs."""
        with self._step_lock:
            self._idle_work.clear()
            self._idle_step = None

    def wake(self) -> None:
        """Look again: a caller has taken something, or wants no more. Safe in finalizers."""
        self._inbox.put(None)

    def settle(self) -> None:
        """Wait until requests that were closed before have put everything away."""
        if self.requests and not self.is_current_thread:
            # What remains of those before it is done in the same order, and so before what remains of this one.
            barrier: Request[None] = Request(nothing(), after=lambda: None)
            barrier.hurried = True  # it has nothing to do, and need not wait for a place
            with suppress(QueueFullError):
                self.submit(barrier)
                barrier.ended.wait()

    def retire(self) -> None:
        """Close what is unfinished, and end the thread."""
        self._retired = True
        self.wake()

    def join(self, timeout: float) -> None:
        if (thread := self._thread) is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        while not self._retired:
            with self._gate:
                pass
            try:
                with self._step_lock:
                    worked = self._turn()
            except BaseException as error:  # not of a step: those are their requests' own
                self._give_up(error)
                return
            if not worked and not self._rest():
                return
        self._give_up(OuroborosError("the request was given up, because the interpreter exits"))

    def _work_idly(self) -> bool:
        """One step of what can wait; whether there was any."""
        try:
            with self._step_lock:
                if self._idle_step is None:
                    if not self._idle_work:
                        return False
                    self._idle_step = self._idle_work.popleft()()
                next(self._idle_step)
        except StopIteration:
            self._idle_step = None
        except Exception:
            self._idle_step = None
            logger.warning("work that was left for later failed; it is given up", exc_info=True)
        return True

    def _give_up(self, error: BaseException) -> None:
        """End everything with this error; the next request starts a new thread."""
        with self._lock:
            for request in tuple(self._unfinished):
                self._drop(request, error)
            self._inbox, self._retired, self._thread = SimpleQueue(), False, None
            self._idle_step = None
            self._idle_work.clear()

    def _turn(self) -> bool:
        """One step of the request whose turn it is; whether there was any."""
        with suppress(Empty):
            while True:
                self._take_in(self._inbox.get_nowait())
        self._drop_ended()
        self._admit()
        for _ in range(len(self._active)):
            request = self._active[0]
            self._active.rotate(-1)
            if request.ready:
                self._round(request)
                return True
        return False

    def _rest(self) -> bool:
        """Wait for a message; False where none came for long and the thread is to end."""
        # Whoever waits has been admitted by now: only paused requests are left, whose callers will wake us.
        try:
            self._take_in(self._inbox.get(timeout=self._patience))
            return True
        except Empty:
            if not self._unfinished and self._work_idly():
                return True
            with self._lock:
                if not self._inbox.empty() or self._unfinished:
                    return True
                self._thread = None
                if self._afterwards is not None:
                    self._afterwards.shutdown(wait=False)
                    self._afterwards = None
                return False

    @property
    def _patience(self) -> float | None:
        """Seconds to wait for a message; None: until one comes."""
        if self._unfinished:
            return None
        if self._idle_step is not None:
            return 0.0
        return QUIET_SECONDS if self._idle_work else IDLE_SECONDS

    def _take_in(self, request: Request[Any] | None) -> None:
        if request is not None:
            self._waiting.append(request)

    def _admit(self) -> None:
        running = sum(request.ready for request in self._active)
        while self._waiting and running < self.max_active:
            self._active.append(self._waiting.popleft())
            running += 1
        # Those who only want to hear the end need not wait for it.
        for request in [request for request in self._waiting if request.hurried]:
            self._waiting.remove(request)
            self._active.append(request)

    def _drop_ended(self) -> None:
        for request in (*self._active, *self._waiting):
            if request.closed:
                self._drop(request, None)
            elif request.late:
                self._drop(request, RequestTimeoutError(request.timeout or 0.0, waiting=request in self._waiting))

    def _round(self, request: Request[Any]) -> None:
        """One step of a request, and of those others whose passes are made in one with its own."""
        if request.asked is None:
            self._step(request)
        if request.asked is None:
            return
        if (packer := request.asked.packer) is None:
            return self._step(request, begun=True)
        others = [other for other in self._active if other is not request and other.ready and not other.closed]
        for other in others:
            if other.shares and other.asked is None:
                self._step(other)
        standing = {one.asked: one for one in (request, *others) if one.asked and one.asked.packer is packer}
        made = packer.make(list(standing))
        for wanted, logits in made.items():
            self._step(standing[wanted], logits, begun=True)
        # Each of them has had its turn.
        had = {standing[wanted] for wanted in made}
        self._active = deque(sorted(self._active, key=had.__contains__))

    def _step(self, request: Request[Any], logits: Any = None, *, begun: bool = False) -> None:
        """Let a request go on to the end of its step, or until it wants a pass that others may share."""
        request.asked = None
        try:
            item = request.steps.send(logits)
        except StopIteration as end:
            self._finish(request, end.value, None)
        except BaseException as error:
            self._finish(request, None, error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        else:
            if isinstance(item, Pass):
                request.asked, request.shares = item, True
                return
            request.shares = request.shares and begun
            request.bring(item)

    def _drop(self, request: Request[Any], error: BaseException | None) -> None:
        """End a request between two steps."""
        try:
            request.steps.close()
        except BaseException as raised:
            error = error or raised
        self._finish(request, None, error)

    def _finish(self, request: Request[Any], last: Any, error: BaseException | None) -> None:
        for requests in (self._active, self._waiting):
            with suppress(ValueError):
                requests.remove(request)
        request.steps, request.asked = nothing(), None
        if request.after is None:
            return self._end(request, last, error)
        if self._afterwards is None:
            self._afterwards = ThreadPoolExecutor(1, thread_name_prefix="ouroboros-after")
        try:
            self._afterwards.submit(self._end, request, last, error)
        except RuntimeError:  # the interpreter exits
            self._end(request, last, error)

    def _end(self, request: Request[Any], last: Any, error: BaseException | None) -> None:
        try:
            if request.after is not None:
                request.after()
        except BaseException as raised:
            error = error or raised
        with self._lock:
            self._unfinished.discard(request)
        if last is not None:
            request.deliver(last)
        request.deliver(End(error))
        self.wake()

    def hold(self) -> None:
        """Let no step begin, and wait for the one that runs."""
        self._gate.acquire()
        self._step_lock.acquire()

    def go_on(self) -> None:
        """Undo `hold`."""
        self._step_lock.release()
        self._gate.release()

    def forked(self) -> None:
        """Start anew in a child process, where the thread does not exist. It is being held."""
        requests = self._unfinished
        self._reset()
        for request in requests:
            # Ending them would write to the parent's files and connections.
            _of_the_parent.append((request.steps, request.after))
            request.steps, request.after, request.on_arrival = nothing(), None, None
            request.deliver(End(OuroborosError("the request belongs to the parent process; ask again in this one")))


def scheduler_for(model: Any) -> Scheduler:
    """The worker of a model, whoever uses it: the same object for the same model, which it does not keep alive."""
    with _finding:
        worker = _by_model.get(model)
        if worker is None:
            worker = _by_model[model] = Scheduler()
            weakref.finalize(model, worker.retire).atexit = False
        return worker


_by_model: weakref.WeakKeyDictionary[Any, Scheduler] = weakref.WeakKeyDictionary()
_finding = guard(threading.RLock())
_of_the_parent: list[object] = []
