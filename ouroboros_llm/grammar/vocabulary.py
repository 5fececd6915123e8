"""A tokenizer as the grammar library sees it."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import MissingExtraError, OptionError


def library() -> Any:
    """The package that knows grammars. Raises MissingExtraError."""
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError("llguidance", "structured") from None
    return llguidance


class Vocabulary:
    """The bytes of every token, and which tokens end a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]) -> None:
        """Raises OptionError for a tokenizer that is not a fast one, and where no token ends a text."""
        library()
        from llguidance import hf

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise OptionError(f"grammar needs a fast tokenizer, but got {type(tokenizer).__name__}")
        self.end_token_ids = tuple(sorted(end_token_ids, key=lambda token_id: token_id != tokenizer.eos_token_id))
        if not self.end_token_ids:
            raise OptionError("grammar needs a token that ends the text, but generation_config names no eos_token_id")
        self.tokenizer: Any = hf.from_tokenizer(tokenizer, eos_token=list(self.end_token_ids))
        self.size: int = self.tokenizer.vocab_size
        self.compiled: OrderedDict[Any, Any] = OrderedDict()
        """Matchers by grammar, the least recently used first."""
        self._added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}

    @cached_property
    def shortest(self) -> npt.NDArray[np.intp]:
        """[256]: per byte, the shortest token that begins with it; -1 where there is none."""
        lengths, found = np.full(256, np.iinfo(np.intp).max), np.full(256, -1)
        for token_id in range(self.size):
            if token_id in self.end_token_ids or self.tokenizer.is_special_token(token_id):
                continue
            text = self.tokenizer.decode_bytes([token_id])
            if text and len(text) < lengths[text[0]]:
                lengths[text[0]], found[text[0]] = len(text), token_id
        return found

    @cached_property
    def special(self) -> npt.NDArray[np.intp]:
        """Special tokens that do not end a text."""
        ids = [i for i in range(self.size) if self.tokenizer.is_special_token(i) and i not in self.end_token_ids]
        return np.array(ids, dtype=np.intp)

    def compressed(self, token_ids: list[int]) -> list[int]:
        """The same text in the tokens that the tokenizer itself would choose; special tokens stay."""
        found: list[int] = []
        run: list[int] = []
        for token_id in [*token_ids, None]:
            if token_id is not None and not self.tokenizer.is_special_token(token_id):
                run.append(token_id)
                continue
            if run:
                found += self.tokenizer.tokenize_bytes(self.tokenizer.decode_bytes(run))
            found += [] if token_id is None else [token_id]
            run = []
        return found

    def terms(self, text: str) -> str:
        """`text` as terms of a Lark grammar; what the tokenizer has tokens of its own for becomes these."""
        if not text:
            return ""
        names = sorted(self._added, key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
        return " ".join(f"<[{self._added[p]}]>" if p in self._added else quoted(p) for p in pieces if p)


def quoted(text: str) -> str:
    """`text` as a string of a Lark grammar."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'


_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[frozenset[int], Vocabulary]] = WeakKeyDictionary()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]) -> Vocabulary:
    """The vocabulary of `tokenizer`, made once: it takes about a second."""
    known = _known.setdefault(tokenizer, {})
    ends = frozenset(end_token_ids)
    if ends not in known:
        known[ends] = Vocabulary(tokenizer, ends)
    return known[ends]
