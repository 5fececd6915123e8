"""`ouroboros bench gpu`: passes of real shapes against the limit of the device, and answers of real weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..environment import cache_folder
from ..models import loading as models
from ..models.loading import LoadedModel
from ..models.packaged import registry
from ..ouroboros import Ouroboros
from ..sessions.device_memory import free_bytes, let_go
from ..target_model.quantization import Quantization, quantize
from .device import bandwidth
from .gpu_tables import markdown
from .methods import PLAIN, build_methods
from .prompts import Conversation, read_prompts
from .report import machine, summarize
from .results import new_folder, write_report
from .shapes import Shape, choose_shapes, random_model
from .side_by_side import Record, SideBySide, first_difference
from .steps import measure_steps

WEIGHTS = (
    ("smollm2-135m-instruct", None),
    ("qwen2.5-coder-1.5b-instruct", "qwen2.5-coder-0.5b-instruct"),
)
"""Models whose answers are measured where they are on this machine, and what drafts for them."""

_PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, and a test for it.",
    "Write a Python class for a stack with push, pop and peek, and docstrings.",
    "Explain in three sentences what a hash table is.",
    "List the planets of the solar system, one per line, with their diameter.",
    'Answer in JSON: {"city": ..., "country": ...} for Rome, Paris and Lima.',
    "Write a SQL query that counts the orders of each customer in 2023.",
    "Repeat this sentence three times: The quick brown fox jumps over the lazy dog.",
    "Write a bash script that renames all .txt files in a folder to .md.",
)

_SPARE = 1.25
"""How much more memory than its weights a shape has to find."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure."""

    results: Path
    shapes: str = "all"
    weights: bool = True
    prompts: Path | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    length: int = 512
    repeats: int = 20
    tokens: int = 64
    max_new_tokens: int = 128
    limit: int | None = None


def measure(settings: Settings, told: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure everything and write it; the report.

    Args:
        told: called with what is being done.

    Raises:
        OuroborosError: an unknown shape, device or dtype, or prompts that cannot be read. OSError: the results cannot
            be written.
    """
    device, dtype = models.placement(settings.device, settings.dtype)
    shapes, started = choose_shapes(settings.shapes), datetime.now().astimezone()
    conversations = _conversations(settings)
    folder = new_folder(settings.results, f"gpu-{device.type}", started)
    told(f"results in {folder}")
    moved = bandwidth(device)
    report = {
        "conditions": _conditions(settings, device, dtype, started),
        "bandwidth": moved,
        "shapes": {name: _shape(name, shape, device, dtype, settings, moved, told) for name, shape in shapes.items()},
        "weights": list(_weights(conversations, device, settings, told)) if settings.weights else [],
    }
    write_report(folder, report, markdown(report))
    return report


def _shape(
    name: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
    moved: Mapping[str, float],
    told: Callable[[str], None],
) -> dict[str, Any]:
    needed, free = int(shape.parameters * dtype.itemsize * _SPARE), free_bytes(device)
    if free is not None and needed > free:
        return {"skipped": f"needs {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"}
    told(f"{name}: {shape.parameters / 1e9:.2f} billion parameters")
    model = random_model(shape, device, dtype, positions=max(4096, 2 * settings.length))
    if settings.quantization is not None:
        quantize(model, settings.quantization)
    try:
        return measure_steps(
            model,
            length=settings.length,
            repeats=settings.repeats,
            bytes_per_second=max(moved.values()),
            tokens=settings.tokens,
        )
    finally:
        del model
        let_go(device)


def _weights(
    conversations: Sequence[Conversation], device: torch.device, settings: Settings, told: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    for name, draft_name in WEIGHTS:
        if not _here(name):
            yield {"model": name, "skipped": "its weights are not on this machine"}
            continue
        loaded = models.load(name, device=device, dtype=settings.dtype, quantization=settings.quantization)
        draft = (
            models.load(draft_name, device=device, dtype=settings.dtype) if draft_name and _here(draft_name) else None
        )
        told(f"{name}, answers to {len(conversations)} prompts")
        yield {"model": name, "draft": draft.name if draft else None, **answers(loaded, draft, conversations, settings)}
        let_go(device)


def answers(
    loaded: LoadedModel, draft: LoadedModel | None, conversations: Sequence[Conversation], settings: Settings
) -> dict[str, Any]:
    """Figures of every method, as `summarize` gives them, with what diverged per thousand tokens."""
    names = ("plain", "prompt_lookup", *(["assisted"] if draft else []), "ouroboros", "ouroboros_warm")
    with Ouroboros(loaded.model, loaded.tokenizer, target="static") as ouroboros:
        ouroboros.name = loaded.name
        methods = build_methods(names, ouroboros, draft)
        run = SideBySide(ouroboros, methods, conversations, max_new_tokens=settings.max_new_tokens)
        run.warm_up()
        run.run(lambda record: None)
        figures: dict[str, Any] = summarize(run.records, run.gaps)["all"]
        missed = ouroboros._prepared.way.missed
    for name, rate in divergences(run.records).items():
        figures[name]["divergences_per_1000_tokens"] = rate
    return {"methods": figures, "not_static": missed}


def divergences(records: Sequence[Record]) -> dict[str, float | None]:
    """By method: places where an answer leaves the plain one, per thousand tokens that are the same up to there."""
    plain = {record.key: record.answer.token_ids for record in records if record.method == PLAIN}
    left: dict[str, list[tuple[int, int]]] = {}
    for record in records:
        said = plain.get(record.key)
        if said is not None and record.method != PLAIN:
            place = first_difference(said, record.answer.token_ids)
            left.setdefault(record.method, []).append((place is not None, len(said) if place is None else place + 1))
    return {
        name: 1000 * sum(away for away, _ in places) / tokens if (tokens := sum(after for _, after in places)) else None
        for name, places in left.items()
    }


def _here(name: str) -> bool:
    return name in registry() and (cache_folder() / name / "config.json").exists()


def _conversations(settings: Settings) -> list[Conversation]:
    if settings.prompts is not None:
        return read_prompts(settings.prompts, limit=settings.limit)
    own = [
        Conversation(str(number), None, None, ({"role": "user", "content": text},))
        for number, text in enumerate(_PROMPTS, 1)
    ]
    return own[: settings.limit]


def _conditions(settings: Settings, device: torch.device, dtype: torch.dtype, started: datetime) -> dict[str, Any]:
    about = machine(torch.nn.Linear(1, 1, device=device, dtype=dtype))
    try:
        import triton

        about["versions"]["triton"] = triton.__version__
    except ImportError:
        pass
    return {
        "quantization": settings.quantization,
        "length": settings.length,
        "repeats": settings.repeats,
        "tokens": settings.tokens,
        "started": started.isoformat(timespec="seconds"),
        **about,
    }
