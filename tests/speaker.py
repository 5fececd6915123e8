"""Stands in for an `Ouroboros`: says what it is told, whatever it is asked."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from conftest import byte_tokenizer

from ouroboros_llm import DecodingStatistics, GenerationResult, Grammar, StreamChunk, Usage

HERMES = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "Say <tool_call>{...}</tool_call>.{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template that takes tools as Qwen's does."""

THINKING = HERMES.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class Speaker:
    """Has what the adapters use of an `Ouroboros`.

    Attributes:
        replies: said one after the other, the last one again and again; or a function of the prompt.
        calls: what it was asked.
    """

    def __init__(
        self, *replies: str | Callable[[Any], str], template: str | None = HERMES, cut: int = 3, end: str = "stop"
    ) -> None:
        self.name, self.store, self.context_length = "speaker", None, 1000
        self.tokenizer = copy.deepcopy(byte_tokenizer())
        self.tokenizer.chat_template = template
        self.replies, self.cut, self.end = list(replies), cut, end
        self.calls: list[dict[str, Any]] = []
        self.closed = threading.Event()
        self._lock = threading.Lock()

    def encode(self, prompt: Any, *, tools: Any = None) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        return list(
            self.tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        )

    def prompt(self, number: int = -1) -> str:
        """The text of a prompt, as the chat template wrote it."""
        asked = self.calls[number]
        return str(self.tokenizer.decode(self.encode(asked["prompt"], tools=asked["tools"])))

    def stream(self, prompt: Any, **arguments: Any) -> Iterator[StreamChunk]:
        with self._lock:
            self.calls.append({"prompt": prompt, **arguments})
            text = self.reply(prompt, arguments)
        return self._pieces(prompt, text, arguments["tools"])

    def reply(self, prompt: Any, arguments: Mapping[str, Any]) -> str:
        reply = self.replies[0] if len(self.replies) == 1 else self.replies.pop(0)
        return reply if isinstance(reply, str) else reply(prompt)

    def _pieces(self, prompt: Any, text: str, tools: Any) -> Iterator[StreamChunk]:
        try:
            for start in range(0, len(text), self.cut):
                yield StreamChunk(text[start : start + self.cut], (7,))
            usage = Usage(len(self.encode(prompt, tools=tools)), len(text), cached_tokens=1)
            statistics = DecodingStatistics(rounds=1, target_forwards=2, completion_tokens=len(text))
            yield StreamChunk("", (), GenerationResult(text, (7,) * len(text), self.end, usage, statistics))  # type: ignore[arg-type]
        finally:
            self.closed.set()


class Reader(Speaker):
    """Does what it is asked as a good model would, going by the words of the last message and by schemas alone: calls a
    tool where there is one, keeps to grammars, and puts results of tools into words."""

    def reply(self, prompt: Any, arguments: Mapping[str, Any]) -> str:
        last = prompt[-1]
        asked = str(next((one["content"] for one in reversed(prompt) if one["role"] == "user"), ""))
        if (grammar := arguments["options"].grammar) is not None:
            return _kept_to(grammar, asked)
        if not arguments["tools"] or last["role"] == "tool":
            return f"As for {last['content']!r:.40}: so it is."
        function = arguments["tools"][0]["function"]
        return call(function["name"], json.dumps(_instance(function["parameters"], asked), ensure_ascii=False))


def _kept_to(grammar: Grammar, asked: str) -> str:
    if grammar.kind == "any_of":
        return grammar.before + _kept_to(grammar.parts[0], asked) + grammar.after
    instance = _instance(json.loads(grammar.source), asked)
    return grammar.before + json.dumps(instance, ensure_ascii=False) + grammar.after


def _instance(schema: Any, asked: str, root: Any = None) -> Any:
    """A value of a schema, with the numbers and the foreign words of a text."""
    root = schema if root is None else root
    if "$ref" in schema:
        return _instance(root["$defs"][schema["$ref"].rpartition("/")[2]], asked, root)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return _instance(schema[several][0], asked, root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    kind = schema.get("type", "object")
    if kind == "object":
        named = schema.get("properties") or {key: {"type": "string"} for key in re.findall(r"['`\"](\w+)['`\"]", asked)}
        return {name: _instance(inner, asked, root) for name, inner in named.items()}
    if kind == "array":
        return [_instance(schema.get("items", {"type": "string"}), asked, root)]
    if kind in ("integer", "number"):
        return int(next(iter(re.findall(r"\d+", asked)), "1"))
    return {"boolean": True, "null": None}.get(kind, max([*re.findall(r"[^\x00-\x7f]+", asked), "words"], key=len))


def scopes(speaker: Speaker) -> Sequence[tuple[str | None, tuple[str, ...], tuple[str, ...]]]:
    """Scope, scopes read and scopes written to, per call."""
    return [(one["scope"], tuple(one["read_scopes"]), tuple(one["write_scopes"])) for one in speaker.calls]
