"""Grammars inside the one accept rule. The models are random, so whatever is well-formed is the grammar's doing."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import regex
import torch
from conftest import byte_tokenizer, plain, tiny_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LogitsProcessor

from ouroboros_llm import DecodingOptions, Grammar, MemoryPool, MissingExtraError, OptionError, Ouroboros
from ouroboros_llm.decoding.decoder import Decoder
from ouroboros_llm.decoding.sampling import Sampler, sampler_for
from ouroboros_llm.drafting.base import Rule
from ouroboros_llm.drafting.forced_tokens import GrammarSource
from ouroboros_llm.drafting.learned_state import LearnedState, sources
from ouroboros_llm.drafting.phrases import PhraseSource
from ouroboros_llm.drafting.tree_drafter import TreeDrafter
from ouroboros_llm.grammar.compiled import Matcher, matcher_for
from ouroboros_llm.grammar.constraint import Constraint, constraint_for
from ouroboros_llm.models import loading as models
from ouroboros_llm.target_model.prepared import prepare
from ouroboros_llm.target_model.scripted import ScriptedTarget

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

PROMPT = "abab abab abab"
END = 2
CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "search_flights"},
        "arguments": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "class": {"enum": ["economy", "größe", "日本", None, 3]},
                "passengers": {
                    "type": "array",
                    "items": {"$ref": "#/$defs/person"},
                    "minItems": 1,
                    "maxItems": 3,
                },
                "note": {"type": "string", "maxLength": 3},
            },
            "required": ["city", "class", "passengers"],
        },
    },
    "required": ["name", "arguments"],
    "$defs": {
        "person": {
            "type": "object",
            "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}, "child": {"type": "boolean"}},
            "required": ["age"],
        }
    },
}


def matcher(grammar: Grammar) -> Matcher:
    return matcher_for(grammar, byte_tokenizer(), [END])


def need(grammar: Grammar) -> int:
    """Tokens of the shortest text, the end token included."""
    return len(matcher(grammar).shortest(500)) + 1


def generate(grammar: Grammar, limit: int, *, store: Any = None, draft: Any = None, **options: Any) -> Any:
    with Ouroboros(tiny_model("qwen3"), byte_tokenizer(), store=store, draft_model=draft) as ouroboros:
        return ouroboros.generate(PROMPT, options=DecodingOptions(max_new_tokens=limit, grammar=grammar, **options))


class Masked(LogitsProcessor):
    """The oracle: the library's own mask after all tokens of the output, read from the beginning every time."""

    def __init__(self, grammar: Grammar, prompt_length: int) -> None:
        self._state, self._prompt_length = matcher(grammar).state(), prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        state = self._state.deep_copy()
        output = input_ids[0, self._prompt_length :].tolist()
        assert state.try_consume_tokens(output) == len(output)
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), dtype=np.uint8), bitorder="little")
        return scores.masked_fill(~torch.from_numpy(bits[: scores.shape[-1]].astype(bool)), -torch.inf)


