"""Retention limits for pruning and quotas."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from time import time_ns

from ouroboros_llm.errors import OptionError


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest sizes, and the time since which a run must have been used. None: no bound."""

    max_tokens: int | None = None
    max_runs: int | None = None
    before: int | None = None
    """Microseconds since 1970; what was not used since goes."""

    @classmethod
    def of(cls, *, max_tokens: int | None, max_runs: int | None, max_age: timedelta | float | None) -> Bounds:
        """`max_age`: a timedelta or seconds. OptionError where there is no bound, or a wrong one."""
        for name, bound in (("max_tokens", max_tokens), ("max_runs", max_runs)):
            if bound is not None:
                check_bound(name, bound, least=0)
        if max_tokens is None and max_age is None and max_runs is None:
            raise OptionError("prune needs a bound: give max_tokens, max_age or max_runs")
        return cls(max_tokens, max_runs, None if max_age is None else _before(max_age))


def check_bound(name: str, bound: object, least: int = 1) -> None:
    """Raise OptionError where `bound` is not a whole number of at least `least`."""
    if isinstance(bound, bool) or not isinstance(bound, int) or bound < least:
        raise OptionError(f"{name} must be a whole number of at least {least}, but got {bound!r}")


def _before(max_age: object) -> int:
    age = max_age.total_seconds() if isinstance(max_age, timedelta) else max_age
    if isinstance(age, bool) or not isinstance(age, int | float) or not 0 <= age < float("inf"):
        raise OptionError(f"max_age must be a timedelta or seconds, at least 0, but got {max_age!r}")
    # Older than 1970 is nothing.
    return max(0, time_ns() // 1000 - int(age * 1_000_000))
