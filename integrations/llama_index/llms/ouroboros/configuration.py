"""What a user sets on `OuroborosLLM`, and what follows from it without a prompt."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from llama_index.core.base.llms.types import LLMMetadata
from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM

from ouroboros_llm import DecodingOptions, OptionError, Ouroboros
from ouroboros_llm.chat.reply_spec import REPLY_SETTINGS
from ouroboros_llm.defaults import DEFAULT_STORE, default_model, shared
from ouroboros_llm.models.metadata import ModelMetadata, read_metadata
from ouroboros_llm.options import SETTINGS
from ouroboros_llm.scopes import corpus_of, current_scope

from .asking import our_names
from .metadata import loaded_facts, metadata_of
from .scopes import tagged_scope

_LOADING = ("draft_model", "device", "dtype", "quantization", "store")
_OPTIONS = tuple(name for name in SETTINGS if name != "grammar")
_KEYWORDS = (*_OPTIONS, "grammar", "scope", "read_scopes", "corpus_scope", *sorted(REPLY_SETTINGS))


class ConfiguredLLM(FunctionCallingLLM):
    """The fields of `OuroborosLLM`: checked when constructed, the model loaded when needed."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str | None = Field(
        default=None,
        description="Registry name, local path or hub id; unset: $OUROBOROS_MODEL or smollm2-135m-instruct.",
    )
    draft_model: str | None = Field(
        default=None, description="A smaller model of the same vocabulary that drafts; same forms as model."
    )
    device: str = Field(default="auto", description="Where the model runs, e.g. 'cpu' or 'cuda:0'.")
    dtype: str = Field(default="auto", description="Precision of the weights, e.g. 'float32' or 'bfloat16'.")
    quantization: Literal["int8", "int4"] | None = Field(
        default=None, description="Bits of the weights of linear layers; unset: as dtype says."
    )
    store: Any = Field(
        default=DEFAULT_STORE,
        description="Where phrases are kept: a URL, a SQLAlchemy engine or a PhraseStore; None: in memory; "
        "unset: $OUROBOROS_STORE or phrases.db in the user's data folder.",
        exclude=True,
    )
    scope: str | None = Field(
        default=None,
        description="Whose phrases calls read and add to, e.g. 'conversation:42'; "
        "unset: 'conversation:' and the thread_id, session_id or conversation_id of instrument_tags around the call; "
        "without any, the single user's 'conversation:default'. ouroboros_scope(...) around a call takes precedence.",
    )
    read_scopes: tuple[str, ...] = Field(
        default=(), description="Further scopes to read, in order, e.g. 'corpus:manuals'."
    )
    corpus_scope: str | None = Field(
        default=None,
        description="Documents that answers may quote, as index_documents puts them there, e.g. 'manuals', which is "
        "the scope 'corpus:manuals'; only read.",
    )
    ouroboros: Any = Field(
        default=None,
        description="A prebuilt Ouroboros, instead of the fields that load one.",
        exclude=True,
        repr=False,
    )
    temperature: float | None = Field(
        default=None, description="Divides the logits before sampling; unset or 0: greedy."
    )
    max_tokens: int | None = Field(
        default=None,
        description="Tokens to generate at most; unset: what the model's generation_config says, else 512.",
    )
    top_p: float | None = Field(default=None, description="Nucleus sampling, in (0, 1].")
    top_k: int | None = Field(default=None, description="Sample among the k likeliest tokens.")
    min_p: float | None = Field(default=None, description="Drop tokens less likely than min_p times the likeliest.")
    repetition_penalty: float | None = Field(default=None, description="Divides positive logits of tokens seen.")
    presence_penalty: float | None = Field(default=None, description="Subtracted once for a token in the output.")
    frequency_penalty: float | None = Field(default=None, description="Subtracted per occurrence in the output.")
    logit_bias: dict[int, float] | None = Field(default=None, description="Token id to number added to its logit.")
    seed: int | None = Field(default=None, description="Makes sampling reproducible.")
    stop: str | list[str] | tuple[str, ...] | None = Field(
        default=None, description="String or strings that end the text; they are not part of it."
    )
    exact: bool = Field(default=False, description="Decide near-ties of half precision as plain decoding does.")
    max_draft_tokens: int | None = Field(default=None, description="Guesses per round at most; 0: plain decoding.")
    max_rounds: int | None = Field(default=None, description="Passes of the model behind the prompt, at most.")
    timeout: float | None = Field(
        default=None,
        description="Seconds that an answer may take, its turn among other calls included, loading and reader not; "
        "then RequestTimeoutError.",
    )
    overflow: Literal["error", "slide"] | None = Field(
        default=None,
        description="'slide': where the context is too small, the oldest exchanges (or tokens) are left out.",
    )
    drafters: tuple[str, ...] | None = Field(
        default=None,
        description="Where guesses may come from: phrases, recycling, retrieval, draft_model, lookahead; "
        "unset: all but the last, as far as there are any.",
    )
    context_window: int | None = Field(
        default=None,
        gt=0,
        description="Tokens of prompt and output that the metadata report; unset: the model's own limit.",
    )

    _loaded: Ouroboros | None = PrivateAttr(default=None)
    _facts: ModelMetadata | None = PrivateAttr(default=None)

    def load(self) -> Ouroboros:
        """The `Ouroboros` that answers, loaded by the first call that needs it.

        Raises:
            ModelError: the model is unknown, cannot be had, or does not fit the draft model.
        """
        if self._loaded is None:
            self._loaded = self.ouroboros
        if self._loaded is None:
            self._loaded = shared(self.model, **{name: getattr(self, name) for name in _LOADING})
        return self._loaded

    @property
    def metadata(self) -> LLMMetadata:
        """What the model can do. Reads its configuration and loads nothing, as agents and `apredict` ask for it on the
        event loop; a model that is not on this machine yet is fetched then, unless `load` did before.

        Raises:
            ModelError: as `load`.
        """
        ouroboros = self._loaded or self.ouroboros
        if ouroboros is not None:
            return metadata_of(loaded_facts(ouroboros), ouroboros.name, self.max_tokens, self.context_window)
        name = self.model or default_model()
        if self._facts is None:
            self._facts = read_metadata(name)
        return metadata_of(self._facts, name, self.max_tokens, self.context_window)

    def to_payload(self) -> dict[str, Any]:
        """For traces. Looks for no model, as callbacks ask for it on the event loop."""
        if self._loaded is None and self.ouroboros is None and self._facts is None:
            return {"class_name": self.class_name(), "model_name": self.model or default_model()}
        return {"class_name": self.class_name(), **self.metadata.model_dump()}

    def options(self, call: Mapping[str, Any]) -> DecodingOptions:
        """Options of one call: its own keywords over the fields.

        Raises:
            OptionError: a keyword is unknown, or an option out of range or contradicting another.
        """
        for name in call:
            if name not in _KEYWORDS:
                close = difflib.get_close_matches(name, _KEYWORDS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(_KEYWORDS)}"
                raise OptionError(f"unknown keyword {name!r}; {hint}")
        values = {name: getattr(self, name) if call.get(name) is None else call[name] for name in _OPTIONS}
        with our_names():
            return DecodingOptions(max_new_tokens=values.pop("max_tokens"), grammar=call.get("grammar"), **values)

    def scopes(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Scopes of one call, where it is made: its own keyword, `ouroboros_scope`, the field, the tags around it."""
        scope = next(filter(None, (call.get("scope"), current_scope(), self.scope, tagged_scope())), None)
        read = self.read_scopes if call.get("read_scopes") is None else call["read_scopes"]
        corpus = call.get("corpus_scope") or self.corpus_scope
        return {"scope": scope, "read_scopes": read} | ({"corpus_scopes": [corpus_of(corpus)]} if corpus else {})

    @field_validator("model", "draft_model", "device", "dtype", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        """Paths, and torch's devices and dtypes, by their names, which can be serialized."""
        torch_name = str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value
        return str(value) if isinstance(value, PurePath) else torch_name

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, data: Any) -> Any:
        # Serialization adds it, so what was serialized must be accepted with it.
        return {name: value for name, value in data.items() if name != "class_name"} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        self.options({})
        if self.ouroboros is not None:
            self._check_prebuilt()
            # So that a serialized copy names the model that spoke.
            self.model = self.ouroboros.name
        return self

    def _check_prebuilt(self) -> None:
        defaults = {name: type(self).model_fields[name].default for name in _LOADING}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.model not in (None, self.ouroboros.name):
            given.insert(0, "model")
        if given:
            raise OptionError(
                f"{', '.join(given)} cannot be given beside ouroboros, which is loaded already; "
                "pass them when you construct it"
            )

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        # A URL may hold a password, and an engine cannot be written; both are left out.
        if self.store is None or (isinstance(self.store, str) and urlsplit(self.store).password is None):
            data["store"] = self.store
        return {**data, "class_name": self.class_name()}

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded model: another process loads it by its name."""
        bare = self.model_copy(update={"ouroboros": None})
        bare._loaded = None
        return super(ConfiguredLLM, bare).__getstate__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy that shares the loaded model."""
        return self.model_copy()
