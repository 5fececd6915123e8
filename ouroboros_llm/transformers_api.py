"""All that is read of transformers beyond its public classes, in every spelling since the oldest version admitted.

Parameters of `forward`, fields of outputs, arguments of `generate`, cache and layer classes, mask functions and the
attention interface change their names between minor releases (5.24 renamed `past_key_values` to `cache`). No other
module looks at a signature or imports from inside the library, so a release that renames something is met here.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from types import FunctionType
from typing import Any, TypeVar

import torch
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .errors import LibraryVersionError, ModelError

logger = logging.getLogger(__name__)

VERSION = str(transformers.__version__)


def tested_versions(package: str = "transformers") -> SpecifierSet:
    """The versions of a dependency that were tested: the range that this package declares; empty where it is run from
    its source without having been installed."""
    try:
        declared = requires("ouroboros-llm") or []
    except PackageNotFoundError:
        return SpecifierSet()
    ranges = [one.specifier for one in map(Requirement, declared) if one.name.lower() == package.lower()]
    return next(iter(ranges), SpecifierSet())


def is_tested(version: str, package: str = "transformers") -> bool:
    """Tell whether a version lies in the tested range; pre-releases count as the release that they lead to."""
    return tested_versions(package).contains(Version(version).base_version, prereleases=True)


@cache
def warn_if_untested() -> None:
    """Log one line, once per process, where this version of transformers was not tested."""
    if not is_tested(VERSION):
        logger.warning("transformers %s is installed; tested are the versions %s", VERSION, tested_versions())


def missing(what: str) -> LibraryVersionError:
    """The error for a name that this version of transformers does not have."""
    tested = tested_versions()
    return LibraryVersionError(
        f"transformers {VERSION} has no {what}, which ouroboros-llm needs; tested are the versions "
        f'{tested or "that its pyproject.toml names"}; install one with: pip install "transformers{tested}"'
    )


try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        Cache,
        DynamicCache,
        GenerationConfig,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
    from transformers.generation.utils import GenerateDecoderOnlyOutput
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    name = re.search(r"cannot import name '(\w+)'", str(error))
    if name is None:  # something else is broken, which says so by itself
        raise
    raise missing(name.group(1)) from error

__all__ = ["Cache", "Conv1D", "DynamicCache"]  # passed on; what is defined here is public too

# The forward pass.

_CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""Of the parameter that takes a cache and of the field that returns it, newest first: all models since 5.24, attention
models before, Mamba's before, RWKV."""

_POSITIONS, _LOGITS_TO_KEEP = "position_ids", "logits_to_keep"


@dataclass(frozen=True, slots=True)
class ForwardSignature:
    """What a model's `forward` can be asked for, and under which names."""

    cache_name: str | None
    """Of the parameter that takes a cache, and of the output that returns it; None where there is none."""
    takes_positions: bool
    keeps_logits: bool
    """Whether it can be asked for the logits of a few positions only."""

    @property
    def takes_cache(self) -> bool:
        """Tell whether it takes a `Cache`, rather than a state of the model's own."""
        return self.cache_name is not None and self.cache_name not in _CACHE_NAMES[2:]

    def call(
        self,
        model: Any,
        token_ids: torch.Tensor,
        states: Any,
        *,
        position_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        logits_to_keep: int | torch.Tensor | None = None,
    ) -> Any:
        """Make one forward pass of a model with this signature, which writes to a cache.

        Args:
            token_ids, position_ids: [1, width].
            states: the cache, or the state that the pass before returned.
            attention_mask: None where every token sees all before it.
            logits_to_keep: as the library takes it. Left out, like positions, where the model does not know it.

        Returns:
            The library's output: `logits` [1, width, vocabulary], or of the positions to keep, and the cache.
        """
        given: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
        if self.cache_name is not None:
            given[self.cache_name] = states
        if self.takes_positions and position_ids is not None:
            given[_POSITIONS] = position_ids
        if self.keeps_logits and logits_to_keep is not None:
            given[_LOGITS_TO_KEEP] = logits_to_keep
        return model(input_ids=token_ids, use_cache=True, return_dict=True, **given)

    def cache_of(self, output: Any) -> Any:
        """The cache or state that a pass returned.

        Raises:
            ModelError: the output has no such field. LibraryVersionError: no model of this version would have.
        """
        assert self.cache_name is not None
        for name in (self.cache_name, *_CACHE_NAMES):
            if name in output:
                return output[name]
        # A model without a cache leaves the field empty, and then the output does not list it.
        if any(hasattr(output, name) for name in _CACHE_NAMES):
            return None
        if _has_known_names():
            raise ModelError(f"model must return a cache to go on from, but its {type(output).__name__} holds none")
        raise missing(f"{' or '.join(_CACHE_NAMES)} in {type(output).__name__}")


