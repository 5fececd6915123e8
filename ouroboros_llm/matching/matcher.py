"""Grammars compiled for a tokenizer."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import OptionError
from ..grammar import Grammar
from .ending import Ending
from .schema import faulty_part, prepared
from .vocabulary import Vocabulary, library, quoted, vocabulary_of

_COMPACT = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
"""How JSON is written, and that nothing of a schema is ignored."""

_TRIES = 48
"""Ways to the end that are compared where the first one found is longer than a limit."""

_KEPT = 64
"""Compiled grammars per tokenizer."""


class Matcher:
    """A grammar over the tokens of one vocabulary. Shared by generations, which start from copies of its state."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        """Raises OptionError where the grammar cannot be kept; for a schema it names the part."""
        self.grammar, self.vocabulary = grammar, vocabulary
        source = _source(grammar, vocabulary)
        if fault := _fault(source, vocabulary):
            raise OptionError(_explained(grammar, fault))
        self._lock = threading.Lock()  # the library's states may not be used by two threads at once
        self._state: Any = library().LLMatcher(vocabulary.tokenizer, source, log_level=0)
        if self._state.is_error():
            raise OptionError(_explained(grammar, _first_line(self._state.get_error())))
        self.ending = Ending(vocabulary)
        self._shortest: tuple[int, ...] | None = None
        self._tried = 0

    def state(self) -> Any:
        """A state of the library's at the beginning of the text."""
        with self._lock:
            return self._state.deep_copy()

    def shortest(self, limit: int) -> tuple[int, ...]:
        """A shortest text of the grammar, as far as was found. Raises OptionError if it needs more than `limit`
        tokens, the end token among them."""
        if self._tried < limit and (self._shortest is None or len(self._shortest) >= limit):
            found = self.ending.way(self.state(), limit - 1, _TRIES)
            self._shortest, self._tried = found or self._shortest, limit
        if self._shortest is None:
            raise OptionError(f"no text of the grammar was found that ends within max_new_tokens={limit}; raise it")
        if len(self._shortest) + 1 > limit:
            raise OptionError(
                f"max_new_tokens={limit} has no room for the shortest text of the grammar, which takes "
                f"{len(self._shortest) + 1} tokens with the end token; raise it"
            )
        return self._shortest


_lock = threading.Lock()


def matcher_for(grammar: Grammar, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]) -> Matcher:
    """`grammar` for `tokenizer`, compiled once. Raises OptionError and MissingExtraError."""
    with _lock:
        vocabulary = vocabulary_of(tokenizer, end_token_ids)
        # With the vocabulary they live and go.
        known: OrderedDict[Any, Any] = vocabulary.compiled
        if grammar not in known:
            known[grammar] = Matcher(grammar, vocabulary)
        known.move_to_end(grammar)
        if len(known) > _KEPT:
            known.popitem(last=False)
        matcher: Matcher = known[grammar]
        return matcher


def _source(grammar: Grammar, vocabulary: Vocabulary) -> str:
    kind: Any = library().LLMatcher
    if grammar.kind == "regex":
        return str(kind.grammar_from_regex(grammar.source))
    if grammar.kind == "lark":
        return str(kind.grammar_from_lark(grammar.source))
    if grammar.kind == "choices":
        choices = " | ".join(quoted(choice) for choice in json.loads(grammar.source))
        return str(kind.grammar_from_lark(f"start: {choices}\n"))
    schema = prepared(json.loads(grammar.source)) | {"x-guidance": _COMPACT}
    unit = f"{vocabulary.terms(grammar.before)} json {vocabulary.terms(grammar.after)}"
    between = vocabulary.terms(grammar.between)
    more = f" ({between} unit){{0,{grammar.most - 1}}}" if grammar.most > 1 else ""
    return str(kind.grammar_from_lark(f"start: unit{more}\nunit: {unit}\njson: %json {json.dumps(schema)}\n"))


def _fault(source: str, vocabulary: Vocabulary | None = None) -> str:
    """What is wrong with a grammar of the library's; empty where nothing is."""
    failed, messages = library().LLMatcher.validate_grammar_with_warnings(
        source, vocabulary.tokenizer if vocabulary else None
    )
    return _first_line(messages[0]) if failed else ""


def _schema_fault(schema: Any) -> str:
    if not isinstance(schema, dict):
        return ""
    return _fault(library().LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT))


def _explained(grammar: Grammar, fault: str) -> str:
    if grammar.kind != "json_schema":
        return f"grammar is no {grammar.kind} that can be kept: {fault}"
    part = faulty_part(prepared(json.loads(grammar.source)), _schema_fault)
    pointer, message = part or ("#", fault)
    return f"grammar asks for a JSON Schema that cannot be kept: {message}, at {pointer}; leave that out or change it"


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip(" ^")]
    errors = [line for line in lines if line.startswith("error:")]
    return " ".join([lines[0], *errors]) if lines else "unknown error"
