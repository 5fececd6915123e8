"""Questions about Python's own documentation: three conversations over an index, then the second day, in a new process.

The documents are the chapters of Python's language reference that `help()` shows; nothing is downloaded but the model,
if it is not there yet. A conversation keeps what it has retrieved where it stood, so that every prompt begins like the
one before and only what is new is read.

    python examples/llamaindex_query_engine.py --questions 4
    python examples/llamaindex_query_engine.py --model qwen2.5-coder-1.5b-instruct --dtype float32 --check 5
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any

from llama_index.core import Document, Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import Response
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from rich.console import Console
from rich.table import Table

from llama_index.llms.ouroboros import OuroborosLLM, ouroboros_scope
from llama_index.llms.ouroboros.prompts import chat_messages
from ouroboros_llm import Ouroboros
from ouroboros_llm.bench.methods import LOOKUP_TOKENS, Answer, Generate, Question
from ouroboros_llm.bench.report import conditions

CHAPTERS = (
    "assert assignment atom-literals augassign booleans break class comparisons context-managers continue del dict "
    "else exceptions exprlists for function global if import in lambda lists nonlocal pass raise return sequence-types "
    "slicings subscriptions truth try while with yield"
).split()
SYSTEM = "You answer questions about Python from passages of its language reference, in their own words."
TEMPLATE = "A passage of the language reference:\n\n{context}\n\n{question}"
MAX_TOKENS = 128

FIRST_DAY = (
    (
        "How does the execution of the with statement proceed? List the steps.",
        "What does the for statement do with its iterator, and what is the else clause for?",
        "When is the finally clause of a try statement executed?",
        "What does the from clause of the raise statement do?",
        "To what code is an assert statement equivalent?",
        "What happens when the del statement deletes a name?",
        "When may a return statement occur, and what does it leave?",
    ),
    (
        "What does the global statement declare?",
        "How does the nonlocal statement differ from global?",
        "What does a lambda expression yield?",
        "When are default parameter values of a function evaluated?",
        "In which namespace is the suite of a class definition executed?",
        "What does a yield statement make of a function?",
        "What does break do in a nested loop?",
    ),
    (
        "Which objects are considered false in truth value testing?",
        "What does chaining comparisons mean?",
        "What do the operators and, or and not evaluate to?",
        "How is a slicing of a sequence evaluated?",
        "How is a subscription of a mapping evaluated?",
        "What does a dict display yield, and in which order is it evaluated?",
    ),
)
SECOND_DAY = (
    (
        "In the with statement, what happens if the suite was exited by an exception?",
        "What is the syntax of the for statement, and how often is its expression list evaluated?",
        "What happens to an exception in a try statement that has a finally clause?",
        "What does a raise statement without expressions do?",
        "What is the extended form of the assert statement equivalent to?",
        "How does del delete attribute references, subscriptions and slicings?",
        "What does return do in a generator function?",
    ),
    (
        "Which names must not be listed in a global statement?",
        "What does the nonlocal statement cause names to refer to?",
        "To which function definition is a lambda expression equivalent?",
        "Why are mutable default parameter values of a function shared between calls?",
        "What is a class definition, and what does its inheritance list give?",
        "What is a yield statement semantically equivalent to?",
        "Where may break occur, and does it run the else clause of a loop?",
    ),
    (
        "What is the truth value of an object by default?",
        "When is each expression of chained comparisons evaluated?",
        "When does the expression x and y evaluate y?",
        "What is the syntax of a slicing?",
        "How are negative indices treated in a subscription of a sequence?",
        "What happens with duplicate keys in a dict display?",
    ),
)


class BM25(BaseRetriever):
    """The passage that shares the rarest words and pairs of words with a question (Robertson and Zaragoza, 2009)."""

    def __init__(self, nodes: Sequence[BaseNode], *, top: int = 1, k1: float = 1.2, b: float = 0.75) -> None:
        super().__init__()
        self._nodes, self._top, self._k1, self._b = nodes, top, k1, b
        self._counts = [Counter(_words(node.get_content())) for node in nodes]
        self._lengths = [sum(counts.values()) for counts in self._counts]
        self._found_in = Counter(word for counts in self._counts for word in counts)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        words = set(_words(query_bundle.query_str))
        scores = [self._score(words, number) for number in range(len(self._nodes))]
        best = sorted(range(len(scores)), key=lambda number: -scores[number])[: self._top]
        return [NodeWithScore(node=self._nodes[number], score=scores[number]) for number in best]

    def _score(self, words: set[str], number: int) -> float:
        counts, mean = self._counts[number], sum(self._lengths) / len(self._lengths)
        damping = self._k1 * (1 - self._b + self._b * self._lengths[number] / mean)
        return sum(
            math.log(1 + (len(self._nodes) - found + 0.5) / (found + 0.5))
            * (counts[word] * (self._k1 + 1) / (counts[word] + damping))
            for word in words
            if (found := self._found_in[word])
        )


def _words(text: str) -> list[str]:
    """Words, and pairs of them: "with statement" says more than either."""
    words = re.findall(r"\w+", text.lower())
    return words + [" ".join(pair) for pair in pairwise(words)]


class Conversation(CustomQueryEngine):
    """A query engine that remembers. What it retrieves goes into the message of its question and stays there: a prompt
    that changed in front would have to be read from there on again."""

    llm: OuroborosLLM
    retriever: BaseRetriever
    messages: list[ChatMessage]

    def custom_query(self, query_str: str) -> Response:
        nodes = self.retriever.retrieve(query_str)
        context = "\n\n".join(node.get_content() for node in nodes)
        self.messages.append(ChatMessage(TEMPLATE.format(context=context, question=query_str)))
        prompt = chat_messages(self.messages)
        answer = self.llm.chat(self.messages)
        self.messages.append(answer.message)
        return Response(str(answer.message.content), source_nodes=nodes, metadata={"raw": answer.raw, "prompt": prompt})


@dataclass
class Turn:
    """What one question took."""

    prompt_ids: list[int]
    text: str
    tokens: int
    forwards: int
    prompt_tokens: int
    cached_tokens: int
    seconds: float


def ask(llm: OuroborosLLM, nodes: Sequence[BaseNode], conversations: Sequence[Sequence[str]]) -> list[Turn]:
    """The questions, each conversation in the scope that it had before."""
    retriever, ouroboros, turns = BM25(nodes), llm.load(), []
    for number, questions in enumerate(conversations):
        engine = Conversation(llm=llm, retriever=retriever, messages=[ChatMessage(SYSTEM, role="system")])
        with ouroboros_scope(f"conversation:{number}"):
            for question in questions:
                began = perf_counter()
                answer: Any = engine.query(question)
                seconds = perf_counter() - began
                turns.append(_turn(ouroboros, answer, seconds))
                print(f"\n> {question}\n{answer}", file=sys.stderr, flush=True)
    return turns


def _turn(ouroboros: Ouroboros, answer: Any, seconds: float) -> Turn:
    raw = answer.metadata["raw"]
    usage = raw["usage"]
    return Turn(
        ouroboros.encode(answer.metadata["prompt"]),
        str(answer),
        usage["completion_tokens"],
        raw["statistics"]["target_forwards"],
        usage["prompt_tokens"],
        usage["cached_tokens"],
        seconds,
    )


def peers(ouroboros: Ouroboros, first: Sequence[Turn], check: int) -> dict[str, list[Turn]]:
    """The first day's prompts through transformers' own `generate`: with prompt lookup, and some of them plain."""
    lookup = Generate(ouroboros.model, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    plain = Generate(ouroboros.model)
    chosen = [first[number] for number in _spread(len(first), check)]
    return {
        "plain": [_peer(ouroboros, plain, turn) for turn in chosen],
        "prompt lookup": [_peer(ouroboros, lookup, turn) for turn in first],
    }


def _peer(ouroboros: Ouroboros, method: Generate, turn: Turn) -> Turn:
    question = Question(0, "", None, 0, 0, tuple(turn.prompt_ids), MAX_TOKENS)
    answer: Answer = method(question)
    text = str(ouroboros.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True))
    size = len(answer.token_ids)
    return Turn(turn.prompt_ids, text, size, answer.target_forwards, len(turn.prompt_ids), 0, answer.seconds)


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, at equal distances."""
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]


