"""Streams of responses: cumulative, and closed for certain."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import TypeVar

from ouroboros_llm import StreamChunk
from ouroboros_llm.serving.stream import place

from .asking import Asking
from .responses import Respond, Said

R = TypeVar("R")
Pieces = Generator[StreamChunk, None, None]
AsyncPieces = AsyncGenerator[StreamChunk, None]


def cumulative(asking: Asking, pieces: Pieces, respond: Respond[R]) -> Generator[R, None, None]:
    """A response wherever there is news: all that was said so far, and the text that is new as `delta`."""
    said = Said()
    for piece in pieces:
        if asking.read(piece, said):
            yield respond(said)


async def acumulative(asking: Asking, pieces: AsyncPieces, respond: Respond[R]) -> AsyncGenerator[R, None]:
    said = Said()
    async for piece in pieces:
        if asking.read(piece, said):
            yield respond(said)


def in_full(asking: Asking, respond: Respond[R]) -> R:
    """One response for all pieces."""
    said = Said()
    for piece in asking.pieces():
        asking.read(piece, said)
    said.delta = None
    return respond(said)


async def ain_full(asking: Asking, respond: Respond[R]) -> R:
    """As `in_full`."""
    said = Said()
    async with place(), aclosing(asking.apieces()) as pieces:
        async for piece in pieces:
            asking.read(piece, said)
    said.delta = None
    return respond(said)


def closed_with(responses: Generator[R, None, None], pieces: Pieces) -> Generator[R, None, None]:
    """The responses; closing them closes the pieces too.

    LlamaIndex's callbacks wrap the generator of responses and, when closed, only drop it; a handler that keeps the
    exception event keeps its frames, and with them the model's cache for an abandoned answer.
    """
    with closing(pieces):
        yield from responses


async def aclosed_with(responses: AsyncGenerator[R, None], pieces: AsyncPieces) -> AsyncGenerator[R, None]:
    """As `closed_with`."""
    async with aclosing(pieces), aclosing(responses):
        async for response in responses:
            yield response
