"""Measure a model on a file of prompts and print a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from ..ouroboros import Ouroboros
from .report import conditions, markdown, table
from .side_by_side import measure


def main() -> None:
    arguments = _arguments()
    with Ouroboros.from_pretrained(
        arguments.model, draft_model=arguments.draft_model, dtype=arguments.dtype
    ) as ouroboros:
        prompts = [
            ouroboros.encode([{"role": "user", "content": arguments.instruction + text}])
            for text in list(_prompts(arguments.prompts))[: arguments.limit]
        ]
        rows = list(measure(ouroboros, prompts, arguments.max_new_tokens))
        title = f"{ouroboros.name}, {len(prompts)} prompts of {arguments.prompts.name}, "
        title += f"at most {arguments.max_new_tokens} tokens each"
        Console().print(table(rows, title))
        print(conditions(ouroboros.model))
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(f"{markdown(rows, title)}\n{conditions(ouroboros.model)}\n\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ouroboros_llm.bench", description=__doc__)
    parser.add_argument("prompts", type=Path, help="JSON lines with a field prompt, question or turns")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--draft-model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit", type=int, help="prompts at most")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--instruction", default="", help="text put before every prompt")
    parser.add_argument("--output", type=Path, help="append the table to this file, as Markdown")
    return parser.parse_args()


def _prompts(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield row.get("prompt") or row.get("question") or row["turns"][0]


if __name__ == "__main__":
    main()
