"""A whole run: from its settings to a report on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..models import loading as models
from ..models.loading import LoadedModel
from ..ouroboros import Ouroboros
from ..target_model.prepared import measure_now
from ..target_model.quantization import Quantization
from .methods import build_methods, choose_methods
from .prompts import read_prompts
from .report import machine, summarize
from .results import Results
from .side_by_side import Record, SideBySide
from .tables import markdown

Progress = Callable[[int], AbstractContextManager[Callable[[], None]]]
"""Given how many answers will come: what to call at each."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, and how much of it."""

    model: str
    prompts: Path
    results: Path
    draft: str | None = None
    methods: str | None = None
    limit: int | None = None
    category: tuple[str, ...] = ()
    instruction: str = ""
    max_new_tokens: int = 128
    repeats: int = 1
    dtype: str = "auto"
    device: str = "auto"
    quantization: Quantization | None = None
    threads: int | None = None


def measure(settings: Settings, progress: Progress, told: Callable[[Path], None]) -> dict[str, Any]:
    """Ask everything and write the results; the report, which Ctrl-C makes partial.

    Args:
        told: called with the folder of the results as soon as there is one.

    Raises:
        OuroborosError: the prompts cannot be read, a model cannot be loaded, a method cannot run. OSError: the results
            cannot be written. Whatever else ends a run half-way: after its partial report is written.
    """
    names = choose_methods(settings.methods, draft=settings.draft is not None)
    conversations = read_prompts(
        settings.prompts, categories=settings.category, limit=settings.limit, instruction=settings.instruction
    )
    with _loaded(settings) as (ouroboros, draft):
        methods = build_methods(names, ouroboros, draft)
        run = SideBySide(
            ouroboros, methods, conversations, max_new_tokens=settings.max_new_tokens, repeats=settings.repeats
        )
        run.warm_up()
        started = datetime.now().astimezone()
        results = Results(settings.results, ouroboros.name, started)
        told(results.folder)
        about = _conditions(settings, list(methods), ouroboros, started)
        return _run(run, results, about, progress)


def _run(run: SideBySide, results: Results, about: dict[str, Any], progress: Progress) -> dict[str, Any]:
    try:
        with progress(run.total) as advance:

            def on_answer(record: Record) -> None:
                results.add(record, run.text(record.answer.token_ids))
                advance()

            run.run(on_answer)
    except KeyboardInterrupt:
        return _finish(run, results, about, partial=True)
    except BaseException:
        _finish(run, results, about, partial=True)
        raise
    return _finish(run, results, about, partial=False)


def _finish(run: SideBySide, results: Results, about: dict[str, Any], *, partial: bool) -> dict[str, Any]:
    conditions = about | {"skipped_prompts": run.skipped}
    report = {"partial": partial, "conditions": conditions, **summarize(run.records, run.gaps)}
    results.finish(report, markdown(report))
    return report


@contextmanager
def _loaded(settings: Settings) -> Iterator[tuple[Ouroboros, LoadedModel | None]]:
    """The models, one copy of each."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    target = models.load(
        settings.model, device=settings.device, dtype=settings.dtype, quantization=settings.quantization
    )
    draft = None
    if settings.draft:
        draft = models.load(settings.draft, device=target.model.device, dtype=target.model.dtype)
    pair = (draft.model, draft.tokenizer) if draft else None
    for one in filter(None, (target, draft)):
        measure_now(one.model)
    with Ouroboros(target.model, target.tokenizer, draft_model=pair) as ouroboros:
        ouroboros.name = target.name
        yield ouroboros, draft


def _conditions(settings: Settings, methods: list[str], ouroboros: Ouroboros, started: datetime) -> dict[str, Any]:
    return {
        "model": ouroboros.name,
        "quantization": settings.quantization,
        "draft": settings.draft,
        "prompts": settings.prompts.name,
        "categories": list(settings.category),
        "limit": settings.limit,
        "instruction": settings.instruction,
        "max_new_tokens": settings.max_new_tokens,
        "repeats": settings.repeats,
        "methods": methods,
        "decoding": "greedy",
        "started": started.isoformat(timespec="seconds"),
        **machine(ouroboros.model),
    }
