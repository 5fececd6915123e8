"""Sessions in files: what a scope has read, for a later process."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import SnapshotError
from ..target_model.eager import EagerTarget
from ..target_model.kv_cache import SlotCache
from ..target_model.prepared import PreparedModel
from .prefix_cache import CachedSequence

LAYOUT = "1"
"""Of the file: "N.token_ids" [length], and per layer of the model "N.LAYER.keys" and "N.LAYER.values"."""

# What a configuration says about files and defaults, and not about keys and values.
_IRRELEVANT = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


def identity(prepared: PreparedModel, tokenizer_fingerprint: str, scope: str) -> dict[str, str]:
    """What has to agree between the one who writes a file and the one who reads it."""
    config = prepared.model.config.get_text_config(decoder=True).to_dict()
    relevant = {name: value for name, value in config.items() if name not in _IRRELEVANT and name[:1] != "_"}
    settings = json.dumps(relevant, sort_keys=True, default=str).encode()
    return {
        "layout": LAYOUT,
        "model": prepared.fingerprint,
        "configuration": blake2b(settings, digest_size=16).hexdigest(),
        "tokenizer": tokenizer_fingerprint,
        "dtype": str(prepared.model.dtype),
        "scope": scope,
    }


def save(path: str | Path, workspaces: Sequence[CachedSequence], expected: Mapping[str, str]) -> int:
    """Write what the workspaces' targets hold; the number of tokens. What draft models have read is not written.

    Raises:
        SnapshotError: nothing to write, states that are not kept by position, or a path that cannot be written.
    """
    targets = [workspace.target for workspace in workspaces if workspace.length]
    if not targets:
        raise SnapshotError(f"scope {expected['scope']!r} holds no keys and values; generate in it first, then save it")
    tensors: dict[str, torch.Tensor] = {}
    for number, target in enumerate(targets):
        if not isinstance(target, EagerTarget) or not isinstance(target.cache, SlotCache):
            raise SnapshotError(
                "the model keeps states that only go forward, not keys and values by position; they cannot be saved, "
                "and a restarted session reads its prompt again"
            )
        tensors[f"{number}.token_ids"] = torch.tensor(target.token_ids)
        parts = target.cache.unload(len(target.token_ids))
        tensors.update({f"{number}.{name}": tensor for name, tensor in parts.items()})
    try:
        _write(Path(path), tensors, {**expected, "digest": _digest(tensors)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SnapshotError(f"the session cannot be written to {str(path)!r}: {reason}") from error
    return sum(len(target.token_ids) for target in targets)


def load(path: str | Path, start: Callable[[], CachedSequence], expected: Mapping[str, str]) -> list[CachedSequence]:
    """Workspaces as they were saved, in storage of their own; `start` makes an empty one.

    Raises:
        SnapshotError: the file is of another origin than `expected`, or damaged. FileNotFoundError: there is none.
    """
    tensors = _read(Path(path), expected)
    numbers = sorted({int(name.partition(".")[0]) for name in tensors})
    return [_restored(start(), tensors, number) for number in numbers]


def _restored(workspace: CachedSequence, tensors: Mapping[str, torch.Tensor], number: int) -> CachedSequence:
    target = workspace.target
    assert isinstance(target, EagerTarget) and isinstance(target.cache, SlotCache)  # as it was for who saved it
    prefix = f"{number}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    token_ids: list[int] = own.pop("token_ids").tolist()
    target.cache.load(own, target.model.device)
    target.token_ids = token_ids
    return workspace


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that only its owner can read, and that appears whole or not at all."""
    # In a folder that nobody else can enter, the file is private from its first byte on, whoever creates it how.
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        save_file(dict(tensors), folder / path.name, metadata=dict(metadata))
        (folder / path.name).chmod(0o600)
        with open(folder / path.name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path, expected: Mapping[str, str]) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(2, "no such session file", str(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _compare(path, metadata, expected)
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise SnapshotError(f"{path} is no session file, or damaged: {error}; delete it and save anew") from error
    if metadata.get("digest") != _digest(tensors):
        raise SnapshotError(f"{path} is damaged: its content is not what was written; delete it and save anew")
    return tensors


def _compare(path: Path, metadata: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for name, wanted in expected.items():
        if metadata.get(name) != wanted:
            raise SnapshotError(
                f"{path} cannot be used here: its {name} must be {wanted!r}, but it is {metadata.get(name)!r}; "
                "load it where it was saved: same scope, model, dtype and tokenizer"
            )


def _digest(tensors: Mapping[str, Any]) -> str:
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
