"""Replies in the markup of every family, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from conftest import byte_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ouroboros_llm.chat.text import Transcript
from ouroboros_llm.tool_parsers import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    ContentDelta,
    Delta,
    InvalidToolCall,
    Reply,
    ReplyFormat,
    ToolCall,
    format_of,
    reply_of,
    spoiled,
)
from ouroboros_llm.tool_parsers.call_ids import call_id
from ouroboros_llm.tool_parsers.section import first_marker

SQL = {
    "type": "function",
    "function": {
        "name": "sql",
        "description": "Runs a query.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "limit": {"type": "integer"},
                "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                "tags": {"type": "array", "items": {"type": "string"}},
                "share": {"type": "number"},
            },
        },
    },
}
NOW = {"name": "now"}
TOOLS: list[dict[str, Any]] = [SQL, NOW]
QUERY = ToolCall("sql", {"query": "SELECT 1", "limit": 5}, call_id("", 0))
HERMES = "{% if tools %}<tools>...{% endif %}<tool_call>{...}</tool_call>"


@cache
def tokenizer_with(template: str, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> Any:
    """One token per byte, and those of a family beside them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str()),
        additional_special_tokens=list(special),
    )
    tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    return tokenizer


@cache
def hermes(thinks: bool = False) -> ReplyFormat:
    return format_of(tokenizer_with(HERMES + "<think></think>" * thinks))


FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "hermes": (HERMES, ()),
    "qwen3": (HERMES + "<think>\n\n</think>", ()),
    "qwen3_coder": (HERMES + "<function=name><parameter=x>", ()),
    "llama3": ("{% if tools %}{% endif %}", ("<|python_tag|>",)),
    "mistral": ("tools [TOOL_CALLS]", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
    "deepseek": (
        "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' split('</think>')",
        (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
        ),
    ),
    "kimi": (
        "{{ tools }}",
        (
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
    ),
    "granite": ("{{ tools }}<|tool_call|>", ("<|tool_call|>",)),
    "phi4": ("{{ tools }}<|tool|><|/tool|><|tool_call|>", ()),
    "lfm2": ("<|tool_list_start|>", ("<|tool_call_start|>", "<|tool_call_end|>")),
    "gemma3": ("<start_of_turn>", ()),
    "gemma4": ("<|tool_call>", ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")),
    "command_r": ("<|START_ACTION|>", ("<|START_ACTION|>", "<|END_ACTION|>", "<|START_THINKING|>", "<|END_THINKING|>")),
    "nemotron": ("<TOOLCALL>", ()),
    "jamba": ("<tool_calls>", ()),
    "harmony": (
        "<|channel|>analysis<|message|>",
        ("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>"),
    ),
}
_JSON = '{"name": "sql", "arguments": {"query": "SELECT 1", "limit": 5}}'
_TWO = (QUERY, ToolCall("now", {}, call_id("", 1)))
EXAMPLES: list[tuple[str, str, Reply]] = [
    ("hermes", f"<tool_call>\n{_JSON}\n</tool_call>", Reply(tool_calls=(QUERY,))),
    (
        "hermes",
        f'I look.\n<tool_call>\n{_JSON}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
        Reply("I look.", tool_calls=_TWO),
    ),
    (
        "qwen3",
        f"<think>\nA query, then.\n</think>\n\n<tool_call>\n{_JSON}\n</tool_call>",
        Reply(reasoning="A query, then.", tool_calls=(QUERY,)),
    ),
    ("qwen3", "<think>\nEasy.\n</think>\n\nParis.\n", Reply("Paris.\n", "Easy.")),
    ("qwen3", "<think>\nI was cut", Reply(reasoning="I was cut")),
    ("qwen3", "It begins with <think> or so.\nYes.", Reply("It begins with <think> or so.\nYes.")),
    ("qwen3", "<think>a</think>\nOne.\n<think>b</think>\nTwo.", Reply("One.\n\nTwo.", "ab")),
    (
        "qwen3_coder",
        "<tool_call>\n<function=sql>\n<parameter=query>\nSELECT 1\n</parameter>\n<parameter=limit>\n5\n</parameter>\n"
        "</function>\n</tool_call>",
        Reply(tool_calls=(QUERY,)),
    ),
    (
        "qwen3_coder",
        "Now.\n<function=sql>\n<parameter=query>\nif a < b:\n    </tool_call>\n</parameter>\n</function>\n</tool_call>",
        Reply("Now.", tool_calls=(ToolCall("sql", {"query": "if a < b:\n    </tool_call>"}, call_id("", 0)),)),
    ),
    (
        "qwen3_coder",
        "<tool_call><function=sql><parameter=strict>True</parameter><parameter=tags>['a']</parameter>"
        '<parameter=limit>["a"]</parameter><parameter=share>3</parameter><parameter=other>1</parameter></function>'
        "</tool_call>",
        Reply(
            tool_calls=(
                ToolCall(
                    "sql", {"strict": True, "tags": "['a']", "limit": '["a"]', "share": 3, "other": "1"}, call_id("", 0)
                ),
            )
        ),
    ),
    (
        "hermes",  # GLM-4.5
        "<tool_call>sql\n<arg_key>query</arg_key>\n<arg_value>SELECT 1</arg_value>\n<arg_key>limit</arg_key>\n"
        "<arg_value>5</arg_value>\n</tool_call>",
        Reply(tool_calls=(QUERY,)),
    ),
    ("hermes", "<tool_call>now</tool_call>", Reply(tool_calls=(ToolCall("now", {}, call_id("", 0)),))),
    ("llama3", f"<|python_tag|>{_JSON.replace('arguments', 'parameters')}", Reply(tool_calls=(QUERY,))),
    ("llama3", _JSON.replace("arguments", "parameters"), Reply(tool_calls=(QUERY,))),
    ("llama3", f'<|python_tag|>{_JSON}; {{"name": "now", "parameters": {{}}}}', Reply(tool_calls=_TWO)),
    ("llama3", '<|python_tag|>sql.call(query="SELECT 1", limit=5)', Reply(tool_calls=(QUERY,))),
    ("mistral", f"[TOOL_CALLS] [{_JSON}]", Reply(tool_calls=(QUERY,))),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "Ab3dE6gH9"}, {"name": "now", "arguments": {}}]',
        Reply(tool_calls=(ToolCall("now", {}, "Ab3dE6gH9"), ToolCall("now", {}, call_id("", 0)))),
    ),
    ("mistral", '[TOOL_CALLS]sql[ARGS]{"query": "SELECT 1", "limit": 5}[TOOL_CALLS]now{}', Reply(tool_calls=_TWO)),
    (
        "mistral",
        'Yes. [TOOL_CALLS]now[CALL_ID]Ab3dE6gH9[ARGS]{"name": "x"}',
        Reply("Yes.", tool_calls=(ToolCall("now", {"name": "x"}, "Ab3dE6gH9"),)),
    ),
    (
        "deepseek",
        "<think>Hm.</think>Right.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>sql\n```json\n"
        '{"query": "SELECT 1", "limit": 5}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>'
        "function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Reply("Right.", "Hm.", _TWO),
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>sql<｜tool▁sep｜>"
        '{"query": "SELECT 1", "limit": 5}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Reply(tool_calls=_TWO),
    ),
    (
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:3<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        Reply(tool_calls=(ToolCall("now", {}, "functions.now:3"),)),
    ),
    ("granite", f'<|tool_call|>[{_JSON}, {{"name": "now", "arguments": {{}}}}]', Reply(tool_calls=_TWO)),
    ("phi4", f"<|tool_call|>{_JSON}<|/tool_call|>", Reply(tool_calls=(QUERY,))),
    (
        "lfm2",
        '<|tool_call_start|>[sql(query="SELECT 1", limit=5), now()]<|tool_call_end|>Looking.',
        Reply("Looking.", tool_calls=_TWO),
    ),
    ("lfm2", f"<|tool_call_start|>[{_JSON}]<|tool_call_end|>", Reply(tool_calls=(QUERY,))),
    ("gemma3", '```tool_code\nprint(sql("SELECT 1", limit=5))\n```', Reply(tool_calls=(QUERY,))),
    ("gemma3", f"```json\n{_JSON}\n```", Reply(tool_calls=(QUERY,))),
    (
        "gemma4",
        "<|channel>thought\nHm.<channel|>"
        '<|tool_call>call:sql{limit:5,query:<|"|>SELECT a:1, "b" {c:2}<|"|>}<tool_call|>',
        Reply("", "Hm.", (ToolCall("sql", {"limit": 5, "query": 'SELECT a:1, "b" {c:2}'}, call_id("", 0)),)),
    ),
    (
        "command_r",
        '<|START_THINKING|>Hm.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "now", '
        '"parameters": {}}\n]<|END_ACTION|>',
        Reply("", "Hm.", (ToolCall("now", {}, "0"),)),
    ),
    ("nemotron", f"<TOOLCALL>[{_JSON}]</TOOLCALL>", Reply(tool_calls=(QUERY,))),
    ("jamba", f"<tool_calls>[\n    {_JSON}\n]</tool_calls>", Reply(tool_calls=(QUERY,))),
    (
        "harmony",
        "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.sql <|constrain|>json<|message|>"
        '{"query": "SELECT 1", "limit": 5}',
        Reply("I look.", "They ask.", (QUERY,)),
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Paris.",
        Reply("Paris.", "Hm."),
    ),
]


