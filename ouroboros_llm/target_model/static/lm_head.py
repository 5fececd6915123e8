"""LM head with float32 logits from half-precision weights: no ties from rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

_HALVES = (torch.bfloat16, torch.float16)
_RESCORED = 8
"""Logits of each row that are computed again where a product cannot be had in single precision."""


class Float32LMHead(nn.Module):
    """An output head that answers in float32 from the half precision weights that it shares with another."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self._accumulates = _accumulates(self.weight)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [.., vocabulary] of states [.., size]."""
        if not self._accumulates:
            return self._rescored(states)
        logits = torch.mm(states.flatten(0, -2), self.weight.t(), out_dtype=torch.float32)
        if self.bias is not None:
            logits += self.bias
        return logits.view(*states.shape[:-1], -1)

    def _rescored(self, states: torch.Tensor) -> torch.Tensor:
        """The likeliest few computed once more from the same numbers; the rest as they were, and no likelier."""
        rough = linear(states, self.weight, self.bias).float()
        likeliest = rough.topk(min(_RESCORED, rough.shape[-1])).indices
        logits = (self.weight[likeliest].float() @ states.float()[..., None])[..., 0]
        if self.bias is not None:
            logits += self.bias[likeliest]
        # Rounding may have put one of the rest above what is now known of the least of the few.
        return rough.minimum(logits.amin(-1, keepdim=True)).scatter(-1, likeliest, logits)


def replace_lm_head(twin: PreTrainedModel) -> bool:
    """Exchange the output head of a twin; whether there was any need, and a plain matrix in its place."""
    head: Any = twin.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear or head.weight.dtype not in _HALVES:
        return False
    exchanged = Float32LMHead(head)
    for module in twin.modules():
        for name, child in module._modules.items():
            if child is head:
                module._modules[name] = exchanged
    return True


def _accumulates(weight: torch.Tensor) -> bool:
    """Whether the device gives a half precision product as the float32 that it was summed up in."""
    try:
        torch.mm(weight[:8], weight[:8].t(), out_dtype=torch.float32)
    except (TypeError, RuntimeError, NotImplementedError):  # torch before 2.8, a CPU
        return False
    return True
