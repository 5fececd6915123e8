"""Response templates, by which tokenizers describe replies themselves, and calls in chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_replies import QUERY, SQL, TOOLS, deltas_of, pieces_of, tokenizer_with
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ouroboros_llm.chat.template_support import arguments_form, template_tool_calls
from ouroboros_llm.environment import cache_folder
from ouroboros_llm.models import loading as models
from ouroboros_llm.tool_parsers import InvalidToolCall, Reply, ReplyFormat, ToolCall, format_of, reply_of
from ouroboros_llm.tool_parsers.call_ids import call_id

pytest.importorskip("transformers.utils.chat_parsing")

REASONING = {"open": "<think>", "close": "</think>", "content": "text"}
CONTENT = {"close_pattern": r"\s*<\|im_end\|>", "content": "text"}
JSON_CALLS: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": REASONING,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": CONTENT,
    },
}
TAGGED_CALLS: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": REASONING,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": CONTENT,
    },
}
LAX_CALLS: dict[str, Any] = {
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<turn|>", "<eos>"], "content": "text"},
    },
}
TEMPLATES = {"json": JSON_CALLS, "tagged": TAGGED_CALLS, "lax": LAX_CALLS}
_JSON = '{"name": "sql", "arguments": {"query": "SELECT 1", "limit": 5}}'
_TAGGED = (
    "<tool_call>\n<function=sql>\n<parameter=query>\nSELECT 1\n</parameter>\n<parameter=limit>\n5\n</parameter>\n"
    "</function>\n</tool_call>"
)
_LAX = '<|tool_call>call:sql{query:<|"|>SELECT 1<|"|>,limit:5}<tool_call|>'
WELL_FORMED = [
    ("json", "Paris."),
    ("json", f"<tool_call>\n{_JSON}\n</tool_call>"),
    (
        "json",
        f"<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{_JSON}\n</tool_call>\n<tool_call>\n{_JSON}\n</tool_call>",
    ),
    ("tagged", _TAGGED),
    ("tagged", f"<think>\nHm.\n</think>\n\nI look.\n\n{_TAGGED}\n{_TAGGED}"),
    ("lax", _LAX),
    ("lax", f"<|channel>thought\nHm.<channel|>{_LAX}"),
]


def describing(template: dict[str, Any]) -> ReplyFormat:
    return ReplyFormat(response_template=template)


@pytest.mark.parametrize("name, text", WELL_FORMED)
def test_well_formed_replies_are_read_as_transformers_reads_them(name: str, text: str) -> None:
    expected = byte_tokenizer().parse_response(text, TEMPLATES[name], prefix="", tools=[SQL])
    reply = describing(TEMPLATES[name]).parse(text, TOOLS)
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    assert calls == [call["function"] for call in expected.get("tool_calls", [])]
    assert reply.content.strip() == expected.get("content", "")
    assert reply.reasoning == (expected.get("reasoning_content") or expected.get("thinking") or "")
    assert reply.invalid_tool_calls == ()


@pytest.mark.parametrize("name, text", WELL_FORMED)
@given(cuts=st.lists(st.integers(0, 300), max_size=30))
def test_pieces_add_up_to_the_whole(name: str, text: str, cuts: list[int]) -> None:
    format = describing(TEMPLATES[name])
    whole = format.parse(text, TOOLS)
    assert reply_of(deltas_of(format, pieces_of(text, cuts))) == whole
    assert reply_of(deltas_of(format, list(text))) == whole


FRAGMENTS = ["alpha", "beta ", " ", "\n", '"', "{", "}", "<", _JSON, '{"name": "sql", ', '"arguments": {}}', "<tool_ca"]
MARKERS = {
    "json": ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>"],
    "tagged": [
        "<think>",
        "</think>",
        "<tool_call>",
        "<function=sql>",
        "<parameter=query>",
        "</parameter>",
        "</function>",
    ]
    + ["</tool_call>", "<|im_end|>"],
    "lax": ["<|channel>thought\n", "<channel|>", "<|tool_call>", "call:sql", "<tool_call|>", '<|"|>', "<turn|>"],
}


@given(st.sampled_from(sorted(TEMPLATES)), st.data())
def test_no_text_raises_or_depends_on_how_it_is_cut(name: str, data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from([*MARKERS[name], *FRAGMENTS]), max_size=14))
    text, format = "".join(parts), describing(TEMPLATES[name])
    whole = format.parse(text, TOOLS)
    cuts = data.draw(st.lists(st.integers(0, 200), max_size=20))
    assert reply_of(deltas_of(format, pieces_of(text, cuts))) == whole
    assert reply_of(deltas_of(format, list(text))) == whole
    calls = [str(call.arguments) for call in (*whole.tool_calls, *whole.invalid_tool_calls)]
    shown = "".join([whole.content, whole.reasoning, *calls])
    if name != "tagged":  # whose pattern skips what stands between parameters
        assert shown.count("alpha") == text.count("alpha")


@pytest.mark.parametrize(
    "name, text, expected",
    [
        (
            "json",
            '<tool_call>{"name": "sql", "argu',
            InvalidToolCall(None, '{"name": "sql", "argu', "", call_id("", 0)),
        ),
        ("json", "<tool_call>[1]</tool_call>", InvalidToolCall(None, "[1]", "", call_id("", 0))),
        ("json", '<tool_call>{"name": 5}</tool_call>', InvalidToolCall(None, '{"name": 5}', "", call_id("", 0))),
        ("tagged", _TAGGED[:48], InvalidToolCall("sql", "<parameter=query>\nSEL", "", call_id("", 0))),
        ("lax", '<|tool_call>call:sql{query:<|"|>SEL', InvalidToolCall("sql", '{query:<|"|>SEL', "", call_id("", 0))),
    ],
)
def test_calls_that_cannot_be_made_keep_their_text(name: str, text: str, expected: InvalidToolCall) -> None:
    reply = describing(TEMPLATES[name]).parse(f"Now. {text}", TOOLS)
    (call,) = reply.invalid_tool_calls
    assert (call.name, call.arguments, call.id) == (expected.name, expected.arguments, expected.id)
    assert call.error and reply.content == "Now." and not reply.tool_calls


def test_what_is_said_before_a_call_is_not_overwritten_by_what_is_said_after() -> None:
    reply = describing(JSON_CALLS).parse(f"Before.\n<tool_call>{_JSON}</tool_call>\nAfter.", TOOLS)
    assert reply == Reply("Before.\nAfter.", tool_calls=(QUERY,))
    assert describing(JSON_CALLS).parse("Paris.<|im_end|>\n", TOOLS) == Reply("Paris.")


def test_the_prompt_may_have_begun_the_reply() -> None:
    format = describing(JSON_CALLS)
    prompt = "<|im_start|>user\n<think></think><|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert format.parse("a\n</think>\n\nb", TOOLS, prompt=prompt) == Reply("b", "a")
    assert format.parse("b", TOOLS, prompt=prompt + "\n</think>\n\n") == Reply("b")
    assert format.parse("b", TOOLS, prompt="no anchor <think>") == Reply("b")


def test_without_tools_there_are_no_calls() -> None:
    text = f"<tool_call>{_JSON}</tool_call>"
    assert describing(JSON_CALLS).parse(text) == Reply(text)


def test_ids_are_new() -> None:
    stream = describing(JSON_CALLS).stream(TOOLS, ids=[call_id("", 0)])
    reply = reply_of([*stream.push(f"<tool_call>{_JSON}</tool_call>"), *stream.end()])
    assert [call.id for call in reply.tool_calls] == [call_id("", 1)]


def test_a_tokenizer_with_a_template_is_read_by_it() -> None:
    special = ("<|tool_call>", "<tool_call|>", '<|"|>', "<other>")
    tokenizer = tokenizer_with("{{ tools }}", special)
    tokenizer.response_template = LAX_CALLS
    try:
        format = format_of(tokenizer)
        assert format.parse(_LAX, TOOLS) == Reply(tool_calls=(QUERY,))
        assert set(format.kept_tokens.values()) == set(special[:3])
        tokenizer.response_template = {"fields": {}}
        assert format_of(tokenizer) == ReplyFormat()
    finally:
        tokenizer.response_template = None


OBJECT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}\n{% endfor %}'
)
TEXT = OBJECT.replace(" | tojson", "")
EITHER = OBJECT.replace(
    "{{ c.function.arguments | tojson }}",
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
)
CONCATENATED = (
    "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, form",
    [
        (OBJECT, "object"),
        (TEXT, "text"),
        (EITHER, "object"),
        (CONCATENATED, "text"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_form_of_arguments_is_found_out(template: str | None, form: str | None) -> None:
    tokenizer = tokenizer_with("form")
    tokenizer.chat_template = template
    assert arguments_form(tokenizer) == form


def test_calls_for_a_chat_template() -> None:
    calls = [ToolCall("sql", {"a": "é"}, "x"), InvalidToolCall("sql", '{"a": ', "cut off", "y")]
    as_objects, as_text = template_tool_calls(calls, "object"), template_tool_calls(calls, "text")
    assert as_objects[0] == {"id": "x", "type": "function", "function": {"name": "sql", "arguments": {"a": "é"}}}
    assert as_text[0]["function"]["arguments"] == '{"a": "é"}'
    assert as_objects[1]["function"]["arguments"] == as_text[1]["function"]["arguments"] == '{"a": '
    broken_late = InvalidToolCall("sql", '{"a": 1}', "cut off", "y")
    assert template_tool_calls([broken_late], "object")[0]["function"]["arguments"] == {"a": 1}


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"query": 'say "hi" \\ to\nÜnï 😀 </tool_call>', "limit": 5},
    {"deep": [{"a": [None, True, -1.5e-3]}, {}], "": ""},
]


def round_trip(tokenizer: PreTrainedTokenizerBase, calls: Sequence[ToolCall], content: str) -> Reply:
    """What the format reads in what the chat template writes."""
    asked = [{"role": "user", "content": "question"}]
    entries = template_tool_calls(calls, arguments_form(tokenizer))
    said = [*asked, {"role": "assistant", "content": content, "tool_calls": entries}]
    prompt = str(tokenizer.apply_chat_template(asked, tools=TOOLS, tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(said, tools=TOOLS, tokenize=False))
    assert whole.startswith(prompt.rstrip())
    text = whole[len(prompt.rstrip()) :].removesuffix("\n").removesuffix(tokenizer.eos_token)
    format = format_of(tokenizer)
    whole_reply = format.parse(text.lstrip("\n"), TOOLS, prompt=prompt)
    assert reply_of(deltas_of(format, list(text.lstrip("\n")), prompt=prompt)) == whole_reply
    return whole_reply


@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"])
@pytest.mark.parametrize("content", ["", "I look it up."])
def test_what_a_packaged_template_writes_is_read(name: str, content: str) -> None:
    folder = cache_folder() / name
    if not folder.exists():
        pytest.skip(f"{name} is not in the cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert arguments_form(tokenizer) == "object"
    calls = tuple(ToolCall("sql", arguments, call_id("", n)) for n, arguments in enumerate(ARGUMENTS))
    assert round_trip(tokenizer, calls, content) == Reply(content, tool_calls=calls)


@pytest.mark.real_model
def test_a_packaged_template_without_tools() -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("smollm2-135m-instruct"))
    assert arguments_form(tokenizer) is None
    assert format_of(tokenizer) == ReplyFormat()
    assert round_trip(tokenizer, [QUERY], "Hello.") == Reply("Hello.")
