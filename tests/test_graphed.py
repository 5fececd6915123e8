"""Recorded passes: what is recorded when, that replays serve every text, and the kernels, interpreted where there is no
device for them."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import STATIC, blend, byte_tokenizer, plain, tiny_model
from transformers import masking_utils

from ouroboros_llm import DecodingOptions, Ouroboros
from ouroboros_llm.decoding.decoder import Decoder, _fetched, likeliest_tokens
from ouroboros_llm.decoding.draft_tree import MAX_WIDTH, DraftTree, TreeBuilder
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.decoding.target import GreedyAcceptance
from ouroboros_llm.target_model.capabilities import Probe, probe_static
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.kv_cache import SlotLayer
from ouroboros_llm.target_model.latency import LatencyModel, PassTimer
from ouroboros_llm.target_model.prepared import prepare
from ouroboros_llm.target_model.static.cuda_graphs import CudaGraphs
from ouroboros_llm.target_model.static.forward import StaticForward
from ouroboros_llm.target_model.static.in_place import PointerAttention, first_seen, reach_of
from ouroboros_llm.target_model.static.tree_attention import CachePointers, DraftInputs, attend

CPU = torch.device("cpu")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
needs_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA device")
TEXT = [5 + number * 7 % 90 for number in range(40)]
TREE = DraftTree((60, 61, 62, 63, 64, 65), (-1, 0, 0, 1, 2, 4), (1.0,) * 6, ("",) * 6, (None,) * 6)


class Repeating:
    """A recorder without a device: to replay is to do it again, in the tensors that there are by then."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        run()

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


class Failing(Repeating):
    """Fails as a device does that is asked to wait during a recording."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of this")


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The kernels: on the device, or interpreted."""
    pytest.importorskip("triton", reason="no Triton")
    from ouroboros_llm.target_model.kernels import attention as kernels

    return kernels


