"""Which committed tokens and which nodes of a draft every node may see, for each kind of attention layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..decoding.draft_tree import DraftTree
from ..transformers_api import attention_of

_Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(positions of queries [.., 1], positions of keys [1, ..]) -> whether the layer lets one see the other."""


_OWN_WINDOWS = ("attention_types", "window_size", "local_attention", "attention_window_size")


def tree_masks(
    rows: Sequence[tuple[DraftTree, int]], config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The attention mask of a pass over drafts, each behind so many committed tokens of a text of its own.

    [1, 1, width, length + width] for models whose layers are alike, else one such mask per layer type, width and length
    being sums over `rows`: no text sees another. Boolean for scaled dot product attention; for the library's eager
    attention, which adds its mask to the scores, a float one.
    """
    # Several texts take many small steps, which an accelerator would be slower to begin than to do.
    where = device if len(rows) == 1 else torch.device("cpu")
    masks: dict[str, torch.Tensor] = {}
    for kind, sees in _layer_kinds(config).items():
        seen: torch.Tensor = torch.block_diag(*(_seen(*row, sees, where) for row in rows))  # type: ignore[no-untyped-call]
        masks[kind] = _as_scores(seen, config, dtype).to(device)[None, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _seen(draft: DraftTree, length: int, sees: _Sees, device: torch.device) -> torch.Tensor:
    """[width, length + width]: whether the row's node sees the column's token."""
    positions = torch.tensor(draft.depths, device=device) + length
    keys = torch.cat([torch.arange(length, device=device), positions])
    lineage = torch.ones(draft.width, length + draft.width, dtype=torch.bool, device=device)
    lineage[:, length:] = torch.from_numpy(draft.ancestor_mask).to(device)
    return lineage & sees(positions[:, None], keys[None, :])


def _as_scores(seen: torch.Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> torch.Tensor:
    """A mask as the model's attention wants it."""
    if attention_of(config) != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def takes_masks(config: PreTrainedConfig) -> bool:
    """Whether our masks say all that a model's layers may see.

    Flash and flex attention take no mask of this shape. Windows that a model applies by itself (GPT-Neo's) count slots,
    which are positions in a chain but not in a tree, and a probe over a few tokens would not reach them.
    """
    windows = any(getattr(config, name, None) for name in _OWN_WINDOWS)
    return attention_of(config) in ("sdpa", "eager") and not windows


def _layer_kinds(config: Any) -> dict[str, _Sees]:
    """Per layer type of the model, what its layers see of the text before them."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    sees: dict[str, _Sees] = {"full_attention": lambda query, key: key <= query}
    if window:
        sees["sliding_attention"] = lambda query, key: (key <= query) & (query - key < window)
    if chunk:
        sees["chunked_attention"] = lambda query, key: (key <= query) & (query // chunk == key // chunk)
    kinds = set(getattr(config, "layer_types", None) or _only_kind(config))
    return {kind: sees.get(kind, sees["full_attention"]) for kind in sorted(kinds)}


def _only_kind(config: Any) -> tuple[str]:
    """The layer type of models that do not list them: Mistral slides as soon as it has a window."""
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    chunks = getattr(config, "attention_chunk_size", None)
    return ("sliding_attention",) if slides else ("chunked_attention",) if chunks else ("full_attention",)
