"""From what the caller gave as `draft_model=` to a model that can draft for the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import ModelError, OptionError, TokenizerMismatchError
from .target_model.eager import vocabulary_size
from .target_model.prepared import Kind, PreparedModel, prepare
from .text import vocabulary_hash


def load_draft(
    draft_model: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, kind: Kind = "auto"
) -> PreparedModel:
    """The draft model, loaded where it is a name.

    Args:
        model, tokenizer, name: the target's.
        kind: how its passes are made.

    Raises:
        TokenizerMismatchError: another vocabulary. ModelError: its states cannot be rewound. OptionError: no model.
    """
    draft, other = _draft_pair(draft_model, model)
    fingerprint = vocabulary_hash(tokenizer)
    if other is not None and vocabulary_hash(other) != fingerprint:
        raise TokenizerMismatchError(
            f"draft_model must share the target's vocabulary ({name}: {fingerprint[:12]}, {len(tokenizer)} tokens), "
            f"but {draft.config._name_or_path or type(draft).__name__} has {vocabulary_hash(other)[:12]}, "
            f"{len(other)} tokens; choose a smaller model of the same family"
        )
    if vocabulary_size(draft) < len(tokenizer):
        raise TokenizerMismatchError(
            f"draft_model must embed all {len(tokenizer)} tokens of the target's tokenizer, "
            f"but it has {vocabulary_size(draft)}; choose a smaller model of the same family"
        )
    prepared = prepare(draft, kind)
    if not prepared.start().can_rewind:
        raise ModelError(
            "draft_model must be able to drop tokens it has read, but "
            f"{draft.config._name_or_path or type(draft).__name__} keeps states that cannot be rewound; "
            "choose a model with attention layers only"
        )
    return prepared


def _draft_pair(draft_model: Any, model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The draft model, and its tokenizer where there is one to compare."""
    if isinstance(draft_model, (str, Path)):
        from . import models

        loaded = models.load(draft_model, device=str(model.device), dtype=model.dtype)
        return loaded.model, loaded.tokenizer
    if isinstance(draft_model, tuple) and len(draft_model) == 2:
        return draft_model
    if isinstance(draft_model, PreTrainedModel):
        return draft_model, None
    raise OptionError(
        "draft_model must be a registry name, a path, a hub id, a model or a pair (model, tokenizer), "
        f"but got {type(draft_model).__name__}"
    )
