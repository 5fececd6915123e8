"""Passes of fixed shape: padded to one of a few widths, over slots of fixed number, with attention of our own.

The library's forward runs as it is, on the model's twin. Two functions, registered under a name that only the twin's
configuration knows, tell its layers what nodes see and how they attend; a cache shows them all slots of the text's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..draft_tree import DraftTree
from ..errors import ModelError
from .attention import Nodes, Sees, attend
from .cache import SlotCache, SlotLayer
from .head import put_float32_head
from .pass_times import WIDTHS
from .twin import twin_of

_numbers = count()


def padded(width: int) -> int:
    """The width of the pass that a draft of `width` nodes takes."""
    return next(wide for wide in WIDTHS if wide >= width)


class Attending:
    """What the library's layers call during a pass. It holds nothing of the model, so that it can outlive it."""

    def __init__(self) -> None:
        self.name = f"ouroboros_{next(_numbers)}"
        self.nodes: Nodes | None = None
        self.calls = 0
        """Layers that attended in this pass."""
        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, self.seen)

    def seen(self, *, kv_length: int, mask_function: Sees, **_: Any) -> torch.Tensor:
        """The library asks this once for every kind of layer; what it gets it hands to `attend`."""
        assert self.nodes is not None
        return self.nodes.seen(mask_function, kv_length)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """The library's layers call this. Windows come with the mask, so the rest of what they say is not needed."""
        if attention_mask is None or position_bias is not None:
            raise NotImplementedError("attention without a mask of ours, or with a bias for positions")
        self.calls += 1
        return attend(query, key, value, attention_mask, scaling, softcap, s_aux), None


def _forget(name: str) -> None:
    # There is no way to take a name back.
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


class StaticForward:
    """How one model's drafts are verified in passes of fixed shape; for all its texts, one pass at a time.

    Attributes:
        model: the twin that makes these passes.
        reader: what reads prompts, with the library's own attention and the same output head; None: the model itself,
            which is not held here, so that it can be freed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelError where the weights lie on several devices, or layers compute through hooks."""
        if len({parameter.device for parameter in model.parameters()}) > 1 or hasattr(model, "hf_device_map"):
            raise ModelError("its layers are spread over devices")
        self._attending = Attending()
        weakref.finalize(self, _forget, self._attending.name)
        self.model = twin_of(model)
        put_float32_head(self.model)
        self.reader = _reader(model)
        self.model.config._attn_implementation = self._attending.name
        config: Any = self.model.config.get_text_config(decoder=True)
        self._layers: int = config.num_hidden_layers
        # Scales that follow the length need it; where it is not used, a number keeps it out of Python's arithmetic.
        self._counts = bool(getattr(config, "attn_temperature_tuning", None))
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self._nodes: dict[int, Nodes] = {}

    @torch.inference_mode()
    def verify(self, draft: DraftTree, length: int, cache: SlotCache) -> torch.Tensor:
        """One pass over `draft` behind the first `length` tokens of a text, of which there are some, in `cache`.

        Returns:
            Logits [width, vocabulary]. The nodes are written behind the text, as the library's forward writes them.

        Raises:
            RuntimeError: the model's layers did not attend as they were told, so the logits would be wrong.
        """
        nodes = self._filled(draft, length)
        cache.rewind(length)
        cache.reserve(length + nodes.width)
        self._attending.calls = 0
        logits = self.step(nodes, self.shown(nodes, cache))
        if self._attending.calls != self._layers:
            raise RuntimeError(
                f"{self._attending.calls} of {self._layers} layers use the library's attention interface"
            )
        cache.extend(draft.width)
        return logits[: draft.width]

    def step(self, nodes: Nodes, states: Cache) -> torch.Tensor:
        """The pass itself, on the device alone; logits [padded width, vocabulary]."""
        self._attending.nodes = nodes
        output = self.model(
            input_ids=nodes.ids,
            position_ids=nodes.positions,
            past_key_values=states,
            use_cache=True,
            return_dict=True,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def shown(self, nodes: Nodes, cache: SlotCache) -> Cache:
        """The text's slots as a pass over `nodes` reads and writes them."""
        layers: Sequence[Any] = cache.states.layers
        return Cache(layers=[StaticLayer(layer, nodes, cache.capacity, self._counts) for layer in layers])

    def _filled(self, draft: DraftTree, length: int) -> Nodes:
        width = padded(draft.width)
        if width not in self._nodes:
            self._nodes[width] = Nodes(width, self.model.device)
        self._nodes[width].fill(draft, length, self._vocabulary)
        return self._nodes[width]


def _reader(model: PreTrainedModel) -> PreTrainedModel | None:
    twin = twin_of(model)
    return twin if put_float32_head(twin) else None


class StaticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # the library's hook is not typed
    """One layer of a text for the length of a pass: writes nodes behind the text, shows all slots."""

    # Windows are for the mask: the library's own sliding layers move their slots, which nodes of a tree cannot share.
    is_compileable, is_sliding, is_croppable = True, False, False

    def __init__(self, own: SlotLayer, nodes: Nodes, slots: int, counts: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own, self._nodes, self._slots, self._counts, self.is_initialized = own, nodes, slots, counts, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The text was begun by a pass of the library's own."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for slots, states in ((self._own.keys, key_states), (self._own.values, value_states)):
            slots.index_copy_(2, self._nodes.slots, states)
        return self._own.keys, self._own.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots, 0

    def get_seq_length(self) -> Any:
        return self._nodes.length if self._counts else 0

    def get_max_length(self) -> int:
        return self._slots
