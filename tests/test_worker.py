"""The worker alone, with generators in place of models."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

import ouroboros_llm.serving.request
import ouroboros_llm.serving.scheduler
from ouroboros_llm import OuroborosError, QueueFullError, RequestTimeoutError
from ouroboros_llm.serving.request import AHEAD, End, Request, Steps
from ouroboros_llm.serving.scheduler import Scheduler, scheduler_for

PATIENCE = 60
"""Seconds after which a test that would wait for ever fails; none takes this long."""


class Log:
    """What happened in the worker's thread, in order; steps wait while `gate` is closed."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.closed: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def request(self, name: str, steps: int, *, silent: bool = True, **arguments: Any) -> Request[str]:
        """`silent`: steps bring nothing, so that the request never waits for its reader."""
        return Request(self._steps(name, steps, silent), **arguments)

    def _steps(self, name: str, steps: int, silent: bool) -> Steps[str]:
        try:
            for _ in range(steps):
                assert self.gate.wait(PATIENCE)
                self.steps.append(name)
                yield None if silent else name
        finally:
            self.closed.append(name)
        return f"{name}!"


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def worker() -> Iterator[Scheduler]:
    worker = Scheduler()
    yield worker
    worker.retire()
    worker.join(PATIENCE)


def arrivals(request: Request[Any]) -> Iterator[Any]:
    """All items; raises the error that ended the request."""
    while not isinstance(item := request.arrived.get(timeout=PATIENCE), End):
        yield item
    if item.error is not None:
        raise item.error


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def submitted_behind(worker: Scheduler, log: Log, *requests: Request[Any]) -> None:
    """Hand all requests over before the first of them takes a step."""
    log.gate.clear()
    first = log.request("first", 1)
    for request in (first, *requests):
        worker.submit(request)
    log.gate.set()
    list(arrivals(first))


def test_requests_take_turns(worker: Scheduler, log: Log) -> None:
    requests = [log.request(name, 5) for name in "abc"]
    submitted_behind(worker, log, *requests)
    assert [list(arrivals(request)) for request in requests] == [["a!"], ["b!"], ["c!"]]
    assert log.steps[1:] == list("abc") * 5


def test_a_short_request_behind_a_long_one_ends_first(worker: Scheduler, log: Log) -> None:
    long, short = log.request("long", 500), log.request("short", 20)
    submitted_behind(worker, log, long, short)
    list(arrivals(short))
    list(arrivals(long))
    assert log.closed == ["first", "short", "long"]
    assert log.steps.index("short") == 2
    assert len(log.steps) - 1 - log.steps[::-1].index("short") <= 2 * 20 + 1


def test_who_comes_first_is_served_first(log: Log) -> None:
    worker = Scheduler(max_active=2)
    requests = [log.request(str(number), 3) for number in range(6)]
    submitted_behind(worker, log, *requests)
    for request in requests:
        list(arrivals(request))
    assert log.closed == ["first", *"012345"]
    begun = list(dict.fromkeys(log.steps))
    assert begun == ["first", *"012345"]
    for place, name in enumerate(log.steps):
        # Nobody steps while two others, begun before, are unfinished.
        unfinished = {other for other in log.steps[:place] if other in log.steps[place:]} - {name}
        assert len(unfinished) <= 1


def test_the_queue_is_bounded(log: Log) -> None:
    worker = Scheduler(max_active=2, max_waiting=3)
    log.gate.clear()
    requests = [log.request(str(number), 1) for number in range(5)]
    for request in requests:
        worker.submit(request)
    with pytest.raises(QueueFullError, match="5 requests already; 2 may take turns and 3 wait.*max_waiting"):
        worker.submit(log.request("6", 1))
    log.gate.set()
    assert [list(arrivals(request)) for request in requests] == [[f"{number}!"] for number in range(5)]
    until(lambda: not worker.requests)
    worker.submit(again := log.request("7", 1))
    assert list(arrivals(again)) == ["7!"]


