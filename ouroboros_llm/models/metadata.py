"""What is known of a model before its weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..model_config import context_length_of
from . import loading as models


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a model can do, as far as its configuration and its tokenizer say so."""

    context_length: int | None
    """Tokens of prompt and output together at most; None where the model names no limit."""
    max_new_tokens: int | None
    """Tokens to generate where nobody says; None where the model does not say either."""
    has_chat_template: bool


def read_metadata(name: str | Path) -> ModelMetadata:
    """The facts of a model by its name, out of its files, but for the weights. Takes some milliseconds; where the files
    are not on this machine yet they are fetched, weights and all, as by `models.load`.

    Raises:
        UnknownModelError, ModelDownloadError: see `models.resolve`. ModelError: the files cannot be read.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = models.local_folder(name) or models.resolve(name)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        said = (folder / "generation_config.json").exists()
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True) if said else None
        has_template = _has_chat_template(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"model {str(name)!r} cannot be loaded as a causal language model: {reason}") from error
    return ModelMetadata(context_length_of(config), getattr(generation, "max_new_tokens", None), has_template)


def _has_chat_template(folder: Path) -> bool:
    """As the library looks for one; making the tokenizer takes a second where the vocabulary is large."""
    if (folder / "chat_template.jinja").exists():
        return True
    file = folder / "tokenizer_config.json"
    return file.exists() and bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