@pytest.mark.parametrize("family, text, expected", EXAMPLES)
def test_every_family_is_read(family: str, text: str, expected: Reply) -> None:
    format = format_of(tokenizer_with(*FAMILIES[family]))
    assert format.parse(text, TOOLS) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_format_renders_it_reads(family: str) -> None:
    format = format_of(tokenizer_with(*FAMILIES[family]))
    calls = [ToolCall("sql", {"query": 'a "b" \\ ü 😀\n', "deep": {"list": [1, None, [True]]}}, "")]
    read = format.parse(format.render(calls), TOOLS)
    assert [(call.name, call.arguments) for call in read.tool_calls] == [("sql", calls[0].arguments)]
    assert (read.content, read.reasoning, read.invalid_tool_calls) == ("", "", ())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_marker_begins_another(family: str) -> None:
    """Else the shorter one would be taken before the longer one has come."""
    format = format_of(tokenizer_with(*FAMILIES[family]))
    begins = [section.open for section in format.sections]
    assert not [(a, b) for a in begins for b in begins if a != b and a.startswith(b)]
    for section in format.sections:
        assert not [(a, b) for a in section.closes for b in section.closes if a != b and a.startswith(b)]


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    places = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    return [text[start:end] for start, end in zip(places, places[1:], strict=False)]


def deltas_of(
    format: ReplyFormat, pieces: Sequence[str], tools: Sequence[Any] | None = TOOLS, prompt: str = ""
) -> list[Delta]:
    stream = format.stream(tools, prompt=prompt)
    return [delta for piece in pieces for delta in stream.push(piece)] + stream.end()


@pytest.mark.parametrize("family, text, expected", EXAMPLES)
@given(cuts=st.lists(st.integers(0, 400), max_size=40))
@example(cuts=list(range(400)))
def test_pieces_add_up_to_the_whole(family: str, text: str, expected: Reply, cuts: list[int]) -> None:
    format = format_of(tokenizer_with(*FAMILIES[family]))
    assert reply_of(deltas_of(format, pieces_of(text, cuts))) == expected


