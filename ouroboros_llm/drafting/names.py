"""The names by which sources of drafts are switched on and off."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import OptionError

DRAFTERS = ("phrases", "recycling", "retrieval", "draft_model", "lookahead")
"""What can be switched on and off by name."""

DEFAULT_DRAFTERS = ("phrases", "recycling", "retrieval", "draft_model")
"""Lookahead widens every pass for phrases that may come; it is on request."""


def check_drafters(drafters: object, name: str = "drafters") -> tuple[str, ...]:
    """`drafters` as a tuple; raises OptionError where one is unknown."""
    if isinstance(drafters, str) or not isinstance(drafters, Collection) or not set(drafters) <= set(DRAFTERS):
        raise OptionError(f"{name} must be some of {', '.join(map(repr, DRAFTERS))}, but got {drafters!r:.80}")
    return tuple(drafters)
