"""What norms, rotations and gates compute, as one operation each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch.nn.functional import gelu, silu

Activation = Literal["silu", "gelu", "gelu tanh"]
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu tanh": partial(gelu, approximate="tanh"),
}


class Operations(Protocol):
    """The forms; `Plain` computes them by torch's own operations, the module `fused` by kernels."""

    def norm(self, states: torch.Tensor, weight: torch.Tensor, eps: float, added: float, late: bool) -> torch.Tensor:
        """Root mean square norm of states [.., size]. The weight [size], with a number `added`, is multiplied with
        before the result is rounded, or `late`, after it."""

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, between: bool, once: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key [1, heads, width, size] turned by angles [1, width, turned]; the rest of the size stays.

        Args:
            between: whether neighbors turn; else the first half with the second.
            once: whether only the result is rounded, not each step.
        """

    def gate(self, gates: torch.Tensor, ups: torch.Tensor, activation: Activation) -> torch.Tensor:
        """The activation of `gates` [.., size], rounded, times `ups`."""


class Plain:
    """The forms by torch's own operations, rounded as the library's modules round."""

    def norm(self, states: torch.Tensor, weight: torch.Tensor, eps: float, added: float, late: bool) -> torch.Tensor:
        exact = states.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        return weight * exact.to(states.dtype) if late else (exact * (added + weight.float())).to(states.dtype)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, between: bool, once: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _rotated(query, cos, sin, between, once), _rotated(key, cos, sin, between, once)

    def gate(self, gates: torch.Tensor, ups: torch.Tensor, activation: Activation) -> torch.Tensor:
        return ACTIVATIONS[activation](gates) * ups


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, between: bool, once: bool) -> torch.Tensor:
    turned, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    cos, sin = cos[:, None], sin[:, None]
    if once:
        turned, cos, sin = turned.float(), cos.float(), sin.float()
    if between:
        other = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    return torch.cat([(turned * cos + other * sin).to(states.dtype), rest], -1)


def operations_for(device: torch.device) -> Operations | None:
    """Kernels where there are any for a device; on others a module of the library's own is as good."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from ..kernels import fused

    return fused
