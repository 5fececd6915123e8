"""Grammars compiled for a tokenizer."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import OptionError
from .base import Grammar
from .completion import Ending
from .json_schema import faulty_part, prepared
from .vocabulary import Vocabulary, library, quoted, vocabulary_of

_COMPACT = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
"""How JSON is written, and that nothing of a schema is ignored."""

_TRIES = 48
"""Ways to the end that are compared where the first one found is longer than a limit."""

_KEPT = 64
"""Compiled grammars per tokenizer."""

_ESCAPED_OR_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)


class Matcher:
    """A grammar over the tokens of one vocabulary. Shared by generations, which start from copies of its state."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        """Raises OptionError where the grammar cannot be kept; for a schema it names the part."""
        self.grammar, self.vocabulary = grammar, vocabulary
        source = _source(grammar, vocabulary)
        if fault := _fault(source, vocabulary):
            raise OptionError(_explained(grammar, fault, vocabulary))
        self._lock = threading.Lock()  # the library's states may not be used by two threads at once
        self._state: Any = library().LLMatcher(vocabulary.tokenizer, source, log_level=0)
        if self._state.is_error():
            raise OptionError(_explained(grammar, _first_line(self._state.get_error()), vocabulary))
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
            raise OptionError(
                f"no text of the grammar was found that ends within max_new_tokens={limit}; raise it, unless the "
                "grammar has none, as that of a schema which requires itself inside itself"
            )
        if len(self._shortest) + 1 > limit:
            raise OptionError(
                f"max_new_tokens={limit} has no room for the shortest text of the grammar that was found, which takes "
                f"{len(self._shortest) + 1} tokens with the end token; raise it"
            )
        return self._shortest


_lock = threading.Lock()


def matcher_for(grammar: Grammar, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]) -> Matcher:
    """`grammar` for `tokenizer`, compiled once. Raises OptionError and MissingExtraError."""
    with _lock:
        vocabulary = vocabulary_of(tokenizer, end_token_ids)
        # With the vocabulary they live and go.
        known: OrderedDict[Grammar, Matcher] = vocabulary.compiled
        matcher = known.get(grammar)
    # Not under the lock: a grammar may take seconds, for which others need not wait.
    matcher = matcher or Matcher(grammar, vocabulary)
    with _lock:
        matcher = known.setdefault(grammar, matcher)
        known.move_to_end(grammar)
        while len(known) > _KEPT:
            known.popitem(last=False)
    return matcher


def _source(grammar: Grammar, vocabulary: Vocabulary) -> str:
    kind: Any = library().LLMatcher
    if grammar.kind == "regex":
        return str(kind.grammar_from_regex(grammar.source))
    if grammar.kind == "lark":
        return str(kind.grammar_from_lark(grammar.source))
    return str(kind.grammar_from_lark("\n".join(_rules("start", grammar, vocabulary))))


def _rules(name: str, grammar: Grammar, vocabulary: Vocabulary) -> Iterator[str]:
    """The rules of a Lark grammar in which `name` is what `grammar` allows."""
    if grammar.kind == "choices":
        yield f"{name}: {' | '.join(quoted(choice) for choice in json.loads(grammar.source))}"
        return
    between = vocabulary.terms(grammar.between)
    more = f" ({between} {name}_unit){{0,{grammar.most - 1}}}" if grammar.most > 1 else ""
    yield f"{name}: {name}_unit{more}"
    yield f"{name}_unit: {vocabulary.terms(grammar.before)} {name}_one {vocabulary.terms(grammar.after)}"
    if grammar.kind == "any_of":
        names = [f"{name}_{number}" for number in range(len(grammar.parts))]
        yield f"{name}_one: {' | '.join(names)}"
        for inner, part in zip(names, grammar.parts, strict=True):
            yield from _rules(inner, part, vocabulary)
    elif grammar.kind == "regex":
        yield f"{name}_one: /{_ESCAPED_OR_SLASH.sub(_without_slash, grammar.source)}/"
    else:
        yield f"{name}_one: %json {json.dumps(prepared(json.loads(grammar.source)) | {'x-guidance': _COMPACT})}"


def _without_slash(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(found[0], found[0])


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


def _explained(grammar: Grammar, fault: str, vocabulary: Vocabulary) -> str:
    for part in grammar.parts:
        if found := _fault(_source(part, vocabulary), vocabulary):
            return _explained(part, found, vocabulary)
    if grammar.kind != "json_schema":
        return f"grammar is no {grammar.kind} that can be kept: {fault}"
    place = faulty_part(prepared(json.loads(grammar.source)), _schema_fault)
    pointer, message = place or ("#", fault)
    return f"grammar asks for a JSON Schema that cannot be kept: {message}, at {pointer}; leave that out or change it"


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip(" ^")]
    errors = [line for line in lines if line.startswith("error:")]
    return " ".join([lines[0], *errors]) if lines else "unknown error"
