"""What a caller may ask of one generation."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .errors import OptionError
from .grammar.base import Grammar


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options of one generation. Unset (None) follows the model's `generation_config`; temperature unset is greedy.

    Attributes:
        max_new_tokens: Tokens to generate at most. Unset: `generation_config.max_new_tokens`, else 512, and never
            past the model's context.
        stop: Strings that end the text; they are not part of it. One string or several.
        temperature: Divides the logits before sampling. None or 0 is greedy.
        top_p: Nucleus sampling, in (0, 1].
        top_k: Sample among the k likeliest tokens, at least 1. Unlike `model.generate`, which falls back to 50, unset
            means all tokens unless the model's own `generation_config` sets it.
        min_p: Drop tokens less likely than `min_p` times the likeliest, in [0, 1].
        repetition_penalty: Divides positive logits of tokens seen in prompt or output (CTRL, arXiv 1909.05858), > 0.
        presence_penalty: Subtracted from the logit of every token that the output already holds.
        frequency_penalty: Subtracted once per occurrence in the output.
        logit_bias: Token id to number added to its logit.
        seed: Makes sampling reproducible: the same seed gives the same tokens, with drafts or without.
        grammar: What the text must look like, as in `Grammar.json_schema(...)`. It then parses whatever the model
            is like, and ends within `max_new_tokens`; where not even its shortest text fits, an OptionError says so.
        exact: Decide greedy near-ties, within a margin measured at load, by a pass over one token. That makes tokens of
            half precision differ from plain decoding's less often, not never: keys and values of wide passes are
            rounded differently too. Sampling then runs without drafts. Not needed in float32.
        max_draft_tokens: Guesses per round at most; 0 is plain decoding. Unset: as many as pay by measured pass times.
        drafters: Where guesses may come from: "phrases", "recycling", "retrieval", "draft_model", "lookahead". Unset:
            all but lookahead, as far as there are documents and a draft model.
        max_rounds: Draft, verify, accept cycles at most; then the answer ends with the finish reason "length".
        timeout: Seconds that an answer may take, its turn among other requests included, its reader not; then
            RequestTimeoutError, within a round.
        overflow: What happens to a prompt that leaves too little room in the model's context. "error", and unset:
            ContextLengthError if it leaves none. "slide": the oldest of it is left out, until there is room for
            `max_new_tokens` or a quarter of the context, whichever is less: the oldest exchanges of chat messages,
            never system messages nor the last one; the oldest tokens of text.
    """

    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    seed: int | None = None
    grammar: Grammar | None = None
    exact: bool = False
    max_draft_tokens: int | None = None
    drafters: tuple[str, ...] | None = None
    max_rounds: int | None = None
    timeout: float | None = None
    overflow: Literal["error", "slide"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("top_k", self.top_k, 1)
        check_whole("seed", self.seed, 0, 2**64 - 1)
        check_whole("max_draft_tokens", self.max_draft_tokens, 0)
        check_whole("max_rounds", self.max_rounds, 1)
        if self.drafters is not None:
            object.__setattr__(self, "drafters", check_drafters(self.drafters))
        _number("temperature", self.temperature, 0.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, above=True)
        _number("presence_penalty", self.presence_penalty)
        _number("frequency_penalty", self.frequency_penalty)
        if not isinstance(self.grammar, (Grammar, type(None))):
            raise OptionError(
                f"grammar must be a Grammar, as Grammar.json_schema(...) makes them, but got {self.grammar!r:.80}"
            )
        if not isinstance(self.exact, bool):
            raise OptionError(f"exact must be True or False, but got {self.exact!r}")
        self._check_limits()
        self._check_bias()
        self._check_greedy()

    @property
    def greedy(self) -> bool:
        return not self.temperature

    def _check_limits(self) -> None:
        number = isinstance(self.timeout, (int, float)) and not isinstance(self.timeout, bool)
        if self.timeout is not None and not (number and 0 < self.timeout < float("inf")):
            raise OptionError(f"timeout must be a positive number of seconds, but got {self.timeout!r}")
        if self.overflow not in (None, "error", "slide"):
            raise OptionError(f"overflow must be 'error' or 'slide', but got {self.overflow!r}")

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, (Mapping, type(None))):
            raise OptionError(f"logit_bias must map token ids to numbers, but got {self.logit_bias!r:.80}")
        for token_id, bias in (self.logit_bias or {}).items():
            check_whole("logit_bias key", token_id, 0)
            _number(f"logit_bias[{token_id}]", bias)

    def _check_greedy(self) -> None:
        # temperature=0 beside sampling options is how clients ask for greedy; no temperature at all is an oversight.
        for name in ("top_p", "top_k", "min_p"):
            if self.temperature is None and getattr(self, name) is not None:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} has no effect without a temperature (unset is greedy); "
                    f"set temperature, or leave {name} out"
                )


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) or not isinstance(value or (), Iterable) else tuple(value or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise OptionError(f"{name} must be non-empty strings, but got {string!r}")
    return strings


def check_whole(name: str, value: Any, low: int, high: int = sys.maxsize) -> None:
    """Raise OptionError unless value is None or a whole number in [low, high]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise OptionError(f"{name} must be a whole number of at least {low}, but got {value!r}")
    if value > high:
        raise OptionError(f"{name} must be at most {high}, but got {value!r}")


def _number(
    name: str, value: Any, low: float = float("-inf"), high: float = float("inf"), *, above: bool = False
) -> None:
    """Raise unless value is None or a finite number in [low, high]; with `above`, in (low, high]."""
    if value is None:
        return
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != float("inf")
    if not finite or not low <= value <= high or (above and value == low):
        left, right = "(" if above or low == float("-inf") else "[", ")" if high == float("inf") else "]"
        raise OptionError(f"{name} must be a number in {left}{low:g}, {high:g}{right}, but got {value!r}")


def spread(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of `count` prompts: of a list each its own, anything else for all. Raises OptionError."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise OptionError(f"{name} must be one for all {count} prompts or a list of {count}, but got {len(value)}")
    return list(value)


SETTINGS = tuple("max_tokens" if one.name == "max_new_tokens" else one.name for one in fields(DecodingOptions))
"""The options as frameworks call them."""


DRAFTERS = ("phrases", "recycling", "retrieval", "draft_model", "lookahead")
"""What can be switched on and off by name."""

DEFAULT_DRAFTERS = ("phrases", "recycling", "retrieval", "draft_model")
"""Lookahead widens every pass for phrases that may come; it is on request."""


def check_drafters(drafters: object, name: str = "drafters") -> tuple[str, ...]:
    """`drafters` as a tuple; raises OptionError where one is unknown."""
    if isinstance(drafters, str) or not isinstance(drafters, Collection) or not set(drafters) <= set(DRAFTERS):
        raise OptionError(f"{name} must be some of {', '.join(map(repr, DRAFTERS))}, but got {drafters!r:.80}")
    return tuple(drafters)
