"""What single passes take, without waiting for a device to find out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch

from .pass_times import PassTimes


def on(device: torch.device) -> AbstractContextManager[None]:
    """Kernels are started on the device that is current, whichever their arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Clock:
    """Takes note of passes: on a CPU at once, on an accelerator when they are over and somebody asks again."""

    def __init__(self, times: PassTimes) -> None:
        self.times = times
        self._running: list[tuple[int, Any, Any]] = []

    @contextmanager
    def over(self, width: int, device: torch.device) -> Iterator[None]:
        """Around a pass over so many tokens. What raises is not counted."""
        if device.type != "cuda":
            start = perf_counter()
            yield
            self.times.add(width, perf_counter() - start)
            return
        self.settle()
        with on(device):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            yield
            ended.record()
        self._running.append((width, began, ended))

    def settle(self) -> None:
        """Count the passes that are over."""
        while self._running and self._running[0][2].query():
            width, began, ended = self._running.pop(0)
            self.times.add(width, began.elapsed_time(ended) / 1000)
