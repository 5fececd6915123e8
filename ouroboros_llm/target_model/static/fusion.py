"""Norms, rotations and gates of a twin as one operation each, in place of the dozen that the library's code makes of
them: under a recording they are what a pass over few tokens waits for.

No list says which architectures compute what. A module's own forward is tried beside each of a few forms, with weights
of no pattern; where one gives the very same numbers the module gets it, and keeps its own where none does.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ...transformers_api import forward_of, is_rotary, takes_one_argument
from .fused_ops import ACTIVATIONS, Activation, Operations, Plain

_NORMS = ((0.0, True), (0.0, False), (1.0, False))
"""What is added to the weight, and whether it comes after rounding."""

_ROTATIONS = tuple((between, once) for between in (False, True) for once in (False, True))
"""Whether neighbors turn rather than halves, and whether only the result is rounded."""

_TRIED = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)
"""What a module may raise that is asked for something else than what it is for."""

Forward = Callable[..., Any]


@torch.inference_mode()
def fuse(twin: nn.Module, operations: Operations) -> Counter[str]:
    """Let modules of a twin compute by `operations`; how many norms, gates and rotations do from now on."""
    fused: Counter[str] = Counter()
    classes: dict[tuple[type, str], type] = {}
    random = torch.Generator().manual_seed(0)
    for module in twin.modules():
        for name, attempt in (("norms", _norm), ("gates", _gate), ("rotations", _rotation)):
            try:
                forward = attempt(module, operations, random)
            except _TRIED:
                continue
            if forward is not None:
                _give(module, name, forward, classes)
                fused[name] += 1
    return fused


def _give(module: Any, name: str, forward: Forward, classes: dict[tuple[type, str], type]) -> None:
    """A class of the module's own kind with another forward: whoever looks at the module finds what it was, and nothing
    that it holds holds it."""
    kind = type(module)
    if name == "rotations":
        own = {"forward": forward}
    else:
        module.__dict__["_fused"] = forward
        own = {"forward": _by_own}
    module.__class__ = classes.setdefault((kind, name), type(kind.__name__, (kind,), own))


def _by_own(self: Any, states: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = self._fused(self, states)
    return found


# Norms.


def _norm(module: nn.Module, operations: Operations, random: torch.Generator) -> Forward | None:
    own = dict(module.named_parameters(recurse=False))
    if len(own) != 1 or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    ((name, weight),) = own.items()
    if weight.dim() != 1 or not takes_one_argument(module):
        return None
    tried, shadow = _random((len(weight),), weight, random), copy.copy(module)
    # Weights that are all 1 would not say when they are multiplied with.
    shadow.__dict__ = {**module.__dict__, "_parameters": {name: nn.Parameter(tried, requires_grad=False)}}
    states = _random((5, len(weight)), weight, random)
    states *= torch.logspace(-5, 2, 5).to(states)[:, None]
    wanted = shadow(states)
    for eps in [value for value in module.__dict__.values() if isinstance(value, float)]:
        for added, late in _NORMS:
            form = (eps, added, late)
            if _same(Plain().norm(states, tried, *form), wanted):
                near = _near(operations.norm(states, tried, *form), wanted)
                return partial(_normed, operations, name, form) if near else None
    return None


def _normed(
    operations: Operations, name: str, form: tuple[float, float, bool], module: Any, states: torch.Tensor
) -> torch.Tensor:
    return operations.norm(states, getattr(module, name), *form)


# Gates.


def _gate(module: nn.Module, operations: Operations, random: torch.Generator) -> Forward | None:
    children = dict(module.named_children())
    linear = {name: child for name, child in children.items() if hasattr(child, "in_features")}
    others = [child for name, child in children.items() if name not in linear]
    if len(linear) not in (2, 3) or len(others) != 1 or not takes_one_argument(module):
        return None
    like = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    if like is None or (activation := _activation(others[0], like, random)) is None:
        return None
    size = next(child.in_features for child in linear.values())
    states = _random((3, int(size)), like, random)  # type: ignore[arg-type]
    wanted = module(states)
    for form in _gated_forms(linear):
        try:
            right = _same(_gated(Plain(), activation, form, module, states), wanted)
        except _TRIED:  # matrices that do not fit
            continue
        if right:
            near = _near(_gated(operations, activation, form, module, states), wanted)
            return partial(_gated, operations, activation, form) if near else None
    return None


def _gated_forms(linear: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Names of what makes gates, ups and the result. Where one matrix makes both of the first there are two names, with
    "" between them if gates come second."""
    yield from permutations(linear)
    if len(linear) == 2:
        yield from ((both, "", down) for both, down in permutations(linear))


