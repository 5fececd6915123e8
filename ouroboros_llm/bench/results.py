"""What a run leaves on disk: a new folder, an answer at a time, and a report at the end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from .side_by_side import Record


class Results:
    """A folder of its own per run, named by time and model; nothing that was there is ever written over."""

    def __init__(self, root: Path, model: str, started: datetime) -> None:
        """Raises OSError where `root` cannot be written to."""
        model = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-") or "model"
        self.folder = new_folder(root, model, started)
        self._answers = (self.folder / "answers.jsonl").open("w", encoding="utf-8")

    def add(self, record: Record, text: str) -> None:
        """Write one answer; it is on disk when this returns, whatever happens next."""
        question, answer = record.question, asdict(record.answer)
        line = {
            "number": question.number,
            "prompt": question.name,
            "category": question.category,
            "turn": question.turn,
            "repeat": question.repeat,
            "method": record.method,
            "prompt_tokens": len(question.token_ids),
            **answer,
            "text": text,
        }
        self._answers.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._answers.flush()

    def finish(self, report: Mapping[str, Any], markdown: str) -> None:
        """Write the report, whole or not at all."""
        self._answers.close()
        write_report(self.folder, report, markdown)


def write_report(folder: Path, report: Mapping[str, Any], markdown: str) -> None:
    """Write `report.json` and `report.md`, each whole or not at all."""
    _write(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _write(folder / "report.md", markdown)


def new_folder(root: Path, name: str, started: datetime) -> Path:
    """A folder that was not there before, named by time and by what is in it."""
    name = f"{started:%Y-%m-%dT%H-%M-%S}-{name}"
    root.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError("count() never ends")


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
