"""What may be said to `ChatOuroboros` and `OuroborosLLM`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from langchain_core.language_models.base import BaseLanguageModel
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, field_validator, model_validator

from ouroboros_llm import DecodingOptions, OptionError, Ouroboros, __version__
from ouroboros_llm.defaults import DEFAULT_STORE, default_model
from ouroboros_llm.options import SETTINGS
from ouroboros_llm.phrase_pool.memory import MemorySource

SPEED_SETTINGS = frozenset({"max_draft_tokens", "drafters", "timeout"})
"""Fields that only change how soon the text comes, or whether."""

SAMPLING = tuple(name for name in SETTINGS if name not in {*SPEED_SETTINGS, "stop", "grammar"})
"""Fields that say what is generated; `stop` is one too, but LangChain hands it over by itself."""

ALIASES = {"model_name": "model", "stop_sequences": "stop"}
"""Other providers' names for our fields."""

_ELSEWHERE = {"max_completion_tokens": "max_tokens", "max_new_tokens": "max_tokens", "num_predict": "max_tokens"}
"""What other packages call our fields, in more than other letters."""

SCOPE_SETTINGS = frozenset({"scope", "read_scopes", "corpus_scope", "learn_agent"})
"""Fields that say whose phrases are used."""

CALL_SETTINGS = frozenset({*SAMPLING, *SCOPE_SETTINGS, *SPEED_SETTINGS, "model"})
"""Fields that a call may give another value."""


