"""What all conversations of an agent begin with, its system prompt and tools, kept where it learns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

from ouroboros_llm import OuroborosError

_NAME = "instructions"

_seen: WeakKeyDictionary[Any, dict[str, tuple[bytes, str | None]]] = WeakKeyDictionary()
"""By model and agent: what its last prompt began with, hashed, and whose conversation that was."""


def keep_instructions(
    ouroboros: Any, agent: str, conversation: str | None, prompt: Any, tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """Keep what a prompt of an agent begins with, once another of its conversations begins with the same.

    Instructions that change from conversation to conversation, as with a date, are not worth a pass of their own.
    Nothing is kept where there is no room, or where the chat template takes no system prompt by itself.
    """
    # Duck-typed stand-ins for the model may keep nothing.
    keep = getattr(ouroboros, "keep_prefix", None)
    system = [] if isinstance(prompt, str) else [message for message in prompt[:1] if message["role"] == "system"]
    if keep is None or not system:
        return
    now = sha256(json.dumps([system, tools], default=str).encode()).digest(), conversation
    agents = _seen.setdefault(ouroboros, {})
    before, agents[agent] = agents.get(agent), now
    if before is not None and before[0] == now[0] and before[1] != conversation:
        with suppress(OuroborosError):
            keep(system, scope=agent, name=_NAME, tools=tools)