def test_what_one_request_raises_reaches_its_caller_alone(worker: Scheduler, log: Log) -> None:
    def fail() -> Steps[str]:
        yield "one"
        raise ZeroDivisionError("of this request")

    failing, other = Request(fail()), log.request("other", 10)
    submitted_behind(worker, log, failing, other)
    items = arrivals(failing)
    assert next(items) == "one"
    with pytest.raises(ZeroDivisionError, match="of this request"):
        next(items)
    assert list(arrivals(other)) == ["other!"]
    worker.submit(after := log.request("after", 1))
    assert list(arrivals(after)) == ["after!"]


def test_a_reader_who_is_behind_costs_no_steps(worker: Scheduler, log: Log) -> None:
    slow, other = log.request("slow", 30, silent=False), log.request("other", 100)
    submitted_behind(worker, log, slow, other)
    list(arrivals(other))
    assert log.steps.count("slow") == AHEAD
    taken = [slow.arrived.get(timeout=PATIENCE) for _ in range(2)]
    worker.wake()
    until(lambda: log.steps.count("slow") == AHEAD + 2)
    worker.submit(again := log.request("again", 50))
    list(arrivals(again))
    assert log.steps.count("slow") == AHEAD + 2
    while not isinstance(item := slow.arrived.get(timeout=PATIENCE), End):
        taken.append(item)
        worker.wake()
    assert taken == ["slow"] * 30 + ["slow!"]


def test_paused_requests_leave_their_place_to_others(log: Log) -> None:
    worker = Scheduler(max_active=1)
    paused = [log.request(str(number), 30, silent=False) for number in range(3)]
    submitted_behind(worker, log, *paused)
    worker.submit(other := log.request("other", 3))
    assert list(arrivals(other)) == ["other!"]
    for request in paused:
        request.closed = True
    worker.wake()
    for request in paused:
        list(arrivals(request))


def test_closing_ends_a_request_before_its_next_step(worker: Scheduler, log: Log) -> None:
    log.gate.clear()
    closed, other = log.request("closed", 1000), log.request("other", 5)
    worker.submit(closed)
    worker.submit(other)
    closed.closed = True  # while its first step may run
    worker.wake()
    log.gate.set()
    assert list(arrivals(closed)) == []
    assert log.steps.count("closed") <= 1
    assert list(arrivals(other)) == ["other!"]
    assert sorted(log.closed, key="closed other".split().index)[-1] == "other"


def test_closing_a_request_that_waits_takes_nothing_but_its_place(log: Log) -> None:
    worker = Scheduler(max_active=1)
    log.gate.clear()
    running, waiting = log.request("running", 3), log.request("waiting", 3)
    worker.submit(running)
    worker.submit(waiting)
    waiting.closed = True
    worker.wake()
    log.gate.set()
    assert list(arrivals(waiting)) == []
    assert list(arrivals(running)) == ["running!"]
    assert log.steps == ["running"] * 3


def test_a_hurried_request_does_not_wait_for_its_reader(worker: Scheduler, log: Log) -> None:
    request = log.request("hurried", 3 * AHEAD, silent=False)
    worker.submit(request)
    until(lambda: log.steps.count("hurried") == AHEAD)
    request.hurried = True
    worker.wake()
    assert request.ended.wait(PATIENCE)
    assert list(arrivals(request))[-1] == "hurried!"


def test_time_runs_out_between_steps(worker: Scheduler, log: Log) -> None:
    late, other = log.request("late", 10**9, timeout=0.02), log.request("other", 5)
    submitted_behind(worker, log, late, other)
    with pytest.raises(RequestTimeoutError, match="timeout=0.02 seconds passed before the answer was complete"):
        list(arrivals(late))
    assert log.closed[-1] == "late"
    assert list(arrivals(other)) == ["other!"]


def test_time_runs_while_a_request_waits(log: Log) -> None:
    worker = Scheduler(max_active=1)
    busy, late = log.request("busy", 10**9), log.request("late", 1, timeout=0.02)
    submitted_behind(worker, log, busy, late)
    with pytest.raises(RequestTimeoutError, match="waited behind others"):
        list(arrivals(late))
    assert "late" not in log.steps
    busy.closed = True
    worker.wake()
    list(arrivals(busy))


