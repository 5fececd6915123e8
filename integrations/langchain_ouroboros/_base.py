"""What `ChatOuroboros` and `OuroborosLLM` share: fields, and their translation for the decoder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self
from uuid import uuid4

from langchain_core.language_models.base import BaseLanguageModel, LangSmithParams
from langchain_core.runnables import RunnableConfig
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, field_validator, model_validator
from typing_extensions import override

from ouroboros_llm import DecodingOptions, GenerationResult, OptionError, Ouroboros, Piece, __version__
from ouroboros_llm.defaults import DEFAULT_STORE, default_model, shared
from ouroboros_llm.memory_pool import MemorySource
from ouroboros_llm.scopes import corpus_of

from ._scopes import SCOPES, FoundScopes, found_scopes

PROVIDER = "ouroboros"

SAMPLING = (
    "temperature",
    "max_tokens",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "exact",
    "max_rounds",
    "overflow",
)
"""Fields that say what is generated; `stop` is one too, but LangChain hands it over by itself."""

ALIASES = {"model_name": "model", "stop_sequences": "stop"}
"""Other providers' names for our fields."""

SCOPE_SETTINGS = frozenset({"scope", "read_scopes", "corpus_scope", "learn_agent"})
"""Fields that say whose phrases are used."""

SPEED_SETTINGS = frozenset({"max_draft_tokens", "drafters", "timeout"})
"""Fields that only change how soon the text comes, or whether."""

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
                raise OptionError(f"{cls.__name__} takes no argument {alias!r}; {_hint(alias, cls.model_fields)}")
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
        given |= {"dtype": self.dtype != "auto", "model": self.model != ouroboros.name}
        in_memory = self.store is None and isinstance(ouroboros.store, MemorySource)
        given |= {"store": not (in_memory or self.store is DEFAULT_STORE or self.store is ouroboros.store)}
        for name in (name for name, contradicts in given.items() if contradicts):
            shown = "" if name == "store" else f"={getattr(self, name)!r}"  # a database URL may hold a password
            raise OptionError(
                f"{name}{shown} has no effect beside ouroboros=, which is loaded already; "
                f"leave {name} out, or pass it to the Ouroboros"
            )

    def _for_call(self, settings: Mapping[str, Any]) -> Self:
        """This model with the settings of one call in place of its own.

        Raises:
            OptionError: a name that is not a setting of a call, or a value out of range.
        """
        if self._write_scopes is not None and not settings:
            return self
        # `stream` is for LangChain, which has read it by now.
        found = settings.get(SCOPES) or found_scopes()
        settings = {name: value for name, value in settings.items() if name not in ("stream", SCOPES)}
        for name in settings.keys() - CALL_SETTINGS:
            raise OptionError(f"a call takes no argument {name!r}; {_hint(name, CALL_SETTINGS)}")
        call = self.model_copy(update=settings)
        if settings.get("scope") is None:
            call.scope = found.named or call.scope
        return (call._checked() if settings else call)._settled(found)

    def _settled(self, found: FoundScopes) -> Self:
        """This model, a copy for one call, with the scopes that hold there."""
        agent = [found.agent] if found.agent else []
        self.scope = self.scope if self.scope is not None else found.conversation
        self.read_scopes = [*self.read_scopes, *(name for name in agent if name not in self.read_scopes)]
        self._write_scopes = tuple(agent) if self.learn_agent else ()
        return self

    def _scoped(self, config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The settings of a call, and the scopes that its config names, which goes no further."""
        return kwargs if self._write_scopes is not None else {SCOPES: found_scopes(config), **kwargs}

    def _loaded(self) -> Ouroboros:
        """The model, loaded by the first call in the process that needs it."""
        if self.ouroboros is not None:
            return self.ouroboros  # type: ignore[no-any-return]  # any object with its methods will do
        return shared(self.model, draft_model=self.draft_model, device=self.device, dtype=self.dtype, store=self.store)

    def _stop(self, stop: list[str] | None) -> list[str] | None:
        """The stop strings that hold in a call: its own, if it has any say, else the model's."""
        chosen = self.stop if stop is None else stop
        return [chosen] if isinstance(chosen, str) else list(chosen or ()) or None

    def _options(self, stop: list[str] | None, **form: Any) -> DecodingOptions:
        """`form`: options that give the reply a form."""
        options = {name: getattr(self, name) for name in SAMPLING}
        # A reply that is kept to a form ends by itself; a stop string in its middle would break it.
        limit, stops = options.pop("max_tokens"), () if form.get("grammar") else tuple(self._stop(stop) or ())
        with _our_names():
            return DecodingOptions(
                max_new_tokens=limit,
                stop=stops,
                max_draft_tokens=self.max_draft_tokens,
                drafters=None if self.drafters is None else tuple(self.drafters),
                timeout=self.timeout,
                **options,
                **form,
            )

    def _dice(self) -> str | None:
        """What tells a sample from another one of the same prompt; None where they are the same."""
        return uuid4().hex if self.temperature and self.seed is None else None

    def _stream_of(
        self,
        prompt: str | list[dict[str, Any]],
        stop: list[str] | None,
        *,
        ouroboros: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kept_tokens: Mapping[int, str] | None = None,
        **form: Any,
    ) -> Iterator[Piece]:
        options = self._options(stop, **form)
        shared = {"prefix_scopes": self._write_scopes} if self._write_scopes else {}
        with _our_names():
            stream: Iterator[Piece] = (ouroboros or self._loaded()).stream(
                prompt,
                scope=self.scope,
                read_scopes=self.read_scopes,
                write_scopes=self._write_scopes or (),
                options=options,
                tools=tools,
                kept_tokens=kept_tokens,
                **({} if self.corpus_scope is None else {"corpus_scopes": [corpus_of(self.corpus_scope)]}),
                **shared,
            )
        return stream

    def _response_metadata(self, result: GenerationResult) -> dict[str, Any]:
        statistics = result.statistics
        return {
            "model_name": self.model,
            "model_provider": PROVIDER,
            "finish_reason": result.finish_reason,
            "ouroboros": {
                "rounds": statistics.rounds,
                "target_forwards": statistics.target_forwards,
                "draft_forwards": statistics.draft_forwards,
                "drafted_tokens": statistics.drafted_tokens,
                "accepted_tokens": statistics.accepted_tokens,
                "accepted_by_source": dict(statistics.accepted_by_source),
                "mean_acceptance_length": statistics.mean_acceptance_length,
                "seconds": statistics.seconds,
            },
        }

    @property
    @override
    def _identifying_params(self) -> Mapping[str, Any]:
        """What the text depends on. Store, scope and draft model only change how soon it comes."""
        params = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if self.dtype != "auto":
            params["dtype"] = str(self.dtype)
        if self.ouroboros is not None:  # weights may have changed since they got their name
            params["weights"] = str(getattr(self.ouroboros, "model_fingerprint", None))
        return {"model": self.model, **params, "stop": self._stop(None)}

    @override
    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=self._stop(stop), **kwargs)
        params["ls_provider"] = PROVIDER
        return params

    @override
    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` as a prompt, special tokens included."""
        return self.custom_get_token_ids(text) if self.custom_get_token_ids else self._loaded().encode(text)


@contextmanager
def _our_names() -> Iterator[None]:
    """Errors about options call them by LangChain's names."""
    try:
        yield
    except OptionError as error:
        raise OptionError(str(error).replace("max_new_tokens", "max_tokens")) from None


def _hint(name: str, known: Collection[str]) -> str:
    similar = get_close_matches(name, known, 1)
    return f"did you mean {similar[0]!r}?" if similar else f"expected one of: {', '.join(sorted(known))}"
