"""What LangChain gets to see of a stream of pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing
from typing import cast

from ouroboros_llm import Piece


def shown(stream: Iterator[Piece]) -> Generator[Piece]:
    """The pieces that hold text, and the last one. Closing it closes `stream`, which ends the decoding."""
    pieces = cast("Generator[Piece]", stream)
    try:
        for piece in pieces:
            if piece.text or piece.result is not None:
                yield piece
    finally:
        pieces.close()


async def ashown(stream: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
    """As `shown`."""
    async with aclosing(stream) as pieces:
        async for piece in pieces:
            if piece.text or piece.result is not None:
                yield piece
