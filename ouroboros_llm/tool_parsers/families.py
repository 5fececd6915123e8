"""Tool-call and reasoning markup per model family."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from .reply_format import ReplyFormat
from .response_template import is_usable
from .section import Section


@dataclass(frozen=True)
class Family:
    """A format that is told by what the chat template writes, or by special tokens if the template takes tools."""

    format: ReplyFormat
    template: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()


_TAG_FRAME = ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
_TAG = Section("calls", "<tool_call>", ("</tool_call>",), "tagged")
_FUNCTION_TAG = Section("calls", "<function=", ("</function>",), "tagged", inclusive=True)
_HARMONY = Section("header", "<|channel|>", ("<|message|>",), inner=("<|constrain|>",))
_DEEPSEEK_HEAD = re.compile(
    r"\s*(?:function<｜tool▁sep｜>)?\s*(?P<name>[^\s<`]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*"
)
_MISTRAL_HEAD = re.compile(r"\s*(?P<name>[\w.:/-]+)\s*(?:\[CALL_ID\]\s*(?P<id>\w+))?\s*(?:\[ARGS\])?\s*")
_KIMI_HEAD = re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[^\s:<]+):\d+)\s*<\|tool_call_argument_begin\|>\s*")


def _marks(*markers: str) -> tuple[Section, ...]:
    return tuple(Section("mark", marker) for marker in markers)


def _calls(open: str, *closes: str, **attributes: Any) -> Section:
    return Section("calls", open, closes, **attributes)


FAMILIES = (
    Family(  # GPT-OSS
        ReplyFormat(
            (_HARMONY, Section("header", "<|start|>", ("<|message|>",)), *_marks("<|end|>", "<|return|>", "<|call|>")),
            frame=("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "<|call|>"),
        ),
        template=("<|channel|>",),
    ),
    Family(  # DeepSeek V3, R1, V3.1
        ReplyFormat(
            (
                _calls(
                    "<｜tool▁call▁begin｜>",
                    "<｜tool▁call▁end｜>",
                    style="headed",
                    head=_DEEPSEEK_HEAD,
                    inner=("<｜tool▁sep｜>",),
                ),
                *_marks("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            ),
            frame=(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
                "<｜tool▁sep｜>",
                "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            ),
        ),
        template=("<｜tool▁call▁begin｜>",),
    ),
    Family(  # Kimi K2
        ReplyFormat(
            (
                _calls(
                    "<|tool_call_begin|>",
                    "<|tool_call_end|>",
                    style="headed",
                    head=_KIMI_HEAD,
                    inner=("<|tool_call_argument_begin|>",),
                ),
                *_marks("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            ),
            frame=("<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
        template=("<|tool_call_begin|>",),
        vocabulary=("<|tool_call_begin|>",),
    ),
    Family(  # Mistral: a list of objects, since 2025 name and arguments
        ReplyFormat(
            (
                _calls("[TOOL_CALLS]", style="headed", head=_MISTRAL_HEAD, own_ids=True, inner=("[ARGS]", "[CALL_ID]")),
                Section("reasoning", "[THINK]", ("[/THINK]",)),
            ),
            frame=('[TOOL_CALLS][{"name": "', '", "arguments": ', "}]"),
        ),
        template=("[TOOL_CALLS]",),
    ),
    Family(  # Gemma 4
        ReplyFormat(
            (
                _calls("<|tool_call>", "<tool_call|>", style="gemma", inner=('<|"|>',)),
                Section("reasoning", "<|channel>thought", ("<channel|>",), inner=("<|channel>",)),
            ),
            frame=('<|tool_call>{"name": "', '", "arguments": ', "}<tool_call|>"),
        ),
        template=("<|tool_call>",),
    ),
    Family(  # LFM2
        ReplyFormat(
            (_calls("<|tool_call_start|>", "<|tool_call_end|>", style="python"),),
            frame=('<|tool_call_start|>[{"name": "', '", "arguments": ', "}]<|tool_call_end|>"),
        ),
        template=("<|tool_call_start|>", "<|tool_list_start|>"),
    ),
    Family(  # Command R7B, Command A
        ReplyFormat(
            (
                _calls("<|START_ACTION|>", "<|END_ACTION|>"),
                Section("reasoning", "<|START_THINKING|>", ("<|END_THINKING|>",)),
                *_marks("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
            ),
            frame=('<|START_ACTION|>[{"tool_name": "', '", "parameters": ', "}]<|END_ACTION|>"),
        ),
        template=("<|START_ACTION|>",),
    ),
    Family(  # Phi-4-mini
        ReplyFormat(
            (_calls("<|tool_call|>", "<|/tool_call|>"),),
            frame=('<|tool_call|>{"name": "', '", "arguments": ', "}<|/tool_call|>"),
        ),
        template=("<|/tool_call|>", "<|/tool|>"),
    ),
    Family(  # Granite 3
        ReplyFormat((_calls("<|tool_call|>"),), frame=('<|tool_call|>[{"name": "', '", "arguments": ', "}]")),
        template=("<|tool_call|>",),
        vocabulary=("<|tool_call|>",),
    ),
    Family(  # Qwen3-Coder, Qwen3.5
        ReplyFormat((_TAG, _FUNCTION_TAG), bare=True, frame=_TAG_FRAME),
        template=("<function=",),
    ),
    Family(  # Hermes, Qwen2.5, Qwen3, SmolLM3, Granite 4, GLM-4.5
        ReplyFormat((_TAG,), bare=True, frame=_TAG_FRAME),
        template=("<tool_call>",),
    ),
    Family(  # Nemotron
        ReplyFormat(
            (_calls("<TOOLCALL>", "</TOOLCALL>"),), frame=('<TOOLCALL>[{"name": "', '", "arguments": ', "}]</TOOLCALL>")
        ),
        template=("<TOOLCALL>",),
    ),
    Family(  # Jamba
        ReplyFormat(
            (_calls("<tool_calls>", "</tool_calls>"),),
            frame=('<tool_calls>[{"name": "', '", "arguments": ', "}]</tool_calls>"),
        ),
        template=("<tool_calls>",),
    ),
    Family(  # Llama 3.1 and later
        ReplyFormat(
            (_calls("<|python_tag|>", style="python"),), bare=True, frame=('{"name": "', '", "parameters": ', "}")
        ),
        template=("<|python_tag|>",),
        vocabulary=("<|python_tag|>",),
    ),
    Family(  # Gemma 2 and 3, which were told of tools in words
        ReplyFormat((_calls("```tool_code", "```", style="python"),), bare=True), template=("<start_of_turn>",)
    ),
)

_THINKING = (Section("reasoning", "<think>", ("</think>",)),)


def format_of(tokenizer: PreTrainedTokenizerBase) -> ReplyFormat:
    """How the model behind a tokenizer writes its replies.

    By the tokenizer's response template where it has one, else by the markup in its chat template. A tokenizer without
    any markup gets a format that leaves replies as they are.
    """
    template = getattr(tokenizer, "response_template", None)
    if template and is_usable(template):
        return _kept(ReplyFormat(response_template=template), tokenizer, json.dumps(template, ensure_ascii=False))
    chat, vocabulary = _chat_template(tokenizer), tokenizer.get_vocab()
    found = ReplyFormat()
    for family in FAMILIES:
        takes_tools = "tools" in chat and any(token in vocabulary for token in family.vocabulary)
        if takes_tools or any(marker in chat for marker in family.template):
            found = family.format
            break
    thinks = "</think>" in chat or "</think>" in vocabulary
    sections = found.sections + (_THINKING if thinks else ())
    markers = "\n".join(marker for section in sections for marker in section.markers)
    return _kept(replace(found, sections=sections), tokenizer, markers)


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def _kept(format: ReplyFormat, tokenizer: PreTrainedTokenizerBase, markup: str) -> ReplyFormat:
    """The format with the special tokens that stand in its markup."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    # A pattern in a response template may escape them.
    texts = (markup, re.sub(r"\\+", "", markup))
    kept = {
        number: token.content
        for number, token in added.items()
        if token.special and any(token.content in text for text in texts)
    }
    return replace(format, kept_tokens=kept)
