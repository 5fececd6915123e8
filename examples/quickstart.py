"""A LangChain chain that gets faster the longer it is used: three turns, then the same three in a new process.

Run it with `make demo`, or `python examples/quickstart.py`. The first run fetches a small model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import PromptTemplate
from rich.console import Console
from rich.table import Table

from langchain_ouroboros import OuroborosLLM
from ouroboros_llm.bench.report import conditions
from ouroboros_llm.defaults import shared

TURNS = (
    "Write a Python function `mean(numbers)` that returns the average of a list, with a docstring.",
    "Write the same function, but let it return None for an empty list.",
    "Write the same function once more, and add a function `median(numbers)` in the same style.",
)
TEMPLATE = "{history}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
MAX_TOKENS = 160


@dataclass
class Turn:
    """What one turn took."""

    text: str
    tokens: int
    forwards: int
    seconds: float


class GraphCapturer(BaseCallbackHandler):
    """Keeps what the model reports at the end of an answer."""

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.info: dict[str, Any] = response.generations[0][0].generation_info or {}


def chat(store: str) -> list[Turn]:
    """The three turns through a chain, streamed to the terminal."""
    llm = OuroborosLLM(store=store, scope="conversation:quickstart", max_tokens=MAX_TOKENS)
    chain = PromptTemplate.from_template(TEMPLATE) | llm | StrOutputParser()
    history, turns = "", []
    for question in TURNS:
        print(f"\n> {question}\n", flush=True)
        recorder, text = GraphCapturer(), ""
        for piece in chain.stream({"history": history, "question": question}, config={"callbacks": [recorder]}):
            print(piece, end="", flush=True)
            text += piece
        print(flush=True)
        report = recorder.info["ouroboros"]
        tokens = recorder.info["token_usage"]["completion_tokens"]
        turns.append(Turn(text, tokens, report["target_forwards"], report["seconds"]))
        history += TEMPLATE.format(history="", question=question) + text + "<|im_end|>\n"
    return turns


def plain() -> tuple[list[Turn], str]:
    """The same turns through the model's own `generate`."""
    ouroboros = shared(store=None)
    history, turns = "", []
    for question in TURNS:
        ids = torch.tensor([ouroboros.encode(TEMPLATE.format(history=history, question=question))])
        began = perf_counter()
        output: Any = ouroboros.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        seconds = perf_counter() - began
        answer = output[0, ids.shape[1] :].tolist()
        text = str(ouroboros.tokenizer.decode(answer, skip_special_tokens=True))
        turns.append(Turn(text, len(answer), len(answer), seconds))
        history += TEMPLATE.format(history="", question=question) + text + "<|im_end|>\n"
    return turns, f"{ouroboros.name}; {conditions(ouroboros.model)}"


def in_another_process(store: str, title: str, report: Path) -> list[Turn]:
    print(f"\n=== {title} ===", flush=True)
    subprocess.run([sys.executable, __file__, "--chat", store, str(report)], check=True)
    return [Turn(**turn) for turn in json.loads(report.read_text())]


def row(name: str, turns: list[Turn], reference: list[Turn]) -> tuple[str, ...]:
    tokens, forwards = sum(turn.tokens for turn in turns), sum(turn.forwards for turn in turns)
    seconds = sum(turn.seconds for turn in turns)
    same = [(turn.text, turn.tokens) for turn in turns] == [(turn.text, turn.tokens) for turn in reference]
    return name, str(tokens), str(forwards), f"{tokens / forwards:.2f}", f"{seconds:.1f}", "yes" if same else "NO"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, report = f"sqlite:///{Path(folder) / 'phrases.db'}", Path(folder) / "report.json"
        cold = in_another_process(store, "first process: an empty store", report)
        warm = in_another_process(store, "second process: it remembers the first", report)
    print("\n=== the model alone, for comparison ===", flush=True)
    alone, machine = plain()
    table = Table(title="Three turns")
    for column in ("", "tokens", "target forwards", "mean acceptance length", "seconds", "identical tokens"):
        table.add_column(column, justify="left" if not column else "right")
    for name, turns in (("transformers generate", alone), ("ouroboros, cold", cold), ("ouroboros, warm", warm)):
        table.add_row(*row(name, turns, alone))
    Console().print(table)
    print(machine)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--chat"]:
        Path(sys.argv[3]).write_text(json.dumps([asdict(turn) for turn in chat(sys.argv[2])]))
    else:
        main()
