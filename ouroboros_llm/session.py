"""What one scope has learned and read: its calibrations, and keys and values to go on from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from .drafting.lookahead import WindowWorth
from .drafting.memory import Memory
from .drafting.worth import Worth
from .memory_pool import MemoryPool
from .target.base import TargetModel
from .target.eager import EagerTarget

KV_BYTES = 1 << 30
"""Keys and values kept between turns, all sessions of one `Ouroboros` together."""


@dataclass(eq=False)
class Workspace:
    """Targets that hold the text of one turn; used by one turn at a time."""

    target: TargetModel
    draft_target: TargetModel | None = None

    @property
    def reusable(self) -> bool:
        """Whether a next turn can go on from here instead of reading its prompt anew."""
        return isinstance(self.target, EagerTarget) and self.target.cache.can_rewind

    @property
    def nbytes(self) -> int:
        targets = (self.target, self.draft_target)
        return sum(target.cache.nbytes for target in targets if isinstance(target, EagerTarget))


@dataclass(eq=False)
class Window:
    """What lookahead windows found in a scope, and whether they pay there."""

    pool: MemoryPool = field(default_factory=lambda: MemoryPool(capacity=20_000))
    worth: WindowWorth = field(default_factory=WindowWorth)


@dataclass(eq=False)
class Session:
    """The state of one scope in this process. Nothing of it is seen from another scope."""

    scope: str
    memory: Memory = field(default_factory=Memory)
    draft_memory: Memory = field(default_factory=Memory)
    """What the draft model's own drafting learned."""
    worth: Worth = field(default_factory=lambda: Worth(memory=64, retry=8))
    """Whether drafts pay here, and whether asking the draft model does."""
    draft_worth: Worth = field(default_factory=Worth)
    generation: object = None
    """Changes when the scope's phrases are deleted; what was read and learned goes with them."""
    window: Window = field(default_factory=Window)
    recalled: bool = False
    """Whether the memories were read from the scope's pool."""
    idle: Workspace | None = None
    """What the last turn left; the next one reuses the prefix that their texts share."""


class Sessions:
    """Sessions by scope, bounded in number and in bytes, least recently used first."""

    def __init__(self, capacity: int = 256, kv_bytes: int = KV_BYTES) -> None:
        self._capacity, self._kv_bytes = capacity, kv_bytes
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        # Re-entrant: an abandoned stream may be finalized by the garbage collector at any allocation, in here too.
        self._lock = threading.RLock()

    def open(self, scope: str) -> Session:
        with self._lock:
            session = self._sessions.setdefault(scope, Session(scope))
            self._sessions.move_to_end(scope)
            while len(self._sessions) > self._capacity:
                self._sessions.popitem(last=False)
            return session

    def take(self, session: Session) -> Workspace | None:
        """The workspace of the scope's last turn, if no other turn has it."""
        with self._lock:
            workspace, session.idle = session.idle, None
            return workspace

    def give_back(self, session: Session, workspace: Workspace) -> None:
        """Keep a turn's workspace for the next turn of its scope, if it can be rewound and as far as memory allows."""
        if not workspace.reusable:
            return
        with self._lock:
            session.idle = workspace
            size = 0
            for other in reversed(self._sessions.values()):
                size += other.idle.nbytes if other.idle else 0
                if size > self._kv_bytes:
                    other.idle = None

    def forget(self, session: Session) -> None:
        """Drop what a session has read and learned."""
        with self._lock:
            if self._sessions.get(session.scope) is session:
                del self._sessions[session.scope]

    def clear(self) -> None:
        with self._lock:
            self._sessions.clear()
