"""The walk down a draft on the device: it is that of `accept`, keys and values are moved, and a round reads once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import STATIC, blend, byte_tokenizer, plain, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graphed import ByAddress, Repeating, bushy, close, read
from test_static import TEXT, TREE, NoReading, NoSynchronization
from torch.overrides import TorchFunctionMode

from ouroboros_llm import DecodingOptions, Ouroboros
from ouroboros_llm.decoding.decoder import Decoder, likeliest_tokens
from ouroboros_llm.decoding.draft_tree import MAX_WIDTH, DraftTree
from ouroboros_llm.decoding.drafter import Round
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.decoding.target import DeviceAcceptance, GreedyAcceptance, Pass
from ouroboros_llm.decoding.verification import accept
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.latency import padded
from ouroboros_llm.target_model.prepared import prepare
from ouroboros_llm.target_model.static import device_accept as walk
from ouroboros_llm.target_model.static.forward import StaticForward
from ouroboros_llm.target_model.static.in_place import PointerAttention
from ouroboros_llm.target_model.static.tree_attention import DraftInputs

CPU = torch.device("cpu")
VOCABULARY = 5


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Of few tokens, so that many guesses are right; siblings may be equal, tokens may be unknown."""
    width = draw(st.integers(1, MAX_WIDTH))
    parents = (
        -1,
        *(draw(st.integers(max(0, node - draw(st.sampled_from([1, 3, 64]))), node - 1)) for node in range(1, width)),
    )
    token_ids = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 10**9]), min_size=width, max_size=width)))
    return DraftTree(token_ids, parents, (1.0,) * width, ("",) * width, (None,) * width)


def walked(
    tree: DraftTree, logits: torch.Tensor, greedy: GreedyAcceptance, length: int = 7
) -> tuple[DeviceAcceptance, list[int]]:
    """The walk, and the order of the nodes behind the text."""
    nodes = DraftInputs(padded(tree.width), CPU)
    nodes.fill(tree, length, VOCABULARY, guesses=greedy.guesses(tree))
    logits = torch.cat([logits, torch.ones(nodes.width - tree.width, logits.shape[1])])
    likeliest = logits.argmax(-1)
    path = walk.accepted(nodes, likeliest)
    row = walk.found(path, likeliest, logits, nodes, greedy.count)
    return walk.read(row, nodes.width, tree.width), walk.order(nodes, path).tolist()


