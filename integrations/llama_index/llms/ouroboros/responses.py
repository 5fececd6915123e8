"""What LlamaIndex gets back: plain text and plain numbers, never tensors, which traces would keep alive."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol, TypeVar

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole

from ouroboros_llm import GenerationResult, Piece

R_co = TypeVar("R_co", covariant=True)


class Respond(Protocol[R_co]):
    """Makes a response of the text so far, the text that is new and, at the end, the result."""

    def __call__(self, text: str, delta: str | None, result: GenerationResult | None) -> R_co: ...


def chat_response(text: str, delta: str | None, result: GenerationResult | None) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, **_report(result))


def completion_response(text: str, delta: str | None, result: GenerationResult | None) -> CompletionResponse:
    return CompletionResponse(text=text, delta=delta, **_report(result))


def whole(last: Piece, respond: Respond[R_co]) -> R_co:
    """The response to a whole answer, by its last piece."""
    assert last.result is not None  # the last piece always carries it
    return respond(last.result.text, None, last.result)


def _report(result: GenerationResult | None) -> dict[str, Any]:
    """`raw` and `additional_kwargs` of a response; only the last response of a stream has them."""
    if result is None:
        return {}
    usage = {
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": result.usage.completion_tokens,
        "total_tokens": result.usage.total_tokens,
        "cached_tokens": result.usage.cached_tokens,
    }
    rest = {"finish_reason": result.finish_reason, "statistics": _statistics(result)}
    return {"raw": {"usage": usage, **rest}, "additional_kwargs": {**usage, **rest}}


def _statistics(result: GenerationResult) -> dict[str, Any]:
    """The statistics as plain data, without what is said of every single token."""
    names = [field.name for field in fields(result.statistics) if field.name != "origins"]
    numbers = {name: getattr(result.statistics, name) for name in names}
    numbers["accepted_by_source"] = dict(result.statistics.accepted_by_source)
    numbers["mean_acceptance_length"] = result.statistics.mean_acceptance_length
    return numbers
