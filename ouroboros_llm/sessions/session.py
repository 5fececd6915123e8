"""What one scope has learned and read: its calibrations, and keys and values to go on from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

from ..drafting.cost_gate import CostTracker
from ..drafting.learned_state import LearnedState
from ..drafting.lookahead import WindowCostTracker
from ..phrase_pool.base import PhrasePool
from ..phrase_pool.memory import MemoryPool
from .prefix_cache import MEMORY, CachedSequence, KVUsage, PrefixCache, ScopeCache


@dataclass(eq=False)
class Window:
    """What lookahead windows found in a scope, and whether they pay there."""

    pool: MemoryPool = field(default_factory=lambda: MemoryPool(capacity=20_000))
    worth: WindowCostTracker = field(default_factory=WindowCostTracker)


@dataclass(eq=False)
class Session:
    """The state of one scope in this process. Nothing of it is seen from another scope."""

    scope: str
    memory: LearnedState = field(default_factory=LearnedState)
    draft_memory: LearnedState = field(default_factory=LearnedState)
    """What the draft model's own drafting learned."""
    worth: CostTracker = field(default_factory=lambda: CostTracker(memory=64, retry=8))
    """Cost gates for drafting, and for the draft model."""
    draft_worth: CostTracker = field(default_factory=CostTracker)
    generation: object = None
    """Changes when the scope's phrases are deleted; what was read and learned goes with them."""
    window: Window = field(default_factory=Window)
    recalled: bool = False
    """Whether the memories were read from the scope's pool."""
    shelf: ScopeCache = field(default_factory=MEMORY.shelf)
    """What earlier turns left; the next ones reuse the prefixes that their texts share."""
    pool: Callable[[], PhrasePool | None] = lambda: None
    """Where the scope's phrases go, as long as its store keeps it open; says when they are deleted."""

    def follow(self, pool: PhrasePool) -> None:
        """Bind to the scope's generation in `pool`; the session is stale once the scope is deleted."""
        self.generation = getattr(pool, "generation", None)
        if self.generation is not None:
            self.pool = ref(pool)

    @property
    def deleted(self) -> bool:
        """Whether the scope was deleted since the session began to follow it."""
        pool = self.pool()
        return pool is not None and self.generation != getattr(pool, "generation", None)


class SessionStore:
    """Sessions by scope, bounded in number and, with all others of the process, in bytes; least recently used first."""

    def __init__(self, capacity: int = 256, memory: PrefixCache = MEMORY) -> None:
        """Raises OptionError where the limit in the environment is no number."""
        self._capacity, self._memory = capacity, memory
        memory.limit  # noqa: B018  # a limit in the environment that is no number is better told now
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        # One lock for sessions and workspaces: neither ever waits for the other.
        self._lock = memory.lock

    def open(self, scope: str) -> Session:
        with self._lock:
            if scope not in self._sessions:
                self._sessions[scope] = Session(scope, shelf=self._memory.shelf())
            self._sessions.move_to_end(scope)
            session = self._sessions[scope]
            # Never evict a session that holds a pinned prefix.
            others = [other for other in self._sessions.values() if other is not session and not other.shelf.prefixes]
            for other in others[: max(0, len(self._sessions) - self._capacity)]:
                self.forget(other)
            return session

    def has_answers(self, scope: str) -> bool:
        """Whether something was said in a scope, in this process."""
        with self._lock:
            return scope in self._sessions and self._sessions[scope].recalled

    def take(
        self,
        session: Session,
        token_ids: Sequence[int],
        start: Callable[[], CachedSequence],
        *,
        others: Iterable[str] = (),
        copies: bool = False,
    ) -> CachedSequence:
        """What earlier turns of the scope left of a text that begins like `token_ids`, or a copy of a prefix that is
        kept in one of the scopes `others`, or a new workspace."""
        with self._lock:
            known = [self._sessions[scope] for scope in others if scope in self._sessions]
        shelves = [other.shelf for other in known if not other.deleted]
        return self._memory.take(session.shelf, token_ids, start, others=shelves, copies=copies)

    def holds(self, session: Session, name: str, token_ids: Sequence[int]) -> bool:
        """Whether this very prefix is kept under this name."""
        with self._lock:
            kept = session.shelf.prefixes.get(name)
            return kept is not None and list(kept.target.token_ids) == list(token_ids)

    def give_back(self, session: Session, workspace: CachedSequence) -> None:
        """Keep a turn's workspace for the next turns of its scope. Keys and values of deleted scopes are freed here."""
        with self._lock:
            for other in [other for other in self._sessions.values() if other.deleted]:
                self.forget(other)
            if session.deleted:
                session.shelf.close()
            self._memory.give_back(session.shelf, workspace)

    def keep(self, session: Session, name: str, workspace: CachedSequence) -> None:
        """Keep a prefix under a name. Raises OptionError where there is no room."""
        if session.deleted:
            self.forget(session)
        self._memory.keep(session.shelf, name, workspace)

    def drop(self, session: Session, name: str) -> None:
        """Keep the prefix of this name no longer."""
        with self._lock:
            session.shelf.prefixes.pop(name, None)

    @contextmanager
    def idle(self, session: Session) -> Iterator[list[CachedSequence]]:
        """The workspaces that no turn uses, out of reach of turns meanwhile."""
        with self._lock:
            workspaces, session.shelf.idle = session.shelf.idle, []
            session.shelf.in_use.update(workspaces)
        try:
            yield workspaces
        finally:
            for workspace in workspaces:
                self.give_back(session, workspace)

    def forget(self, session: Session) -> None:
        """Drop what a session has read and learned."""
        with self._lock:
            session.shelf.close()
            if self._sessions.get(session.scope) is session:
                del self._sessions[session.scope]

    def drop_idle(self) -> None:
        """Let go of all workspaces that no turn is using; what was learned stays."""
        with self._lock:
            for session in self._sessions.values():
                session.shelf.idle.clear()

    def clear(self) -> None:
        with self._lock:
            for session in list(self._sessions.values()):
                self.forget(session)

    @property
    def usage(self) -> KVUsage:
        with self._lock:
            return self._memory.usage([session.shelf for session in self._sessions.values()])
