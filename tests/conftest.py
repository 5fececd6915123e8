"""Tiny random models, so that most tests need no weights; their outputs repeat, so that drafts are accepted too."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

# Before anything imports Triton: without a device its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from databases import POSTGRES, administer, needs_postgres
from hypothesis import HealthCheck, settings
from left_out import pytest_deselected, pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown
from sqlalchemy import make_url
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from ouroboros_llm import Ouroboros, PhrasePool
from ouroboros_llm.drafting.cost_gate import CostTracker
from ouroboros_llm.drafting.learned_state import LearnedState, sources
from ouroboros_llm.drafting.tree_drafter import TreeDrafter
from ouroboros_llm.serving.scheduler import scheduler_for
from ouroboros_llm.target_model import measurements, prepared
from ouroboros_llm.target_model.batching import Batcher
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.prepared import fingerprint
from ouroboros_storage import database, sqlite_file

__all__ = ["pytest_deselected", "pytest_sessionfinish", "pytest_terminal_summary", "pytest_testnodedown"]  # hooks

# Ctrl-C is ignored, here and in what tests start, where a shell has put the tests into the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long one example takes says more about the machine than about the code.
fine = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("no clock", deadline=None, suppress_health_check=fine)
settings.load_profile("no clock")

# Tiny matrices: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How wide drafts are, whether they pay, which passes are made in one and which way of running is faster depends on
    measured times, which may say anything on a busy machine: here they are given, but for tests marked `clock`."""
    if request.node.get_closest_marker("clock") is None:
        monkeypatch.setattr(EagerTarget, "cost", lambda _, width: 1 + 0.02 * (width - 1))
        monkeypatch.setattr(CostTracker, "pays", lambda *_: True)
        monkeypatch.setattr(prepared, "_is_raced", lambda *_: False)
        monkeypatch.setattr(Batcher, "_chosen", lambda _, wanted: wanted[:1])


@pytest.fixture(autouse=True)
def measurements_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measurements of tiny models are left to no other test, which may change what they are made with."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(measurements, "cache_folder", lambda: folder)
    return folder / "measurements"


CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
_SIZES = dict(
    vocab_size=len(SPECIAL_TOKENS) + 256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    # Large weights make a random model decided: no near-ties that rounding could turn.
    initializer_range=0.3,
)
_LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    "gpt2": lambda: GPT2Config(**_SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "mistral_sliding": lambda: MistralConfig(**_SIZES, sliding_window=12),
    "gemma3_mixed": lambda: Gemma3TextConfig(
        **_SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neo_chains": lambda: GPTNeoConfig(
        **_SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=12
    ),
    "bloom_chains": lambda: BloomConfig(**_SIZES),
    "lfm2_chains": lambda: Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"]),
    "mamba_plain": lambda: MambaConfig(**_SIZES, state_size=8),
    "bamba_plain": lambda: BambaConfig(
        **_SIZES, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, attn_layer_indices=[1]
    ),
    "qwen3_next_plain": lambda: Qwen3NextConfig(
        **_SIZES,
        **_LINEAR,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
}

MORE_ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "phi": lambda: PhiConfig(**_SIZES),
    "gpt_oss": lambda: GptOssConfig(
        **_SIZES,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama4_chunked": lambda: Llama4TextConfig(
        **_SIZES, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=48
    ),
    # Eager attention: until 5.23 the library let it default to SDPA, which leaves soft caps out.
    "gemma2_softcap": lambda: Gemma2Config(
        **_SIZES, sliding_window=12, attn_logit_softcapping=2.0, attn_implementation="eager"
    ),
    # Both compute attention by code of their own, whatever their configuration says.
    "gptj": lambda: GPTJConfig(**_SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=512, rotary_dim=4),
    "falcon": lambda: FalconConfig(**{name: size for name, size in _SIZES.items() if name != "head_dim"}),
}
"""For what concerns attention alone."""

STATIC = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral_sliding",
    "gemma3_mixed",
    "gpt_neox",
    "phi",
    "gpt_oss",
    "gpt2",
    "llama4_chunked",
    "gemma2_softcap",
)
"""Architectures whose drafts are verified in passes of fixed shape, if that is asked for."""


def own_model(architecture: str = "llama", seed: int = 0, context: int = 512) -> PreTrainedModel:
    """A random float32 model of two layers that nobody else has, so that a test may change it."""
    torch.manual_seed(seed)
    config = (ARCHITECTURES | MORE_ARCHITECTURES)[architecture]()
    config.max_position_embeddings = context
    return AutoModelForCausalLM.from_config(config).eval()


_shared: dict[tuple[Any, ...], tuple[PreTrainedModel, object]] = {}


def tiny_model(architecture: str = "llama", seed: int = 0, context: int = 512) -> PreTrainedModel:
    """As `own_model`, but the same object for the same arguments: what tests only read."""
    key = architecture, seed, context
    if key not in _shared:
        model = own_model(*key)
        _shared[key] = model, likeness(model)
    return _shared[key][0]


def likeness(model: PreTrainedModel) -> object:
    """What a test could see of another one's changes."""
    worker = scheduler_for(model)
    # Saving notes these two.
    config = model.config.to_dict() | {"dtype": None, "architectures": None}
    return fingerprint(model), config, worker.max_active, worker.max_waiting


@pytest.fixture(scope="module", autouse=True)
def shared_models_stay_as_they_are() -> Iterator[None]:
    yield
    changed = [key for key, (model, before) in _shared.items() if likeness(model) != before]
    for key in changed:
        del _shared[key]
    assert not changed, f"a test of this file changed {changed}, which others use too; own_model() is its own"


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: the ids of text can be read off, and characters of several bytes are split between tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def plain(model: PreTrainedModel, prompt_ids: list[int], max_new_tokens: int, **options: Any) -> list[int]:
    """The oracle: what the model's own `generate` says."""
    ids = torch.tensor([prompt_ids])
    options.setdefault("do_sample", False)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=0, **options
    )
    return output[0, len(prompt_ids) :].tolist()


def blend(
    *pools: PhrasePool, write: PhrasePool | None = None, drafters: Sequence[str] = ("phrases", "recycling")
) -> TreeDrafter:
    """Drafts from the running text, from `pools` and from what the target said before."""
    memory = LearnedState()
    return TreeDrafter(sources(drafters, memory, read=pools, write=write), memory.calibration)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def tiny_ouroboros() -> Iterator[Ouroboros]:
    """An `Ouroboros` over a tiny Llama that keeps phrases in memory."""
    with Ouroboros(tiny_model(), byte_tokenizer()) as ouroboros:
        yield ouroboros


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/phrases.db"


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """An empty schema of its own in the database for tests."""
    schema = f"ouroboros_test_{uuid4().hex}"
    administer(f"CREATE SCHEMA {schema}")
    yield make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(False)
    administer(f"DROP SCHEMA {schema} CASCADE")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def any_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each backend."""
    return str(request.getfixturevalue("url" if request.param == "sqlite" else "postgres_url"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for locks as often, but not as long."""
    monkeypatch.setattr(sqlite_file, "BUSY_MILLISECONDS", 20)
    monkeypatch.setattr(database, "_PAUSES", (0.01, 0.01, 0.01))
