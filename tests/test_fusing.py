"""Norms, gates and rotations as one operation each: found by what modules compute, and computing the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import MORE_ARCHITECTURES, STATIC, byte_tokenizer, plain, tiny_model
from test_graphed import close, read
from test_static import TEXT, TREE, NoReading, NoSynchronization
from torch import nn
from transformers import AutoModelForCausalLM, GlmConfig, Phi3Config

from ouroboros_llm import DecodingOptions, Ouroboros
from ouroboros_llm.target_model import prepared
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.quantization import quantize
from ouroboros_llm.target_model.static.forward import StaticForward
from ouroboros_llm.target_model.static.fused_ops import ACTIVATIONS, Plain, operations_for
from ouroboros_llm.target_model.static.fusion import _NORMS, _ROTATIONS, fuse
from ouroboros_llm.target_model.static.shared_weights import clone_sharing_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FOUND = {
    "llama": {"norms": 5, "gates": 2, "rotations": 2},
    "qwen2": {"norms": 5, "gates": 2, "rotations": 2},
    "qwen3": {"norms": 9, "gates": 2, "rotations": 2},
    "mistral_sliding": {"norms": 5, "gates": 2, "rotations": 2},
    "gemma3_mixed": {"norms": 13, "gates": 2, "rotations": 2},
    "gemma2_softcap": {"norms": 9, "gates": 2, "rotations": 2},
    # Their norms are one kernel of torch's, their multilayer perceptrons have no gate.
    "gpt_neox": {"rotations": 2},
    "phi": {"rotations": 2},
    "gpt2": {},
    # Experts and rotations of other forms.
    "gpt_oss": {"norms": 5},
    "llama4_chunked": {"norms": 5, "gates": 2},
}


@pytest.fixture(scope="module")
def kernels() -> Any:
    pytest.importorskip("triton", reason="no Triton")
    from ouroboros_llm.target_model.kernels import fused

    return fused


def fresh(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([TEXT])).logits


# What is found.


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("architecture", STATIC)
def test_what_modules_compute_is_found_and_is_the_same_to_the_last_bit(architecture: str, dtype: torch.dtype) -> None:
    model = fresh(tiny_model(architecture).config, dtype)
    twin = clone_sharing_weights(model)
    assert fuse(twin, Plain()) == FOUND[architecture]
    assert torch.equal(logits_of(twin), logits_of(model))


def test_the_table_is_that_of_the_static_architectures() -> None:
    assert {*FOUND} == {*STATIC}


@pytest.mark.parametrize("config", [Phi3Config, GlmConfig])
def test_gates_and_ups_of_one_matrix_are_found(config: Any) -> None:
    sizes = {name: getattr(tiny_model().config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    model = fresh(
        config(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    )
    twin = clone_sharing_weights(model)
    assert fuse(twin, Plain())["gates"] == 2
    assert torch.equal(logits_of(twin), logits_of(model))


def test_quantized_layers_are_gated_too() -> None:
    model = fresh(tiny_model().config)
    quantize(model, "int8")
    twin = clone_sharing_weights(model)
    assert fuse(twin, Plain()) == FOUND["llama"]
    assert torch.equal(logits_of(twin), logits_of(model))


def test_the_model_itself_is_not_touched() -> None:
    model = fresh(tiny_model("gemma3_mixed").config)
    kinds = [type(module) for module in model.modules()]
    twin = clone_sharing_weights(model)
    fuse(twin, Plain())
    assert [type(module) for module in model.modules()] == kinds
    assert not any("_fused" in module.__dict__ for module in model.modules())
    changed = [module for module, kind in zip(twin.modules(), kinds, strict=True) if type(module) is not kind]
    assert len(changed) == sum(FOUND["gemma3_mixed"].values())
    assert all(isinstance(module, kind) for module, kind in zip(twin.modules(), kinds, strict=True))


def test_weights_that_are_changed_are_changed_for_both() -> None:
    model = fresh(tiny_model().config)
    twin = clone_sharing_weights(model)
    fuse(twin, Plain())
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.full((32,), 0.7))
    assert torch.equal(logits_of(twin), logits_of(model))


class Centered(nn.Module):
    """Looks like a norm of the library's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return Plain().norm(states - states.mean(-1, keepdim=True), self.weight, self.variance_epsilon, 0.0, True)


class Halved(nn.Module):
    """Looks like a gated perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act_fn = nn.SiLU()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states) / 2)


class Turning(nn.Module):
    """Turns the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return turn_back(states, states, states[:, 0], states[:, 0])[0]


