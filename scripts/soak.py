"""Agent conversations for minutes on end, and what became of memory and speed: `python scripts/soak.py --minutes 10`

Conversations grow turn by turn, as those of agents with tools do, and begin anew when they are long enough; several
threads answer them with one `Ouroboros`, whose phrases go to a database in a temporary folder. Writes `samples.jsonl`
as it goes and `soak.png` at the end, and prints the slope of resident memory after the warm-up. Ctrl-C ends it early;
what was measured until then is shown all the same. Needs psutil and matplotlib (`pip install "ouroboros-llm[dev]"`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from random import Random
from time import perf_counter

import numpy as np
import psutil

from ouroboros_llm import DecodingOptions, GenerationResult, Ouroboros, limit_kv_bytes

MEGABYTE = 1e6
INTERRUPTED = 130
"""The exit status that shells give to a program ended by Ctrl-C."""

_SYSTEM = "You are an agent that repairs software. Say in one sentence what you do next, then do it."
_STEPS = (
    "The tool `{tool}` returned:\n{output}\nWhat next?",
    "Run `{tool}` again and compare with:\n{output}",
    "Summarize what `{tool}` said:\n{output}",
)
_TOOLS = ("pytest -x", "grep -rn TODO", "ls -la", "git diff", "cat config.json", "python main.py")
_WORDS = "error warning passed failed file line in module not found expected got value None True at 0x7f retry".split()


@dataclass(frozen=True)
class Settings:
    """What to run, and how long."""

    minutes: float = 10.0
    conversations: int = 8
    threads: int = 4
    prompt_tokens: int = 1500
    """A conversation whose prompt is longer begins anew."""
    max_new_tokens: int = 48
    every: float = 5.0
    """Seconds between samples."""
    warm_up: float = 0.25
    """The part of the run that the slope leaves out."""
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One line of `samples.jsonl`. Rates are of the turns that ended since the line before; None where none did."""

    seconds: float
    resident_bytes: int
    kv_in_use_bytes: int
    kv_idle_bytes: int
    kv_kept_bytes: int
    turns: int
    """Since the beginning, as are the tokens."""
    completion_tokens: int
    prompt_tokens: int
    prefilled_tokens: int
    seconds_per_token: float | None
    mean_acceptance_length: float | None


class Conversation:
    """An agent and its tools: messages that grow until they are long, then begin anew."""

    def __init__(self, number: int, seed: int) -> None:
        self.scope = f"conversation:soak-{number}"
        self._random = Random(f"{seed}/{number}")
        self._begin()

    def turn(self, ouroboros: Ouroboros, settings: Settings) -> GenerationResult:
        """Ask the next question. What comes back goes into the next prompt."""
        tool = self._random.choice(_TOOLS)
        output = "\n".join(" ".join(self._random.choices(_WORDS, k=8)) for _ in range(self._random.randint(1, 6)))
        self._messages.append({"role": "user", "content": self._random.choice(_STEPS).format(tool=tool, output=output)})
        options = DecodingOptions(max_new_tokens=settings.max_new_tokens)
        result = ouroboros.generate(self._messages, scope=self.scope, options=options)
        self._messages.append({"role": "assistant", "content": result.text})
        if result.usage.prompt_tokens > settings.prompt_tokens:
            self._begin()
        return result

    def _begin(self) -> None:
        self._messages = [{"role": "system", "content": _SYSTEM}]


