"""What `ChatOuroboros` and `OuroborosLLM` do alike: settle what holds in a call, and have it decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self
from uuid import uuid4

from langchain_core.language_models.base import LangSmithParams
from langchain_core.runnables import RunnableConfig
from typing_extensions import override

from ouroboros_llm import GenerationResult, OptionError, Ouroboros, StreamChunk
from ouroboros_llm.defaults import shared
from ouroboros_llm.scopes import corpus_of

from ._fields import CALL_SETTINGS, SAMPLING, OuroborosFields, hint, our_names
from ._scopes import SCOPES, FoundScopes, found_scopes

PROVIDER = "ouroboros"


class OuroborosModel(OuroborosFields):
    """A local model as LangChain sees it, whatever it is asked for."""

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
            raise OptionError(f"a call takes no argument {name!r}; {hint(name, self._call_names())}")
        call = self.model_copy(update=settings)
        if settings.get("scope") is None:
            call.scope = found.named or call.scope
        return (call._checked() if settings else call)._settled(found)

    def _call_names(self) -> frozenset[str]:
        """What a call may be given."""
        return CALL_SETTINGS | {"stop"}

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
        return shared(
            self.model,
            draft_model=self.draft_model,
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            store=self.store,
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
        form: Mapping[str, Any] | None = None,
    ) -> Iterator[StreamChunk]:
        options = self._options(stop, form)
        shared = {"prefix_scopes": self._write_scopes} if self._write_scopes else {}
        with our_names():
            stream: Iterator[StreamChunk] = (ouroboros or self._loaded()).stream(
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
                "prefill_seconds": statistics.prefill_seconds,
                "model_seconds": statistics.model_seconds,
                "wait_seconds": statistics.wait_seconds,
                "load_seconds": statistics.load_seconds,
                "tokens_per_second": statistics.tokens_per_second,
            },
        }

    @property
    @override
    def _identifying_params(self) -> Mapping[str, Any]:
        """What the text depends on. Store, scope and draft model only change how soon it comes."""
        params = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if self.dtype != "auto":
            params["dtype"] = str(self.dtype)
        if self.quantization is not None:
            params["quantization"] = self.quantization
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
