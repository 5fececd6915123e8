"""One contract for every target: what a pass leaves pending, what keep commits, what rewinding forgets."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from conftest import ARCHITECTURES, MORE_ARCHITECTURES, STATIC, tiny_model

from ouroboros_llm import ModelError
from ouroboros_llm.decoding.draft_tree import DraftTree
from ouroboros_llm.decoding.target import TargetModel
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.latency import WIDTHS, LatencyModel
from ouroboros_llm.target_model.prepared import Kind, PreparedModel, locked, prepare
from ouroboros_llm.target_model.scripted import ScriptedTarget

pytestmark = pytest.mark.clock

TEXT = [5, 9, 12, 7, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]
TREE = DraftTree((60, 61, 62, 63, 64, 65), (-1, 0, 0, 1, 2, 4), (1.0,) * 6, ("",) * 6, (None,) * 6)

Oracle = Callable[[list[int]], torch.Tensor]


def scripted() -> tuple[TargetModel, Oracle]:
    def logits_after(text: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(70, generator=torch.Generator().manual_seed(hash(text) % 2**31))

    return ScriptedTarget(logits_after), lambda text: logits_after(tuple(text))


def of(architecture: str, kind: Kind = "eager") -> tuple[TargetModel, Oracle]:
    model = tiny_model(architecture)

    def oracle(text: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([text]), use_cache=False).logits[0, -1]

    prepared = prepare(model, kind)
    assert prepared.way.missed is None
    return prepared.start(), oracle


@pytest.fixture(
    params=[
        "scripted",
        *ARCHITECTURES,
        *MORE_ARCHITECTURES,
        *(pytest.param((name, "static"), id=f"{name}-static") for name in STATIC),
    ]
)
def target_and_oracle(request: pytest.FixtureRequest) -> tuple[TargetModel, Oracle]:
    """Every target: one that is computed, and every model in every way that its passes can be made."""
    if request.param == "scripted":
        return scripted()
    return of(request.param) if isinstance(request.param, str) else of(*request.param)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(torch.allclose(left, right, atol=1e-3, rtol=1e-3))


def test_the_protocol_is_met(target_and_oracle: tuple[TargetModel, Oracle]) -> None:
    assert isinstance(target_and_oracle[0], TargetModel)
    assert target_and_oracle[0].cost(1) == 1.0


def test_prefill_gives_the_last_logits_and_leaves_the_last_token_pending(
    target_and_oracle: tuple[TargetModel, Oracle],
) -> None:
    target, oracle = target_and_oracle
    logits = target.prefill(TEXT)
    assert logits.shape[0] == 1 and close(logits[0], oracle(TEXT))
    assert list(target.token_ids) == TEXT[:-1]
    target.keep((0,))
    assert list(target.token_ids) == TEXT


def test_every_node_gets_the_logits_of_its_own_path(target_and_oracle: tuple[TargetModel, Oracle]) -> None:
    target, oracle = target_and_oracle
    tree = {"tree": TREE, "chain": TREE.main_chain(), "none": DraftTree.root(60)}[target.branching]
    target.prefill(TEXT)
    target.keep((0,))
    logits = target.verify(tree)
    assert list(target.token_ids) == TEXT
    for node in range(tree.width):
        path = [tree.token_ids[ancestor] for ancestor in tree.path_to(node)]
        assert close(logits[node], oracle([*TEXT, *path])), node


def test_keep_commits_the_path_and_forgets_the_rest(target_and_oracle: tuple[TargetModel, Oracle]) -> None:
    target, oracle = target_and_oracle
    target.prefill(TEXT)
    target.keep((0,))
    text = list(TEXT)
    for path in ((0, 2, 4), (0,), (0, 2, 4, 5), (0, 1, 3)):
        tree = TREE
        if target.branching != "tree":
            tree, path = DraftTree.chain([60, 62, 64, 65]), tuple(range(len(path)))
        if target.branching == "none":
            tree, path = DraftTree.root(60), (0,)
        target.verify(tree)
        target.keep(path)
        text += [tree.token_ids[node] for node in path]
        assert list(target.token_ids) == text
    assert close(target.verify(DraftTree.root(66))[0], oracle([*text, 66]))


def test_a_second_prefill_is_as_good_as_a_first(target_and_oracle: tuple[TargetModel, Oracle]) -> None:
    """After a pass that was abandoned with nodes pending, for texts that share all, some or nothing."""
    target, oracle = target_and_oracle
    target.prefill(TEXT)
    target.keep((0,))
    for text in ([*TEXT, 30, 31], TEXT[:7], TEXT, [33, *TEXT], [3]):
        target.verify(TREE if target.branching == "tree" else DraftTree.root(60))
        assert close(target.prefill(text)[0], oracle(text))
        target.keep((0,))
        assert list(target.token_ids) == text


@pytest.mark.parametrize("kind", ["eager", "static"])
def test_rewinding_forgets(kind: Kind) -> None:
    target, oracle = of("gemma3_mixed", kind)
    target.prefill(TEXT)
    target.keep((0,))
    target.rewind(5)
    assert list(target.token_ids) == TEXT[:5]
    assert close(target.verify(DraftTree.root(60))[0], oracle([*TEXT[:5], 60]))


def test_a_shared_prefix_is_not_read_twice() -> None:
    target, _ = of("llama")
    assert isinstance(target, EagerTarget)
    target.prefill(TEXT)
    target.keep((0,))
    assert target.common_prefix([*TEXT, 1, 2]) == len(TEXT)
    assert target.common_prefix(TEXT) == len(TEXT) - 1
    assert target.common_prefix([*TEXT[:4], 1, 2]) == 4


@pytest.mark.parametrize("kind", ["eager", "static"])
def test_ids_outside_the_vocabulary_are_verified_as_wrong_guesses(kind: Kind) -> None:
    target, oracle = of("llama", kind)
    target.prefill(TEXT)
    target.keep((0,))
    logits = target.verify(DraftTree.chain([60, 10**9, 61]))
    assert close(logits[0], oracle([*TEXT, 60]))


@pytest.mark.parametrize(
    ("architecture", "branching"),
    [
        ("llama", "tree"),
        ("mistral_sliding", "tree"),
        ("gemma3_mixed", "tree"),
        ("bloom_chains", "chain"),
        ("lfm2_chains", "chain"),
        ("gpt_neo_chains", "chain"),
        ("bamba_plain", "none"),
        ("mamba_plain", "none"),
        ("qwen3_next_plain", "none"),
    ],
)
def test_the_probe_finds_what_a_model_can_verify(architecture: str, branching: str) -> None:
    assert prepare(tiny_model(architecture)).probe.branching == branching


def test_models_that_generate_nothing_are_refused() -> None:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    small = dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    seq2seq = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    for model in (BertModel(BertConfig(**small)), tiny_model().model, T5ForConditionalGeneration(seq2seq)):
        with pytest.raises(ModelError, match=type(model).__name__):
            prepare(model)


def test_costs_come_from_passes_and_a_prior() -> None:
    times = LatencyModel("cpu")
    assert times.one is None
    assert [round(times.cost(width), 2) for width in WIDTHS] == [1.0, 1.0, 1.01, 1.07, 1.38, 2.0, 2.95]
    for _ in range(50):
        times.add(1, 0.1)
        times.add(8, 0.3)
    assert times.cost(1) == 1.0
    assert times.cost(8) == pytest.approx(3.0, rel=0.03) and times.one == pytest.approx(0.1, rel=0.05)
    assert times.cost(12) == pytest.approx(times.cost(8)), "wider than a measured pass is never cheaper"
    times.add(8, 30.0)
    assert times.cost(8) == pytest.approx(3.0, rel=0.06), "a single slow pass hardly counts"


def test_a_slow_stretch_does_not_make_wide_passes_look_dear() -> None:
    times = LatencyModel("cpu")
    for seconds in (0.1, 0.5):
        for _ in range(30):
            times.add(16, 1.38 * seconds)
    assert times.cost(16) == pytest.approx(1.38, rel=0.2)
    assert times.one == pytest.approx(0.5, rel=0.2)


def test_one_token_passes_are_deduced_where_none_was_seen() -> None:
    times = LatencyModel("cpu float32")
    times.add(32, 0.23)
    assert times.one == pytest.approx(0.1)
    assert times.cost(32) == pytest.approx(2.3)


def test_narrow_passes_are_measured_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """All widths are compared with a pass over one token, which a decoder that drafts well seldom runs."""
    widths, add = set[int](), LatencyModel.add
    monkeypatch.setattr(
        LatencyModel, "add", lambda times, width, seconds: (widths.add(width), add(times, width, seconds))
    )
    assert prepare(tiny_model("qwen3", seed=9)).pass_times.one is not None
    assert {1, 2} <= widths


def test_what_is_known_of_a_model_follows_its_state() -> None:
    model = tiny_model("llama", seed=11)
    assert prepare(model).probe.branching == "tree"
    lock = prepare(model).lock
    assert prepare(model).lock is lock
    model.set_attn_implementation("eager")
    assert prepare(model).lock is not lock


def test_locks_are_taken_in_one_order() -> None:
    """Two decoders that use the same two models the other way round must not wait for each other."""
    one, other = prepare(tiny_model("llama")), prepare(tiny_model("qwen3"))

    def work(first: PreparedModel, second: PreparedModel) -> None:
        for _ in range(2000):
            with locked(first, second, None):
                pass

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in ((one, other), (other, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
