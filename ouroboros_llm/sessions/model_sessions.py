"""The sessions of one model: as their scopes are now, with what was learned before and what was read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..drafting.learned_state import LearnedState
from ..phrase_pool.base import PhrasePool, PoolSource
from ..phrase_pool.opening import open_pool
from ..serving.request import Steps
from ..target_model.prepared import PreparedModel, locked
from . import snapshot
from .device_memory import check_room, let_go
from .prefix_cache import CachedSequence
from .session import Session, SessionStore


class ModelSessions:
    """Opens sessions of a model, and gives their turns texts to go on from."""

    def __init__(
        self, prepared: PreparedModel, draft: PreparedModel | None, source: PoolSource, fingerprint: str
    ) -> None:
        """`source`: of the scopes' pools; `fingerprint`: of the tokenizer. Raises OptionError where the limit in the
        environment is no number."""
        self._prepared, self._draft = prepared, draft
        self._source, self._fingerprint = source, fingerprint
        self.sessions = SessionStore()

    def open(self, scope: str) -> Session:
        """The session of a scope as it is now."""
        session = self.sessions.open(scope)
        return self.current(session, open_pool(self._source, scope, self._fingerprint))

    def current(self, session: Session, pool: PhrasePool) -> Session:
        """The session, or a new one if its scope, whose pool this is, was deleted since."""
        generation = getattr(pool, "generation", None)
        if session.generation is not None and session.generation != generation:
            self.sessions.forget(session)
            session = self.sessions.open(session.scope)
        session.follow(pool)
        return session

    def recalled(self, session: Session, pool: PhrasePool, others: Sequence[PhrasePool]) -> Session:
        """The session as it is now, with what was learned in the scope before this process, or else in `others`."""
        session = self.current(session, pool)
        if not session.recalled:
            session.recalled = True
            session.memory = LearnedState.recall(pool, self._prepared.fingerprint, others)
            if self._draft is not None:
                session.draft_memory = LearnedState.recall(pool, self._draft.fingerprint, others)
        return session

    @contextmanager
    def workspace(
        self, session: Session, token_ids: Sequence[int], others: Sequence[str] = (), *, room: int
    ) -> Iterator[CachedSequence]:
        """What a turn over `token_ids` works with, perhaps a copy of a prefix that is kept in one of the scopes
        `others`; it is kept for the next turn.

        Raises:
            MemoryLimitError: the device cannot hold `room` tokens, of prompt and output.
        """
        workspace = self.sessions.take(session, token_ids, self.start, others=others)
        try:
            self._check_room(room, workspace)
            yield workspace
        finally:
            self.sessions.give_back(session, workspace)

    def keeping(self, session: Session, token_ids: Sequence[int], name: str) -> Steps[int]:
        """Read a prefix, a chunk a step, and keep it under a name; returns its tokens.

        Raises:
            OptionError: it does not fit into the limit. MemoryLimitError: the device cannot hold it.
        """
        workspace = self.sessions.take(session, token_ids, self.start, copies=True)
        try:
            self._check_room(len(token_ids), workspace)
            reading = workspace.reading(token_ids, self._draft.context_length if self._draft else None)
            over = False
            while not over:
                with locked(self._prepared, self._draft):
                    over = next(reading, True)
                yield None
        except BaseException:
            self.sessions.give_back(session, workspace)
            raise
        self.sessions.keep(session, name, workspace)
        return len(token_ids)

    def save(self, session: Session, path: str | Path) -> int:
        """Write the keys and values that no turn is using; the number of tokens. Raises SnapshotError."""
        with self.sessions.idle(session) as workspaces:
            return snapshot.save(path, workspaces, self._identity(session))

    def load(self, session: Session, path: str | Path) -> int:
        """Take over what was written; the number of tokens. Raises SnapshotError, and then nothing is taken over."""
        workspaces = snapshot.load(path, self.start, self._identity(session))
        for workspace in workspaces:
            self.sessions.give_back(session, workspace)
        return sum(workspace.length for workspace in workspaces)

    def start(self) -> CachedSequence:
        """A workspace for a turn that finds nothing to go on from."""
        return CachedSequence(self._prepared.start(marks=True), self._draft.start() if self._draft else None)

    def spare(self) -> None:
        """Let go of keys and values that only a later turn would have used."""
        self.sessions.drop_idle()
        let_go(self._prepared.model.device)

    def _check_room(self, tokens: int, workspace: CachedSequence) -> None:
        check_room(self._prepared, tokens, workspace.nbytes, self.spare, self._draft)

    def _identity(self, session: Session) -> dict[str, str]:
        return snapshot.identity(self._prepared, self._fingerprint, session.scope)
