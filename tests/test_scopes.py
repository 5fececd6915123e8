"""`ouroboros_scope`: which calls it holds for, and how it comes through to tasks and threads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import pytest
from conftest import byte_tokenizer, tiny_model

from ouroboros_llm import DecodingOptions, OptionError, Ouroboros, PhrasePool, ouroboros_scope
from ouroboros_llm.ouroboros import DEFAULT_SCOPE
from ouroboros_llm.phrase_pool.memory import MemorySource
from ouroboros_llm.scopes import current_scope, scope_of


class Watched(MemorySource):
    """Notes which scopes are opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def open(self, scope: str, *, fingerprint: str) -> PhrasePool:
        self.opened.append(scope)
        return super().open(scope, fingerprint=fingerprint)


@pytest.fixture
def source() -> Watched:
    return Watched()


@pytest.fixture
def ouroboros(source: Watched) -> Iterator[Ouroboros]:
    with Ouroboros(tiny_model(), byte_tokenizer(), store=source) as ouroboros:
        yield ouroboros


SHORT = DecodingOptions(max_new_tokens=4)


async def test_every_call_that_names_no_scope_uses_it(ouroboros: Ouroboros, source: Watched) -> None:
    with ouroboros_scope("conversation:7"):
        ouroboros.generate("ab", options=SHORT)
        list(ouroboros.stream("ab", options=SHORT))
        ouroboros.batch(["ab"], options=SHORT)
        await ouroboros.agenerate("ab", options=SHORT)
        [_ async for _ in ouroboros.astream("ab", options=SHORT)]
        assert set(source.opened) == {"conversation:7"}
        ouroboros.generate("ab", options=SHORT, scope="conversation:8")
    assert source.opened[-1] == "conversation:8"
    ouroboros.generate("ab", options=SHORT)
    assert source.opened[-1] == DEFAULT_SCOPE


async def test_a_stream_has_the_scope_in_which_it_was_begun(ouroboros: Ouroboros, source: Watched) -> None:
    with ouroboros_scope("begun"):
        stream, astream = ouroboros.stream("ab", options=SHORT), ouroboros.astream("ab", options=SHORT)
    with ouroboros_scope("read"):
        assert list(stream) and [piece async for piece in astream]
    assert set(source.opened) == {"begun"}
    stream, astream = ouroboros.stream("ab", options=SHORT), ouroboros.astream("ab", options=SHORT)
    with ouroboros_scope("read"):
        assert list(stream) and [piece async for piece in astream]
    assert set(source.opened) == {"begun", DEFAULT_SCOPE}


def test_the_innermost_holds_and_ends_with_its_block() -> None:
    with ouroboros_scope("a") as outer:
        assert (outer, current_scope()) == ("a", "a")
        with pytest.raises(ZeroDivisionError), ouroboros_scope("b"):
            assert current_scope() == "b"
            _ = 1 / 0
        assert current_scope() == "a"
    assert current_scope() is None


async def test_tasks_at_once_have_their_own() -> None:
    async def look(name: str) -> str | None:
        with ouroboros_scope(name):
            await asyncio.sleep(0)
            return await asyncio.to_thread(current_scope)

    names = [f"conversation:{number}" for number in range(20)]
    assert await asyncio.gather(*map(look, names)) == names
    with ouroboros_scope("outer"):
        task = asyncio.create_task(asyncio.to_thread(current_scope))
    assert await task == "outer"


def test_a_generator_that_is_read_in_several_contexts_says_so() -> None:
    def speak() -> Iterator[str | None]:
        with ouroboros_scope("a"):
            yield current_scope()
            yield current_scope()

    speaking = speak()
    read = partial(next, speaking, "end")
    assert copy_context().run(read) == "a" and copy_context().run(read) is None, "as Python has it"
    with pytest.warns(RuntimeWarning, match="name it in each of them"):
        assert copy_context().run(read) == "end"
    assert current_scope() is None


def test_threads_see_it_with_a_copy_of_the_context() -> None:
    with ThreadPoolExecutor(1) as pool, ouroboros_scope("mine"):
        assert pool.submit(copy_context().run, current_scope).result() == "mine"
        assert pool.submit(current_scope).result() is None


@pytest.mark.parametrize("scope", ["", "a\nb", None, 7, "x" * 256])
def test_only_names(scope: str) -> None:
    with pytest.raises(OptionError, match="scope must be 1 to 255 printable characters"), ouroboros_scope(scope):
        pass
    assert current_scope() is None


def test_ids_are_data() -> None:
    assert scope_of("conversation", "corpus:manuals") == "conversation:corpus:manuals"
    scopes = {scope_of("conversation", id) for id in ("a" * 300, "a" * 301, "a\nb")}
    assert len(scopes) == 3 and all(scope.startswith("conversation:sha256-") for scope in scopes)
