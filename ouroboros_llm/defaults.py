"""Environment defaults, and process-wide shared instances."""

from __future__ import annotations

import os
import threading
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from platformdirs import user_data_path

if TYPE_CHECKING:
    from .ouroboros import Ouroboros
    from .target_model.prepared import Kind
    from .target_model.quantization import Quantization

DEFAULT_MODEL = "smollm2-135m-instruct"


class _Unset(Enum):
    STORE = "$OUROBOROS_STORE or phrases.db in the user's data folder"

    def __repr__(self) -> str:
        return f"<{self.value}>"


DEFAULT_STORE: Final = _Unset.STORE
"""Stands for the default database; None would mean that nothing is kept on disk."""


def default_model() -> str:
    """`$OUROBOROS_MODEL`, or the small model that answers in seconds on any machine."""
    return os.environ.get("OUROBOROS_MODEL") or DEFAULT_MODEL


def default_store() -> str:
    """`$OUROBOROS_STORE`, or a SQLite file in the user's data folder."""
    url = os.environ.get("OUROBOROS_STORE")
    return url or f"sqlite:///{user_data_path('ouroboros-llm', appauthor=False) / 'phrases.db'}"


_weights: dict[tuple[str, str, str, str | None], Any] = {}
_shared: dict[tuple[object, ...], Ouroboros] = {}
_lock = threading.RLock()


def shared(
    model: str | Path | None = None,
    *,
    draft_model: str | Path | None = None,
    device: str = "auto",
    dtype: Any = "auto",
    quantization: Quantization | None = None,
    store: Any = DEFAULT_STORE,
    target: Kind = "auto",
) -> Ouroboros:
    """The process's `Ouroboros` for these arguments, loaded by the first call that asks for it.

    Equal models share their weights whatever their stores; equal arguments share everything.
    """
    from .ouroboros import Ouroboros

    name = str(model or default_model())
    store = default_store() if store is DEFAULT_STORE else store
    key = (
        name,
        str(draft_model),
        device,
        str(dtype),
        quantization,
        store,
        target,
    )
    with _lock:
        if key not in _shared:
            loaded = _load(name, device, dtype, quantization)
            draft = _load(str(draft_model), device, dtype) if draft_model is not None else None
            pair = (draft.model, draft.tokenizer) if draft is not None else None
            ouroboros = Ouroboros(loaded.model, loaded.tokenizer, draft_model=pair, store=store, target=target)
            ouroboros.name = name
            ouroboros.load_seconds += loaded.seconds + (0.0 if draft is None else draft.seconds)
            _shared[key] = ouroboros
        return _shared[key]


def _load(name: str, device: str, dtype: Any, quantization: Quantization | None = None) -> Any:
    from .models import loading as models

    key = (name, device, str(dtype), quantization)
    if key not in _weights:
        _weights[key] = models.load(name, device=device, dtype=dtype, quantization=quantization)
    return _weights[key]
