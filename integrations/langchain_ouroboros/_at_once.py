"""Several prompts of one call, each in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from itertools import takewhile
from threading import Event
from typing import TypeVar

from langchain_core.outputs import Generation, GenerationChunk
from langchain_core.runnables.config import ContextThreadPoolExecutor

_Manager = TypeVar("_Manager")

_AT_ONCE = 32
"""Prompts of one call that are answered at once: what of them the model reads together it reads in one pass."""


def at_once(
    answer: Callable[[str, _Manager], Iterator[GenerationChunk]],
    prompts: Sequence[str],
    listeners: Sequence[_Manager],
) -> list[Generation]:
    """The answers to all prompts, in their order. What one raises ends the others."""
    if len(prompts) == 1:
        return [join(list(answer(prompts[0], listeners[0])))]
    pool, over = ContextThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ouroboros-prompts"), Event()

    def whole(prompt: str, listener: _Manager) -> Generation:
        # A chunk that is let go of closes the stream behind it, which ends the decoding.
        return join(list(takewhile(lambda _: not over.is_set(), answer(prompt, listener))))

    try:
        answers = [pool.submit(whole, *run) for run in zip(prompts, listeners, strict=True)]
        for failed in wait(answers, return_when=FIRST_EXCEPTION).done:
            failed.result()
        return [answer.result() for answer in answers]
    finally:
        # After an error nobody waits for the others.
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)


def join(chunks: Sequence[GenerationChunk]) -> Generation:
    """The whole of a stream."""
    return Generation(text="".join(chunk.text for chunk in chunks), generation_info=chunks[-1].generation_info)
