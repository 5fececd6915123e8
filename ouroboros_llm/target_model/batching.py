"""Passes of several texts made as one: the weights, which are most of what a pass reads, are read once for all.

The drafts lie behind one another as a single sequence. Every node keeps the position in its own text, and the mask lets
it see that text and its own ancestors alone. Each text's keys and values stay in the buffers of its own target.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from math import exp, log
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from ..decoding.draft_tree import MAX_WIDTH, DraftTree
from ..decoding.target import Pass
from ..transformers_api import Cache, CacheLayer, complete_layer, rope_of
from .kv_cache import SlotLayer
from .latency import LatencyModel


class BatchableTarget(Protocol):
    """A target whose passes can be made together with others' of the same model."""

    token_ids: list[int]
    cache: Any

    def begin(self, draft: DraftTree, text: Sequence[int] | None = None) -> Sequence[int]:
        """Get ready for a pass; of `text` the tokens before the draft's root that are still to be read."""

    def read(
        self, rows: Sequence[tuple[DraftTree, int]], states: Cache, wanted: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Make one pass over drafts, each behind so many committed tokens of a text of its own; logits of `wanted`."""


BATCH_TOKENS = 512
"""Tokens of a pass that is made for several texts: as many as of a chunk of one prompt."""

_OWN_POSITIONS = ("attn_temperature_tuning",)
_BY_LONGEST = ("dynamic", "longrope")


def can_batch(config: Any) -> bool:
    """Whether nothing in a model depends on where in a pass a token stands, rather than on its position.

    Rotary angles that follow the longest text of a pass would make one text depend on another; a probe over short
    texts would not reach them.
    """
    return not any(getattr(config, name, None) for name in _OWN_POSITIONS) and not any(
        kind in str(rope_of(config)) for kind in _BY_LONGEST
    )


class Batcher:
    """Decides which passes of one model are made together, by measured times, and makes them."""

    def __init__(
        self, times: LatencyModel, lock: threading.RLock, batches: Callable[[PreTrainedModel], bool] = lambda _: True
    ) -> None:
        """`lock`: lets one pass at a time run on the model; `batches`: whether the model takes several texts in a pass,
        asked before the first such pass."""
        self.lock, self.times, self._batches = lock, BatchLatency(times), batches
        self.members = 1
        """Passes that are made in one at the moment: every draft has to do with that share of it."""

    def cost(self, width: int) -> float:
        """What a draft costs beside those of the other members, if theirs are as wide, in units of no drafts at all."""
        if self.members == 1:
            return self.times.alone(width)
        return self.times.alone(self.members * width) / self.times.alone(self.members)

    @property
    def seconds(self) -> float | None:
        """A member's share of a pass without drafts; None before any pass."""
        one = self.times.one
        return None if one is None else one * self.times.alone(self.members) / self.members

    def make(self, wanted: Sequence[Pass]) -> dict[Pass, torch.Tensor | None]:
        """The logits of the first of `wanted`, and of the others that are made with it.

        None stands for a pass that is to be made alone: no other goes with it, or something failed, and its maker is
        to hear of that by itself.
        """
        chosen = self._chosen(wanted)
        if len(chosen) > 1 and not self._takes_several(chosen[0]):
            chosen = chosen[:1]
        self.members = len(chosen)
        if len(chosen) == 1:
            return {chosen[0]: None}
        try:
            return dict(zip(chosen, self.together(chosen), strict=True))
        except Exception:
            self.times.failed(*_sum(map(_size, chosen)))
            return dict.fromkeys(chosen)

    def together(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The logits of each pass, all made in one. Where that raises, every target is as it was."""
        targets: list[Any] = [wanted.target for wanted in passes]
        size = _sum(map(_size, passes))
        with self.lock:
            began = perf_counter()
            try:
                logits = _forward(targets, passes)
                _wait_for(logits[0])
                seconds = perf_counter() - began
                self.times.add(*size, seconds)
            except BaseException:
                for target in targets:
                    target.rewind(len(target.token_ids))
                raise
        for wanted in passes:
            wanted.seconds = seconds
        return logits

    def saw_alone(self, logits: torch.Tensor, tokens: int, keys: int, began: float) -> None:
        """Take note of a pass over a part of a prompt; `tokens` of it were read in sight of `keys`."""
        if tokens > MAX_WIDTH:
            _wait_for(logits)
            self.times.add(1, tokens, keys, perf_counter() - began)

    def _takes_several(self, first: Pass) -> bool:
        target: Any = first.target
        with self.lock:
            return self._batches(target.model)

    def _chosen(self, wanted: Sequence[Pass]) -> Sequence[Pass]:
        """The first of `wanted` and as many others as promise to save most time, narrow ones first."""
        first, *others = [(_size(one), one) for one in wanted]
        order = [first, *sorted(others, key=lambda other: other[0].tokens)]
        alone, best, most, total = 0.0, 1, 0.0, NOTHING
        for size, _ in order:
            if total.passes and total.tokens + size.tokens > BATCH_TOKENS:
                break
            alone, total = alone + self.times.cost(*size), _sum((total, size))
            if (saved := alone - self.times.cost(*total)) > most:
                best, most = total.passes, saved
        if best < total.passes:
            self.times.declined(*total)
        return [one for _, one in order[:best]]


class Size(NamedTuple):
    """Of one or several passes."""

    passes: int
    tokens: int
    """That they read."""
    keys: int
    """Tokens that these see."""


NOTHING = Size(0, 0, 0)


def _size(wanted: Pass) -> Size:
    target, width = wanted.target, wanted.draft.width
    if wanted.text is None:
        return Size(1, width, len(target.token_ids) + width)
    before = len(wanted.text) - 1
    known: int = target.common_prefix(wanted.text)  # type: ignore[attr-defined]  # what can be packed can do that
    return Size(1, before - known + width, before + width)


def _sum(sizes: Iterable[Size]) -> Size:
    return Size(*map(sum, zip(NOTHING, *sizes, strict=True)))


@torch.inference_mode()
def _forward(targets: Sequence[BatchableTarget], passes: Sequence[Pass]) -> list[torch.Tensor]:
    unread = [target.begin(wanted.draft, wanted.text) for target, wanted in zip(targets, passes, strict=True)]
    drafts = [wanted.draft.behind(before) for wanted, before in zip(passes, unread, strict=True)]
    wanted_rows = [
        min(wanted.before, len(before)) + wanted.draft.width for wanted, before in zip(passes, unread, strict=True)
    ]
    rows = [(draft, len(target.token_ids)) for draft, target in zip(drafts, targets, strict=True)]
    logits = targets[0].read(rows, _shared(targets, drafts), _last_of_each([row.width for row in drafts], wanted_rows))
    for target, before in zip(targets, unread, strict=True):
        target.token_ids += before
    return list(torch.split(logits, wanted_rows))


def _last_of_each(widths: Sequence[int], wanted: Sequence[int]) -> torch.Tensor | None:
    """The places of the last `wanted` nodes of each draft; None where they are all."""
    if sum(widths) == sum(wanted):
        return None
    ends = torch.tensor(widths).cumsum(0).tolist()
    return torch.cat([torch.arange(end - count, end) for end, count in zip(ends, wanted, strict=True)])


def _shared(targets: Sequence[BatchableTarget], drafts: Sequence[DraftTree]) -> Cache:
    """A cache whose layers are those of all targets."""
    widths = [draft.width for draft in drafts]
    layers = zip(*(target.cache.states.layers for target in targets), strict=True)
    return Cache(layers=[BatchedLayer(own, widths) for own in layers])


@complete_layer
class BatchedLayer(CacheLayer):
    """One layer of several texts for the length of a pass: writes to each its own part, shows all of them."""

    def __init__(self, layers: Sequence[SlotLayer], widths: Sequence[int]) -> None:
        super().__init__()
        self._layers, self._widths, self.is_initialized = layers, list(widths), True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = (torch.split(states, self._widths, 2) for states in (key_states, value_states))
        parts = zip(self._layers, *new, strict=True)
        keys, values = zip(*(layer.update(*part) for layer, *part in parts), strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return sum(layer.length for layer in self._layers)


def _wait_for(logits: torch.Tensor) -> None:
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)


_RATE, _STEP, _PACE_RATE = 0.3, 1.0, 0.1
_FORGET = 0.99

Kind = tuple[bool, int, int]
"""Passes whose surplus is the same: whether for several texts, and the sizes of tokens and keys in powers of two."""


class BatchLatency:
    """What passes cost that `LatencyModel` does not know: over several texts, or over more tokens than a draft has.

    Such a pass takes what one over as many tokens of a single text would, and a surplus: for keys and values that are
    laid side by side, and for scores of texts that do not see each other. The surplus is measured for each kind.
    """

    def __init__(self, times: LatencyModel) -> None:
        self._times = times
        self._surplus: dict[Kind, float] = {}

    @property
    def one(self) -> float | None:
        """Seconds of a pass over one token."""
        return self._times.one

    def alone(self, tokens: int) -> float:
        """Cost of a pass over so many tokens of one text, in units of a pass over one; deduced beyond a draft's."""
        return self._times.cost(tokens)

    def cost(self, passes: int, tokens: int, keys: int) -> float:
        """Cost of making so many passes in one: over `tokens` in all, which see `keys` in all."""
        return self.alone(tokens) * exp(self._surplus_of(_kind(passes, tokens, keys)))

    def add(self, passes: int, tokens: int, keys: int, seconds: float) -> None:
        """Take note of such a pass."""
        one, kind = self.one, _kind(passes, tokens, keys)
        if one is None:
            return
        surprise = log(seconds / one / self.cost(passes, tokens, keys))
        self._surplus[kind] = self._surplus_of(kind) + _RATE * max(-_STEP, min(surprise, _STEP))
        # Where no other passes are made, these alone tell whether the machine is slow at the moment.
        self._times.follow(_PACE_RATE * surprise)

    def failed(self, passes: int, tokens: int, keys: int) -> None:
        """Such a pass raised: better none like it for a while."""
        kind = _kind(passes, tokens, keys)
        self._surplus[kind] = max(self._surplus_of(kind), 2 * _STEP)

    def declined(self, passes: int, tokens: int, keys: int) -> None:
        """Such a pass seemed not to pay: each time it looks a little better, so that it is tried again."""
        kind = _kind(passes, tokens, keys)
        self._surplus[kind] = self._surplus_of(kind) * _FORGET

    def _surplus_of(self, kind: Kind) -> float:
        """In logarithms; of kinds that have not been seen, that of the most similar one that has."""
        if kind not in self._surplus:
            similar = [known for known in list(self._surplus) if known[0] == kind[0]]
            distances = [abs(known[1] - kind[1]) + abs(known[2] - kind[2]) for known in similar]
            return self._surplus[similar[distances.index(min(distances))]] if similar else 0.0
        return self._surplus[kind]


def _kind(passes: int, tokens: int, keys: int) -> Kind:
    return passes > 1, tokens.bit_length(), keys.bit_length()