class Budgeted(LogitsProcessor):
    """Greedy choices under a constraint, in the library's own loop."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._constraint.place(input_ids[0].tolist())
        picked = self._constraint.pick(self._constraint.mask(scores)[0])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([picked]), 0.0)


def prompt_ids() -> list[int]:
    return list(byte_tokenizer()(PROMPT)["input_ids"])


GRAMMARS = [
    Grammar.json_schema(CALL),
    Grammar.json_schema(CALL, before="<tool_call>\n", after="\n</tool_call>", between="\n", most=2),
    Grammar.choices(["yes", "no", "yes and no", "日本"]),
    Grammar.regex(r"[A-Z]{2}-\d{3}(x|yé){2,4}"),
    Grammar.lark('start: "(" (start | "a") ")"'),
    Grammar.any_of([Grammar.json_schema(CALL, before="<f>"), Grammar.regex("[a-z]/[0-9]")], between=";", most=2),
]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_the_library_s_own_loop_under_the_same_masks_says_the_same(grammar: Grammar) -> None:
    mask = Masked(grammar, len(prompt_ids()))
    for sampling in (None, 0, 7):
        options: dict[str, Any] = {} if sampling is None else dict(temperature=0.9, top_p=0.9, seed=sampling)
        torch.manual_seed(sampling or 0)
        theirs = {} if sampling is None else dict(do_sample=True, temperature=0.9, top_p=0.9, top_k=0)
        wanted = plain(tiny_model("qwen3"), prompt_ids(), 400, logits_processor=[mask], **theirs)
        if len(wanted) > 300:
            continue  # near the limit, ends come before the mask alone would let them
        for drafts in ({}, dict(max_draft_tokens=0), dict(max_draft_tokens=5)):
            assert list(generate(grammar, 400, **options, **drafts).token_ids) == wanted, (sampling, drafts)


def test_the_oracle_was_asked() -> None:
    """At least the schema's answers are short enough for the comparison above."""
    wanted = plain(tiny_model("qwen3"), prompt_ids(), 400, logits_processor=[Masked(GRAMMARS[0], len(prompt_ids()))])
    assert len(wanted) < 300 and wanted[-1] == END


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom_chains", "mamba_plain", "gemma3_mixed"])
@pytest.mark.parametrize("spare", [0, 1, 2, 3, 7, 20])
def test_small_budgets_end_in_time_and_change_with_no_draft(architecture: str, spare: int) -> None:
    grammar = Grammar.json_schema(CALL)
    limit = need(grammar) + spare
    model = tiny_model(architecture)
    budget = Budgeted(Constraint(matcher(grammar), len(prompt_ids()), limit))
    wanted = plain(model, prompt_ids(), limit, logits_processor=[budget])
    assert wanted[-1] == END
    with pytest.warns(RuntimeWarning) if "plain" in architecture else pytest.MonkeyPatch.context():
        ouroboros = Ouroboros(model, byte_tokenizer())
    with ouroboros:
        for _ in range(2):
            result = ouroboros.generate(PROMPT, options=DecodingOptions(max_new_tokens=limit, grammar=grammar))
            assert list(result.token_ids) == wanted
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), CALL)


NAMES = st.sampled_from(["a", "b", "größe", "日本", "with space", 'q"q', "<s>", "</s>", "x/y~z", "{", "🎉"])


def leaves() -> st.SearchStrategy[Any]:
    bounds = st.tuples(st.integers(-200, 200), st.integers(0, 300))
    lengths = st.tuples(st.integers(0, 4), st.integers(0, 5))
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.just({"type": "number"}),
        st.just({"type": "string"}),
        st.just({"type": ["integer", "null"]}),
        st.just({"$ref": "#/$defs/node"}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}),
        bounds.map(lambda b: {"type": "number", "exclusiveMinimum": b[0], "maximum": b[0] + b[1] + 0.5}),
        lengths.map(lambda n: {"type": "string", "minLength": n[0], "maxLength": n[0] + n[1]}),
        st.sampled_from([r"^[A-Z]{2}-\d{3}$", "^(ab)+cd$", "^[ぁ-ん]{1,3}é$", "^é", r"^\w+@[a-z]+\.(com|org)$"]).map(
            lambda pattern: {"type": "string", "pattern": pattern}
        ),
        st.sampled_from(["date", "uuid", "ipv4", "time", "password"]).map(lambda f: {"type": "string", "format": f}),
        st.lists(st.one_of(NAMES, st.integers(-5, 5), st.none(), st.booleans()), min_size=1, max_size=4).map(
            lambda values: {"enum": values}
        ),
        NAMES.map(lambda name: {"const": {"k": [name, 1.5, None]}}),
    )


def branches(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def an_object(properties: dict[str, Any], required: set[str], more: Any) -> dict[str, Any]:
        schema = {"type": "object", "properties": properties, "required": sorted(required & set(properties))}
        return schema if more is None else schema | {"additionalProperties": more}

    return st.one_of(
        st.builds(an_object, st.dictionaries(NAMES, inner, max_size=4), st.sets(NAMES), st.none() | inner),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda members: {"anyOf": members}),
    )


