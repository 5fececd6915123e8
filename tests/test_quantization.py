"""Weights in eight and four bits: what they stand for, and that drafts change nothing that the quantized model says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, plain, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from ouroboros_llm import DecodingOptions, ModelError, OptionError, Ouroboros
from ouroboros_llm.defaults import shared
from ouroboros_llm.models import loading as models
from ouroboros_llm.target_model.prepared import fingerprint, prepare
from ouroboros_llm.target_model.quantization import QUANTIZATIONS, Quantization, QuantizedLinear, quantize, whole
from ouroboros_llm.target_model.static.shared_weights import clone_sharing_weights

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TEXT = [5 + number * 7 % 90 for number in range(40)]
PROMPTS = (TEXT, [7, 8, 9] * 8, [60])
OPTIONS = DecodingOptions(max_new_tokens=32)


def quantized(architecture: str, kind: Quantization, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_model(architecture).config).eval().to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* of the layers' weights")
        quantize(model, kind)
    return model


def weights(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return (torch.randn(outputs, inputs) * torch.logspace(-3, 1, outputs)[:, None]).to(dtype)


# What numbers stand for.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "inputs", "group"), [("int8", 48, 48), ("int4", 128, 64), ("int4", 96, 32)])
def test_weights_are_off_by_half_a_step_at_most(
    kind: Quantization, inputs: int, group: int, dtype: torch.dtype
) -> None:
    weight = weights(20, inputs, dtype)
    layer = QuantizedLinear(weight, None, kind)
    exact = whole(layer.numbers, layer.scales, layer.zeros)
    assert layer.group == group and exact.shape == weight.shape and layer.weight.dtype == dtype
    steps = layer.scales.float().repeat_interleave(group, 1)
    # Scales are rounded themselves, so that the greatest weight of a group may lie a little beyond the last number.
    assert bool(((exact - weight.float()).abs() <= steps * (0.5 if dtype == torch.float32 else 1.0) * 1.001).all())
    assert layer.numbers.nbytes == weight.numel() * (1 if kind == "int8" else 0.5)


def test_rows_that_no_group_divides_get_eight_bits() -> None:
    layer = QuantizedLinear(weights(20, 48), None, "int4")
    assert layer.zeros is None and layer.numbers.dtype == torch.int8 and "bits=8" in repr(layer)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_rows_of_nothing_stay_nothing(kind: Quantization) -> None:
    weight = weights(20, 64)
    weight[3] = 0
    assert not QuantizedLinear(weight, None, kind).weight[3].any()


@pytest.mark.parametrize("count", [1, 4, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_layer_multiplies_with_what_its_numbers_stand_for(kind: Quantization, dtype: torch.dtype, count: int) -> None:
    weight, bias = weights(40, 64, dtype), torch.randn(40).to(dtype)
    layer = QuantizedLinear(weight, nn.Parameter(bias), kind)
    states = torch.randn(1, count, 64).to(dtype)
    wanted = states.double() @ whole(layer.numbers, layer.scales, layer.zeros).double().T + bias.double()
    found = layer(states)
    assert found.dtype == dtype and found.shape == (1, count, 40)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    assert torch.allclose(found.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_weights_are_made_whole_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear(weights(40, 64), None, "int4")
    states = torch.randn(3, 64)
    wanted = layer(states)
    monkeypatch.setattr("ouroboros_llm.target_model.quantization._ROWS", 7)
    assert len([*layer._parts(torch.float32)]) == 6
    assert torch.allclose(layer(states), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype", "count", "outputs", "inputs"),
    [
        ("int8", torch.float32, 1, 40, 48),
        ("int8", torch.float16, 5, 70, 300),
        ("int4", torch.float32, 17, 33, 96),
        ("int4", torch.float16, 1, 40, 256),
    ],
)
def test_the_kernel_multiplies_so_too(
    kind: Quantization, dtype: torch.dtype, count: int, outputs: int, inputs: int
) -> None:
    """Interpreted, products of bfloat16 are not to be had, so half precision is float16."""
    pytest.importorskip("triton", reason="no Triton")
    from ouroboros_llm.target_model.kernels.quantized_matmul import product

    weight = weights(outputs, inputs, dtype).to(DEVICE)
    layer = QuantizedLinear(weight, None, kind)
    bias, rows = (torch.randn(*size, device=DEVICE).to(dtype) for size in ((outputs,), (count, inputs)))
    parts = (layer.numbers, layer.scales, layer.zeros)
    for given in (None, bias):
        found = product(rows, *parts, given)
        wanted = rows.double() @ whole(*parts).double().T + (0 if given is None else given.double())
        tolerance = 1e-5 if dtype == torch.float32 else 2**-10
        assert found.dtype == dtype
        assert torch.allclose(found.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()) / 64)


# Models.


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("target", ["eager", "static"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_mixed", "gpt2", "phi", "gpt_oss"])
def test_drafts_change_no_token_of_the_quantized_model(architecture: str, target: Any, kind: Quantization) -> None:
    model = quantized(architecture, kind)
    layers = sum(isinstance(module, QuantizedLinear) for module in model.modules())
    assert layers >= 8
    with Ouroboros(model, byte_tokenizer(), target=target) as ouroboros:
        assert (ouroboros._prepared.way.static is not None) is (target == "static")
        for prompt in PROMPTS:
            for _ in range(2):
                result = ouroboros.generate(prompt, options=OPTIONS)
                assert list(result.token_ids) == plain(model, list(prompt), 32)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == layers


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_model_says_something_else_and_has_another_fingerprint(kind: Quantization) -> None:
    """Guards the test above: it would pass if nothing had been quantized."""
    model, other = quantized("llama", kind), tiny_model("llama")
    with torch.no_grad():
        logits, exact = (one(torch.tensor([TEXT])).logits for one in (model, other))
    difference = (logits - exact).abs().max() / exact.abs().max()
    assert float(difference) > 1e-4
    prints = {fingerprint(one) for one in (other, quantized("llama", "int8"), quantized("llama", "int4"))}
    assert len(prints) == 3
    layer = model.model.layers[0].mlp.down_proj
    before = fingerprint(model)
    layer.numbers.data = torch.roll(layer.numbers.data, 1)
    assert fingerprint(model) != before


def test_the_twin_shares_quantized_weights() -> None:
    model = quantized("llama", "int4")
    twin = prepare(model, "static").way.static.model
    assert {id(weight) for weight in twin.parameters()} == {id(weight) for weight in model.parameters()}
    assert {weight.dtype for weight in clone_sharing_weights(model).parameters()} == {
        torch.float32,
        torch.uint8,
        torch.int8,
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma3_mixed"])
def test_heads_and_embeddings_stay_and_answer_in_single_precision(architecture: str) -> None:
    model = quantized(architecture, "int8", torch.bfloat16)
    assert (
        type(model.get_output_embeddings()) is nn.Linear and type(model.get_input_embeddings()) is not QuantizedLinear
    )
    assert model.dtype == torch.bfloat16
    target = prepare(model, "static").start()
    assert target.prefill(TEXT).dtype == torch.float32


def test_heads_that_somebody_else_quantized_are_left_alone() -> None:
    model = quantized("phi", "int8", torch.bfloat16)
    model.lm_head = QuantizedLinear(model.lm_head.weight.detach(), model.lm_head.bias, "int8")
    prepared = prepare(model, "static")
    assert prepared.way.static is not None and prepared.way.static.reader is None
    with Ouroboros(model, byte_tokenizer(), target="static") as ouroboros:
        assert len(ouroboros.generate(TEXT, options=OPTIONS).token_ids) == 32


def test_little_that_can_be_quantized_is_said() -> None:
    """Most weights of these are those of experts, all in one tensor."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_model("gpt_oss").config)
    with pytest.warns(RuntimeWarning, match=r"only \d+% of the layers' weights of .* have been quantized"):
        quantize(model, "int8")