def test_a_long_argument_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However finely it is cut."""
    searched = 0

    def counted(text: str, markers: Any, start: int = 0) -> Any:
        nonlocal searched
        searched += len(text) - start
        return first_marker(text, markers, start)

    monkeypatch.setattr("ouroboros_llm.tool_parsers.call_section.first_marker", counted)
    query = "SELECT </tool_cal> " * 1000
    text = f'<tool_call>{{"name": "sql", "arguments": {{"query": "{query}"}}}}</tool_call>'
    reply = reply_of(deltas_of(hermes(), [text[place : place + 5] for place in range(0, len(text), 5)]))
    assert reply == Reply("", tool_calls=(ToolCall("sql", {"query": query}, call_id("", 0)),))
    assert searched < 10 * len(text)


FRAGMENTS = [
    *["alpha", "beta", "gamma ", " ", "\n", '"', "\\", "{", "}", "[", "]", ",", "é😀", "<", "0"],
    *['{"name": "sql", "arguments": ', '{"query": "alpha ', '{"query": "beta"}', '{"name": "now"', "```json\n", "```"],
    *['"arguments": {', '"limit": 5', '"}', "}}", _JSON, '{"arguments": "x", "name": "now"}', 'sql(query="alpha")'],
]


@st.composite
def scrambled(draw: st.DrawFn) -> tuple[str, str, list[int]]:
    """A family, text made of its markers and of parts of calls in any order, and where to cut it."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    sections = format_of(tokenizer_with(*FAMILIES[family])).sections
    markers = [marker for section in sections for marker in (*section.markers, section.open[:-1])]
    if family == "qwen3_coder":
        markers += ["<function=sql>", "<parameter=query>", "</parameter>"]
    text = "".join(draw(st.lists(st.sampled_from([*markers, *FRAGMENTS]), max_size=14)))
    return family, text, draw(st.lists(st.integers(0, 300), max_size=30))


@given(scrambled())
def test_no_text_raises_or_depends_on_how_it_is_cut(case: tuple[str, str, list[int]]) -> None:
    family, text, cuts = case
    format = format_of(tokenizer_with(*FAMILIES[family]))
    whole = format.parse(text, TOOLS)
    assert reply_of(deltas_of(format, pieces_of(text, cuts))) == whole
    assert reply_of(deltas_of(format, list(text))) == whole


@given(scrambled())
def test_no_word_is_lost(case: tuple[str, str, list[int]]) -> None:
    family, text, _ = case
    reply = format_of(tokenizer_with(*FAMILIES[family])).parse(text, TOOLS)
    calls = [call.name + json.dumps(call.arguments, ensure_ascii=False) + call.id for call in reply.tool_calls]
    invalid = [f"{call.name}{call.arguments}{call.id}" for call in reply.invalid_tool_calls]
    shown = "".join([reply.content, reply.reasoning, *calls, *invalid])
    for word in ("alpha", "beta", "gamma", "😀"):
        assert shown.count(word) >= text.count(word)


@given(st.text(max_size=80), st.lists(st.integers(0, 80), max_size=10))
@pytest.mark.parametrize("thinks", [False, True])
def test_text_without_markers_is_content(thinks: bool, text: str, cuts: list[int]) -> None:
    assert reply_of(deltas_of(hermes(thinks), pieces_of(text, cuts))) == Reply(text)


INVALID = [
    ('<tool_call>\n{"name": "sql", "arguments": {"query": "SEL', "sql", '{"query": "SEL'),
    ('<tool_call>{"name": "sql", "arguments": {"query": "a"}', "sql", '{"query": "a"}'),
    ('<tool_call>{"name": "sql", "arguments": {"query": "a"}</tool_call>', "sql", '{"query": "a"}'),
    ('<tool_call>{"name": "sql", "arg', "sql", '{"name": "sql", "arg'),
    ('<tool_call>{"na', None, '{"na'),
    ("<tool_call>", None, ""),
    ("<tool_call>\n</tool_call>", None, ""),
    ("<tool_call>sorry</tool_call>", None, "sorry"),
    ('<tool_call>{"name": "sql", "arguments": {"query": "say "hi""}}</tool_call>', "sql", '{"query": "say "hi""}}'),
    ("<tool_call>{'name': 'sql', 'arguments': {}}</tool_call>", None, "{'name': 'sql', 'arguments': {}}"),
    ('<tool_call>{"name": "sql", "arguments": [1, 2]}</tool_call>', "sql", "[1, 2]"),
    ('<tool_call>{"name": "sql", "arguments": "no JSON"}</tool_call>', "sql", "no JSON"),
    ('<tool_call>{"name": "sql", "arguments": {"limit": 05}}</tool_call>', "sql", '{"limit": 05}}'),
    ('<tool_call>{"name": "sql", "arguments": {"limit": NaN}}</tool_call>', "sql", '{"limit": NaN}}'),
    ('<tool_call>{"name": "sql", "arguments": {"limit": 1e999}}</tool_call>', "sql", '{"limit": 1e999}'),
    ('<tool_call>{"name": "sql", "arguments": {"query": "\\ud800"}}</tool_call>', "sql", '{"query": "\\ud800"}'),
    ('<tool_call>{"name": "sql", "arguments": {"query": "\\d"}}</tool_call>', "sql", '{"query": "\\d"}}'),
    ('<tool_call>{"name": "", "arguments": {}}</tool_call>', None, '{"name": "", "arguments": {}}'),
    ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, '{"name": 5, "arguments": {}}'),
    ('<tool_call>{"arguments": {"query": "a"}}</tool_call>', None, '{"arguments": {"query": "a"}}'),
    ('<tool_call>{"name": "sql", "arguments": {"a": 1}, "arguments": {"a": 2}}</tool_call>', "sql", None),
    ('<tool_call>{"name": "sql", "name": "now", "arguments": {}}</tool_call>', "sql", None),
    ("<tool_call><function=sql><parameter=query>a</function></tool_call>", None, None),
]