def turn_back(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return Plain().rotate(q, k, cos, -sin, False, False)


class Failing(nn.Module):
    """Has one weight, and is for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        raise ValueError("not for this")


@pytest.mark.parametrize("kind", [Centered, Halved, Turning, Failing])
def test_what_computes_something_else_keeps_its_own(kind: type[nn.Module]) -> None:
    module = nn.Sequential(kind())
    assert not fuse(module, Plain())
    assert type(module[0]) is kind


def test_operations_that_are_wrong_are_not_used() -> None:
    class Wrong(Plain):
        def norm(self, states: torch.Tensor, *given: Any) -> torch.Tensor:
            return super().norm(states, *given) * 1.01

        def gate(self, gates: torch.Tensor, ups: torch.Tensor, activation: Any) -> torch.Tensor:
            raise RuntimeError("cannot be compiled")

    assert fuse(clone_sharing_weights(fresh(tiny_model().config)), Wrong()) == {"rotations": 2}


def test_nobody_else_s_random_numbers_are_taken() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fuse(clone_sharing_weights(tiny_model()), Plain())
    assert torch.equal(torch.rand(3), wanted)


def test_a_cpu_has_no_kernels() -> None:
    assert operations_for(torch.device("cpu")) is None
    assert not StaticForward(tiny_model()).fused


# Kernels.


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """But for the last bits, which sums in another order and exponentials of another library leave open. Interpreted,
    Triton cuts bfloat16 off where a device rounds; float16 shows that steps are rounded where they are to be."""
    tolerance = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 2}[wanted.dtype] * torch.finfo(wanted.dtype).eps
    return found.dtype == wanted.dtype and torch.allclose(
        found.float(), wanted.float(), rtol=tolerance, atol=tolerance * float(wanted.abs().max()) / 8
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", _NORMS)
@pytest.mark.parametrize("size", [8, 96])
def test_norms_by_the_kernel(size: int, form: tuple[float, bool], dtype: torch.dtype, kernels: Any) -> None:
    torch.manual_seed(0)
    states = (torch.randn(1, 3, 2, size, device=DEVICE) * torch.logspace(-3, 1, 3, device=DEVICE)[:, None, None]).to(
        dtype
    )
    weight = torch.randn(size, device=DEVICE).to(dtype)
    for given in (states, states.transpose(1, 2)):
        found, wanted = (one.norm(given, weight, 1e-5, *form) for one in (kernels, Plain()))
        assert found.shape == wanted.shape and near(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", _ROTATIONS)
@pytest.mark.parametrize(("size", "turned"), [(16, 16), (24, 8), (20, 20)])
def test_rotations_by_the_kernel(
    size: int, turned: int, form: tuple[bool, bool], dtype: torch.dtype, kernels: Any
) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(1, 3, heads, size, device=DEVICE).to(dtype).transpose(1, 2) for heads in (4, 2))
    angles = [torch.randn(1, 3, turned, device=DEVICE).to(dtype) for _ in range(2)]
    pairs = zip(kernels.rotate(query, key, *angles, *form), Plain().rotate(query, key, *angles, *form), strict=True)
    same = torch.equal if dtype == torch.float16 and not form[1] else near
    assert all(found.shape == wanted.shape and same(found, wanted) for found, wanted in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_by_the_kernel(activation: Any, dtype: torch.dtype, kernels: Any) -> None:
    torch.manual_seed(0)
    both = (4 * torch.randn(1, 2, 2400, device=DEVICE)).to(dtype)
    gates, ups = both.chunk(2, -1)
    for given in ((gates, ups), (gates.contiguous(), ups.contiguous())):
        found, wanted = (one.gate(*given, activation) for one in (kernels, Plain()))
        assert found.shape == wanted.shape and found.is_contiguous() and near(found, wanted)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_mixed", "gpt_neox"])
def test_a_pass_by_the_kernels_gives_the_library_s_logits(architecture: str, kernels: Any) -> None:
    import copy

    model = copy.deepcopy(tiny_model(architecture)).to(DEVICE)
    static = StaticForward(model, operations=kernels)
    assert static.fused == FOUND[architecture]
    target, oracle = read(EagerTarget(model, "tree", static=static), TEXT), read(EagerTarget(model, "tree"), TEXT)
    assert close(target.verify(TREE), oracle.verify(TREE))


# Answers.


@pytest.mark.parametrize("architecture", [*STATIC[:5], "phi", "gemma2_softcap", *list(MORE_ARCHITECTURES)[2:3]])
def test_fused_passes_change_no_token(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros_llm.target_model.static.forward.operations_for", lambda device: Plain())
    model = fresh(tiny_model(architecture).config)
    with Ouroboros(model, byte_tokenizer(), target="static") as ouroboros:
        way = ouroboros._prepared.way
        assert way.static is not None and way.static.fused == FOUND[architecture]
        for prompt in (TEXT, [7, 8, 9] * 8, [60]):
            result = ouroboros.generate(prompt, options=DecodingOptions(max_new_tokens=32))
            assert list(result.token_ids) == plain(model, prompt, 32)
    assert prepared.prepare(model, "eager").way.static is None


@pytest.mark.parametrize("architecture", ["llama", "gemma3_mixed"])
def test_a_fused_step_is_one_graph_that_never_waits(architecture: str) -> None:
    model = tiny_model(architecture)
    static = StaticForward(model, operations=Plain())
    target = read(EagerTarget(model, "tree", static=static), TEXT)
    with torch.inference_mode():
        target.cache.reserve(len(TEXT) + 8)  # type: ignore[attr-defined]
        nodes = static.filled(8, TREE, len(TEXT), target.cache)  # type: ignore[arg-type]
        states = static.shown(nodes, target.cache)  # type: ignore[arg-type]
        with NoSynchronization(), NoReading():
            static.step(nodes, states)
        torch._dynamo.reset()
        found = torch._dynamo.explain(static.step)(nodes, states)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_every_form_is_tried() -> None:
    """Guards the tests of kernels: all forms that a module may be found to be are among theirs."""
    assert {*itertools.product((False, True), repeat=2)} == {*_ROTATIONS}
    assert {*ACTIVATIONS} == {"silu", "gelu", "gelu tanh"}
