"""What the text of an answer must look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import OptionError

Kind = Literal["json_schema", "regex", "choices", "lark", "any_of"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language that answers must come from: `DecodingOptions(grammar=Grammar.json_schema(...))`.

    Make one with `json_schema`, `regex`, `choices`, `lark` or `any_of`. The target chooses among the tokens that the
    grammar allows; what the grammar forces costs next to no passes; and answers are brought to their end within
    `max_new_tokens`, so that they always parse.
    """

    kind: Kind
    source: str
    """The schema or the choices as JSON; the expression; the Lark grammar."""
    before: str = ""
    """Text before and after every JSON value or alternative, as models put around tool calls."""
    after: str = ""
    between: str = ""
    most: int = 1
    """JSON values or alternatives at most, `between` standing between them."""
    parts: tuple[Grammar, ...] = ()
    """The alternatives of `any_of`."""

    def __post_init__(self) -> None:
        for name in ("source", "before", "after", "between"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"grammar {name} must be text, but got {getattr(self, name)!r:.80}")
        if self.kind not in get_args(Kind):
            raise OptionError(f"grammar kind must be one of {', '.join(get_args(Kind))}, but got {self.kind!r}")
        if isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1:
            raise OptionError(f"grammar most must be a whole number of at least 1, but got {self.most!r}")

    @classmethod
    def json_schema(
        cls,
        schema: Mapping[str, Any] | bool | str,
        *,
        before: str = "",
        after: str = "",
        between: str = "",
        most: int = 1,
    ) -> Grammar:
        """One JSON value of `schema` (a mapping, or its JSON), in compact form: no space outside of strings.

        Objects that list properties and do not mention `additionalProperties` have no others. Keywords that cannot be
        kept (such as `uniqueItems`) are an `OptionError` before anything is decoded, never ignored.

        Args:
            before, after: text around the value; what the tokenizer has special tokens for is written with them.
            between, most: up to `most` such texts, `between` standing between them.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            source = json.dumps(parsed, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise OptionError(f"grammar must be a JSON Schema, but {schema!r:.80} is not JSON: {error}") from None
        if not isinstance(parsed, (Mapping, bool)):
            raise OptionError(f"grammar must be a JSON Schema (an object, or true), but got {schema!r:.80}")
        return cls("json_schema", source, before, after, between, most)

    @classmethod
    def json(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches the whole of a regular expression (the syntax of Rust's `regex`: no look-around)."""
        return cls("regex", pattern)

    @classmethod
    def choices(cls, choices: Sequence[str]) -> Grammar:
        """One of several texts."""
        texts = [choices] if isinstance(choices, str) else list(choices)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise OptionError(f"grammar choices must be non-empty texts, but got {choices!r:.80}")
        return cls("choices", json.dumps(texts, ensure_ascii=False))

    @classmethod
    def any_of(
        cls, parts: Sequence[Grammar], *, before: str = "", after: str = "", between: str = "", most: int = 1
    ) -> Grammar:
        """What any of several grammars allows, as calls of one tool or another and plain JSON.

        Args:
            parts: of any kind but `lark`.
            before, after, between, most: as for `json_schema`; each text in between may be of another part.
        """
        found = tuple(parts)
        if not found or not all(isinstance(part, Grammar) and part.kind != "lark" for part in found):
            raise OptionError(f"grammar parts must be one or more grammars that are not lark, but got {parts!r:.80}")
        return cls("any_of", "", before, after, between, most, found)

    @classmethod
    def lark(cls, source: str) -> Grammar:
        """A context-free grammar in llguidance's dialect of Lark, which begins at `start`."""
        return cls("lark", source)
