"""The store for programs on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import URL, Engine

from .pool import LayeredPool, StoredPool
from .records import StoredNote, StoredRun, StoredScope, StoreStats
from .store import PhraseStore

Result = TypeVar("Result")

_BATCH = 500
"""Records handed over from a thread at a time."""


class AsyncPhraseStore:
    """A `PhraseStore` whose methods are coroutines: each runs in a thread, so a slow database never holds up the loop.

    What pools themselves do (`add`, `match`) touches memory only and needs no `await`.

    Example:
        ```python
        async with AsyncPhraseStore("sqlite:///phrases.db") as store:
            pool = await store.open("conversation:42", fingerprint=tokenizer_hash)
            pool.add(token_ids)
            await store.flush()
        ```
    """

    def __init__(self, store: PhraseStore | str | URL | Engine, **options: Any) -> None:
        """Wrap a store, or make one of a URL or an engine; `options` are those of `PhraseStore`.

        Raises what `PhraseStore` raises; nothing is opened before the first call that is awaited.
        """
        self.store = store if isinstance(store, PhraseStore) else PhraseStore(store, check=False, **options)
        """The store itself, which `Ouroboros(store=...)` takes."""

    async def __aenter__(self) -> AsyncPhraseStore:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def setup(self) -> None:
        await asyncio.to_thread(self.store.setup)

    async def open(
        self, scope: str, *, fingerprint: str, read_scopes: Sequence[str] = (), ephemeral: bool = False
    ) -> StoredPool | LayeredPool:
        return await asyncio.to_thread(
            self.store.open, scope, fingerprint=fingerprint, read_scopes=read_scopes, ephemeral=ephemeral
        )

    async def flush(self) -> None:
        await asyncio.to_thread(self.store.flush)

    async def refresh(self) -> None:
        await asyncio.to_thread(self.store.refresh)

    async def list(self) -> Sequence[StoredScope]:
        return await asyncio.to_thread(self.store.list)

    async def stats(self, scope: str | None = None) -> StoreStats:
        return await asyncio.to_thread(self.store.stats, scope)

    async def copy(self, source: str, target: str) -> int:
        return await asyncio.to_thread(self.store.copy, source, target)

    async def merge(self, sources: str | Sequence[str], target: str) -> int:
        return await asyncio.to_thread(self.store.merge, sources, target)

    async def rename(self, source: str, target: str) -> int:
        return await asyncio.to_thread(self.store.rename, source, target)

    async def delete(self, scope: str) -> int:
        return await asyncio.to_thread(self.store.delete, scope)

    async def prune(
        self,
        scope: str | None = None,
        *,
        max_tokens: int | None = None,
        max_age: timedelta | float | None = None,
        max_runs: int | None = None,
    ) -> int:
        return await asyncio.to_thread(
            self.store.prune, scope, max_tokens=max_tokens, max_age=max_age, max_runs=max_runs
        )

    def export(self, scope: str) -> AsyncIterator[StoredRun]:
        return _in_batches(self.store.export, scope)

    def export_notes(self, scope: str) -> AsyncIterator[StoredNote]:
        return _in_batches(self.store.export_notes, scope)

    async def import_(self, records: Iterable[StoredRun | StoredNote]) -> int:
        return await asyncio.to_thread(self.store.import_, records)

    async def check(self, advance: Callable[[int], None] | None = None) -> Sequence[str]:
        """`advance` is called from the thread."""
        return await asyncio.to_thread(self.store.check, advance)

    async def close(self) -> None:
        await asyncio.to_thread(self.store.close)


async def _in_batches(export: Callable[[str], Iterator[Result]], scope: str) -> AsyncIterator[Result]:
    found = await asyncio.to_thread(export, scope)
    while batch := await asyncio.to_thread(lambda: list(islice(found, _BATCH))):
        for record in batch:
            yield record