def run(stage: str, arguments: argparse.Namespace) -> dict[str, list[Turn]]:
    """One process's part."""
    llm = OuroborosLLM(
        model=arguments.model,
        dtype=arguments.dtype,
        store=arguments.store,
        max_tokens=MAX_TOKENS,
        corpus_scope="python",
    )
    Settings.llm = llm
    if stage == "peers":
        first = [Turn(**turn) for turn in json.loads(Path(arguments.first).read_text())["cold"]]
        return peers(llm.load(), first, arguments.check)
    nodes = SentenceSplitter(chunk_size=320, chunk_overlap=0).get_nodes_from_documents(
        [Document(text=topics[name], doc_id=name) for name in CHAPTERS]
    )
    print(llm.index_documents(nodes), file=sys.stderr)
    if stage == "first":
        return {"cold": ask(llm, nodes, _first(FIRST_DAY, arguments.questions))}
    others = ask(llm, nodes, _first(SECOND_DAY, arguments.questions))
    return {"others": others, "again": ask(llm, nodes, _first(FIRST_DAY, arguments.questions))}


def _first(conversations: Sequence[Sequence[str]], count: int) -> list[list[str]]:
    """The first questions of each conversation, `count` in all."""
    places = sorted((turn, number) for number, questions in enumerate(conversations) for turn in range(len(questions)))
    chosen = places[:count]
    return [[questions[turn] for turn, of in sorted(chosen) if of == n] for n, questions in enumerate(conversations)]


