"""Passes of fixed shape: padded to one of a few widths, over slots of fixed number, with attention of our own.

The library's forward runs as it is, on the model's twin. Two functions, registered under a name that only the twin's
configuration knows, tell its layers what nodes see and how they attend; a cache shows them the text's own slots.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ...decoding.draft_tree import MAX_WIDTH, DraftTree
from ...decoding.target import GreedyAcceptance
from ...errors import ModelError
from ...transformers_api import Cache, forward_signature, unregister_attention, use_attention
from ..failures import out_of_memory, reason_of
from ..kv_cache import SlotCache
from ..latency import on, padded
from .attention_backend import Attention, AttentionBackend, attention_for
from .cuda_graphs import CudaGraphCapturer, CudaGraphs, GraphCapturer, Results
from .device_accept import accepted, found, order
from .fused_ops import Operations, operations_for
from .fusion import fuse
from .lm_head import replace_lm_head
from .shared_weights import clone_sharing_weights
from .tree_attention import DraftInputs


class StaticForward:
    """How one model's drafts are verified in passes of fixed shape; for all its texts, one pass at a time.

    Attributes:
        model: the twin that makes these passes.
        fused: how many norms, gates and rotations of the twin are one operation each.
        reader: what reads prompts, with the library's own attention and the same output head; None: the model itself,
            which is not held here, so that it can be freed.
        failure: of the first pass that failed, in one line; targets make no more of them then.
        on_failure: told of the pass that failed, once. None: nobody takes over, so that pass raises.
    """

    failure: str | None = None
    on_failure: Callable[[Exception], None] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        attention: Attention | None = None,
        recorder: GraphCapturer | None = None,
        operations: Operations | None = None,
    ) -> None:
        """`attention`, `recorder`, `operations`: None: what is best on the model's device; operations, if there are any
        there, are those that some modules are fused into.

        Raises:
            ModelError: the weights lie on several devices, or layers compute through hooks.
        """
        if len({parameter.device for parameter in model.parameters()}) > 1 or hasattr(model, "hf_device_map"):
            raise ModelError("its layers are spread over devices")
        self._attending = AttentionBackend(attention or attention_for(model.device))
        weakref.finalize(self, unregister_attention, self._attending.name)
        self.model = clone_sharing_weights(model)
        replace_lm_head(self.model)
        self.reader = _reader(model)
        operations = operations or operations_for(model.device)
        self.fused = fuse(self.model, operations) if operations else Counter[str]()
        use_attention(self.model.config, self._attending.name)
        self._signature = forward_signature(self.model)
        config: Any = self.model.config.get_text_config(decoder=True)
        self._layers: int = config.num_hidden_layers
        # Scales that follow the length need it; where it is not used, a number keeps it out of Python's arithmetic.
        self._counts = bool(getattr(config, "attn_temperature_tuning", None))
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        # Only layers that keep nothing of a text can be recorded for all of them.
        if recorder is None and model.device.type == "cuda" and self._in_place:
            recorder = CudaGraphCapturer(model.device)
        self._recordings = CudaGraphs(recorder) if recorder else None
        self._nodes: dict[int, DraftInputs] = {}

    @torch.inference_mode()
    def verify(self, draft: DraftTree, length: int, cache: SlotCache) -> torch.Tensor:
        """One pass over `draft` behind the first `length` tokens of a text, of which there are some, in `cache`.

        Returns:
            Logits [width, vocabulary], there until the next pass. The nodes are written behind the text, as the
            library's forward writes them.

        Raises:
            RuntimeError: the model's layers did not attend as they were told, so the logits would be wrong.
        """
        (logits,) = self._pass(draft, length, cache, None)
        return logits[: draft.width]

    @torch.inference_mode()
    def walk(self, draft: DraftTree, length: int, cache: SlotCache, greedy: GreedyAcceptance) -> torch.Tensor:
        """As `verify`, and the walk down `draft`. When the pass is over, keys and values of the path lie behind
        the text, one after the other.

        Returns:
            What `walk.read` reads, there until the next pass.
        """
        (row,) = self._pass(draft, length, cache, greedy)
        return row

    def ready(self, width: int, greedy: GreedyAcceptance | None = None) -> bool:
        """Whether a pass over a draft of that width is made as all later ones are, with nothing to prepare."""
        return self._recordings is None or width > MAX_WIDTH or self._recordings.complete(padded(width), _kind(greedy))

    def give_up(self, error: Exception) -> bool:
        """Make no more passes because one raised `error`; false where somebody else has to deal with that."""
        if self.on_failure is None or out_of_memory(error):
            return False
        self.failure = reason_of(error)
        self.on_failure(error)
        return True

    def _pass(self, draft: DraftTree, length: int, cache: SlotCache, greedy: GreedyAcceptance | None) -> Results:
        width, guesses = padded(draft.width), greedy.guesses(draft) if greedy else ()
        cache.rewind(length)
        cache.reserve(length + (MAX_WIDTH if self._recordings else width))
        nodes = self.filled(width, draft, length, cache, guesses)
        with on(self.model.device):
            if self._recordings is None:
                # A path of a chain is where it belongs already.
                results = self._checked(nodes, cache, greedy, moves=not draft.is_chain)
            else:
                if not self._recordings.complete(width, _kind(greedy)):
                    self.filled(MAX_WIDTH, draft, length, cache, guesses)

                def step(wide: int) -> Results:
                    return self._checked(self._nodes[wide], cache, greedy, moves=wide > 1)

                results = self._recordings.run(width, step, _kind(greedy))
        cache.extend(draft.width)
        return results

    def _checked(self, nodes: DraftInputs, cache: SlotCache, greedy: GreedyAcceptance | None, moves: bool) -> Results:
        self._attending.calls = 0
        states = self.shown(nodes, cache)
        logits = self.step(nodes, states)
        if (calls := self._attending.calls) != self._layers:
            raise RuntimeError(f"{calls} of {self._layers} layers use the library's attention interface")
        return (logits,) if greedy is None else (self.walked(nodes, states, logits, greedy.count, moves),)

    def walked(self, nodes: DraftInputs, states: Cache, logits: torch.Tensor, count: int, moves: bool) -> torch.Tensor:
        """What a walk down the nodes finds, on the device alone; what is to be `moved` is."""
        # A row without numbers has no likeliest token; `walk.checked` finds it, and the device need not be waited for.
        likeliest = torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))
        path = accepted(nodes, likeliest)
        if moves:
            self._attending.attention.move(nodes, order(nodes, path), states)
        return found(path, likeliest, logits, nodes, count)

    def step(self, nodes: DraftInputs, states: Cache) -> torch.Tensor:
        """The pass itself, on the device alone; logits [padded width, vocabulary]."""
        self._attending.nodes = nodes
        output = self._signature.call(self.model, nodes.ids, states, position_ids=nodes.positions)
        logits: torch.Tensor = output.logits[0]
        return logits

    def shown(self, nodes: DraftInputs, cache: SlotCache) -> Cache:
        """The text's slots as a pass over `nodes` reads and writes them."""
        layers: Sequence[Any] = cache.states.layers
        show = self._attending.attention.layer
        return Cache(layers=[show(number, layer, nodes, self._counts) for number, layer in enumerate(layers)])

    def filled(
        self, width: int, draft: DraftTree, length: int, cache: SlotCache, guesses: Sequence[int] = ()
    ) -> DraftInputs:
        """The nodes of that width, which are those of `draft` from now on."""
        layers = len(cache.states.layers) if self._in_place else 0
        if width not in self._nodes:
            self._nodes[width] = DraftInputs(width, self.model.device, layers)
        addresses = cache.addresses() if layers else ()
        self._nodes[width].fill(draft, length, self._vocabulary, cache.capacity, addresses, guesses)
        return self._nodes[width]

    @property
    def _in_place(self) -> bool:
        return self._attending.attention.in_place


def _kind(greedy: GreedyAcceptance | None) -> int | None:
    """Passes of one kind do the same."""
    return None if greedy is None else greedy.count


def _reader(model: PreTrainedModel) -> PreTrainedModel | None:
    twin = clone_sharing_weights(model)
    return twin if replace_lm_head(twin) else None
