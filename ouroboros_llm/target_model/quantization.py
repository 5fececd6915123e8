"""Weights in eight or four bits. They are most of what a pass reads; activations stay in the model's own precision.

What one token is multiplied with depends on the weights alone, never on the tokens beside it in a pass, as it would
with activations in eight bits: so drafts change nothing that the quantized model says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.nn.functional import linear

from ..errors import ModelError, OptionError
from ..transformers_api import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantization = Literal["int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

GROUPS = (64, 32)
"""Weights in a row that share a scale and a zero where they have four bits: the first of these that divides the row."""

_NARROW, _ROWS = 4, 8192
"""Tokens up to which torch's own product with eight bits is faster than one with weights that were made whole before;
outputs whose weights are made whole at a time, so that this takes little memory."""

_KERNEL_WIDTH = 64
"""Tokens that the kernel takes at most. More of them are bound by arithmetic, which whole weights suit better."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are whole numbers times a scale.

    Attributes:
        numbers: int8 [outputs, inputs]; or uint8 [outputs, inputs / 2] of two numbers each, in every group those of its
            first half beside those of its second.
        scales: [outputs, groups].
        zeros: uint8 [outputs, groups], the number that stands for 0; None with eight bits, where that is 0.
        dtype: the precision that the weights were given in, and that the layer computes in.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kind: Quantization) -> None:
        """`weight`: [outputs, inputs]. Rows that no group divides get eight bits in any case."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.bias = weight.dtype, bias
        group = next((size for size in GROUPS if not self.in_features % size), None) if kind == "int4" else None
        self.group = group or self.in_features
        made = _in_eight_bits(weight) if group is None else _in_four_bits(weight, group)
        self.numbers: torch.Tensor = nn.Parameter(made[0], requires_grad=False)
        self.scales: torch.Tensor = nn.Parameter(made[1], requires_grad=False)
        self.zeros = None if made[2] is None else nn.Parameter(made[2], requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[.., outputs] of states [.., inputs]."""
        rows = states.reshape(-1, self.in_features)
        return self._product(rows).view(*states.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """What the numbers stand for, [outputs, inputs], for code that looks at weights."""
        return torch.cat([*self._parts(self.dtype)])

    def extra_repr(self) -> str:
        bits = 8 if self.zeros is None else 4
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}, group={self.group}"

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.is_cuda and len(rows) <= _KERNEL_WIDTH and find_spec("triton") is not None:
            from .kernels.quantized_matmul import product

            return product(rows, self.numbers, self.scales, self.zeros, self.bias)
        # In single precision that product of torch's is many times slower than the other way.
        if not rows.is_cuda and self.zeros is None and len(rows) <= _NARROW and rows.dtype == torch.bfloat16:
            found = torch._weight_int8pack_mm(rows, self.numbers, self.scales[:, 0])
        else:
            found = torch.cat([linear(rows, part) for part in self._parts(rows.dtype)], -1)
        return found if self.bias is None else found + self.bias

    def _parts(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The weights, some rows at a time."""
        for first in range(0, self.out_features, _ROWS):
            some = slice(first, first + _ROWS)
            zeros = None if self.zeros is None else self.zeros[some]
            yield whole(self.numbers[some], self.scales[some], zeros).to(dtype)


def whole(numbers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """The weights [outputs, inputs] that numbers, scales and zeros stand for, in single precision."""
    if zeros is None:
        return numbers.float() * scales.float()
    grouped = numbers.view(*scales.shape, -1)
    found = torch.cat([grouped & 15, grouped >> 4], -1).float()
    return ((found - zeros[..., None].float()) * scales[..., None].float()).flatten(1)


def _in_eight_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    most = weight.float().abs().amax(1, keepdim=True)
    scales = _scales(most / 127, weight.dtype)
    return (weight.float() / scales.float()).round().clamp(-127, 127).to(torch.int8), scales, None


def _in_four_bits(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grouped = weight.float().view(len(weight), -1, group)
    # Zero is always one of the numbers.
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    scales = _scales((high - low) / 15, weight.dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    numbers = ((grouped / scales.float()).round() + zeros).clamp(0, 15).to(torch.uint8)
    first, second = numbers.chunk(2, -1)
    return (first | second << 4).flatten(1), scales[..., 0], zeros[..., 0].to(torch.uint8)


def _scales(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded as they are kept, before numbers are made with them; float16 has no room for small ones."""
    kept = exact.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return torch.where(kept > 0, kept, 1)


def check_quantization(kind: Any) -> None:
    """Raises OptionError: neither None nor one of `QUANTIZATIONS`."""
    if kind is not None and kind not in QUANTIZATIONS:
        raise OptionError(f"quantization must be None, 'int8' or 'int4', but got {kind!r}")


def quantize(model: PreTrainedModel, kind: Quantization, device: torch.device | None = None) -> None:
    """Exchange the linear layers of a model for quantized ones, which take their place in `model.generate` too.

    The output head and the embeddings stay as they are; so do weights that are no linear layer's, as those of experts
    kept in one tensor.

    Args:
        device: where to quantize, and where the numbers stay; None: where each layer is.

    Raises:
        OptionError: another kind. ModelError: nothing to exchange, or layers that compute through hooks.
    """
    check_quantization(kind)
    name = model.config._name_or_path or type(model).__name__
    if hasattr(model, "hf_device_map"):
        raise ModelError(f"{name} is spread over devices by hooks, which exchanged layers would not have")
    owner: Any = model
    heads = (owner.get_output_embeddings(), owner.get_input_embeddings())
    kept = {id(head.weight) for head in heads if head is not None}
    exchanged: dict[nn.Module, QuantizedLinear] = {}
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            layer: Any = child
            if type(child) in (nn.Linear, Conv1D) and (child in exchanged or id(layer.weight) not in kept):
                if child not in exchanged:
                    exchanged[child] = _quantized(layer, kind, device)
                    layer.weight = None  # so that weights go one by one
                setattr(parent, child_name, exchanged[child])
    taken = sum(layer.out_features * layer.in_features for layer in exchanged.values())
    total = taken + sum(weight.numel() for weight in _others(model) if id(weight) not in kept)
    if not taken:
        raise ModelError(f"{name} has no linear layers that could be quantized; leave quantization out")
    if taken < total / 2:
        warnings.warn(
            f"only {taken / total:.0%} of the layers' weights of {name} are those of linear layers and have been "
            "quantized; the rest stays as it is",
            RuntimeWarning,
            stacklevel=2,
        )


def _quantized(layer: Any, kind: Quantization, device: torch.device | None) -> QuantizedLinear:
    weight = layer.weight.detach().to(device or layer.weight.device)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(weight.device), requires_grad=False)
    return QuantizedLinear(weight.t().contiguous() if type(layer) is Conv1D else weight, bias, kind)


def _others(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The weights that are left as they were."""
    for module in model.modules():
        if not isinstance(module, QuantizedLinear):
            yield from module.parameters(recurse=False)
