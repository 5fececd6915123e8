"""What is read of transformers stands in one file, knows every spelling, and says what is missing."""

from __future__ import annotations

import ast
import inspect
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, own_model, plain, tiny_model
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import DynamicCache

from ouroboros_llm import LibraryVersionError, ModelError, custom_generate, transformers_api
from ouroboros_llm.target_model.eager import EagerTarget
from ouroboros_llm.target_model.prepared import prepare
from ouroboros_llm.transformers_api import (
    CacheLayer,
    ForwardSignature,
    check_generates,
    complete_layer,
    filled_cache,
    forward_signature,
    is_tested,
    tested_versions,
    warn_if_untested,
)

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("ouroboros_llm", "integrations", "storage", "examples", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "transformers_api.py"
]
CACHE_NAMES = {"past_key_values", "cache_params"}
INNER = {"Cache", "DynamicCache", "StaticCache", "AttentionInterface", "AttentionMaskInterface", "GenerationMixin"}
"""Names of the library's first level that have changed, or what belongs to them has."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_that_change_are_read_in_one_file(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("transformers"):
            assert node.module == "transformers", f"{node.module} is imported by {path.name}"
            assert not INNER & {alias.name for alias in node.names}
        elif isinstance(node, ast.keyword):
            assert node.arg not in CACHE_NAMES
        elif isinstance(node, ast.Constant):
            assert node.value not in CACHE_NAMES
        elif isinstance(node, ast.Attribute):
            assert node.attr not in CACHE_NAMES | {"_get_logits_processor", "_prepare_special_tokens", "signature"}
            assert node.attr not in {"_attn_implementation", "_global_mapping"}


class Spelled(torch.nn.Module):
    """A language model that calls its cache by a name of another version, and gives it back by that name."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        assert given.pop("use_cache") and given.pop("return_dict") and set(given) == {self.name}
        return {"logits": torch.zeros(1, 1, 3), self.name: ("after", given[self.name])}


def spelled(name: str) -> Any:
    model = Spelled(name)
    parameters = [
        inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for each in ("input_ids", name)
    ]
    forward: Any = lambda *args, **given: Spelled.forward(model, *args, **given)  # noqa: E731
    forward.__signature__ = inspect.Signature(parameters)
    model.forward = forward
    return model


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params", "state"])
def test_a_cache_is_handed_over_and_found_under_every_name(name: str) -> None:
    model = spelled(name)
    signature = forward_signature(model)
    assert signature == ForwardSignature(name, takes_positions=False, keeps_logits=False)
    assert signature.takes_cache is (name in ("cache", "past_key_values"))
    output = signature.call(model, torch.tensor([[1]]), "before", position_ids=torch.tensor([[0]]), logits_to_keep=1)
    assert signature.cache_of(output) == ("after", "before")
    check_generates(model)


def test_an_output_without_a_cache_is_the_version_s_fault_only_where_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="its dict holds none") as info:
        ForwardSignature("cache", False, False).cache_of({"logits": 1})
    assert not isinstance(info.value, LibraryVersionError)
    monkeypatch.setattr(transformers_api, "_has_known_names", lambda: False)
    with pytest.raises(LibraryVersionError, match=f"transformers {transformers_api.VERSION} has no cache or"):
        ForwardSignature("cache", False, False).cache_of({"logits": 1})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_model_of_this_version_has_its_names(architecture: str) -> None:
    model = tiny_model(architecture)
    signature = forward_signature(model)
    assert signature.cache_name is not None
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([[5, 6]]), use_cache=True, return_dict=True)
    assert signature.cache_of(output) is not None


def test_hooks_do_not_hide_the_names() -> None:
    model = own_model()
    inner = model.forward
    model.forward = lambda *args, **given: inner(*args, **given)
    model.forward.__wrapped__ = inner  # type: ignore[attr-defined]
    assert forward_signature(model) == forward_signature(own_model())