def test_time_stands_still_while_the_reader_is_behind(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(ouroboros_llm.serving.request, "monotonic", lambda: clock)
    request = log.request("r", 1, timeout=5)
    request.submitted()
    clock = 104.0
    assert not request.late and request.clock.seconds == 4
    for _ in range(AHEAD):
        request.arrived.put("item")
    assert not request.late
    clock = 204.0
    assert not request.late and request.clock.seconds == 4
    request.arrived.get()
    assert not request.late
    clock = 204.9
    assert not request.late and request.clock.seconds == pytest.approx(4.9)
    clock = 205.1
    assert request.late


def test_what_remains_is_done_before_the_end_arrives_and_holds_nobody_up(worker: Scheduler, log: Log) -> None:
    go_on, done = threading.Event(), []

    def after() -> None:
        assert go_on.wait(PATIENCE)
        done.append(threading.current_thread())

    slow, other = log.request("slow", 1, after=after), log.request("other", 3)
    submitted_behind(worker, log, slow, other)
    assert list(arrivals(other)) == ["other!"]
    assert slow.arrived.empty() and worker.requests == 1
    go_on.set()
    assert list(arrivals(slow)) == ["slow!"]
    assert len(done) == 1


def test_an_error_in_what_remains_reaches_the_caller(worker: Scheduler, log: Log) -> None:
    request = log.request("r", 1, after=lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    worker.submit(request)
    with pytest.raises(ZeroDivisionError):
        list(arrivals(request))
    assert not worker.requests


def test_settling_waits_for_what_was_closed(worker: Scheduler, log: Log) -> None:
    done: list[str] = []
    request = log.request("closed", 10**9, after=lambda: done.append("after"))
    worker.submit(request)
    until(lambda: log.steps)
    request.closed = True
    worker.settle()
    assert (log.closed, done) == (["closed"], ["after"])


def test_settling_takes_no_place() -> None:
    worker, log = Scheduler(max_active=1), Log()
    worker.submit(request := log.request("endless", 10**9))
    until(lambda: log.steps)
    settled = threading.Thread(target=worker.settle, daemon=True)
    settled.start()
    settled.join(PATIENCE)
    assert not settled.is_alive() and not request.ended.is_set()
    request.closed = True
    worker.retire()
    worker.join(PATIENCE)


def test_an_error_outside_of_steps_ends_all_and_the_next_starts_anew(
    worker: Scheduler, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise ZeroDivisionError("of the worker's own")

    requests = [log.request(name, 10**9, after=lambda: None) for name in "ab"]
    for request in requests:
        worker.submit(request)
    until(lambda: {*log.steps} == {*"ab"})
    monkeypatch.setattr(worker, "_admit", fails)
    for request in requests:
        with pytest.raises(ZeroDivisionError, match="of the worker's own"):
            list(arrivals(request))
    assert sorted(log.closed) == ["a", "b"]
    until(lambda: not worker.requests)
    monkeypatch.undo()
    assert worker.run(log.request("c", 3).steps) == "c!"


def test_running_waits_for_the_result_and_raises_what_was_raised(worker: Scheduler, log: Log) -> None:
    def fails() -> Steps[str]:
        yield None
        raise ZeroDivisionError("in a step")

    worker.submit(other := log.request("other", 10**9))
    assert worker.run(log.request("mine", 5).steps) == "mine!"
    with pytest.raises(ZeroDivisionError, match="in a step"):
        worker.run(fails())
    assert worker.requests == 1
    other.closed = True


def test_a_step_must_not_wait_for_another_request(worker: Scheduler, log: Log) -> None:
    def steps() -> Steps[str]:
        worker.submit(log.request("inner", 1))
        yield None
        return None

    worker.submit(request := Request(steps()))
    with pytest.raises(OuroborosError, match="make that call in a thread"):
        list(arrivals(request))


def test_the_thread_ends_when_nobody_comes_and_starts_again(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ouroboros_llm.serving.scheduler, "IDLE_SECONDS", 0.01)
    worker = Scheduler()
    for name in "ab":
        worker.submit(request := log.request(name, 2))
        assert list(arrivals(request)) == [f"{name}!"]
        until(lambda: worker._thread is None)


def test_a_worker_keeps_neither_the_model_nor_what_ended(log: Log) -> None:
    class Model:
        pass

    model, held = Model(), Model()
    worker = scheduler_for(model)
    assert scheduler_for(model) is worker

    def steps(kept: object) -> Steps[str]:
        yield None
        return "done"

    worker.submit(request := Request(steps(held)))
    assert list(arrivals(request)) == ["done"]
    thread = worker._thread
    references = [weakref.ref(model), weakref.ref(held)]
    del model, held
    gc.collect()
    until(lambda: not any(reference() for reference in references))
    assert thread is not None
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_many_threads_at_once(worker: Scheduler) -> None:
    def steps(number: int) -> Generator[int, None, int]:
        for step in range(number % 7):
            yield 1000 * number + step
        return -number - 1

    wrong: list[int] = []

    def ask(first: int) -> None:
        for number in range(first, 200, 16):
            worker.submit(request := Request(steps(number)))
            items = []
            for item in arrivals(request):
                items.append(item)
                worker.wake()
            if items != [*(1000 * number + step for step in range(number % 7)), -number - 1]:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert wrong == [] and worker.requests == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_anew() -> None:
    code = """
import os, sys, threading
from ouroboros_llm.serving.request import End, Request
from ouroboros_llm.serving.scheduler import Scheduler

worker, gate, closed = Scheduler(), threading.Event(), []

def steps(name, number):
    try:
        for _ in range(number):
            yield name
    finally:
        closed.append((os.getpid(), name))
    return "end"

def read(request):
    items = []
    while not isinstance(item := request.arrived.get(timeout=60), End):
        items.append(item)
        worker.wake()
    return items, item.error

running = Request(steps("running", 10**9))
worker.submit(running)
running.arrived.get(timeout=60)
for _ in range(20):
    child = os.fork()
    if child == 0:
        _, error = read(running)
        assert "belongs to the parent" in str(error), error
        worker.submit(request := Request(steps("child", 3)))
        assert read(request) == (["child"] * 3 + ["end"], None)
        assert closed == [(os.getpid(), "child")], closed
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
running.closed = True
worker.wake()
_, error = read(running)
assert error is None and closed == [(os.getpid(), "running")]
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE * 2)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_threads_fork_at_once_and_children_find_locks_free() -> None:
    code = """
import os, threading
from ouroboros_llm.serving.request import Request
from ouroboros_llm.serving.scheduler import Scheduler
from ouroboros_llm.sessions.prefix_cache import MEMORY

def steps():
    for _ in range(3):
        yield None
    return "end"

workers, stop, wrong = [Scheduler() for _ in range(5)], threading.Event(), []

def busy():
    while not stop.is_set():
        with MEMORY.lock:
            sum(range(1000))
        workers.append(Scheduler())
        del workers[5:]

def fork():
    for _ in range(15):
        child = os.fork()
        if child == 0:
            # A lock that another thread of the parent held would never be free here.
            free = []
            def take():
                with MEMORY.lock:
                    free.append(True)
            taker = threading.Thread(target=take, daemon=True)
            taker.start()
            taker.join(20)
            os._exit(0 if free and workers[0].run(steps()) == "end" else 1)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            wrong.append(child)

threading.Thread(target=busy, daemon=True).start()
forking = [threading.Thread(target=fork) for _ in range(3)]
for thread in forking:
    thread.start()
for thread in forking:
    thread.join()
stop.set()
assert workers[1].run(steps()) == "end"
print(len(wrong))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE * 4)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("state", ["idle", "running", "paused"])
def test_the_interpreter_can_exit(state: str) -> None:
    code = f"""
import time
from ouroboros_llm.serving.request import Request
from ouroboros_llm.serving.scheduler import Scheduler

stepped = []

def steps():
    try:
        while True:
            stepped.append(1)
            yield None if {state == "running"} else "item"
            if {state == "idle"}:
                return
    finally:
        print("closed", flush=True)

worker = Scheduler()
request = Request(steps(), after=lambda: print("after", flush=True))
worker.submit(request)
if {state == "idle"}:
    request.ended.wait(60)
while not stepped or ({state == "paused"} and request.ready):
    time.sleep(0.001)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "closed\nafter\n"), done.stderr
