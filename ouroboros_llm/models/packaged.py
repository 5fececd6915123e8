"""Weights that come as packages of the Python index, which also serves where no hub can be reached."""

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
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import progress
from ..environment import cache_folder
from ..errors import ModelDownloadError

_GGUF = "weights.gguf"
# What pip says may name the index it asked, which is nobody else's business: addresses and host names.
_ADDRESS = re.compile(r"\w+://\S+|(?:\d+\.){3}\d+|(?:[\w-]+\.)+(?!whl\b)[a-z]{2,}\b", re.IGNORECASE)


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


@cache
def registry() -> dict[str, PackagedModel]:
    """The packaged models by name."""
    table = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    return {
        name: PackagedModel(**{**entry, "parts": tuple(tuple(part) for part in entry["parts"])})
        for name, entry in table.items()
    }


def fetch(name: str, packaged: PackagedModel) -> Path:
    """The cache's folder of a packaged model, made where there is none; interruption and other processes do no harm."""
    folder = cache_folder() / name
    if not folder.is_dir():
        with _alone(folder):
            if not folder.is_dir():
                _make(name, packaged, folder)
    return folder


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
            progress.say(f"waiting for another process that fetches {folder.name}")
            held = lock.acquire()
    except OSError as error:
        raise ModelDownloadError(
            f"the cache folder {folder.parent} cannot be made: {error.strerror}; set $OUROBOROS_CACHE to another"
        ) from error
    with held:
        yield


@contextmanager
def _workspace(folder: Path, size: int) -> Iterator[Path]:
    """A folder beside `folder`, so on the same disk, gone afterwards; what a killed process left in it goes first."""
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
    with Progress(*columns, console=progress.console, disable=not progress.is_animated()) as bar:
        task = bar.add_task(name, total=packaged.bytes)
        for block in blocks:
            yield block
            bar.advance(task, len(block))


def _pieces(name: str, packaged: PackagedModel, workspace: Path) -> Iterator[bytes]:
    """The joined file in blocks, one wheel at a time on the disk."""
    count, size = len(packaged.parts), packaged.bytes >> 20
    progress.say(f"fetching {name} ({packaged.license}), {size} MiB in {count} part{'s' * (count > 1)}")
    for number, (requirement, inside) in enumerate(packaged.parts, 1):
        if not progress.is_animated():
            progress.say(f"fetching {name}: part {number} of {count}")
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

    from ..transformers_api import without_progress_bars

    with progress.step(f"converting {name}, once"), without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            workspace, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(workspace, gguf_file=_GGUF).save_pretrained(folder)
