"""Prefix cache: KV caches kept between requests, with a byte budget and LRU eviction."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from weakref import WeakSet

from ..decoding.target import KeptTarget
from ..errors import OptionError
from ..serving.fork_safety import guard
from ..target_model.eager import PREFILL_CHUNK
from ..target_model.failures import out_of_memory

KV_BYTES = 1 << 30
"""Keys and values kept in the process unless `$OUROBOROS_KV_BYTES` or `limit_kv_bytes` says otherwise."""

_PER_SCOPE = 8
"""Idle workspaces of one scope at most: an agent has a few prompts that it comes back to."""

_SHORT = 64
"""A text that is cut to fewer tokens than this is dropped: reading it again is cheap."""

_clock = count(1)


@dataclass(eq=False)
class CachedSequence:
    """Targets that hold the text of one turn; used by one turn at a time."""

    target: KeptTarget
    draft_target: KeptTarget | None = None
    used: int = 0
    """When a turn had it last, as a number that grows."""
    measured: int | None = None
    """Its bytes while nobody uses it: many are added up whenever a turn begins or ends."""

    @property
    def targets(self) -> list[KeptTarget]:
        return [target for target in (self.target, self.draft_target) if target is not None]

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.target.token_ids)

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets) if self.measured is None else self.measured

    def rest(self) -> None:
        """Note the size, which is what it is until the next turn."""
        self.measured = None
        self.measured = self.nbytes

    def fork(self, token_ids: Sequence[int]) -> CachedSequence:
        """A workspace that holds what this one has read of `token_ids`, in storage of its own."""
        target, draft = self.target, self.draft_target
        return CachedSequence(
            target.fork(target.common_prefix(token_ids)),
            None if draft is None else draft.fork(draft.common_prefix(token_ids)),
        )

    def reading(self, token_ids: Sequence[int], draft_limit: int | None) -> Iterator[bool]:
        """Read a text and no more, a step a chunk, each of which yields False; the draft model only its first
        `draft_limit` tokens, where that is its context."""
        for target in self.targets:
            text = token_ids if target is self.target else token_ids[:draft_limit]
            for end in (*chunk_ends(target, text), len(text)):
                target.prefill(text[:end])
                yield False
            target.keep((0,))
            target.shrink(len(text))

    def shrink(self, length: int) -> None:
        """Forget the text after its first `length` tokens, or after fewer where it cannot be cut there."""
        for target in self.targets:
            target.shrink(target.reach(length))
        self.rest()


def chunk_ends(target: KeptTarget, text: Sequence[int]) -> Sequence[int]:
    """Where the chunks end in which a text is best read, its last one left out, so that others get in between.

    The last token of each is read again by the next, because a pass leaves it pending.
    """
    if not target.can_rewind:
        return ()
    return range(target.common_prefix(text) + PREFILL_CHUNK, len(text), PREFILL_CHUNK - 1)


@dataclass(frozen=True, slots=True)
class KVUsage:
    """Bytes of keys, values and other states, room to grow included."""

    in_use: int
    """Of turns that are running."""
    idle: int
    """Left by turns for the next ones of their scope; goes first where room is needed."""
    kept: int
    """Of prefixes that `Ouroboros.keep_prefix` keeps."""
    limit: int
    """For all of them in the whole process. Turns that run are never cut short for it."""

    @property
    def total(self) -> int:
        return self.in_use + self.idle + self.kept


class ScopeCache:
    """The workspaces of one scope. Its memory guards it: nothing here is called without the memory's lock."""

    def __init__(self) -> None:
        self.idle: list[CachedSequence] = []
        self.prefixes: dict[str, CachedSequence] = {}
        self.in_use: WeakSet[CachedSequence] = WeakSet()
        self.closed = False

    def best(self, token_ids: Sequence[int], others: Iterable[ScopeCache] = ()) -> tuple[CachedSequence | None, int]:
        """The workspace that has read most of `token_ids`, and how much; of equals the one with least else. Of `others`
        only prefixes count."""
        kept = [workspace for shelf in (self, *others) for workspace in shelf.prefixes.values()]
        known = [
            (workspace.target.common_prefix(token_ids), -workspace.length, workspace)
            for workspace in [*self.idle, *kept]
        ]
        shared, _, workspace = max(known, key=lambda entry: entry[:2], default=(0, 0, None))
        return (workspace, shared) if shared else (None, 0)

    def put(self, workspace: CachedSequence) -> None:
        """Add an idle workspace, in place of those whose text it holds as well."""
        text = [*workspace.target.token_ids, -1]
        self.idle = [
            other
            for other in self.idle
            if not (
                workspace.target.can_rewind and workspace.length >= other.length == other.target.common_prefix(text)
            )
        ]
        workspace.rest()
        self.idle.append(workspace)
        self.idle.sort(key=lambda idle: idle.used)
        del self.idle[:-_PER_SCOPE]

    def close(self) -> None:
        """Drop everything; what turns still use is dropped when they give it back."""
        self.closed = True
        self.idle.clear()
        self.prefixes.clear()


