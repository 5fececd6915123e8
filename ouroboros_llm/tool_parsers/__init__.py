"""What a model's reply consists of: content, reasoning and tool calls, read from the model's own markup.

`format_of(tokenizer)` says how a model marks them; the format's `parse` takes a whole reply apart, its `stream` one
that comes in pieces.
"""

from .deltas import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    ContentDelta,
    Delta,
    InvalidToolCall,
    ReasoningDelta,
    Reply,
    ToolCall,
    reply_of,
)
from .families import format_of
from .partial_json import spoiled
from .reply_format import ReplyFormat
from .response_template import TemplateStream
from .streaming import ReplyStream

__all__ = [
    "ArgumentsDelta",
    "CallEnd",
    "CallStart",
    "ContentDelta",
    "Delta",
    "InvalidToolCall",
    "ReasoningDelta",
    "Reply",
    "ReplyFormat",
    "ReplyStream",
    "TemplateStream",
    "ToolCall",
    "format_of",
    "reply_of",
    "spoiled",
]