class Counts:
    """What all threads did together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.turns = self.completion_tokens = self.prompt_tokens = self.prefilled_tokens = self.forwards = 0
        self.seconds = 0.0

    def add(self, result: GenerationResult) -> None:
        usage, statistics = result.usage, result.statistics
        with self._lock:
            self.turns += 1
            self.completion_tokens += usage.completion_tokens
            self.prompt_tokens += usage.prompt_tokens
            self.prefilled_tokens += usage.prompt_tokens - usage.cached_tokens
            self.forwards += statistics.target_forwards
            self.seconds += statistics.seconds

    def sampler(self, ouroboros: Ouroboros) -> Iterator[Sample]:
        """A sample each time it is asked for one."""
        began, process, before = perf_counter(), psutil.Process(), (0, 0, 0.0)
        while True:
            kv, resident = ouroboros.kv_usage, process.memory_info().rss
            with self._lock:
                now = (self.completion_tokens, self.forwards, self.seconds)
                totals = (self.turns, self.completion_tokens, self.prompt_tokens, self.prefilled_tokens)
            tokens, forwards, seconds = (after - earlier for after, earlier in zip(now, before, strict=True))
            before = now
            yield Sample(
                perf_counter() - began,
                resident,
                kv.in_use,
                kv.idle,
                kv.kept,
                *totals,
                seconds / tokens if tokens else None,
                tokens / forwards if forwards else None,
            )


def soak(ouroboros: Ouroboros, settings: Settings, path: Path) -> tuple[list[Sample], bool]:
    """Run it and write every sample to `path`; the samples, and whether Ctrl-C ended it.

    Raises:
        Exception: whatever a turn raised, after the threads have stopped.
    """
    counts, stop, samples, interrupted = Counts(), threading.Event(), [], False
    with open(path, "w", encoding="utf-8") as file, _working(ouroboros, settings, counts, stop):
        deadline = perf_counter() + 60 * settings.minutes
        sampler = counts.sampler(ouroboros)
        try:
            while True:
                samples.append(next(sampler))
                file.write(json.dumps(asdict(samples[-1])) + "\n")
                file.flush()
                if (left := deadline - perf_counter()) <= 0 or stop.wait(min(settings.every, left)):
                    break
        except KeyboardInterrupt:
            interrupted = True
    return samples, interrupted


@contextmanager
def _working(ouroboros: Ouroboros, settings: Settings, counts: Counts, stop: threading.Event) -> Iterator[None]:
    """Threads that answer whichever conversation waited longest; an error in one of them stops all, and is raised."""
    waiting: SimpleQueue[Conversation] = SimpleQueue()
    for number in range(settings.conversations):
        waiting.put(Conversation(number, settings.seed))
    errors: list[Exception] = []

    def work() -> None:
        while not stop.is_set():
            try:
                conversation = waiting.get(timeout=0.1)
            except Empty:  # more threads than conversations
                continue
            try:
                counts.add(conversation.turn(ouroboros, settings))
            except Exception as error:  # the main thread raises it
                errors.append(error)
                stop.set()
            waiting.put(conversation)

    threads = [threading.Thread(target=work, name=f"soak-{number}") for number in range(settings.threads)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def slope(samples: Sequence[Sample], warm_up: float) -> float | None:
    """Bytes of resident memory per minute, a line fitted behind the warm-up; None for fewer than three samples."""
    end = samples[-1].seconds if samples else 0.0
    later = [sample for sample in samples if sample.seconds >= warm_up * end]
    if len(later) < 3:
        return None
    minutes = [sample.seconds / 60 for sample in later]
    return float(np.polyfit(minutes, [sample.resident_bytes for sample in later], 1)[0])


def plot(samples: Sequence[Sample], warm_up: float, path: Path) -> None:
    """Resident memory, bytes of keys and values, time per token and acceptance over time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [sample.seconds / 60 for sample in samples]
    curves = {
        "resident memory, MB": [sample.resident_bytes / MEGABYTE for sample in samples],
        "keys and values, MB": [
            (sample.kv_in_use_bytes + sample.kv_idle_bytes + sample.kv_kept_bytes) / MEGABYTE for sample in samples
        ],
        "ms per token": [_scaled(sample.seconds_per_token, 1e3) for sample in samples],
        "mean acceptance length": [_scaled(sample.mean_acceptance_length, 1.0) for sample in samples],
    }
    figure, axes = pyplot.subplots(len(curves), sharex=True, figsize=(9, 9), layout="constrained")
    for axis, (title, values) in zip(axes, curves.items(), strict=True):
        axis.plot(minutes, values, marker=".")
        axis.set_title(title, loc="left")
        axis.set_ylim(bottom=0)
        axis.axvspan(0, warm_up * minutes[-1] if minutes else 0, alpha=0.1)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes (shaded: warm-up)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _scaled(value: float | None, factor: float) -> float:
    return float("nan") if value is None else value * factor


def summary(samples: Sequence[Sample], warm_up: float) -> str:
    last, growth = samples[-1], slope(samples, warm_up)
    line = "too few samples" if growth is None else f"{growth / MEGABYTE:+.2f} MB a minute after the warm-up"
    return (
        f"{last.turns} turns, {last.completion_tokens} tokens in {last.seconds / 60:.1f} minutes; "
        f"{last.prefilled_tokens} of {last.prompt_tokens} prompt tokens were read\n"
        f"resident memory: {last.resident_bytes / MEGABYTE:.0f} MB, {line}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="registry name, path or hub id")
    parser.add_argument("--results", type=Path, default=Path("soak"), help="folder for samples.jsonl and soak.png")
    parser.add_argument("--kv-bytes", type=int, default=None, help="limit for keys and values of the process")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    model, results, limit = given.pop("model"), given.pop("results"), given.pop("kv_bytes")
    settings = Settings(**given)
    if limit is not None:
        limit_kv_bytes(limit)
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/phrases.db"
        with Ouroboros.from_pretrained(model, store=store) as ouroboros:
            samples, interrupted = soak(ouroboros, settings, results / "samples.jsonl")
    if not samples:
        return INTERRUPTED
    print(summary(samples, settings.warm_up))
    plot(samples, settings.warm_up, results / "soak.png")
    print(f"samples and plot are in {results}")
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
