"""Facts that a loaded model's configuration states."""

from __future__ import annotations

from typing import Any


def end_token_ids(config: Any) -> frozenset[int]:
    """The tokens at which the model's own `generate` ends, by its `generation_config`."""
    ids = config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def context_length_of(config: Any) -> int | None:
    """What the configuration of a model says of its context."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None