def test_models_without_such_layers_are_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: Any = tiny_model().config
            self.head = nn.Linear(4, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        get_input_embeddings = get_output_embeddings

    with pytest.raises(ModelError, match="no linear layers that could be quantized; leave quantization out"):
        quantize(Bare(), "int8")  # type: ignore[arg-type]


def test_layers_behind_hooks_are_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_model().config)
    model.hf_device_map = {"": 0}
    with pytest.raises(ModelError, match="spread over devices by hooks"):
        quantize(model, "int8")


# Loading.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_models_are_quantized_when_they_are_loaded(kind: Quantization, folder: Path) -> None:
    with Ouroboros.from_pretrained(folder, device="cpu", quantization=kind) as ouroboros:
        assert torch.equal(
            ouroboros.model.model.layers[0].mlp.up_proj.numbers,
            quantized("llama", kind).model.layers[0].mlp.up_proj.numbers,
        )
        assert list(ouroboros.generate(TEXT, options=OPTIONS).token_ids) == plain(ouroboros.model, TEXT, 32)


@pytest.mark.parametrize("wrong", ["int2", "", 8, True])
def test_other_quantizations_are_refused_before_anything_is_loaded(wrong: Any, folder: Path) -> None:
    with pytest.raises(OptionError, match="quantization must be None, 'int8' or 'int4', but got"):
        models.load("no/such-model", quantization=wrong)
    with pytest.raises(OptionError, match="quantization must be"):
        quantize(tiny_model(), wrong)


def test_weights_are_shared_by_those_who_ask_for_the_same_bits(folder: Path) -> None:
    asked = [None, "int8", "int8", "int4"]
    found = [shared(folder, device="cpu", store=None, quantization=kind).model for kind in asked]  # type: ignore[arg-type]
    assert found[1] is found[2] and len({id(model) for model in found}) == 3


def test_adapters_hand_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    import langchain_ouroboros._base as langchain
    import llama_index.llms.ouroboros.configuration as llama_index
    from langchain_ouroboros import ChatOuroboros
    from llama_index.llms.ouroboros import OuroborosLLM

    class Asked(Exception):
        pass

    def ask(name: str, **given: Any) -> Any:
        raise Asked(given["quantization"])

    for module in (langchain, llama_index):
        monkeypatch.setattr(module, "shared", ask)
    chat = ChatOuroboros(model="a", quantization="int4")
    with pytest.raises(Asked, match="int4"):
        chat.invoke("hi")
    assert chat._identifying_params["quantization"] == "int4"
    assert "quantization" not in ChatOuroboros(model="a")._identifying_params
    with pytest.raises(Asked, match="int8"):
        OuroborosLLM(model="a", quantization="int8").load()
    for kind in (ChatOuroboros, OuroborosLLM):
        with pytest.raises(ValueError, match="quantization"):
            kind(model="a", quantization="int3")  # type: ignore[arg-type]
