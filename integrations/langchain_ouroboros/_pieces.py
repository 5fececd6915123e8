"""The stream of one answer: limited in time, and read from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from time import perf_counter
from typing import cast

from ouroboros_llm import Piece


def timed(stream: Iterator[Piece], timeout: float | None) -> Generator[Piece]:
    """The pieces that hold text, and the last one. Closing it closes `stream`, which ends the decoding.

    Args:
        stream: what `Ouroboros.stream` returned.
        timeout: seconds that the model may take, its turn among other calls included, the reader not.

    Raises:
        TimeoutError: after the round in which the time ran out.
    """
    pieces, spent = cast("Generator[Piece]", stream), 0.0
    try:
        while True:
            began = perf_counter()
            piece = next(pieces, None)
            spent += perf_counter() - began
            if piece is None:
                return
            if piece.text or piece.result is not None:
                yield piece
            if timeout is not None and spent > timeout and piece.result is None:
                raise TimeoutError(f"timeout={timeout:g} seconds passed before the answer was complete")
    finally:
        pieces.close()


async def threaded(pieces: Generator[Piece]) -> AsyncGenerator[Piece]:
    """The same pieces for an event loop, which is never blocked.

    Every answer gets a thread of its own: in a shared pool, answers that wait for their round could take all the
    threads that the answer before them needs. Cancelling closes `pieces` as soon as the running round ends.
    """

    def advance() -> Piece | None:
        return next(pieces, None)

    loop, context = asyncio.get_running_loop(), copy_context()
    worker = ThreadPoolExecutor(1, thread_name_prefix="ouroboros")
    try:
        while (piece := await loop.run_in_executor(worker, context.run, advance)) is not None:
            yield piece
    finally:
        # A cancelled `await` leaves its round running in the thread. One thread means that closing comes after it.
        worker.submit(pieces.close)
        worker.shutdown(wait=False)