def forward_signature(model: torch.nn.Module) -> ForwardSignature:
    """The names that a model's `forward` takes."""
    function = getattr(model.forward, "__func__", None)
    # What hooks put in its place holds the model, and must not be remembered.
    return _read_signature(model.forward) if function is None else _remembered_signature(function)


def _read_signature(function: Callable[..., Any]) -> ForwardSignature:
    names = inspect.signature(function).parameters
    cache_name = next((name for name in _CACHE_NAMES if name in names), None)
    return ForwardSignature(cache_name, _POSITIONS in names, _LOGITS_TO_KEEP in names)


_remembered_signature = cache(_read_signature)


def check_generates(model: PreTrainedModel) -> None:
    """Make sure that a model is a causal language model which returns a cache to go on from.

    Raises:
        ModelError: it is not. LibraryVersionError: no model would be, because this version of the library has none of
            the names that are looked for.
    """
    is_causal = model.can_generate() and not model.config.is_encoder_decoder
    if is_causal and forward_signature(model).cache_name is not None:
        return
    name = type(model).__name__
    if is_causal and not _has_known_names():
        raise missing(f"parameter {' or '.join(_CACHE_NAMES)} of {name}.forward")
    reason = f"whose forward takes none of {', '.join(_CACHE_NAMES)}" if is_causal else "which is none"
    raise ModelError(
        f"model must be a causal language model that generates from a cache, but got {name}, {reason}; "
        "load it with AutoModelForCausalLM"
    )


def last_logits(model: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [vocabulary] after the last of `token_ids` [1, length], by a pass of its own."""
    given = {_LOGITS_TO_KEEP: 1} if forward_signature(model).keeps_logits else {}
    logits: torch.Tensor = model(token_ids, **given).logits[0, -1]
    return logits


def _has_known_names() -> bool:
    """Tell whether this version of the library calls caches by a name that is known, as its Llama shows."""
    from transformers import LlamaForCausalLM

    return _remembered_signature(LlamaForCausalLM.forward).cache_name is not None


# Modules.

_ROTARY = ("q", "k", "cos", "sin")


def takes_one_argument(module: torch.nn.Module) -> bool:
    """Tell whether a module's forward needs one argument and no more."""
    own = inspect.signature(type(module).forward).parameters.values()
    needed = [one for one in own if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return len(needed) == 2


def forward_of(module: torch.nn.Module) -> Any:
    """The forward of a module's class, without the decorators that take arguments under their old names."""
    return inspect.unwrap(type(module).forward)


def is_rotary(function: Any) -> bool:
    """Tell whether a function is one that rotates queries and keys: q, k, cos and sin come first."""
    return isinstance(function, FunctionType) and (*inspect.signature(function).parameters,)[:4] == _ROTARY


# Caches.

Layer = TypeVar("Layer", bound=type)


class CacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # the library's hook is not typed
    """What every layer of ours has in common: it grows without limit, and is made before it has read anything."""

    is_compileable, is_sliding, is_croppable = False, False, False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: layers that only show others' buffers have none to make."""

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def complete_layer(layer: Layer) -> Layer:
    """Make sure that a class of ours has all methods that this version asks of a layer.

    Raises:
        LibraryVersionError: the library asks for more.
    """
    if absent := sorted(getattr(layer, "__abstractmethods__", ())):
        raise missing(f"cache layer that does without {', '.join(absent)} ({layer.__name__} would be one)")
    return layer


def attention_layers(config: PreTrainedConfig) -> int | None:
    """The number of layers of a model whose layers all keep keys and values by position and nothing else, else None."""
    layers = DynamicCache(config=config).layers
    return len(layers) if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) else None


def is_croppable(states: Any) -> bool:
    """Tell whether a cache can drop the last tokens of what it has read."""
    return bool(getattr(states, "is_croppable", False))


def crop(states: Any, tokens: int) -> None:
    """Drop the last `tokens` of a croppable cache, and record from now on what convolutions need for that."""
    # Recording starts with the first round: while it is on, nothing that a prompt wrote is ever forgotten.
    states.activate_past_recording()
    states.crop(-tokens)


# Masks and attention.

MaskFunction = Callable[..., Any]
"""(batch, head, position of the query, position of the key) -> whether the one sees the other."""


def register_attention(
    name: str,
    attend: Callable[..., tuple[torch.Tensor, None]],
    mask: Callable[[int, MaskFunction, int | None], torch.Tensor],
) -> None:
    """Let models whose configuration names `name` attend by functions of ours.

    Args:
        attend: called by every layer with (module, query, key, value, mask) and the library's keyword arguments.
        mask: called once per kind of layer with the number of keys, the library's predicate and the size of a window
            or chunk (None: there is none); what it returns is what `attend` gets.
    """

    def library_mask(**given: Any) -> torch.Tensor:
        try:
            return mask(given["kv_length"], given["mask_function"], given.get("local_size"))
        except KeyError as error:
            raise missing(f"argument {error} of mask functions") from error

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, library_mask)


