"""Streams of responses: cumulative, and closed for certain."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import TypeVar

from ouroboros_llm import Piece

from .responses import Respond, whole

R = TypeVar("R")
Pieces = Generator[Piece, None, None]
AsyncPieces = AsyncGenerator[Piece, None]


def cumulative(pieces: Pieces, respond: Respond[R]) -> Generator[R, None, None]:
    """A response per piece: all text so far, and what is new as `delta`."""
    text = ""
    for piece in pieces:
        text += piece.text
        yield respond(text, piece.text, piece.result)


async def acumulative(pieces: AsyncPieces, respond: Respond[R]) -> AsyncGenerator[R, None]:
    text = ""
    async for piece in pieces:
        text += piece.text
        yield respond(text, piece.text, piece.result)


def in_full(pieces: Pieces, respond: Respond[R]) -> R:
    """One response for all pieces."""
    *_, last = pieces
    return whole(last, respond)


async def ain_full(pieces: AsyncPieces, respond: Respond[R]) -> R:
    """As `in_full`."""
    async with aclosing(pieces):
        async for piece in pieces:
            last = piece
    return whole(last, respond)


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
