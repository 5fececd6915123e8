"""One call of a chat model: messages to a prompt, and pieces of the reply to LangChain's chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolCall
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult

from ouroboros_llm import GenerationResult, StreamChunk, Usage
from ouroboros_llm.chat import exchange as replies
from ouroboros_llm.chat.reply_spec import Asked
from ouroboros_llm.serving.stream import ashown, off_the_loop, shown
from ouroboros_llm.tool_parsers import ArgumentsDelta, CallEnd, CallStart, ContentDelta, Delta, ReasoningDelta, spoiled

from ._instructions import keep_instructions
from ._messages import call_ids, message_ids, to_dicts

if TYPE_CHECKING:
    from .chat_models import ChatOuroboros


class Exchange:
    """A question and its answer. Nothing is loaded or decoded before the first piece is asked for."""

    def __init__(self, model: ChatOuroboros, messages: list[BaseMessage], stop: list[str] | None, asked: Asked) -> None:
        """`model`: with the settings of the call."""
        self._model, self._stop = model, stop
        to_prompt, about = partial(to_dicts, messages), f"{message_ids(messages)} {model._dice()}"
        self._exchange = replies.Exchange(to_prompt, asked, ids=call_ids(messages), about=about)
        self._arguments: dict[int, str] = {}

    def chunks(self) -> Iterator[ChatGenerationChunk]:
        """The reply while it comes. Closing the iterator ends the decoding."""
        for piece in shown(self._start()):
            if (message := self._message(piece)) is not None:
                yield self._chunk(message, piece.result)

    async def achunks(self) -> AsyncGenerator[ChatGenerationChunk]:
        """As `chunks`."""
        async with aclosing(ashown(off_the_loop(self._start))) as pieces:
            async for piece in pieces:
                if (message := self._message(piece)) is not None:
                    yield self._chunk(message, piece.result)

    def _start(self) -> Iterator[StreamChunk]:
        ouroboros, asking = self._model._loaded(), self._exchange
        asking.start(ouroboros)
        for agent in self._model._write_scopes or ():
            keep_instructions(ouroboros, agent, self._model.scope, asking.prompt, asking.tools)
        return self._model._stream_of(
            asking.prompt,
            self._stop,
            ouroboros=ouroboros,
            tools=asking.tools,
            kept_tokens=asking.kept_tokens,
            form=asking.form,
        )

    def _message(self, piece: StreamChunk) -> AIMessageChunk | None:
        """What a piece adds to the message, the last one without usage and metadata; None if nothing yet.

        Raises:
            OutputParserException: the reply is over, and is not the call that it had to be.
        """
        deltas = self._exchange.push(piece)
        if piece.result is not None:
            self._check(piece.result)
        content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
        calls = self._call_chunks(deltas)
        if not (content or reasoning or calls or piece.result):
            return None
        return AIMessageChunk(
            content=content,
            additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
            tool_call_chunks=calls,
        )

    def _chunk(self, message: AIMessageChunk, result: GenerationResult | None) -> ChatGenerationChunk:
        # Chunks are added up, strings in their metadata joined: what is true of the answer stands on the last one only.
        if result is None:
            return ChatGenerationChunk(message=message)
        metadata = self._model._response_metadata(result)
        if self._exchange.reply.tool_calls and result.finish_reason == "stop":
            metadata["finish_reason"] = "tool_calls"
        message.usage_metadata = _usage_metadata(result.usage)
        message.response_metadata = metadata
        message.chunk_position = "last"
        return ChatGenerationChunk(message=message, generation_info={"finish_reason": metadata["finish_reason"]})

    def _call_chunks(self, deltas: Iterable[Delta]) -> list[ToolCallChunk]:
        chunks: dict[int, ToolCallChunk] = {}
        for delta in deltas:
            if isinstance(delta, CallStart):
                chunks[delta.index] = tool_call_chunk(name=delta.name, args="", id=delta.id, index=delta.index)
                self._arguments[delta.index] = ""
            elif isinstance(delta, ArgumentsDelta):
                self._add(chunks, delta.index, delta.text)
            elif isinstance(delta, CallEnd) and delta.error is not None:
                # LangChain completes partial JSON, and would make a call of one that was cut off.
                so_far = self._arguments[delta.index]
                self._add(chunks, delta.index, spoiled(so_far)[len(so_far) :])
        return list(chunks.values())

    def _add(self, chunks: dict[int, ToolCallChunk], index: int, text: str) -> None:
        chunk = chunks.setdefault(index, tool_call_chunk(name=None, args="", id=None, index=index))
        chunk["args"] = (chunk["args"] or "") + text
        self._arguments[index] += text

    def settled(self, result: ChatResult) -> ChatResult:
        """`result`, which chunks were added up to, with the calls as they were read, the invalid ones with errors."""
        reply = self._exchange.reply
        for message in (generation.message for generation in result.generations):
            assert isinstance(message, AIMessage)  # the sum of what `chunks` gave
            message.tool_calls = [_call(call) for call in reply.tool_calls]
            message.invalid_tool_calls = [
                invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=call.error)
                for call in reply.invalid_tool_calls
            ]
        return result

    def _check(self, result: GenerationResult) -> None:
        if names := self._exchange.missed:
            cut = "; it was cut off, raise max_tokens" if result.finish_reason == "length" else ""
            raise OutputParserException(
                f"the model had to call {' or '.join(names)}, but its reply is no such call{cut}: {result.text!r:.500}",
                llm_output=result.text,
            )


def _call(call: Any) -> ToolCall:
    return tool_call(name=call.name, args=call.arguments, id=call.id)


def _usage_metadata(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )
