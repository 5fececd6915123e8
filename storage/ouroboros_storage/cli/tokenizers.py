"""Which tokenizer wrote a pool: found by its fingerprint among those on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ouroboros_llm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NamedTokenizer:
    """A model's tokenizer; the model itself is not loaded."""

    model: str
    tokenizer: PreTrainedTokenizerBase

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """The text of a run, special tokens included: they were generated too."""
        return str(
            self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


class Tokenizers:
    """Tokenizers by fingerprint. Loads one after the other until one fits, and fetches none."""

    def __init__(self, model: str | None = None) -> None:
        """`model`: the only one to try; None: the default model, then the packaged ones."""
        self.tried: list[str] = []
        self._loaded: dict[str, NamedTokenizer] = {}
        self._left = self._load_next(model)

    def find(self, fingerprint: str) -> NamedTokenizer | None:
        """The tokenizer with this fingerprint. Raises ModelError where the one that was named cannot be loaded."""
        while fingerprint not in self._loaded and (found := next(self._left, None)):
            self._loaded.setdefault(*found)
        return self._loaded.get(fingerprint)

    def _load_next(self, model: str | None) -> Iterator[tuple[str, NamedTokenizer]]:
        from ouroboros_llm.chat.text import vocabulary_hash
        from ouroboros_llm.defaults import default_model
        from ouroboros_llm.models import loading as models
        from ouroboros_llm.models.packaged import registry

        for name in (model,) if model else dict.fromkeys((default_model(), *registry())):
            try:
                tokenizer = models.load_tokenizer(name)
            except ModelError as error:
                if model:
                    raise
                if name == default_model():  # that others are not here is no news
                    self.tried.append(str(error))
                continue
            self.tried.append(f"{name} has another vocabulary")
            yield vocabulary_hash(tokenizer), NamedTokenizer(name, tokenizer)