def in_another_process(stage: str, arguments: argparse.Namespace, folder: Path) -> dict[str, list[Turn]]:
    report = folder / f"{stage}.json"
    given = {name: getattr(arguments, name) for name in ("model", "dtype", "questions", "check")}
    given |= {"stage": stage, "store": f"sqlite:///{folder / 'phrases.db'}", "report": report}
    given |= {"first": folder / "first.json"}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, __file__, *options], check=True)
    return {name: [Turn(**turn) for turn in turns] for name, turns in json.loads(report.read_text()).items()}


NAMES = {
    "plain": "plain (model.generate)",
    "prompt lookup": "prompt lookup (transformers)",
    "cold": "ouroboros, first day",
    "others": "ouroboros, second day, other questions",
    "again": "ouroboros, second day, the same questions",
}


def rows(results: dict[str, list[Turn]]) -> Iterator[dict[str, Any]]:
    for name, title in NAMES.items():
        turns = results[name]
        tokens, forwards = sum(turn.tokens for turn in turns), sum(turn.forwards for turn in turns)
        yield {
            "method": title,
            "questions": len(turns),
            "tokens": tokens,
            "forwards": forwards,
            "tokens_per_forward": tokens / forwards,
            "seconds": sum(turn.seconds for turn in turns),
            "cached": sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns),
        }


def identical(results: dict[str, list[Turn]], method: str) -> str:
    """How many of the plain answers `method` gave too, to the same prompts."""
    by_prompt = {tuple(turn.prompt_ids): turn.text.strip() for turn in results[method]}
    plain = results["plain"]
    same = sum(by_prompt.get(tuple(turn.prompt_ids)) == turn.text.strip() for turn in plain)
    return f"{same} of {len(plain)}"


def report(results: dict[str, list[Turn]], machine: str, as_json: bool) -> None:
    found = list(rows(results))
    same = {name: identical(results, name) for name in ("cold", "again")}
    if as_json:
        print(json.dumps({"conditions": machine, "rows": found, "identical": same}, indent=2))
        return
    table = Table(title="Questions about Python's language reference")
    for column in ("", "questions", "tokens", "forwards", "tokens per forward", "seconds", "cached"):
        table.add_column(column, justify="right" if column else "left")
    for row in found:
        table.add_row(
            row["method"],
            *(str(row[name]) for name in ("questions", "tokens", "forwards")),
            f"{row['tokens_per_forward']:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['cached']:.0%}",
        )
    Console(width=120).print(table)
    print(f"the same answer as plain decoding: {same['cold']} cold, {same['again']} again\n{machine}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="registry name, path or hub id")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 ...")
    parser.add_argument("--questions", type=int, default=20, help="how many, of 20")
    parser.add_argument("--check", type=int, default=5, help="answers compared with plain decoding")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    for internal in ("--stage", "--store", "--report", "--first"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if arguments.stage:
        found = run(arguments.stage, arguments)
        Path(arguments.report).write_text(
            json.dumps({name: [asdict(t) for t in turns] for name, turns in found.items()})
        )
        return
    results: dict[str, list[Turn]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("first", "second", "peers"):
            results |= in_another_process(stage, arguments, Path(folder))
    model = OuroborosLLM(model=arguments.model, dtype=arguments.dtype, store=None).load().model
    report(results, f"{arguments.model}, at most {MAX_TOKENS} tokens, greedy; {conditions(model)}", arguments.json)


if __name__ == "__main__":
    main()