@pytest.mark.parametrize("text, name, arguments", INVALID)
def test_calls_that_cannot_be_made_keep_their_text(text: str, name: str | None, arguments: str | None) -> None:
    for pieces in ([text], list(text)):
        reply = reply_of(deltas_of(hermes(), pieces))
        assert (reply.content, reply.tool_calls) == ("", ())
        (call,) = reply.invalid_tool_calls
        assert call.name == name and call.error and call.id == call_id("", 0)
        assert call.arguments == (call.arguments if arguments is None else arguments)
        assert call.arguments in text


VALID: list[tuple[str, dict[str, Any]]] = [
    ('{"name": "sql", "arguments": {}}', {}),
    ('{"name": "sql"}', {}),
    ('{"name": "sql", "arguments": null}', {}),
    ('{"name": "sql", "arguments": ""}', {}),
    ('{"name": "sql", "parameters": {"a": 1}}', {"a": 1}),
    ('{"arguments": {"a": 1}, "name": "sql"}', {"a": 1}),
    ('{"type": "function", "name": "sql", "arguments": {"a": 1}}', {"a": 1}),
    ('{"type": "function", "function": {"name": "sql", "arguments": "{\\"a\\": 1}"}}', {"a": 1}),
    ('{"function": "sql", "arguments": {"a": 1}}', {"a": 1}),
    ('{"name": "sql", "arguments": "{\\"a\\": \\"\\\\u00e9\\"}"}', {"a": "é"}),
    ('{"name": "sql", "arguments": {"a": 1, "a": 2}}', {"a": 2}),
    ('{"name": "sql", "arguments": {"a": "\\ud83d\\ude00 \\u00e9 \\"q\\" \\\\"}}', {"a": '😀 é "q" \\'}),
    ('{"name": "sql", "arguments": {"a": "two\nlines\tand a tab"}}', {"a": "two\nlines\tand a tab"}),
    ('{"name": "sql", "arguments": {"a": "</tool_call> and <tool_call>"}}', {"a": "</tool_call> and <tool_call>"}),
    (
        '{"name":"sql","arguments":{"a":[{"b":[]},{},-1.5e3,true,false,null]}}',
        {"a": [{"b": []}, {}, -1500.0, True, False, None]},
    ),
    ('```json\n{"name": "sql", "arguments": {"a": 1}}\n```', {"a": 1}),
    ('[{"name": "sql", "arguments": {"a": 1}}]', {"a": 1}),
]