class OuroborosFields(BaseLanguageModel[Any]):
    """A local model and how to use it. Constructing one loads nothing; the first call does."""

    model: str | None = None
    """Registry name, local path or hub id. Unset: `$OUROBOROS_MODEL`, else smollm2-135m-instruct."""
    draft_model: str | None = None
    """A smaller model of the same vocabulary that drafts too: registry name, local path or hub id."""
    device: str = "auto"
    dtype: Any = "auto"
    quantization: Literal["int8", "int4"] | None = None
    """Bits of the weights of linear layers; unset: as `dtype` says."""
    store: Any = Field(default=DEFAULT_STORE, exclude=True, repr=False)
    """Where phrases are kept: a URL, a SQLAlchemy engine or a `PhraseStore`; None keeps nothing on disk.
    Unset: `$OUROBOROS_STORE`, else `phrases.db` in the user's data folder."""
    scope: str | None = Field(default=None, repr=False)
    """Whose phrases to use and to add to, as in `conversation:42`. Unset: `conversation:` and the `thread_id`,
    `session_id` or `conversation_id` of the run's config; without any, `conversation:default`, one user's own."""
    read_scopes: Sequence[str] = Field(default=(), repr=False)
    """Further scopes to read, in order. Behind them comes `agent:` and the name of the agent that calls, if any."""
    corpus_scope: str | None = Field(default=None, repr=False)
    """Documents that answers may quote, as `Ouroboros.index_documents` put them into a scope: "manuals" is
    `corpus:manuals`."""
    learn_agent: bool = Field(default=False, repr=False)
    """Add answers to the agent's scope too, which all its conversations read, and keep its instructions there: only
    where these may share what they say."""
    ouroboros: Any = Field(default=None, exclude=True, repr=False)
    """An `Ouroboros` that you built yourself, in place of the fields above that load one."""

    temperature: float | None = None
    """Unset or 0 is greedy."""
    max_tokens: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    """Token id to number added to its logit."""
    seed: int | None = None
    exact: bool = False
    """Decide near-ties by a pass over one token, so that half precision chooses as plain decoding does."""
    max_rounds: int | None = None
    """Passes of the model behind the prompt, at most."""
    overflow: Literal["error", "slide"] | None = None
    """"slide": where the context is too small, the oldest exchanges (or tokens) of the prompt are left out."""
    stop: list[str] | str | None = None
    """Strings that end the text and are no part of it. Those of a call replace these."""

    max_draft_tokens: int | None = Field(default=None, repr=False)
    """Guesses per pass at most; 0 is plain decoding. Unset: as many as pay. It only changes how soon the text comes."""
    drafters: Sequence[str] | None = Field(default=None, repr=False)
    """Where guesses may come from: "phrases", "recycling", "retrieval", "draft_model", "lookahead"."""
    timeout: float | None = None
    """Seconds that one answer may take; then `RequestTimeoutError`, within a round. Its turn among other calls counts;
    loading, the reader, and reading the instructions that an agent learns once do not."""
    streaming: bool | None = None
    """True: `invoke` reports tokens to callbacks as they come. False: a chat model streams nowhere."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Ignored, a local model needs none. Declared because code that builds any provider's model passes it."""
    max_retries: int | None = Field(default=None, exclude=True, repr=False)
    """Ignored, a local call does not fail in passing. Declared for the same reason."""

    _write_scopes: tuple[str, ...] | None = PrivateAttr(default=None)
    """Further scopes that the answer is added to; None until a call has settled its scopes."""

    model_config = ConfigDict(hide_input_in_errors=True)  # the input holds keys and database URLs

    # Not by `extra="forbid"`: LangChain's classes stand behind this one, and their configuration would win.
    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_names(cls, given: dict[str, Any]) -> dict[str, Any]:
        settled: dict[str, Any] = {}
        for alias, value in given.items():
            name = ALIASES.get(alias, alias)
            if name not in cls.model_fields:
                raise OptionError(f"{cls.__name__} takes no argument {alias!r}; {hint(alias, cls.model_fields)}")
            if name in settled:
                raise OptionError(f"{name} is given twice, also as {alias}; leave one out")
            settled[name] = value
        return settled

    @field_validator("model", "draft_model", mode="before")
    @classmethod
    def _accept_path(cls, name: Any) -> Any:
        return str(name) if isinstance(name, Path) else name

    @field_validator("ouroboros")
    @classmethod
    def _check_ouroboros(cls, ouroboros: Any) -> Any:
        if ouroboros is not None and not callable(getattr(ouroboros, "stream", None)):
            raise OptionError(f"ouroboros must be an Ouroboros, but got {type(ouroboros).__name__}")
        return ouroboros

    @model_validator(mode="after")
    def _settle_ouroboros_settings(self) -> Self:
        self.model = self._name()
        self._add_version("ouroboros-llm", __version__)
        return self._checked()

    def _name(self) -> str:
        """The model's name, also before `model` is settled."""
        return self.model or (default_model() if self.ouroboros is None else str(self.ouroboros.name))

    def _checked(self) -> Self:
        """This model. Raises OptionError where a setting is out of range or contradicts another."""
        self._options(None)
        if isinstance(self.read_scopes, str):
            raise OptionError(f"read_scopes must be a list of names, but got the string {self.read_scopes!r}")
        if not isinstance(self.learn_agent, bool):
            raise OptionError(f"learn_agent must be True or False, but got {self.learn_agent!r}")
        if self.ouroboros is not None:
            self._check_prebuilt(self.ouroboros)
        return self

    def _check_prebuilt(self, ouroboros: Ouroboros) -> None:
        given = {"draft_model": self.draft_model is not None, "device": self.device != "auto"}
        given |= {"dtype": self.dtype != "auto", "quantization": self.quantization is not None}
        given |= {"model": self.model != ouroboros.name}
        in_memory = self.store is None and isinstance(ouroboros.store, MemorySource)
        given |= {"store": not (in_memory or self.store is DEFAULT_STORE or self.store is ouroboros.store)}
        for name in (name for name, contradicts in given.items() if contradicts):
            shown = "" if name == "store" else f"={getattr(self, name)!r}"  # a database URL may hold a password
            raise OptionError(
                f"{name}{shown} has no effect beside ouroboros=, which is loaded already; "
                f"leave {name} out, or pass it to the Ouroboros"
            )

    def _stop(self, stop: list[str] | None) -> list[str] | None:
        """The stop strings that hold in a call: its own, if it has any say, else the model's."""
        chosen = self.stop if stop is None else stop
        return [chosen] if isinstance(chosen, str) else list(chosen or ()) or None

    def _options(self, stop: list[str] | None, form: Mapping[str, Any] | None = None) -> DecodingOptions:
        """`form`: options that give the reply a form."""
        options = {name: getattr(self, name) for name in SAMPLING}
        options |= {"max_new_tokens": options.pop("max_tokens"), "stop": tuple(self._stop(stop) or ())}
        options |= {"max_draft_tokens": self.max_draft_tokens, "timeout": self.timeout}
        options["drafters"] = None if self.drafters is None else tuple(self.drafters)
        with our_names():
            return DecodingOptions(**{**options, **(form or {})})


@contextmanager
def our_names() -> Iterator[None]:
    """Errors about options call them by LangChain's names."""
    try:
        yield
    except OptionError as error:
        raise OptionError(str(error).replace("max_new_tokens", "max_tokens")) from None


def hint(name: str, known: Collection[str]) -> str:
    similar = [_ELSEWHERE[name]] if name in _ELSEWHERE else get_close_matches(name, known, 1)
    return f"did you mean {similar[0]!r}?" if similar else f"expected one of: {', '.join(sorted(known))}"
