"""The ambient scope (a context variable)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256

from .errors import OptionError
from .phrase_pool.base import check_scope

_current: ContextVar[str | None] = ContextVar("ouroboros_scope", default=None)


@contextmanager
def ouroboros_scope(scope: str) -> Iterator[str]:
    """Calls inside use this scope, in every framework, unless they name another.

    It holds in what the block calls and awaits, in tasks that it starts, and in threads that get a copy of its context
    (as `asyncio.to_thread` gives them). Of several, the innermost holds.

    Raises:
        OptionError: not a name: 1 to 255 printable characters.
    """
    token = _current.set(check_scope(scope))
    try:
        yield scope
    finally:
        try:
            _current.reset(token)
        except ValueError:
            warnings.warn(
                f"ouroboros_scope({scope!r}) ended in another context than it began in, as where a generator holds it "
                "over a yield; calls behind the yield may have used another scope: name it in each of them",
                RuntimeWarning,
                stacklevel=4,
            )


def current_scope() -> str | None:
    """The scope of the innermost `ouroboros_scope` around here; None outside of all."""
    return _current.get()


def corpus_of(name: str) -> str:
    """The scope of a corpus, which a developer may call by its scope too: `corpus:manuals` of both.

    Raises:
        OptionError: not a string.
    """
    if not isinstance(name, str):
        raise OptionError(f"corpus_scope must be the name of a corpus, for example 'manuals', but got {name!r:.80}")
    return name if name.startswith("corpus:") else scope_of("corpus", name)


def scope_of(kind: str, id: str) -> str:
    """The scope of an id, as `conversation:42` of ("conversation", "42").

    An id is data: whatever it is, its scope begins with its kind, so that nobody gets into another scope by choosing an
    id. Ids that no name can hold are hashed.
    """
    scope = f"{kind}:{id}"
    try:
        return check_scope(scope)
    except OptionError:  # too long, or not printable
        return f"{kind}:sha256-{sha256(id.encode('utf-8', 'surrogatepass')).hexdigest()}"
