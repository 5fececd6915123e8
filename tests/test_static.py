"""Passes of fixed shape: what makes them replayable, and that the model knows nothing of them."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from conftest import STATIC, byte_tokenizer, own_model, plain, tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface

import ouroboros_llm.target_model.prepared
from ouroboros_llm import DecodingOptions, OptionError, Ouroboros
from ouroboros_llm.decoding.draft_tree import MAX_WIDTH, DraftTree, TreeBuilder
from ouroboros_llm.decoding.target import Pass
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.kv_cache import SlotCache, roomy
from ouroboros_llm.target_model.latency import WIDTHS, LatencyModel, padded
from ouroboros_llm.target_model.prepared import PreparedModel, measure, prepare
from ouroboros_llm.target_model.static.attention_backend import AttentionBackend
from ouroboros_llm.target_model.static.forward import StaticForward
from ouroboros_llm.target_model.static.lm_head import Float32LMHead, replace_lm_head
from ouroboros_llm.target_model.static.shared_weights import clone_sharing_weights
from ouroboros_llm.target_model.static.tree_attention import DraftInputs, attend

pytestmark = pytest.mark.clock

CPU = torch.device("cpu")
TEXT = [5 + number * 7 % 90 for number in range(40)]
TREE = DraftTree((60, 61, 62, 63, 64, 65), (-1, 0, 0, 1, 2, 4), (1.0,) * 6, ("",) * 6, (None,) * 6)
OPTIONS = DecodingOptions(max_new_tokens=24)


def read(prepared: PreparedModel, text: list[int] = TEXT) -> Any:
    target = prepared.start()
    target.prefill(text)
    target.keep((0,))
    return target


def static_of(prepared: PreparedModel) -> StaticForward:
    assert prepared.way.static is not None, prepared.way.missed
    return prepared.way.static


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(torch.allclose(left.float(), right.float(), atol=1e-3, rtol=1e-3))


# Recording and replaying.


class NoSynchronization(TorchDispatchMode):
    """Fails on operators that would wait for a device, or bring something there from Python."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "unique", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        name = operator.overloadpacket.__name__
        assert name not in self.REFUSED and "unique" not in name, f"{name} waits for the device"
        assert not (name.startswith("repeat_interleave") and "Tensor" in str(operator)), "its size is on the device"
        if name in ("index", "index_put", "index_put_"):
            picked = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in picked), "how many are picked is on the device"
        return operator(*args, **kwargs or {})


class NoReading(TorchFunctionMode):
    """Fails where Python reads what is on the device by a way that is no operator, or asks for a copy outside it."""

    REFUSED = ("tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__int__", "__float__", "__index__")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(function, "__name__", "") not in self.REFUSED, f"{function.__name__} waits for the device"
        return function(*args, **kwargs or {})


def test_the_check_finds_what_synchronizes() -> None:
    numbers = torch.arange(4)
    for synchronizes in (
        lambda: numbers[0].item(),
        lambda: numbers.tolist(),
        lambda: numbers.to("cpu", torch.float32).numpy(),
        lambda: numbers[numbers > 1],
        lambda: numbers.nonzero(),
        lambda: bool(numbers.sum() > 1),
        lambda: torch.tensor([1, 2]),
        lambda: numbers.repeat_interleave(numbers),
    ):
        with pytest.raises(AssertionError, match="device"), NoSynchronization(), NoReading():
            synchronizes()


@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("architecture", [name for name in STATIC if name != "gpt2"])
def test_a_step_never_waits_for_the_device(architecture: str, width: int) -> None:
    """GPT-2 looks for padding in every pass, except while one is recorded."""
    prepared = prepare(tiny_model(architecture), "static")
    target, static = read(prepared), static_of(prepared)
    target.verify(DraftTree.chain([60] * width))
    with torch.inference_mode():
        nodes = static.filled(padded(width), DraftTree.chain([60] * width), len(TEXT), target.cache)
        states = static.shown(nodes, target.cache)
        with NoSynchronization() as watched, NoReading():
            static.step(nodes, states)
    assert watched.operators > 20