@pytest.mark.parametrize("body, arguments", VALID)
def test_small_liberties_are_taken(body: str, arguments: dict[str, Any]) -> None:
    text = f"<tool_call>\n{body}\n</tool_call>"
    for pieces in ([text], list(text)):
        deltas = deltas_of(hermes(), pieces)
        call = ToolCall("sql" if '"sql"' in body else "", arguments, call_id("", 0))
        assert reply_of(deltas) == Reply(tool_calls=(call,))
        written = "".join(delta.text for delta in deltas if isinstance(delta, ArgumentsDelta))
        assert json.loads(written) == arguments  # strictly: no raw line breaks inside strings


@pytest.mark.parametrize(
    "text, content, valid, invalid",
    [
        (f"before <tool_call>{_JSON}</tool_call> after", "before  after", 1, 0),
        (f"<tool_call>{_JSON}", "", 1, 0),  # complete, though its end is missing
        (f"<tool_call>{_JSON}}} after</tool_call>!", "} after!", 1, 0),
        (f"<tool_call>{_JSON}\n{_JSON}</tool_call>", "", 2, 0),
        (f"<tool_call>[{_JSON}, {_JSON}]</tool_call>", "", 2, 0),
        (f"<tool_call>[{_JSON}, {_JSON[:30]}", "", 1, 1),
        # A string without an end must not swallow the next call.
        (
            f'<tool_call>{{"name": "sql", "arguments": {{"query": "a}}}}</tool_call>\n<tool_call>{_JSON}</tool_call>',
            "",
            1,
            1,
        ),
        ('<tool_call>{"name": "sql", "arguments": {"query": "a}}</tool_call> so', "so", 0, 1),
        (f"<tool_call>no</tool_call><tool_call>{_JSON}</tool_call>", "", 1, 1),
        ("The tag </tool_call> ends a call.", "The tag </tool_call> ends a call.", 0, 0),
        ("a <tool_cal", "a <tool_cal", 0, 0),
    ],
)
def test_what_stands_beside_calls(text: str, content: str, valid: int, invalid: int) -> None:
    for pieces in ([text], list(text)):
        reply = reply_of(deltas_of(hermes(), pieces))
        assert reply.content == content
        assert (len(reply.tool_calls), len(reply.invalid_tool_calls)) == (valid, invalid)


