"""An answer while it comes: the caller's side of a request, for threads and for event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from contextvars import Context, copy_context
from functools import partial
from queue import Empty
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

from ..results import GenerationResult, StreamChunk
from .request import End, Request
from .scheduler import Scheduler

CLOSE_SECONDS = 5.0
"""How long `close` waits for a round to end. Bounded, because a finalizer may call it in a thread that holds a lock
which the end of the request needs."""


PLACES = 64
"""Whole answers that an event loop waits for at once: more than take turns in a model."""

_places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


class Stream:
    """The pieces of an answer, for `for` and for `async for`; the last one carries the result.

    Decoding starts when the first piece is asked for, and stays at most a few pieces ahead of the reader. Any thread
    may call `cancel` and `close`.

    Raises, when read:
        QueueFullError: too many requests wait. RequestTimeoutError: `options.timeout` passed. MemoryLimitError: no
        memory for this answer. After any of them other requests go on.
    """

    def __init__(self, worker: Scheduler, request: Request[StreamChunk], cancelled: threading.Event) -> None:
        """`cancelled`: what the request's steps look at."""
        self._worker, self._request, self._cancelled = worker, request, cancelled
        self._begun = threading.Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamChunk:
        self.begin()
        piece = None if self._request.closed else self._taken(self._request.arrived.get())
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        self.begin()
        while not self._request.closed:
            try:
                piece = self._taken(self._request.arrived.get_nowait())
            except Empty:
                await self._arrival()
                continue
            if piece is None:
                break
            return piece
        raise StopAsyncIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.abandon()

    def whole(self) -> Self:
        """Let the last piece alone arrive, which carries the result: fewer switches between threads."""
        self._request.whole = True
        return self

    def cancel(self) -> None:
        """End the answer within one round. The last piece has what was said until then, with the finish reason
        "cancelled"."""
        self._cancelled.set()
        self._request.hurried = True
        self._worker.wake()

    def abandon(self) -> None:
        """End the request within one round; nothing more is read. Does not wait. What was said is learned."""
        self._request.closed = True
        if not self._request.ended.is_set():
            self._worker.wake()

    def close(self) -> None:
        """As `abandon`, and wait for the end of the round that runs."""
        self.abandon()
        if self._begun.locked() and not self._worker.is_current_thread:
            self._request.ended.wait(CLOSE_SECONDS)

    async def aclose(self) -> None:
        """As `abandon`."""
        self.abandon()

    def begin(self) -> None:
        """Start decoding, if that has not happened yet. Raises QueueFullError."""
        # A lock that is taken once and never given back: whoever gets it submits.
        if self._request.closed or not self._begun.acquire(blocking=False):
            return
        try:
            self._worker.submit(self._request)
        except BaseException:
            self._begun.release()
            raise

    def _taken(self, arrived: StreamChunk | End) -> StreamChunk | None:
        if isinstance(arrived, StreamChunk):
            self._worker.wake()
            return arrived
        # For whoever asks again.
        self._request.arrived.put(End())
        if arrived.error is not None:
            raise arrived.error
        return None

    async def _arrival(self) -> None:
        """Wait until something has arrived."""
        loop = asyncio.get_running_loop()
        arrival = loop.create_future()
        self._request.on_arrival = partial(_tell, loop, arrival)
        if self._request.arrived.empty():
            await arrival


def _tell(loop: asyncio.AbstractEventLoop, arrival: asyncio.Future[None]) -> None:
    def arrived() -> None:
        if not arrival.done():
            arrival.set_result(None)

    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(arrived)


def results(streams: Sequence[Stream], ahead: int) -> list[GenerationResult]:
    """The results of all, in order; `ahead` of the one waited for have begun. What one raises ends the others."""
    found: list[GenerationResult] = []
    try:
        for place, stream in enumerate(streams):
            for begun in streams[place : place + ahead]:
                begun.begin()
            *_, last = stream
            assert last.result is not None  # the last piece always carries it
            found.append(last.result)
    finally:
        for stream in streams[len(found) :]:
            stream.abandon()
    return found


def off_the_loop(start: Callable[[], Iterator[StreamChunk]]) -> AsyncGenerator[StreamChunk]:
    """The pieces that `start` answers with, for an event loop, which is never blocked.

    Args:
        start: runs in a thread of its own, as it may load a model, read a long prompt or open a database; in the
            context of this call (`ouroboros_scope`), wherever the pieces are read. What it returns is a `Stream`, or
            any other generator of pieces, which that thread then runs too.

    Cancelling the task, or closing the generator, ends the decoding within one round and does not wait for that.
    """
    return _off_the_loop(start, copy_context())


async def _off_the_loop(start: Callable[[], Iterator[StreamChunk]], context: Context) -> AsyncGenerator[StreamChunk]:
    loop = asyncio.get_running_loop()
    # Not a shared pool: what waits there could take all the threads that those need which it waits for.
    thread = ThreadPoolExecutor(1, thread_name_prefix="ouroboros")
    pieces: Any = None
    try:
        pieces = await loop.run_in_executor(thread, context.run, start)
        if isinstance(pieces, Stream):
            thread.shutdown(wait=False)
            async for piece in pieces:
                yield piece
        else:
            while (item := await loop.run_in_executor(thread, context.run, partial(next, pieces, None))) is not None:
                yield item
    finally:
        if isinstance(pieces, Stream):
            pieces.abandon()
        elif pieces is not None:
            # A cancelled `await` leaves its round running in the thread. One thread means that closing comes after it.
            thread.submit(pieces.close)
        thread.shutdown(wait=False)


def place() -> asyncio.Semaphore:
    """A place among the whole answers that an event loop waits for at once; for `async with`.

    Without it the thousands of a batch would have a thread each and fill the model's bounded queue. Streams take none:
    their readers may pause.
    """
    return _places.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(PLACES))


def shown(stream: Iterator[StreamChunk]) -> Generator[StreamChunk]:
    """The pieces that hold text, and the last one. Closing it closes `stream`, which ends the decoding."""
    pieces = cast("Generator[StreamChunk]", stream)
    try:
        for piece in pieces:
            if piece.text or piece.result is not None:
                yield piece
    finally:
        pieces.close()


async def ashown(stream: AsyncGenerator[StreamChunk]) -> AsyncGenerator[StreamChunk]:
    """As `shown`."""
    async with aclosing(stream) as pieces:
        async for piece in pieces:
            if piece.text or piece.result is not None:
                yield piece
