"""CUDA graph capture and replay, one graph per draft width."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ...decoding.draft_tree import MAX_WIDTH

Run = Callable[[], None]
Results = tuple[torch.Tensor, ...]
Step = Callable[[int], Results]
"""A pass of so many nodes; what comes of it is the longer, along the first dimension, the wider the pass is."""


class GraphCapturer(Protocol):
    """Records work of a device; `CudaGraphCapturer` is the one there is, tests bring another."""

    def record(self, run: Run) -> Run:
        """Do the work a few times, record it; what does it again. It must wait for nothing and move no tensor."""


class CudaGraphCapturer:
    """CUDA graphs that share one pool of memory, so that only one of them may be used at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run) -> Run:
        now = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            # Kernels are compiled and libraries make their work space outside of the recording.
            for _ in range(2):
                run()
        now.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, as the model's owner does.
        with _no_collection(), torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class CudaGraphs:
    """One recording for each width, made when it is wanted first; the widest before all others."""

    def __init__(self, recorder: GraphCapturer) -> None:
        self._recorder: GraphCapturer | None = recorder
        self._replays: dict[tuple[int, Hashable], tuple[Run, Results]] = {}
        self._results: dict[Hashable, Results] = {}
        """Of the widest pass of each kind, outside of what recordings share; narrower ones use a part of them."""

    def run(self, width: int, step: Step, kind: Hashable = None) -> Results:
        """The results of `step(width)`, which are there until the next pass.

        `step` makes a pass over nodes that are there already for each width that it is asked for: `width` and the
        widest. Where it cannot be recorded a warning says so, once, and it is made anew every time. Steps that do other
        things are of another `kind`.
        """
        for wanted in (MAX_WIDTH, width):
            if (wanted, kind) not in self._replays and self._recorder is not None:
                self._try(wanted, step, kind)
        if (width, kind) not in self._replays:
            return step(width)
        replay, results = self._replays[width, kind]
        replay()
        return results

    def complete(self, width: int, kind: Hashable = None) -> bool:
        """Whether nothing has to be recorded any more for a pass of that width."""
        return self._recorder is None or {(MAX_WIDTH, kind), (width, kind)} <= self._replays.keys()

    def _try(self, width: int, step: Step, kind: Hashable) -> None:
        assert self._recorder is not None
        try:
            found = step(width)
            if kind not in self._results:
                self._results[kind] = tuple(map(torch.empty_like, found))
            results = tuple(room[: len(made)] for room, made in zip(self._results[kind], found, strict=True))
            del found

            def run() -> None:
                for room, made in zip(results, step(width), strict=True):
                    room.copy_(made)

            self._replays[width, kind] = self._recorder.record(run), results
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._recorder = None
            self._replays.clear()
            reason = str(error).partition("\n")[0]
            warnings.warn(f"passes cannot be recorded ({reason}), so they are made anew", RuntimeWarning, stacklevel=2)


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is freed during a recording may wait for the device, which would end it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
