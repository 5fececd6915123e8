"""Checks of an installation, each of which says what it found and what to do; none stops the others."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warning", "failure"]

_PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):\S*@|((?:password|passwd|pwd)=)[^&\s]*", re.IGNORECASE)
_WEIGHTS = ("*.safetensors", "*.bin")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    text: str
    """A sentence for people: what was found and, unless it is fine, what to do."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs."""


def run(name: str, check: Callable[[], Check]) -> Check:
    """Make a check; what it raises is its failure."""
    try:
        return check()
    except Exception as error:
        reason = without_password(str(error).strip().partition("\n")[0]) or "no reason given"
        return Check(name, "failure", f"{reason} ({type(error).__name__})", {"error": reason})


def size(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB else f"{nbytes / (1 << 20):.1f} MiB"


def without_password(text: str) -> str:
    """A text in which the passwords of URLs are hidden."""
    return _PASSWORD.sub(lambda found: f"{found[2]}***" if found[2] else f"{found[1]}:***@", text)


def versions() -> Check:
    """Compare what is installed with the ranges that this package declares."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    found: dict[str, dict[str, str | None]] = {}
    missing, untested = [], []
    for name, tested, extra in _requirements():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        found[name] = {"installed": installed, "tested": str(tested), "extra": extra}
        if installed is None:
            missing += [] if extra else [name]
        elif not tested.contains(Version(installed).base_version, prereleases=True):
            untested.append(f"{name} {installed} ({tested})")
    python, needed = platform.python_version(), str(metadata("ouroboros-llm")["Requires-Python"])
    facts = {"python": python, "packages": found}
    if not SpecifierSet(needed).contains(python, prereleases=True):
        return Check("versions", "failure", f"Python {python} is not {needed}; install one that is", facts)
    if missing:
        return Check("versions", "failure", f"not installed: {', '.join(missing)}; install ouroboros-llm anew", facts)
    extras = sorted({str(one["extra"]) for one in found.values() if one["extra"] and one["installed"] is None})
    absent = f"; extras not installed: {', '.join(extras)}" if extras else ""
    if untested:
        text = f"outside of the tested range: {', '.join(untested)}; if something fails, install one within it{absent}"
        return Check("versions", "warning", text, facts)
    return Check("versions", "ok", f"Python {python}, all packages are in the tested ranges{absent}", facts)


def _requirements() -> Iterator[tuple[str, Any, str | None]]:
    """Packages that users need, with the tested versions and the extra that asks for them."""
    from packaging.requirements import Requirement

    seen = set()
    for one in map(Requirement, requires("ouroboros-llm") or []):
        extra = re.search(r"extra == [\"']([\w-]+)", str(one.marker)) if one.marker else None
        name = extra.group(1) if extra else None
        if one.name not in seen and one.name != "ouroboros-llm" and name not in ("dev", "test", "all"):
            seen.add(one.name)
            yield one.name, one.specifier, name


def processor() -> Check:
    """Describe the processor and the memory."""
    import torch

    from ..sessions.device_memory import free_bytes
    from ..target_model.measurements import processor_name

    free = free_bytes(torch.device("cpu"))
    facts = {
        "name": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "free_bytes": free,
    }
    memory = "" if free is None else f", {size(free)} free"
    text = f"{facts['name']}, {facts['threads']} threads of {facts['cores']} cores{memory}"
    return Check("processor", "ok", text, facts)


def accelerator() -> Check:
    """Describe the accelerator, and how passes are made there."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        facts = {"type": "cuda", "name": name, "free_bytes": free, "total_bytes": total, "cuda": torch.version.cuda}
        text = f"{name}, {size(free)} of {size(total)} free; passes are made by the library's own forward"
        return Check("accelerator", "ok", f"{text} until those of fixed shape have been proven on one", facts)
    if torch.backends.mps.is_available():
        return Check("accelerator", "ok", "MPS; used where device='mps' asks for it", {"type": "mps"})
    return Check("accelerator", "ok", "none; models run on the processor", {"type": None})


def environment() -> Check:
    """List the variables that change what is done."""
    ours = sorted(name for name in os.environ if name.startswith("OUROBOROS_"))
    found = {name: _shown(os.environ[name]) for name in ours}
    text = ", ".join(f"${name}={value}" for name, value in found.items()) or "no variable of ours is set"
    return Check("environment", "ok", text, found)


def _shown(value: str) -> str:
    """A variable's value, unless it could be a URL that was written wrongly, password and all."""
    return "(set, but not shown)" if "@" in value and "://" not in value else without_password(value)


def weights(model: str) -> Check:
    """Say where the weights of a model are, or how large they would be."""
    from ..environment import cache_folder
    from ..models.loading import local_folder
    from ..models.packaged import registry

    folder = local_folder(model)
    if folder is not None and any(file for kind in _WEIGHTS for file in folder.glob(kind)):
        held = folder_size(folder)
        return Check("weights", "ok", f"{folder}, {size(held)}", {"folder": str(folder), "bytes": held})
    packaged = registry().get(model.lower())
    download = packaged.bytes if packaged else None
    much = f" {size(download)} are fetched on first use;" if download else ""
    text = f"{model} is not on this machine;{much} `ouroboros doctor --fetch {model}` fetches it to {cache_folder()}"
    return Check("weights", "failure", text, {"folder": None, "download_bytes": download})


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder; links are followed, as the hub's cache has them."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def store() -> Check:
    """Look at the phrase store that a caller who names none gets, without changing anything of it."""
    from ..defaults import default_store
    from ..phrase_pool.opening import store_class

    report = store_class().examine(default_store())
    facts = {name: getattr(report, name) for name in ("url", "exists", "schema", "newest_schema", "scopes", "problem")}
    if report.problem is not None:
        return Check("store", "failure", f"{report.url}: {report.problem} ($OUROBOROS_STORE)", facts)
    if not report.exists:
        return Check("store", "ok", f"{report.url}, made on first use", facts)
    text = f"{report.url}, {report.scopes} scopes"
    if report.schema != report.newest_schema:
        text += f"; first use brings its schema from {report.schema} to {report.newest_schema}"
    return Check("store", "ok", text, facts)
