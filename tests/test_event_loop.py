"""Event loops go on while a store is slow, whichever adapter asks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
from conftest import byte_tokenizer, tiny_model

import langchain_ouroboros as langchain
from llama_index.llms.ouroboros import OuroborosLLM
from ouroboros_llm import Ouroboros, PhrasePool
from ouroboros_llm.phrase_pool.memory import MemorySource

Ask = Callable[[Ouroboros], Awaitable[object]]


class SlowSource:
    """A store that waits, at every opening and every flush, until it is told to go on."""

    def __init__(self) -> None:
        self._pools = MemorySource()
        self.waits, self.go_on = threading.Event(), threading.Event()
        self.threads: set[int] = set()

    def open(self, scope: str, *, fingerprint: str) -> PhrasePool:
        self._wait()
        return self._pools.open(scope, fingerprint=fingerprint)

    def flush(self) -> None:
        self._wait()

    def close(self) -> None:
        """Nothing to release."""

    def _wait(self) -> None:
        self.threads.add(threading.get_ident())
        self.waits.set()
        assert self.go_on.wait(60)
        self.go_on.clear()


async def streamed(ouroboros: Ouroboros) -> object:
    return [piece async for piece in ouroboros.astream("abc")]


ASKS: dict[str, Ask] = {
    "agenerate": lambda ouroboros: ouroboros.agenerate("abc"),
    "astream": streamed,
    "langchain chat": lambda ouroboros: langchain.ChatOuroboros(ouroboros=ouroboros, max_tokens=8).ainvoke("a"),
    "langchain text": lambda ouroboros: langchain.OuroborosLLM(ouroboros=ouroboros, max_tokens=8).ainvoke("a"),
    "llama-index chat": lambda ouroboros: OuroborosLLM(ouroboros=ouroboros, max_tokens=8).acomplete("a"),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
async def test_a_slow_store_does_not_hold_up_the_loop(ask: Ask) -> None:
    source = SlowSource()
    ouroboros = Ouroboros(tiny_model(), byte_tokenizer(), store=source)
    task, waits = asyncio.ensure_future(ask(ouroboros)), 0
    while not task.done():
        # This line is reached while the store waits, or never.
        await asyncio.sleep(0.001)
        if source.waits.is_set():
            source.waits.clear()
            waits += 1
            source.go_on.set()
    await task
    assert waits >= 2, "at the beginning and at the end of the turn"
    assert threading.get_ident() not in source.threads