def by_address(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor,
    placed: CachePointers,
    layer: int,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the kernels compute, by plain operations on the memory that lies at the addresses."""
    length, slots, width = int(placed.length), int(placed.capacity), query.shape[2]
    buffers = []
    for address, states in zip(placed.buffers[2 * layer : 2 * layer + 2].tolist(), (key, value), strict=True):
        shape = (1, states.shape[1], slots, states.shape[3])
        memory = (ctypes.c_float * math.prod(shape)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.float32).view(shape)
        buffer[:, :, length : length + width] = states
        buffers.append(buffer)
    nodes = DraftInputs(width, CPU)
    nodes.length, nodes.lineage, nodes.positions = placed.length, placed.lineage, placed.positions[None]

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key >= first[:, None])

    return attend(query, *buffers, nodes.seen(sees, slots), scaling, softcap, sinks)


def move_by_address(
    placed: CachePointers, order: torch.Tensor, places: torch.Tensor, like: torch.Tensor, heads: int
) -> None:
    length, slots, width = int(placed.length), int(placed.capacity), len(order)
    for address in placed.buffers[places].tolist():
        shape = (heads, slots, len(like))
        memory = (ctypes.c_float * math.prod(shape)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.float32).view(shape)
        buffer[:, length : length + width] = buffer[:, length + order].clone()


ByAddress = SimpleNamespace(attend_in_place=by_address, move_nodes=move_by_address)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(torch.allclose(left.float().cpu(), right.float().cpu(), atol=1e-3, rtol=1e-3))


def bushy(width: int) -> DraftTree:
    builder = TreeBuilder(5, width)
    while builder.room:
        builder.add((len(builder.token_ids) * 7) % len(builder.token_ids) // 2, 10 + builder.room, 0.5, "")
    return builder.build()


def read(target: EagerTarget, text: list[int]) -> EagerTarget:
    target.prefill(text)
    target.keep((0,))
    return target


# Recording.


def test_the_widest_is_recorded_first_and_each_width_once() -> None:
    recorder, made = Repeating(), list[int]()
    recordings = CudaGraphs(recorder)

    def step(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(width)
        return torch.full((width, 3), float(len(made))), torch.full((2 * width + 1,), len(made))

    for width in (8, 8, 1, 8):
        assert not recordings.complete(1) or width != 1
        logits, row = recordings.run(width, step)
        assert logits.shape == (width, 3) and float(logits[0, 0]) == len(made)
        assert row.shape == (2 * width + 1,) and set(row.tolist()) == {len(made)}
    assert recorder.recorded == 3 and recorder.replayed == 4
    assert made[:2] == [MAX_WIDTH] * 2 and recordings.complete(8) and not recordings.complete(4)
    recordings.run(8, step, "another")
    assert recorder.recorded == 5 and recordings.complete(8, "another") and not recordings.complete(1, "another")


def test_what_cannot_be_recorded_is_said_once_and_made_anew() -> None:
    recordings = CudaGraphs(Failing())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert recordings.run(4, lambda width: (torch.ones(width, 2),))[0].shape == (4, 2)
    (warning,) = caught
    assert "operation not permitted when stream is capturing)" in str(warning.message)
    assert recordings.complete(4)


def test_memory_that_runs_out_is_no_reason_to_stop_recording() -> None:
    class Full(Repeating):
        def record(self, run: Callable[[], None]) -> Callable[[], None]:
            raise torch.OutOfMemoryError("out of memory")

    recordings = CudaGraphs(Full())
    with pytest.raises(torch.OutOfMemoryError):
        recordings.run(4, lambda width: (torch.ones(width, 2),))
    assert not recordings.complete(4)


def test_passes_that_are_recorded_first_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = tiny_model("qwen2"), Repeating()
    times, added = LatencyModel("cpu float32", padded=True), list[int]()
    monkeypatch.setattr(times, "add", lambda width, seconds: added.append(width))
    target = read(EagerTarget(model, "tree", times, static=StaticForward(model, recorder=recorder)), TEXT)
    for width in (5, 6, 1, 1, 8):
        target.verify(DraftTree.chain([60] * width))
        target.rewind(len(TEXT))
    assert added == [6, 1, 8] and recorder.recorded == 3


def test_a_clock_asks_a_device_only_for_what_is_over() -> None:
    class Event:
        over = False

        def query(self) -> bool:
            return self.over

        def elapsed_time(self, other: Any) -> float:
            return 500.0

    times, event = LatencyModel("cuda"), Event()
    clock = PassTimer(times)
    clock._running.append((1, Event(), event))
    clock.settle()
    assert times.one is None
    event.over = True
    clock.settle()
    assert times.one == pytest.approx(0.5) and not clock._running


def test_what_a_round_needs_is_fetched_in_one_copy() -> None:
    torch.manual_seed(2)
    logits = torch.randn(7, 50)
    logits[3, 5] = logits[3, 9] = 9.0
    likeliest, successors = likeliest_tokens(logits, 4)
    found, top, ids = _fetched(logits, *logits.topk(4))
    assert found == likeliest == logits.argmax(-1).tolist()
    chances = top.float().softmax(-1).tolist()
    assert tuple(tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), chances, strict=True)) == successors


# Kernels.


CASES = {
    "one node": (1, 6, 2, 16, 16, 70, None, None, False),
    "a tree": (8, 6, 2, 24, 16, 20, None, None, False),
    "a window": (16, 4, 4, 16, 16, 150, 9, None, False),
    "caps and sinks": (8, 4, 2, 16, 16, 100, 33, 3.0, True),
    "a short text": (4, 2, 1, 8, 8, 1, None, None, True),
    "as wide as can be": (64, 4, 1, 16, 16, 90, None, None, False),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_what_plain_operations_do(case: str, kernels: Any) -> None:
    width, heads, key_heads, size, value_size, length, window, softcap, sinks = CASES[case]
    torch.manual_seed(0)
    slots, nodes = 256, DraftInputs(width, DEVICE)
    nodes.fill(bushy(width), length, 1000, slots)
    keys, values = (torch.randn(1, key_heads, slots, wide, device=DEVICE) for wide in (size, value_size))
    query, key, value = (
        torch.randn(1, width, count, wide, device=DEVICE).transpose(1, 2)
        for count, wide in ((heads, size), (key_heads, size), (key_heads, value_size))
    )
    sink = torch.randn(heads, device=DEVICE) if sinks else None
    own = [keys.clone(), values.clone()]
    buffers = torch.tensor([0, 0, *(states.data_ptr() for states in own)], device=DEVICE)
    placed = nodes.placed._replace(buffers=buffers)
    first = (nodes.positions[0] - (window or 10**6) + 1).clamp(min=0)
    found = kernels.attend_in_place(query, key, value, first, placed, 1, 0.4, softcap, sink)

    keys[:, :, length : length + width], values[:, :, length : length + width] = key, value
    assert torch.equal(own[0], keys) and torch.equal(own[1], values), "nodes are written behind the text, nothing else"
    seen = nodes.seen(lambda b, h, q, k: (k <= q) & (q - k < (window or 10**6)), slots)
    assert torch.allclose(found, attend(query, keys, values, seen, 0.4, softcap, sink), atol=1e-5)


def test_slots_are_moved_though_they_overlap(kernels: Any) -> None:
    torch.manual_seed(0)
    buffers = [torch.randn(1, heads, 80, size, device=DEVICE) for heads, size in ((3, 8), (3, 8), (1, 5), (3, 8))]
    wanted = [buffer.clone() for buffer in buffers]
    slots = [20, 22, 23, 27, 40]
    for buffer in wanted:
        buffer[:, :, 20:25] = buffer[:, :, slots].clone()
    kernels.move_slots(buffers, 20, slots)
    assert all(torch.equal(*pair) for pair in zip(buffers, wanted, strict=True))


def test_reaches_are_told_apart_by_the_library_s_own_predicates() -> None:
    window = masking_utils.sliding_window_causal_mask_function(12)
    chunk = masking_utils.chunked_causal_mask_function(12, torch.zeros(1, dtype=torch.long, device=DEVICE))
    assert reach_of(masking_utils.causal_mask_function, None, DEVICE) == "all"
    assert reach_of(window, 12, DEVICE) == "window" and reach_of(chunk, 12, DEVICE) == "chunk"
    with pytest.raises(NotImplementedError, match="a window nor a chunk"):
        reach_of(window, None, DEVICE)
    with pytest.raises(NotImplementedError, match="a window nor a chunk"):
        reach_of(masking_utils.bidirectional_mask_function, None, DEVICE)
    positions = torch.tensor([3, 12, 30])
    assert first_seen(positions, "window", 12).tolist() == [0, 1, 19]
    assert first_seen(positions, "chunk", 12).tolist() == [0, 12, 24]


# Recorded passes of models.


@pytest.mark.parametrize("architecture", STATIC)
def test_one_recording_serves_every_text(architecture: str) -> None:
    check_recording(architecture, PointerAttention(ByAddress))


def test_one_recording_by_the_kernels_does_so_too(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        # Interpreted, a node takes a thousand times as long.
        monkeypatch.setattr("ouroboros_llm.target_model.static.cuda_graphs.MAX_WIDTH", 8)
        monkeypatch.setattr("ouroboros_llm.target_model.static.forward.MAX_WIDTH", 8)
        monkeypatch.setattr(kernels, "_PROGRAMS", 6)
    check_recording("gemma3_mixed", PointerAttention(), recordings=1 if not CUDA else 2)


def check_recording(architecture: str, attention: PointerAttention, recordings: int = 2) -> None:
    """Whatever the text, however long, and though its buffers moved since."""
    model = tiny_model(architecture)
    recorder = Repeating()
    static = StaticForward(model, attention, recorder)
    texts = (TEXT, [5 + number * 3 % 80 for number in range(250)], TEXT[:3])
    targets = [read(EagerTarget(model, "tree", static=static), text) for text in texts]
    for _ in range(2):
        for target in targets:
            oracle = read(EagerTarget(model, "tree"), list(target.token_ids))
            assert close(target.verify(TREE), oracle.verify(TREE))
            target.keep((0, 2, 4))
    assert recorder.recorded == recordings, "the widest, and the width that was wanted"
    assert targets[1].cache.capacity == 384  # type: ignore[attr-defined]


def test_layers_that_share_keys_are_left_to_the_library() -> None:
    attention, nodes = PointerAttention(ByAddress), DraftInputs(1, CPU, 2)
    states = torch.zeros(1, 1, 1, 8)
    layer = attention.layer(1, SlotLayer(), nodes, False)
    layer.update(states, states)
    assert attention.layer_number == 1
    attention.layer_number = None
    with pytest.raises(NotImplementedError, match="keys of another"):
        attention.attend(nodes, states, states, states, nodes.positions[0], None, None, None)


def test_a_model_is_probed_by_recorded_passes_too() -> None:
    """Whose logits are overwritten by the next."""
    model = tiny_model()
    found = probe_static(model, StaticForward(model, PointerAttention(ByAddress), Repeating()), Probe("tree", 9.0))
    assert 0 < found.margin < 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma3_mixed", "gpt_oss", "gpt2"])
def test_recorded_passes_change_no_token(architecture: str) -> None:
    model = tiny_model(architecture)
    static = StaticForward(model, PointerAttention(ByAddress), Repeating())
    prompt = byte_tokenizer()("abcabcabcabc, the cat sat on the mat, the cat")["input_ids"]
    for width in (5, 64, None):
        decoder = Decoder(EagerTarget(model, "tree", static=static), blend(), width=width, successors=8)
        rounds = decoder.rounds(prompt, Sampler(), limit=32, end_token_ids={2})
        assert [token_id for round in rounds for token_id in round.token_ids] == plain(model, prompt, 32)


# On a device.


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_mixed", "gpt_oss", "gpt_neox", "phi"])
def test_replays_on_a_device_give_the_library_s_logits(architecture: str) -> None:
    import copy

    model = copy.deepcopy(tiny_model(architecture)).to("cuda")
    prepared = prepare(model, "static")
    assert prepared.way.static is not None, prepared.way.missed
    for length in (7, 40, 300):
        text = [5 + number * 7 % 90 for number in range(length)]
        target, oracle = read(prepared.start(), text), read(EagerTarget(model, "tree"), text)  # type: ignore[arg-type]
        for draft in (DraftTree.root(60), TREE, bushy(64), TREE):
            assert close(target.verify(draft), oracle.verify(draft)), (length, draft.width)
            target.rewind(length)
            oracle.rewind(length)
    assert prepared.way.static is not None, "a pass failed, and the library's own forward took over"


@pytest.mark.gpu
@needs_gpu
def test_greedy_rounds_on_a_device_say_what_the_model_says() -> None:
    import copy

    model = copy.deepcopy(tiny_model()).to("cuda")
    with Ouroboros(model, byte_tokenizer(), target="static") as ouroboros:
        for prompt in ("abcabcabcabc", "the cat sat on the mat, the cat"):
            ids = ouroboros.encode(prompt)
            wanted = model.generate(torch.tensor([ids], device="cuda"), max_new_tokens=40, do_sample=False)
            result = ouroboros.generate(ids, options=DecodingOptions(max_new_tokens=40))
            assert list(result.token_ids) == wanted[0, len(ids) :].tolist()
        assert ouroboros._prepared.way.static is not None, "a pass failed, and the library's own forward took over"


@pytest.mark.gpu
@needs_gpu
def test_a_greedy_round_waits_for_the_device_once() -> None:
    import copy

    model = copy.deepcopy(tiny_model()).to("cuda")
    target = read(prepare(model, "static").start(), TEXT)  # type: ignore[arg-type]
    greedy, static = GreedyAcceptance(9, {2}, 8), target.static
    for _ in range(2):
        found = target.walk(TREE, greedy)
        target.keep(found.path)  # type: ignore[union-attr]
    torch.cuda.set_sync_debug_mode("error")
    try:
        row = static.walk(TREE, len(target.token_ids), target.cache, greedy)  # type: ignore[union-attr,arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(row.tolist()) == 1 + 8 + 2 * 8 * 8


@pytest.mark.gpu
@needs_gpu
def test_half_precision_products_come_in_single_precision_on_a_device() -> None:
    from ouroboros_llm.target_model.static.lm_head import Float32LMHead

    head = torch.nn.Linear(64, 500, bias=True, dtype=torch.bfloat16, device="cuda")
    states = torch.randn(1, 4, 64, dtype=torch.bfloat16, device="cuda")
    logits = Float32LMHead(head)(states)
    exact = states.double() @ head.weight.double().T + head.bias.double()
    assert logits.dtype == torch.float32 and torch.allclose(logits.double(), exact, atol=1e-4)
