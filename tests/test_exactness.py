"""The first promise: the same tokens as the model alone, whatever was drafted."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import pytest
import torch
from conftest import ARCHITECTURES, MORE_ARCHITECTURES, STATIC, blend, byte_tokenizer, plain, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ouroboros_llm import DecodingOptions, MemoryPool, Ouroboros
from ouroboros_llm.decoding.decoder import Decoder
from ouroboros_llm.decoding.draft_tree import DraftTree, TreeBuilder
from ouroboros_llm.decoding.drafter import Budget, NoDrafts, Round
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.drafting.token_recycling import KEPT
from ouroboros_llm.options import DRAFTERS
from ouroboros_llm.target_model.prepared import Kind, prepare
from ouroboros_llm.target_model.scripted import ScriptedTarget

PROMPTS = ("the cat sat on the mat, the cat sat on", "abcabcabcabc", "x", "def f(a):\n    return a\n\ndef f(a):\n" * 8)
TOKENS = 48


def ids(prompt: str) -> list[int]:
    return byte_tokenizer()(prompt)["input_ids"]


def pool_of(contents: str, wanted: list[int]) -> MemoryPool:
    """Pools from useless to perfect."""
    pool = MemoryPool()
    if contents == "right":
        pool.add(wanted)
    elif contents == "wrong":
        pool.add([(token_id + 1) % 263 for token_id in wanted])
    elif contents == "branching":
        for cut in range(4, len(wanted), 5):
            pool.add([*wanted[:cut], (wanted[cut] + 7) % 263, *wanted[:cut]])
        pool.add(wanted)
    elif contents == "foreign":
        pool.add([10**9, *wanted[:5], 2**31 + 5, *wanted[5:9], 263, 264])
    return pool


def decode(
    architecture: str, prompt_ids: list[int], drafter: object, width: int | None = None, kind: Kind = "eager"
) -> list[int]:
    prepared = prepare(tiny_model(architecture), kind)
    assert prepared.way.missed is None
    decoder = Decoder(prepared.start(), drafter, width=width, successors=KEPT)
    rounds = decoder.rounds(prompt_ids, Sampler(), limit=TOKENS, end_token_ids={2})
    return [token_id for round in rounds for token_id in round.token_ids]


@pytest.mark.parametrize("contents", ["empty", "right", "wrong", "branching", "foreign"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pools_change_no_token(architecture: str, contents: str) -> None:
    check_pools(architecture, contents, "eager")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((name, "static") for name in STATIC), *((name, "eager") for name in STATIC if name in MORE_ARCHITECTURES)],
)
def test_passes_of_every_kind_change_no_token(architecture: str, kind: Kind) -> None:
    check_pools(architecture, "branching", kind, widths=(5, 64))
    check_pools(architecture, "foreign", kind, widths=(None,))


def check_pools(architecture: str, contents: str, kind: Kind, widths: Sequence[int | None] = (None, 2, 5, 64)) -> None:
    for prompt in PROMPTS:
        wanted = plain(tiny_model(architecture), ids(prompt), TOKENS)
        for width in widths:
            drafter = blend(write=pool_of(contents, wanted))
            for _ in range(2):  # the second time with what was recycled in the first
                assert decode(architecture, ids(prompt), drafter, width, kind) == wanted, (prompt, width)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mistral_sliding", "gemma3_mixed"])
@pytest.mark.parametrize("same_weights", [True, False])
def test_draft_models_change_no_token(architecture: str, same_weights: bool) -> None:
    forwards = 0
    for prompt, contents in itertools.product(PROMPTS, ("empty", "wrong", "branching")):
        wanted = plain(tiny_model(architecture), ids(prompt), TOKENS)
        small = tiny_model(architecture, seed=0 if same_weights else 1)
        store = Pools(pool_of(contents, wanted))
        with Ouroboros(tiny_model(architecture), byte_tokenizer(), draft_model=small, store=store) as ouroboros:
            result = ouroboros.generate(ids(prompt), options=DecodingOptions(max_new_tokens=TOKENS))
        assert list(result.token_ids) == wanted
        forwards += result.statistics.draft_forwards
    assert forwards > 0


class Pools:
    """A `PoolSource` whose every scope is one given pool."""

    def __init__(self, pool: MemoryPool) -> None:
        self._pool = pool

    def open(self, scope: str, *, fingerprint: str) -> MemoryPool:
        return self._pool

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@settings(max_examples=60)
@given(
    drafters=st.sets(st.sampled_from(DRAFTERS)),
    prompt=st.lists(st.integers(5, 12), min_size=1, max_size=40),
    runs=st.lists(st.lists(st.integers(0, 300), max_size=30), max_size=5),
    documents=st.lists(st.lists(st.integers(5, 12), max_size=30), max_size=3),
    temperature=st.sampled_from([0.0, 0.7]),
    target=st.sampled_from(["eager", "static"]),
    max_draft_tokens=st.sampled_from([None, 0, 1, 6, 63]),
)
def test_sources_alone_and_together_change_no_token(
    drafters: set[str],
    prompt: list[int],
    runs: list[list[int]],
    documents: list[list[int]],
    temperature: float,
    target: Kind,
    max_draft_tokens: int | None,
) -> None:
    own, quoted = MemoryPool(), MemoryPool()
    for pool, contents in ((own, runs), (quoted, documents)):
        for run in contents:
            pool.add(run)
    sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else {}
    torch.manual_seed(7)
    wanted = plain(tiny_model(), prompt, TOKENS, **sampling)
    with Ouroboros(
        tiny_model(),
        byte_tokenizer(),
        draft_model=tiny_model(seed=1),
        store=Pools(own),
        documents=quoted,
        target=target,
    ) as ouroboros:
        for _ in range(2):
            result = ouroboros.generate(
                prompt,
                options=DecodingOptions(
                    max_new_tokens=TOKENS,
                    temperature=temperature,
                    seed=7,
                    drafters=tuple(drafters),
                    max_draft_tokens=max_draft_tokens,
                ),
            )
            assert list(result.token_ids) == wanted
            assert set(result.statistics.accepted_by_source) <= {*drafters, "text", "shared", "answers"}
            assert len(result.statistics.origins) == len(wanted)


class Adversary:
    """Drafts that try to break out: all wrong, the right text with an end token inside, far too wide and too deep."""

    def __init__(self, wanted: Sequence[int], kind: str, prompt_length: int) -> None:
        self._wanted, self._kind, self._prompt_length = list(wanted), kind, prompt_length

    def open(self, context: Sequence[int]) -> None:
        pass

    def draft(self, context: Sequence[int], budget: Budget) -> DraftTree:
        rest = self._wanted[len(context) - self._prompt_length :]
        if self._kind == "wrong":
            return DraftTree.chain([context[-1], *((token_id + 1) % 263 for token_id in rest[:8])])
        if self._kind == "end inside":
            return DraftTree.chain([context[-1], *rest[:3], 2, *rest[3:8]])
        if self._kind == "past the limit":
            return DraftTree.chain([context[-1], *rest, *rest, *range(5, 99)])
        builder = TreeBuilder(context[-1], 64)
        for token_id in [*range(3, 60), *rest[:1]]:
            builder.add(0, token_id, 1e-9, "wide")
        return builder.build()

    def learn(self, round: Round) -> None:
        pass


@pytest.mark.parametrize("kind", ["wrong", "end inside", "past the limit", "wide"])
@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        *((name, "eager") for name in ("llama", "gpt2", "bloom_chains", "lfm2_chains", "mamba_plain")),
        *((name, "static") for name in ("llama", "gpt_oss")),
    ],
)
def test_adversarial_drafts_change_no_token(architecture: str, target: Kind, kind: str) -> None:
    for prompt in PROMPTS:
        wanted = plain(tiny_model(architecture), ids(prompt), TOKENS)
        adversary = Adversary(wanted, kind, len(ids(prompt)))
        assert decode(architecture, ids(prompt), adversary, kind=target) == wanted


def test_drafts_are_accepted_at_all() -> None:
    """Guards the tests above against drafters that never propose anything."""
    wanted = plain(tiny_model(), ids(PROMPTS[0]), TOKENS)
    pool = pool_of("right", wanted)
    decoder = Decoder(prepare(tiny_model()).start(), blend(pool), width=64)
    rounds = list(decoder.rounds(ids(PROMPTS[0]), Sampler(), limit=TOKENS))
    assert len(rounds) <= 4
    assert sum(len(round.accepted) for round in rounds) > TOKENS / 2


@pytest.mark.parametrize("target", ["eager", "static"])
def test_the_end_of_the_context_is_never_passed(target: Kind) -> None:
    """GPT-2 looks positions up: one node too deep would be an error, not a wrong token."""
    model = tiny_model("gpt2")
    prompt_ids = [5 + number % 3 for number in range(490)]
    with Ouroboros(model, byte_tokenizer(), target=target) as ouroboros:
        result = ouroboros.generate(prompt_ids, options=DecodingOptions(max_new_tokens=100))
    assert list(result.token_ids) == plain(model, prompt_ids, 512 - 490)
    assert result.finish_reason == "length"


def test_several_end_tokens() -> None:
    model = tiny_model()
    free = plain(model, ids(PROMPTS[1]), TOKENS, eos_token_id=None)
    ends = [free[10], free[20]]
    config = model.generation_config
    previous, config.eos_token_id = config.eos_token_id, ends
    try:
        with Ouroboros(model, byte_tokenizer()) as ouroboros:
            for _ in range(2):
                result = ouroboros.generate(ids(PROMPTS[1]), options=DecodingOptions(max_new_tokens=TOKENS))
                assert list(result.token_ids) == plain(model, ids(PROMPTS[1]), TOKENS)
                assert result.token_ids[-1] in ends and result.finish_reason == "stop"
    finally:
        config.eos_token_id = previous


def test_long_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.target_model.eager.PREFILL_CHUNK", 16)
    for architecture in ("llama", "mistral_sliding", "gemma3_mixed", "qwen3_next_plain", "lfm2_chains"):
        wanted = plain(tiny_model(architecture), ids(PROMPTS[3]), TOKENS)
        assert decode(architecture, ids(PROMPTS[3]), NoDrafts()) == wanted


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations(implementation: str) -> None:
    model = tiny_model("gemma3_mixed", seed=3)
    model.set_attn_implementation(implementation)
    wanted = plain(model, ids(PROMPTS[0]), TOKENS)
    target = prepare(model).start()
    assert target.branching == "tree"
    decoder = Decoder(target, blend(pool_of("branching", wanted)), width=64)
    rounds = decoder.rounds(ids(PROMPTS[0]), Sampler(), limit=TOKENS, end_token_ids={2})
    assert [token_id for round in rounds for token_id in round.token_ids] == wanted


class RoundingTarget(ScriptedTarget):
    """Like half precision: a wide pass gives other last digits than a pass over one token."""

    def verify(self, draft: DraftTree) -> torch.Tensor:
        logits = super().verify(draft)
        if draft.width > 1:
            logits = logits + 0.02 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(draft.width))
        return logits


def test_exact_decides_near_ties_as_plain_decoding_does() -> None:
    def logits_after(text: tuple[int, ...]) -> torch.Tensor:
        # Two tokens within rounding of each other at every step.
        logits = torch.zeros(20)
        best = sum(text[-2:]) % 19
        logits[best], logits[(best + 1) % 20] = 5.0, 5.0 - 0.001 * (text[-1] % 3)
        return logits

    def output(drafter: object, margin: float) -> list[int]:
        rounds = Decoder(RoundingTarget(logits_after), drafter).rounds([1, 2, 3], Sampler(margin=margin), limit=60)
        return [token_id for round in rounds for token_id in round.token_ids]

    alone = output(NoDrafts(), 0.0)
    pool = MemoryPool()
    pool.add(alone)
    assert output(blend(pool), 0.0) != alone  # without it, the tie goes either way
    assert output(blend(pool), 0.2) == alone


def test_a_choice_left_open_after_a_prompt_that_ends_in_an_end_token_is_made() -> None:
    def logits_after(text: tuple[int, ...]) -> torch.Tensor:
        logits = torch.zeros(20)
        logits[len(text) % 7 + 5], logits[3] = 5.0, 4.99  # a near-tie everywhere
        return logits

    pool = MemoryPool()
    pool.add([9, 8, 7, 6, 5])
    target = RoundingTarget(logits_after)
    rounds = Decoder(target, blend(write=pool), width=8).rounds([1, 2], Sampler(margin=0.2), limit=4, end_token_ids={2})
    assert sum(len(round.token_ids) for round in rounds) == 4


def test_nothing_is_drafted_behind_an_end_token() -> None:
    pool = MemoryPool()
    pool.add([5, 6, 2, 7, 8, 9])
    target = ScriptedTarget(lambda text: torch.eye(20)[4])
    first = next(Decoder(target, blend(pool), width=20).rounds([1, 5], Sampler(), limit=9, end_token_ids={2}))
    assert 2 in first.draft.token_ids and 7 not in first.draft.token_ids


def test_models_without_rewinding_warn_and_decode_plainly() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ouroboros = Ouroboros(tiny_model("mamba_plain"), byte_tokenizer())
    assert any("without drafts" in str(warning.message) for warning in caught)
    result = ouroboros.generate("abcabcabc", options=DecodingOptions(max_new_tokens=8))
    assert result.statistics.drafted_tokens == 0
    assert list(result.token_ids) == plain(ouroboros.model, ids("abcabcabc"), 8)


def test_the_wrapped_model_is_unchanged() -> None:
    model = tiny_model("qwen3")
    before = plain(model, ids(PROMPTS[0]), TOKENS)
    forward, generate = model.forward, model.generate
    implementation = model.config._attn_implementation
    with Ouroboros(model, byte_tokenizer()) as ouroboros:
        ouroboros.generate(PROMPTS[0])
    assert (model.forward, model.generate) == (forward, generate)
    assert model.config._attn_implementation == implementation
    assert plain(model, ids(PROMPTS[0]), TOKENS) == before