def unregister_attention(name: str) -> None:
    """Take back what `register_attention` did; the library has no way to."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


def attention_function(name: str) -> Any:
    """The function that layers attend by under a name; None where they attend by code of their own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name] if name in ALL_ATTENTION_FUNCTIONS else None


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation that a configuration names."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def use_attention(config: PreTrainedConfig, name: str) -> None:
    """Let models of this configuration attend by what is registered as `name`."""
    config._attn_implementation = name


def rope_of(config: Any) -> Mapping[str, Any]:
    """What a configuration says of rotary positions; empty where it says nothing."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


# `generate`.

PREPARED_ARGUMENTS = frozenset(
    {"attention_mask", *_CACHE_NAMES[:-1], _POSITIONS, "cache_position", _LOGITS_TO_KEEP, "use_cache"}
)
"""What `generate` prepares for the method that it calls, beside what the caller passed on."""


def filled_cache(model_kwargs: Mapping[str, Any]) -> str | None:
    """The name of the argument by which the caller of `generate` passed a cache that has read something."""
    for name in _CACHE_NAMES[:-1]:
        states = model_kwargs.get(name)
        if states is not None and bool(states.get_seq_length()):
            return name
    return None


def arguments_of_generate() -> dict[str, Any]:
    """The arguments of the `generate` call we are in.

    It drops `streamer` and `assistant_model` on the way to a callable, and a dropped streamer leaves its reader waiting
    forever; only the caller's frame still knows that they were given.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)


def generate_output(sequences: torch.Tensor) -> GenerateDecoderOnlyOutput:
    """What `generate` returns where the configuration asks for a dictionary."""
    return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]


def prepare_special_tokens(model: Any, config: GenerationConfig) -> None:
    """Fill in a configuration's special tokens as `generate` does."""
    if not hasattr(model, "_prepare_special_tokens"):
        raise missing("GenerationMixin._prepare_special_tokens")
    model._prepare_special_tokens(config, device=model.device)


def logits_processors(model: Any, config: GenerationConfig, prompt_length: int, own: Sequence[Any]) -> Any:
    """The library's own list of logits processors, in its own order, with `own` among them."""
    if not hasattr(model, "_get_logits_processor"):
        raise missing("GenerationMixin._get_logits_processor")
    return model._get_logits_processor(
        config, input_ids_seq_length=prompt_length, logits_processor=list(own), device=model.device
    )


# Response templates of tokenizers.


def response_template(template: Mapping[str, Any]) -> Any:
    """A tokenizer's response template, read. Raises ImportError, TypeError or ValueError where it cannot be."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    return load_response_template(dict(template))


def response_field(body: str, field: Any, captures: Mapping[str, str]) -> Any:
    """The value of a field of a response template."""
    from transformers.utils.chat_parsing.content_parsers import process_field

    return process_field(body, field, dict(captures))


# Progress bars.


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Load and save without the library's own bars, for as long as this lasts."""
    from transformers.utils import logging as library_logging

    enabled = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            library_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