@settings(max_examples=400)
@given(
    tree=trees(),
    seed=st.integers(0, 2**20),
    levels=st.integers(1, 4),
    limit=st.integers(1, 70),
    ends=st.sets(st.integers(0, VOCABULARY - 1), max_size=2),
    successors=st.sampled_from([0, 1, 2, 4, 8]),
)
def test_the_walk_is_that_of_accept(
    tree: DraftTree, seed: int, levels: int, limit: int, ends: set[int], successors: int
) -> None:
    """Few levels of logits make ties, few tokens make guesses that are right."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (tree.width, VOCABULARY), generator=random).float()
    likeliest, wanted = likeliest_tokens(logits, successors)
    told = accept(tree, lambda node, _: likeliest[node], limit=limit, end_token_ids=ends)
    found, order = walked(tree, logits, GreedyAcceptance(limit, ends, successors))
    assert found.path == told.path
    assert found.likeliest == likeliest
    # Which of equal logits come first among the few is left open; their chances are not.
    assert [[chance for _, chance in row] for row in found.successors] == [
        [chance for _, chance in row] for row in wanted
    ]
    assert order == [*told.path, *range(len(told.path), padded(tree.width))]


def test_right_guesses_are_followed_to_the_end_of_the_widest_draft() -> None:
    """Guards the test above: its paths are short. The sign of a 64-bit number is a node too."""
    chain = DraftTree.chain([number % VOCABULARY for number in range(MAX_WIDTH)])
    logits = torch.nn.functional.one_hot(torch.tensor([(number + 1) % VOCABULARY for number in range(MAX_WIDTH)]))
    found, order = walked(chain, logits.float(), GreedyAcceptance(100))
    assert found.path == tuple(order) == tuple(range(MAX_WIDTH))
    assert walked(chain, logits.float(), GreedyAcceptance(9))[0].path == tuple(range(9))
    assert walked(chain, logits.float(), GreedyAcceptance(100, {4}))[0].path == (0, 1, 2, 3)


# Targets.


def guided(model: Any, text: list[int], count: int = 5) -> DraftTree:
    """A tree whose accepted path is not its first nodes: a wrong guess stands before every right one."""
    said = plain(model, [*text, 60], count)
    token_ids, parents, last = [60], [-1], 0
    for token_id in said:
        token_ids += [(token_id + 1) % 263, token_id]
        parents += [last, last]
        last = len(token_ids) - 1
    width = len(token_ids)
    return DraftTree(tuple(token_ids), tuple(parents), (1.0,) * width, ("",) * width, (None,) * width)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("architecture", STATIC)
def test_keys_and_values_of_the_path_are_moved_in_the_pass(architecture: str, recorded: bool) -> None:
    model = tiny_model(architecture)
    static = StaticForward(model, PointerAttention(ByAddress), Repeating()) if recorded else StaticForward(model)
    target = read(EagerTarget(model, "tree", static=static), TEXT)
    for _ in range(2):
        text = list(target.token_ids)
        tree = guided(model, text)
        found = target.walk(tree, GreedyAcceptance(5, successors=8))
        assert isinstance(found, DeviceAcceptance) and found.path == (0, 2, 4, 6, 8)
        target.keep(found.path)
        oracle = read(EagerTarget(model, "tree"), list(target.token_ids))
        assert target.token_ids == [*text, *(tree.token_ids[node] for node in found.path)]
        assert close(target.verify(bushy(6)), oracle.verify(bushy(6)))
        target.rewind(len(target.token_ids))


def test_only_the_path_of_a_walk_can_be_kept() -> None:
    target = read(prepare(tiny_model(), "static").start(), TEXT)  # type: ignore[arg-type]
    tree = guided(tiny_model(), TEXT)
    assert target.walk(tree, GreedyAcceptance(9)).path == (0, 2, 4, 6, 8, 10)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"were accepted, but \(0, 1\) are to be kept"):
        target.keep((0, 1))
    target.keep((0, 2))
    assert target.token_ids == [*TEXT, 60, tree.token_ids[2]]
    target.walk(tree, GreedyAcceptance(9))
    target.rewind(len(TEXT))
    target.verify(tree)
    target.keep((0, 1))
    assert target.token_ids == [*TEXT, 60, tree.token_ids[1]]


def test_the_library_s_forward_gives_logits() -> None:
    target = read(prepare(tiny_model(), "eager").start(), TEXT)  # type: ignore[arg-type]
    assert isinstance(Pass(target, TREE, greedy=GreedyAcceptance(5)).make(), torch.Tensor)
    fresh = prepare(tiny_model(), "static").start()
    assert isinstance(Pass(fresh, DraftTree.root(5), greedy=GreedyAcceptance(5)).make(), torch.Tensor), (
        "there are no buffers yet"
    )


@pytest.mark.parametrize(
    ("asked", "walks"),
    [
        ({}, True),
        ({"repetition_penalty": 1.1}, False),
        ({"temperature": 0.7, "seed": 1}, False),
        ({"exact": True}, False),
        ({"logit_bias": {5: 1.0}}, False),
    ],
)
def test_what_is_not_the_likeliest_token_is_chosen_from_logits(
    asked: dict[str, Any], walks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    kept = EagerTarget.walk
    monkeypatch.setattr(EagerTarget, "walk", lambda *given: made.append(kept(*given)) or made[-1])
    with Ouroboros(tiny_model(), byte_tokenizer(), target="static") as ouroboros:
        options = DecodingOptions(max_new_tokens=24, **asked)
        for prompt in (TEXT, [7, 8, 9] * 8):
            told = ouroboros.generate(prompt, options=options).token_ids
            monkeypatch.setattr(Sampler, "plain", property(lambda sampler: False))
            assert ouroboros.generate(prompt, scope="c", options=options).token_ids == told
            monkeypatch.undo()
            monkeypatch.setattr(EagerTarget, "walk", lambda *given: made.append(kept(*given)) or made[-1])
    assert bool(made) is walks and all(isinstance(found, DeviceAcceptance) for found in made)


# Waiting for the device.


class Reads(TorchFunctionMode):
    """Counts what `NoReading` fails on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in NoReading.REFUSED:
            self.names.append(function.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("successors", [0, 8])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_greedy_round_waits_for_the_device_once(recorded: bool, successors: int) -> None:
    """From the draft to what was learned, keys and values moved."""
    model = tiny_model()
    static = StaticForward(model, recorder=Repeating() if recorded else None)
    target = EagerTarget(model, "tree", static=static)
    prompt = [7, 8, 9] * 8
    # The first answer makes buffers, and recordings of every width that there will be.
    for again in (False, True):
        decoder = Decoder(target, blend(), width=8, successors=successors)
        steps = decoder.steps(prompt, Sampler(), limit=40, end_token_ids={2})
        said: list[int] = []
        rounds = 0
        for step in steps:
            if isinstance(step, Round):
                said += step.token_ids
                break
        while True:
            with NoSynchronization() as watched, Reads() as reads:
                step = next((step for step in steps if isinstance(step, Round)), None)
            if step is None:
                break
            assert not again or (reads.names == ["tolist"] and watched.operators > 20)
            rounds += 1
            said += step.token_ids
        assert said == plain(model, prompt, 40)
    assert rounds > 3


@pytest.mark.parametrize("architecture", ["llama", "gemma3_mixed", "gpt_oss"])
def test_a_pass_with_its_walk_is_one_graph_that_never_waits(architecture: str) -> None:
    prepared = prepare(tiny_model(architecture), "static")
    static, target = prepared.way.static, read(prepared.start(), TEXT)  # type: ignore[arg-type]
    assert static is not None
    with torch.inference_mode():
        target.cache.reserve(len(TEXT) + 8)  # type: ignore[attr-defined]
        nodes = static.filled(8, TREE, len(TEXT), target.cache, GreedyAcceptance(9).guesses(TREE))  # type: ignore[arg-type]
        states = static.shown(nodes, target.cache)  # type: ignore[arg-type]

        def walking(nodes: DraftInputs, states: Any) -> torch.Tensor:
            return static.walked(nodes, states, static.step(nodes, states), 8, True)

        with NoSynchronization(), NoReading():
            row = walking(nodes, states)
        torch._dynamo.reset()
        found = torch._dynamo.explain(walking)(nodes, states)
    assert row.shape == (1 + 8 + 2 * 8 * 8,)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_nodes_are_moved_by_the_kernel_though_they_overlap() -> None:
    pytest.importorskip("triton", reason="no Triton")
    from ouroboros_llm.target_model.kernels import attention as kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    buffers = [torch.randn(1, heads, 80, size, device=device) for heads, size in ((3, 8), (2, 5), (3, 8))]
    wanted = [buffer.clone() for buffer in buffers]
    order = torch.tensor([0, 2, 5, 3, 4, 5, 6, 7], device=device)
    for place in (0, 2):
        wanted[place][:, :, 20:28] = buffers[place][:, :, 20 + order].clone()
    nodes = DraftInputs(8, device, 2)
    nodes.fill(TREE, 20, 1000, 80, [*(buffer.data_ptr() for buffer in buffers), 0])
    kernels.move_nodes(nodes.placed, order, torch.tensor([0, 2], device=device), buffers[0][0, 0, 0], 3)
    assert all(torch.equal(*pair) for pair in zip(buffers, wanted, strict=True))
