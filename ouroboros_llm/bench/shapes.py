"""Models of real shapes with random weights: what a pass takes does not depend on what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from ..errors import OptionError

_FAMILIES: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model."""

    family: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head: int
    inner: int
    vocabulary: int
    tied: bool = False

    def config(self, positions: int) -> Any:
        """A configuration of this shape with room for so many positions."""
        return _FAMILIES[self.family](
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head,
            max_position_embeddings=positions,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
        )

    @property
    def parameters(self) -> int:
        """Numbers in the matrices of the layers, the embedding and the head."""
        attention = self.hidden * self.head * 2 * (self.heads + self.key_heads)
        layer = attention + 3 * self.hidden * self.inner
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden


SHAPES = {
    "qwen2.5-coder-1.5b": Shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, tied=True),
    "llama-3.1-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256),
    "qwen2.5-32b": Shape("qwen2", 64, 5120, 40, 8, 128, 27648, 152064),
}
TINY = {
    "tiny-llama": Shape("llama", 2, 64, 4, 2, 16, 96, 512),
    "tiny-qwen2": Shape("qwen2", 2, 64, 4, 1, 16, 96, 512, tied=True),
}
"""For a run that only shows that everything runs."""


def choose_shapes(names: str) -> dict[str, Shape]:
    """The shapes of a comma-separated list; "all" and "tiny" stand for several.

    Raises:
        OptionError: a name of none.
    """
    groups: Mapping[str, dict[str, Shape]] = {"all": SHAPES, "tiny": TINY}
    chosen: dict[str, Shape] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in groups and name not in SHAPES | TINY:
            known = ", ".join([*groups, *SHAPES, *TINY])
            raise OptionError(f"shapes must be some of {known}, but got {name}")
        chosen |= groups[name] if name in groups else {name: (SHAPES | TINY)[name]}
    return chosen


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, positions: int) -> PreTrainedModel:
    """A model of that shape on the device, with weights as small as trained ones."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape.config(positions), dtype=dtype)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def bytes_read(model: PreTrainedModel, length: int) -> int:
    """Bytes that a pass over one token behind so many others has to read: every weight once, keys and values once.

    Of an input embedding that is not the head as well it looks up single rows, which are nothing beside the rest.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    looked_up: Any = model.get_input_embeddings().weight
    weights = sum(weight.nbytes for weight in model.parameters() if weight is not looked_up or weight is head.weight)
    config: Any = model.config
    slot = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * model.dtype.itemsize
    return int(weights + length * slot)