class PrefixCache:
    """All workspaces, bounded in bytes: the least recently used are cut and dropped first."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit` in bytes; None: `$OUROBOROS_KV_BYTES`, or 1 GiB."""
        # Re-entrant: an abandoned stream may be finalized by the garbage collector at any allocation, in here too.
        self.lock = threading.RLock()
        self._limit = limit
        self._shelves: WeakSet[ScopeCache] = WeakSet()

    @property
    def limit(self) -> int:
        """Raises OptionError where `$OUROBOROS_KV_BYTES` is no number of bytes."""
        if self._limit is None:
            self._limit = _checked("$OUROBOROS_KV_BYTES", os.environ.get("OUROBOROS_KV_BYTES") or KV_BYTES)
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = _checked("limit", limit)
        self.make_room()

    def shelf(self) -> ScopeCache:
        shelf = ScopeCache()
        with self.lock:
            self._shelves.add(shelf)
        return shelf

    def usage(self, shelves: Iterable[ScopeCache] | None = None) -> KVUsage:
        """Of `shelves`, or of all of them."""
        with self.lock:
            shelves = list(self._shelves if shelves is None else shelves)
            return KVUsage(
                in_use=_nbytes(shelf.in_use for shelf in shelves),
                idle=_nbytes(shelf.idle for shelf in shelves),
                kept=_nbytes(shelf.prefixes.values() for shelf in shelves),
                limit=self.limit,
            )

    def take(
        self,
        shelf: ScopeCache,
        token_ids: Sequence[int],
        start: Callable[[], CachedSequence],
        *,
        others: Sequence[ScopeCache] = (),
        copies: bool = False,
    ) -> CachedSequence:
        """A workspace for a turn over `token_ids`: what is idle, a copy of what others still want, or a new one.
        `others`: shelves whose prefixes may be copied too.

        What a turn takes it cuts to the prefix that it shares. So where the larger part would be lost, and always where
        a prefix is kept or `copies` is asked for, the turn gets a copy of that prefix.
        """
        with self.lock:
            found, shared = shelf.best(token_ids, others)
            idle = found in shelf.idle
            if found is not None and idle:
                shelf.idle.remove(found)
                shelf.in_use.add(found)
                found.measured = None
        if found is None:
            workspace = start()
        elif idle and not copies and 2 * shared >= found.length:
            return found
        else:
            workspace = self._copied(shelf, found, token_ids, idle) or start()
        with self.lock:
            shelf.in_use.add(workspace)
            self.make_room()
        return workspace

    def give_back(self, shelf: ScopeCache, workspace: CachedSequence) -> None:
        """Keep a turn's workspace for the next turn of its scope, as far as it can be used again and memory allows."""
        workspace.used = next(_clock)
        with self.lock:
            shelf.in_use.discard(workspace)
            if workspace.target.reusable and not shelf.closed:
                shelf.put(workspace)
            self.make_room()

    def keep(self, shelf: ScopeCache, name: str, workspace: CachedSequence) -> None:
        """Keep a workspace as a prefix, in place of what had its name. Raises OptionError where there is no room."""
        with self.lock:
            shelf.in_use.discard(workspace)
            if shelf.closed:
                return
            workspace.rest()
            old = shelf.prefixes.get(name)
            kept, size = self.usage().kept - (old.nbytes if old else 0), workspace.nbytes
            if kept + size > self.limit:
                raise OptionError(
                    f"prefix {name!r} takes {size} bytes of keys and values, but of the limit of {self.limit} "
                    f"other prefixes keep {kept}; shorten it, drop another, or raise the limit with limit_kv_bytes"
                )
            shelf.prefixes[name] = workspace
            self.make_room()

    def make_room(self, nbytes: int = 0) -> None:
        """Cut and drop what is idle until the limit holds with `nbytes` more, least recently used first."""
        with self.lock:
            over = self.usage().total + nbytes - self.limit
            for shelf, workspace, cut in self._victims():
                if over <= 0:
                    return
                before = workspace.nbytes
                if not _shrunk(workspace, workspace.length // 2 if cut else workspace.length):
                    shelf.idle.remove(workspace)
                    over -= before
                elif workspace.length < _SHORT and cut and workspace in shelf.idle:
                    shelf.idle.remove(workspace)
                    over -= before
                else:
                    over -= before - workspace.nbytes

    def _victims(self) -> Iterator[tuple[ScopeCache, CachedSequence, bool]]:
        """Idle workspaces in the order in which they give up room: first what they have to spare, then, one after the
        other, half of the text, half of that and so on."""
        found = [(shelf, workspace) for shelf in list(self._shelves) for workspace in list(shelf.idle)]
        found.sort(key=lambda entry: entry[1].used)
        for shelf, workspace in found:
            yield shelf, workspace, False
        for shelf, workspace in found:
            while workspace in shelf.idle:
                yield shelf, workspace, True

    def _copied(
        self, shelf: ScopeCache, found: CachedSequence, token_ids: Sequence[int], idle: bool
    ) -> CachedSequence | None:
        """A copy of what `found` has read of `token_ids`, or None where there is no memory for it; if it was idle,
        nobody else has it meanwhile."""
        try:
            return found.fork(token_ids)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None
        finally:
            if idle:
                with self.lock:
                    shelf.in_use.discard(found)
                    if not shelf.closed:
                        shelf.put(found)


def _nbytes(groups: Iterable[Iterable[CachedSequence]]) -> int:
    return sum(workspace.nbytes for group in groups for workspace in list(group))


def _checked(name: str, limit: object) -> int:
    try:
        number = -1 if isinstance(limit, (bool, float)) else int(limit)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise OptionError(f"{name} must be a whole number of bytes, at least 0, but got {limit!r}")
    return int(number)


MEMORY = PrefixCache()
guard(MEMORY.lock)
"""The process-wide prefix cache."""


def kv_usage() -> KVUsage:
    """Bytes of keys and values in the process, whichever `Ouroboros` they belong to."""
    return MEMORY.usage()


def limit_kv_bytes(limit: int) -> None:
    """Bound the keys and values of the process, in bytes, now and from now on; 0 keeps nothing between turns.

    Raises:
        OptionError: no whole number.
    """
    MEMORY.limit = limit


def _shrunk(workspace: CachedSequence, length: int) -> bool:
    """Cut a text; False where there is not even the memory for a smaller copy, and it had better go whole."""
    try:
        workspace.shrink(length)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    return True