@pytest.mark.parametrize("architecture", STATIC)
def test_a_step_is_one_graph(architecture: str) -> None:
    prepared = prepare(tiny_model(architecture), "static")
    target, static = read(prepared), static_of(prepared)
    with torch.inference_mode():
        target.cache.reserve(len(TEXT) + 8)
        nodes = static.filled(8, TREE, len(TEXT), target.cache)
        states = static.shown(nodes, target.cache)
        torch._dynamo.reset()
        found = torch._dynamo.explain(static.step)(nodes, states)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_one_pass_after_the_other_uses_the_same_tensors() -> None:
    """What a recorded pass reads must not move, whatever the draft, the text and whose text it is."""
    prepared = prepare(tiny_model(), "static")
    static = static_of(prepared)
    seen = set()
    for text in (TEXT, TEXT[:7]):
        target = read(prepared, text)
        for draft in (TREE, DraftTree.chain([60] * 8), DraftTree.chain([60] * 5)):
            target.verify(draft)
            target.rewind(len(text))
            seen.add((static._nodes[8].ids.data_ptr(), static._nodes[8].slots.data_ptr()))
    assert len(seen) == 1


def test_buffers_grow_in_steps_and_their_text_goes_on() -> None:
    prepared, oracle = prepare(tiny_model(), "static"), prepare(tiny_model(), "eager")
    text = [5 + number * 7 % 90 for number in range(240)]
    target = read(prepared, text)
    capacities = []
    while len(target.token_ids) < 400:
        logits = target.verify(TREE)
        capacities.append(target.cache.capacity)
        target.keep((0, 2, 4, 5))
    assert sorted({*capacities}) == [256, 384, 512] == sorted({roomy(size) for size in (255, 257, 400)})
    text = list(target.token_ids)
    assert close(logits[5], read(oracle, text[:-1]).verify(DraftTree.root(text[-1]))[0])
    assert all(layer.capacity == capacities[-1] for layer in target.cache.states.layers)


def test_buffers_that_grew_unevenly_are_made_even() -> None:
    """As they are left where memory ran out between keys and values."""
    target = read(prepare(tiny_model(), "static"))
    layer = target.cache.states.layers[1]
    layer.keys = layer._resized(layer.keys, 384)
    logits = target.verify(TREE)
    assert {tensor.shape[2] for one in target.cache.states.layers for tensor in (one.keys, one.values)} == {256}
    assert close(logits, read(prepare(tiny_model(), "eager")).verify(TREE))


def test_capacities_are_few() -> None:
    sizes = sorted({roomy(size) for size in range(1, 100_000)})
    assert sizes[:6] == [256, 384, 512, 768, 1024, 1536]
    assert all(other / one <= 1.5 for one, other in zip(sizes, sizes[1:], strict=False))
    assert all(roomy(size) == size for size in sizes)


def test_drafts_are_padded_and_cost_what_their_padding_costs() -> None:
    assert [padded(width) for width in (1, 2, 3, 5, 9, 17, 33, 64)] == [1, 2, 4, 8, 16, 32, 64, 64]
    times = LatencyModel("cpu float32", padded=True)
    for width in range(1, MAX_WIDTH + 1):
        assert times.cost(width) == times.cost(padded(width))
    assert [times.cost(width) for width in WIDTHS] == [LatencyModel("cpu float32").cost(width) for width in WIDTHS]
    for _ in range(50):
        times.add(1, 0.1)
        times.add(5, 0.5)
    assert times.cost(4) < times.cost(5) == times.cost(8) == pytest.approx(5.0, rel=0.05)


# What nodes see.


def wide_tree() -> DraftTree:
    builder = TreeBuilder(5, MAX_WIDTH)
    while builder.room:
        builder.add((len(builder.token_ids) * 7) % len(builder.token_ids) // 2, 10 + builder.room, 0.5, "")
    return builder.build()


@pytest.mark.parametrize("window", [None, 9])
def test_nodes_see_the_text_and_their_ancestors(window: int | None) -> None:
    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query - key < (window or 10**6))

    tree, length, slots = wide_tree(), 20, 128
    nodes = DraftInputs(MAX_WIDTH, CPU)
    nodes.fill(tree, length, 1000)
    seen = nodes.seen(sees, slots)[0, 0]
    for node in range(tree.width):
        position = length + tree.depths[node]
        wanted = {slot for slot in range(length) if position - slot < (window or 10**6)}
        wanted |= {
            length + other for other in tree.path_to(node) if tree.depths[node] - tree.depths[other] < (window or 10**6)
        }
        assert {*seen[node].nonzero().flatten().tolist()} == wanted