def test_a_library_that_renamed_the_cache_again_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_api, "_CACHE_NAMES", ("past_key_values_v9",))
    transformers_api._remembered_signature.cache_clear()
    try:
        with pytest.raises(LibraryVersionError, match="no parameter past_key_values_v9 of Llama") as info:
            prepare(own_model())
        assert "tested are the versions" in str(info.value) and "pip install" in str(info.value)
        assert isinstance(info.value, ImportError)
    finally:
        transformers_api._remembered_signature.cache_clear()


def test_a_model_outside_of_the_library_is_told_what_is_expected() -> None:
    model = spelled("memory")
    with pytest.raises(ModelError, match="whose forward takes none of cache, past_key_values") as info:
        check_generates(model)
    assert not isinstance(info.value, LibraryVersionError)


@pytest.mark.parametrize("name", ["OpenAIGPT", "XLM"])
def test_models_that_never_had_a_cache_are_no_fault_of_the_version(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=30, n_embd=8, n_layer=1, n_head=2, emb_dim=8, n_layers=1, n_heads=2, is_decoder=True, causal=True
    )
    kind = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "XLM": "XLMWithLMHeadModel"}[name]
    with pytest.raises(ModelError) as info:
        prepare(getattr(transformers, kind)(config))
    assert not isinstance(info.value, LibraryVersionError)


def test_what_else_is_broken_says_so_by_itself() -> None:
    code = "import sys; sys.modules['transformers.cache_utils'] = None\nimport ouroboros_llm.transformers_api"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no" not in done.stderr and "transformers.cache_utils" in done.stderr


def test_a_layer_that_lacks_a_method_is_found_before_it_is_used() -> None:
    class Partial(CacheLayer):
        def get_seq_length(self) -> int:
            return 0

    with pytest.raises(LibraryVersionError, match="without get_mask_sizes, update"):
        complete_layer(Partial)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_filled_cache_is_seen_under_both_names(name: str) -> None:
    cache = DynamicCache()
    assert filled_cache({name: cache}) is None and filled_cache({}) is None
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    assert filled_cache({name: cache}) == name


def test_a_filled_cache_is_refused_inside_of_generate() -> None:
    model = tiny_model()
    target = EagerTarget(model, "none")
    target.prefill([5, 6, 7])
    name = forward_signature(model).cache_name
    with pytest.raises(ValueError, match=f"does not honor a filled {name}"):
        model.generate(
            torch.tensor([[5, 6, 7, 8]]),
            max_new_tokens=4,
            custom_generate=custom_generate,
            **{name: target.cache.states},
        )
    assert plain(model, [5, 6, 7, 8], 4)


# Versions.


def test_this_version_is_among_the_tested() -> None:
    """`make test-newest` runs with versions that may not be, and reports them."""
    assert str(tested_versions("transformers")) and str(tested_versions("torch"))
    assert tested_versions("transformers").contains("5.17.0")
    assert tested_versions("no such package") == SpecifierSet()


@pytest.mark.parametrize(("version", "tested"), [("5.17.0", True), ("5.16.9", False), ("6.0.0", False), ("99", False)])
def test_versions_are_compared_with_the_declared_range(version: str, tested: bool) -> None:
    assert is_tested(version) is tested


def test_development_versions_count_as_their_release() -> None:
    newest = max(Version(one.version) for one in tested_versions() if one.operator == "<")
    assert not is_tested(f"{newest}.dev0")
    assert is_tested("5.18.0.dev0")


def test_an_unknown_version_starts_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ouroboros_llm")
    monkeypatch.setattr(transformers_api, "VERSION", "99.1.0")
    warn_if_untested.cache_clear()
    try:
        assert prepare(own_model()).probe.branching == "tree"
        prepare(own_model(seed=1))
    finally:
        warn_if_untested.cache_clear()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == f"transformers 99.1.0 is installed; tested are the versions {tested_versions()}"


def test_transformers_is_the_version_that_is_named() -> None:
    assert transformers.__version__ == transformers_api.VERSION