@pytest.mark.parametrize("depth", [50, 100_000])
def test_huge_arguments(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    text = f'<tool_call>{{"name": "sql", "arguments": {{"a": "{"x" * 200_000}", "b": {nested}}}}}</tool_call> after'
    reply = reply_of(deltas_of(hermes(), pieces_of(text, range(0, len(text), 50))))
    assert reply.content == "after"
    assert len(reply.tool_calls) == (depth == 50) and len(reply.invalid_tool_calls) == (depth != 50)


def test_calls_of_tools_that_were_not_offered() -> None:
    """With markers the framework gets to say that there is no such tool; without tools nothing is a call."""
    text = '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'
    assert hermes().parse(text, TOOLS).tool_calls == (ToolCall("nothing", {}, call_id("", 0)),)
    assert hermes().parse(text) == hermes().parse(text, []) == Reply(text)


BARE = [
    (_JSON, 1),
    (f"{{{_JSON}}}", 1),  # Qwen2.5-Coder's chat template shows its format so
    (f"{{{_JSON}}}}}\n", 1),
    (f"{{{_JSON}", 1),
    ("{{", 0),
    (f"\n```json\n{_JSON}\n```\n", 1),
    (f"```\n{_JSON}\n```", 1),
    (f"<tools>\n{_JSON}\n</tools>", 1),
    (f"{_JSON}\n</tool_call>", 1),
    (f"{_JSON}\n{_JSON}", 2),
    (f"[{_JSON}, {_JSON}]", 2),
    (f"```json\n{_JSON}\n```\nThis runs the query.", 0),
    (f"Sure: {_JSON}", 0),
    (f"```python\nprint({_JSON})\n```", 0),
    (_JSON.replace("sql", "other"), 0),
    (f"{_JSON}\n{_JSON.replace('sql', 'other')}", 0),
    ('{"name": "sql"}', 0),
    ('{"city": "Rome", "name": "sql", "arguments": {}}', 0),
    ('{"answer": 5}', 0),
    ("{not JSON", 0),
    ("[1, 2]", 0),
    ('{"name": "sq', 0),
    ("```json\n", 0),
    (f"<tool_calls> {_JSON}", 0),
]


@pytest.mark.parametrize("text, calls", BARE)
def test_bare_json_is_a_call_only_where_it_is_the_whole_reply(text: str, calls: int) -> None:
    for pieces in ([text], list(text)):
        reply = reply_of(deltas_of(hermes(), pieces))
        assert len(reply.tool_calls) == calls and not reply.invalid_tool_calls
        assert reply.content == ("" if calls else text)
    assert hermes().parse(text) == Reply(text)


def test_bare_json_after_reasoning() -> None:
    assert hermes(True).parse(f"<think>hm</think>\n\n{_JSON}", TOOLS) == Reply("", "hm", (QUERY,))


def test_bare_calls_that_are_cut_off() -> None:
    reply = hermes().parse(_JSON[:-9], TOOLS)
    assert reply == Reply(
        invalid_tool_calls=(InvalidToolCall("sql", '{"query": "SELECT 1", "li', "the call is cut off", call_id("", 0)),)
    )


def test_answers_in_json_are_not_held_back_for_long() -> None:
    stream = hermes().stream(TOOLS)
    assert stream.push('{"city": "R') == [ContentDelta('{"city": "R')]


@pytest.mark.parametrize("prompt, reply", [("<think>", Reply("b", "a")), ("<think>\n", Reply("b", "a"))])
def test_reasoning_that_the_prompt_began(prompt: str, reply: Reply) -> None:
    text = "\na\n</think>\n\nb"
    assert hermes(True).parse(text, prompt=f"<|im_start|>assistant\n{prompt}") == reply
    assert reply_of(deltas_of(hermes(True), list(text), prompt=prompt)) == reply
    closed = hermes(True).parse("b", prompt=prompt + "\n\n</think>\n\n")
    assert closed == Reply("b")


def test_a_harmony_header_that_the_prompt_began() -> None:
    format = format_of(tokenizer_with(*FAMILIES["harmony"]))
    text = ' to=functions.sql<|channel|>commentary json<|message|>{"query": "SELECT 1", "limit": 5}<|call|>'
    assert format.parse(text, TOOLS, prompt="<|start|>assistant") == Reply(tool_calls=(QUERY,))


def test_arguments_come_as_they_are_written() -> None:
    text = f"ok <tool_call>\n{_JSON}\n</tool_call>"
    stream, seen = hermes().stream(TOOLS), dict[str, int]()
    for place, char in enumerate(text):
        for delta in stream.push(char):
            seen.setdefault(type(delta).__name__, place)
            if isinstance(delta, ContentDelta):
                assert "<" not in delta.text
    assert seen["CallStart"] == text.index("{", text.index("arguments"))
    assert seen["ArgumentsDelta"] == seen["CallStart"]
    assert seen["CallEnd"] == text.rindex("}")
    assert stream.end() == []


def test_order_of_deltas() -> None:
    deltas = deltas_of(hermes(), [f"a<tool_call>{_JSON}</tool_call>"])
    arguments = '{"query": "SELECT 1", "limit": 5}'
    assert deltas == [
        ContentDelta("a"),
        CallStart(0, call_id("", 0), "sql"),
        ArgumentsDelta(0, arguments),
        CallEnd(0),
    ]


def ids_of(format: ReplyFormat, text: str, ids: Sequence[str | None]) -> list[str]:
    stream = format.stream(TOOLS, ids=iter(ids))
    return [delta.id for delta in [*stream.push(text), *stream.end()] if isinstance(delta, CallStart)]


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([], [call_id("", 0), call_id("", 1)]),
        ([None, "abc", call_id("", 7)], [call_id("", 0), call_id("", 1)]),
        ([call_id("", 0), call_id("", 2)], [call_id("", 1), call_id("", 3)]),
    ],
)
def test_ids_are_none_of_the_conversation(ids: list[str | None], expected: list[str]) -> None:
    assert ids_of(hermes(), f"<tool_call>{_JSON}{_JSON}</tool_call>", ids) == expected
    assert ids_of(hermes(), f"[{_JSON}, {_JSON}]", ids) == expected
    assert all(len(id) == 9 and id.isascii() and id.isalnum() for id in expected)