def test_padding_sees_itself_alone_so_that_no_number_is_missing() -> None:
    nodes = DraftInputs(8, CPU)
    nodes.fill(TREE, 20, 1000)
    seen = nodes.seen(lambda b, h, query, key: key <= query, 64)[0, 0, TREE.width :]
    assert seen[:, 20:].sum(-1).tolist() == [1, 1]
    assert seen[0, 26] and seen[1, 27]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_is_the_formula(softcap: float | None, sinks: bool) -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(1, 6, 4, 8), torch.randn(1, 3, 20, 8), torch.randn(1, 3, 20, 5)
    seen = torch.rand(1, 1, 4, 20) < 0.6
    sink = torch.randn(6) if sinks else None
    found = attend(query, key, value, seen, 0.3, softcap, sink)
    for head in range(6):
        scores = query[0, head] @ key[0, head // 2].T * 0.3
        scores = (torch.tanh(scores / softcap) * softcap if softcap else scores).masked_fill(~seen[0, 0], -torch.inf)
        shares = scores.exp()
        total = shares.sum(-1, keepdim=True) + (sink[head].exp() if sink is not None else 0)
        assert close(found[0, :, head], shares / total @ value[0, head // 2])


# The model is its owner's.


def test_whoever_calls_the_model_during_a_pass_gets_what_it_always_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = own_model()
    ids = torch.tensor([TEXT])
    with torch.no_grad():
        alone = model(ids).logits
    during = []
    attend_as_told = AttentionBackend.attend

    def meanwhile(self: AttentionBackend, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            during.append(model(ids).logits)
        return attend_as_told(self, *args, **kwargs)

    with Ouroboros(model, byte_tokenizer(), target="static") as ouroboros:
        ouroboros.generate(TEXT, options=OPTIONS)
        monkeypatch.setattr(AttentionBackend, "attend", meanwhile)
        attending = static_of(ouroboros._prepared)._attending
        # What is registered is bound already.
        AttentionInterface.register(attending.name, lambda *args, **kwargs: meanwhile(attending, *args, **kwargs))
        result = ouroboros.generate(TEXT, scope="another", options=OPTIONS)
    assert list(result.token_ids) == plain(model, TEXT, 24)
    assert during and all(torch.equal(logits, alone) for logits in during)


def test_the_wrapped_model_is_as_it_was() -> None:
    model = own_model("gemma3_mixed")
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    modules, config = {id(module) for module in model.modules()}, model.config.to_dict()
    said = plain(model, TEXT, 24)
    with Ouroboros(model, byte_tokenizer(), target="static") as ouroboros:
        assert list(ouroboros.generate(TEXT, options=OPTIONS).token_ids) == said
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before
    assert {id(module) for module in model.modules()} == modules and model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert plain(model, TEXT, 24) == said


def test_weights_that_are_changed_in_place_are_changed_for_both() -> None:
    model = own_model()
    twin = clone_sharing_weights(model)
    assert {id(parameter) for parameter in twin.parameters()} == {id(parameter) for parameter in model.parameters()}
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}
    with Ouroboros(model, byte_tokenizer(), target="static") as ouroboros:
        ouroboros.generate(TEXT, options=OPTIONS)
        with torch.no_grad():
            for parameter in model.model.layers[0].parameters():
                parameter.mul_(0.5)
        result = ouroboros.generate([9, *TEXT], scope="c", options=OPTIONS)
        assert list(result.token_ids) == plain(model, [9, *TEXT], 24)


def test_modules_that_were_put_in_others_places_are_seen_by_who_wraps_the_model_again() -> None:
    model = own_model()
    for _ in range(2):
        with Ouroboros(model, byte_tokenizer(), target="static") as ouroboros:
            assert list(ouroboros.generate(TEXT, options=OPTIONS).token_ids) == plain(model, TEXT, 24)
        # As an adapter does.
        layer = model.model.layers[0].mlp
        layer.up_proj = torch.nn.Sequential(layer.up_proj, torch.nn.Linear(48, 48))


def test_parts_of_a_twin_s_configuration_are_its_own() -> None:
    model = own_model()
    twin = clone_sharing_weights(model)
    configs = {id(module.config) for module in twin.modules() if hasattr(module, "config")}
    assert configs == {id(twin.config)} and twin.config is not model.config


def test_a_model_that_nobody_holds_is_freed_and_its_name_forgotten() -> None:
    model = own_model()
    name = static_of(prepare(model, "static"))._attending.name
    assert name in AttentionInterface() and name in AttentionMaskInterface()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert name not in AttentionInterface() and name not in AttentionMaskInterface()


# Which models, and who asks.


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("falcon", "0 of 2 layers use the library's attention interface"),
        ("bloom_chains", "it cannot verify drafts with branches"),
    ],
)
def test_models_with_attention_of_their_own_say_so_and_run_as_before(architecture: str, reason: str) -> None:
    model = tiny_model(architecture)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ouroboros = Ouroboros(model, byte_tokenizer(), target="static")
    (message,) = [str(one.message) for one in caught if "fixed shape" in str(one.message)]
    assert reason in message and "\n" not in message
    assert isinstance(ouroboros._prepared.start(), EagerTarget) and ouroboros._prepared.way.static is None
    for prompt in (TEXT, [7, 8] * 9):
        assert list(ouroboros.generate(prompt, options=OPTIONS).token_ids) == plain(model, prompt, 24)
    ouroboros.close()


def test_attention_that_moved_to_the_interface_is_used() -> None:
    """GPT-J attended by code of its own before transformers 5.24."""
    model = tiny_model("gptj")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ouroboros = Ouroboros(model, byte_tokenizer(), target="static")
    for prompt in (TEXT, [7, 8] * 9):
        assert list(ouroboros.generate(prompt, options=OPTIONS).token_ids) == plain(model, prompt, 24)
    ouroboros.close()


def test_such_a_model_would_be_wrong_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: the library itself runs them under any name."""
    model = tiny_model("falcon")
    static = StaticForward(model)
    static._layers = 0
    target = EagerTarget(model, "tree", static=static)
    target.prefill(TEXT)
    target.keep((0,))
    wrong = target.verify(TREE)
    assert not close(wrong, read(prepare(model, "eager")).verify(TREE))


def test_weights_on_several_devices_are_left_to_the_library() -> None:
    model = own_model()
    model.hf_device_map = {"": 0}
    found = prepare(model, "static")
    assert found.way.missed is not None and "devices" in found.way.missed
    assert found.start().branching == "tree"


@pytest.mark.parametrize("wrong", ["graphed", "", None, 1])
def test_other_targets_are_refused(wrong: Any) -> None:
    with pytest.raises(OptionError, match="target must be 'auto', 'eager' or 'static', but got"):
        Ouroboros(tiny_model(), byte_tokenizer(), target=wrong)


def test_draft_models_are_run_in_the_same_way() -> None:
    model, draft = tiny_model(), tiny_model(seed=1)
    with Ouroboros(model, byte_tokenizer(), draft_model=draft, target="static") as ouroboros:
        assert ouroboros._draft is not None and ouroboros._draft.way.static is not None
        assert list(ouroboros.generate(TEXT, options=OPTIONS).token_ids) == plain(model, TEXT, 24)


def test_one_model_may_be_wrapped_in_both_ways() -> None:
    model = tiny_model()
    ways = [prepare(model, kind) for kind in ("eager", "static", "eager")]
    assert ways[0].lock is ways[1].lock and ways[0].way is ways[2].way
    assert ways[0].pass_times is not ways[1].pass_times and ways[0].fingerprint == ways[1].fingerprint


@pytest.mark.parametrize("wins", [[True] * 5, [False], [True, True, False]])
def test_on_a_cpu_the_faster_way_is_taken(wins: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    races = iter([seconds for won in wins for seconds in ((0.8, 1.0) if won else (1.0, 1.0))])
    monkeypatch.setattr(ouroboros_llm.target_model.prepared, "_seconds", lambda target: next(races))
    monkeypatch.setattr(ouroboros_llm.target_model.prepared, "_LONG", 10.0)
    model = own_model("qwen3")
    assert prepare(model).way.static is None, "nothing is raced before an answer"
    assert len(list(measure(model))) == 4 + len(wins), "others' requests come between the steps of the probe too"
    assert next(races, None) is None, "the first race that is lost is the last"
    chosen = prepare(model)
    assert (chosen.way.static is not None) is all(wins)
    assert prepare(model).way is chosen.way
    assert list(measure(model)) == [], "a race is run once"


def test_long_passes_are_not_raced_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ouroboros_llm.target_model.prepared, "_LONG", 0.0)
    monkeypatch.setattr(ouroboros_llm.target_model.prepared, "StaticForward", None)
    model = own_model("qwen3")
    prepare(model)
    assert list(measure(model)) == [] and prepare(model).way.static is None


def test_passes_of_fixed_shape_are_made_with_others_too() -> None:
    """In a pass over several texts the library attends; it goes on from the same slots."""
    prepared, oracle = prepare(tiny_model("qwen2"), "static"), prepare(tiny_model("qwen2"), "eager")
    targets = [read(prepared, text) for text in (TEXT, TEXT[:9])]
    assert prepared.packer is not None
    logits = prepared.packer.together([Pass(target, TREE) for target in targets])
    for target, text, found in zip(targets, (TEXT, TEXT[:9]), logits, strict=True):
        assert close(found, read(oracle, text).verify(TREE))
        target.keep((0, 2, 4))
        text = [*text, 60, 62, 64]
        assert list(target.token_ids) == text
        assert close(target.verify(TREE), read(oracle, text).verify(TREE))


def test_forks_and_cut_texts_go_on() -> None:
    prepared, oracle = prepare(tiny_model("mistral_sliding"), "static"), prepare(tiny_model("mistral_sliding"), "eager")
    target = read(prepared)
    target.verify(TREE)
    target.keep((0, 1, 3))
    fork = target.fork(30)
    target.shrink(20)
    assert isinstance(target.cache, SlotCache) and target.cache.capacity == 20
    for one, length in ((fork, 30), (target, 20), (fork, 30)):
        assert close(one.verify(TREE), read(oracle, TEXT[:length]).verify(TREE))
        one.rewind(length)


# The output head.


def head_and_states(bias: bool) -> tuple[torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(3)
    head = torch.nn.Linear(32, 500, bias=bias, dtype=torch.bfloat16)
    return head, torch.randn(2, 6, 32, dtype=torch.bfloat16) * 8


@pytest.mark.parametrize("bias", [False, True])
def test_the_likeliest_logits_are_computed_in_single_precision(bias: bool) -> None:
    head, states = head_and_states(bias)
    exact = states.float() @ head.weight.float().T + (head.bias.float() if bias else 0)
    logits = Float32LMHead(head)(states)
    assert logits.dtype == torch.float32
    found, wanted = logits.topk(4), exact.topk(4)
    assert torch.equal(found.indices, wanted.indices)
    assert torch.allclose(found.values, wanted.values, atol=1e-4)
    assert float((logits - exact).abs().max()) <= float(exact.abs().max()) / 128
    assert not torch.allclose(head(states).float().topk(4).values, wanted.values, atol=1e-3), "half precision is not"


def test_no_rounded_logit_overtakes_an_exact_one() -> None:
    head, states = head_and_states(False)
    with torch.no_grad():
        head.weight[100:] = head.weight[100] * (1 + torch.linspace(0, 2**-9, 400)[:, None])
    logits = Float32LMHead(head)(states)
    computed = head(states).float().topk(8).indices
    best = logits.argmax(-1, keepdim=True)
    assert bool((logits.gather(-1, best) <= logits.gather(-1, computed).amax(-1, keepdim=True)).all())


def test_a_head_in_single_precision_shares_its_weights() -> None:
    model = own_model().bfloat16()
    twin = clone_sharing_weights(model)
    assert replace_lm_head(twin)
    head = twin.get_output_embeddings()
    assert isinstance(head, Float32LMHead) and head.weight is model.get_output_embeddings().weight
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert twin(torch.tensor([TEXT])).logits.dtype == torch.float32
    assert not replace_lm_head(clone_sharing_weights(own_model()))


@pytest.mark.parametrize("architecture", ["qwen2", "gpt_neox", "phi", "gemma2_softcap"])
def test_in_half_precision_prompts_and_drafts_get_logits_in_single(architecture: str) -> None:
    model = own_model(architecture).bfloat16()
    prepared = prepare(model, "static")
    target = prepared.start()
    prompt = target.prefill(TEXT)
    target.keep((0,))
    logits = target.verify(TREE)
    assert prompt.dtype == logits.dtype == torch.float32
    with Ouroboros(model, byte_tokenizer(), target="static") as ouroboros:
        result = ouroboros.generate(TEXT, options=DecodingOptions(max_new_tokens=24, exact=True))
        alone = ouroboros.generate(TEXT, scope="c", options=DecodingOptions(max_new_tokens=24, max_draft_tokens=0))
    assert result.token_ids == alone.token_ids
