"""One call: what was asked, in which scopes, and what the model says."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ouroboros_llm import ContextLengthError, DecodingOptions, OptionError, StreamChunk
from ouroboros_llm.chat.exchange import Exchange
from ouroboros_llm.chat.reply_spec import Asked
from ouroboros_llm.serving.stream import off_the_loop
from ouroboros_llm.tool_parsers import ContentDelta

from .prompts import Prompt
from .responses import Said

if TYPE_CHECKING:
    from .configuration import ConfiguredLLM


@dataclass
class Asking:
    """A question and its answer. Nothing is loaded or decoded before the first piece is asked for."""

    llm: ConfiguredLLM
    prompt: Prompt
    asked: Asked
    options: DecodingOptions
    scopes: Mapping[str, Any]
    _exchange: Exchange | None = None

    def pieces(self) -> Generator[StreamChunk]:
        """What the model says, in the scope that holds here, wherever it is read. Closing it closes the generation."""
        return self._pieces(copy_context())

    def apieces(self) -> AsyncGenerator[StreamChunk]:
        """As `pieces`; what takes time happens in other threads."""
        return off_the_loop(self._start)

    def read(self, piece: StreamChunk, said: Said) -> bool:
        """Add to what was `said`; returns whether anything is new."""
        if self._exchange is not None:
            deltas = self._exchange.push(piece)
        else:
            deltas = [ContentDelta(piece.text)] if piece.text else []
        return said.add(deltas, piece.result)

    def _pieces(self, context: Context) -> Generator[StreamChunk]:
        pieces: Any = context.run(self._start)
        try:
            yield from pieces
        finally:
            pieces.close()

    def _start(self) -> Iterator[StreamChunk]:
        ouroboros = self.llm.load()
        found = self.prompt.form(self.asked, bool(ouroboros.tokenizer.chat_template))
        with our_names():
            if not isinstance(found, Exchange):
                return ouroboros.stream(found, options=self.options, **self.scopes)
            found.start(ouroboros)
            self._exchange = found
            reading: dict[str, Any] = {"tools": found.tools, "kept_tokens": found.kept_tokens}
            return ouroboros.stream(
                found.prompt,
                options=self._kept_to(found.form),
                **self.scopes,
                **{name: value for name, value in reading.items() if value},
            )

    def _kept_to(self, form: Mapping[str, Any]) -> DecodingOptions:
        if form and self.options.grammar is not None:
            raise OptionError("grammar cannot be given beside a forced call or response_format; leave one out")
        return replace(self.options, **form)


@contextmanager
def our_names() -> Iterator[None]:
    """Errors call options by LlamaIndex's names, and say what helps there."""
    try:
        yield
    except ContextLengthError as error:
        advice = (
            "where LlamaIndex packs prompts, let it count the model's tokens: Settings.tokenizer = llm.load().tokenizer"
        )
        raise ContextLengthError(f"{error}; {advice}") from None
    except OptionError as error:
        raise OptionError(str(error).replace("max_new_tokens", "max_tokens")) from None