def test_every_question_has_ids_of_its_own() -> None:
    ids = {call_id(about, number) for about in ("", "a", "ab", "1 a", "\udc80") for number in range(20)}
    assert len(ids) == 100 and call_id("a", 3) == call_id("a", 3)
    calls = [hermes().stream(TOOLS, about=about) for about in ("one", "two")]
    starts = [delta.id for one in calls for delta in one.push(f"<tool_call>{_JSON}") if isinstance(delta, CallStart)]
    assert starts == [call_id("one", 0), call_id("two", 0)]


def test_an_id_that_the_model_gives_twice_is_replaced() -> None:
    call = '{"name": "now", "arguments": {}, "id": "%s"}'
    text = f"[TOOL_CALLS][{call % 'a'}, {call % 'a'}, {call % call_id('', 1)}, {call % 'b'}, {call % 'c'}]"
    mistral = format_of(tokenizer_with(*FAMILIES["mistral"]))
    assert ids_of(mistral, text, ["c"]) == ["a", call_id("", 0), call_id("", 1), "b", call_id("", 2)]


@given(st.text('{}[]":,\\ab1\n', max_size=30))
def test_nothing_completes_what_is_spoiled(arguments: str) -> None:
    parse_partial_json = pytest.importorskip("langchain_core.utils.json").parse_partial_json
    for text in (arguments, '{"a": ' + arguments, '{"a": "' + arguments, '{"a": "b"}'):
        try:
            value = parse_partial_json(spoiled(text))
        except ValueError:
            continue
        assert not isinstance(value, dict)


@pytest.mark.parametrize("template", [None, "", "{{ messages }}", {"default": "x", "other": "y"}])
def test_a_tokenizer_without_markup_leaves_replies_as_they_are(template: Any) -> None:
    tokenizer = tokenizer_with("")
    tokenizer.chat_template = template
    format = format_of(tokenizer)
    assert format == ReplyFormat() and format.kept_tokens == {}
    for text in (_JSON, f"<tool_call>{_JSON}</tool_call>", "<think>a</think>b", " \n"):
        assert format.parse(text, TOOLS) == Reply(text)


def test_one_of_several_templates_is_enough() -> None:
    tokenizer = tokenizer_with("")
    tokenizer.chat_template = {"default": "x", "tool_use": HERMES}
    assert format_of(tokenizer).parse(f"<tool_call>{_JSON}</tool_call>", TOOLS) == Reply(tool_calls=(QUERY,))


@pytest.mark.parametrize("family", ["mistral", "deepseek", "kimi", "granite", "lfm2", "gemma4", "command_r", "harmony"])
def test_markers_that_are_special_tokens_are_kept(family: str) -> None:
    tokenizer = tokenizer_with(*FAMILIES[family])
    format = format_of(tokenizer)
    assert set(format.kept_tokens.values()) == set(FAMILIES[family][1])
    for text, expected in [(text, expected) for name, text, expected in EXAMPLES if name == family]:
        transcript = Transcript(tokenizer, [], {2}, format.kept_tokens)
        pieces = [transcript.push([token_id])[0] for token_id in [*tokenizer(text)["input_ids"], 2]]
        assert "".join(pieces) + transcript.flush() == text
        assert reply_of(deltas_of(format, pieces)) == expected


def test_other_special_tokens_stay_out_and_characters_whole() -> None:
    tokenizer = tokenizer_with(*FAMILIES["granite"])
    marker, first, *rest = [*tokenizer("<|tool_call|>😀")["input_ids"]]
    transcript = Transcript(tokenizer, [], set(), format_of(tokenizer).kept_tokens)
    transcript.push([1, first, marker, first, *rest, 1, marker])
    assert transcript.text + transcript.flush() == "\ufffd<|tool_call|>😀<|tool_call|>"
    plain = Transcript(tokenizer, [], set())
    plain.push([marker, first, *rest])
    assert plain.text == "😀"
