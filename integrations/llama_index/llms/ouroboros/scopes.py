"""Whose phrases a call is about, as far as LlamaIndex says so by itself."""

from __future__ import annotations

from llama_index_instrumentation.dispatcher import active_instrument_tags

from ouroboros_llm.scopes import scope_of

_IDS = ("thread_id", "session_id", "conversation_id")


def tagged_scope() -> str | None:
    """The conversation that the tags around here name, as in `instrument_tags({"session_id": ...})`.

    They come through to what query engines and agents call, sync and async. An id is data: whatever it is, its scope
    begins with `conversation:`.
    """
    tags = active_instrument_tags.get() or {}
    ids = (tags.get(key) for key in _IDS)
    return next((scope_of("conversation", str(id)) for id in ids if id not in (None, "")), None)
