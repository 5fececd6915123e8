"""Whose phrases a call is about, as far as LangChain and LangGraph say so by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.runnables import RunnableConfig, ensure_config

from ouroboros_llm.scopes import current_scope, scope_of

SCOPES = "_ouroboros_scopes"
"""The keyword under which `invoke` and its like hand down what they found in their config, which does not reach
`_generate` and `_stream` on every path."""

_IDS = ("thread_id", "session_id", "conversation_id")


@dataclass(frozen=True, slots=True)
class FoundScopes:
    """The scopes of a call that names none."""

    conversation: str | None = None
    agent: str | None = None
    named: str | None = None
    """By `ouroboros_scope`."""


def found_scopes(config: RunnableConfig | None = None) -> FoundScopes:
    """What a config and the run around it say: ids of a conversation, and the agent's name.

    An agent without a name is called by its place in the graph, which is the same in every run.
    """
    here, around = ensure_config(config), ensure_config()
    configurable = [here.get("configurable", {}), around.get("configurable", {})]
    metadata = [here.get("metadata", {}), around.get("metadata", {})]
    places = [*configurable, *metadata]
    id = next(_given(places, _IDS), None)
    name = next(_given(metadata, ("lc_agent_name",)), "")
    node = next(_given(metadata, ("langgraph_node",)), "")
    agent = name or _place(next(_given(places, ("checkpoint_ns",)), "")) or node
    return FoundScopes(
        scope_of("conversation", id) if id else None, scope_of("agent", agent) if agent else None, current_scope()
    )


def _given(places: list[Any], keys: tuple[str, ...]) -> Iterator[str]:
    for place in places:
        values: Mapping[str, Any] = place or {}
        yield from (str(values[key]) for key in keys if values.get(key) not in (None, ""))


def _place(namespace: str) -> str:
    """`team|model` for `team:<task id>|model:<task id>`, as LangGraph names where a node runs."""
    return "|".join(part.partition(":")[0] for part in namespace.split("|") if part)
