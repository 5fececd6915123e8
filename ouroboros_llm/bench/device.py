"""What a device can do at best, and what it was seen to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ..sessions.device_memory import free_bytes

_LAUNCHES = ("LaunchKernel", "GraphLaunch")
_ROUNDS_PER_PROFILE = 8


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """The median of so many times of each, which take turns; each is done twice before."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-2, repeats):
        for name, run in runs.items():
            wait_for(device)
            began = perf_counter()
            run()
            wait_for(device)
            if repeat >= 0:
                seen[name].append(perf_counter() - began)
    return {name: median(seconds) for name, seconds in seen.items()}


def bandwidth(device: torch.device, nbytes: int | None = None) -> dict[str, float]:
    """Bytes per second that the device was seen to move: copying (read and written), and reading alone.

    Args:
        nbytes: of the buffer that is moved; None: far more than caches hold.
    """
    if nbytes is None:
        nbytes = min(1 << (32 if device.type == "cuda" else 27), (free_bytes(device) or (1 << 30)) // 16)
    source = torch.ones(nbytes >> 12, 1 << 10, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    seconds = seconds_of({"copy": lambda: copy.copy_(source), "read": lambda: source.amax(-1)}, device, 10)
    return {"copy": 2 * source.nbytes / seconds["copy"], "read": source.nbytes / seconds["read"]}


@dataclass(frozen=True, slots=True)
class Profile:
    """What happened in a round, on average."""

    kernels: float
    """Of the device, copies included; on a CPU the library's operators."""
    launches: float
    """Times that the host started a kernel or a recording."""
    busy_seconds: float | None
    """That the device worked; None on a CPU."""
    seconds: float
    host_gap: float | None
    """The part of the time in which the device did nothing; None on a CPU."""


def profile(round_: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """A `Profile` of some rounds, as a dictionary."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(3):
        round_()
    wait_for(device)
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(_ROUNDS_PER_PROFILE):
            round_()
        wait_for(device)
    return asdict(profile_of(seen.events() or (), device.type == "cuda"))


def profile_of(events: Iterable[Any], on_device: bool) -> Profile:
    """From the profiler's events to what a round takes."""
    host: list[Any] = []
    work: list[Any] = []
    for event in events:
        (host if event.device_type.name == "CPU" else work).append(event)
    counted = work if on_device else [event for event in host if event.name.startswith("aten::")]
    launches = sum(any(name in event.name for name in _LAUNCHES) for event in host)
    spans = [(event.time_range.start, event.time_range.end) for event in counted]
    total = (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e6 if spans else 0.0
    busy = covered(spans) / 1e6 if on_device else None
    rounds = _ROUNDS_PER_PROFILE
    return Profile(
        kernels=len(counted) / rounds,
        launches=launches / rounds,
        busy_seconds=None if busy is None else busy / rounds,
        seconds=total / rounds,
        host_gap=None if busy is None or not total else 1 - busy / total,
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the line intervals cover, which may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