def _gated(
    operations: Operations, activation: Activation, form: tuple[str, ...], module: Any, states: torch.Tensor
) -> torch.Tensor:
    first, *second, down = form
    made = getattr(module, first)(states)
    if any(second):
        gates, ups = made, getattr(module, second[0])(states)
    else:
        gates, ups = made.chunk(2, -1)[:: -1 if second else 1]
    found: torch.Tensor = getattr(module, down)(operations.gate(gates, ups, activation))
    return found


def _activation(module: nn.Module, like: torch.Tensor, random: torch.Generator) -> Activation | None:
    states = 4 * _random((64,), like, random)
    wanted = module(states)
    return next((name for name, form in ACTIVATIONS.items() if _same(form(states), wanted)), None)


# Rotations.


def _rotation(module: nn.Module, operations: Operations, random: torch.Generator) -> Forward | None:
    """The forward of a module whose code names a function that turns query and key, with another in its place."""
    forward = forward_of(module)
    like = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    if like is None or not isinstance(forward, FunctionType):
        return None
    for name in forward.__code__.co_names:
        turn: Any = forward.__globals__.get(name)
        if not is_rotary(turn):
            continue
        form = next((form for form in _ROTATIONS if _turns_so(turn, Plain(), form, like, random)), None)
        if form is not None and _turns_so(turn, operations, form, like, random, near=True):
            partly = _turns_so(turn, Plain(), form, like, random, turned=8)
            names = forward.__globals__ | {name: partial(_turned, operations, form, partly, turn)}
            # Dynamo would look the names up in the module of that name.
            del names["__name__"]
            other = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            other.__kwdefaults__ = forward.__kwdefaults__
            return other
    return None


def _turns_so(
    turn: Forward,
    operations: Operations,
    form: tuple[bool, bool],
    like: torch.Tensor,
    random: torch.Generator,
    *,
    near: bool = False,
    turned: int = 16,
) -> bool:
    """Whether a function turns the first so many of 16 numbers as `operations` do."""
    query, key = (_random((1, 3, heads, 16), like, random).transpose(1, 2) for heads in (4, 2))
    cos, sin = (_random((1, 3, turned), like, random) for _ in range(2))
    try:
        pairs = [*zip(operations.rotate(query, key, cos, sin, *form), turn(query, key, cos, sin), strict=True)]
    except _TRIED:
        return False
    return all((_near if near else _same)(found, wanted) for found, wanted in pairs)


def _turned(
    operations: Operations,
    form: tuple[bool, bool],
    partly: bool,
    turn: Forward,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *more: Any,
    **named: Any,
) -> Any:
    # Asked for another layout or precision it is the library's to do.
    alike = q.dtype == k.dtype == cos.dtype and q.shape[0] == 1 and cos.shape[:2] == (1, q.shape[2])
    if more or named or not alike or (cos.shape[2] != q.shape[3] and not partly):
        return turn(q, k, cos, sin, *more, **named)
    return operations.rotate(q, k, cos, sin, *form)


# Trying.


def _random(shape: tuple[int, ...], like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random).to(like)


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def _near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """But for the last bits."""
    tolerance = 8 * torch.finfo(wanted.dtype).eps
    near = torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance * float(wanted.abs().max()) / 8)
    return found.dtype == wanted.dtype and found.shape == wanted.shape and near