@pytest.mark.parametrize("lower", [-3, -2.5, -1, 0, 0.5, 7])
@pytest.mark.parametrize("span", [0.05, 0.5, 1, 1.5, 12])
def test_bounds_of_numbers_are_kept(lower: float, span: float) -> None:
    """Whole numbers, decimals, near the bounds: nothing is taken that does not validate, and most that does is."""
    texts = [f"{lower + span * step / 8:g}" for step in range(-4, 13)] + ["-0", "0.0", f"{lower:.2f}", "1e1"]
    texts += [str(round(lower)), str(round(lower + span))]
    for low, high in itertools.product(("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        schema = {"type": "number", low: lower, high: lower + span}
        state, taken, valid = matcher(Grammar.json_schema(schema)).state(), 0, 0
        for text in texts:
            here, ids = state.deep_copy(), byte_tokenizer()(text)["input_ids"]
            takes = here.try_consume_tokens(ids) == len(ids) and here.is_accepting()
            keeps = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
            assert keeps or not takes, (text, schema)
            taken, valid = taken + takes, valid + keeps
        assert taken >= valid - 3 > 0


NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
SCHEMAS = st.recursive(leaves(), branches, max_leaves=8).map(lambda schema: {**schema, "$defs": {"node": NODE}})


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, spare=st.integers(0, 24), seed=st.none() | st.integers(0, 9), pool=st.booleans())
def test_a_hundred_schemas_parse_and_validate(schema: dict[str, Any], spare: int, seed: int | None, pool: bool) -> None:
    grammar = Grammar.json_schema(schema)
    limit = need(grammar) + spare
    assume(limit < 300)
    sampling: dict[str, Any] = {} if seed is None else dict(temperature=1.0, seed=seed)
    alone = generate(grammar, limit, max_draft_tokens=0, **sampling)
    assert alone.finish_reason == "stop"
    jsonschema.validate(json.loads(alone.text), schema)
    store = Pools(alone.token_ids) if pool else None
    assert generate(grammar, limit, store=store, **sampling).token_ids == alone.token_ids


class Pools:
    """Scopes that all hold one answer, and others that the grammar would never allow."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._pool = MemoryPool()
        for cut in range(0, len(token_ids), 5):
            self._pool.add([*token_ids[:cut], 100, 101, *token_ids[cut:]])
        self._pool.add(token_ids)

    def open(self, scope: str, *, fingerprint: str) -> MemoryPool:
        return self._pool

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("drafters", [(), ("phrases",), ("phrases", "recycling", "lookahead", "draft_model")])
def test_every_source_of_drafts_changes_nothing(drafters: tuple[str, ...]) -> None:
    grammar, limit = Grammar.json_schema(CALL), 220
    wanted = generate(grammar, limit, max_draft_tokens=0)
    for store in (None, Pools(wanted.token_ids)):
        draft = tiny_model("qwen3", seed=1)
        result = generate(grammar, limit, store=store, draft=draft, drafters=drafters, max_draft_tokens=40)
        assert result.token_ids == wanted.token_ids
        assert result.statistics.accepted_by_source["grammar"] > 20


def rounds(grammar: Grammar, limit: int, pool: MemoryPool) -> list[Any]:
    """The rounds of a decoder whose only sources are the grammar and a pool, as wide as can be."""
    model = tiny_model("qwen3")
    options = DecodingOptions(max_new_tokens=limit, grammar=grammar)
    constraint = constraint_for(grammar, model, byte_tokenizer(), len(prompt_ids()), limit)
    assert constraint is not None
    sampler = sampler_for(model, options, len(prompt_ids()), limit, 0.0, constraint)
    source = GrammarSource(constraint.place)
    assert isinstance(source, Rule)
    drafter = TreeDrafter([source, PhraseSource("phrases", pool)])
    decoder = Decoder(prepare(model).start(), drafter, width=64)
    return list(decoder.rounds(prompt_ids(), sampler, limit=limit, end_token_ids={END}))


def test_forced_tokens_cost_no_pass_and_forbidden_ones_no_place() -> None:
    grammar = Grammar.json_schema(CALL)
    answer = generate(grammar, 400).token_ids
    pool = Pools(answer).open("", fingerprint="")
    done = rounds(grammar, 400, pool)
    assert tuple(token_id for round in done for token_id in round.token_ids) == answer
    state, drafted = matcher(grammar).state(), 0
    for round in done:
        for node in range(1, round.draft.width):
            path = [round.draft.token_ids[step] for step in round.draft.path_to(node)[1:]]
            path = path[:-1] if path[-1] == END else path
            assert state.validate_tokens(path) == len(path), "a draft that the grammar forbids"
            drafted += 1
        output = [token_id for token_id in round.token_ids if token_id != END]
        assert state.try_consume_tokens(output) == len(output)
    assert drafted > len(answer) / 2
    cold = rounds(grammar, 400, MemoryPool())
    origins = [origin for round in cold for origin in round.origins]
    assert origins.count("grammar") > len(answer) / 3
    # Each pass ends in a choice: what is forced never needs one of its own.
    assert len(cold) <= len(answer) - origins.count("grammar")


def test_the_shortest_text_is_forced_when_there_is_no_room_for_another() -> None:
    grammar = Grammar.json_schema(CALL)
    result = rounds(grammar, need(grammar), MemoryPool())
    assert len(result) == 1 + (need(grammar) - 1) // 64
    assert {origin for round in result for origin in round.origins} <= {"grammar", "bonus"}


def test_a_text_that_is_forced_altogether_is_one_pass() -> None:
    text = '{"name":"nothing","arguments":{}}'
    result = rounds(Grammar.choices([text]), 80, MemoryPool())
    assert len(result) == 1
    assert byte_tokenizer().decode(result[0].token_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.choices(["red", "größer", "日本"]), "red|größer|日本"),
        (Grammar.regex(r"\d{3}-[a-f]+"), r"\d{3}-[a-f]+"),
        (Grammar.lark('start: "<" /[a-z]{2}/ ">" | "[" start "]"'), r"\[*<[a-z]{2}>\]*"),
        (Grammar.regex("(ab)+cd"), "(ab)+cd"),
        (
            Grammar.any_of(
                [Grammar.regex("[ab]{2}/\\/\n?"), Grammar.any_of([Grammar.choices(["go", "日"])], after="!", most=3)],
                before="> ",
            ),
            "> ([ab]{2}//\n?|((go|日)!){1,3})",
        ),
    ],
    ids=["choices", "regex", "lark", "circles", "any_of"],
)
def test_other_grammars_match_whatever_the_budget(grammar: Grammar, pattern: str) -> None:
    for limit in range(need(grammar), need(grammar) + 12):
        for seed in (None, 1, 2):
            sampling: dict[str, Any] = {} if seed is None else dict(temperature=1.5, seed=seed)
            result = generate(grammar, limit, **sampling)
            assert result.finish_reason == "stop"
            # `regex` knows the digits of llguidance's Unicode, which Python's own `re` may be too old for.
            assert regex.fullmatch(pattern, result.text), result.text


@pytest.mark.parametrize(
    "inner",
    [
        {"type": "string", "format": "email"},
        {"anyOf": [{"type": "string", "format": "email"}, {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}]},
        {"type": "string", "format": "ipv6"},
        {"type": "string", "format": "uri"},
        {"type": "string", "format": "date-time"},
    ],
    ids=lambda inner: inner.get("format", "several"),
)
def test_texts_with_one_way_on_among_many_are_brought_to_their_end(inner: dict[str, Any]) -> None:
    names = ["a", "b", "c"]
    schema = {"type": "object", "properties": dict.fromkeys(names, inner), "required": names}
    for seed in (None, 1, 2):
        sampling: dict[str, Any] = {} if seed is None else dict(temperature=1.5, seed=seed)
        result = generate(Grammar.json_schema(schema), 400, **sampling)
        assert result.finish_reason == "stop"
        jsonschema.Draft202012Validator(schema).validate(json.loads(result.text))


def test_json_is_compact_and_objects_have_no_other_properties() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a"]}
    for seed in range(8):
        text = generate(Grammar.json_schema(schema), 60, temperature=2.0, seed=seed).text
        assert set(json.loads(text)) <= {"a", "b"}
        assert json.dumps(json.loads(text), separators=(",", ":")) == text


def test_text_around_and_several_values() -> None:
    grammar = Grammar.json_schema({"type": "integer"}, before="<call>\n", after="\n</call>", between=";", most=3)
    one = r"<call>\n-?\d+\n</call>"
    for seed in range(5):
        text = generate(grammar, 90, temperature=1.0, seed=seed).text
        assert re.fullmatch(f"{one}(;{one}){{0,2}}", text), text


def test_special_tokens_around_are_special_tokens() -> None:
    result = generate(Grammar.json_schema({"const": 1}, before="<|tool|>", after="<|user|>\n"), 20)
    ids = byte_tokenizer().convert_tokens_to_ids(["<|tool|>", "<|user|>"])
    assert result.token_ids[0] == ids[0] and result.token_ids[2] == ids[1]
    # Inside of JSON the same characters are text.
    result = generate(Grammar.json_schema({"const": "<|tool|></s>"}), 40)
    assert json.loads("".join(chr(b) for b in matcher_bytes(result.token_ids))) == "<|tool|></s>"
    assert not set(ids) & set(result.token_ids)


def matcher_bytes(token_ids: Sequence[int]) -> bytes:
    vocabulary = matcher(Grammar.json()).vocabulary
    return bytes(vocabulary.tokenizer.decode_bytes([token_id for token_id in token_ids if token_id != END]))


def test_penalties_and_configuration_do_not_break_the_grammar() -> None:
    bias = {token_id: -100.0 for token_id in range(7, 200)}
    result = generate(Grammar.json_schema(CALL), 200, repetition_penalty=2.0, frequency_penalty=1.5, logit_bias=bias)
    jsonschema.validate(json.loads(result.text), CALL)
    model = tiny_model("qwen3")
    before = model.generation_config
    try:
        model.generation_config = type(before)(**{**before.to_dict(), "min_new_tokens": 50, "suppress_tokens": [93]})
        text = generate(Grammar.json_schema({"const": [1]}), 30).text  # 93 is the bracket that opens it
    finally:
        model.generation_config = before
    assert text == "[1]"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "#/properties/a"),
        ({"type": "array", "items": {"not": {"type": "string"}}}, "#/items"),
        ({"$defs": {"x": {"type": "strin"}}, "$ref": "#/$defs/x"}, r"#/\$defs/x"),
        ({"type": "object", "properties": {"a/b": {"pattern": "(?=x)", "type": "string"}}}, "look-.*#/properties/a~1b"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3, "maximum": 1, "type": "integer"}]}, "3.*#/allOf/1"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"enum": []}, "at #"),
    ],
)
def test_what_cannot_be_kept_is_named(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate(Grammar.json_schema(schema), 100)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar.json_schema("{"),
        lambda: Grammar.json_schema([1]),  # type: ignore[arg-type]
        lambda: Grammar.json_schema({"const": {1, 2}}),
        lambda: Grammar.json_schema({}, most=0),
        lambda: Grammar.choices([]),
        lambda: Grammar.choices([""]),
        lambda: Grammar.any_of([]),
        lambda: Grammar.any_of([Grammar.lark("start: /a/")]),
        lambda: generate(Grammar.any_of([Grammar.json(), Grammar.regex("(a")]), 30),
        lambda: Grammar("yaml", "x"),  # type: ignore[arg-type]
        lambda: Grammar.regex(None),  # type: ignore[arg-type]
        lambda: DecodingOptions(grammar={"type": "object"}),  # type: ignore[arg-type]
        lambda: generate(Grammar.regex("(a"), 30),
        lambda: generate(Grammar.lark("start: nothing"), 30),
    ],
)
def test_misuse_is_an_option_error(make: Any) -> None:
    with pytest.raises(OptionError, match="grammar"):
        make()


def test_too_little_room_is_said_before_anything_is_decoded() -> None:
    grammar = Grammar.json_schema(CALL)
    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        options = DecodingOptions(max_new_tokens=need(grammar) - 1, grammar=grammar)
        with pytest.raises(OptionError, match=f"max_new_tokens={need(grammar) - 1}.*{need(grammar)} tokens"):
            ouroboros.stream(PROMPT, options=options)  # not even iterated
        with pytest.raises(OptionError, match="max_new_tokens=40"):
            huge = Grammar.json_schema({"type": "string", "minLength": 5000})
            ouroboros.stream(PROMPT, options=DecodingOptions(max_new_tokens=40, grammar=huge))


def test_the_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"llguidance.*\[structured\]"):
        generate(Grammar.regex("never seen before"), 30)


def test_compiled_grammars_are_shared() -> None:
    assert matcher(Grammar.json_schema(CALL)) is matcher(Grammar.json_schema(json.dumps(CALL)))
    assert matcher(Grammar.json_schema(CALL)) is not matcher(Grammar.json_schema(CALL, before="x"))


def test_a_sampler_without_a_grammar_is_as_before() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert Sampler().chooser(logits, [1], [0])(0, []) == 1


@pytest.mark.real_model
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, spare=st.integers(0, 24), seed=st.integers(0, 999), sample=st.booleans(), call=st.booleans())
def test_a_real_vocabulary_in_which_text_divides_in_many_ways(
    schema: dict[str, Any], spare: int, seed: int, sample: bool, call: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("smollm2-135m-instruct"))
    around = ("<tool_call>\n", "\n</tool_call>") if call else ("", "")
    found = matcher_for(Grammar.json_schema(schema, before=around[0], after=around[1]), tokenizer, [END])
    limit = len(found.shortest(500)) + 1 + spare
    assume(limit < 120)

    def logits(text: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(seed + sum(text[-3:])))
        noise[:3000] += 2  # short tokens
        return noise * 2

    outputs = []
    for width in (1, 24):
        constraint = Constraint(found, 3, limit)
        generator = torch.Generator().manual_seed(seed)
        masks = [lambda ids, scores, constraint=constraint: constraint.mask(scores)]
        sampler = Sampler(masks, constraint=constraint, sample=sample, generator=generator)
        memory = LearnedState()
        named = sources(("phrases", "recycling"), memory)
        drafter = TreeDrafter([GrammarSource(constraint.place), *named], memory.calibration)
        decoder = Decoder(ScriptedTarget(logits), drafter, width=width, successors=4)
        done = decoder.rounds([5, 6, 7], sampler, limit=limit, end_token_ids={END})
        outputs.append([token_id for round in done for token_id in round.token_ids])
    assert outputs[0] == outputs[1] and outputs[0][-1] == END
    text = found.vocabulary.tokenizer.decode_bytes(outputs[0][:-1]).decode()
    assert text.startswith(around[0]) and text.endswith(around[1])
    jsonschema.validate(json.loads(text.removeprefix(around[0]).removesuffix(around[1])), schema)


@pytest.mark.real_model
def test_a_tool_call_of_a_real_model_takes_few_passes() -> None:
    grammar = Grammar.json_schema(CALL, before="<tool_call>\n", after="\n</tool_call>")
    messages = [{"role": "user", "content": "Find flights to Rome for Ana, 33, economy. Answer with a function call."}]
    with Ouroboros.from_pretrained("smollm2-135m-instruct", dtype="float32", device="cpu") as ouroboros:
        options = DecodingOptions(max_new_tokens=120, grammar=grammar)
        result = ouroboros.generate(messages, options=options)
        prompt = ouroboros.encode(messages)
        oracle = Budgeted(Constraint(matcher_for(grammar, ouroboros.tokenizer, [END]), len(prompt), 120))
        assert list(result.token_ids) == plain(ouroboros.model, prompt, 120, logits_processor=[oracle])
    text = result.text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    jsonschema.validate(json.loads(text), CALL)
    assert result.statistics.target_forwards < len(result.token_ids) / 2
    assert result.statistics.origins.count("grammar") > len(result.token_ids) / 2


def test_grammars_are_compiled_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, begun, go_on = Grammar.regex("slow(er)?"), threading.Event(), threading.Event()
    compiled = Matcher.__init__

    def compile(self: Matcher, grammar: Grammar, vocabulary: Any) -> None:
        if grammar == slow:
            begun.set()
            assert go_on.wait(30)
        compiled(self, grammar, vocabulary)

    monkeypatch.setattr(Matcher, "__init__", compile)
    with ThreadPoolExecutor(2) as pool:
        try:
            found = [pool.submit(matcher, slow) for _ in range(2)]
            assert begun.wait(30)
            assert matcher(Grammar.regex("quick(er)?")).grammar.source == "quick(er)?"
        finally:
            go_on.set()
        assert found[0].result() is found[1].result()


OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"r": {"$ref": "#"}}, "required": ["r"]},
        {"$ref": "#/$defs/r", "$defs": {"r": {"properties": {"r": {"$ref": "#/$defs/r"}}, "required": ["r"]} | OBJECT}},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]},
    ],
)
def test_a_schema_without_an_end_is_an_error_that_says_so(schema: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="unless the grammar has none"):
        matcher(Grammar.json_schema(schema)).shortest(40)


def test_a_way_out_of_a_circle_is_short() -> None:
    """In an address every character leads to where it came from, but for the @."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "email"}}, "required": ["a"]}
    assert len(matcher(Grammar.json_schema(schema)).shortest(80)) < 20
