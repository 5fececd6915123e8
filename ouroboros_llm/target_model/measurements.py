"""Measurements of a model on this machine, kept on disk: the next process need not probe and time it again.

They belong to a model's weights and code, to the device, and to the versions of torch and of transformers: whatever
could change a logit or the time of a pass is part of the key under which they are found.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import marshal
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import torch
from torch import nn
from transformers import PreTrainedModel

from ..decoding.target import Branching
from ..environment import cache_folder
from ..transformers_api import VERSION, attention_function, attention_of
from .capabilities import Probe
from .latency import WIDTHS

logger = logging.getLogger(__name__)

_FORMAT = 2
_FOLDER = "measurements"
_LIBRARIES = ("torch", "transformers")
"""Packages whose code is known by their version."""

_memory: dict[Path, Measurements] = {}
"""What this process found or made, for folders that cannot be written to."""

_NAMES_OF_A_COPY = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class BackendMeasurements:
    """What was found out about one of the ways in which a model's passes are made."""

    probe: Probe
    costs: tuple[float, ...]
    """Logarithm of the time of a pass for each of `WIDTHS`; the unit is the time of some pass."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """What was found out about a model; None: not yet."""

    eager: BackendMeasurements
    static: BackendMeasurements | None = None
    """Of passes of fixed shape; None also where they cannot be made."""
    static_wins: bool | None = None
    """Whether passes of fixed shape won the race against the library's own."""
    batches: bool | None = None
    """Whether one pass can be made over several texts."""


def find(key: str) -> Measurements | None:
    """The measurements under a key; None where there are none, or none that can be read."""
    path = _path(key)
    if path not in _memory and (read := _read(path)) is not None:
        _memory[path] = read
    return _memory.get(path)


def latest(key: str) -> Measurements | None:
    """The measurements under a key as another process may have left them since; None where there are none."""
    path = _path(key)
    return _read(path) or _memory.get(path)


def _read(path: Path) -> Measurements | None:
    """The measurements in a file; None where there are none, or none that can be read."""
    try:
        return _decoded(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.info("measurements in %s cannot be read (%s); they are made anew", path, error)
        return None


def keep(key: str, measurements: Measurements) -> None:
    """Write measurements under a key, whole or not at all. A folder that cannot be written to is no error."""
    path = _path(key)
    _memory[path] = measurements
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"format": _FORMAT, **asdict(measurements)}, indent=1), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        logger.info("measurements cannot be kept in %s (%s)", path.parent, error.strerror)
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _path(key: str) -> Path:
    return cache_folder() / _FOLDER / f"{key}.json"


def _decoded(data: Mapping[str, Any]) -> Measurements:
    """Raises ValueError, TypeError or KeyError where the data are not what `keep` writes."""
    if data["format"] != _FORMAT:
        raise ValueError(f"format {data['format']!r}")
    static = None if data["static"] is None else _backend(data["static"])
    for name in ("static_wins", "batches"):
        if data[name] not in (None, True, False):
            raise ValueError(f"{name} {data[name]!r}")
    if data["static_wins"] and static is None:
        raise ValueError("a race won by passes that cannot be made")
    return Measurements(_backend(data["eager"]), static, data["static_wins"], data["batches"])


def _backend(data: Mapping[str, Any]) -> BackendMeasurements:
    probe, costs = Probe(**data["probe"]), tuple(map(float, data["costs"]))
    known = {field.name for field in fields(Probe)}
    if probe.branching not in get_args(Branching) or set(data["probe"]) != known:
        raise ValueError(f"probe {data['probe']!r}")
    if len(costs) != len(WIDTHS) or not all(map(isfinite, (*costs, probe.margin))) or probe.margin < 0:
        raise ValueError(f"costs {costs} or margin {probe.margin}")
    return BackendMeasurements(probe, costs)


def key_of(model: PreTrainedModel, fingerprint: str) -> str | None:
    """The key of a model's measurements; None where its code cannot be told from another's.

    Args:
        fingerprint: of the model's weights.
    """
    try:
        code = _code(model)
        config = _plain(model.config.to_dict())
    except Exception as error:  # whatever a model's code raises: it is measured by every process
        logger.debug("no key for the measurements of %s (%s)", type(model).__name__, error)
        return None
    if code is None:
        return None
    known = (
        (own_code(), torch.__version__, VERSION),
        _device(model.device),
        (
            str(model.dtype),
            attention_of(model.config.get_text_config(decoder=True)),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
        ),
        fingerprint,
        config,
        code,
    )
    return hashlib.blake2b(repr(known).encode(), digest_size=16).hexdigest()


@cache
def own_code() -> str:
    """A hash of this package's own files: what was measured with others need not hold."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A configuration as nested tuples in a fixed order. Raises TypeError where it holds what has no lasting text."""
    if isinstance(value, Mapping):
        parts = [(str(name), _plain(part)) for name, part in value.items() if name not in _NAMES_OF_A_COPY]
        return tuple(sorted(parts, key=lambda part: part[0]))
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    raise TypeError(f"{type(value).__name__} in a configuration")


def _device(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return (device.type, torch.cuda.get_device_name(device), str(torch.version.cuda))
    return (device.type, processor_name(), torch.backends.cpu.get_cpu_capability())


def processor_name() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _code(model: PreTrainedModel) -> list[str] | None:
    """What tells the code of a model's modules from another's; None where hooks, functions put in the place of others
    take part. Raises OSError or TypeError where a class has no source."""
    modules = [*model.modules()]
    attention = attention_function(attention_of(model.config.get_text_config(decoder=True)))
    if any("forward" in vars(module) or _hooks(module) for module in modules) or not _of_a_library(attention):
        return None
    classes = {type(module) for module in modules} | {type(weight) for weight in model.parameters()}
    return sorted(line for kind in classes for line in _source(kind))


def _of_a_library(function: Any) -> bool:
    """Tell whether a function is one of the library's own, or none, which stands for what the layers themselves do."""
    return function is None or function.__module__.partition(".")[0] in _LIBRARIES


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _source(kind: type) -> Iterator[str]:
    """A class by its name, its forward and the file that it is from. Raises OSError or TypeError where it has none."""
    forward = getattr(inspect.unwrap(kind.forward), "__code__", None) if hasattr(kind, "forward") else None
    yield f"{kind.__module__}.{kind.__qualname__} {hashlib.blake2b(marshal.dumps(forward)).hexdigest()}"
    if kind.__module__.partition(".")[0] not in _LIBRARIES:
        yield hashlib.blake2b(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
